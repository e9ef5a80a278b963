"""Adapters: the formula against PEFT's layer and the fused operations; gradients and loss against PEFT on transformers'
model, by name; files both ways, every rank and target; switching off."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import kernels
from kernels.proof.closeness import relative_error
from psysafe import load_model
from psysafe.checkpoint.adapter import load_adapter, save_adapter
from psysafe.model import lora
from psysafe.model.cache import Cache
from psysafe.model.layers import FusedLinear
from psysafe.model.lora import (
    TARGETS,
    attach,
    detach,
    disabled,
    fused_layers,
    lora_linear_reference,
    lora_scale,
    resolve_targets,
)
from tests.mistakes import refused
from tests.oracles import both_models, randomise_lora_B, reference_model, write_checkpoint
from tests.test_model import boundaries, ids, one, transformers_in_fp64

PREFIX = "base_model.model.model."
LENGTHS = (21, 1, 40)


def formula_against_peft(rank, scale=1.0):
    """Output and gradients of one projection by the formula and by PEFT's layer, in fp64. scale: 1 is PEFT's own."""
    torch.manual_seed(3)
    linear = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=False, dtype=torch.float64))
    W = linear[0].weight.detach()
    peft = get_peft_model(linear, LoraConfig(r=rank, lora_alpha=6, target_modules=["0"], lora_dropout=0.0)).double()
    A, B = (x for name, x in peft.named_parameters() if "lora_" in name)
    torch.nn.init.normal_(B)
    x, dy = torch.randn(7, 24, dtype=torch.float64, requires_grad=True), torch.randn(7, 40, dtype=torch.float64)
    ours = lora_linear_reference(x, W, A, B, scale * lora_scale(rank, 6, False))
    for a, b in zip(
        (ours, *torch.autograd.grad(ours, (x, A, B), dy)),
        (peft(x), *torch.autograd.grad(peft(x), (x, A, B), dy)),
        strict=True,
    ):
        assert b.abs().max() > 0 and relative_error(a, b) <= 1e-14


@pytest.mark.parametrize("rank", [1, 5])
def test_the_formula_is_peft_s_layer(rank):
    formula_against_peft(rank)
    with pytest.raises(AssertionError):  # mutant: a scale that is 1 % off
        formula_against_peft(rank, scale=1.01)


def test_the_written_gradients_are_the_formula_s():
    """The four lines in lora.py's docstring, against autograd."""
    torch.manual_seed(4)
    x, W, A, B = (torch.randn(shape, dtype=torch.float64) for shape in ((7, 24), (40, 24), (2, 24), (40, 2)))
    dy, s, inputs = torch.randn(7, 40, dtype=torch.float64), 1.5, [t.requires_grad_() for t in (x, A, B)]
    expected = torch.autograd.grad(lora_linear_reference(x, W, A, B, s), inputs, dy)
    u, du = x @ A.T, s * dy @ B
    for gradient, other in zip((dy @ W + du @ A, du.T @ x, s * dy.T @ u), expected, strict=True):
        assert relative_error(gradient, other) <= 1e-14


def fused_mlp(block, h):
    """norm, MLP and the residual addition behind it, as the model runs them."""
    h, x, u = kernels.residual_rms_norm(h, None, block.post_attention_layernorm, block.eps, block.mlp.in_proj.lora_A)
    return kernels.residual_rms_norm(h, block.mlp(x, u), block.input_layernorm, block.eps)[0]


def mlp_by_the_formula(block, h):
    """The same from three calls of lora_linear_reference."""
    in_proj, out_proj = block.mlp.in_proj, block.mlp.out_proj
    size = out_proj.weight.shape[1]
    x = h * (h.square().mean(-1, keepdim=True) + block.eps).rsqrt() * (1 + block.post_attention_layernorm)
    (A_gate, A_up), (B_gate, B_up) = in_proj.adapter.A.chunk(2), in_proj.adapter.B.split(size)
    W_gate, W_up = in_proj.weight.split(size)
    gate = lora_linear_reference(x, W_gate, A_gate, B_gate, in_proj.adapter.scale)
    up = lora_linear_reference(x, W_up, A_up, B_up, in_proj.adapter.scale)
    down = out_proj.weight, out_proj.adapter.A, out_proj.adapter.B, out_proj.adapter.scale
    return h + lora_linear_reference(F.silu(gate) * up, *down)


def compare_mlp(folder, rank):
    """Output and every gradient of an MLP, in fp64."""
    model = load_model(write_checkpoint(reference_model(), folder), dtype=torch.float64)
    adapters = attach(model, rank, 4.0)
    adapters.param.copy_(0.1 * torch.randn(len(adapters.param), generator=torch.Generator().manual_seed(1)))
    h, dh = torch.randn(2, 9, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    results = []
    for forward in (fused_mlp, mlp_by_the_formula):
        adapters.grad.zero_()
        h = h.detach().requires_grad_()
        y = forward(model.layers[1], h)
        y.backward(dh)
        results.append({"y": y.detach(), "dh": h.grad} | clones(adapters.tensors(adapters.grad)))
    for name, x in results[1].items():
        assert relative_error(results[0][name], x) <= 1e-12, name
        assert x.any() == ("layers" not in name or "layers.1.mlp" in name), name


def clones(tensors):
    return {name: x.clone() for name, x in tensors.items()}


@pytest.mark.parametrize("rank", [1, 2])
def test_the_fused_operations_compute_the_formula(rank, tmp_path, monkeypatch):
    compare_mlp(tmp_path, rank)
    original = FusedLinear.lora_term
    monkeypatch.setattr(FusedLinear, "lora_term", lambda self, *args: original(self, *args)._replace(scale=0.0))
    with pytest.raises(AssertionError):  # mutant: s u B^T is dropped
        compare_mlp(tmp_path, rank)


def peft_model(reference, rank: int, targets, rslora=False):
    """transformers' model under PEFT, B drawn at random so that every gradient is different from zero."""
    config = LoraConfig(
        r=rank, lora_alpha=3 * rank, target_modules=list(resolve_targets(targets)), use_rslora=rslora, lora_dropout=0.0
    )
    model = get_peft_model(reference, config)
    torch.manual_seed(11)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn_like(p) * 0.1
    return model


def peft_tensors(model, gradients=False) -> dict[str, torch.Tensor]:
    """PEFT's adapter tensors, or their gradients, by our names."""
    return {
        name.removeprefix(PREFIX).removesuffix(".default.weight"): (p.grad if gradients else p).detach()
        for name, p in model.named_parameters()
        if "lora_" in name
    }


def loss_and_gradients(model, adapters, tokens, cu, rows, labels):
    hidden = model(tokens, cu, rows=rows)
    loss = kernels.linear_cross_entropy(hidden, model.head, labels) / len(labels)
    adapters.grad.zero_()
    loss.backward()
    return loss.detach(), {name: g.clone() for name, g in adapters.tensors(adapters.grad).items()}


def peft_loss_and_gradients(model, tokens, cu, rows, labels):
    """The same documents one by one; the mean over all trained tokens."""
    total = 0
    for begin, end in pairwise(cu.tolist()):
        logits = model(tokens[begin:end][None], use_cache=False).logits[0]
        mine = (rows >= begin) & (rows < end)
        if mine.any():
            loss = F.cross_entropy(logits[rows[mine] - begin], labels[mine], reduction="sum") / len(labels)
            loss.backward()
            total += loss.detach()
    return total, peft_tensors(model, gradients=True)


def compare(tmp_path, name, rank, targets, dtype, limit, rslora=False):
    reference, model = both_models(tmp_path, name, dtype=dtype)
    tokens, cu = ids(sum(LENGTHS)), boundaries(LENGTHS)
    # The rows that predict a trained token: never the last row of a document.
    rows = torch.tensor([r for b, e in pairwise(cu.tolist()) for r in range(b + (e - b) // 3, e - 1)])
    labels = tokens[rows + 1]
    peft = peft_model(reference, rank, targets, rslora)
    adapters = attach(model, rank, 3 * rank, targets, use_rslora=rslora)
    for key, x in peft_tensors(peft).items():
        adapters.tensors()[key].copy_(x)
    loss, grads = loss_and_gradients(model, adapters, tokens, cu, rows, labels)
    if dtype == torch.float64:
        with transformers_in_fp64(peft.base_model.model):
            peft.double()
            expected_loss, expected = peft_loss_and_gradients(peft, tokens, cu, rows, labels)
    else:
        expected_loss, expected = peft_loss_and_gradients(peft, tokens, cu, rows, labels)
    assert relative_error(loss, expected_loss) <= limit
    assert grads.keys() == expected.keys()
    for key in grads:
        assert expected[key].abs().max() > 0, key
        error = relative_error(grads[key], expected[key])
        assert error <= limit, f"{key}: {error:.1e}"


@pytest.mark.parametrize("rank", [1, 2, 8])
@pytest.mark.parametrize("targets", [TARGETS, "all-linear", ("q_proj", "up_proj", "out_proj", "in_proj_z")])
def test_gradients_equal_peft(rank, targets, tmp_path):
    compare(tmp_path, "published pattern", rank, targets, torch.float32, 1e-4)


@pytest.mark.parametrize("name", ["attention first", "ratio 3, head_dim 32"])
def test_gradients_equal_peft_in_fp64(name, tmp_path):
    compare(tmp_path, name, 2, "all-linear", torch.float64, 1e-9)


def test_rslora_scale_equals_peft(tmp_path):
    compare(tmp_path, "published pattern", 4, TARGETS, torch.float32, 1e-4, rslora=True)


@pytest.mark.parametrize("op", ["residual_rms_norm", "qk_norm_rope", "swiglu"])
def test_a_dropped_adapter_term_is_caught(op, tmp_path, monkeypatch):
    """The op forgets s u B^T: the same comparison has to fail."""
    original = getattr(kernels, op)

    def wrong(*args, **kwargs):
        args = [a._replace(lora=dropped(a.lora)) if isinstance(a, kernels.Pending) else dropped(a) for a in args]
        return original(*args, **kwargs)

    def dropped(x):  # by its scale, so that the gradients still exist and have to be compared
        return x._replace(scale=0.0) if isinstance(x, kernels.LoRATerm) else x

    monkeypatch.setattr(kernels, op, wrong)
    with pytest.raises(AssertionError):
        compare(tmp_path, "published pattern", 1, TARGETS, torch.float32, 1e-4)


def tuned(folder: Path, rank=2, targets=TARGETS):
    reference, model = both_models(folder)
    adapters = attach(model, rank, 4.0, targets, seed=7)
    randomise_lora_B(adapters, seed=2)
    return reference, model, adapters


@pytest.mark.parametrize("targets", [TARGETS, "all-linear"])
@pytest.mark.parametrize("rank", [1, 4])
def test_saved_adapter_loads_in_peft(rank, targets, tmp_path):
    reference, model, adapters = tuned(tmp_path / "base", rank, targets)
    save_adapter(adapters, tmp_path, base=str(tmp_path / "base"), multimodal=False)
    x = ids(70)
    with torch.no_grad():
        peft = PeftModel.from_pretrained(reference, tmp_path)
        expected = peft(x[None], use_cache=False).logits[0]
        got = model.logits(model(x, one(70)))
        assert relative_error(got, expected) <= 1e-5
        detach(model)
        assert relative_error(model.logits(model(x, one(70))), expected) > 1e-2


def test_peft_adapter_loads_here(tmp_path):
    """PEFT -> ours -> PEFT: the same numbers, the same tensors."""
    reference, model = both_models(tmp_path / "base")
    peft = peft_model(reference, 3, TARGETS)
    peft.save_pretrained(tmp_path / "theirs")
    adapters = load_adapter(model, tmp_path / "theirs")
    x = ids(33)
    with torch.no_grad():
        assert relative_error(model.logits(model(x, one(33))), peft(x[None], use_cache=False).logits[0]) <= 1e-5
    save_adapter(adapters, tmp_path / "ours", base="base", multimodal=False)
    theirs, ours = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)


@pytest.mark.parametrize("layout", ["text", "multimodal", "both"])
def test_key_layouts_round_trip(layout, tmp_path):
    _, model, adapters = tuned(tmp_path / "base")
    save_adapter(adapters, tmp_path / layout, base="base", multimodal=True, layout=layout)
    nested = ["language_model" in key for key in load_file(tmp_path / layout / "adapter_model.safetensors")]
    count = len(adapters.segments)
    assert (nested.count(False), nested.count(True)) == (count * (layout != "multimodal"), count * (layout != "text"))
    again = load_adapter(model, tmp_path / layout)
    assert torch.equal(again.param, adapters.param)


def test_initial_values_depend_on_seed_and_names_alone(tmp_path):
    _, model = both_models(tmp_path)
    first = attach(model, 1, 32, TARGETS, seed=5).param.clone()
    assert torch.equal(first, attach(model, 1, 32, TARGETS, seed=5).param)
    assert not torch.equal(first, attach(model, 1, 32, TARGETS, seed=6).param)
    tensors = attach(model, 1, 32, TARGETS, seed=5).tensors()
    A = torch.cat([x.flatten() for name, x in tensors.items() if name.endswith("lora_A")])
    bound = 48**-0.5  # Kaiming-uniform with a = sqrt(5): 1 / sqrt(fan_in); most A's read the hidden size, 48
    assert 0.8 * bound < A[: 3 * 48].abs().max() <= bound
    assert all(not x.any() for name, x in tensors.items() if name.endswith("lora_B"))


def test_attaching_takes_earlier_adapters_off(tmp_path):
    """One left on a projection that is no target now would add its term and never be trained or saved."""
    _, model, _ = tuned(tmp_path)
    plain = load_model(tmp_path)
    attach(model, 1, 32, ["q_proj"])
    with torch.no_grad():
        assert torch.equal(model(ids(9), one(9)), plain(ids(9), one(9)))


def compare_disabled(model, adapters, base):
    """Inside `disabled` the adapted model against the bare base, bit for bit: packed, with a cache, with gradients."""
    tokens, cu = ids(40), boundaries((25, 15))
    param, parameters = adapters.param.clone(), dict(model.named_parameters())
    with torch.no_grad():
        adapted = model(tokens, cu)
        expected = base(tokens, cu)
    assert relative_error(adapted, expected) > 1e-2
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled), disabled(model):
            assert torch.equal(model(tokens, cu), expected)
    with torch.no_grad(), disabled(model):
        caches = [Cache(m.config, slots=1, max_tokens=30) for m in (model, base)]
        for piece in (tokens[:25], tokens[25:26]):
            ours, theirs = (m(piece, one(len(piece)), c.at()) for m, c in zip((model, base), caches, strict=True))
            assert torch.equal(ours, theirs)
    assert torch.equal(model(tokens, cu), adapted) and torch.equal(adapters.param, param)
    assert all(p is parameters[name] for name, p in model.named_parameters())


def test_disabled_is_the_base(tmp_path, monkeypatch):
    _, model, adapters = tuned(tmp_path, targets="all-linear")
    base, layers = load_model(tmp_path), list(fused_layers(model))
    compare_disabled(model, adapters, base)
    for i in range(len(layers)):  # mutant: one layer is forgotten and keeps its adapter
        monkeypatch.setattr(lora, "fused_layers", lambda _, i=i: iter(layers[:i] + layers[i + 1 :]))
        with pytest.raises(AssertionError):
            compare_disabled(model, adapters, base)


def test_disabled_ends_with_an_error_too(tmp_path):
    _, model, _ = tuned(tmp_path)
    adapters = [layer.adapter for _, layer in fused_layers(model)]
    with pytest.raises(ZeroDivisionError), disabled(model):
        raise ZeroDivisionError
    assert [layer.adapter for _, layer in fused_layers(model)] == adapters and any(adapters)


def test_what_cannot_be_honoured_is_refused(tmp_path):
    _, model, adapters = tuned(tmp_path / "base")
    save_adapter(adapters, tmp_path / "good", base="base", multimodal=False)
    config = json.loads((tmp_path / "good/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "good/adapter_model.safetensors")

    def refused_with(message, tensors=tensors, **changes):
        folder = tmp_path / "bad"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        save_file(tensors, folder / "adapter_model.safetensors")
        refused(message, load_adapter, model, folder)

    refused_with("use_dora = True", use_dora=True)
    refused_with("bias none", bias="all")
    refused_with("modules_to_save", modules_to_save=["lm_head"])
    refused_with("of the config's rank 4", rank_pattern={"q_proj": 4})
    refused_with("layer_replication", layer_replication=[[0, 2], [1, 3]])
    refused_with("init_lora_weights = 'pissa_niter_4'.* changed base", init_lora_weights="pissa_niter_4")
    refused_with("bad: adapts lm_head; expected", {"base_model.model.lm_head.lora_A.weight": torch.ones(1, 1)})
    for value in (float("nan"), float("inf")):
        name, x = next(iter(tensors.items()))
        refused_with(f"{name} holds NaN or infinity", {**tensors, name: torch.full_like(x, value)})
    refused_with("is no LoRA matrix", {**tensors, PREFIX + "layers.0.mlp.lora_magnitude_vector": torch.ones(2)})
    other = {key.replace("layers.", "layers.1"): x for key, x in tensors.items()}
    refused_with("none of its .* tensors belongs to this model", other)
    short = dict(list(tensors.items())[:-1])
    refused_with("missing", short)
    refused_with(r"is \(1,", {key: x[:1].clone() for key, x in tensors.items()})
    (tmp_path / "bad/adapter_model.safetensors").write_bytes(b"\x10")
    refused("not a readable safetensors", load_adapter, model, tmp_path / "bad")
    refused(r"nothing_proj.*expected all-linear", attach, model, 1, 1, ["nothing_proj"])


def test_the_recipe_reaches_what_peft_reaches(tmp_path):
    """The seven names give the same set of tensors here and in PEFT."""
    reference, model = both_models(tmp_path)
    assert {s.name for s in attach(model, 1, 32).segments} == set(peft_tensors(peft_model(reference, 1, TARGETS)))
    assert load_model(tmp_path).layers[0].mlp.in_proj.adapter is None
    assert reference_model().config.num_hidden_layers == 4
