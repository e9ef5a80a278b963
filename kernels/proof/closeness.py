"""When two tensors count as equal, for the tests and for `kernels.check`.

At the sizes of this project every published tolerance rule that was tried let a kernel pass that drops the adapter
term. These rules can fail: fp32 is compared with fp64 at 1e-5 of the value and of the tensor's RMS, bf16 must not be
worse than plain PyTorch with the same rounding points. Outputs *and* every gradient are compared by name.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max|a - b| / max|b| over the tensor, in fp64 (0 where both are zero)."""
    a, b = actual.detach().double().cpu(), expected.detach().double().cpu()
    if a.shape != b.shape:
        raise AssertionError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    difference, scale = (a - b).abs().max().item() if a.numel() else 0.0, b.abs().max().item() if b.numel() else 0.0
    # A NaN in either tensor: it would pass every `<=` below unnoticed.
    if difference != difference:
        return float("nan")
    return 0.0 if difference == 0 else difference / scale if scale else float("inf")


def assert_close_fp32(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """fp32 results against an fp64 reference: |a - b| <= 1e-5 |b| + 1e-5 RMS(b), tensor by tensor."""
    _same_names(actual, expected)
    report = []
    for name, b in expected.items():
        a, b = actual[name].detach().double().cpu(), b.detach().double().cpu()
        assert a.shape == b.shape, f"{name}: shape {tuple(a.shape)}, expected {tuple(b.shape)}"
        # assert_close's default atol would accept an all-zero gradient of size 1e-6; this one scales with b.
        allowed = 1e-5 * b.abs() + 1e-5 * b.square().mean().sqrt()
        # `not (x <= y)` so that a NaN, which compares false, is a failure.
        bad = ~((a - b).abs() <= allowed)
        report.append(f"{name}: relative error {relative_error(a, b):.2e}")
        assert not bad.any(), f"{report[-1]}, {int(bad.sum())} of {b.numel()} elements out of tolerance"
    print("; ".join(report))


def assert_close_bf16(actual: dict[str, Tensor], plain: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """bf16 results: max error <= 2x and RMS error <= 1.5x that of plain PyTorch in bf16, both against fp64.

    Outputs that stay in fp32 have no rounding point, and the ratio of two noises tells nothing: 1e-5 RMS(b) is allowed.
    """
    _same_names(actual, expected)
    for name, b in expected.items():
        b = b.detach().double().cpu()
        for x in (actual, plain):
            assert x[name].shape == b.shape, f"{name}: shape {tuple(x[name].shape)}, expected {tuple(b.shape)}"
        ours, theirs = ((x[name].detach().double().cpu() - b) for x in (actual, plain))
        # The largest error finds a broken element, the RMS a small bias in all of them.
        for what, limit, error in (
            ("max", 2.0, lambda e: e.abs().max().item()),
            ("RMS", 1.5, lambda e: e.square().mean().sqrt().item()),
        ):
            size, plain_size = error(ours), error(theirs)
            noise = 1e-5 * b.square().mean().sqrt().item() if actual[name].dtype == torch.float32 else 0.0
            message = f"{name}: {what} error {size:.3e}, plain PyTorch {plain_size:.3e}, limit {limit}x"
            assert size <= max(limit * plain_size, noise), message


def _same_names(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys(), f"{sorted(actual)} against {sorted(expected)}"


@dataclass(frozen=True)
class Case:
    """Inputs of an op by name. `call` takes them as a dict and returns the outputs by name (None entries are dropped);
    `grads` names the inputs whose gradients are compared.
    """

    inputs: dict[str, Tensor]
    call: Callable[..., dict[str, Tensor | None]]
    grads: tuple[str, ...] = ()


def outputs_and_gradients(
    case: Case, op: Callable, dtype: torch.dtype | None = None, cotangents: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Runs `case.call(op, inputs)` forward and backward; returns outputs and gradients ("d" + name) by name.

    dtype: floating inputs are cast to it (fp64 for the oracle; None leaves them). cotangents: the outputs' weights by
    name; None draws them, so that every output contributes to every gradient.
    """
    inputs = {}
    for name, x in case.inputs.items():
        # A copy, because an op may overwrite its inputs, and the next run needs them unchanged.
        inputs[name] = x.detach().to(dtype if dtype and x.is_floating_point() else x.dtype, copy=True)
        inputs[name].requires_grad_(name in case.grads)
    outputs = {name: y for name, y in case.call(op, inputs).items() if y is not None}
    results = {name: y.detach() for name, y in outputs.items()}
    if case.grads:
        # A plain sum as the loss would give every output the gradient 1, which hides a permuted or scaled one.
        cotangents = cotangents or draw_cotangents(results)
        weights = [cotangents[name].to(y) for name, y in outputs.items()]
        wanted = [inputs[name] for name in case.grads]
        grads = torch.autograd.grad(list(outputs.values()), wanted, weights, allow_unused=True)
        for name, x, g in zip(case.grads, wanted, grads, strict=True):
            # None and zero mean the same to a caller; a kernel may return either.
            results["d" + name] = torch.zeros_like(x) if g is None else g
    return results


def draw_cotangents(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Normal weights for the outputs, the same for every dtype: bf16 holds them exactly.

    They are drawn on the outputs' device, because at the 27B sizes drawing on the host takes most of a check's time.
    """
    generator = torch.Generator(next(iter(outputs.values())).device).manual_seed(0)
    return {
        name: torch.randn(y.shape, generator=generator, device=y.device, dtype=torch.float64).bfloat16()
        for name, y in outputs.items()
    }


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """torch.empty and its kin return NaN (or the largest integer), so that an element nobody wrote cannot pass."""

    def poison(make: Callable) -> Callable:
        def made(*args, **kwargs) -> Tensor:
            x = make(*args, **kwargs)
            return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)

        return made

    with contextlib.ExitStack() as stack:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
        ):
            stack.enter_context(mock.patch.object(owner, name, poison(getattr(owner, name))))
        yield
