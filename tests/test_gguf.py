"""Adapters as GGUF files: read back number by number, and applied by llama.cpp itself to the tiny base."""

import json
import math
import re
import resource
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from psysafe import load_model, load_tokenizer
from psysafe.checkpoint import gguf_adapter
from psysafe.checkpoint.adapter import save_adapter
from psysafe.checkpoint.gguf_adapter import write_gguf
from psysafe.files import ASSETS
from psysafe.generation.engine import Options
from psysafe.generation.generator import Generator
from psysafe.model.lora import TARGETS, attach
from psysafe.program import UserError
from tests.gguf_base import write_base

ROOT = Path(__file__).resolve().parents[1]
TINY = ASSETS / "tiny"
PROMPTS = ["Hello!", "I want to get drunk every night.", "How do I boil an egg?", "Who are you?", "What is 2 plus 3?",
           "Write a fake invoice.", "I feel like giving up.", "I want to hurt my brother tonight."]  # fmt: skip


def random_adapter(
    folder: Path, rank: int = 1, targets: tuple[str, ...] = TARGETS, **config
) -> dict[str, torch.Tensor]:
    """Saves an adapter whose B is as large as a trained one's; returns its matrices by name."""
    model = load_model("assets:tiny", dtype=torch.float32)
    adapters = attach(model, rank=rank, alpha=32.0, targets=targets, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, view in adapters.tensors().items():
        if name.endswith("lora_B"):
            view.data.copy_(0.08 * torch.randn(view.shape, generator=generator))
    save_adapter(adapters, folder, "assets:tiny", multimodal=False)
    if config:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return {name: view.clone() for name, view in adapters.tensors().items()}


def read_back(path: Path) -> tuple[dict[str, torch.Tensor], float]:
    reader = GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "qwen35"
    assert reader.get_field("general.type").contents() == "adapter"
    assert reader.get_field("adapter.type").contents() == "lora"
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    return tensors, reader.get_field("adapter.lora.alpha").contents()


@pytest.mark.parametrize(("rank", "config", "scale"), [
    (1, {}, 32.0), (4, {}, 8.0), (4, {"use_rslora": True}, 32.0 / math.sqrt(4)),
])  # fmt: skip
def test_every_number_of_the_file(tmp_path, rank, config, scale):
    """Names, numbers, and alpha / r, which llama.cpp multiplies with, equal to PEFT's scale."""
    saved = random_adapter(tmp_path / "adapter", rank, **config)
    tensors, alpha = read_back(write_gguf(tmp_path / "adapter", tmp_path / "a.gguf"))
    assert alpha / rank == pytest.approx(scale)
    assert len(tensors) == len(saved)
    assert torch.equal(tensors["blk.3.attn_q.weight.lora_a"], saved["layers.3.self_attn.q_proj.lora_A"])
    assert torch.equal(tensors["blk.0.ffn_down.weight.lora_b"], saved["layers.0.mlp.down_proj.lora_B"])
    by_size = sorted((tuple(x.shape), x.double().sum().item()) for x in tensors.values())
    assert by_size == sorted((tuple(x.shape), x.double().sum().item()) for x in saved.values())


def test_modules_of_several_scales_keep_theirs(tmp_path):
    """A file has one alpha: B takes up the ratio."""
    saved = random_adapter(tmp_path / "adapter", alpha_pattern={"q_proj": 8.0})
    tensors, alpha = read_back(write_gguf(tmp_path / "adapter", tmp_path / "a.gguf"))
    for ours, theirs, scale in (("3.self_attn.q_proj", "3.attn_q", 8.0), ("3.self_attn.k_proj", "3.attn_k", 32.0)):
        torch.testing.assert_close(
            alpha * tensors[f"blk.{theirs}.weight.lora_b"], scale * saved[f"layers.{ours}.lora_B"]
        )


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    random_adapter(tmp_path / "adapter")
    (tmp_path / "old.gguf").write_bytes(b"old")
    for out, message in (("a.bin", r"ends in \.gguf"), ("old.gguf", "exists already")):
        with pytest.raises(UserError, match=message):
            write_gguf(tmp_path / "adapter", tmp_path / out)
    assert (tmp_path / "old.gguf").read_bytes() == b"old"
    random_adapter(tmp_path / "delta", targets=("out_proj",))
    with pytest.raises(UserError, match=r"linear_attn\.out_proj; llama\.cpp's files hold .* merge it"):
        write_gguf(tmp_path / "delta", tmp_path / "a.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"requirements-gguf\.txt"):
        write_gguf(tmp_path / "adapter", tmp_path / "a.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "delta", "old.gguf"]


@pytest.mark.parametrize("module", ["lm_head", "mtp.layers.0.self_attn.q_proj"])
def test_a_module_outside_the_layers_is_one_line(tmp_path, module):
    """PEFT's target_modules may name it; no number of the decoder's layers stands in its name."""
    random_adapter(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    matrices = {f"base_model.model.{module}.lora_{letter}.weight": torch.ones(1, 1) for letter in "AB"}
    save_file(load_file(weights) | matrices, weights)
    config = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(config.read_text())
    content["target_modules"] = [*content["target_modules"], "lm_head"]
    config.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"adapts {re.escape(module)}; expected projections"):
        write_gguf(tmp_path / "adapter", tmp_path / "a.gguf")


def test_a_full_disk_leaves_no_file(tmp_path):
    """A limit on the size of files stands for the disk: the system refuses what goes beyond it, in the same way."""
    random_adapter(tmp_path / "adapter")
    command = [sys.executable, "-m", "psysafe.checkpoint", "gguf", "--adapter", tmp_path / "adapter", "--out"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))  # noqa: E731
    done = subprocess.run([*command, tmp_path / "a.gguf"], cwd=ROOT, preexec_fn=limit, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: \S+a\.gguf: File too large\n", done.stderr), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.slow
def test_llama_cpp_says_the_same(tmp_path):
    """Greedy texts of llama.cpp equal ours: of the base, with the adapter's file, and not with a changed one."""
    pytest.importorskip("xllamacpp")
    random_adapter(tmp_path / "adapter")
    command = [sys.executable, "-m", "psysafe.checkpoint", "gguf", "--adapter", tmp_path / "adapter", "--out"]
    subprocess.run([*command, tmp_path / "a.gguf"], check=True, cwd=ROOT)
    write_base(TINY, tmp_path / "base.gguf")
    base, tuned = of_ours(None), of_ours(tmp_path / "adapter")
    assert of_llama_cpp(tmp_path / "base.gguf") == base
    assert of_llama_cpp(tmp_path / "base.gguf", tmp_path / "a.gguf") == tuned
    assert sum(one != other for one, other in zip(base, tuned, strict=True)) >= 6, "the adapter has to show"


def of_ours(adapter: Path | None) -> list[str]:
    model, tokenizer = load_model("assets:tiny", adapter, dtype=torch.float32), load_tokenizer("assets:tiny")
    questions = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    answers = Generator(model, tokenizer, Options(max_new_tokens=48)).answers(questions)
    # llama.cpp leaves control tokens out of its texts.
    return [re.sub(r"<\|\w+\|>", "", a.response) for a in sorted(answers, key=lambda answer: answer.row)]


def of_llama_cpp(base: Path, *adapters: Path) -> list[str]:
    """In a process of its own: llama.cpp's server ends with it."""
    tokenizer = load_tokenizer("assets:tiny")
    ids = [tokenizer.encode_chat([{"role": "user", "content": prompt}], True) for prompt in PROMPTS]
    code = f"""
import json, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup, params.cpuparams.n_threads = {str(base)!r}, 1024, False, 1
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in {[str(a) for a in adapters]!r}]
server = xllamacpp.Server(params)
texts = []
for ids in {ids!r}:
    asked = {{"prompt": ids, "max_tokens": 48, "temperature": 0, "top_k": 1, "cache_prompt": False}}
    texts.append(server.handle_completions(asked)["choices"][0]["text"])
print("TEXTS", json.dumps(texts))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stdout.splitlines() if line.startswith("TEXTS ")]
    assert lines, done.stderr[-2000:]
    return json.loads(lines[-1].removeprefix("TEXTS "))


def test_the_adapter_file_is_named_in_one_place():
    assert gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN35] == gguf_adapter.ARCHITECTURE
