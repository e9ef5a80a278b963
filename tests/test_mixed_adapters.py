"""Several adapters in one batch: every row equals its adapter alone, base rows the base bit for bit; PEFT's own mixed
batches agree."""

import functools
import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from kernels import Documents
from kernels.ops._launch import fuses_A, fuses_B
from kernels.proof.closeness import relative_error
from psysafe import load_model
from psysafe.checkpoint.adapter import attach_many, load_adapter, save_adapter
from psysafe.model.cache import Cache
from psysafe.model.layers import FusedLinear
from psysafe.model.lora import TARGETS, attach, disabled, fused_layers, resolve_targets
from tests.mistakes import refused
from tests.oracles import both_models, randomise_lora_B, reference_model, write_checkpoint
from tests.test_model import boundaries, ids, transformers_in_fp64

SHAPES = {  # rank, alpha, targets, rsLoRA
    "one": (1, 32.0, TARGETS, False),
    "two": (2, 6.0, "all-linear", True),
    "five": (5, 3.0, ("q_proj", "layers.1.mlp.down_proj", "in_proj_z"), False),
}
LENGTHS = (9, 1, 12, 5, 7)
NAMES = ["two", None, "one", "five", None]  # of the documents
FACTORS = [1.0, 1.0, -0.5, 2.25, 3.0]


def write_adapters(folder, dtype=torch.float64, shapes=SHAPES, config="published pattern"):
    """(the base's folder, adapters' folders by name)."""
    base = write_checkpoint(reference_model(config), folder / "base")
    for seed, (name, (rank, alpha, targets, rslora)) in enumerate(shapes.items()):
        adapters = attach(load_model(base, dtype=dtype), rank, alpha, targets, seed=seed, use_rslora=rslora)
        randomise_lora_B(adapters, seed)
        save_adapter(adapters, folder / name, base="base", multimodal=False)
    return base, {name: folder / name for name in shapes}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_adapters(tmp_path_factory.mktemp("mixed"))


def with_factor(base, folder, factor, dtype):
    """The model with one adapter (None: without), `factor` times as strong."""
    model = load_model(base, folder, dtype=dtype)
    for _, layer in fused_layers(model):
        if layer.adapter is not None:
            layer.adapter.scale *= factor
    return model


def batch():
    tokens = ids(sum(LENGTHS))
    return tokens, Documents(boundaries(LENGTHS), tokens.device)


ORDERS = {"all": torch.arange(34), "some": torch.tensor([33, 0, 8, 9, 15, 25]), "shuffled": torch.arange(34).flip(0)}


@functools.cache
def hidden_alone(base, folder, factor, dtype, order):
    with torch.no_grad():
        return with_factor(base, folder, factor, dtype)(*batch(), rows=ORDERS[order])


def compare(written, order="all", dtype=torch.float64, limit=1e-12, names=NAMES, factors=FACTORS):
    """A packed batch of all kinds of rows, the wanted ones selected in an order, against each adapter alone."""
    base, folders = written
    model = load_model(base, dtype=dtype)
    mixed = attach_many(model, folders)
    tokens, documents = batch()
    rows, weights = ORDERS[order], mixed.weights(names, factors)[documents.index]
    with torch.no_grad():
        hidden = model(tokens, documents, rows=rows, adapter_weights=weights)
    base_hidden = hidden_alone(base, None, 1.0, dtype, order)
    for name, factor in set(zip(names, factors, strict=True)):
        own = torch.tensor([(names[i], factors[i]) == (name, factor) for i in documents.index[rows].tolist()])
        if name is None:
            assert torch.equal(hidden[own], base_hidden[own])
            continue
        expected = hidden_alone(base, folders[name], factor, dtype, order)[own]
        assert len(expected) and relative_error(hidden[own], expected) <= limit, name
        assert relative_error(base_hidden[own], expected) > 1e-3  # the adapter does something


@pytest.mark.parametrize("order", ORDERS)
def test_a_row_equals_its_adapter_alone(order, written):
    compare(written, order)


def test_in_other_types_and_with_attention_first(written, tmp_path):
    compare(written, dtype=torch.float32, limit=1e-5)
    compare(written, dtype=torch.bfloat16, limit=0.05)
    compare(write_adapters(tmp_path, config="attention first"), "some")


def test_wrong_weights_are_caught(written, monkeypatch):
    """Mutants: the last MLP's weights are not those of its rows; those of the next column; s_i / s is dropped."""
    compare(written, "shuffled")
    select, term = torch.Tensor.index_select, FusedLinear.lora_term

    def not_the_weights(x, dim, rows):  # nothing else has eight columns
        return x if x.shape[1:] == (8,) else select(x, dim, rows)

    for owner, name, wrong in (
        (torch.Tensor, "index_select", not_the_weights),
        (FusedLinear, "lora_term", lambda self, u, weights: term(self, u, weights.roll(1, 1))),
        (FusedLinear, "lora_term", lambda self, u, weights: term(self, u, weights.sign())),
    ):
        with monkeypatch.context() as patch, pytest.raises(AssertionError):
            patch.setattr(owner, name, wrong)
            compare(written, "shuffled")


def test_with_a_cache(written):
    """Prompts in pieces and then token by token: each slot as its adapter alone."""
    base, folders = written
    mixed_model = load_model(base, dtype=torch.float64)
    mixed = attach_many(mixed_model, folders)
    tokens, n = ids(60).view(3, 20), 3
    names, factors = ["five", None, "two"], [1.5, 1.0, 1.0]
    weights = mixed.weights(names, factors)
    one_each = Documents(torch.arange(n + 1, dtype=torch.int32), tokens.device)

    def run(model, weights=None):
        cache, live = Cache(model.config, n, 30, dtype=torch.float64), torch.ones(n, dtype=torch.bool)
        hidden = []
        for begin, end in ((0, 7), (7, 12)):
            piece = Documents(boundaries([end - begin] * n), tokens.device)
            of_token = None if weights is None else weights[piece.index]
            last = torch.arange(1, n + 1) * (end - begin) - 1
            hidden.append(model(tokens[:, begin:end].flatten(), piece, cache.at(), last, of_token))
        for t in range(12, 16):
            hidden.append(model(tokens[:, t], one_each, cache.step(live, t + 1), adapter_weights=weights))
        return torch.stack(hidden)  # (passes, n, D)

    with torch.inference_mode():
        together = run(mixed_model, weights)
        for i, (name, factor) in enumerate(zip(names, factors, strict=True)):
            alone = run(with_factor(base, folders.get(name), factor, torch.float64))
            assert relative_error(together[:, i], alone[:, i]) <= (1e-12 if name else 0)


def test_base_and_one_adapter_of_rank_1_stay_fused(written):
    """What the operations are given is what they fuse, and with an adapter's rows alone it is bit for bit the same."""
    base, folders = written
    mixed_model, model = load_model(base), load_model(base)
    mixed = attach_many(mixed_model, {"one": folders["one"]})
    load_adapter(model, folders["one"])
    mlp, alone = mixed_model.layers[0].mlp, model.layers[0].mlp.in_proj
    u = torch.randn(2, 2, generator=torch.Generator().manual_seed(1))
    together, expected = mlp.in_proj.lora_term(u, mixed.weights(["one", None], [1.0, 1.0])), alone.lora_term(u)
    assert fuses_B(together) and fuses_A(mlp.in_proj.lora_A) and fuses_A(mlp.out_proj.lora_A)
    assert torch.equal(together.u[0], expected.u[0]) and not together.u[1].any()
    assert torch.equal(together.B, expected.B) and together.scale == expected.scale
    compare((base, {"one": folders["one"]}), dtype=torch.float32, limit=1e-5, names=["one", None, "one", None, "one"])


def peft_adapters(reference):
    """transformers' model under PEFT with all of SHAPES."""
    configs = {
        name: LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=list(resolve_targets(targets)), use_rslora=rslora, lora_dropout=0.0
        )
        for name, (rank, alpha, targets, rslora) in SHAPES.items()
    }
    first, *others = configs
    peft = get_peft_model(reference, configs[first], adapter_name=first)
    for name in others:
        peft.add_adapter(name, configs[name])
    torch.manual_seed(5)
    for name, p in peft.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn_like(p) * 0.1
    return peft.eval()


def test_peft_s_mixed_batches_agree(tmp_path):
    reference, model = both_models(tmp_path / "base", dtype=torch.float64)
    names = ["five", "__base__", "one", "two", "one"]
    tokens = ids(5 * 11).view(5, 11)
    with transformers_in_fp64(reference):
        peft = peft_adapters(reference).double()
        peft.save_pretrained(tmp_path)
        with torch.no_grad():
            expected = peft(tokens, use_cache=False, adapter_names=names).logits
    mixed = attach_many(model, {name: tmp_path / name for name in SHAPES})
    documents = Documents(boundaries([11] * 5), tokens.device)
    weights = mixed.weights([None if name == "__base__" else name for name in names], [1.0] * 5)
    with torch.no_grad():
        hidden = model(tokens.flatten(), documents, adapter_weights=weights[documents.index])
        logits = model.logits(hidden).view_as(expected)
    for name, ours, theirs in zip(names, logits, expected, strict=True):
        assert relative_error(ours, theirs) <= 1e-9, name


def test_ranks_and_scales_by_pattern(written, tmp_path):
    """An adapter with a rank_pattern is brought to one rank first, as when it is loaded alone."""
    base, folders = written
    config = json.loads((folders["two"] / "adapter_config.json").read_text())
    tensors = load_file(folders["two"] / "adapter_model.safetensors")
    wide = {key: x for key, x in tensors.items() if "up_proj" in key}
    narrow = {key: x[:1] if "lora_A" in key else x[:, :1] for key, x in tensors.items() if "up_proj" not in key}
    config |= {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 5}, "r": 1}
    (tmp_path / "two").mkdir()
    (tmp_path / "two/adapter_config.json").write_text(json.dumps(config))
    save_file({key: x.contiguous() for key, x in (wide | narrow).items()}, tmp_path / "two/adapter_model.safetensors")
    compare((base, folders | {"two": tmp_path / "two"}))


def test_what_does_not_fit_is_named(written, tmp_path):
    base, folders = written
    model = load_model(base)
    mixed = attach_many(model, folders)
    assert mixed.names == list(SHAPES) and mixed.rank == 8
    mixed.check(None)
    refused("no adapter other; expected one, two, five, or none", mixed.check, "other")
    tokens, documents = batch()
    with pytest.raises(ValueError, match="several adapters are attached"):
        model(tokens, documents)
    with disabled(model), torch.no_grad():
        assert torch.equal(model(tokens, documents), load_model(base)(tokens, documents))
    tensors = load_file(folders["one"] / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((folders["one"] / "adapter_config.json").read_text())
    tensors = {key.replace("layers.0", "layers.7"): x for key, x in tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    refused(f"{tmp_path}: does not fit this model", attach_many, model, folders | {"broken": tmp_path})
    assert math.isclose(mixed.weights(["two"], [0.5])[0, 1].item(), 0.5 * 6 / math.sqrt(2) / 32, rel_tol=1e-6)
