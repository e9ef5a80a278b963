"""Adapters as PEFT's users make them: on some layers, with several ranks and scales, on the vision tower, from the hub.
PEFT on transformers' model says what they compute; merged, PEFT's merge_and_unload does."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from kernels.proof.closeness import relative_error
from psysafe import load_model
from psysafe.checkpoint.__main__ import main
from psysafe.checkpoint.adapter import adapter_shape, base_of_adapter, is_same_base, load_adapter, save_adapter
from psysafe.checkpoint.merge import merge
from psysafe.files import expand
from psysafe.model.lora import attach
from tests.mistakes import refused
from tests.oracles import both_models, multimodal_model
from tests.test_lora import loss_and_gradients, peft_loss_and_gradients, peft_tensors
from tests.test_merge import all_tensors
from tests.test_model import ids, one

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj_qkv", "out_proj"]
KINDS = {
    "a regular expression": dict(target_modules=r".*\.layers\.[13]\.(mlp\.(up|down)_proj|self_attn\.q_proj)"),
    "exclude_modules": dict(target_modules=["up_proj", "q_proj"], exclude_modules=["layers.2.mlp.up_proj"]),
    "exclude_modules, an expression": dict(target_modules=["up_proj", "out_proj"], exclude_modules=r".*\.0\..*"),
    "layers_to_transform": dict(target_modules=ALL, layers_to_transform=[0, 3], layers_pattern="layers"),
    "layers_to_transform, one": dict(target_modules=["gate_proj"], layers_to_transform=0),
    "ends of paths": dict(target_modules=["3.self_attn.v_proj", "layers.1.mlp.gate_proj", "3.mlp.up_proj"]),
    "rank_pattern": dict(target_modules=ALL, rank_pattern={"up_proj": 5, r"layers\.3\.self_attn\.q_proj": 1}),
    "alpha_pattern": dict(target_modules=ALL, alpha_pattern={"up_proj": 40, "3.mlp.down_proj": 1}),
    "both patterns, rslora": dict(
        target_modules=ALL, rank_pattern={"q_proj": 7}, alpha_pattern={"q_proj": 11, "out_proj": 2}, use_rslora=True
    ),
    "one pattern for all": dict(target_modules=["up_proj"], rank_pattern={"up_proj": 4}, alpha_pattern={"up_proj": 3}),
}


def with_adapter(model, **config):
    """transformers' model under PEFT, rank 2, alpha 6 unless patterns say otherwise; B drawn at random."""
    peft = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, lora_dropout=0.0, **config)).eval()
    torch.manual_seed(11)
    for name, p in peft.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn_like(p) * 0.1
    return peft


def logits(model):
    with torch.no_grad():
        return model.logits(model(ids(30), one(30)))


def their_logits(model):
    with torch.no_grad():
        return model(ids(30)[None], use_cache=False).logits[0]


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_as_peft_computes_it(kind, tmp_path, capsys):
    """Loaded, saved again, converted, merged: each time PEFT's numbers."""
    reference, model = both_models(tmp_path / "base")
    bare = logits(model)
    peft = with_adapter(reference, **KINDS[kind])
    peft.save_pretrained(tmp_path / "theirs")
    expected = their_logits(peft)
    assert relative_error(expected, bare) > 1e-2

    adapters = load_adapter(model, tmp_path / "theirs")
    assert relative_error(logits(model), expected) <= 1e-5
    assert ("brought to rank" in capsys.readouterr().err) == ("pattern" in kind and "for all" not in kind)
    names = {name.removesuffix(".lora_A") for name in peft_tensors(peft) if name.endswith("lora_A")}
    assert {segment.name.removesuffix(".lora_A") for segment in adapters.segments[::2]} == names
    assert adapter_shape(tmp_path / "theirs") == (adapters.rank, adapters.alpha, list(adapters.targets))

    save_adapter(adapters, tmp_path / "ours", str(tmp_path / "base"), multimodal=False)
    assert main(["adapter", str(tmp_path / "theirs"), "--layout", "text", "--out", str(tmp_path / "converted")]) == 0
    for folder in ("ours", "converted"):
        again = PeftModel.from_pretrained(both_models(tmp_path / "base")[0], tmp_path / folder)
        assert relative_error(their_logits(again), expected) <= 1e-5, folder
        assert peft_tensors(again).keys() == peft_tensors(peft).keys()

    merge(tmp_path / "base", tmp_path / "theirs", tmp_path / "merged")
    state = peft.merge_and_unload().state_dict()
    for name, x in all_tensors(tmp_path / "merged").items():
        assert relative_error(x, state[name]) <= 1e-6, name


def test_gradients_on_some_layers_equal_peft(tmp_path):
    """The lowest layer has no adapter: backward ends above it."""
    reference, model = both_models(tmp_path)
    peft = with_adapter(reference, target_modules=ALL, layers_to_transform=[1, 3])
    paths = list(dict.fromkeys(name.rpartition(".")[0] for name in peft_tensors(peft)))
    adapters = attach(model, 2, 6, paths)
    assert set(adapters.projections) == set(ALL)
    for key, x in peft_tensors(peft).items():
        adapters.tensors()[key].copy_(x)
    tokens, rows = ids(40), torch.arange(9, 38)
    arguments = tokens, torch.tensor([0, 40], dtype=torch.int32), rows, tokens[rows + 1]
    loss, grads = loss_and_gradients(model, adapters, *arguments)
    expected_loss, expected = peft_loss_and_gradients(peft, *arguments)
    assert relative_error(loss, expected_loss) <= 1e-5 and grads.keys() == expected.keys()
    for key in grads:
        assert expected[key].abs().max() > 0 and relative_error(grads[key], expected[key]) <= 1e-4, key


@pytest.mark.parametrize("layout", ["text", "multimodal", "both"])
def test_an_adapter_on_the_vision_tower_too(layout, tmp_path, capsys):
    """Its keys are left out aloud where only the decoder runs; a merge applies them, as PEFT does."""
    reference = multimodal_model()
    reference.save_pretrained(tmp_path / "base")
    peft = with_adapter(reference, target_modules=["up_proj", "q_proj", "qkv", "linear_fc1"], rank_pattern={"qkv": 3})
    peft.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "base", tmp_path / "theirs")
    assert "left out: its adapters of 3 modules of the vision tower" in capsys.readouterr().err
    expected = their_logits(peft)
    assert relative_error(logits(model), expected) <= 1e-5

    assert main(["adapter", str(tmp_path / "theirs"), "--layout", layout, "--out", str(tmp_path / layout)]) == 0
    assert ("of the vision tower" in capsys.readouterr().err) == (layout == "text")
    keys = load_file(tmp_path / layout / "adapter_model.safetensors").keys()
    assert sum("visual" in key for key in keys) == (0 if layout == "text" else 6)
    assert relative_error(logits(load_model(tmp_path / "base", tmp_path / layout)), expected) <= 1e-5

    merge(tmp_path / "base", tmp_path / "theirs", tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").state_dict()
    state = peft.merge_and_unload().state_dict()
    assert all(relative_error(merged[name], state[name]) <= 1e-6 for name in state)
    base = multimodal_model().state_dict()
    assert any("visual" in name and not torch.equal(base[name], merged[name]) for name in base)


@pytest.fixture
def saved(tmp_path):
    """(our model, folder of an adapter on two layers, a function that writes it with other config entries)."""
    reference, model = both_models(tmp_path / "base")
    peft = with_adapter(reference, target_modules=["up_proj"], layers_to_transform=[1, 3])
    peft.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs/adapter_config.json").read_text())

    def changed(**entries):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "theirs", tmp_path / "bad")
        (tmp_path / "bad/adapter_config.json").write_text(json.dumps({**config, **entries}))
        return tmp_path / "bad"

    return model, tmp_path / "theirs", changed


def test_a_config_that_does_not_say_what_the_file_holds_is_refused(saved):
    """PEFT would pass over such tensors, or give others another scale."""
    model, _, changed = saved
    cases = {
        "layers.1.mlp.up_proj has an adapter, but target_modules": dict(layers_to_transform=[3]),
        "layers.3.mlp.up_proj has an adapter, but target_modules": dict(exclude_modules="model.layers.3.*"),
        "but target_modules": dict(target_modules=["down_proj"]),
        "matrix of the config's rank 4": dict(rank_pattern={"up_proj": 4}),
        "no regular expression": dict(target_modules="(up_proj"),
        "a pattern in it is no regular expression": dict(rank_pattern={"(": 4}),
        "rank_pattern is 3, expected an object": dict(rank_pattern=3),
        "up_proj is 0, expected a number above 0": dict(alpha_pattern={"up_proj": 0}),
        "up_proj is 1.5, expected a number": dict(rank_pattern={"up_proj": 1.5}),
        "layers_to_transform is 'all'": dict(layers_to_transform="all"),
        r"target_modules is \[1\]": dict(target_modules=[1]),
        "missing layers.0.mlp.up_proj": dict(layers_to_transform=None),
    }
    for message, entries in cases.items():
        refused(message, load_adapter, model, changed(**entries))


def test_paths_that_the_model_does_not_have_are_named(saved, tmp_path):
    model, theirs, _ = saved
    message = "lora_targets: the model has no projection"
    refused(f"{message} layers.9.mlp.up_proj", attach, model, 1, 1, ["layers.9.mlp.up_proj"])
    tensors = load_file(theirs / "adapter_model.safetensors")
    shifted = {key.replace("layers.3", "layers.13"): x for key, x in tensors.items()}
    save_file(shifted, theirs / "adapter_model.safetensors")
    config = json.loads((theirs / "adapter_config.json").read_text()) | {"layers_to_transform": [1, 13]}
    (theirs / "adapter_config.json").write_text(json.dumps(config))
    refused(f"{theirs}: {message} layers.13.mlp.up_proj", load_adapter, model, theirs)


def test_a_pickled_adapter_is_refused_and_named(saved):
    model, theirs, _ = saved
    (theirs / "adapter_model.safetensors").rename(theirs / "adapter_model.bin")
    refused("adapter_model.bin: a pickle can run code and is never opened; save it with", load_adapter, model, theirs)
    (theirs / "adapter_model.bin").unlink()
    refused("adapter_model.safetensors: missing", load_adapter, model, theirs)


def test_names_of_one_base_and_of_two(monkeypatch, tmp_path):
    """A folder by any path to it, a hub id and its snapshot in the cache, a base that lay elsewhere on another machine;
    not two folders of one name."""
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "hub/models--Qwen--Qwen3.5-27B/snapshots/0a1b"
    for folder in (snapshot, tmp_path / "a/tiny", tmp_path / "b/tiny", tmp_path / "merged"):
        folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to("a/tiny")
    (tmp_path / "a/config.json").touch()
    here = str(tmp_path)
    one = [
        ("assets:tiny", expand("assets:tiny")),
        (expand("assets:tiny"), "assets:tiny"),
        ("/other/site-packages/psysafe/assets/tiny", "assets:tiny"),
        ("Qwen/Qwen3.5-27B", str(snapshot)),
        (str(snapshot), "Qwen/Qwen3.5-27B"),
        ("/gone/models--Qwen--Qwen3.5-27B/snapshots/9f", "Qwen/Qwen3.5-27B"),
        ("/gone/Qwen3.5-27B", "Qwen/Qwen3.5-27B"),
        ("mirror/qwen3.5-27b", "Qwen/Qwen3.5-27B"),
        (f"{here}/a/tiny", "a/tiny/"),
        ("a/tiny", f"{here}/link"),
        (f"random:{here}/a/config.json", "random:a/config.json"),
    ]
    two = [
        ("a/tiny", "b/tiny"),
        ("a/tiny", "merged"),
        ("assets:tiny", "a/tiny"),
        ("Qwen/Qwen3.5-27B", "Qwen/Qwen3.5-0.8B"),
        ("Qwen/Qwen3.5-0.8B", str(snapshot)),
        ("/gone/Qwen3.5-27B", "merged"),
        ("a", "random:a/config.json"),
    ]
    assert [is_same_base(*pair) for pair in one] == [True] * len(one)
    assert [is_same_base(*pair) for pair in two] == [False] * len(two)


def test_an_adapter_from_the_hub(saved, monkeypatch, tmp_path, capsys):
    """A folder of that name counts first; a refusal of the hub becomes one line."""
    model, theirs, changed = saved
    theirs = changed(base_model_name_or_path=str(tmp_path / "base"))
    expected = load_adapter(model, theirs).param.clone()
    asked = []

    def download(repo, revision=None, **kwargs):
        asked.append(repo)
        return str(theirs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(load_adapter(model, "org/name").param, expected)
    assert base_of_adapter("org/name") == (str(tmp_path / "base"), "")
    capsys.readouterr()
    merge("", "org/name", tmp_path / "merged")
    assert capsys.readouterr().err == ""
    merge(shutil.copytree(tmp_path / "base", tmp_path / "twin"), "org/name", tmp_path / "other")
    assert f"trained on {tmp_path}/base, and runs on {tmp_path}/twin" in capsys.readouterr().err
    assert set(asked) == {"org/name"}
    shutil.copytree(theirs, tmp_path / "runs/x")
    load_adapter(model, "runs/x")
    assert "runs/x" not in asked

    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refused("org/name: no adapter there, and the hub did not give it: offline", load_adapter, model, "org/name")
    refused("no adapter there", load_adapter, model, "./org/name")
