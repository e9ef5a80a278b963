"""causal_conv1d_silu: the sizes it is tried at, wrong versions, its work, and its kernels as launched."""

import torch
from torch import Tensor

from kernels.documents import Documents
from kernels.ops.causal_conv1d_silu import (
    BACKWARD_STAGES,
    BC,
    FORWARD_STAGES,
    _backward_kernel,
    _forward_kernel,
    causal_conv1d_silu_triton,
)
from kernels.proof.closeness import Case
from kernels.proof.protocol import CompileSpec, Work

CASES = [
    {"lengths": (4096,), "splits": (2048, 2048, 6144), "strided": True},
    {"lengths": (650,) * 6 + (195, 1), "splits": (2048, 2048, 6144), "strided": True},
    {"lengths": (1, 1, 1, 1), "splits": (2048, 2048, 6144), "state": True},
    {"lengths": (63, 1, 2, 65), "splits": (32, 32, 100), "taps": 3},
]


def make_case(lengths, splits, taps=4, strided=False, state=False, device="cpu", dtype=torch.float32, seed=0) -> Case:
    """One packed row of documents of these lengths; `state` gives every document the rows before its first."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    T, C = sum(lengths), sum(splits)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    documents = Documents(bounds, device)
    inputs = {"x": draw(T, C), "weight": draw(C, taps) / taps**0.5}
    if state:
        inputs["initial_state"] = draw(len(lengths), taps - 1, C)

    def call(op, x: dict[str, Tensor]) -> dict[str, Tensor]:
        # A slice of a wider row, as the fused in-projection's output is; cloning inputs would make it dense.
        rows = torch.cat([x["x"]] * 2, 1)[:, :C] if strided else x["x"]
        outputs = op(rows, x["weight"], documents, splits, x.get("initial_state"))
        return {f"c{i}": c for i, c in enumerate(outputs)}

    name = f"lengths {lengths}, splits {splits}, {taps} taps{', strided' * strided}{', state' * state}"
    return Case(name, inputs, call, ("x",))


def _mutant(change):
    def op(x, weight, documents, splits, initial_state=None):
        changed = change(x=x, weight=weight, documents=documents, splits=splits, initial_state=initial_state)
        return causal_conv1d_silu_triton(**changed)

    return op


def _one_document(**x):
    T = x["documents"].total
    return x | {"documents": Documents(torch.tensor([0, T], dtype=torch.int32), x["documents"].device)}


def _boundary_late(**x):
    bounds = [b + (0 < b < x["documents"].total) for b in x["documents"].bounds]
    return x | {"documents": Documents(torch.tensor(sorted(set(bounds)), dtype=torch.int32), x["documents"].device)}


MUTANTS = {
    "no restart at documents": _mutant(_one_document),
    "restart one token late": _mutant(_boundary_late),
    "taps reversed": _mutant(lambda **x: x | {"weight": x["weight"].flip(1)}),
}


def work(lengths, splits, taps=4, strided=False, state=False) -> Work:
    """In bf16: x in, q, k, v out; backward x and three gradients in, dx out."""
    elements = sum(lengths) * sum(splits)
    return Work(4 * elements, 6 * elements, 2 * taps * elements, 4 * taps * elements)


def compile_specs() -> list[CompileSpec]:
    """C = 10,240 = 2,048 + 2,048 + 6,144 and four taps, as in training; forward also with states, as in decoding."""
    int64 = ("p_pos", "p_index")
    shape = {"S0": 2048, "S1": 2048, "S2": 6144, "M": 4, "BC": BC}
    specs = []
    for kernel, state in ((_forward_kernel, False), (_forward_kernel, True), (_backward_kernel, False)):
        stages = BACKWARD_STAGES if kernel is _backward_kernel else FORWARD_STAGES
        constexprs = shape | {"STAGES": stages} | ({} if state else {"p_state": None})
        types = {n: "*i64" if n in int64 else "*bf16" if n[:2] == "p_" else "i32" for n in kernel.arg_names}
        signature = {n: t for n, t in types.items() if n not in constexprs}
        name = f"causal_conv1d_silu{kernel.__name__}{' with state' * state}"
        specs.append(CompileSpec(name, kernel, signature, constexprs))
    return specs
