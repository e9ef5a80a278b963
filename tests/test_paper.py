"""The step on paper: what it must refuse, that its memory is the plan's and a real step's, its counts and its times."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels.paper import on_paper
from psysafe import load_model
from psysafe.checkpoint.base import build
from psysafe.model.config import ModelConfig
from psysafe.model.decoder import MLP, Block
from psysafe.model.lora import TARGETS, attach
from psysafe.runtime import start
from psysafe.training.config import TrainConfig
from psysafe.training.memory_plan import Sizes
from psysafe.training.paper.rates import KINDS, PaperGPU, gemm_share, kind
from psysafe.training.paper.run import documents_of, paper_run, trace_generation, trace_step
from psysafe.training.paper.shard import gathers
from psysafe.training.paper.trace import PaperError, Trace, nbytes, record
from psysafe.training.roofline import SPEEDS, context, flops_per_token
from psysafe.training.setup import Run, make_optimizer, plan_within
from psysafe.training.step import train_step
from psysafe.training.watchdog import Watchdog
from tests.test_shard import spawn, write_checkpoint

pytestmark = [
    pytest.mark.skipif(not kernels.HAS_TRITON, reason="needs Triton"),
    pytest.mark.filterwarnings("ignore:Anomaly Detection"),
]

CONFIGS = Path(__file__).parents[1] / "configs"


def architecture(name: str, layers: int | None = None) -> ModelConfig:
    config = ModelConfig.from_dict(json.loads((CONFIGS / name).read_text()))
    layers = layers or config.num_hidden_layers
    return replace(config, num_hidden_layers=layers, layer_types=config.layer_types[:layers])


QWEN_27B, QWEN_08B = architecture("qwen3.5-27b-architecture.json"), architecture("qwen3.5-0.8b-architecture.json")
FOUR_LAYERS = architecture("qwen3.5-27b-architecture.json", 4)


def run_of(
    lengths: list[int], config: ModelConfig = FOUR_LAYERS, memory: float = 85e9, rank: int = 1, planned: bool = True,
    contrast: Sequence[int] = (), **settings,
) -> Run:  # fmt: skip
    """A step of one micro-batch of these documents, contrast documents behind the others."""
    tokens = sum(lengths) + sum(contrast)
    settings = TrainConfig(dtype="bfloat16", micro_batch_tokens=tokens, lora_rank=rank, **settings)
    model = build(config, "meta", torch.bfloat16)
    adapters = attach(model, rank, 32.0, TARGETS)
    optimizer = make_optimizer(adapters, settings)
    plan = plan_within(int(memory), settings, model, adapters, optimizer, 1) if planned else None
    return paper_run(settings, model, adapters, optimizer, plan, lengths, contrast=contrast)


RECIPE = [640] * 4  # a step of the paper's recipe, in one micro-batch


@pytest.fixture(scope="module")
def step() -> Trace:
    return trace_step(run_of(RECIPE, QWEN_27B))


def rows(lengths: list[int]) -> int:
    """Rows that feed a trained token: nothing predicts a document's first."""
    return sum(lengths) - len(lengths)


# What a step must not do


def test_a_value_that_the_host_wants_is_refused(monkeypatch):
    right = MLP.forward

    def wrong(self, x, *others):
        return right(self, x * x.abs().max().item(), *others)

    monkeypatch.setattr(MLP, "forward", wrong)
    with pytest.raises(PaperError, match=r"tests/test_paper.py:\d+: aten._local_scalar_dense.*host would wait"):
        trace_step(run_of([64]))


def test_a_tensor_that_lies_on_the_host_is_refused(monkeypatch):
    right = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x, *others: right(self, x * torch.ones(len(x), 1), *others))
    with pytest.raises(PaperError, match=r"tests/test_paper.py:\d+: mul.*shape \(64, 1\) on the host"):
        trace_step(run_of([64]))


def test_a_launch_with_a_tensor_on_the_host_is_refused(monkeypatch):
    right = Block.add_and_norm

    def wrong(self, h, pending, weight, lora_A):
        return right(self, h, pending, torch.zeros(weight.shape), lora_A)

    monkeypatch.setattr(Block, "add_and_norm", wrong)
    with pytest.raises(ValueError, match="p_w is on cpu, not on the GPU on paper"):
        trace_step(run_of([64]))


def test_a_step_copies_tables_from_the_host_and_its_numbers_to_it_and_never_waits(step):
    """The allowed places: boundaries, tokens and schedules come from pinned memory; the loss is read a step later."""
    assert {op.where.partition(":")[0] for op in step.ops if op.from_host} == {"kernels/documents.py"}
    to_host = [op for op in step.ops if op.name == "_to_copy" and "run_log" in op.where]
    assert len(to_host) <= 4  # three conversions to fp64, one copy


# Operations of torch in one block of the 27B, by phase. Everything else is a launch of ours. What is added here costs a
# pass over memory in every layer.
DELTA_NET_BLOCK = {
    ("forward", "mm"): 4,
    ("forward", "sum"): 1,  # u of down_proj, over the columns that each program had
    ("backward", "mm"): 4,
    ("backward", "addmm_"): 2,  # z, b|a, into the gradient of x
    ("backward", "cat"): 1,  # b|a, 96 columns
    ("backward", "sum"): 4,  # dA and dB over programs
}
ATTENTION_BLOCK = {
    ("forward", "mm"): 4,
    ("forward", "sum"): 1,
    ("backward", "mm"): 4,
    ("backward", "sum"): 7,
    ("backward", "zeros"): 1,  # dB of q, gate, k and v
}


def torch_operations(trace: Trace, layer: int) -> dict[tuple[str, str], int]:
    operations: dict[tuple[str, str], int] = {}
    for op in trace.ops:
        if op.layer == layer and op.launch is None:
            operations[op.phase, op.name] = operations.get((op.phase, op.name), 0) + 1
    return operations


def test_no_stray_pass_in_a_block(step):
    assert torch_operations(step, 30) == DELTA_NET_BLOCK
    assert torch_operations(step, 31) == ATTENTION_BLOCK


def test_all_gradients_are_added_by_one_operation(monkeypatch):
    """On a GPU it is one launch, or a few, where both lists have one layout; where they differ, one for each tensor."""
    lists, add = [], torch._foreach_add_

    def watched(totals: list[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
        lists.append((totals, gradients))
        add(totals, gradients)

    monkeypatch.setattr(torch, "_foreach_add_", watched)
    trace = trace_step(run_of([64] * 2))
    assert [op.name for op in trace.ops].count("_foreach_add_") == 1
    ((totals, gradients),) = lists
    assert len(totals) == 4 * 4 + 4  # A and B: of the MLP's two layers, and in the fourth block of attention's two
    for total, gradient in zip(totals, gradients, strict=True):
        assert (total.dtype, layout(total)) == (gradient.dtype, layout(gradient))


def layout(x: torch.Tensor) -> list[tuple[int, int]]:
    """Sizes and strides, without dimensions of one element, whose strides mean nothing."""
    return [(size, stride) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


@pytest.mark.parametrize(
    ("change", "name"),
    [(lambda x: x.T.contiguous().T, "clone"), (lambda x: x.float().to(x.dtype), "_to_copy"), (lambda x: x + 0, "add")],
    ids=["contiguous", "float", "addition"],
)
def test_an_added_pass_is_seen(monkeypatch, change, name):
    right = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x, *others: right(self, change(x), *others))
    operations = torch_operations(trace_step(run_of([64] * 2, architecture("qwen3.5-27b-architecture.json", 8))), 2)
    assert operations != DELTA_NET_BLOCK and ("forward", name) in operations


# Memory: the plan against the simulation, the simulation against a real step


RAGGED = [2100, 65, 700, 1, 1230]
CASES = {
    "27B": (QWEN_27B, [4096], 85e9, 1),
    "27B, short rows": (QWEN_27B, [37] * 110, 85e9, 1),
    "27B, ragged": (QWEN_27B, RAGGED, 85e9, 1),
    "27B, 141 GB": (QWEN_27B, [4096], 150e9, 1),
    "27B, rank 2, 141 GB": (QWEN_27B, [640] * 4, 150e9, 2),
    "27B, 16,384 tokens": (QWEN_27B, [16384], 85e9, 1),
    "0.8B": (QWEN_08B, [4096], 85e9, 1),
    "0.8B, short rows": (QWEN_08B, [37] * 110, 85e9, 1),
    "0.8B, rank 2": (QWEN_08B, RAGGED, 85e9, 2),
    "0.8B, rank 2, recomputed": (QWEN_08B, [4096], 10e9, 2),
}


def compare_peaks(trace: Trace, run: Run, lengths: list[int], contrast: Sequence[int] = ()) -> None:
    lengths = [*lengths, *contrast]
    planned = run.plan.choose(Sizes.of(lengths, rows(lengths), rows(contrast))).peak
    assert trace.peak <= planned <= run.plan.limit, "the plan allows less than the step needs"
    assert planned == pytest.approx(trace.peak, rel=0.02)


def test_the_recipes_planned_peak_is_the_simulated_one(step):
    compare_peaks(step, run_of(RECIPE, QWEN_27B), RECIPE)
    assert step.peak_where.startswith("kernels/ops/linear_cross_entropy.py")
    assert step.live - step.fixed < 1e5, "a step leaves memory behind"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_planned_peak_is_the_simulated_one(case):
    config, lengths, memory, rank = CASES[case]
    run = run_of(lengths, config, memory, rank)
    compare_peaks(trace_step(run), run, lengths)


@pytest.mark.slow
@pytest.mark.parametrize(("lengths", "contrast"), [(RECIPE, [400]), ([65], [1500])])
def test_the_planned_peak_with_kl_is_the_simulated_one(lengths, contrast):
    """Once with few rows that the base reads as well, once with so many that its logits count."""
    run = run_of(lengths, QWEN_27B, contrast=contrast, kl_weight=1.0)
    trace = trace_step(run)
    compare_peaks(trace, run, lengths, contrast)
    assert trace.live - trace.fixed < 1e5, "a step leaves memory behind"
    base = [op for op in trace.ops if op.phase == "forward" and op.name == "linear_kl kl_divergence"]
    assert len(base) == 1 and base[0].shape == (rows(contrast), QWEN_27B.vocab_size)


def test_the_base_reads_contrast_rows_alone():
    """Its forward pass is as long as they are, comes first, and has no backward."""
    trace = trace_step(run_of([640, 640], contrast=[400], kl_weight=1.0))
    tokens = [op.shape[0] for op in trace.ops if op.name == "mm" and op.layer == 1 and op.phase == "forward"]
    assert tokens == sorted(tokens) and {*tokens} == {400, 1680} and tokens.count(400) == tokens.count(1680)
    plain = trace_step(run_of([640, 640], contrast=[400]))
    for phase in ("backward", "optimizer"):
        gemms = [[op.shape for op in t.ops if op.name == "mm" and op.phase == phase] for t in (trace, plain)]
        assert gemms[0] == gemms[1], phase


def test_a_saved_tensor_too_many_is_seen(monkeypatch):
    """Mutant: SwiGLU's product keeps both of its factors."""
    right, lengths = kernels.swiglu, [640] * 4
    run = run_of(lengths)
    compare_peaks(trace_step(run), run, lengths)

    def wrong(*args):
        x, u = right(*args)
        return x * torch.ones_like(x), u

    monkeypatch.setattr(kernels, "swiglu", wrong)
    with pytest.raises(AssertionError):
        compare_peaks(trace_step(run), run, lengths)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
def test_the_simulated_peak_is_that_of_a_real_step(monkeypatch):
    """The same small model on a CPU, its kernels interpreted; torch's profiler counts what its allocator hands out."""
    lengths, settings = [29, 4], TrainConfig(dtype="float32", micro_batch_tokens=64, device="cpu", embedding="gpu")

    def run_on(device: str) -> Run:
        model = build(architecture("micro.json"), device, torch.float32)
        adapters = attach(model, 1, 32.0, TARGETS)
        run = paper_run(settings, model, adapters, make_optimizer(adapters, settings), None, lengths)
        return replace(run, runtime=replace(run.runtime, device=torch.device(device)))

    simulated = trace_step(run_on("meta"), multiprocessors=3)  # as many as the interpreter stands for
    monkeypatch.setenv("PSYSAFE_KERNELS", "triton")
    run = run_on("cpu")
    for p in run.model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        train_step(run)
    events = profile.profiler.kineto_results.events()
    allocated = itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]")
    assert max(allocated) == pytest.approx(simulated.peak - simulated.fixed, rel=0.02)


# Counts and times


def test_counted_flops_are_those_of_the_architecture(step):
    """Every GEMM of the trace, against the formula per token; the recipe's step recomputes nothing."""
    gemms = sum(op.flops for op in step.ops if kind(op) == "GEMM")
    flops = QWEN_27B.useful_flops(640, rows(RECIPE) / sum(RECIPE))
    cores = sum(flops.pop("attention core")) + sum(flops.pop("delta rule"))
    assert cores and gemms == pytest.approx(sum(RECIPE) * sum(map(sum, flops.values())), rel=1e-3)


def test_attentions_flops_are_counted_by_documents(step):
    gpu = PaperGPU("H100", context(RECIPE))
    forward = sum(gpu.flops(op) for op in step.ops if op.name == "causal_attention forward")
    assert forward == pytest.approx(sum(RECIPE) * QWEN_27B.useful_flops(640)["attention core"].forward, rel=0.01)


def test_a_gemm_pays_for_whole_tiles_and_waves():
    assert gemm_share(132 * 128, 256) == 1
    # One row of tiles more: narrow tiles fill five waves where four were enough.
    assert gemm_share(132 * 128 + 128, 256) == pytest.approx(133 / 132 / 1.25)
    assert gemm_share(4096, 48) == pytest.approx(48 / 64 * 32 / 132)


def test_a_step_on_paper_is_no_faster_than_its_useful_work(step):
    gpu = PaperGPU("H100", 640)
    seconds = gpu.total(step.ops)[""].seconds
    floor = sum(RECIPE) * flops_per_token(QWEN_27B, 640, rows(RECIPE) / sum(RECIPE)) / SPEEDS["H100"].gemm
    assert floor < seconds < 1.5 * floor
    assert PaperGPU("H200", 640).total(step.ops)[""].seconds < seconds
    assert {kind(op) for op in step.ops} <= set(KINDS)


def test_bytes_of_an_operation():
    """One row gathered out of a large table, an addition in place, a launch: each tensor as often as it passes."""
    table, index = torch.empty(1000, 64, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    with record() as trace:
        rows = table.index_select(0, index)
        rows += 1
        rows.zero_()
    assert [op.bytes for op in trace.ops] == [2 * 2 * 64 * 4 + 16, 2 * 2 * 64 * 4, 2 * 64 * 4]
    assert trace.ops[0].where.startswith("tests/test_paper.py")


def test_generation_waits_for_nothing_while_it_decodes():
    model = build(FOUR_LAYERS, "meta", torch.bfloat16)
    traces = trace_generation(model, [640] * 4, 4096)
    assert {op.name for op in traces["decode"].ops if op.from_host} == set()
    decode = [op.name for op in traces["decode"].ops if op.launch]
    assert decode.count("gated_delta_rule_step step") == 3 and decode.count("attention_decode split") == 1
    prefill = traces["prefill"].ops
    assert any(op.name == "causal_attention forward" for op in prefill)
    # Slots are emptied with one index for all layers: a Python list as index is copied, and waited for, each time.
    assert not any(op.name == "scalar_tensor" and "cache.py" in op.where for op in prefill)
    assert sum(op.where.startswith("psysafe/model/cache.py") and op.from_host for op in prefill) <= 2


def test_nothing_is_left_behind():
    """After a trace, meta is no GPU any more and kernels run again."""
    with on_paper(lambda launch: None):
        assert kernels.runs_triton(torch.empty(1, device="meta"))
    assert not kernels.is_gpu(torch.device("meta"))
    x = torch.randn(4, 64)
    assert kernels.swiglu.reference(x)[0].shape == (4, 32)


# Sharding


def count_gathers(folder: str) -> None:
    """On one of two ranks: the gathers of a step of two micro-batches, and their bytes, against the arithmetic."""
    counted = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func._schema.name.startswith("c10d::_allgather_base_"):
                counted.append(nbytes(args[0]))
            return result

    runtime = start("cpu")
    model = load_model(folder, shard=True)
    adapters = attach(model, 1, 32.0, TARGETS)
    settings = TrainConfig(dtype="float32", batch_size=4, micro_batch_tokens=16)
    data = documents_of([16] * 4)
    watch = Watchdog(replace(runtime, rank=0, world_size=1), 600)
    run = Run(settings, runtime, model, adapters, make_optimizer(adapters, settings), data, None, 2, watch)
    train_step(run)  # the first step builds what later ones use
    with Count():
        train_step(run)
    whole = build(model.config, "meta", torch.float32)
    expected = gathers(whole, 2, 2)
    assert (len(counted), sum(counted)) == tuple(expected)


@pytest.mark.slow
def test_gathers_are_those_of_two_ranks(tmp_path):
    write_checkpoint(tmp_path)
    spawn(2, count_gathers, str(tmp_path))
