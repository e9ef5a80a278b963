"""causal_conv1d_silu: the sizes it is tried at, wrong versions, its work, and its kernels as launched."""

from importlib import import_module

import torch
from torch import Tensor

from kernels.documents import Documents
from kernels.ops import causal_conv1d_silu as ops
from kernels.proof.cases._shared import packed, random_on, rows_of, with_changes
from kernels.proof.closeness import Case
from kernels.proof.contract import Op, Peer, Work
from kernels.proof.launches import launched

CASES = [
    {"lengths": (4096,), "splits": (2048, 2048, 6144), "strided": True},
    {"lengths": (650,) * 6 + (195, 1), "splits": (2048, 2048, 6144), "strided": True},
    {"lengths": (1, 1, 1, 1), "splits": (2048, 2048, 6144), "state": True},
    {"lengths": (63, 1, 2, 65), "splits": (32, 32, 100), "taps": 3},
]


def make_case(lengths, splits, taps=4, strided=False, state=False, device="cpu", dtype=torch.float32, seed=0) -> Case:
    """One packed row of documents of these lengths; `state` gives every document the rows before its first."""
    draw, _ = random_on(device, seed)
    documents = packed(lengths, device)
    T, C = sum(lengths), sum(splits)
    inputs = {"x": draw(T, C), "weight": draw(C, taps)}
    if state:
        inputs["initial_state"] = draw(len(lengths), taps - 1, C)
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    inputs["weight"] = inputs["weight"] / taps**0.5

    def call(op, x: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = op(rows_of(x["x"], strided), x["weight"], documents, splits, x.get("initial_state"))
        return {f"c{i}": c for i, c in enumerate(outputs)}

    return Case(inputs, call, ("x",))


def _one_document(documents, **_):
    return {"documents": packed([documents.total], documents.device)}


def _boundary_late(documents, **_):
    bounds = sorted({b + (0 < b < documents.total) for b in documents.bounds})
    return {"documents": Documents(torch.tensor(bounds, dtype=torch.int32), documents.device)}


MUTANTS = with_changes(ops.causal_conv1d_silu_triton, {
    "no restart at documents": _one_document,
    "restart one token late": _boundary_late,
    "taps reversed": lambda weight, **_: {"weight": weight.flip(1)},
})  # fmt: skip


def work(lengths, splits, taps=4, strided=False, state=False) -> Work:
    """In bf16: x in, q, k, v out; backward x and three gradients in, dx out."""
    elements = sum(lengths) * sum(splits)
    return Work(4 * elements, 6 * elements, 2 * taps * elements, 4 * taps * elements)


def _fla(size: dict, device: str):
    conv = import_module("fla.modules.convolution").causal_conv1d
    cu = packed(size["lengths"], device).cu_seqlens.long()
    return lambda x: conv(x["x"][None], x["weight"], activation="silu", cu_seqlens=cu)[0][0].split(size["splits"], -1)


OP = Op(
    "causal_conv1d_silu", ops.causal_conv1d_silu_reference, ops.causal_conv1d_silu_triton, CASES, make_case, MUTANTS,
    work, launched("causal_conv1d_silu"), weights=("weight",), by_document=("initial_state",),
    permuted=(
        {"lengths": (1, 2, 3, 63, 650, 1024), "splits": (2048, 2048, 6144)},
        {"lengths": (1, 3, 66), "splits": (32, 32, 100)},
    ),
    peers=(Peer("flash-linear-attention", "fla", _fla),),
)  # fmt: skip
