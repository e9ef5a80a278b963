"""Causal attention and its decode form against the definition in fp64: outputs and every gradient, in the interpreter.

The oracle below shares nothing with the kernels: one document, one query head, one matrix of scores at a time.
"""

import pytest
import torch
from torch import Tensor

from kernels.documents import Documents
from kernels.ops import attention_decode as decode
from kernels.ops import attention_schedule
from kernels.ops import causal_attention as attention
from kernels.ops._triton import HAS_TRITON
from kernels.ops.attention_decode import attention_decode_reference, attention_decode_triton
from kernels.ops.attention_schedule import head_parts, tile_items
from kernels.ops.causal_attention import TILES, causal_attention_reference, causal_attention_triton
from kernels.proof.cases import attention_decode as decode_cases
from kernels.proof.cases._shared import packed
from kernels.proof.cases.causal_attention import CASES, make_case
from kernels.proof.check import shown
from kernels.proof.closeness import Case, assert_close_fp32, outputs_and_gradients, poisoned_empty
from tests.mistakes import refused

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
SMALL = [case for case in CASES if sum(case["lengths"]) < 1000]
SMALL_DECODE = [case for case in decode_cases.CASES if sum(case["lengths"]) < 1000]


def naive(q: Tensor, k: Tensor, v: Tensor, documents: Documents, key_documents: Documents | None = None) -> Tensor:
    keys, group, rows = key_documents or documents, q.shape[1] // k.shape[1], []
    for a, b, c, d in zip(documents.bounds, documents.bounds[1:], keys.bounds, keys.bounds[1:], strict=False):
        heads = []
        for h in range(q.shape[1]):
            s = q[a:b, h] @ k[c:d, h // group].T / q.shape[2] ** 0.5
            hidden = torch.ones_like(s, dtype=torch.bool).triu((d - c) - (b - a) + 1)
            e = torch.exp(s - s.amax(1, keepdim=True)).masked_fill(hidden, 0)
            heads.append((e / e.sum(1, keepdim=True)) @ v[c:d, h // group])
        rows.append(torch.stack(heads, 1))
    return torch.cat(rows)


def naive_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    """The last row of the definition, one sequence after the other."""
    one = packed([1])
    return torch.cat(
        [naive(q[i : i + 1], k_cache[i, :n], v_cache[i, :n], one, packed([n])) for i, n in enumerate(lengths.tolist())]
    )


def expected(case: Case, oracle=naive) -> dict[str, Tensor]:
    return outputs_and_gradients(case, oracle, torch.float64)


def run_triton(case: Case, op=causal_attention_triton) -> dict[str, Tensor]:
    with poisoned_empty():
        return outputs_and_gradients(case, op)


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("size", SMALL, ids=shown)
def test_reference_equals_the_definition(size):
    case = make_case(**size)
    assert_close_fp32(outputs_and_gradients(case, causal_attention_reference, torch.float64), expected(case))


@needs_triton
@pytest.mark.parametrize("group", [1, 2, 3, 6])
def test_head_ratios(group):
    """Two groups each, so that a head read from the wrong group shows."""
    case = make_case([17, 34], heads=2 * group, kv_heads=2, head_dim=64)
    assert_close_fp32(run_triton(case), expected(case))


@needs_triton
def test_the_16_bit_tiles(monkeypatch):
    """The block shapes that train the model, in fp32: 128 rows a program, documents that end on and beside a tile."""
    monkeypatch.setitem(TILES, (4, 64), TILES[2, 256]._replace(warps=4))
    case = make_case([127, 128, 129, 3], heads=2, kv_heads=1, head_dim=64)
    assert_close_fp32(run_triton(case), expected(case))


@needs_triton
@pytest.mark.parametrize("parts", [1, 3])
def test_any_split_of_a_group(parts, monkeypatch):
    """dK and dV summed by one program or by three, with both orders of heads in the grid."""
    monkeypatch.setattr(attention, "head_parts", lambda *_: parts)
    case = make_case([35, 20], heads=12, kv_heads=2, head_dim=64)
    first = run_triton(case)
    assert_close_fp32(first, expected(case))
    monkeypatch.setattr(attention_schedule, "L2_TOKENS", 0)
    assert same_bits(run_triton(case), first), "the order of programs must not show in the result"


@needs_triton
def test_documents_do_not_know_their_neighbours():
    """The same documents in another order give the same bits; so do two runs."""
    lengths, order = [40, 1, 33, 65], [2, 0, 3, 1]
    case = make_case(lengths, heads=3, kv_heads=1, head_dim=64)
    bounds = packed(lengths).bounds
    rows = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in order])
    weight = torch.randn(sum(lengths), 3, 64)

    def results(rows: Tensor, lengths: list[int]) -> list[Tensor]:
        x = [case.inputs[name][rows].requires_grad_() for name in ("q", "k", "v")]
        o = causal_attention_triton(*x, packed(lengths))
        return [o.detach(), *torch.autograd.grad(o, x, weight[rows])]

    plain = results(torch.arange(sum(lengths)), lengths)
    permuted = results(rows, [lengths[i] for i in order])
    again = results(rows, [lengths[i] for i in order])
    for a, b, c in zip(plain, permuted, again, strict=True):
        assert torch.equal(a[rows], b) and torch.equal(b, c)


@needs_triton
def test_keys_from_a_cache():
    """Prefill in pieces: the last queries of each document over all its keys = the end of the whole result. What lies
    behind the last document's keys is an unwritten cache.
    """
    ends, pieces = [70, 33, 1], [37, 33, 1]
    case = make_case(ends, heads=4, kv_heads=2, head_dim=64)
    q, k, v = (case.inputs[name] for name in ("q", "k", "v"))
    whole = packed(ends)
    rows = torch.cat([torch.arange(end - n, end) for end, n in zip(whole.bounds[1:], pieces, strict=True)])
    full = naive(q.double(), k.double(), v.double(), whole)[rows]
    k, v = (torch.cat([x, torch.full_like(x[:5], float("nan"))]) for x in (k, v))
    with poisoned_empty():
        o = causal_attention_triton(q[rows], k, v, packed(pieces), whole)
    assert_close_fp32({"o": o}, {"o": full})
    assert_close_fp32({"o": causal_attention_reference(q[rows], k, v, packed(pieces), whole)}, {"o": full})


@needs_triton
def test_strided_rows_and_expanded_gradients():
    """q, k and v as columns of one GEMM's output, and a gradient that a sum has expanded."""
    documents = packed([20, 13])
    qkv = torch.randn(33, 6 * 64)
    q, k, v = (x.unflatten(1, (-1, 64)) for x in qkv.split([4 * 64, 64, 64], 1))

    def results(op, dtype: torch.dtype) -> dict[str, Tensor]:
        x = [t.to(dtype).detach().requires_grad_() for t in (q, k, v)]
        assert dtype != torch.float32 or not x[0].is_contiguous()
        o = op(*x, documents)
        return dict(zip(("o", "dq", "dk", "dv"), [o.detach(), *torch.autograd.grad(o.sum(), x)], strict=True))

    with poisoned_empty():
        actual = results(causal_attention_triton, torch.float32)
    # Of a sum, dq and dk are not noise only because v differs from token to token.
    assert_close_fp32(actual, results(naive, torch.float64))


@needs_triton
@pytest.mark.parametrize("wanted", [("q",), ("k",), ("v",)])
def test_only_the_gradients_that_are_needed(wanted, monkeypatch):
    case = make_case([33], heads=2, kv_heads=1, head_dim=64)
    launched = []
    for name in ("_backward_dq_kernel", "_backward_dk_kernel", "_backward_dv_kernel"):
        kernel = getattr(attention, name)

        class Watched:
            def __init__(self, name, kernel):
                self.name, self.kernel = name, kernel

            def __getitem__(self, grid):
                launched.append(self.name[len("_backward_d")])
                return self.kernel[grid]

        monkeypatch.setattr(attention, name, Watched(name, kernel))
    case = Case(case.inputs, case.call, wanted)
    assert_close_fp32(run_triton(case), expected(case))
    assert launched == list(wanted)


@needs_triton
def test_no_graph_is_kept_without_gradients():
    case = make_case([5], heads=1, kv_heads=1, head_dim=64)
    assert causal_attention_triton(**case.inputs, documents=packed([5])).grad_fn is None


def test_schedule_covers_every_row_once_heaviest_first():
    documents = packed([300, 1, 128, 129])
    for late_first in (True, False):
        items = tile_items(documents, documents, 128, late_first).tolist()
        rows = sorted(row for _, end, first, *_ in items for row in range(first, min(first + 128, end)))
        assert rows == list(range(558))
        assert all(start <= first < end and shift == 0 for start, end, first, _, shift in items)
        work = [min(first + 128, end) - start if late_first else end - first for start, end, first, *_ in items]
        assert work == sorted(work, reverse=True)
    assert tile_items(documents, documents, 128, True) is tile_items(documents, documents, 128, True), "once a batch"


@pytest.mark.parametrize(("lengths", "parts"), [([4096], 2), ([650] * 6 + [196], 2), ([16384], 1), ([650] * 25, 1)])
def test_head_parts_follow_the_lengths(lengths, parts):
    """One 4,096 document leaves half of the SMs idle unless its heads are spread; long rows need no spreading."""
    assert head_parts(packed(lengths), 6, 4, 128) == parts


@needs_triton
def test_what_cannot_run_is_said():
    q, k, v = (torch.randn(5, h, 64) for h in (2, 1, 1))
    documents = packed([5])
    refused("one 16-bit dtype or fp32", causal_attention_triton, q.double(), k.double(), v.double(), documents)
    with pytest.raises(ValueError, match=r"q \(5, 3, 64\) cannot read k \(5, 2, 64\)"):
        causal_attention_triton(torch.randn(5, 3, 64), torch.randn(5, 2, 64), torch.randn(5, 2, 64), documents)
    refused(r"pass q.contiguous\(\)", causal_attention_triton, torch.randn(2, 5, 64).transpose(0, 1), k, v, documents)
    refused("documents of 6 and 6 tokens", causal_attention_triton, q, k, v, packed([6]))
    refused("no gradient", causal_attention_triton, q[:3].requires_grad_(), k, v, packed([3]), documents)
    for op in (causal_attention_triton, causal_attention_reference):
        with pytest.raises(ValueError, match="document 0 has 5 queries but only 3 keys"), torch.no_grad():
            op(q, k, v, documents, packed([3]))


@needs_triton
def test_other_head_sizes_run_the_reference():
    assert not attention.triton_supports(80) and attention.triton_supports(256)
    case = make_case([9, 4], heads=2, kv_heads=1, head_dim=80)
    assert same_bits(run_triton(case), outputs_and_gradients(case, causal_attention_reference))


# Decode


@pytest.mark.parametrize("size", SMALL_DECODE, ids=shown)
def test_decode_reference_equals_the_definition(size):
    case = decode_cases.make_case(**size)
    assert_close_fp32(outputs_and_gradients(case, attention_decode_reference), expected(case, naive_decode))


@needs_triton
def test_decode_of_long_sequences(monkeypatch):
    """More keys than MIN_KEYS in every piece, some pieces empty: the cut of a long cache at a small size."""
    monkeypatch.setattr(decode, "SPLITS", 4)
    monkeypatch.setattr(decode, "MIN_KEYS", 32)
    case = decode_cases.make_case([300, 97, 33], heads=6, kv_heads=2, head_dim=64)
    assert_close_fp32(run_triton(case, attention_decode_triton), expected(case, naive_decode))


@needs_triton
def test_decode_does_not_depend_on_the_batch():
    """Alone or in a batch, in a larger cache, with int32 lengths, with NaN behind the length: the same bits."""
    case = decode_cases.make_case([1, 63, 130], heads=4, kv_heads=2, head_dim=64)
    x = case.inputs
    batch = attention_decode_triton(x["q"], x["k_cache"], x["v_cache"], x["lengths"])
    alone = [t[1:2].clone() for t in (x["q"], x["k_cache"][:, :70], x["v_cache"][:, :70])]
    for cache in alone[1:]:
        cache[:, 63:] = float("nan")
    assert torch.equal(attention_decode_triton(*alone, x["lengths"][1:2].int()), batch[1:2])


@needs_triton
def test_decode_says_what_cannot_run():
    q, k, v, n = (decode_cases.make_case([4], 2, 1, 64).inputs[name] for name in ("q", "k_cache", "v_cache", "lengths"))
    refused("one dtype", attention_decode_triton, q.double(), k, v, n)
    refused("no gradient", attention_decode_triton, q.clone().requires_grad_(), k, v, n)
