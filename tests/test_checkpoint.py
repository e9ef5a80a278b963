"""Loading: published names and layouts, shards streamed, and one clear line for everything that can be wrong."""

import json
import subprocess
import sys
import textwrap

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kernels.proof.closeness import relative_error
from psysafe import load_model, load_tokenizer
from psysafe.checkpoint.base import fill, matching_tensors, published_tensors, resolve_model
from psysafe.checkpoint.peft_format import read_adapter
from psysafe.checkpoint.tensor_files import all_finite
from psysafe.hub import GatedError, HubError, did_you_mean
from tests.mistakes import refused
from tests.oracles import both_models, reference_model, write_checkpoint
from tests.test_model import ids, one


def logits(model, n=20):
    with torch.no_grad():
        return model.logits(model(ids(n), one(n)))


def shard(folder, tensors: dict, count: int) -> None:
    """Writes tensors over `count` shards, sorted by size as the published ones are, so that layers are scattered."""
    names = sorted(tensors, key=lambda name: tensors[name].numel())
    weight_map = {}
    for i in range(count):
        file = f"model.safetensors-{i + 1:05}-of-{count:05}.safetensors"
        part = {name: tensors[name] for name in names[i::count]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def published_folder(folder, **changes):
    """A checkpoint as published: nested config, `model.language_model.` names, vision and mtp tensors beside them,
    A_log and the gated norm in fp32, the rest bf16, three shards."""
    reference = reference_model(**changes)
    write_checkpoint(reference, folder)
    text = json.loads((folder / "config.json").read_text())
    config = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "text_config": text}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, x in load_file(folder / "model.safetensors").items():
        wide = name.endswith(("A_log", "linear_attn.norm.weight"))
        tensors[name.replace("model.", "model.language_model.", 1)] = x if wide else x.bfloat16()
    tensors["model.visual.patch_embed.proj.bias"] = torch.ones(3)
    tensors["mtp.norm.weight"] = torch.ones(3)
    shard(folder, tensors, 3)
    return reference, tensors


def test_published_layout(tmp_path):
    """Prefix, nested config, shards, vision and mtp tensors skipped; the same numbers as the flat single file."""
    reference, tensors = published_folder(tmp_path)
    for name, p in reference.named_parameters():
        p.data = tensors[name.replace("model.", "model.language_model.", 1)].to(p.dtype)
    model = load_model(tmp_path)
    assert model.config.multimodal
    with torch.no_grad():
        assert relative_error(logits(model), reference(ids(20)[None]).logits[0]) <= 1e-5


def test_fp32_scalars_survive_a_bf16_load(tmp_path):
    """A_log is exponentiated twice; rounding it to bf16 would move the decay. bf16 files load as well."""
    _, tensors = published_folder(tmp_path)
    name = "model.language_model.layers.0.linear_attn.A_log"
    model = load_model(tmp_path, dtype=torch.bfloat16)
    assert model.layers[0].linear_attn.A_log.dtype == torch.float32
    assert torch.equal(model.layers[0].linear_attn.A_log, tensors[name])
    tensors[name] = tensors[name].bfloat16()
    shard(tmp_path, tensors, 2)
    assert torch.equal(load_model(tmp_path).layers[0].linear_attn.A_log, tensors[name].float())


def test_tied_head_is_the_embedding(tmp_path):
    _, model = both_models(tmp_path, "tied, ratio 1")
    assert model.head is model.embed_tokens
    assert "lm_head.weight" not in published_tensors(model)


def test_random_weights_are_the_same_everywhere(tmp_path, monkeypatch):
    """Wherever the config is named from: by its whole path, or as a bare name in the current directory."""
    both_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    first, second = (load_model(f"random:{config}") for config in (tmp_path / "config.json", "config.json"))
    assert torch.equal(logits(first), logits(second))
    assert logits(first).isfinite().all() and logits(first).std() > 0


def test_random_weights_of_a_missing_config_are_refused(tmp_path):
    missing = f"random:{tmp_path}/none.json"
    refused(f"{missing}: no such file; expected the config.json of an architecture", resolve_model, missing)


def broken(case: str, folder):
    """Damages a good checkpoint; returns what the error has to say."""
    _, tensors = published_folder(folder)
    index = folder / "model.safetensors.index.json"
    shards = sorted(folder.glob("*.safetensors"))
    norm = "model.language_model.norm.weight"
    if case == "truncated shard":
        shards[1].write_bytes(shards[1].read_bytes()[:-100])
        return f"{shards[1].name}: damaged or truncated"
    if case == "header only half there":
        shards[0].write_bytes(shards[0].read_bytes()[:20])
        return f"{shards[0].name}: damaged or truncated"
    if case == "missing shard":
        shards[2].unlink()
        return f"{shards[2].name}: missing .named in model.safetensors.index.json"
    if case == "no weights":
        index.unlink()
        for path in shards:
            path.unlink()
        return "model.safetensors: missing"
    if case == "wrong shape":
        shard(folder, {**tensors, norm: torch.ones(7)}, 2)
        return r"norm.weight is \[7\], expected \[48\]"
    if case == "missing and extra tensors":
        tensors["model.language_model.surplus"] = tensors.pop(norm)
        shard(folder, tensors, 2)
        return "unknown tensor model.language_model.surplus; missing tensor norm.weight"
    if case == "missing, with a name that ends another's":
        other = "model.language_model.layers.0.linear_attn.norm.weight"
        del tensors[norm]
        shard(folder, {**tensors, other: torch.ones(7)}, 2)
        return r"linear_attn.norm.weight is \[7\].*; missing tensor norm.weight"
    if case == "quantised":
        shard(folder, {**tensors, norm: torch.ones(48, dtype=torch.int8)}, 2)
        return "norm.weight is I8, expected one of BF16"
    if case == "index names another folder":
        index.write_text(index.read_text().replace(shards[0].name, f"../{shards[0].name}"))
        return "not a plain file name in this folder"
    if case == "index and shard disagree":
        value = json.loads(index.read_text())
        value["weight_map"][norm] = next(s.name for s in shards if s.name != value["weight_map"][norm])
        index.write_text(json.dumps(value))
        return f"lacks {norm}"
    if case == "index is no JSON":
        index.write_text("{")
        return "index.json: not valid JSON"
    if case == "index without map":
        index.write_text("{}")
        return "expected an object 'weight_map'"
    if case == "config is a list":
        (folder / "config.json").write_text("[]")
        return "config.json: expected a JSON object, found list"
    if case == "no config":
        (folder / "config.json").unlink()
        return "config.json: No such file"
    raise AssertionError(case)


CASES = (
    *("truncated shard", "header only half there", "missing shard", "no weights", "wrong shape"),
    *("missing and extra tensors", "missing, with a name that ends another's", "quantised"),
    *("index names another folder", "index and shard disagree"),
    *("index is no JSON", "index without map", "config is a list", "no config"),
)


@pytest.mark.parametrize("case", CASES)
def test_a_broken_checkpoint_is_one_clear_line(case, tmp_path):
    message = broken(case, tmp_path)
    assert str(tmp_path) in refused(message, load_model, tmp_path)


@pytest.mark.parametrize("source", ["nowhere", "./a/b", "/no/such", "a/b/c"])
def test_no_such_model(source):
    refused(f"{source}: no such model folder", load_model, source)


def test_hub_ids_are_asked_of_the_hub(monkeypatch, tmp_path):
    """The revision is passed on; a refusal of the hub becomes one line."""
    import huggingface_hub

    both_models(tmp_path)
    asked = []

    def download(repo, revision=None, **kwargs):
        asked.append((repo, revision))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_model("org/name", revision="abc")
    assert asked == [("org/name", "abc")]

    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refused(r"org/name: no such folder, and the hub did not give it: offline and more$", load_model, "org/name")


def test_nothing_is_read_before_everything_is_checked(tmp_path):
    """A wrong tensor in the last shard leaves the model untouched."""
    _, model = both_models(tmp_path / "good")
    before = {name: x.clone() for name, x in published_tensors(model).items()}
    (tmp_path / "bad").mkdir()
    broken("wrong shape", tmp_path / "bad")
    refused("expected", lambda: fill(model, matching_tensors(model, tmp_path / "bad")))
    assert all(torch.equal(x, before[name]) for name, x in published_tensors(model).items())


@pytest.mark.slow
def test_loading_peaks_at_the_model(tmp_path):
    """A 250 MB checkpoint, its layers scattered over 6 shards: peak memory <= 1.2 x the model's bytes.

    Measured in a process of its own, as growth of the peak resident set over importing everything."""
    config = dict(hidden_size=512, intermediate_size=2048, vocab_size=20_000, num_hidden_layers=8)
    reference = reference_model(**config, layer_types=None, tie_word_embeddings=False)
    write_checkpoint(reference, tmp_path)
    shard(tmp_path, load_file(tmp_path / "model.safetensors"), 6)
    script = f"""
        import re, torch
        from psysafe import load_model
        from psysafe.checkpoint.base import published_tensors
        torch.zeros(10) @ torch.zeros(10)
        # VmHWM and not ru_maxrss: that one is inherited from the process that started this one.
        peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
        before = peak()
        model = load_model({str(tmp_path)!r})
        size = sum(x.numel() * x.element_size() for x in published_tensors(model).values())
        print((peak() - before) / size, size)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    ratio, size = (float(x) for x in out.stdout.split())
    print(f"peak over model: {ratio:.3f} at {size / 1e6:.0f} MB")
    assert size > 100e6
    assert 0.9 <= ratio <= 1.2


def same_as_transformers(folder):
    """Our logits and AutoModelForCausalLM's, from the folder alone."""
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = theirs(ids(20)[None], use_cache=False).logits[0]
    assert relative_error(logits(load_model(folder)), expected) <= 1e-5
    return expected


def test_a_head_that_differs_from_the_embedding_is_used_although_the_config_ties_them(tmp_path, capsys):
    reference = reference_model("tied, ratio 1")
    write_checkpoint(reference, tmp_path)
    tied = same_as_transformers(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(same_as_transformers(tmp_path), tied) and load_model(tmp_path).lm_head is None
    assert "lm_head" not in capsys.readouterr().err
    tensors["lm_head.weight"][-1] += 1  # the last row, which is compared last
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert relative_error(same_as_transformers(tmp_path), tied) > 1e-2
    assert "lm_head.weight has other values" in capsys.readouterr().err
    tensors["lm_head.weight"] = torch.ones(7, 48)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(r"lm_head.weight is \[7, 48\]", load_model, tmp_path)


def test_a_single_file_counts_and_not_the_index_and_shards_beside_it(tmp_path, capsys):
    """What a small model leaves that is saved over a large one's folder; transformers reads the single file, too."""
    write_checkpoint(reference_model(seed=1), tmp_path)
    shard(tmp_path, load_file(tmp_path / "model.safetensors"), 3)
    stale = same_as_transformers(tmp_path)
    assert "left alone" not in capsys.readouterr().err
    write_checkpoint(reference_model(seed=2), tmp_path / "new")
    (tmp_path / "new/model.safetensors").rename(tmp_path / "model.safetensors")
    assert relative_error(same_as_transformers(tmp_path), stale) > 1e-2
    assert "index.json beside it and its shards are left alone" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_no_number_is_refused_by_name(value, dtype, tmp_path):
    write_checkpoint(reference_model(), tmp_path)
    tensors = {name: x.to(dtype) for name, x in load_file(tmp_path / "model.safetensors").items()}
    tensors["model.layers.1.mlp.up_proj.weight"][17, 5] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(r"model.safetensors: model.layers.1.mlp.up_proj.weight holds NaN or infinity", load_model, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_place_of_a_tensor_is_looked_at(dtype):
    """Vector registers, their remainder, and the scalars behind it."""
    for value in (float("nan"), float("inf"), -float("inf")):
        for place in range(67):
            x = torch.linspace(-1, 1, 67, dtype=dtype)
            assert all_finite(x)
            x[place] = value
            assert not all_finite(x), (value, place)
    assert all_finite(torch.zeros(0, dtype=dtype)) and not all_finite(torch.tensor(float("nan"), dtype=dtype))


def test_two_names_for_one_weight_are_refused(tmp_path):
    write_checkpoint(reference_model(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.language_model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused("model.norm.weight and model.language_model.norm.weight are two tensors", load_model, tmp_path)


@pytest.mark.parametrize("name", ["runs/tinny", "./runs/tinny", "{box}/runs/tinny"])
def test_a_slip_in_the_name_of_a_folder_is_pointed_out_in_one_short_line(name, tmp_path, monkeypatch):
    """Also where the name has the form of a hub id, and the hub was asked in vain."""

    def fails(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("a long story about a connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/tiny").mkdir(parents=True)
    (tmp_path / "runs/tinnyx").write_text("a file, and nearer")
    source = name.format(box=tmp_path)
    for read in (load_model, read_adapter, load_tokenizer):
        line = refused(r"; did you mean \S*runs/tiny\?$", read, source)
        assert line.removeprefix("./").startswith(f"{source.removeprefix('./')}: no ")
        assert "story" not in line


def test_a_gated_model_is_said_to_be_gated_whatever_lies_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/names").mkdir(parents=True)
    assert did_you_mean("org/name", HubError("offline")) == "; did you mean org/names?"
    assert did_you_mean("org/name", GatedError("accept its terms")) == ": accept its terms"
    assert did_you_mean("org/else", HubError("offline")) == ": offline" and did_you_mean("org/else") == ""
