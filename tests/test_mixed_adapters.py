"""Several adapters in one batch: every row equals its adapter alone, base rows the base bit for bit; PEFT's own mixed
batches agree."""

import functools
import json
import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import generate
from kernels import Documents
from kernels.ops._launch import fuses_A, fuses_B
from kernels.proof.closeness import relative_error
from psysafe import load_model
from psysafe.checkpoint.adapter import BASE, attach_many, attach_named, load_adapter, save_adapter
from psysafe.evaluation import models_under_test
from psysafe.evaluation.models_under_test import ModelUnderTest, Question, Variant
from psysafe.generation.engine import Engine
from psysafe.generation.request import Options, Request, RequestOptions
from psysafe.generation.sampling import Sampling
from psysafe.model.cache import Cache
from psysafe.model.layers import FusedLinear
from psysafe.model.lora import TARGETS, attach, disabled, fused_layers, resolve_targets
from tests.mistakes import refused
from tests.oracles import both_models, randomise_lora_B, reference_model, write_checkpoint
from tests.test_model import boundaries, ids, transformers_in_fp64
from tests.tiny_text_model import write_text_model

SHAPES = {  # rank, alpha, targets, rsLoRA
    "one": (1, 32.0, TARGETS, False),
    "two": (2, 6.0, "all-linear", True),
    "five": (5, 3.0, ("q_proj", "layers.1.mlp.down_proj", "in_proj_z"), False),
}
LENGTHS = (9, 1, 12, 5, 7)
NAMES = ["two", None, "one", "five", None]  # of the documents
FACTORS = [1.0, 1.0, -0.5, 2.25, 3.0]


LAYERS = ("linear_attention", "full_attention")


def write_adapters(folder, layer_types=LAYERS):
    """(the base's folder, adapters' folders by name)."""
    base = write_checkpoint(reference_model(num_hidden_layers=2, layer_types=list(layer_types)), folder / "base")
    for seed, (name, (rank, alpha, targets, rslora)) in enumerate(SHAPES.items()):
        adapters = attach(load_model(base), rank, alpha, targets, seed=seed, use_rslora=rslora)
        randomise_lora_B(adapters, seed)
        save_adapter(adapters, folder / name, base="base", multimodal=False)
    return base, {name: folder / name for name in SHAPES}


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


@pytest.mark.parametrize("order", ["some", "shuffled"])
def test_a_row_equals_its_adapter_alone(order, written):
    compare(written, order)


def test_in_other_types_and_with_attention_first(written, tmp_path):
    compare(written, dtype=torch.float32, limit=1e-5)
    compare(written, dtype=torch.bfloat16, limit=0.05)
    compare(write_adapters(tmp_path, LAYERS[::-1]), "some")


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
        for t in range(12, 14):
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
    reference, model = both_models(
        tmp_path / "base", dtype=torch.float64, num_hidden_layers=2, layer_types=list(LAYERS)
    )
    names = ["five", "__base__", "one", "two", "one"]
    tokens = ids(5 * 6).view(5, 6)
    with transformers_in_fp64(reference):
        peft = peft_adapters(reference).double()
        peft.save_pretrained(tmp_path)
        with torch.no_grad():
            expected = peft(tokens, use_cache=False, adapter_names=names).logits
    mixed = attach_many(model, {name: tmp_path / name for name in SHAPES})
    documents = Documents(boundaries([6] * 5), tokens.device)
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


def engine_ids(model, requests, adapters=None, slots=3, lag=0, **more) -> dict[int, list[int]]:
    engine = Engine(model, slots, 60, eos_ids=[3], prefill_tokens=16, adapters=adapters, **more)
    engine.lag = lag
    tokens = {request.row: [] for request in requests}
    for event in engine.run(requests):
        tokens[event.row].append(event.token)
    return tokens


def engine_requests():
    """Greedy and sampled, prompts of one token and of several pieces, every adapter and the base."""
    sampling = [Sampling(), Sampling(1.0, seed=4), Sampling(1.3, top_k=30)]
    return [
        Request(
            row, ids(1 + 11 * row % 40).tolist(), options=RequestOptions(sampling[row % 3], max_new_tokens=4 + row % 4),
            choice=row // 2, adapter=[*SHAPES, None][row % 4], adapter_scale=[1.0, -0.5, 2.0][row % 3],
        )
        for row in range(6)
    ]  # fmt: skip


def test_the_engine_mixes_adapters(written, monkeypatch):
    """Slots change hands between base and adapters; every answer is the one of its adapter alone."""
    base, folders = written
    model, requests = load_model(base), engine_requests()
    mixed = attach_many(model, folders)
    alone = {}
    for request in requests:
        model_alone = with_factor(base, folders.get(request.adapter), request.adapter_scale, torch.float32)
        alone |= engine_ids(model_alone, [replace(request, adapter=None)], slots=1)
    for lag in (0, 1):
        assert engine_ids(model, requests, mixed, lag=lag) == alone
    assert len({tuple(tokens) for tokens in alone.values()}) == 6
    monkeypatch.setattr(Engine, "_seat_adapters", lambda self, slots, requests: None)
    assert engine_ids(model, requests, mixed) != alone  # mutant: everybody is the base


def test_the_engine_refuses_what_it_does_not_have(written):
    base, folders = written
    model = load_model(base)
    engine = Engine(model, 1, 60, [3], adapters=attach_many(model, folders))
    for message, changes in (
        ("question 7: no adapter other here; expected one or two or five", {"adapter": "other"}),
        ("adapter_scale is nan, expected a real number", {"adapter": "one", "adapter_scale": math.nan}),
    ):
        refused(message, engine.submit, Request(1, [5], "question 7", **changes))
    refused("no adapter one here; expected none", Engine(model, 1, 60, [3]).submit, Request(1, [5], adapter="one"))


@pytest.fixture(scope="module")
def text_base(tmp_path_factory):
    """(a base that speaks the byte tokenizer, two adapters)."""
    folder = tmp_path_factory.mktemp("text")
    base = write_text_model(folder / "base", num_hidden_layers=2, layer_types=list(LAYERS))
    for seed, (name, rank, targets) in enumerate((("one", 1, TARGETS), ("two", 2, "all-linear"))):
        adapters = attach(load_model(base), rank, 64.0, targets, seed=seed)
        randomise_lora_B(adapters, seed)
        save_adapter(adapters, folder / name, base=str(base), multimodal=False)
    return base, [str(folder / "one"), str(folder / "two")]


def test_eval_answers_all_variants_in_one_batch(text_base, tmp_path, monkeypatch):
    """One load; adapters and system prompts side by side give the answers that each gives in a run of its own, and a
    second start asks only what is missing."""
    base, (one, two) = text_base
    variants = [Variant(BASE, "none"), Variant(one, "none"), Variant(two, "v0"), Variant(BASE, "v0")]
    questions = [Question(n, f"question {n}" * n) for n in (1, 5)]
    model = ModelUnderTest(str(base), device="cpu", options=Options(Sampling(1.0), max_new_tokens=10))
    calls = []
    load = ModelUnderTest.load
    monkeypatch.setattr(ModelUnderTest, "load", lambda self, *args: calls.append(args) or load(self, *args))
    answers = model.answers(variants, questions, tmp_path / "all.jsonl")
    assert len(calls) == 1
    for i, variant in enumerate(variants):
        assert answers[variant] == model.answers([variant], questions, tmp_path / f"{i}.jsonl")[variant]
    assert len({row["response"] for rows in answers.values() for row in rows.values()}) > 6
    lines = (tmp_path / "all.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "all.jsonl").write_bytes(b"".join(line for line in lines if b'"one, none"' not in line))
    attached = []
    monkeypatch.setattr(models_under_test, "attach_named", lambda model, names: attached.append(set(names)) or
                        attach_named(model, names))  # fmt: skip
    assert model.answers(variants, questions, tmp_path / "all.jsonl") == answers
    assert attached == [{BASE, one, two}]  # not only the one that is missing: that would round in another way


def test_generate_compares_in_one_batch(text_base, tmp_path, monkeypatch):
    base, adapters = text_base
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"question {n}" * n}) + "\n" for n in (1, 2, 4)))
    flags = ("--prompts", str(rows), "--model", str(base), "--max-new-tokens", "8", "--temperature", "1")
    names, calls = [BASE, *adapters], []
    monkeypatch.setattr(generate, "load_model", lambda *args, **more: calls.append(1) or load_model(*args, **more))
    assert generate.main([*flags, "--out", str(tmp_path / "all"), "--compare", ",".join(names)]) == 0
    assert len(calls) == 1
    for name in names:
        assert generate.main([*flags, "--out", str(tmp_path / "alone"), "--adapter", name]) == 0
        expected = (tmp_path / "alone").read_text()
        assert "".join(line for line in (tmp_path / "all").open() if json.loads(line)["adapter"] == name) == expected
        (tmp_path / "alone").unlink()
