"""adamw_8bit: the sizes it is tried at, wrong versions, its work, and its kernels as launched."""

import math
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from kernels.ops import adamw_8bit as adamw
from kernels.proof.cases._shared import with_changes
from kernels.proof.closeness import Case
from kernels.proof.contract import Op, Work
from kernels.proof.launches import launched

# Rank 1 at 27B: A and B of gate, up, down in 64 layers, of q|gate, k, v, o in 16. 512 segments, 4,980,736 elements.
RECIPE_27B = [5120, 17408, 5120, 17408, 17408, 5120] * 64 + [5120, 12288, 5120, 1024, 5120, 1024, 6144, 5120] * 16
HYPER = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 1.0}
CASES = [
    {"sizes": RECIPE_27B},
    {"sizes": [1, 255, 256, 257, 4096, 5000]},
    {"sizes": [1, 255, 256, 257, 600], "min_8bit_size": 1},
    {"sizes": [4095, 4096]},
    {"sizes": [300, 20], "min_8bit_size": math.inf},
]


def make_case(
    sizes: list[int], min_8bit_size: float = 4096,
    device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0,
) -> Case:  # fmt: skip
    """Step 4 of segments of these sizes with 256 foreign elements between them; half of the gradient's norm is clipped.

    The hyper-parameters let every term weigh: eps and decay are seen at 1e-5.
    """
    generator = torch.Generator().manual_seed(seed)
    random = partial(torch.randn, generator=generator, dtype=torch.float64)
    stops = (torch.tensor(sizes) + adamw.ROW).cumsum(0).tolist()
    segments = [(stop - adamw.ROW - size, stop - adamw.ROW) for stop, size in zip(stops, sizes, strict=True)]
    state = adamw.AdamWState.zeros(segments, min_8bit_size, torch.device("cpu"), dtype)
    # Elements of a row differ by two decades; every 37th is new and so small that its v needs the rule against code 0.
    scale = 10 ** (-2 * torch.rand(stops[-1], generator=generator, dtype=torch.float64))
    scale[::37] *= 1e-3
    param, grad = 0.02 * random(stops[-1]), (scale * random(stops[-1])).to(dtype)
    for rows in adamw.row_groups(state):
        index, inside = adamw.elements(state, rows)
        m, v = 0.5 * scale[index] * random(index.shape), scale[index].square() * (0.5 + random(index.shape).square())
        known = inside & (scale[index] > 1e-2)
        adamw.store_moments(state, rows, m * known, v * known, torch.tensor(True))
    state.counters[0] = 3
    max_grad_norm = adamw.grad_norm(grad, state).item() / 2
    _avoid_ties(grad, state, max_grad_norm)
    inputs = {"param": param.to(dtype), "grad": grad, **state.saved()}
    inputs = {name: x.to(device) for name, x in inputs.items()}
    fixed = {f.name: getattr(state, f.name).to(device) for f in fields(state) if f.name not in adamw.AdamWState.SAVED}

    def call(op: Callable, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        param = inputs["param"].clone()
        now = adamw.AdamWState(**fixed, **{name: inputs[name].clone() for name in adamw.AdamWState.SAVED})
        norm, skipped = op(param, inputs["grad"], now, **HYPER, max_grad_norm=max_grad_norm)
        return {"moved": param - inputs["param"], "norm": norm, "skipped": skipped, **now.saved()}

    return Case(inputs, call)


def _avoid_ties(grad: Tensor, state: adamw.AdamWState, max_grad_norm: float) -> None:
    """Changes old codes until no new value lies so near a border of two codes that fp32 and fp64 could disagree."""
    clip = min(1.0, max_grad_norm / (adamw.grad_norm(grad, state).item() + 1e-6))
    for rows in [rows for rows in adamw.row_groups(state) if rows.start < state.n_8bit]:
        index, inside = adamw.elements(state, rows)
        g = torch.where(inside, grad[index].double(), 0) * clip
        for _ in range(20):
            near = 0
            old = [x.double() for x in adamw.load_moments(state, rows, inside)]
            for code, x, beta, new, borders in (
                (state.code_m, old[0], HYPER["betas"][0], g, state.borders[0].double()),
                (state.code_v, old[1], HYPER["betas"][1], g * g, state.borders[1].double()),
            ):
                x, size = beta * x + (1 - beta) * new, beta * x.abs() + (1 - beta) * new.abs()
                absmax = x.abs().amax(1, keepdim=True).clamp(min=1e-30)
                above = torch.bucketize(x / absmax, borders).clamp(max=adamw.ROW - 2)
                gap = torch.stack([borders[above], borders[(above - 1).clamp(min=0)]]).sub(x / absmax).abs().amin(0)
                # 1e-5 of what was added up is far above fp32's rounding (6e-8): outside, both precisions take one code.
                tie = inside & (gap < 1e-5 * size / absmax)
                near += tie.sum().item()
                code[rows] = torch.where(tie, torch.where(code[rows] < 200, code[rows] + 1, code[rows] - 1), code[rows])
            if not near:
                break
        assert not near, f"{near} ties are left"


def _with_parts(**replaced: Callable) -> Callable:
    """A mutant: the reference with some of its parts replaced."""

    def mutant(*args, **kwargs) -> tuple[Tensor, Tensor]:
        with mock.patch.multiple(adamw, **replaced):
            return adamw.adamw_8bit_reference(*args, **kwargs)

    return mutant


def _coupled_decay(param, grad, weight_decay, **_):
    return {"grad": grad + weight_decay * param, "weight_decay": 0.0}


def _move_by_rounded(p, m, v, *rest, right=adamw.move):
    rounded = []
    for x, absmax, values in ((m, m.abs().amax(1), adamw.dynamic_map(True)), (v, v.amax(1), adamw.dynamic_map(False))):
        values = values.to(x)
        code = adamw.nearest_code(x, absmax, (values[:-1] + values[1:]) / 2)
        rounded.append(values[code] * absmax[:, None])
    return right(p, *rounded, *rest)


MUTANTS = {
    "eps without bias correction": _with_parts(
        step_scalars=lambda *args, right=adamw.step_scalars: (right(*args)[0], args[3])
    ),
    "bias correction of the next step": _with_parts(
        step_scalars=lambda t, *rest, right=adamw.step_scalars: right(t + 1, *rest)
    ),
    "moved by the rounded m and v": _with_parts(move=_move_by_rounded),
    "v > 0 rounds to code 0": _with_parts(nonzero_code=lambda code, v: code),
} | with_changes(adamw.adamw_8bit_reference, {
    "weight decay coupled to the gradient": _coupled_decay,
    "no clipping": lambda **_: {"max_grad_norm": math.inf},
})  # fmt: skip


def work(sizes: list[int], min_8bit_size: float = 4096) -> Work:
    """Gradient twice (norm, update), parameter and states read and written. There is no backward."""
    total = 0
    for size in sizes:
        rows = -(-size // adamw.ROW)
        total += (
            16 * size
            + rows * (2 * 2 * (adamw.ROW + 4) if size >= min_8bit_size else 2 * 2 * 4 * adamw.ROW)
            + 2 * 12 * rows
        )
    return Work(forward_bytes=total, backward_bytes=0)


OP = Op(
    "adamw_8bit", adamw.adamw_8bit_reference, adamw.adamw_8bit_triton, CASES, make_case, MUTANTS, work,
    launched("adamw_8bit"),
    dtypes=(torch.float32,),  # of parameters and gradients, in every run
)  # fmt: skip
