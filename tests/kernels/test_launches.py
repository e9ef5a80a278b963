"""launches.json is what steps launch, every launch is compiled by kernels.compile_check, and no index overflows."""

import bisect

import pytest
import torch

import kernels
from kernels.ops import swiglu as swiglu_ops
from kernels.paper import Variant
from kernels.proof.launches import FILE, read_launches
from kernels.proof.registry import OPERATIONS
from psysafe.program import UserError
from psysafe.training.memory_plan import Sizes
from psysafe.training.paper.run import trace_step
from psysafe.training.paper.trace import Trace
from psysafe.training.roofline import SPEEDS
from psysafe.training.setup import plan_within
from tools.write_launches import RAGGED, run_of, text

pytestmark = [
    pytest.mark.skipif(not kernels.HAS_TRITON, reason="needs Triton"),
    pytest.mark.filterwarnings("ignore:Anomaly Detection"),
]


def committed() -> set[str]:
    fields = ("kernel", "types", "constants", "options")
    return {Variant(*(launch[field] for field in fields)).key() for launch in read_launches()}


def new_launches(trace: Trace) -> set[str]:
    """Names of launches that the file does not have. The optimiser's arguments depend on the number of layers."""
    launches = [op for op in trace.ops if op.launch is not None and op.phase != "optimizer"]
    return {op.name for op in launches if op.launch.variant.key() not in committed()}


@pytest.mark.slow
def test_the_file_is_what_steps_launch():
    assert FILE.read_text() == text(), "run: python tools/write_launches.py, then python tools/kernel_tables.py"


def test_a_step_launches_nothing_that_is_not_in_the_file():
    assert new_launches(trace_step(run_of(RAGGED, layers=4))) == set()


def test_a_launch_with_another_constant_is_seen(monkeypatch):
    monkeypatch.setattr(swiglu_ops, "FORWARD_BT", 2 * swiglu_ops.FORWARD_BT)
    assert new_launches(trace_step(run_of([64], layers=4))) == {"swiglu forward"}


def test_a_launch_at_another_alignment_is_seen(monkeypatch):
    """A view that begins one element later is another kernel for Triton, and slower."""
    right = kernels.swiglu

    def unaligned(x, *args):
        storage = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
        return right(storage[1:].view_as(x).copy_(x), *args)

    monkeypatch.setattr(kernels, "swiglu", unaligned)
    assert "swiglu forward" in new_launches(trace_step(run_of([64], layers=4)))


def test_every_launch_is_compiled_by_the_compile_check():
    specs = [spec for op in OPERATIONS for spec in op.compile_specs()]
    assert sorted(spec.name for spec in specs) == sorted(launch["name"] for launch in read_launches())
    assert len({spec.name for spec in specs}) == len(specs)
    dk = next(spec for spec in specs if spec.name == "gated_delta_rule_backward dk")
    assert dk.spill_budget == 8 and dk.why


def largest_row(memory: int) -> int:
    """Tokens of the longest single row that the 27B can be trained on with so many bytes."""
    run = run_of([64], layers=64)
    plan = plan_within(memory, run.config, run.model, run.adapters, run.optimizer, 1)

    def too_long(tokens: int) -> bool:
        try:
            plan.choose(Sizes.of([tokens], tokens - 1))
        except UserError:
            return True
        return False

    return 512 * (bisect.bisect_left(range(1, 512), True, key=lambda n: too_long(512 * n)))


def test_no_index_overflows_at_the_largest_sizes():
    """An offset in elements lies inside its tensor. So with fewer than 2^31 elements in each, int32 holds every one,
    whatever a kernel computes it from. Longer rows do not fit into 141 GB; there kernels take rows through int64."""
    tokens = largest_row(SPEEDS["H200"].memory)
    assert tokens > 16384
    trace = trace_step(run_of([tokens], layers=4))
    for op in trace.ops:
        if op.launch is not None:
            sizes = [x.numel for x in op.launch.tensors.values()] + [*op.launch.numbers.values()]
            assert max(sizes) < 2**31, (op.name, tokens)
