"""8-bit AdamW: bitsandbytes as the oracle of a step, fp64 as that of rounding, Triton against both, and our own rules.

The reference in fp64 is only as good as its formula: that is checked against bitsandbytes here and against torch's
AdamW in tests/test_optim.py. Closeness to fp64 then finds wrong rounding, wrong rows and unwritten elements.
"""

import math

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map

from kernels.ops import adamw_8bit as adamw
from kernels.ops.adamw_8bit import AdamWState, adamw_8bit_reference, adamw_8bit_triton
from kernels.proof.cases.adamw_8bit import CASES, HYPER, MUTANTS, RECIPE_27B, make_case
from kernels.proof.closeness import assert_close_fp32, outputs_and_gradients, poisoned_empty

SMALL_CASES = CASES[1:]
OPS = [adamw_8bit_reference, adamw_8bit_triton]
EIGHT_BIT = {"sizes": [1, 255, 256, 257, 600], "min_8bit_size": 1}
CPU = torch.device("cpu")


@pytest.mark.parametrize("signed", [True, False])
def test_maps_equal_bitsandbytes(signed):
    assert torch.equal(adamw.dynamic_map(signed), create_dynamic_map(signed))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("size", SMALL_CASES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_close_to_fp64(op, size, seed):
    """Every output of a step: movement, codes, scales, full moments, norm, counters."""
    case = make_case(**size, seed=seed)
    with poisoned_empty():
        actual = outputs_and_gradients(case, op)
    assert_close_fp32(actual, outputs_and_gradients(case, adamw_8bit_reference, torch.float64))


@pytest.mark.slow
def test_the_recipe_of_27b_is_close_to_fp64():
    assert len(RECIPE_27B) == 512 and sum(RECIPE_27B) == 4_980_736
    case = make_case(**CASES[0])
    expected = outputs_and_gradients(case, adamw_8bit_reference, torch.float64)
    assert_close_fp32(outputs_and_gradients(case, adamw_8bit_reference), expected)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_not_close(name):
    case = make_case(**EIGHT_BIT)
    expected = outputs_and_gradients(case, adamw_8bit_reference, torch.float64)
    with pytest.raises(AssertionError, match="out of tolerance"):
        assert_close_fp32(outputs_and_gradients(case, MUTANTS[name]), expected)


@pytest.mark.parametrize("size", SMALL_CASES, ids=str)
def test_triton_is_the_reference_rounding_by_rounding(size):
    """Bit for bit, with two exceptions: the norm, which is added up in another order (so nothing is clipped here), and
    the parameters, by two units in the last place: torch's sqrt on a CPU is not always correctly rounded.
    """
    case = make_case(**size)

    def unclipped(op):
        return lambda *args, **settings: op(*args, **settings | {"max_grad_norm": math.inf})

    reference, triton = (outputs_and_gradients(case, unclipped(op)) for op in OPS)
    assert reference.pop("norm").item() == pytest.approx(triton.pop("norm").item(), rel=3e-7)
    moved, expected = triton.pop("moved"), reference.pop("moved")
    param = case.inputs["param"]
    largest = torch.stack([param, param + expected, expected]).abs().amax(0)
    unit = torch.nextafter(largest, torch.tensor(math.inf)) - largest
    assert ((moved - expected).abs() <= 2 * unit).all()
    assert all(torch.equal(reference[name], triton[name]) for name in reference)


@pytest.mark.parametrize("op", OPS)
def test_two_runs_are_bit_identical(op):
    case = make_case(**SMALL_CASES[0])
    first, second = outputs_and_gradients(case, op), outputs_and_gradients(case, op)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("op", OPS)
def test_a_step_without_a_finite_norm_leaves_everything(op, bad):
    """1e30 is finite, its square is not: the norm is what counts."""
    case = make_case(**SMALL_CASES[0])
    case.inputs["grad"][0] = bad
    after = outputs_and_gradients(case, op)
    assert not after["norm"].isfinite() and not after["moved"].any()
    assert after["skipped"] == 1 and after["counters"].tolist() == [3, 1]
    saved = set(AdamWState.SAVED) - {"counters"}
    assert all(torch.equal(after[name], case.inputs[name]) for name in saved)


@pytest.mark.parametrize("op", OPS)
def test_skipped_steps_are_counted_in_a_row(op):
    state = AdamWState.zeros([(0, 300)], 1, CPU, torch.float32)
    param, good = torch.randn(300), torch.randn(300)
    reports = []
    for grad in (good, good * math.nan, good * math.inf, good, good * math.nan):
        reports.append(op(param, grad, state, **HYPER, max_grad_norm=1.0)[1])
    # Read afterwards: a report does not change when later steps run.
    assert [int(skipped) for skipped in reports] == [0, 1, 2, 0, 1]
    assert state.counters.tolist() == [2, 1]


@pytest.mark.parametrize("op", OPS)
def test_elements_of_no_segment_do_not_exist(op):
    """Whatever lies between the segments is neither counted in the norm nor changed."""
    size = 300
    states = [AdamWState.zeros([(5, 5 + size)], 1, CPU, torch.float32) for _ in range(2)]
    param, grad = torch.randn(size + 10), torch.randn(size + 10)
    wild, wild_grad = param.clone(), grad.clone()
    wild_grad[:5], wild_grad[-5:] = math.nan, 1e9
    norm, _ = op(param, grad, states[0], **HYPER, max_grad_norm=1.0)
    wild_norm, _ = op(wild, wild_grad, states[1], **HYPER, max_grad_norm=1.0)
    assert torch.equal(param, wild) and torch.equal(norm, wild_norm)
    assert norm.item() == pytest.approx(grad[5:-5].norm().item(), rel=1e-6)


@pytest.mark.parametrize("sizes", [[1, 255, 256, 257, 4096, 5000], [256], [4095, 1]])
@pytest.mark.parametrize("min_8bit_size", [1, 4096, math.inf])
def test_rows_cover_every_segment_once_and_cross_none(sizes, min_8bit_size):
    starts = [sum(sizes[:i]) + 7 * i for i in range(len(sizes))]
    segments = [(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    state = AdamWState.zeros(segments, min_8bit_size, CPU, torch.float32)
    owner = torch.full((starts[-1] + sizes[-1],), -1)
    for i, (start, stop) in enumerate(segments):
        owner[start:stop] = i
    seen = torch.zeros_like(owner)
    for row, (start, length) in enumerate(zip(state.start.tolist(), state.length.tolist(), strict=True)):
        (segment,) = owner[start : start + length].unique().tolist()
        seen[start : start + length] += 1
        assert (start - segments[segment][0]) % 256 == 0 and length in (256, (sizes[segment] - 1) % 256 + 1)
        assert (row < state.n_8bit) == (sizes[segment] >= min_8bit_size)
    assert torch.equal(seen, (owner >= 0).long())


# On a CPU bitsandbytes quantises through a table so coarse that below 1e-2 of a row's maximum its code is often not
# the nearest (measured: 14 % of v's codes between 1e-4 and 1e-3). So elements count whose m and v exceed 1e-4 of their
# row's maximum before and after; and wherever its code is another than ours, ours must be the nearer one.
SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
SIZES = [4096, 5000, 4351]


def compare_with_bitsandbytes(op, segments=None):
    """Lets bitsandbytes train for some steps; each of them is repeated by `op` from a copy of its state."""
    generator = torch.Generator().manual_seed(3)
    params = [torch.nn.Parameter(0.02 * torch.randn(size, generator=generator)) for size in SIZES]
    theirs = bitsandbytes.optim.AdamW8bit(params, **SETTINGS)
    stops = torch.tensor(SIZES).cumsum(0).tolist()
    segments = segments or [(stop - size, stop) for stop, size in zip(stops, SIZES, strict=True)]
    # The gradients of the last tensor are as small as eps, so that its place in the formula shows.
    scale = torch.cat([torch.full((size,), x) for size, x in zip(SIZES, (1.0, 0.3, 1e-8), strict=True)])
    worst, equal, compared, farther = 0.0, 0, 0, 0
    for step in range(1, 7):
        grad = scale * torch.randn(len(scale), generator=generator)
        param = torch.cat([p.detach() for p in params])
        state = AdamWState.zeros(segments, 4096, CPU, torch.float32)
        if step > 1:
            copy_state(theirs, params, state)
        state.counters[0] = step - 1
        before, (m, v) = elementwise(state), exact_moments(state, grad)
        for p, g in zip(params, grad.split(SIZES), strict=True):
            p.grad = g.clone()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        theirs.step()
        op(param, grad, state, **SETTINGS, max_grad_norm=1.0)

        after, expected = elementwise(state), AdamWState.zeros(segments, 4096, CPU, torch.float32)
        copy_state(theirs, params, expected)
        expected = elementwise(expected)
        large = (before["large"] | (step == 1)) & after["large"] & expected["large"]
        difference = (param - torch.cat([p.detach() for p in params])).abs()
        worst = max(worst, difference[large].max().item())
        for x, name in ((m, "m"), (v, "v")):
            differs = large & (after["code_" + name] != expected["code_" + name])
            ours, other = ((found[name].double() - x).abs()[differs] for found in (after, expected))
            # fp32 cannot tell ties apart.
            farther += int((ours > other + 1e-6 * x.abs()[differs]).sum())
            equal += int(large.sum() - differs.sum())
            compared += int(large.sum())
    share = equal / compared
    print(f"largest difference {worst:.2e}, {share:.4%} of {compared} codes equal")
    assert compared >= len(scale) * 6, f"only {compared} codes compared"
    assert worst <= 1e-8, f"parameters differ by {worst:.2e}"
    assert not farther, f"{farther} codes are farther than those of bitsandbytes"
    assert share >= 0.995, f"{share:.4%} of the codes equal"


def exact_moments(state, grad):
    """The new m and v by element in fp64, before they are rounded to codes."""
    clipped = grad.double() * min(1.0, 1.0 / (grad.double().norm().item() + 1e-6))
    old, (beta1, beta2) = elementwise(state), SETTINGS["betas"]
    return beta1 * old["m"] + (1 - beta1) * clipped, beta2 * old["v"] + (1 - beta2) * clipped.square()


def copy_state(theirs, params, state):
    """bitsandbytes' state of all tensors, one after the other, into our rows."""
    for name, absmax, codes, scales in (
        ("state1", "absmax1", state.code_m, state.absmax_m),
        ("state2", "absmax2", state.code_v, state.absmax_v),
    ):
        rows = [torch.nn.functional.pad(theirs.state[p][name], (0, -p.numel() % 256)).view(-1, 256) for p in params]
        codes.copy_(torch.cat(rows))
        scales.copy_(torch.cat([theirs.state[p][absmax] for p in params]))


def elementwise(state):
    """Codes and the moments they stand for by element, and which elements exceed 1e-4 of their row's maximum."""
    _, inside = adamw.elements(state, slice(0, None))
    m, v = state.values[0][state.code_m.int()], state.values[1][state.code_v.int()]
    moments = {"code_m": state.code_m, "code_v": state.code_v, "large": (m.abs() > 1e-4) & (v > 1e-4)}
    moments |= {"m": m * state.absmax_m[:, None], "v": v * state.absmax_v[:, None]}
    return {name: x[inside] for name, x in moments.items()}


@pytest.mark.parametrize("op", OPS)
def test_a_step_equals_bitsandbytes(op):
    compare_with_bitsandbytes(op)


# Code 0 concerns elements that this comparison leaves out; it has its own test below.
@pytest.mark.parametrize("name", sorted(MUTANTS.keys() - {"v > 0 rounds to code 0"}))
def test_bitsandbytes_rejects_mutants(name):
    with pytest.raises(AssertionError, match=r"parameters differ|codes equal|farther"):
        compare_with_bitsandbytes(MUTANTS[name])


def test_bitsandbytes_rejects_rows_across_tensors():
    with pytest.raises(AssertionError, match=r"parameters differ|codes equal|farther"):
        compare_with_bitsandbytes(adamw_8bit_reference, segments=[(0, sum(SIZES))])


def longest_step(op):
    """The longest step of any element, in units of lr: gradients of two sizes in a row, the small ones often zero."""
    generator = torch.Generator().manual_seed(0)
    state = AdamWState.zeros([(0, 512)], 1, CPU, torch.float32)
    param, longest = torch.zeros(512), 0.0
    scale = torch.where(torch.arange(512) % 2 == 0, 1.0, 1e-4)
    for _ in range(12):
        grad = scale * torch.randn(512, generator=generator) * (torch.rand(512, generator=generator) < 0.7)
        before = param.clone()
        op(param, grad, state, **SETTINGS | {"weight_decay": 0.0}, max_grad_norm=math.inf)
        longest = max(longest, (param - before).abs().max().item() / SETTINGS["lr"])
    return longest


@pytest.mark.parametrize("op", OPS)
def test_a_small_second_moment_never_rounds_to_zero(op):
    """Without the rule such an element steps by lr m / eps. With it every step stays within a few lr, as in fp32."""
    assert longest_step(op) <= 4


def test_without_the_rule_steps_explode():
    length = longest_step(MUTANTS["v > 0 rounds to code 0"])
    print(f"longest step without the rule: {length:.0f} lr")
    assert length > 40


def test_triton_refuses_fp64():
    state = AdamWState.zeros([(0, 4)], 1, CPU, torch.float64)
    x = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"takes fp32, not torch.float64; set PSYSAFE_KERNELS=reference"):
        adamw_8bit_triton(x, x, state, **HYPER, max_grad_norm=1.0)
