"""The decoder against transformers: logits on configs that differ in everything a config may differ in, packing, the
cache, and mutants that the same comparisons must reject."""

import contextlib
import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers.models.qwen3_5.modeling_qwen3_5 as modeling

import kernels
from kernels.documents import Documents
from kernels.proof.closeness import relative_error
from psysafe import load_model
from psysafe.checkpoint.base import build
from psysafe.model.cache import Cache
from psysafe.model.config import ModelConfig
from psysafe.model.lora import attach, fused_layers
from tests.mistakes import refused
from tests.oracles import CONFIGS, both_models, randomise_lora_B, reference_model, write_checkpoint

ARCHITECTURE = Path(__file__).parents[1] / "configs" / "qwen3.5-27b-architecture.json"
LENGTHS = (1, 2, 63, 64, 65, 130)


def one(length: int) -> torch.Tensor:
    return torch.tensor([0, length], dtype=torch.int32)


def boundaries(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def ids(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def transformers_in_fp64(model):
    """transformers casts to fp32 by name in many places; here those casts give fp64, so that it is a true oracle."""
    names = {name: getattr(torch, name) for name in dir(torch) if not name.startswith("__")}
    proxy = SimpleNamespace(**{**names, "float32": torch.float64, "float": torch.float64})
    model.double()
    rotary = model.model.rotary_emb
    size = model.config.head_dim // 4
    rotary.inv_freq = 1e7 ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    with (
        mock.patch.object(modeling, "torch", proxy),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """One checkpoint a config, written by transformers."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        name: write_checkpoint(reference_model(name), folder / str(i)) for i, name in enumerate(CONFIGS)
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name, checkpoints):
    """fp32, contract 1e-5; measured 2e-7 to 8e-6 (transformers against its own fp64 twin: the same)."""
    reference, model = reference_model(name), load_model(checkpoints[name])
    with torch.no_grad():
        for length in LENGTHS:
            x = ids(length)
            expected = reference(x[None], use_cache=False).logits[0]
            assert relative_error(model.logits(model(x, one(length))), expected) <= 1e-5


@pytest.mark.parametrize("name", ["published pattern", "ratio 3, head_dim 32", "tied, ratio 1"])
def test_logits_equal_transformers_in_fp64(name, tmp_path):
    """With rounding out of the way, at the published eps: what remains would be a wrong formula."""
    reference, model = both_models(tmp_path, name, rms_norm_eps=1e-6, dtype=torch.float64)
    x = ids(130)
    with torch.no_grad(), transformers_in_fp64(reference):
        expected = reference(x[None], use_cache=False).logits[0]
        assert expected.dtype == torch.float64
    assert relative_error(model.logits(model(x, one(130))), expected) <= 1e-9


def lora_model(checkpoint, dtype=torch.float64, rank=2):
    """The model with adapters on everything, B not zero."""
    model = load_model(checkpoint, dtype=dtype)
    adapters = attach(model, rank, 2.0 * rank, "all-linear", seed=1)
    randomise_lora_B(adapters, seed=3)
    return model, adapters


def run(model, adapters, tokens, cu_seqlens):
    """Logits and the gradients of a fixed random functional of them, per document additive."""
    logits = model.logits(model(tokens, cu_seqlens))
    weight = torch.randn(len(tokens), logits.shape[1], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return logits, weight


RAGGED = (1, 5, 64, 1, 65, 2, 130)


def packed_and_separate(model, adapters):
    tokens, cu = ids(sum(RAGGED)), boundaries(RAGGED)
    logits, weight = run(model, adapters, tokens, cu)
    adapters.grad.zero_()
    (logits * weight).sum().backward()
    packed = logits.detach(), adapters.grad.clone()
    adapters.grad.zero_()
    pieces = []
    for begin, end in pairwise(cu.tolist()):
        piece = model.logits(model(tokens[begin:end], one(end - begin)))
        (piece * weight[begin:end]).sum().backward()
        pieces.append(piece.detach())
    return packed, (torch.cat(pieces), adapters.grad.clone())


@pytest.mark.parametrize("name", ["published pattern", "attention first", "delta net only, taps 3"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_packed_documents_are_separate_documents(name, dtype, limit, checkpoints):
    packed, separate = packed_and_separate(*lora_model(checkpoints[name], dtype))
    for a, b in zip(packed, separate, strict=True):
        assert relative_error(a, b) <= limit


def without_boundaries(op: str):
    """The op, told that the whole row is one document."""
    original = getattr(kernels, op)

    def wrong(*args, **kwargs):
        args = [one_document(a) if isinstance(a, Documents) else a for a in args]
        return original(*args, **kwargs)

    def one_document(documents):
        return Documents(torch.tensor([0, documents.total], dtype=torch.int32))

    return wrong


@pytest.mark.parametrize("op", ["causal_attention", "causal_conv1d_silu", "gated_delta_rule"])
def test_a_forgotten_boundary_is_caught(op, checkpoints, monkeypatch):
    monkeypatch.setattr(kernels, op, without_boundaries(op))
    packed, separate = packed_and_separate(*lora_model(checkpoints["published pattern"]))
    assert relative_error(packed[0], separate[0]) > 1e-3
    assert relative_error(packed[1], separate[1]) > 1e-3


def swapped_halves(original):
    def wrong(qgkv, q_weight, k_weight, cos, sin, H, G, eps, lora=None):
        K = q_weight.shape[0]
        heads = qgkv[:, : 2 * H * K].view(len(qgkv), H, 2, K).flip(2).reshape(len(qgkv), 2 * H * K)
        return original(torch.cat([heads, qgkv[:, 2 * H * K :]], 1), q_weight, k_weight, cos, sin, H, G, eps, lora)

    return wrong


def mutants():
    """name -> (op of `kernels`, wrong version made from the right one)."""

    def changed(position, change):
        def make(original):
            def wrong(*args, **kwargs):
                args = list(args)
                args[position] = change(args[position])
                return original(*args, **kwargs)

            return wrong

        return make

    def tiled(original):
        def wrong(q, k, v, a, b, *rest, **kwargs):
            group = v.shape[1] // k.shape[1]
            return original(q.repeat(1, group, 1), k.repeat(1, group, 1), v, a, b, *rest, **kwargs)

        return wrong

    def late_decay(original):
        """What token t wrote decays before token t reads it."""

        def wrong(q, k, v, a, b, A_log, dt_bias, documents, **kwargs):
            g = kernels.ops.gated_delta_rule.decay(a, A_log, dt_bias)
            o, state = original(q, k, v, a, b, A_log, dt_bias, documents, **kwargs)
            return o * g.exp()[..., None], state

        return wrong

    return {
        "q and gate swapped": ("qk_norm_rope", swapped_halves),
        "norm weight w instead of 1 + w": ("residual_rms_norm", changed(2, lambda w: w - 1)),
        "eps of the norms": ("residual_rms_norm", changed(3, lambda eps: eps * 1.1)),
        "eps of q and k norms": ("qk_norm_rope", changed(7, lambda eps: eps * 1.1)),
        "eps of the gated norm": ("gated_rms_norm", changed(3, lambda eps: eps * 1.1)),
        "value heads tiled": ("gated_delta_rule", tiled),
        "decay after the write": ("gated_delta_rule", late_decay),
        "attention sees the next token": ("causal_attention", shifted_mask),
        "beta missing": ("gated_delta_rule", changed(4, lambda b: b + 50)),
        "positions off by one per token": ("qk_norm_rope", changed(3, lambda cos: cos.roll(1, 0))),
    }


def shifted_mask(original):
    def wrong(q, k, v, documents):
        outs = []
        for begin, end in pairwise(documents.bounds):
            n = end - begin
            mask = torch.ones(n, n, dtype=torch.bool).tril(1)
            part = (x[begin:end].transpose(0, 1)[None] for x in (q, k, v))
            o = torch.nn.functional.scaled_dot_product_attention(*part, attn_mask=mask, enable_gqa=True)
            outs.append(o[0].transpose(0, 1))
        return torch.cat(outs)

    return wrong


@pytest.mark.parametrize("mutant", mutants())
def test_a_wrong_formula_is_caught(mutant, checkpoints, monkeypatch):
    """Each of these fails the very comparison of test_logits_equal_transformers."""
    op, make = mutants()[mutant]
    monkeypatch.setattr(kernels, op, make(getattr(kernels, op)))
    with pytest.raises(AssertionError):
        test_logits_equal_transformers("published pattern", checkpoints)


def test_rows_are_the_rows(checkpoints):
    """Only the wanted rows go through the last MLP; they and their gradients are the same."""
    model, adapters = lora_model(checkpoints["published pattern"])
    tokens, cu, rows = ids(70), boundaries((40, 30)), torch.tensor([3, 39, 40, 69])
    results = []
    for hidden in (model(tokens, cu)[rows], model(tokens, cu, rows=rows)):
        adapters.grad.zero_()
        hidden.square().sum().backward()
        results.append((hidden.detach(), adapters.grad.clone()))
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) <= 1e-12


@pytest.mark.parametrize("name", ["published pattern", "attention first", "delta net only, taps 3"])
@pytest.mark.parametrize("pieces", [(66,), (65, 1), (2, 60, 1, 1, 1, 1), (1,) * 6 + (60,)])
def test_cache_equals_the_full_forward(name, pieces, checkpoints):
    """Two sequences of unlike lengths, in slots out of order, prefilled in pieces and decoded token by token."""
    model = load_model(checkpoints[name], dtype=torch.float64)
    a, b = ids(sum(pieces)), ids(sum(pieces) + 3, seed=1)
    cache = Cache(model.config, slots=3, max_tokens=80, dtype=torch.float64)
    with torch.no_grad():
        expected = [model(x, one(len(x))) for x in (a, b)]
        first = model(b[:3], one(3), cache.at([0]))
        got, done = [[], [first]], 0
        for n in pieces:
            tokens = torch.cat([a[done : done + n], b[3 + done : 3 + done + n]])
            hidden = model(tokens, boundaries((n, n)), cache.at([2, 0]))
            got[0].append(hidden[:n])
            got[1].append(hidden[n:])
            done += n
    for parts, whole in zip(got, expected, strict=True):
        assert relative_error(torch.cat(parts), whole) <= 1e-12


def test_a_reset_slot_starts_afresh(checkpoints):
    model = load_model(checkpoints["published pattern"], dtype=torch.float64)
    cache = Cache(model.config, slots=1, max_tokens=20, dtype=torch.float64)
    with torch.no_grad():
        model(ids(9, seed=1), one(9), cache.at())
        cache.reset([0])
        assert relative_error(model(ids(9), one(9), cache.at()), model(ids(9), one(9))) <= 1e-12
        refused("9 tokens and would get 12 more", model, ids(12), one(12), cache.at())


def test_27b_has_the_published_parameters():
    text = json.loads(ARCHITECTURE.read_text())
    model = build(ModelConfig.from_dict(text), "meta", torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == 26_895_998_464
    adapters = attach(model, 1, 32)
    assert len(adapters.segments) == 512
    assert adapters.count == 4_980_736 == adapters.param.numel()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_architecture_s_arithmetic_is_the_model_s(name, dtype, checkpoints):
    """Bytes of a cache slot are those of its tensors; GEMMs of a forward pass are those of the weights."""
    config = ModelConfig.from_dict(json.loads((checkpoints[name] / "config.json").read_text()))
    cache = Cache(config, slots=3, max_tokens=20, device="meta", dtype=dtype)
    assert 3 * config.cache_bytes(20, dtype) == sum(x.nbytes for layer in cache.layers for x in layer)
    assert cache.bytes_per_slot == config.cache_bytes(20, dtype)
    flops = config.useful_flops(context=0)
    gemms = sum(part.forward for kind, part in flops.items() if kind not in ("attention core", "delta rule"))
    model = build(config, "meta", dtype)
    weights = [layer.weight for _, layer in fused_layers(model)] + [model.head]
    assert gemms == sum(2 * weight.numel() for weight in weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"num_experts": 8}, "num_experts = 8"),
        ({"layer_types": ["full_attention"]}, "layer_types must name 64 layers"),
        ({"num_key_value_heads": 5}, "multiple of num_key_value_heads"),
        ({"hidden_size": None}, "no 'hidden_size'"),
    ],
)
def test_another_architecture_is_named(change, message):
    text = json.loads(ARCHITECTURE.read_text())
    text.update(change)
    refused(message, ModelConfig.from_dict, {key: value for key, value in text.items() if value is not None})
