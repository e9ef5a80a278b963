"""The race on paper: both contenders do the same arithmetic, and what is counted as one kernel is."""

import pytest

import kernels
from benchmarks import paper
from psysafe.training.paper.rates import PaperGPU

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not kernels.HAS_TRITON, reason="needs Triton"),
    pytest.mark.filterwarnings("ignore"),
]
GPU = PaperGPU("H100", 256)


def test_both_multiply_the_same_matrices():
    ours = paper.count(paper.trace_ours(4, 256, False), GPU)
    peft = paper.count(paper.trace_peft(4, 256, False, as_written=False), GPU)
    # Ours also computes the gradient of the first MLP's input, which nothing below needs: 3 % of four layers.
    assert ours.gemm_tflop == pytest.approx(peft.gemm_tflop, rel=0.04)
    assert ours.kernels < peft.kernels / 3 and ours.gb < peft.gb and ours.saved_gb < peft.saved_gb


def test_checkpointing_multiplies_again_and_saves_less():
    saved, again = (paper.count(paper.trace_peft(4, 256, c, as_written=False), GPU) for c in (False, True))
    assert again.gemm_tflop > 1.2 * saved.gemm_tflop and again.saved_gb < saved.saved_gb


def test_fused_operations_count_once_each_way():
    trace = paper.trace_peft(4, 256, False, as_written=False)
    names = [op.name for op in trace.ops]
    for name, layers in (("paper::attention", 1), ("paper::delta_rule", 3), ("paper::conv", 3)):
        backward = names.count(f"{name}_backward")
        assert names.count(name) == layers and 0 < backward <= layers
    written = paper.trace_peft(4, 256, False, as_written=True)
    assert len(written.ops) > 1.5 * len(trace.ops) and not any(op.name == "paper::delta_rule" for op in written.ops)


def test_layers_that_were_not_traced_follow_from_those_that_were():
    small, large, larger = (paper.count(paper.trace_ours(n, 256, False), GPU) for n in (4, 8, 12))
    extended = small.extended(large, 2)
    assert extended.kernels == pytest.approx(larger.kernels, abs=2)
    assert extended.gb == pytest.approx(larger.gb, rel=0.01)
