"""What is stated of every operation so that it can be proven, compiled and timed: one record of class `Op`.

The records stand in kernels/proof/cases/, one file an operation, and kernels/proof/registry.py lists them.
`kernels.check`, `kernels.bench`, `kernels.compile_check` and the tests know an operation by its record alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.proof.closeness import Case


class Work(NamedTuple):
    """Unavoidable traffic (bytes read plus written) and arithmetic of one call, forward and backward."""

    forward_bytes: int
    backward_bytes: int
    forward_flops: int = 0
    backward_flops: int = 0


@dataclass(frozen=True)
class CompileSpec:
    """One kernel at one set of compile-time constants.

    signature: argument name -> Triton type ("*bf16", "*fp32", "i32", "fp32", ...). An integer that is divisible by 16
    at every launch, such as a row stride at the 27B sizes, is "i32:16": Triton specialises on that.
    constexprs: name -> value. num_warps, num_stages: here Triton's own defaults, which a launch without them gets.
    spill_budget: bytes of spills that are accepted, with the reason in `why`; 0 means none.
    unaligned: pointers not known to be divisible by 16; all others are, because torch aligns its allocations.
    """

    name: str
    fn: Callable
    signature: dict[str, str]
    constexprs: dict[str, object] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3  # Triton's own default
    enable_fp_fusion: bool = True
    spill_budget: int = 0
    why: str = ""
    unaligned: tuple[str, ...] = ()


class Peer(NamedTuple):
    """Somebody else's kernel for the same work, for `kernels.bench`: torch's own, Liger's, flash-linear-attention's.

    package: what has to be importable; none is a dependency. prepare(size, device) returns a function from the inputs
    of the op's make_case to the outputs that get a gradient. Peers know no adapter: they are timed without one, which
    flatters them. Written against liger-kernel 0.8.5 and flash-linear-attention 0.6.0; whether they run is the bench's
    to say.
    """

    name: str
    package: str
    prepare: Callable[[dict, str], Callable[[dict[str, Tensor]], Tensor | tuple[Tensor, ...]]]

    @property
    def installed(self) -> bool:
        return find_spec(self.package.partition(".")[0]) is not None


class Baseline(NamedTuple):
    """Another version in plain PyTorch that a bf16 result must not be worse than, at one size beyond the cases."""

    title: str
    size: dict
    op: Callable


@dataclass(frozen=True)
class Op:
    """One operation.

    reference, triton: the two implementations, of one signature.
    cases: sizes (keyword arguments of make_case and of work): the real 27B shapes first, then small odd ones.
    make_case(**size, device, dtype, seed): the inputs of that size, and how they are passed.
    mutants: name -> a wrong version that the comparison of at least one case must reject.
    work(**size): bytes and FLOPs that the operation cannot avoid, counted in the open.
    compile_specs(): the kernels as steps of the 27B launch them (kernels/proof/launches.py: launched).
    dtypes: what the kernels run in; the first is what training runs and the bench times.
    plain: plain PyTorch with the kernels' rounding points, which a bf16 result is measured by; None: the reference.
    baselines: other versions that a bf16 result must not be worse than.
    without_lora: what a size is changed by to have no adapter; empty where the operation knows none.
    permuted: sizes whose documents may change places without changing a bit. `lengths` is the key in a size of the
    documents' lengths. Inputs, outputs and gradients have a row a token, except `weights`, which belong to neither a
    token nor a document and have no gradient, and `by_document`, which have a row a document.
    peers: other people's kernels for the same work.
    """

    name: str
    reference: Callable
    triton: Callable
    cases: Sequence[dict]
    make_case: Callable[..., Case]
    mutants: dict[str, Callable]
    work: Callable[..., Work]
    compile_specs: Callable[[], list[CompileSpec]]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    plain: Callable | None = None
    baselines: tuple[Baseline, ...] = ()
    without_lora: dict = field(default_factory=dict)
    permuted: tuple[dict, ...] = ()
    lengths: str = "lengths"
    weights: tuple[str, ...] = ()
    by_document: tuple[str, ...] = ()
    peers: tuple[Peer, ...] = ()
