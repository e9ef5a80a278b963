"""What is this machine's own is never published: planted in each place that can bring it in, it stops everything."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from psysafe.evaluation.result import Result, Table
from psysafe.publish.__main__ import main
from psysafe.publish.scrub import check, without_folders
from tests.mistakes import refused, refused_by
from tests.published_run import write_run

PLANTED = {
    "home": "/home/anna/rows.jsonl",
    "another home": "/Users/anna/data/",
    "root's home": "/root/models/base",
    "data disk": "see /mnt/disk1/rows.jsonl",
    "quoted": '"_name_or_path": "/data/base/model"',
    "short home": "~/private/rows.jsonl",
    "home with an accent": "/home/josé/rows.jsonl",
    "another script": "/données/anna/rows",
    "address of a file": "file:///home/anna/rows.jsonl",
    "Windows": "C:\\Users\\anna\\rows",
    "asset": "data: assets:rows/train.jsonl",
    "hub token": "hf_" + "aB3" * 8,
    "OpenAI key": "sk-" + "aB3-" * 8,
    "GitHub token": "ghp_" + "aB3" * 12,
    "AWS key": "AKIA" + "ABCDEFGHIJKLMNOP",
    "header": "Authorization: Bearer abcdefghijklmnopqrstu",
    "JWT": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3In0.x",
}  # fmt: skip
HARMLESS = [
    "https://arxiv.org/abs/2606.09697", "psysafe/assets/tiny in a clone", "call 911 (US), 24/7", "and/or", "</think>",
    "vllm serve a/b --lora-modules tuned=c/d", "http://localhost:8000/v1/chat", "the assets: rows", "1 / 2 / 3",
    "| a | b |", "[x](../docs/recipe.md#part)", "sk-learn", "hf_transfer", "Bearer of news",
]  # fmt: skip


@pytest.mark.parametrize("what", PLANTED)
def test_what_must_not_leave_is_refused_and_not_repeated(what):
    text = f"first\n{PLANTED[what]}\nlast"
    line = refused(r"^README.md line 2: holds .*nothing was sent", check, [("README.md", text.encode())])
    assert not any(part in line for part in ("anna", "aB3", "mnt", "jos"))


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_text_passes(text):
    check([("README.md", text.encode())])


def test_the_secrets_of_this_process_are_known_by_value(monkeypatch):
    check([("README.md", b"mypassphrase")])
    monkeypatch.setenv("PSYSAFE_JUDGE_KEY", "mypassphrase")
    refused("holds a token", check, [("README.md", b"with mypassphrase in it")])
    monkeypatch.delenv("PSYSAFE_JUDGE_KEY")
    monkeypatch.setenv("HF_TOKEN", "another-one-of-mine")
    refused("holds a token", check, [("a.json", b"another-one-of-mine")])


def test_files_are_read_where_their_words_stand(tmp_path):
    """Text files whole, safetensors' metadata, a GGUF's head; never a vocabulary, in which anything may stand."""
    planted = "/home/anna/base/model"
    (tmp_path / "config.json").write_text(planted)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"source": planted})
    (tmp_path / "model.gguf").write_bytes(b"GGUF\3\0\0\0" + planted.encode() + b"\0" * 9000)
    for name in ("LICENSE", "NOTICE.md", "prompt.jinja"):  # of a merged checkpoint, too
        (tmp_path / name).write_text(planted)
        refused("a path of this machine", check, [(name, tmp_path / name)])
    for name in ("config.json", "model.safetensors", "model.gguf"):
        refused("a path of this machine", check, [(name, tmp_path / name)])
    (tmp_path / "tokenizer.json").write_text(planted)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\0" * 9000 + planted.encode())
    check([(name, tmp_path / name) for name in ("tokenizer.json", "model.gguf")])
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    refused("not a whole safetensors file", check, [("model.safetensors", tmp_path / "model.safetensors")])


def test_paths_in_results_lose_their_folders():
    text = without_folders("replies in /home/anna/runs/judged/replies.jsonl, of a/b")
    assert text == "replies in replies.jsonl, of a/b"
    assert without_folders("of /home/josé/daten/rows.jsonl") == "of rows.jsonl"


@pytest.mark.parametrize("place", ["table", "note", "config"])
def test_the_command_refuses_what_was_planted(place, tmp_path, capsys):
    run = write_run(tmp_path / "run")
    words = [run, "--repo", "someone/x", "--dry-run"]
    table = Table("T", [("variant", ""), ("n", ",")], [["assets:tiny" if place == "table" else "base", 1], ["run", 1]])
    result = Result("xstest", "XSTest", [table], notes=["hf_" + "aB3" * 8] if place == "note" else [])
    if place == "config":
        path = run / "adapter_config.json"
        path.write_text(re.sub(r"^{", '{"auto_mapping": "/home/anna/code.py",', path.read_text()))
    else:
        result.save(tmp_path / "result")
        words += ["--results", tmp_path / "result"]
    line = refused_by(main, words, capsys)
    assert "anna" not in line and "aB3" not in line and "nothing was sent" in line
    assert not Path(run / "README.md").exists()
