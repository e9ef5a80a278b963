"""The adapter of a multimodal base in every program that loads one: PEFT over both Auto classes, AutoPeft and
transformers' own load_adapter. Each has to give our logits, which differ from the base's."""

import ast
import json
import re
import shlex
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import train
from kernels.proof.closeness import relative_error
from psysafe import load_model
from psysafe.checkpoint.__main__ import main
from psysafe.checkpoint.adapter import base_of_adapter, load_adapter, peft_check_command, save_adapter
from psysafe.files import ASSETS
from psysafe.model.lora import attach
from psysafe.training.config import TrainConfig
from tests.mistakes import refused, refused_by
from tests.oracles import multimodal_model, randomise_lora_B
from tests.test_model import ids, one

N = 30


def over(auto_class):
    return lambda base, adapter: PeftModel.from_pretrained(auto_class.from_pretrained(base), adapter)


def by_transformers(auto_class):
    def load(base, adapter):
        model = auto_class.from_pretrained(base)
        model.load_adapter(str(adapter))
        return model

    return load


LOADERS = {
    "AutoModelForCausalLM, PeftModel": over(AutoModelForCausalLM),
    "AutoModelForImageTextToText, PeftModel": over(AutoModelForImageTextToText),
    "AutoPeftModelForCausalLM": lambda base, adapter: AutoPeftModelForCausalLM.from_pretrained(adapter),
    "AutoModelForCausalLM, load_adapter": by_transformers(AutoModelForCausalLM),
    "AutoModelForImageTextToText, load_adapter": by_transformers(AutoModelForImageTextToText),
}


def logits(model):
    with torch.no_grad():
        return model.logits(model(ids(N), one(N)))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """(folder with base/ and adapter/, our logits with the adapter, the base's)."""
    folder = tmp_path_factory.mktemp("multimodal")
    multimodal_model().save_pretrained(folder / "base")
    model = load_model(folder / "base")
    bare = logits(model)
    adapters = attach(model, 2, 3.0, "all-linear", seed=1)
    randomise_lora_B(adapters, seed=4)
    save_adapter(adapters, folder / "adapter", str(folder / "base"), model.config.multimodal)
    return folder, logits(model), bare


def is_on(loader, folder, adapter, expected, bare) -> None:
    with torch.no_grad():
        theirs = loader(folder / "base", adapter).eval()(ids(N)[None], use_cache=False).logits[0]
    assert relative_error(theirs, expected) <= 1e-5
    assert relative_error(theirs, bare) > 1e-2


@pytest.mark.parametrize("loader", LOADERS.values(), ids=list(LOADERS))
def test_the_saved_folder_is_on_in(loader, tuned):
    folder, expected, bare = tuned
    is_on(loader, folder, folder / "adapter", expected, bare)


@pytest.mark.parametrize("layout", ["text", "multimodal"])
def test_one_layout_alone_is_the_bare_base_in_the_other_class(layout, tuned, tmp_path):
    """Why both are written: PEFT passes over the names that it does not know. The comparison above notices it."""
    folder, expected, bare = tuned
    assert main(["adapter", str(folder / "adapter"), "--layout", layout, "--out", str(tmp_path / layout)]) == 0
    classes = [AutoModelForCausalLM, AutoModelForImageTextToText]
    right, wrong = classes if layout == "text" else reversed(classes)
    is_on(over(right), folder, tmp_path / layout, expected, bare)
    with pytest.warns(UserWarning, match="missing adapter keys"), pytest.raises(AssertionError):
        is_on(over(wrong), folder, tmp_path / layout, expected, bare)


@pytest.mark.parametrize("layout", ["text", "multimodal"])
def test_an_older_run_is_converted(layout, tuned, tmp_path, capsys):
    """From one layout to both: afterwards equal to what is saved today, whatever else the config says."""
    folder, expected, _ = tuned
    tensors = load_file(folder / "adapter/adapter_model.safetensors")
    old = {key: x for key, x in tensors.items() if ("language_model" in key) == (layout == "multimodal")}
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old/adapter_model.safetensors")
    config = json.loads((folder / "adapter/adapter_config.json").read_text()) | {"peft_version": "0.21.2"}
    (tmp_path / "old/adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "new").mkdir()  # an empty folder may be there already
    assert main(["adapter", str(tmp_path / "old"), "--layout", "both", "--out", str(tmp_path / "new")]) == 0
    assert "layout both" in capsys.readouterr().out
    converted = load_file(tmp_path / "new/adapter_model.safetensors")
    assert converted.keys() == tensors.keys() and all(torch.equal(converted[key], tensors[key]) for key in tensors)
    assert json.loads((tmp_path / "new/adapter_config.json").read_text()) == config
    assert torch.equal(logits(load_model(folder / "base", tmp_path / "new")), expected)
    again = ["adapter", tmp_path / "old", "--layout", "both", "--out", tmp_path / "new"]
    assert "new: exists already and is no empty folder" in refused_by(main, again, capsys)
    assert "invalid choice: 'auto'" in refused_by(main, [*again[:3], "auto", *again[4:]], capsys)


def test_unequal_doubles_are_refused(tuned, tmp_path):
    folder, expected, _ = tuned
    model = load_model(folder / "base")
    load_adapter(model, folder / "adapter")
    assert torch.equal(logits(model), expected)
    tensors = load_file(folder / "adapter/adapter_model.safetensors")
    key = "base_model.model.model.language_model.layers.3.self_attn.q_proj.lora_A.weight"
    tensors[key] = tensors[key].clone()
    tensors[key][0, 0] += 1
    (tmp_path / "adapter_config.json").write_bytes((folder / "adapter/adapter_config.json").read_bytes())
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    message = "holds layers.3.self_attn.q_proj.lora_A under the names of both layouts, with different values"
    refused(message, load_adapter, model, tmp_path)


def test_a_text_base_has_one_class_and_one_set_of_names(tmp_path):
    model = load_model("assets:tiny")
    adapters = attach(model, 1, 32.0)
    save_adapter(adapters, tmp_path, "assets:tiny", model.config.multimodal)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert len(keys) == len(adapters.segments) and not any("language_model" in key for key in keys)


def test_the_printed_check_runs_on_the_bundled_base(tmp_path, capsys):
    """A name that PEFT can open stands in the file; ours still knows the base by its own, on whatever machine."""
    adapters = attach(load_model("assets:tiny"), 1, 32.0)
    save_adapter(adapters, tmp_path, "assets:tiny", multimodal=False)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(ASSETS / "tiny")
    assert base_of_adapter(tmp_path) == ("assets:tiny", "")
    assert printed_difference(peft_check_command(tmp_path, "assets:tiny"), capsys) == 0  # B = 0 as yet
    randomise_lora_B(adapters, seed=4)
    save_adapter(adapters, tmp_path, "assets:tiny", multimodal=False)
    assert printed_difference(peft_check_command(tmp_path, "assets:tiny"), capsys) > 0.01


def test_a_run_ends_with_the_check(tmp_path, capsys):
    run = SimpleNamespace(runtime=SimpleNamespace(is_main=True), save_error="", best_val=0.5, best=None)
    run.config = TrainConfig(out=str(tmp_path / "it's a run"), model="assets:tiny")
    assert train.finish(run) == 0
    printed = capsys.readouterr().out
    assert printed.endswith(f"{peft_check_command(run.config.out, 'assets:tiny')}\n") and "(above 0)" in printed
    code = shlex.split(printed.splitlines()[-1])[2]
    assert ast.literal_eval(re.search(r"from_pretrained\((.*?)\);", code)[1]) == run.config.out


def printed_difference(text: str, capsys) -> float:
    """What the command in the last line prints."""
    program, _, code = shlex.split(text.splitlines()[-1])
    assert program == "python"
    capsys.readouterr()
    exec(code, {})
    return float(capsys.readouterr().out)


def test_a_base_of_random_weights_is_said_to_be_no_base_for_peft():
    assert "PEFT cannot load it by itself" in peft_check_command("runs/x", "random:configs/micro.json")
