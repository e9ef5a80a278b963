"""Merges an adapter into the base: W + s B A, computed in fp32 and rounded once, shard by shard.

Everything else is copied: tensors that no adapter touches byte for byte (vision tower, multi-token-prediction head,
norms), and every auxiliary file, because servers refuse a folder that lacks a processor's or the tokenizer's config.
The folder is written under a temporary name, read back and checked, and only then renamed: an interrupted merge leaves
nothing that looks finished.
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from psysafe.checkpoint.adapter import check_matrices, read_adapter
from psysafe.checkpoint.base import resolve_model
from psysafe.checkpoint.tensor_files import (
    INDEX,
    NOT_FINITE,
    READABLE,
    TensorEntry,
    all_finite,
    decoder_name,
    tensor_entries,
)
from psysafe.files import expand, sync, temporary_for
from psysafe.model.lora import lora_scale
from psysafe.program import UserError

# Weights in other formats would not be merged; the base's own shards and index are written anew.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", INDEX)
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def merge(model: str, adapter: str | Path, out: str | Path, shard_size: str = "", revision: str = "") -> Path:
    """Writes the merged checkpoint to `out`, which must not exist yet, and returns it.

    shard_size: "5GB" cuts new shards of at most that size; "" keeps the base's. Peak memory is one shard.
    Raises UserError when the adapter does not fit the base, or `out` is taken.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out}: exists already; give --out a new folder")
    base, _ = resolve_model(model, revision)
    entries = list(tensor_entries(base))
    updates = _Updates(expand(str(adapter)), entries, base)
    limit = _bytes(shard_size) if shard_size else 0
    out.parent.mkdir(parents=True, exist_ok=True)
    # Everything is written beside `out` and renamed at the end: a folder of that name is always a whole checkpoint.
    temporary = temporary_for(out)
    try:
        temporary.mkdir()
        _copy_auxiliary(base, temporary)
        plan = _plan(entries, limit)
        for name, members in plan.items():
            _write_file(temporary / name, members, updates)
        if list(plan) != ["model.safetensors"]:
            _write_index(temporary / INDEX, plan)
        _verify(temporary, entries, updates)
        sync(temporary)
        os.rename(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(out.parent)
    return out


def _write_file(path: Path, members: list[TensorEntry], updates: "_Updates") -> None:
    """In a function of its own, so that its tensors are freed before the next file's are read."""
    tensors = {entry.key: updates.apply(entry) for entry in members}
    for entry in members:
        if tensors[entry.key].is_floating_point() and not all_finite(tensors[entry.key]):
            raise UserError(f"{entry.path}: {entry.key} {NOT_FINITE}")
    save_file(tensors, path, metadata={"format": "pt"})
    sync(path)


def _write_index(path: Path, plan: dict[str, list[TensorEntry]]) -> None:
    total = sum(entry.nbytes for members in plan.values() for entry in members)
    weight_map = {entry.key: name for name, members in plan.items() for entry in members}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    sync(path)


class _Updates:
    """What the adapter adds to which of the base's tensors."""

    def __init__(self, adapter: str, entries: list[TensorEntry], base: Path):
        config, tensors = read_adapter(adapter)
        check_matrices(config, tensors, adapter)
        self.scale = lora_scale(config["r"], config["lora_alpha"], config.get("use_rslora", False))
        # The adapter's names and the base's differ by prefixes; both are compared by the decoder's own names.
        names = {decoder_name(entry.key): entry for entry in entries}
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        faults = []
        for name in sorted({name.rpartition(".")[0] for name in tensors}):
            A, B = tensors.get(f"{name}.lora_A"), tensors.get(f"{name}.lora_B")
            entry = names.get(f"{name}.weight")
            if A is None or B is None:
                faults.append(f"{name} has only one of lora_A and lora_B")
            elif entry is None:
                faults.append(f"the base has no {name}.weight")
            elif entry.dtype not in READABLE:  # 8 bits alone are no number: their scales are another tensor
                faults.append(f"{entry.key} is {entry.dtype}; merge into the base before it was quantised")
            elif (B.shape[0], A.shape[1]) != entry.shape or A.shape[0] != B.shape[1]:
                faults.append(f"{name} would add {(B.shape[0], A.shape[1])} to {entry.shape}")
            else:
                self.pairs[entry.key] = A, B
        # All faults in one error: an adapter of another model has hundreds, and one alone would mislead.
        if faults:
            more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
            raise UserError(f"{adapter}: does not fit this base, {base}: {'; '.join(faults[:5])}{more}")

    def apply(self, entry: TensorEntry) -> Tensor:
        """The merged tensor, or the base's own where no adapter touches it."""
        with safe_open(entry.path, framework="pt") as file:
            W = file.get_tensor(entry.key)
        if entry.key not in self.pairs:
            return W
        A, B = self.pairs[entry.key]
        # Summed in fp32 and rounded once: B A in bf16 would add a rounding of its own.
        return torch.addmm(W.float(), B.float(), A.float(), alpha=self.scale).to(W.dtype)


def _plan(entries: list[TensorEntry], limit: int) -> dict[str, list[TensorEntry]]:
    """Output file -> its tensors: as in the base, or cut in the base's order into files of at most `limit` bytes."""
    if not limit:
        plan: dict[str, list[TensorEntry]] = {}
        for entry in entries:
            plan.setdefault(entry.path.name, []).append(entry)
        return plan
    groups, size = [[]], 0
    for entry in entries:
        if groups[-1] and size + entry.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model.safetensors-{i:05}-of-{len(groups):05}.safetensors": g for i, g in enumerate(groups, 1)}


def _copy_auxiliary(base: Path, to: Path) -> None:
    for path in sorted(base.iterdir()):
        if path.is_file() and not path.name.endswith(WEIGHTS):
            shutil.copyfile(path, to / path.name)
            sync(to / path.name)


def _verify(folder: Path, entries: list[TensorEntry], updates: _Updates) -> None:
    """Reads the result back: the same names, shapes and dtypes; the first and last rows of every tensor, bit by bit."""
    written = {entry.key: entry for entry in tensor_entries(folder)}
    assert written.keys() == {entry.key for entry in entries}, "the merged folder lacks tensors"
    for entry in entries:
        copy = written[entry.key]
        assert (copy.shape, copy.dtype) == (entry.shape, entry.dtype), entry.key
        if not entry.shape:
            continue
        expected = updates.apply(entry)
        for rows in (slice(0, 2), slice(-2, None)):
            with safe_open(copy.path, framework="pt") as file:
                written_rows = file.get_tensor(entry.key)[rows]
            same = torch.equal(written_rows.view(torch.uint8), expected[rows].view(torch.uint8))
            assert same, f"{entry.key} was written wrongly"


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    if not match or float(match[1]) <= 0:
        raise UserError(f"--shard-size {text}: expected a size like 5GB or 500MiB")
    return int(float(match[1]) * UNITS[match[2] or ""])
