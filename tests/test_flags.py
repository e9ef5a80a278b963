"""Every flag of train.py: it changes what a run prints, writes or learns, or it is refused. (tests/test_eval_flags.py
walks those of eval.py in the same way.) And no flag of any command is only declared.
"""

import ast
import contextlib
import io
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

import train
from psysafe.cli import Parser
from psysafe.program import main_guard
from psysafe.training.config import KEYS, resolve
from tests.mistakes import refused_by
from tests.test_resume import metrics, workspace  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]

# Values other than the base run's. "{folder}" holds a model, its rows, and an adapter of rank 2.
CHANGED = {
    "model": "assets:tiny", "data": "{folder}/val.jsonl", "val_data": "{folder}/train.jsonl", "val_fraction": "0.5",
    "contrast_data": "{folder}/val.jsonl", "contrast_ratio": "2", "contrast_val_data": "{folder}/train.jsonl",
    "kl_weight": "0.5",
    "system": "{folder}/system.txt", "max_tokens": "60",
    "save_every": "1", "batch_size": "3", "epochs": "2",
    "max_steps": "4", "lora_rank": "2", "lora_alpha": "8", "lora_targets": "q_proj", "adapter_layout": "multimodal",
    "adapter_init": "{folder}/adapter", "optimizer": "adamw", "min_8bit_size": "100000", "lr": "0.5", "beta1": "0.1",
    "beta2": "0.1", "eps": "0.1", "weight_decay": "0.9", "warmup_steps": "1", "max_grad_norm": "1e-3", "seed": "1",
    "dtype": "float64", "plot": "", "dry_run": "",
}  # fmt: skip
REFUSED = {  # on one rank of a CPU, or without what they belong to
    "shard": "", "memory_limit": "60", "device": "cuda", "project": "x", "report": "wandb", "timeout": "1e9",
    "revision": "none-such",
}  # fmt: skip
# Where the run lives, and what by design changes no number: tests of their own show what they do.
ELSEWHERE = {"out", "resume", "threads", "micro_batch_tokens", "embedding", "train_turns", "long_rows", "keep_best"}


def observed(folder: Path, out: Path, **changes: str) -> tuple:
    """What a short run prints (without the list of settings and times), writes and learns."""
    flags = {
        "model": "random:{folder}/config.json", "data": "{folder}/train.jsonl", "val_data": "{folder}/val.jsonl",
        "batch_size": "2", "max_steps": "3", "max_tokens": "80", "lr": "1e-2", "warmup_steps": "0",
    }  # fmt: skip
    flags |= {"out": str(out), **changes}
    if "epochs" in changes:
        del flags["max_steps"]
        flags |= {"batch_size": "11"}
    if "val_fraction" in changes:
        del flags["val_data"]
    if "contrast_data" in changes:
        flags |= {"contrast_ratio": "1"}
    if "contrast_ratio" in changes:
        flags |= {"contrast_data": "{folder}/val.jsonl"}
    if "kl_weight" in changes:
        flags |= {"contrast_data": "{folder}/val.jsonl", "contrast_ratio": "1"}
    words = [word for key, value in flags.items() for word in (f"--{key.replace('_', '-')}", value) if word]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main_guard(train.main, [word.format(folder=folder) for word in words]) == 0
    summary = printed.getvalue().split("\n\n")[1].split("\n   ")[0] if "\n\n" in printed.getvalue() else ""
    if not out.exists():
        return (summary,)
    states = sorted(path.name for path in (out / "state").iterdir())
    adapter = load_file(out / "adapter_model.safetensors")
    files = sorted(path.name for path in out.iterdir())
    return summary.replace(str(out), ""), metrics(out), states, files, {k: x.tolist() for k, x in adapter.items()}


@pytest.fixture(scope="module")
def folder(workspace):  # noqa: F811
    (workspace / "system.txt").write_text("Be kind.")
    observed(workspace, workspace / "adapter", lora_rank="2")
    return workspace


def test_the_walk_names_every_flag():
    assert CHANGED.keys() | REFUSED.keys() | ELSEWHERE == KEYS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("key", CHANGED)
def test_a_flag_changes_something(key, folder, tmp_path):
    pytest.importorskip("matplotlib") if key == "plot" else None
    base = {"max_steps": ""} if key == "epochs" else {}
    first = observed(folder, tmp_path / "run", **({"epochs": "1"} if base else {}))
    shutil.rmtree(tmp_path / "run")
    assert observed(folder, tmp_path / "run", **{key: CHANGED[key]}) != first
    if (tmp_path / "run").exists():
        shutil.rmtree(tmp_path / "run")
    assert observed(folder, tmp_path / "run", **({"epochs": "1"} if base else {})) == first


@pytest.mark.parametrize("key", REFUSED)
def test_a_flag_that_can_have_no_effect_is_refused(key, tmp_path, capsys):
    words = [f"--{key.replace('_', '-')}", *([REFUSED[key]] if REFUSED[key] else []), "--out", str(tmp_path / "run")]
    refused_by(train.main, words, capsys)


def test_epochs_that_do_not_count_are_refused(capsys, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("epochs = 5\nmax_steps = 9\n")  # as the config.toml of a run has both
    for words in (["--max-steps", "3", "--epochs", "2"], ["--config", str(file), "--epochs", "2"]):
        line = refused_by(train.main, words, capsys)
        assert "--epochs has no effect here: max_steps counts instead; give --max-steps 0, or leave it out" in line
    assert resolve(["--config", str(file), "--max-steps", "0", "--epochs", "2"])[0].epochs == 2
    assert resolve(["--config", str(file), "--max-steps", "7"])[0].max_steps == 7


def test_a_size_for_8_bit_state_without_8_bit_state_is_refused(capsys):
    line = refused_by(train.main, ["--min-8bit-size", "1", "--optimizer", "adamw"], capsys)
    assert "--min-8bit-size has no effect here: take --optimizer adamw8bit, or leave it out" in line


def unread_flags(sources: dict[str, str]) -> list[str]:
    """Flags that argparse is told of in one of these files, and whose value none of them reads."""
    unread, code = [], "\n".join(sources.values())
    for node in (node for text in sources.values() for node in ast.walk(ast.parse(text))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("add", "add_argument"):
            flag = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else ""
            names = [keyword.value.value for keyword in node.keywords if keyword.arg == "dest"]
            name = names[0] if names else str(flag).removeprefix("--").replace("-", "_")
            if str(flag).startswith("--") and not re.search(rf"\.{name}\b", code):
                unread.append(flag)
    return unread


def test_every_flag_of_every_command_is_read():
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert unread_flags({name: (ROOT / name).read_text() for name in listed if not name.startswith("tests/")}) == []


def test_a_flag_that_nobody_reads_is_found():
    declared = 'parser.add_argument("--top-k")\nadd("--seed", dest="number")\n'
    assert unread_flags({"a.py": declared, "b.py": "args.top_k"}) == ["--seed"]
    assert unread_flags({"a.py": declared, "b.py": "args.number"}) == ["--top-k"]


def test_a_list_that_is_given_twice_is_one_list():
    """argparse drops the first: `leakage --held-out val.jsonl --held-out test.jsonl` would look at one of them."""
    parser = Parser()
    parser.add_argument("files", nargs="*")
    group = parser.add_argument_group("more")
    group.add_argument("--held-out", nargs="+", required=True)
    parser.add_argument("--train", nargs="*", default=[])
    parser.add_argument("--check", nargs="+", default=("US", "UK"))
    parser.add_argument("--lengths", nargs="+", default=["4096"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(["--held-out", "a", "b", "--held-out", "c", "--seed", "1", "--seed", "2", "--train", "x"])
    assert (args.held_out, args.seed, args.train, args.check) == (["a", "b", "c"], 2, ["x"], ("US", "UK"))
    args = parser.parse_args(["--held-out", "a", "--check", "AU", "--check", "ZZ", "--train", "--train", "y"])
    assert (args.check, args.train, args.lengths) == (["AU", "ZZ"], ["y"], ["4096"])
    args = parser.parse_args(["--held-out", "a", "--lengths", "4096", "--lengths", "400"])
    assert args.lengths == ["4096", "400"]
    assert parser.parse_args(["--held-out", "a"]).train == []  # no list of an earlier call
    args = parser.parse_args(["--held-out=a", "--held-out=b", "--", "f", "g"])
    assert (args.held_out, args.files) == (["a", "b"], ["f", "g"])
    main = Parser()
    commands = main.add_subparsers(parser_class=Parser)
    commands.add_parser("below").add_argument("--not-in", nargs="+", default=[])
    assert main.parse_args(["below", "--not-in", "m", "--not-in", "n"]).not_in == ["m", "n"]


def test_every_program_takes_its_flags_with_that_parser():
    """Else one of its lists could lose its beginning."""
    paths = [*ROOT.glob("*.py"), *(ROOT / "psysafe").rglob("*.py")]
    own = {str(path.relative_to(ROOT)) for path in paths if "ArgumentParser(" in path.read_text()}
    assert own <= {"psysafe/cli.py"}
