"""What `compile_check` needs to know of a kernel in order to compile it without a GPU."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class CompileSpec:
    """One kernel at one set of compile-time constants.

    signature: argument name -> Triton type ("*bf16", "*fp32", "*i32", "i32", "fp32", ...); constexprs: name -> value.
    spill_budget: bytes of spills that are accepted, with the reason in `why`; 0 means none.
    """

    name: str
    fn: Callable
    signature: dict[str, str]
    constexprs: dict[str, object] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    spill_budget: int = 0
    why: str = ""
    # Arguments known to be divisible by 16 (every base pointer of a torch allocation is); None = all pointers.
    aligned: tuple[str, ...] | None = None
