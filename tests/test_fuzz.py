"""Damaged input of every kind, through the programs' own `main`: a result, or exit code 2 and one line that names the
file. Never a traceback, a hang, memory for what a header only claims, or a file outside --out.

    python -m tests.test_fuzz [TARGET ...] [--cases N] [--first N]     # every distinct failure, with the case's number
    python -m tests.test_fuzz TARGET --first SEED --cases 1 --keep DIR # one case again, its files left in DIR

Cases are seeded, so that a number names the same damage everywhere.
"""

import argparse
import contextlib
import faulthandler
import importlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

import eval as eval_script
import generate
import psysafe.checkpoint.__main__
import psysafe.checkpoint.peft_format
import psysafe.data.tokenizer
import psysafe.evaluation.statistics
import psysafe.files
import psysafe.model.config
import psysafe.training.config
import train
from psysafe.checkpoint import tensor_files
from psysafe.program import main_guard
from psysafe.training.run_state import State, _sums, enter_run_dir
from tests import damage
from tests.test_checkpoint import shard
from tests.tiny_text_model import write_text_model

corpus = importlib.import_module("psysafe.corpus.__main__")
show = importlib.import_module("psysafe.data.__main__")

SECONDS = 20  # of CPU time; a case takes 0.03
MEMORY = 2**30  # that a case may map beyond what the process has already

MICRO = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"]
)
ROW = {"prompt": "How do I rest?", "answer": "Slowly.", "reasoning": "Tired.", "risk cluster": "violence"}
ROW |= {"risk category": "sleep", "framework_name": "none"}


class Target(NamedTuple):
    """A file, what is done to it, and who then reads it."""

    file: str
    damages: tuple[damage.Damage, ...]
    commands: tuple[str, ...]
    codes: tuple[int, ...] = (0,)  # beside 2
    instead: tuple[str, ...] = ()  # what the line may say where it names neither the file nor its folder


# Each program at its least; a command may add to that or change it. {box} holds a copy of all good files but one.
ROWS, VAL, MODEL = "{box}/rows/rows.jsonl", "{box}/val/val.jsonl", "--model {box}/model"
PROGRAMS = {
    "train": (
        train.main,
        f"{MODEL} --data {ROWS} --val-data {VAL} --out {{box}}/out --batch-size 2 --max-steps 1 --max-tokens 64 "
        "--warmup-steps 0 --device cpu --min-8bit-size 1",
    ),
    "settings": (train.main, "--config {box}/toml/config.toml --out {box}/out --max-steps 1 --report none"),
    "generate": (generate.main, f"{MODEL} --device cpu --max-new-tokens 2 --context 200"),
    "generate-from-adapter": (generate.main, "Hello --adapter {box}/adapter --device cpu --max-new-tokens 1"),
    "eval": (eval_script.main, "{command} --out {box}/out"),
    "corpus": (corpus.main, "{command}"),
    "merge": (psysafe.checkpoint.__main__.main, f"merge {MODEL} --adapter {{box}}/adapter --out {{box}}/out/merged"),
    "show": (show.main, f"--show {ROWS} {MODEL}"),
}


def run(command: str, box: Path) -> int:
    """ "train --seed 1" -> the exit code of train.py with the flags of PROGRAMS and these."""
    program, _, rest = command.partition(" ")
    main, flags = PROGRAMS[program]
    words = flags.replace("{command}", rest) if "{command}" in flags else f"{flags} {rest}"
    return main_guard(main, words.replace("{box}", str(box)).split())


def index_leaves_folder(chance: Random, content: bytes) -> bytes:
    """Every shard is named by a path out of the folder, to a sound file of that name."""
    index = json.loads(content)
    out = chance.choice(("../sharded/", "./", "x/../", "/proc/self/cwd/../box/sharded/", "../../box/sharded/", "..\\"))
    index["weight_map"] = {key: out + name for key, name in index["weight_map"].items()}
    return json.dumps(index).encode()


JSON, LINES, CSV = (
    (how, damage.bytes_damaged) for how in (damage.json_damaged, damage.json_lines_damaged, damage.csv_damaged)
)
TENSORS = damage.safetensors_damaged, damage.bytes_damaged
MODEL_READERS = "train", "generate Hello", "merge"
SHARDED = "generate --model {box}/sharded Hello", "merge --model {box}/sharded"
SELECTIVE = (
    "eval selective --prompts {box}/contrast/prompts.jsonl --judge rules --answers a={box}/contrast/answers.jsonl "
    "--answers b={box}/contrast/answers.jsonl"
)
TURNS = "eval turns --prompts {box}/turns/turns.jsonl --answers {box}/turns/answers.jsonl --judge rules"
RESUME = ("train --out {box}/run --resume auto --max-steps 2",)

RATED = "eval agreement --ratings {box}/ratings/anna.json --key {box}/ratings/key.json --judged {box}/result"

TARGETS = {
    "rows": Target(
        "rows/rows.jsonl",
        LINES,
        (
            *("train", "show", f"generate --prompts {ROWS} --out {{box}}/out/answers.jsonl"),
            f"corpus stats {ROWS} {MODEL} --json {{box}}/out/stats.json",
            f"corpus validate {ROWS}",
            f"corpus split {ROWS} --val 1 --test 1 --out {{box}}/out",
            f"corpus leakage --held-out {ROWS} --training {VAL} --system v1",
            f"corpus leakage --held-out {VAL} --benchmark {ROWS}",
            f"eval judge --judge rules --answers {ROWS}",
            f"eval judge --judge rules --answers {{box}}/array/rows.json --train {ROWS}",
        ),
        codes=(0, 1),
        instead=("answers of rows",),
    ),
    "rows, an array": Target(
        "array/rows.json",
        JSON,
        ("train --data {box}/array/rows.json", "corpus split {box}/array/rows.json --val 1 --test 1 --out {box}/out"),
    ),
    "settings": Target("toml/config.toml", (damage.toml_damaged,), ("settings",), instead=("",)),
    "settings, dry run": Target(
        "toml/config.toml", (damage.toml_damaged, damage.bytes_damaged), ("settings --dry-run",), instead=("",)
    ),
    "weights": Target("model/model.safetensors", TENSORS, MODEL_READERS),
    "weights, other numbers": Target("model/model.safetensors", (damage.floats_damaged,), MODEL_READERS),
    "index": Target("sharded/model.safetensors.index.json", JSON, SHARDED),
    "index that leaves its folder": Target(
        "sharded/model.safetensors.index.json", (index_leaves_folder,), SHARDED, codes=()
    ),
    "architecture": Target(
        "model/config.json",
        JSON,
        (*MODEL_READERS, "train --dry-run", "generate --model random:{box}/model/config.json Hello"),
    ),
    "tokenizer": Target("model/tokenizer.json", JSON, ("train", "generate Hello")),
    "generation config": Target("model/generation_config.json", JSON, ("generate Hello",)),
    "adapter config": Target(
        "adapter/adapter_config.json",
        JSON,
        ("generate --adapter {box}/adapter x", "generate-from-adapter", "train --adapter-init {box}/adapter", "merge"),
        instead=("no such model folder", "no such folder, and the hub"),  # the base that it names now
    ),
    "adapter": Target(
        "adapter/adapter_model.safetensors",
        (*TENSORS, damage.floats_damaged),
        ("generate --adapter {box}/adapter x", "train --adapter-init {box}/adapter", "merge"),
    ),
    "state": Target("run/state/step-00000001/state.safetensors", TENSORS, RESUME),
    "state's entries": Target("run/state/step-00000001/state.json", JSON, RESUME),
    "metrics": Target("run/metrics.jsonl", LINES, RESUME),
    "system prompt": Target(
        "system/system.txt", (damage.bytes_damaged,), ("train --max-tokens 400 --system {box}/system/system.txt",)
    ),
    "answers": Target(
        "answers/answers.jsonl",
        LINES,
        (
            "eval judge --judge rules --answers {box}/answers/answers.jsonl",
            f"generate --prompts {ROWS} --out {{box}}/answers/answers.jsonl --no-thinking",
        ),
        instead=("nothing to compare between", "answers of "),
    ),
    "base's answers": Target(
        "contrast/answers.jsonl",
        LINES,
        (
            "corpus contrast {box}/contrast/answers.jsonl --judge rules --out {box}/out/contrast.jsonl",
            f"{SELECTIVE} --baseline a",
        ),
        instead=("no contrast row is left", "no prompt of --prompts is answered", "--answers", "--baseline a"),
    ),
    "prompts in groups": Target(
        "contrast/prompts.jsonl",
        LINES,
        (
            f"{SELECTIVE} --baseline a",
            "corpus contrast {box}/contrast/answers.jsonl --judge rules --not-in {box}/contrast/prompts.jsonl "
            "--out {box}/out/contrast.jsonl",
        ),
        instead=("no contrast row is left", "no prompt of --prompts is answered"),
    ),
    "conversations": Target("turns/turns.jsonl", LINES, (TURNS,), instead=("--answers: no conversation of",)),
    "answered conversations": Target(
        "turns/answers.jsonl", LINES, (TURNS,), instead=("--answers: no conversation of", "nothing to compare between")
    ),
    "benchmark": Target(
        "csv/xstest.csv",
        CSV,
        (
            f"eval xstest --data {{box}}/csv/xstest.csv --judge rules {MODEL} --max-new-tokens 1 --device cpu",
            f"corpus leakage --held-out {VAL} --benchmark {{box}}/csv/xstest.csv",
        ),
        codes=(0, 1),
    ),
    "mmlu": Target("mmlu/mmlu.jsonl", LINES, (f"eval mmlu --data {{box}}/mmlu/mmlu.jsonl {MODEL} --device cpu",)),
    "hellaswag": Target(
        "mmlu/hellaswag.jsonl", LINES, (f"eval hellaswag --data {{box}}/mmlu/hellaswag.jsonl {MODEL} --device cpu",)
    ),
    "labels": Target("csv/labels.csv", CSV, ("eval agreement --human {box}/csv/labels.csv --judged {box}/result",)),
    "judged answers": Target(
        "result/items.jsonl",
        LINES,
        (
            "eval agreement --human {box}/csv/labels.csv --judged {box}/result",
            "eval judge --scores {box}/result/items.jsonl",
        ),
        instead=("labels.csv", "nothing to compare between"),
    ),
    "ratings": Target("ratings/anna.json", JSON, (RATED,)),
    "key of ratings": Target("ratings/key.json", JSON, (RATED,), instead=("anna.json",)),
    "result": Target("result/result.json", JSON, ("eval report {box}/result",)),
}

# A checksum that holds: then the state is not damaged but wrong, and nothing else stands between it and the run.
SIGNED = ("state", "state's entries")


def write_good_files(folder: Path) -> None:
    folders = "rows array val toml system answers contrast turns csv mmlu ratings out"
    for name in folders.split():
        (folder / name).mkdir()
    rows = [ROW | {"prompt": f"How do I rest on day {i}?"} for i in range(3)]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>\na\n</think>\nb"}]
    rows.append({"messages": turns, "risk cluster": "suicide and selfharm", "prompt": "Hi", "answer": "b"})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows" / "rows.jsonl").write_text(lines)
    (folder / "val" / "val.jsonl").write_text(lines)
    (folder / "array" / "rows.json").write_text(json.dumps(rows[:3]))
    (folder / "system" / "system.txt").write_text("Be kind. Sei gütig.\n" * 3)
    (folder / "csv" / "xstest.csv").write_text(
        "id,prompt,type,label,focus,note\n1,How do I rest?,homonyms,safe,,\n2,How not?,contrast_homonyms,unsafe,,\n"
    )
    groups = [{"prompt": "How do I rest?", "group": "plain"}, {"prompt": "Copy a film.", "group": "out_of_domain"}]
    risky = {"prompt": "I drink.", "group": "risky", "cluster": "substance"}
    written = {"reasoning": "a", "finish_reason": "stop", "adapter": "base", "settings": {"system": "none"}}
    texts = ("Sit down.", "I can't help with that.")
    answers = [row | written | {"answer": text} for row, text in zip(groups, texts, strict=True)]
    for name, lines in (("prompts", [*groups, risky]), ("answers", answers)):
        (folder / "contrast" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    said = {"cluster": "substance", "kinds": ["risky", "benign", "thanks"], "turns": ["I drink.", "Hi?", "Thanks."]}
    answer = {"role": "assistant", "content": "No."}
    messages = [message for text in said["turns"] for message in ({"role": "user", "content": text}, answer)]
    (folder / "turns" / "turns.jsonl").write_text(json.dumps(said) + "\n")
    (folder / "turns" / "answers.jsonl").write_text(json.dumps({"variant": "x", "messages": messages}) + "\n")
    item = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 1, "subject": "anatomy"}
    (folder / "mmlu" / "mmlu.jsonl").write_text(f"{json.dumps(item)}\n{json.dumps(item)}\n")
    item = {"activity_label": "Resting", "ctx_a": "They sit.", "ctx_b": "then", "endings": ["a", "b"], "label": 1}
    (folder / "mmlu" / "hellaswag.jsonl").write_text(f"{json.dumps(item)}\n{json.dumps(item)}\n")
    labels = "".join(f"How do I rest on day {i}?,No,2,No,3\n" for i in range(3))
    (folder / "csv" / "labels.csv").write_text("prompt,refusal,grounding,references,relevance\n" + labels)
    rating = {"item": "1", "side": "left", "criterion": "grounding", "value": 2}
    ratings = {"page": "d1", "rater": "Anna", "swapped": ["1"], "ratings": [rating]}
    ratings["preferences"] = [{"item": "1", "value": "right"}]
    key = {"page": "d1", "items": {"1": {"prompt": "How do I rest on day 1?", "left": "tuned", "right": "rows"}}}
    for name, content in (("anna", ratings), ("key", key)):
        (folder / "ratings" / f"{name}.json").write_text(json.dumps(content))
    write_text_model(folder / "model", **MICRO)
    shutil.copytree(folder / "model", folder / "sharded")
    shard(folder / "sharded", load_file(folder / "model" / "model.safetensors"), 2)
    for name in ("run", "adapter"):
        assert run(f"train --out {{box}}/{name} --save-every 1 --max-steps 2", folder) == 0
    # The newest state is the one that is damaged; it is the only one, so that damage cannot hide behind an older one.
    states = sorted((folder / "run" / "state").iterdir())
    for state in states[1:]:
        shutil.rmtree(state)
    settings = (folder / "run" / "config.toml").read_text().replace(str(folder), "{box}")
    (folder / "toml" / "config.toml").write_text(settings)
    assert run(TARGETS["answers"].commands[1], folder) == 0
    assert run(f"eval judge --judge rules --answers {{box}}/array/rows.json --train {VAL}", folder) == 0
    shutil.move(folder / "out", folder / "result")
    (folder / "out").mkdir()


def displaced(chance: Random, path: Path) -> None:
    """Something else stands where the file was."""
    path.unlink()
    kind = chance.randrange(4)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to(path.name)
    elif kind == 2:
        path.symlink_to("nowhere")


class Hang(BaseException):
    """Not an Exception, so that no handler of ours takes it for a mistake in the input."""


WRITES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate", "shutil.rmtree"}
allowed: set[Path] | None = None  # where this process may write now; None is anywhere
strayed: list[str] = []


def _audit(event: str, arguments: tuple) -> None:
    """Notes every write outside `allowed`. (A file that the safetensors library writes is seen as a rename.)"""
    if allowed is None or (event not in WRITES and event != "open"):
        return
    if event in ("os.remove", "os.rmdir") and arguments[1] != -1:  # in a folder whose shutil.rmtree was noted
        return
    paths = arguments[:2] if event == "os.rename" else arguments[:1]
    if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
        return
    for path in paths:
        if not isinstance(path, int) and os.fspath(path) != os.devnull:
            real = Path(os.path.realpath(os.fsdecode(path)))
            if not allowed & {real, *real.parents}:
                strayed.append(f"{event} {real}")


@contextlib.contextmanager
def guarded(box: Path, writable: set[Path]) -> Iterator[None]:
    """A limit of time and memory, no hub, no fsync (it is slow and proves nothing here), and an eye on every write."""
    import huggingface_hub

    global allowed
    patch = pytest.MonkeyPatch()

    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    def hang(number, frame):
        raise Hang(f"no end after {SECONDS} s of CPU time")

    patch.setattr(huggingface_hub, "snapshot_download", offline)
    patch.setattr(huggingface_hub, "hf_hub_download", offline)
    patch.setattr(os, "fsync", lambda descriptor: None)
    patch.setattr(psysafe.evaluation.statistics, "RESAMPLES", 20)  # the bootstrap is slow, and proves nothing here
    patch.chdir(box / "cwd")
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, hang)
    allowed = writable
    strayed.clear()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, limits[1]))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        # For a hang that no handler interrupts, or a sleep. By the clock: far beyond what a busy machine takes.
        faulthandler.dump_traceback_later(900, exit=True)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        allowed = None
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGPROF, before)
        patch.undo()
        torch.set_deterministic_debug_mode("default")


def failure_of(name: str, seed: int, folder: Path) -> str:
    """Runs one case in folder/box (from folder/good) -> what is wrong with how it ended, "" for nothing."""
    target, chance, box = TARGETS[name], Random(f"{name} {seed}"), folder / "box"
    shutil.rmtree(box, ignore_errors=True)
    shutil.copytree(folder / "good", box)
    (box / "cwd").mkdir()
    path = box / target.file
    command = target.commands[seed % len(target.commands)]
    if chance.random() < 0.04:
        displaced(chance, path)
    else:
        content = path.read_bytes()
        content = content.replace(b"{box}", str(box).encode())  # in the settings
        path.write_bytes(chance.choice(target.damages)(chance, content))
        if name in SIGNED and chance.random() < 0.8:
            contents = {file: (path.parent / file).read_bytes() for file in ("state.safetensors", "state.json")}
            (path.parent / "SHA256SUMS").write_bytes(_sums(contents))
    own = name in ("metrics", "answers", *SIGNED)  # continued in place
    writable = {box / "out", box / Path(target.file).parts[0] if own else box / "out"}
    # As a terminal's: half a surrogate pair does not go out on stdout.
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err = io.StringIO()
    try:
        with guarded(box, writable), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(command, box)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        last = [frame for frame in traceback.extract_tb(error.__traceback__) if "/tests/" not in frame.filename]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(last[-4:]))
        return f"{type(error).__name__}: {str(error)[:150]!r} at {where}"
    errors = [line for line in err.getvalue().splitlines() if line.startswith("error")]
    if strayed:
        return f"wrote outside --out: {', '.join(strayed)}"
    if code not in (2, *target.codes):
        return f"exit code {code}; stderr {err.getvalue()[-300:]!r}"
    if "Traceback" in err.getvalue() or len(errors) != (code == 2):
        return f"exit code {code} with {len(errors)} error lines; stderr {err.getvalue()[-300:]!r}"
    if code == 2 and not any(name in errors[0] for name in (str(path), str(path.parent), *target.instead)):
        return f"names no file: {errors[0][:200]!r}"
    if code == 2 and len(errors[0]) > 2_000:
        return f"a line of {len(errors[0])} characters: {errors[0][:200]!r}"
    return ""


def fuzz(name: str, cases: range, folder: Path) -> None:
    for seed in cases:
        wrong = failure_of(name, seed, folder)
        again = f'python -m tests.test_fuzz "{name}" --first {seed} --cases 1 --keep DIR'
        assert not wrong, f"{name}, case {seed}: {wrong}\nsee it again: {again}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return prepared(tmp_path_factory.mktemp("fuzz"))


def prepared(folder: Path) -> Path:
    """folder/good with all good files; absolute paths in them are those of folder/box, where the cases run."""
    (folder / "box").mkdir()
    with contextlib.redirect_stdout(io.StringIO()):
        write_good_files(folder / "box")
    shutil.move(folder / "box", folder / "good")
    return folder


sys.addaudithook(_audit)

CASES = 100  # of a target: 3,000 in all


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input_is_one_clean_line(name, folder):
    fuzz(name, range(3), folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input_is_one_clean_line_whatever_the_damage(name, folder):
    fuzz(name, range(3, CASES), folder)


def stray(*args):
    Path("stray.txt").write_text("")
    return enter_run_dir(*args)


def unchecked(folder):
    return psysafe.files.read_json(Path(folder, "adapter_config.json"))


def forever(path):
    while True:
        pass


MUTANTS = {
    "a value of any type": ("settings, dry run", psysafe.training.config, "_checked", lambda key, value, where: value),
    "brackets without end": ("architecture", psysafe.files, "parse_json", json.loads),
    "sizes of any kind": ("architecture", psysafe.model.config, "_number", lambda source, key, *_: source[key]),
    "a shard anywhere": ("index that leaves its folder", tensor_files, "is_plain_name", lambda name: True),
    "an adapter of any rank": ("adapter config", psysafe.checkpoint.peft_format, "read_adapter_config", unchecked),
    "a state of any kind": ("state's entries", State, "entry", lambda state, name, *_: state.meta[name]),
    "a file outside --out": ("weights, other numbers", train, "enter_run_dir", stray),
    "a program that hangs": ("generation config", psysafe.data.tokenizer, "_read_eos_ids", forever),
    "memory that a file claims": ("generation config", psysafe.data.tokenizer, "_read_eos_ids", lambda _: [0] * 2**28),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_missing_check_is_caught(mutant, folder, monkeypatch):
    """Each takes one check out, or puts one fault in; the same test must find it."""
    name, owner, attribute, wrong = MUTANTS[mutant]
    monkeypatch.setattr(owner, attribute, wrong)
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 2)
    with pytest.raises(AssertionError, match=r"see it again: python -m tests.test_fuzz"):
        fuzz(name, range(CASES), folder)


def main(argv) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--keep", metavar="DIR")
    args = parser.parse_args(argv)
    import time

    with tempfile.TemporaryDirectory() as temporary:
        folder = prepared(Path(args.keep or temporary))
        for name in args.targets or TARGETS:
            failures: dict[str, list[int]] = {}
            began = time.perf_counter()
            for seed in range(args.first, args.first + args.cases):
                wrong = failure_of(name, seed, folder)
                if wrong:
                    print(f"  {name} {seed}: {wrong}", flush=True)
                    failures.setdefault(wrong, []).append(seed)
            print(
                f"{name}: {sum(map(len, failures.values()))} of {args.cases} fail, {time.perf_counter() - began:.1f} s"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
