"""The optimiser of a run: torch's AdamW, clipping and transformers' schedule as oracles, and its state on the way."""

import math
from itertools import accumulate

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from kernels.proof.cases import adamw_8bit as adamw
from psysafe.model.lora import Segment
from psysafe.training import optim
from psysafe.training.optim import AdamW, cosine_schedule

SIZES = [1, 255, 256, 257, 4096, 5000]
SETTINGS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def optimizer(dtype=torch.float32, sizes=SIZES, gap=3, seed=0, **settings):
    """An optimiser over tensors of these sizes with `gap` foreign elements before each of them."""
    stops = list(accumulate(size + gap for size in sizes))
    segments = [Segment(str(i), stops[i] - size, stops[i], (1, size)) for i, size in enumerate(sizes)]
    flat = torch.randn(stops[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    settings = {**SETTINGS, "max_grad_norm": 1.0, "state_bits": 8, "min_8bit_size": 256} | settings
    return AdamW(flat, torch.zeros_like(flat), segments, **settings), segments


def gradients(steps, like, seed=1):
    """Gradients of very different size, so that clipping, eps and every decade of the moments take part."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        scale = 10 ** (-8 * torch.rand(len(like), generator=generator, dtype=torch.float64) - step % 3)
        yield (scale * torch.randn(len(like), generator=generator, dtype=torch.float64)).to(like)


def compare_with_torch(dtype, tolerance, max_grad_norm=1.0, steps=30):
    """`steps` steps beside torch.optim.AdamW and clip_grad_norm_: the way gone, and every norm."""
    ours, segments = optimizer(dtype, state_bits=32, max_grad_norm=max_grad_norm)
    start = ours.flat_param.clone()
    params = [torch.nn.Parameter(start[s.start : s.stop].clone()) for s in segments]
    theirs = torch.optim.AdamW(params, lr=1.0, **SETTINGS)
    clipped = 0
    for step, grad in enumerate(gradients(steps, start)):
        lr = cosine_schedule(step, steps, 5, 1e-2)
        for s, p in zip(segments, params, strict=True):
            p.grad = grad[s.start : s.stop].clone()
        norm = torch.nn.utils.clip_grad_norm_(params, max_grad_norm)
        theirs.param_groups[0]["lr"] = lr
        theirs.step()
        ours.flat_grad.copy_(grad)
        ours.step(lr)
        assert torch.equal(ours.flat_grad, grad), "the gradient was changed"
        difference = abs(ours.grad_norm.item() - norm.item())
        assert difference <= tolerance * norm.item(), f"step {step}: the norm differs by {difference:.1e}"
        clipped += norm.item() > max_grad_norm
    way = torch.cat([ours.flat_param[s.start : s.stop] - start[s.start : s.stop] for s in segments])
    expected = torch.cat([p.detach() - start[s.start : s.stop] for s, p in zip(segments, params, strict=True)])
    error = ((way - expected).abs().max() / expected.abs().max()).item()
    print(f"{dtype}: relative error of the way {error:.1e}, {clipped} of {steps} steps clipped")
    assert error <= tolerance, f"the way differs by {error:.1e}"
    assert max_grad_norm == math.inf or 0 < clipped < steps


@pytest.mark.parametrize("max_grad_norm", [1.0, math.inf])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_full_moments_equal_torch(dtype, tolerance, max_grad_norm):
    compare_with_torch(dtype, tolerance, max_grad_norm)


@pytest.mark.parametrize("name", sorted(adamw.MUTANTS.keys() - {"v > 0 rounds to code 0"}))
def test_torch_rejects_mutants(name, monkeypatch):
    """Full moments have no codes, so the rule about code 0 cannot show here."""
    monkeypatch.setattr(optim, "adamw_8bit", adamw.MUTANTS[name])
    with pytest.raises(AssertionError, match=r"the (way|norm) differs"):
        compare_with_torch(torch.float64, 1e-13)


@pytest.mark.parametrize(("bits", "minimum"), [(8, 1), (8, 4096), (32, 4096)])
def test_state_bits_and_size_choose_the_storage(bits, minimum):
    ours, _ = optimizer(state_bits=bits, min_8bit_size=minimum)
    rows = {size: -(-size // 256) for size in SIZES}
    in_8_bits = sum(rows[size] for size in SIZES if bits == 8 and size >= minimum)
    tensors = ours.state_tensors()
    assert tensors["code_m"].shape == tensors["code_v"].shape == (in_8_bits, 256)
    assert tensors["code_m"].dtype == torch.uint8
    assert tensors["m"].shape == tensors["v"].shape == (sum(rows.values()) - in_8_bits, 256)


@pytest.mark.parametrize("settings", [{"state_bits": 8}, {"state_bits": 32}, {"state_bits": 8, "min_8bit_size": 1}])
def test_a_restored_state_continues_bit_for_bit(settings):
    """Also after a skipped step: what it left in the counters is part of the state."""
    ours, _ = optimizer(**settings)
    grads = list(gradients(9, ours.flat_param))
    grads[4] *= math.nan

    def steps(optimizer, grads):
        norms = []
        for grad in grads:
            optimizer.flat_grad.copy_(grad)
            optimizer.step(1e-3)
            norms.append(optimizer.grad_norm)
        return norms

    steps(ours, grads[:5])
    resumed, _ = optimizer(**settings, seed=9)
    resumed.flat_param.copy_(ours.flat_param)
    resumed.load_state_tensors({name: x.clone() for name, x in ours.state_tensors().items()})
    assert resumed.skipped == ours.skipped == 1
    assert steps(ours, grads[5:]) == steps(resumed, grads[5:])
    assert torch.equal(ours.flat_param, resumed.flat_param)
    for name, x in ours.state_tensors().items():
        assert torch.equal(x, resumed.state_tensors()[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("code_v"), r"optimiser state holds absmax_m, .*; expected absmax_m, absmax_v, code_m, code_v"),
        (lambda t: t.clear(), "optimiser state holds nothing; expected"),
        (lambda t: t.update(m=t["m"][1:]), r"m is float32 \(1, 256\), this run needs float32 \(2, 256\); resume with"),
        (lambda t: t.update(code_m=t["code_m"].float()), r"code_m is float32 \(\d+, 256\), this run needs uint8"),
    ],
)
def test_a_foreign_state_is_refused_whole(change, message):
    ours, _ = optimizer()
    other, _ = optimizer()
    other.flat_grad.fill_(0.1)
    other.step(1e-3)
    tensors = dict(other.state_tensors())
    change(tensors)
    before = {name: x.clone() for name, x in ours.state_tensors().items()}
    with pytest.raises(ValueError, match=message):
        ours.load_state_tensors(tensors)
    assert all(torch.equal(x, before[name]) for name, x in ours.state_tensors().items())


def test_skipped_steps_count_for_the_schedule_only():
    """A step without a finite norm leaves all as it is: the next good one is that of a run without the bad step."""
    bad, _ = optimizer()
    good, _ = optimizer()
    for step, grad in enumerate(gradients(4, bad.flat_param)):
        for run in (bad, good):
            run.flat_grad.copy_(grad)
        if step == 2:
            bad.flat_grad[10] = math.inf
        bad.step(1e-3)
        if step != 2:
            good.step(1e-3)
        assert (bad.skipped == 1) == (step == 2) == (not bad.grad_norm.isfinite())
    assert torch.equal(bad.flat_param, good.flat_param)
    assert all(torch.equal(x, good.state_tensors()[name]) for name, x in bad.state_tensors().items())


def test_zero_grad_clears_all_gradients():
    ours, _ = optimizer()
    ours.flat_grad.fill_(math.nan)
    ours.zero_grad()
    assert not ours.flat_grad.any()


@pytest.mark.parametrize("spans", [[(0, 5), (4, 8)], [(0, 11)], [(3, 3)], []])
def test_segments_must_be_disjoint_and_inside(spans):
    flat = torch.zeros(10)
    segments = [Segment("x", start, stop, (1, stop - start)) for start, stop in spans]
    with pytest.raises(AssertionError):
        AdamW(flat, flat.clone(), segments, **SETTINGS, max_grad_norm=1.0, state_bits=8, min_8bit_size=1)


@pytest.mark.parametrize("total", [1, 2, 10, 101, 8775])
@pytest.mark.parametrize("warmup", [0, 1, 7, 100, 200])
def test_schedule_equals_transformers(total, warmup):
    theirs = torch.optim.SGD([torch.zeros(1)], lr=1e-4)
    schedule = get_cosine_schedule_with_warmup(theirs, warmup, total)
    rate = schedule.lr_lambdas[0]
    for step in range(total + 1):
        assert cosine_schedule(step, total, warmup, 1e-4) == pytest.approx(1e-4 * rate(step), rel=1e-14, abs=1e-20)
