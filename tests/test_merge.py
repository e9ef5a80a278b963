"""Merged checkpoints: what the adapter touches is rounded once, everything else is the base's, byte for byte."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3_5ForConditionalGeneration

from kernels.proof.closeness import relative_error
from psysafe import load_model
from psysafe.checkpoint.__main__ import main
from psysafe.checkpoint.adapter import save_adapter
from psysafe.checkpoint.merge import merge
from psysafe.model.lora import attach
from tests.mistakes import refused, refused_by
from tests.oracles import both_models, multimodal_model, randomise_lora_B
from tests.test_checkpoint import published_folder
from tests.test_model import ids, one

AUXILIARY = {
    "generation_config.json": "{}",
    "tokenizer.json": "{}",
    "chat_template.jinja": "x",
    "preprocessor_config.json": "{}",
    "processor_config.json": "{}",
}


def random_adapter(base, folder, targets="all-linear", rank=2, rslora=False):
    """An adapter for the base, B random."""
    model = load_model(base)
    adapters = attach(model, rank, 3.0, targets, seed=1, use_rslora=rslora)
    randomise_lora_B(adapters, seed=4)
    save_adapter(adapters, folder, str(base), model.config.multimodal)
    return model, adapters


def all_tensors(folder):
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


@pytest.fixture
def published(tmp_path):
    """A sharded bf16 base with vision and mtp tensors and all the files around it."""
    published_folder(tmp_path / "base")
    for name, text in AUXILIARY.items():
        (tmp_path / "base" / name).write_text(text)
    return tmp_path


@pytest.mark.slow
def test_peak_memory_is_a_shard(tmp_path):
    """A checkpoint of many shards merges in the memory of few of them (VmHWM of a process of its own)."""
    from tests.oracles import reference_model, write_checkpoint
    from tests.test_checkpoint import shard

    write_checkpoint(reference_model(hidden_size=512, intermediate_size=2048, vocab_size=20_000), tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    shard(tmp_path / "base", tensors, 12)
    random_adapter(tmp_path / "base", tmp_path / "adapter", targets=("q_proj", "down_proj"))
    script = f"""
        import re
        from psysafe.checkpoint.merge import merge
        peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
        before = peak()
        merge({str(tmp_path / "base")!r}, {str(tmp_path / "adapter")!r}, {str(tmp_path / "merged")!r})
        print(peak() - before)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    largest = max(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))
    total = sum(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))
    print(f"peak {int(out.stdout) / 1e6:.0f} MB, largest shard {largest / 1e6:.0f} MB, model {total / 1e6:.0f} MB")
    assert int(out.stdout) <= 1.5 * largest < 0.6 * total


@pytest.mark.parametrize("shard_size", ["", "20KB"])
@pytest.mark.parametrize("rslora", [False, True])
def test_one_rounding_and_nothing_else(shard_size, rslora, published):
    base, out = published / "base", published / "merged"
    _, adapters = random_adapter(base, published / "adapter", rslora=rslora)
    merge(base, published / "adapter", out, shard_size)
    before, after = all_tensors(base), all_tensors(out)
    assert before.keys() == after.keys()
    scale = 3.0 / 2**0.5 if rslora else 1.5
    lora, touched = adapters.tensors(), 0
    for name, x in after.items():
        path = name.removeprefix("model.language_model.").removesuffix(".weight")
        expected = before[name]
        if f"{path}.lora_A" in lora:
            touched += 1
            A, B = lora[f"{path}.lora_A"], lora[f"{path}.lora_B"]
            # fp32 sum, one rounding; the product's own last bit may differ by the order of its two terms.
            exact = expected.double() + scale * (B.double() @ A.double())
            assert (x.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
            wrong = x != exact.to(torch.bfloat16)
            assert wrong.float().mean() < 1e-3
        else:
            assert torch.equal(x.view(torch.uint8), expected.view(torch.uint8)) and x.dtype == expected.dtype
    assert touched == len(lora) / 2
    assert {p.name for p in out.iterdir() if p.suffix != ".safetensors"} == {
        p.name for p in base.iterdir() if p.suffix != ".safetensors"
    }
    for name, text in AUXILIARY.items():
        assert (out / name).read_text() == text
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map.keys() == after.keys()
    if shard_size:
        assert len(set(weight_map.values())) > 3


def test_logits_of_the_merged_model(tmp_path):
    """fp32: base + adapter = merged, here and in transformers, from the folder alone."""
    both_models(tmp_path / "base")
    model, _ = random_adapter(tmp_path / "base", tmp_path / "adapter", targets=("q_proj", "down_proj", "out_proj"))
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    x = ids(50)
    with torch.no_grad():
        expected = model.logits(model(x, one(50)))
        ours = load_model(tmp_path / "merged")
        assert relative_error(ours.logits(ours(x, one(50))), expected) <= 1e-5
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert relative_error(theirs(x[None], use_cache=False).logits[0], expected) <= 1e-5
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        assert relative_error(plain(x[None], use_cache=False).logits[0], expected) > 1e-2


def test_the_multimodal_class_loads_the_merged_folder(tmp_path):
    """Base and result have the same names, shapes and dtypes in transformers' multimodal class, which is what servers
    read; the logits are the adapted model's; the adapter in its multimodal key layout is PEFT's for that class."""
    reference = multimodal_model()
    reference.save_pretrained(tmp_path / "base")
    model, _ = random_adapter(tmp_path / "base", tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = Qwen3_5ForConditionalGeneration.from_pretrained(tmp_path / "merged")
    before, after = reference.state_dict(), merged.state_dict()
    assert {k: (x.shape, x.dtype) for k, x in before.items()} == {k: (x.shape, x.dtype) for k, x in after.items()}
    assert all(torch.equal(before[k], after[k]) for k in before if "visual" in k)
    x = ids(40)
    with torch.no_grad():
        expected = model.logits(model(x, one(40)))
        assert relative_error(merged(x[None], use_cache=False).logits[0], expected) <= 1e-5
        peft = PeftModel.from_pretrained(reference, tmp_path / "adapter")
        assert relative_error(peft(x[None], use_cache=False).logits[0], expected) <= 1e-5


def test_as_peft_merges(tmp_path):
    reference, _ = both_models(tmp_path / "base")
    random_adapter(tmp_path / "base", tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    peft = PeftModel.from_pretrained(reference, tmp_path / "adapter").merge_and_unload().state_dict()
    for name, x in all_tensors(tmp_path / "merged").items():
        assert relative_error(x, peft[name]) <= 1e-6, name


def test_killed_in_the_middle_leaves_nothing_that_looks_finished(published):
    random_adapter(published / "base", published / "adapter")
    script = f"""
        import os, signal
        import psysafe.checkpoint.merge as m
        count, save = [0], m.save_file
        def dying(*args, **kwargs):
            save(*args, **kwargs)
            count[0] += 1
            if count[0] == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        m.save_file = dying
        m.merge({str(published / "base")!r}, {str(published / "adapter")!r}, {str(published / "merged")!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == -9
    assert not (published / "merged").exists()
    assert len(list(published.glob("merged.tmp-*"))) == 1
    other = published / f"merged.tmp-{os.uname().nodename}-{os.getppid()}"  # a process that runs
    other.mkdir()
    merge(published / "base", published / "adapter", published / "merged")
    assert (published / "merged").exists() and list(published.glob("merged.tmp-*")) == [other]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_stopped_in_the_middle_nothing_stays(number, code, published):
    random_adapter(published / "base", published / "adapter")
    script = f"""
        import os, sys
        import psysafe.checkpoint.merge as m
        from psysafe.checkpoint.__main__ import main
        from psysafe.program import main_guard
        save = m.save_file
        def stopped(*args, **kwargs):
            save(*args, **kwargs)
            assert len([path for path in os.listdir({str(published)!r}) if ".tmp-" in path]) == 1
            os.kill(os.getpid(), {int(number)})
        m.save_file = stopped
        arguments = ["merge", "--adapter", {str(published / "adapter")!r}, "--out", {str(published / "merged")!r}]
        sys.exit(main_guard(main, arguments))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert {path.name for path in published.iterdir()} == {"base", "adapter"}


def test_without_a_model_it_is_the_adapter_s_base_and_an_empty_folder_may_be_there(published, capsys):
    random_adapter(published / "base", published / "adapter")
    (published / "merged").mkdir()
    assert main(["merge", "--adapter", str(published / "adapter"), "--out", str(published / "merged")]) == 0
    merge(published / "base", published / "adapter", published / "named")
    ours, named = all_tensors(published / "merged"), all_tensors(published / "named")
    assert ours.keys() == named.keys() and all(torch.equal(ours[key], named[key]) for key in ours)
    assert "merged checkpoint in" in capsys.readouterr().out


NO_ROOM = errno.ENOSPC, "No space left on device"
FULL_DISK = {  # what each way of writing says of it
    "shutil.copyfile": OSError(*NO_ROOM, "the file that is copied", None, "its copy"),
    "save_file": SafetensorError("I/O error: No space left on device (os error 28)"),
    "Path.write_text": OSError(*NO_ROOM),
}


@pytest.mark.parametrize("writer", FULL_DISK)
def test_on_a_full_disk_the_destination_is_named_and_nothing_stays(writer, published, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise FULL_DISK[writer]

    random_adapter(published / "base", published / "adapter")
    monkeypatch.setattr(f"psysafe.checkpoint.merge.{writer}", full)
    line = refused_by(main, ["merge", "--adapter", published / "adapter", "--out", published / "m"], capsys)
    assert re.fullmatch(rf"error: {published}/m: .*No space left on device.*\n", line)
    assert {path.name for path in published.iterdir()} == {"base", "adapter"}


def test_merged_files_can_be_read_by_whom_the_umask_lets(published):
    random_adapter(published / "base", published / "adapter")
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            merge(published / "base", published / "adapter", published / f"merged-{mask}")
            assert os.umask(mask) == mask
        finally:
            os.umask(before)
        modes = {path.stat().st_mode & 0o777 for path in (published / f"merged-{mask}").iterdir()}
        assert modes == {mode}


def test_folders_of_the_base_come_along_without_their_weights(published):
    """Also where the merged folder is to lie inside the base's own, whose unfinished copy must not copy itself."""
    base = published / "base"
    random_adapter(base, published / "adapter")
    for name in ("assets/figure.png", "assets/deep/notes.txt", "original/consolidated.pth", ".cache/lock"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(name)
    merge(base, published / "adapter", base / "assets" / "merged")
    copied = base / "assets/merged"
    assert (copied / "assets/figure.png").read_text() == "assets/figure.png"
    assert (copied / "assets/deep/notes.txt").read_text() == "assets/deep/notes.txt"
    assert {path.name for path in copied.iterdir() if path.is_dir()} == {"assets"}
    assert {path.name for path in (copied / "assets").iterdir()} == {"figure.png", "deep"}


def test_new_shards_have_the_names_and_sizes_that_transformers_gives(tmp_path):
    multimodal_model().save_pretrained(tmp_path / "base")
    model, _ = random_adapter(tmp_path / "base", tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", "0.1 MB")
    names = sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    count = len(names)
    assert count > 2 and names == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    sizes = [sum(x.nbytes for x in load_file(tmp_path / "merged" / name).values()) for name in names]
    assert max(sizes) <= 100_000
    merged = Qwen3_5ForConditionalGeneration.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        expected = model.logits(model(ids(20), one(20)))
        assert relative_error(merged(ids(20)[None], use_cache=False).logits[0], expected) <= 1e-5


def test_what_does_not_fit_is_named(published, capsys, tmp_path_factory):
    base, adapter = published / "base", published / "adapter"
    random_adapter(base, adapter)
    (published / "taken").mkdir()
    (published / "taken/note.txt").write_text("mine")
    refused("taken: exists already and is no empty folder", merge, base, adapter, published / "taken")
    (published / "link").symlink_to(published / "nowhere")
    refused("link: exists already", merge, base, adapter, published / "link")
    refused("/proc: a disk is mounted there", merge, base, adapter, "/proc")
    for size in ("lots", "5", "0GB", "-1GB", "1e3GB", "5GBs", "0.0001KB"):
        refused(f"--shard-size {size}: expected a size with its unit", merge, base, adapter, published / "merged", size)
    refused("--revision main: .* is a folder, which has no", merge, base, adapter, published / "merged", "", "main")
    refused("random:x.json: random weights lie in no file", merge, "random:x.json", adapter, published / "merged")
    other = tmp_path_factory.mktemp("other")
    both_models(other / "base", "wide heads")
    random_adapter(other / "base", other / "adapter")
    refused("does not fit this base", merge, base, other / "adapter", published / "merged")
    assert not (published / "merged").exists()
    assert main(["merge", "--model", str(base), "--adapter", str(adapter), "--out", str(published / "merged")]) == 0
    assert "read back and checked" in capsys.readouterr().out


def changed(folder, name, change) -> None:
    """Writes one tensor of a sharded checkpoint anew."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            save_file({**tensors, name: change(tensors[name])}, path, metadata={"format": "pt"})


TOUCHED, VISION = "model.language_model.layers.0.mlp.up_proj.weight", "model.visual.patch_embed.proj.bias"


@pytest.mark.parametrize("name", [TOUCHED, VISION])
def test_a_base_with_nan_is_refused_by_name(name, published):
    random_adapter(published / "base", published / "adapter")
    changed(published / "base", name, lambda x: torch.full_like(x, float("nan")))
    refused(f"{name} holds NaN or infinity", merge, published / "base", published / "adapter", published / "merged")
    assert {path.name for path in published.iterdir()} == {"base", "adapter"}


def test_an_adapter_with_nan_is_refused_by_name(published):
    random_adapter(published / "base", published / "adapter")
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    changed(published / "adapter", name, lambda x: torch.full_like(x, float("nan")))
    refused(f"{name} holds NaN or infinity", merge, published / "base", published / "adapter", published / "merged")


def test_what_is_quantised_is_not_merged_into(published):
    """Eight bits without the scale that stands in another tensor are no weight."""
    random_adapter(published / "base", published / "adapter")
    name = TOUCHED
    changed(published / "base", name, lambda x: x.to(torch.float8_e4m3fn))
    message = f"{name} is F8_E4M3; merge into the base before it was quantised"
    refused(message, merge, published / "base", published / "adapter", published / "merged")


def test_a_single_file_is_merged_and_not_the_stale_shards_beside_it(published, tmp_path_factory):
    base, fresh = published / "base", tmp_path_factory.mktemp("fresh")
    both_models(fresh)
    (fresh / "model.safetensors").rename(base / "model.safetensors")
    (fresh / "config.json").rename(base / "config.json")
    model, _ = random_adapter(base, published / "adapter")
    merge(base, published / "adapter", published / "merged")
    assert [path.name for path in (published / "merged").glob("model*")] == ["model.safetensors"]
    merged = AutoModelForCausalLM.from_pretrained(published / "merged")
    with torch.no_grad():
        expected = model.logits(model(ids(20), one(20)))
        assert relative_error(merged(ids(20)[None], use_cache=False).logits[0], expected) <= 1e-5


def test_a_head_that_differs_from_the_tied_embedding_stays(tmp_path):
    both_models(tmp_path / "base", "tied, ratio 1")
    tensors = load_file(tmp_path / "base/model.safetensors")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].flip(0).contiguous()}
    save_file(tensors | head, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    model, _ = random_adapter(tmp_path / "base", tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        expected = model.logits(model(ids(20), one(20)))
        assert relative_error(merged(ids(20)[None], use_cache=False).logits[0], expected) <= 1e-5
