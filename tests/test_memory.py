"""The memory plan against autograd's own count, the published sizes of the 27B, and its choices under any limit."""

import json
from collections import Counter
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from triton.runtime.interpreter import InterpretedFunction

import kernels
from psysafe.checkpoint.base import build, load_model
from psysafe.model import recompute as recomputation
from psysafe.model.config import ModelConfig
from psysafe.model.lora import ALL_LINEAR, TARGETS, attach
from psysafe.model.recompute import STAGES, recompute, recomputed_stages
from psysafe.runtime import Runtime
from psysafe.training.config import resolve
from psysafe.training.memory_plan import H100_MEMORY, RESERVE, Plan, Sizes, saved_bytes, tail_bytes
from psysafe.training.roofline import SPEEDS, elementwise_bytes, flops_per_token, step_seconds
from psysafe.training.setup import make_optimizer, make_plan

ARCHITECTURE = Path(__file__).parents[1] / "configs" / "qwen3.5-27b-architecture.json"
MICRO = ARCHITECTURE.with_name("micro.json")
CONFIG = ModelConfig.from_dict(json.loads(ARCHITECTURE.read_text()))
FIXED = 2 * 26_895_998_464 + 11 * 4_980_736
LENGTHS = (2100, 65, 700, 1, 1230)


def plan(limit=H100_MEMORY - RESERVE, fixed=FIXED, config=CONFIG) -> Plan:
    return Plan(config, TARGETS, 1, limit, fixed)


class Counted:
    """Bytes that autograd holds for a forward pass, by the layer that saved them; each piece of memory counts once."""

    def __init__(self, model, monkeypatch):
        self.bytes: Counter = Counter()
        self.alive, self.layer = [], -1
        self.known = {p.untyped_storage()._cdata for p in model.parameters()}
        monkeypatch.setattr(recomputation._RecomputedForward, "save", staticmethod(self.count))
        # Rotary angles belong to no layer.
        monkeypatch.setattr(model, "rotary", lambda *args, _original=model.rotary: [*map(self.count, _original(*args))])
        for i, block in enumerate(model.layers):
            block.register_forward_pre_hook(lambda *_, i=i: setattr(self, "layer", i))
        model.layers[-1].register_forward_hook(lambda *_: setattr(self, "layer", -1))

    def count(self, x):
        storage = x.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.bytes[self.layer] += storage.nbytes()
        self.alive.append(x)
        return x


def counted(monkeypatch, model, lengths, targets, rank, dropped, rows) -> Counter:
    """Bytes saved by layer in a forward pass through the Triton operations."""
    monkeypatch.setenv("PSYSAFE_KERNELS", "triton")
    attach(model, rank, 1, targets)
    for block in model.layers:
        recompute(block, dropped)
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    tokens = torch.arange(sum(lengths), device=model.norm.device) % model.config.vocab_size
    counter = Counted(model, monkeypatch)
    with saved_tensors_hooks(counter.count, lambda x: x):
        rows = None if rows is None else torch.arange(rows, device=tokens.device)
        hidden = model(tokens, kernels.Documents(bounds, tokens.device), rows=rows)
        loss = kernels.linear_cross_entropy(hidden, model.head, tokens[: len(hidden)])
    assert loss.requires_grad
    return counter.bytes


def compare_with(monkeypatch, model, lengths, element, targets=TARGETS, rank=1, dropped=(), rows=None):
    counts = counted(monkeypatch, model, lengths, targets, rank, dropped, rows)
    config, batch, expected = model.config, Sizes.of(lengths, rows), 0
    for i in range(config.num_hidden_layers):
        saved = saved_bytes(config, i, batch, targets, rank, element)
        layer = saved.always + sum(size for name, size in saved.stages.items() if name not in dropped)
        assert layer == pytest.approx(counts[i], rel=0.02), f"layer {i}: planned {layer}, saved {counts[i]}"
        expected += layer
    tail = tail_bytes(config, batch, targets, rank, element)
    assert expected + tail == pytest.approx(sum(counts.values()), rel=0.02)


def compare(monkeypatch, **choices):
    """The 27B in bf16 on tensors without memory: what is saved depends on shapes alone, so launches are left out."""
    monkeypatch.setattr(InterpretedFunction, "run", lambda *args, **kwargs: None)
    compare_with(monkeypatch, build(CONFIG, "meta", torch.bfloat16), LENGTHS, 2, **choices)


def compare_micro(monkeypatch, **choices):
    """A model of four layers in fp32, its kernels run by Triton's interpreter."""
    model = load_model(f"random:{MICRO}", dtype=torch.float32)
    compare_with(monkeypatch, model, (24, 9), 4, rows=13, **choices)


needs_triton = pytest.mark.skipif(not kernels.HAS_TRITON, reason="needs Triton")
interpreted = pytest.mark.skipif(
    not kernels.HAS_TRITON or torch.cuda.is_available(), reason="needs Triton's interpreter"
)


@interpreted
@pytest.mark.parametrize("dropped", [(), STAGES], ids=" ".join)
def test_saved_bytes_of_kernels_that_run(monkeypatch, dropped):
    compare_micro(monkeypatch, dropped=dropped)


@interpreted
def test_a_forgotten_tensor_of_a_kernel_that_runs_is_caught(monkeypatch):
    """Mutant: the output gate keeps its result, too."""
    original = kernels.sigmoid_gate

    def wrong(*args):
        x, u = original(*args)
        return x * torch.ones_like(x), u

    monkeypatch.setattr(kernels, "sigmoid_gate", wrong)
    with pytest.raises(AssertionError, match="layer 3"):
        compare_micro(monkeypatch)


@needs_triton
@pytest.mark.parametrize("dropped", [(), ("conv", "rope"), ("gate_up",), STAGES], ids=" ".join)
def test_saved_bytes_are_as_planned(monkeypatch, dropped):
    compare(monkeypatch, dropped=dropped)


@needs_triton
def test_saved_bytes_of_trained_rows_alone(monkeypatch):
    compare(monkeypatch, rows=1000)


@needs_triton
@pytest.mark.parametrize("targets", [ALL_LINEAR, ("o_proj", "up_proj")], ids=["all", "two"])
def test_saved_bytes_with_other_targets(monkeypatch, targets):
    compare(monkeypatch, targets=targets)


@needs_triton
@pytest.mark.parametrize("dropped", [(), ("rope",), ("conv", "rope"), ("gate_up",), STAGES], ids=" ".join)
def test_saved_bytes_at_rank_2(monkeypatch, dropped):
    compare(monkeypatch, rank=2, dropped=dropped)


@needs_triton
def test_a_forgotten_tensor_is_caught(monkeypatch):
    """Mutant: an operation that keeps its output, too."""
    original = kernels.swiglu

    def wrong(*args):
        x, u = original(*args)
        return x * torch.ones_like(x), u  # the product saves a tensor of x's size

    monkeypatch.setattr(kernels, "swiglu", wrong)
    with pytest.raises(AssertionError, match="layer 0"):
        compare(monkeypatch)


def test_bytes_of_the_published_model():
    """The set without any GEMM in backward: 123 KB a token in a delta-net layer, 131 KB in an attention layer."""
    batch = Sizes.of([4096])
    for layer, cheap, expected in ((1, ("conv", "delta_rule"), 123_072), (3, ("rope",), 131_072)):
        saved = saved_bytes(CONFIG, layer, batch, TARGETS)
        planned = saved.always + sum(size for name, size in saved.stages.items() if name not in cheap)
        assert planned / 4096 == pytest.approx(expected, rel=0.002)


def test_4096_tokens_fit_an_80_gb_gpu():
    choice = plan().choose(Sizes.largest(4096, 4))
    assert choice.peak <= 85.0e9 - 1e9
    # Everything cheap goes before the first GEMM does; then as few GEMMs as possible.
    stages = choice.recomputed
    assert all("conv" in x for x, kind in zip(stages[1:], CONFIG.layer_types[1:], strict=True) if "linear" in kind)
    assert not any("in_proj" in x for x in stages) and sum("gate_up" in x for x in stages) < 24
    assert choice.peak > 83.4e9, "more was dropped than needed"
    assert choice.saved == sum(choice.layers) + tail_bytes(CONFIG, Sizes.largest(4096, 4), TARGETS)


@pytest.mark.parametrize(
    ("beside_gb", "less_gb", "flag"),
    [
        (0.5, 0, ()),  # CUDA's context alone
        (1.8, 1.2, ()),  # and NCCL's buffers
        (4.6, 4.0, ()),  # and somebody else's process
        (1.8, 2.0, ("--memory-limit", "83")),
    ],
)
def test_the_plan_of_a_gpu_leaves_room_for_what_is_in_use_beside_torch(beside_gb, less_gb, flag, monkeypatch):
    config, _ = resolve(["--config", "configs/qwen3.5-27b.toml", *flag])
    model = build(CONFIG, "meta", torch.bfloat16)
    adapters = attach(model, 1, 32)
    in_use, reserved = round((55 + beside_gb) * 1e9), 55 * 10**9
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (H100_MEMORY - in_use, H100_MEMORY))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    properties = SimpleNamespace(total_memory=H100_MEMORY)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    runtime = Runtime(torch.device("cuda", 0), torch.bfloat16)
    real = make_plan(config, model, adapters, make_optimizer(adapters, config), runtime)
    assert real.limit == H100_MEMORY - RESERVE - round(less_gb * 1e9)
    assert real.choose(Sizes.largest(4096, 4)).peak + in_use - reserved < H100_MEMORY


def test_the_recipe_s_own_steps_need_nothing_made_again():
    choice = plan().choose(Sizes.largest(2560, 4))
    assert not any(choice.recomputed) and choice.seconds == 0


def test_less_memory_costs_more_time_until_nothing_fits():
    batch, before = Sizes.largest(4096, 4), 0.0
    for limit in range(84, 62, -2):
        choice = plan(limit * 10**9).choose(batch)
        assert choice.peak <= limit * 10**9 and choice.seconds >= before
        before = choice.seconds
    with pytest.raises(ValueError, match=r"--micro-batch-tokens.*--embedding cpu.*--memory-limit"):
        plan(60 * 10**9).choose(batch)


def test_the_plan_reaches_the_model():
    model = build(CONFIG, "meta", torch.bfloat16)
    attach(model, 1, 32)
    choice = plan().apply(model, Sizes.largest(4096, 4))
    assert tuple(recomputed_stages(block) for block in model.layers) == choice.recomputed and any(choice.recomputed)


def test_useful_flops_of_the_published_model():
    """TFLOP of 16,384 tokens in documents of 4,096, checked elsewhere against torch's FLOP counter."""
    expected = {
        "attention projections": (55.0, 55.0),
        "delta-net projections": (182.2, 178.4),
        "gate and up": (373.8, 373.8),
        "down": (186.9, 186.9),
        "head": (41.7, 41.7),
        "attention core": (13.2, 33.0),
        "delta rule": (6.9, 19.4),  # backward in 47 of 48 layers
    }
    flops = CONFIG.useful_flops(context=4096)
    assert {name: tuple(round(x * 16384 / 1e12, 1) for x in part) for name, part in flops.items()} == expected
    assert flops_per_token(CONFIG, 4096) == pytest.approx(106.7e9, rel=5e-4)


def test_step_time_at_best():
    for name, floor in (("H200", 2.121), ("H100", 2.393)):
        seconds = step_seconds(CONFIG, 4 * 4096, 4096, 1.0, SPEEDS[name])
        assert seconds["GEMM"] == pytest.approx(floor, abs=1e-3)
    forward, backward = (sum(x) for x in zip(*elementwise_bytes(CONFIG).values(), strict=True))
    assert forward + backward == pytest.approx(44.1e6, rel=0.05)  # the design's own count, fused differently in places


def test_only_trained_rows_pass_the_last_mlp_and_the_head():
    whole, part = (CONFIG.useful_flops(4096, trained) for trained in (1.0, 0.25))
    assert part["head"].forward == whole["head"].forward / 4
    assert part["down"].forward == pytest.approx(whole["down"].forward * (63.25 / 64))
