"""An adapter as one GGUF file, for llama.cpp, which applies it to a quantised base without changing the base's file.

    llama-server -m base-Q4_K_M.gguf --lora adapter.gguf

llama.cpp computes y = W x + (alpha / r) B A x, with A and B as tensors `NAME.weight.lora_a` (r, in) and `.lora_b`
(out, r) under its own names of the projections (`blk.3.attn_q`), and one alpha for the file. Its base files hold the
delta net's value heads in another order (conversion/qwen.py), so adapters of these projections are refused.
"""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from torch import Tensor

from psysafe.checkpoint.peft_format import VISION, PeftAdapter, read_adapter
from psysafe.files import write_atomic
from psysafe.model.lora import ALL_LINEAR, is_target, lora_scale
from psysafe.program import UserError

ARCHITECTURE = "qwen35"  # llama.cpp's name of Qwen3.5's dense text models


def write_gguf(source: str | Path, out: str | Path) -> Path:
    """The adapter folder (or hub id) `source` as the file `out`, in fp32. UserError for what llama.cpp would not apply
    as PEFT does, and where the package `gguf` is missing."""
    gguf, out = _package(), Path(out).expanduser()
    if out.suffix != ".gguf":
        raise UserError(f"--out {out}: expected a name that ends in .gguf")
    if out.exists():
        raise UserError(f"--out {out}: exists already; name another file, or delete it")
    adapter = read_adapter(source)
    _check(adapter)
    rank, alpha, use_rslora, tensors = adapter.with_one_rank_and_scale()
    scale = lora_scale(rank, alpha, use_rslora)
    named = _by_llama_cpp_names(gguf, tensors)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, lambda path: _write(gguf, path, named, scale * rank))
    return out


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need the package gguf: pip install -r requirements-gguf.txt") from None
    return gguf


def _check(adapter: PeftAdapter) -> None:
    if vision := [name for name in adapter.modules if name.startswith(VISION)]:
        raise UserError(f"{adapter.source}: adapts {vision[0]}; llama.cpp keeps the vision tower in another file")
    # The multi-token-prediction head has projections of the same names in layers of its own.
    if others := [name for name in adapter.modules if not (name.startswith("layers.") and is_target(name, ALL_LINEAR))]:
        raise UserError(f"{adapter.source}: adapts {others[0]}; expected projections of the layers alone: {ALL_LINEAR}")
    if delta_net := [name for name in adapter.modules if ".linear_attn." in name]:
        raise UserError(
            f"{adapter.source}: adapts {delta_net[0]}; llama.cpp's files hold the delta net's value heads in another "
            "order, so it would be applied wrongly; merge it (python -m psysafe.checkpoint merge), then convert that"
        )


def _by_llama_cpp_names(gguf: ModuleType, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """layers.3.self_attn.q_proj.lora_A -> blk.3.attn_q.weight.lora_a"""
    n_layers = 1 + max(int(name.split(".")[1]) for name in tensors)
    (architecture,) = (a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURE)
    names = gguf.get_tensor_name_map(architecture, n_layers)
    by_name = {}
    for name, x in tensors.items():
        module, _, matrix = name.rpartition(".")
        theirs = names.get_name(f"model.{module}")
        assert theirs is not None, module
        by_name[f"{theirs}.weight.{matrix.lower()}"] = x
    return by_name


def _write(gguf: ModuleType, path: Path, tensors: Mapping[str, Tensor], alpha: float) -> None:
    writer = gguf.GGUFWriter(str(path), ARCHITECTURE)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    arrays = {name: x.float().contiguous().numpy() for name, x in tensors.items()}
    for name, x in arrays.items():
        writer.add_tensor_info(name, x.shape, x.dtype, x.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    # Not write_tensors_to_file: its numpy.tofile reports no error where a full disk takes only a part.
    for x in arrays.values():
        file.write(x.tobytes())
        writer.write_padding(file, x.nbytes)
    writer.close()
