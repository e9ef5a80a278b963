"""What the case files share: documents of given lengths, mutants of a kind."""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.documents import Documents


def packed(lengths: list[int] | tuple[int, ...], device: torch.device | str = "cpu") -> Documents:
    """Documents of these lengths, one after the other."""
    return Documents(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32), device)


def random_on(device: torch.device | str, seed: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """(normal, uniform): functions from a shape to fp32 numbers on the device, from one generator."""
    # On meta there are no values to draw: a size's launches can be traced there (benchmarks/prove_tasks.py).
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)
    options = {"generator": generator, "device": device}
    return functools.partial(torch.randn, **options), functools.partial(torch.rand, **options)


def rows_of(x: Tensor, strided: bool) -> Tensor:
    """x (T, ...), or the same as the right half of wider rows, as what one GEMM puts out for several projections.

    A case's call cuts it, because cloning an input makes it dense.
    """
    return torch.cat([x, x], 1)[:, x.shape[1] :] if strided else x


def with_changes(op: Callable, changes: dict[str, Callable[..., dict]]) -> dict[str, Callable]:
    """Mutants: op with some arguments changed. A change takes all arguments by name and returns the changed ones."""
    signature = inspect.signature(op)

    def mutant(change: Callable[..., dict], *args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return op(**bound.arguments | change(**bound.arguments))

    return {name: functools.partial(mutant, change) for name, change in changes.items()}


def without_u_gradient(op: Callable) -> Callable:
    """A mutant: op whose last output, u = x A^T, passes no gradient back."""

    def mutant(*args, **kwargs):
        *outputs, u = op(*args, **kwargs)
        return *outputs, None if u is None else u.detach() + 0 * u

    return mutant
