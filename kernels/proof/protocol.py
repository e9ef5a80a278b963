"""What every kernel file offers to the tests, `kernels.check`, `kernels.bench` and `kernels.compile_check`.

    CASES             sizes (keyword arguments of make_case): the real 27B shapes first, then small odd ones
    make_case(...)    -> closeness.Case: inputs of that size on a device, in a dtype, from a seed
    MUTANTS           name -> a wrong version of the op that the very same comparison must reject
    work(**size)      -> Work: bytes and FLOPs that the op cannot avoid, counted in the open
    compile_specs()   -> the kernels as they are launched at the 27B shapes
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple


class Work(NamedTuple):
    """Unavoidable traffic (bytes read plus written) and arithmetic of one call, forward and backward."""

    forward_bytes: int
    backward_bytes: int
    forward_flops: int = 0
    backward_flops: int = 0


@dataclass(frozen=True)
class CompileSpec:
    """One kernel at one set of compile-time constants.

    signature: argument name -> Triton type ("*bf16", "*fp32", "*i32", "i32", "fp32", ...); constexprs: name -> value.
    spill_budget: bytes of spills that are accepted, with the reason in `why`; 0 means none.
    aligned: arguments known to be divisible by 16; None = all pointers (torch aligns its allocations) and all row
    strides (`stride*`; at the 27B sizes they are multiples of 16).
    """

    name: str
    fn: Callable
    signature: dict[str, str]
    constexprs: dict[str, object] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    spill_budget: int = 0
    why: str = ""
    aligned: tuple[str, ...] | None = None
