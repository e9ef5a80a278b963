"""Merges an adapter into the base: W + s B A, computed in fp32 and rounded once, shard by shard.

Everything else is copied: tensors that no adapter touches byte for byte (vision tower, multi-token-prediction head,
norms), and every auxiliary file, because servers refuse a folder that lacks a processor's or the tokenizer's config.
The folder is written under a temporary name, read back and checked, and only then renamed: an interrupted merge leaves
nothing that looks finished.
"""

import errno
import glob
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from psysafe.checkpoint.adapter import base_of_adapter, warn_of_other_base
from psysafe.checkpoint.base import resolve_model
from psysafe.checkpoint.peft_format import read_adapter
from psysafe.checkpoint.tensor_files import (
    INDEX,
    NOT_FINITE,
    READABLE,
    TensorEntry,
    all_finite,
    decoder_name,
    tensor_entries,
)
from psysafe.files import TEMPORARY, make_readable, new_folder, remove_leftovers, sync, temporary_for
from psysafe.program import UserError, named_errors

# Weights in other formats would not be merged; the base's own shards and index are written anew.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", INDEX)


def merge(model: str, adapter: str | Path, out: str | Path, shard_size: str = "", revision: str = "") -> Path:
    """Writes the merged checkpoint to `out`, a new or empty folder, and returns it.

    model: "" takes the base that the adapter names. shard_size: "5GB" cuts new shards of at most that size; "" keeps
    the base's. Peak memory is one shard. Raises UserError when the adapter does not fit the base, or `out` is taken.
    """
    out = new_folder(out)
    limit = _bytes(shard_size) if shard_size else 0
    base_revision = ""
    if not model:
        model, base_revision = base_of_adapter(adapter)
    if str(model).startswith("random:"):
        raise UserError(f"{model}: random weights lie in no file that could be merged into; give --model a folder")
    base, commit = resolve_model(model, revision or base_revision)
    if revision and not commit:
        raise UserError(f"--revision {revision}: {model} is a folder, which has no revisions; leave the flag out")
    warn_of_other_base(adapter, str(model))
    entries = list(tensor_entries(base))
    updates = _Updates(adapter, entries, base)
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out.parent, glob.escape(out.name))
    # Everything is written beside `out` and renamed at the end: a folder of that name is always a whole checkpoint.
    temporary = temporary_for(out)
    try:
        with named_errors(out):
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
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # how safetensors says that the disk is full
        raise OSError(errno.EIO, str(error)) from None
    make_readable(path)
    sync(path)


def _write_index(path: Path, plan: dict[str, list[TensorEntry]]) -> None:
    total = sum(entry.nbytes for members in plan.values() for entry in members)
    weight_map = {entry.key: name for name, members in plan.items() for entry in members}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    sync(path)


class _Updates:
    """What the adapter adds to which of the base's tensors."""

    def __init__(self, adapter: str | Path, entries: list[TensorEntry], base: Path):
        peft = read_adapter(adapter)
        # The adapter's names and the base's differ by prefixes; both are compared without. The vision tower's weights
        # are merged, too, where the adapter has any.
        names = {decoder_name(entry.key) or entry.key.removeprefix("model."): entry for entry in entries}
        self.pairs: dict[str, tuple[Tensor, Tensor, float]] = {}
        faults = []
        for name, (A, B, _) in sorted(peft.modules.items()):
            entry = names.get(f"{name}.weight")
            if A.dim() != 2 or B.dim() != 2 or len(A) != B.shape[1]:
                faults.append(f"{name} is no pair of matrices")
            elif entry is None:
                faults.append(f"the base has no {name}.weight")
            elif entry.dtype not in READABLE:  # 8 bits alone are no number: their scales are another tensor
                faults.append(f"{entry.key} is {entry.dtype}; merge into the base before it was quantised")
            elif (B.shape[0], A.shape[1]) != entry.shape:
                faults.append(f"{name} would add {(B.shape[0], A.shape[1])} to {entry.shape}")
            else:
                self.pairs[entry.key] = A, B, peft.scale(name)
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
        A, B, scale = self.pairs[entry.key]
        # Summed in fp32 and rounded once: B A in bf16 would add a rounding of its own.
        return torch.addmm(W.float(), B.float(), A.float(), alpha=scale).to(W.dtype)


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
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def _copy_auxiliary(base: Path, to: Path) -> None:
    """Every file of the base and of its folders but weights and what is hidden (.git, .cache)."""
    for path in sorted(base.iterdir()):
        # An unfinished folder may be this one: --out may lie in the base.
        if path.name.startswith(".") or path.name.endswith(WEIGHTS) or TEMPORARY in path.name:
            continue
        if path.is_file():
            shutil.copyfile(path, to / path.name)  # a copy also of what is a link, as in the hub's cache
            sync(to / path.name)
        elif path.is_dir() and not path.is_symlink():
            (to / path.name).mkdir()
            _copy_auxiliary(path, to / path.name)
            if not any((to / path.name).iterdir()):  # it held weights only
                (to / path.name).rmdir()


def _verify(folder: Path, entries: list[TensorEntry], updates: _Updates) -> None:
    """Reads the result back: the same names, shapes and dtypes; the first and last rows of every tensor, bit by bit."""
    written = {entry.key: entry for entry in tensor_entries(folder)}
    assert written.keys() == {entry.key for entry in entries}, "the merged folder lacks tensors"
    for entry in entries:
        copy = written[entry.key]
        assert (copy.shape, copy.dtype) == (entry.shape, entry.dtype), entry.key
        if not entry.shape:
            continue
        expected, n_rows = updates.apply(entry), entry.shape[0]
        with safe_open(copy.path, framework="pt") as file:
            part = file.get_slice(entry.key)
            for rows in (slice(0, 2), slice(max(0, n_rows - 2), n_rows)):
                same = torch.equal(part[rows].view(torch.uint8), expected[rows].view(torch.uint8))
                assert same, f"{entry.key} was written wrongly"


def _bytes(text: str) -> int:
    # A unit has to be there: 5 alone would be 5 bytes.
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,12})?)\s*([KMGT])(I?)B?", text.strip().upper())
    size = float(match[1]) * (1024 if match[3] else 1000) ** (1 + "KMGT".index(match[2])) if match else 0
    if size < 1:
        raise UserError(f"--shard-size {text:.60}: expected a size with its unit, like 5GB or 500MiB")
    return int(size)
