"""What the card says about loading, done: its code and commands, with the published files in the repository's place."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import generate
from psysafe.checkpoint.merge import merge
from psysafe.program import main_guard
from psysafe.publish.__main__ import arguments, prepare
from psysafe.publish.run import read_run
from tests.published_run import write_run
from tests.readme_commands import run_page

ROOT = Path(__file__).resolve().parents[1]
NAME = "someone/psysafe-small"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "small")


def published(run: Path, folder: Path, *words: str) -> str:
    """Writes the repository's files into the folder -> the card."""
    for upload in prepare(arguments().parse_args([str(run), "--repo", NAME, *words]), read_run(run)):
        path = folder / upload.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(upload.content if isinstance(upload.content, bytes) else upload.content.read_bytes())
    return (folder / "README.md").read_text(encoding="utf-8")


def python_blocks(card: str, heading: str, folder: Path) -> str:
    """The code below a heading, with the files of this machine in place of the hub's."""
    part = re.search(rf"^### {heading}\n(.*?)(?=^##)", card, re.DOTALL | re.MULTILINE)[1]
    code = "\n".join(re.findall(r"```python\n(.*?)```", part, re.DOTALL))
    assert NAME in code
    return code.replace(NAME, str(folder)).replace('"psysafe/assets/tiny"', repr(str(ROOT / "psysafe/assets/tiny")))


@pytest.mark.slow
@pytest.mark.parametrize("beside", [False, True])
def test_the_code_for_peft_shows_whether_the_adapter_is_on(beside, run, tmp_path, capsys):
    if beside:
        (tmp_path / "x.gguf").write_bytes(b"GGUF")
    words = ["--gguf", str(tmp_path / "x.gguf")] if beside else []
    code = python_blocks(published(run, tmp_path / "hub", *words), "PEFT", tmp_path / "hub")
    exec(code, {})
    assert float(re.search(r"tensor\((.*?)[,)]", capsys.readouterr().out)[1]) > 0.01
    weights = next((tmp_path / "hub").rglob("adapter_model.safetensors"))
    save_file({key: torch.zeros_like(x) for key, x in load_file(weights).items()}, weights, metadata={"format": "pt"})
    exec(code, {})
    assert float(re.search(r"tensor\((.*?)[,)]", capsys.readouterr().out)[1]) == 0


@pytest.mark.slow
def test_the_code_for_merged_weights_loads_the_tuned_model(run, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    merge("", run, tmp_path / "merged")
    card = published(run, tmp_path / "hub", "--merged", str(tmp_path / "merged"))
    names: dict = {}
    exec(python_blocks(card, "transformers, merged weights", tmp_path / "hub"), names)
    base = AutoModelForCausalLM.from_pretrained(ROOT / "psysafe/assets/tiny", dtype="auto")
    tuned = PeftModel.from_pretrained(base, tmp_path / "hub", subfolder="adapter")
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        expected, merged = tuned(tokens).logits, names["model"](tokens).logits
        with tuned.disable_adapter():
            bare = tuned(tokens).logits
    # Once, not twice: the root holds no adapter_config.json that transformers would follow. (The weights are bf16.)
    assert (merged - expected).abs().max() < 0.1 * (expected - bare).abs().max()
    assert len(names["tokenizer"]("help")["input_ids"]) > 0
    for file in (tmp_path / "hub" / "adapter").iterdir():  # which is what it does
        shutil.copy(file, tmp_path / "hub")
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "hub", dtype="auto")
    assert (twice(tokens).logits - expected).abs().max() > 0.2 * (expected - bare).abs().max()


@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path):
    run_page(ROOT / "docs" / "publishing.md", 2, {"runs/publishing": str(tmp_path)})


@pytest.mark.slow
def test_the_command_of_psysafe_answers_with_and_without_the_adapter(run, tmp_path, capsys):
    card = published(run, tmp_path / "hub")
    command = re.search(r"^python generate.py (.*)$", card, re.MULTILINE)[1]
    question = re.search(r'"(.*)"$', command)[1]
    words = command.removesuffix(f'"{question}"').replace(NAME, str(tmp_path / "hub")).split()
    words = [str(ROOT / word) if word.startswith("psysafe/") else word for word in words]
    assert main_guard(generate.main, [*words, "--max-new-tokens", "8", question]) == 0
    base, tuned = re.findall(r"^--- .*\n((?:(?!---).*\n?)*)", capsys.readouterr().out, re.MULTILINE)
    assert base.strip() and tuned.strip() and base != tuned
