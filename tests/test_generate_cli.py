"""generate.py as people use it: one prompt, a chat, a file that survives being killed, and a line for every mistake."""

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import generate
from psysafe import files, load_model
from psysafe.checkpoint.adapter import save_adapter
from psysafe.checkpoint.merge import merge
from psysafe.cli import Parser
from psysafe.data.tokenizer import THINK_END, Tokenizer
from psysafe.generation.engine import Engine
from psysafe.generation.sampling import recommended
from psysafe.generation.terminal import DIM, PLAIN, TextStream, notice
from psysafe.generation.text import TextSplitter
from psysafe.model.lora import attach
from psysafe.program import UserError, main_guard
from psysafe.services import bundled
from tests.mistakes import refused
from tests.tiny_text_model import byte_tokenizer, write_text_model

ROOT = Path(__file__).resolve().parents[1]
SHORT = ("--max-new-tokens", "6")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("base"))


def write_adapter(folder: Path, base: Path, seed: int = 1) -> Path:
    model = load_model(base)
    adapters = attach(model, 1, 4.0, seed=seed)
    torch.manual_seed(seed)
    adapters.param.copy_(torch.randn_like(adapters.param) * 0.3)
    save_adapter(adapters, folder, str(base), multimodal=False)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"), base)


@pytest.fixture
def run(base, capsys, tmp_path, monkeypatch):
    """Calls generate.py in a folder of its own, where `base` stands in for the bundled model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "resolve", lambda argv: (SimpleNamespace(model=str(base), out="runs/tiny"), {}))

    def call(*argv, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main_guard(generate.main, [str(x) for x in argv])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


def test_one_prompt(run, base, adapter, tmp_path):
    """The base, then, once there is a run, its adapter; both can be named; the adapter knows its base."""
    plain = run("hello", *SHORT)
    assert (plain.code, len(plain.out.encode()) > 2) == (0, True)
    assert "memory for 1 x" in plain.err and "MB each" in plain.err
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/tiny").symlink_to(adapter)
    tuned = run("hello", *SHORT)
    assert "with the adapter in runs/tiny" in tuned.err
    assert tuned.out != plain.out
    assert run("hello", *SHORT, "--adapter", "base").out == plain.out
    assert run("hello", *SHORT, "--model", base).out == plain.out
    named = run("hello", *SHORT, "--adapter", adapter)
    assert named.out == tuned.out == run("hello", *SHORT, "--adapter", adapter, "--merge").out
    assert "with the adapter" not in named.err and str(base) in named.err
    both = run("hello", *SHORT, "--compare", f"base,{adapter}")
    assert both.out == f"--- base\n{plain.out}--- {adapter}\n{tuned.out}"


def test_an_adapter_on_another_base_is_named(run, base, adapter, tmp_path):
    """Also on the checkpoint into which it was merged: there it would count twice. Its own base is no news."""
    merge("", adapter, tmp_path / "merged")
    for model in (write_text_model(tmp_path / "other", seed=3), tmp_path / "merged"):
        line = f"warning: {adapter}: the adapter was trained on {base}, and runs on {model}\n"
        for flag, value in (("--adapter", adapter), ("--compare", f"base,{adapter}")):
            assert run("hi", *SHORT, "--model", model, flag, value).err.count(line) == 1
    (tmp_path / "link").symlink_to(base)
    for words in (("--adapter", adapter), ("--adapter", adapter, "--model", "link"), ("--model", tmp_path / "merged")):
        assert "warning" not in run("hi", *SHORT, *words).err


def test_what_is_asked_changes_what_is_read(run):
    """System prompts, thinking, sampling and their seed all reach the model."""
    texts = [
        run("hello", "--max-new-tokens", "12", *more).out
        for more in (
            (),
            ("--system", "v0"),
            ("--no-thinking",),
            ("--temperature", "1", "--seed", "1"),
            ("--temperature", "1", "--seed", "2"),
            ("--presence-penalty", "100"),
            ("--frequency-penalty=-100",),
        )
    ]
    assert len(set(texts)) == len(texts)
    assert run("hello", "--max-new-tokens", "12", "--deterministic").out == texts[0]  # in float32


def test_chat_opens_with_the_notice_and_remembers(run, monkeypatch):
    heard = []
    encode = generate.Generator.encode
    monkeypatch.setattr(
        generate.Generator, "encode", lambda self, m, *tools: heard.append(list(m)) or encode(self, m, *tools)
    )
    result = run("--chat", *SHORT, "--system", "v0", stdin="one\n\ntwo\n/new\nthree\n")
    assert result.code == 0
    assert result.out.startswith(notice())
    assert [[m["role"][0] for m in messages] for messages in heard] == [["s", "u"], ["s", "u", "a", "u"], ["s", "u"]]
    assert [messages[-1]["content"] for messages in heard] == ["one", "two", "three"]


def test_a_chat_that_outgrows_the_context_goes_on(run):
    result = run("--chat", "--context", "60", *SHORT, stdin=f"{'long ' * 20}\nhi\n")
    assert result.code == 0
    assert re.search(r"room for 60; .* or begin anew with /new", result.err)


def test_a_chat_ends_by_exit(run):
    for word in ("/exit", "/quit"):
        result = run("--chat", *SHORT, stdin=f"{word}\nnot read\n")
        assert result.code == 0 and result.out.count("\n> ") == 1 and "/exit" in result.out


def test_a_line_that_is_no_command_is_not_answered(run, capsys):
    result = run("--chat", *SHORT, stdin="/help\n/New\nhi\n")
    assert result.err.count("unknown command; /new begins anew, /exit ends\n") == 2
    assert result.out == run("--chat", *SHORT, stdin="hi\n").out.replace("\n> ", "\n> \n> \n> ", 1)
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    assert "/new begins anew, /exit ends" in " ".join(capsys.readouterr().out.split())


def test_ctrl_c_stops_an_answer_and_not_the_conversation(run, monkeypatch):
    """What follows is answered as if the question had never been asked; at the prompt Ctrl-C ends the program."""
    expected = run("--chat", *SHORT, stdin="one\nthree\n").out.split("\n> ")
    step, steps = Engine.step, []

    def interrupted(self, longest):
        steps.append(longest)
        if len(steps) == 7:  # an answer takes five steps: in the middle of the second one
            signal.raise_signal(signal.SIGINT)
        return step(self, longest)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", interrupted)
        result = run("--chat", *SHORT, stdin="one\ntwo\nthree\n")
    assert (result.code, len(steps)) == (0, 12)
    first, answer, torn, *rest = result.out.split("\n> ")
    assert [first, answer, *rest] == expected and torn.endswith("\n")
    assert result.err.count("stopped; the conversation goes on without this question\n") == 1

    def at_the_prompt(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", at_the_prompt)
    assert run("--chat", *SHORT).code == 130


def test_a_prompt_may_come_from_a_pipe(run):
    expected = run("hello", *SHORT).out
    assert run("-", *SHORT, stdin="hello\n").out == expected
    assert run(*SHORT, stdin="hello\n").out == expected
    assert run("hello", *SHORT, stdin="something else").out == expected  # a prompt that is given wins
    assert run("-", *SHORT, "--sampling", "model", "--temperature", "0", stdin="hello\n").out == expected
    assert_one_line(run("-", stdin="x" * 1_000_001), "stdin: more than 1,000,000 characters")


def test_flags_may_have_underscores(run):
    expected = run("hello", *SHORT).out
    assert run("hello", "--max_new_tokens", "6").out == run("hello", "--max_new_tokens=6").out == expected


def test_after_two_hyphens_a_word_keeps_its_underscores():
    parser = Parser()
    parser.add_argument("--max-tokens")
    parser.add_argument("prompt")
    args = parser.parse_args(["--max_tokens", "6", "--", "--what_is_this"])
    assert (args.max_tokens, args.prompt) == ("6", "--what_is_this")


def test_only_the_first_rows_are_answered(run, tmp_path):
    rows, out = write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "out.jsonl"
    call = ("--prompts", rows, "--out", out, *SHORT)
    assert run(*call, "--limit", "2").code == 0
    assert [a["row"] for a in read(out)] == [1, 2]
    assert run(*call, "--limit", "3").code == 0
    assert [a["row"] for a in read(out)] == [1, 2, 3]


def test_the_models_own_sampling(run, base, tmp_path):
    """--sampling model takes what generation_config.json says; a flag beside it wins."""
    folder = tmp_path / "own"
    shutil.copytree(base, folder)
    settings = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}

    def used(*argv, **changes):
        (folder / "generation_config.json").write_text(json.dumps(settings | changes))
        rows, out = write_rows(tmp_path / "rows.jsonl", ROWS[:1]), tmp_path / "out.jsonl"
        out.unlink(missing_ok=True)
        result = run("--model", folder, "--prompts", rows, "--out", out, *SHORT, *argv)
        assert result.code == 0, result.err
        return read(out)[0]["settings"], result.err

    greedy, err = used()
    assert (greedy["temperature"], greedy["top_k"], greedy["top_p"]) == (0, 0, 1) and "--sampling model" in err
    own, err = used("--sampling", "model")
    assert (own["temperature"], own["top_k"], own["top_p"]) == (0.6, 20, 0.95) and "--sampling model" not in err
    assert used("--sampling", "model", "--top-k", "5")[0]["top_k"] == 5
    assert used("--sampling", "model", top_k=20.0)[0]["top_k"] == 20
    assert used("--sampling", "model", do_sample=False)[0]["temperature"] == 0
    assert "--sampling model" not in used("--no-thinking")[1]
    for value, message in (("hot", "temperature is 'hot', expected a number"), (-1, "temperature is -1.0")):
        (folder / "generation_config.json").write_text(json.dumps(settings | {"temperature": value}))
        assert_one_line(run("hi", "--model", folder, "--sampling", "model"), message)
    (folder / "generation_config.json").unlink()
    assert_one_line(run("hi", "--model", folder, "--sampling", "model"), "no generation_config.json in it")


@pytest.mark.parametrize("value", ["20.5", "NaN", "Infinity", "true", '"20"'])
def test_a_models_own_sampling_needs_numbers(value, tmp_path):
    (tmp_path / "generation_config.json").write_text(f'{{"top_k": {value}}}')
    refused("generation_config.json: top_k is .*, expected a whole number", recommended, tmp_path)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("thinking", [("--no-thinking",), ("--max-think-tokens", "3")])
def test_an_answer_ends_before_a_stop_text(run, tmp_path, monkeypatch, lag, thinking):
    """lag 1: as on a GPU, where a step more is under way when the host sees the text. Each answer is the one without
    stop texts, cut at the first of them; the slot then takes the next prompt. Streamed text ends there, too."""
    init, engines = Engine.__init__, []

    def lagging(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.lag = lag
        engines.append(self)

    monkeypatch.setattr(Engine, "__init__", lagging)
    rows, out = write_rows(tmp_path / "rows.jsonl", ROWS[4:9]), tmp_path / "out.jsonl"
    call = ("--prompts", rows, *thinking, "--max-new-tokens", "40", "--batch-size", "2", "--temperature", "1")
    assert run(*call, "--out", out).code == 0
    whole = [answer["response"] for answer in read(out)]
    heads = [text.partition(THINK_END) if thinking[0] != "--no-thinking" else ("", "", text) for text in whole]
    stops = [re.search("[!-~]{2}", answer[5:])[0] for _, _, answer in heads[:3]]  # the model is random: bytes, mostly
    flags = [word for stop in stops for word in ("--stop", stop)]
    assert run(*call, "--out", tmp_path / "stopped", *flags).code == 0
    expected = [head + end + re.split("|".join(map(re.escape, stops)), answer)[0] for head, end, answer in heads]
    stopped = read(tmp_path / "stopped")
    assert [answer["response"] for answer in stopped] == expected
    assert [answer["finish_reason"] for answer in stopped[:3]] == ["stop"] * 3
    assert all(answer["new_tokens"] < 40 for answer in stopped[:3]) and stopped[0]["settings"]["stop"] == stops
    single = ("--max-new-tokens", "40", "--temperature", "1", *thinking)
    assert run(ROWS[4]["prompt"], *single, *flags).out == expected[0] + "\n"
    assert not engines[-1].state.live.any()  # a slot that went on would outgrow the keys that a step may read


def test_the_notice():
    """Not a substitute for professional care; a line to call in each country, as services/ has it."""
    assert "not a substitute for professional care" in notice()
    assert all(service.contact in notice() for service in bundled().of_cluster("suicide and selfharm"))
    for source in ("generate.py", "psysafe/generation/terminal.py"):
        assert not re.search(r"\d{3}[ -]?\d{3}|\b(988|911|999)\b", (ROOT / source).read_text())


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "text", [f"so\n{THINK_END}\n\nöß, 𝄞!", "never \x1b[31mended", "\ufffd" * 6 + f"ö{THINK_END}x", "\ufffdx\ufffdy"]
)
def test_streaming_writes_whole_characters(text):
    """Token by token (here: byte by byte). A terminal sees reasoning dimmed, and no control codes of the model's."""
    tokenizer = Tokenizer(byte_tokenizer())
    for out in (io.StringIO(), Terminal()):
        splitter = TextSplitter(tokenizer, thinking=True)
        with TextStream(out) as stream:
            for token in (*tokenizer.encode(text), tokenizer.eos_ids[0]):
                for piece in splitter.push(token):
                    stream(1, piece)
                assert "\ufffd" not in out.getvalue() or "\ufffd" in text
        if out.isatty():
            reasoning, _, answer = text.replace("\x1b", "").partition(THINK_END)
            assert out.getvalue() == f"{DIM}{reasoning}{PLAIN}{answer}\n"
        else:
            assert out.getvalue() == text + "\n"


# ---- files of prompts


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [
    {"prompt": "How do I sleep better?", "risk cluster": "none", "answer": "a reference"},
    {"prompt": "same"},
    {"prompt": "same"},
    {"messages": [{"role": "user", "content": "hi"}], "note": "half a \ud83d surrogate"},
    *({"prompt": "x" * n, "id": n} for n in range(1, 20)),
]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_of_prompts(run, base, tmp_path):
    """Every field kept, everything added, JSON as good as JSONL, the order that of the prompts."""
    rows, out = write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "deep/er/out.jsonl"
    result = run("--prompts", rows, "--out", out, *SHORT, "--batch-size", "3")
    assert result.code == 0, result.err
    assert "0 of 23 rows are in" in result.err and "23 of 23 rows" in result.err
    answers = read(out)
    assert [a["row"] for a in answers] == list(range(1, len(ROWS) + 1))
    for row, answer in zip(ROWS, answers, strict=True):
        own_fields = {f"input_{k}" if k == "answer" else k: v for k, v in row.items()}
        assert own_fields.items() <= answer.items()
        assert answer["adapter"] == "base"
        assert answer["finish_reason"] in ("stop", "length")
        assert answer["prompt_tokens"] > 5 and 1 <= answer["new_tokens"] <= 6
        assert answer.get("stucked") == (None if THINK_END in answer["response"] else "true")
        assert answer["settings"]["max_new_tokens"] == 6
    single = run("x" * 5, *SHORT)
    assert single.out == answers[8]["response"] + "\n"
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(ROWS))
    assert run("--prompts", array, "--out", tmp_path / "o2", *SHORT, "--batch-size", "8").code == 0
    assert (tmp_path / "o2").read_bytes() == out.read_bytes()


def test_every_torn_file_is_completed(run, tmp_path, adapter):
    """Cut at any byte, also in the middle of a character or a line, and lines in another order: the same file again."""
    rows, out = write_rows(tmp_path / "rows.jsonl", ROWS[:5]), tmp_path / "out.jsonl"
    call = ("--prompts", rows, "--out", out, *SHORT, "--temperature", "1", "--compare", f"base,{adapter}")
    assert run(*call).code == 0
    whole = out.read_bytes()
    assert whole.count(b"\n") == 10
    for cut in (0, 1, 100, whole.index(b"\n"), whole.index(b"\n") + 1, len(whole) // 2, len(whole) - 1, len(whole)):
        out.write_bytes(whole[:cut])
        result = run(*call)
        assert result.code == 0, result.err
        assert out.read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:6][::-1]) + lines[7][:9])
    assert run(*call).code == 0
    assert out.read_bytes() == whole


def test_a_lost_row_would_be_caught(run, tmp_path, monkeypatch):
    """A mutant that takes a torn line for a whole one: the comparison above fails."""
    monkeypatch.setattr(generate.AnswerFile, "missing", lambda self, adapter: list(self.prompts.values())[1:])
    rows, out = write_rows(tmp_path / "rows.jsonl", ROWS[:3]), tmp_path / "out.jsonl"
    run("--prompts", rows, "--out", out, *SHORT)
    assert [a["row"] for a in read(out)] != [1, 2, 3]


def test_killed_and_started_again(run, base, tmp_path):
    """kill -9 in the middle of a real run: every prompt once, none lost, and the file of an undisturbed run."""
    prompts = [{"prompt": f"question {n}"} for n in range(40)]
    rows, out = write_rows(tmp_path / "rows.jsonl", prompts), tmp_path / "out.jsonl"
    call = ("--prompts", rows, "--out", out, "--model", base, "--max-new-tokens", "24", "--batch-size", "2")
    command = [sys.executable, str(ROOT / "generate.py"), *map(str, call)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=tmp_path)
    while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < 5):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = out.read_bytes().count(b"\n")
    assert 5 <= before < 40
    result = run(*call)
    assert f"base: {before} of 40 rows are in" in result.err
    assert [(a["row"], a["prompt"]) for a in read(out)] == [(n + 1, f"question {n}") for n in range(40)]
    again = tmp_path / "again.jsonl"
    assert run("--prompts", rows, "--out", again, *call[4:]).code == 0
    assert again.read_bytes() == out.read_bytes()


def test_a_file_of_something_else_is_left_alone(run, base, adapter, tmp_path):
    rows, out = write_rows(tmp_path / "rows.jsonl", ROWS[:3]), tmp_path / "out.jsonl"
    call = ("--prompts", rows, "--out", out, *SHORT)
    assert run(*call).code == 0
    before = out.read_bytes()
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "other"}] * 3)
    for argv, message in (
        ((*call, "--temperature", "5", "--seed", "5"), "line 1: was made with temperature 0.0, not 5.0"),
        ((*call, "--presence-penalty", "5"), "line 1: was made with presence_penalty 0.0, not 5.0"),
        ((*call, "--max-new-tokens", "7"), "line 1: was made with max_new_tokens 6, not 7"),
        ((*call, "--adapter", adapter), f"line 1: answered by adapter base, expected {adapter}"),
        (("--prompts", other, *call[2:]), "line 1: answers another prompt than"),
        (("--prompts", rows, "--out", other, *SHORT), "line 1: no answer to a row of these prompts"),
    ):
        result = run(*argv)
        assert_one_line(result, message)
    assert out.read_bytes() == before
    out.write_bytes(before + before)
    assert_one_line(run(*call), "line 4: answers row 1 a second time")
    own = before[: before.index(b'"response"')]  # the same row, as another program continues it
    torn = (b'{"x": 1}', b'{"prompt": "How do I sleep better?", "x": 1}', own + b'"x": 1', b'{\n  "x": 1\n}')
    for foreign in (*torn, before + torn[0], b"notes without a newline", before + b"and a note", b"\xff\xfe", b"[1]\n"):
        out.write_bytes(foreign)
        assert_one_line(run(*call), "no answer to a row of these prompts; give another --out")
        assert out.read_bytes() == foreign


def test_a_device_is_no_file_of_answers(run, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", ROWS[:1])
    assert_one_line(run("--prompts", rows, "--out", "/dev/zero", *SHORT), "/dev/zero: not a regular file")


def test_the_file_of_answers_is_checked_and_locked_before_the_weights_are_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "load_model", lambda *a, **k: pytest.fail("weights were loaded"))
    rows, out = write_rows(tmp_path / "rows.jsonl", ROWS[:1]), tmp_path / "out.jsonl"
    with generate.AnswerFile(out, [], ["base"], {}):
        assert_one_line(run("--prompts", rows, "--out", out, *SHORT), "another process is writing it")
    out.write_bytes(b"notes")
    assert_one_line(run("--prompts", rows, "--out", out, *SHORT), "no answer to a row of these prompts")
    assert out.read_bytes() == b"notes"


def test_a_start_that_fails_leaves_no_empty_file_of_answers(run, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise UserError("no memory")

    monkeypatch.setattr(generate, "load_model", fail)
    rows, out = write_rows(tmp_path / "rows.jsonl", ROWS[:1]), tmp_path / "out.jsonl"
    assert_one_line(run("--prompts", rows, "--out", out, *SHORT), "no memory")
    assert not out.exists()
    out.touch()
    assert_one_line(run("--prompts", rows, "--out", out, *SHORT), "no memory")
    assert out.exists()  # it was there before


def test_a_file_that_was_replaced_before_it_was_locked_is_not_written(run, tmp_path, monkeypatch):
    """Another process ends, and puts its sorted file in place of the one that we opened: our rows would be lost."""
    lock = files.fcntl.flock

    def late(file, kind):
        (tmp_path / "new").write_bytes(b"")
        os.replace(tmp_path / "new", out)
        lock(file, kind)

    rows, out = write_rows(tmp_path / "rows.jsonl", ROWS[:1]), tmp_path / "out.jsonl"
    monkeypatch.setattr(files.fcntl, "flock", late)
    assert_one_line(run("--prompts", rows, "--out", out, *SHORT), "another process is writing it")


def test_two_writers_of_answers_are_refused(run, tmp_path):
    rows, out = write_rows(tmp_path / "rows.jsonl", ROWS[:1]), tmp_path / "out.jsonl"
    with generate.AnswerFile(out, [], ["base"], {}):
        assert_one_line(run("--prompts", rows, "--out", out, *SHORT), "another process is writing it")


# ---- mistakes


def assert_one_line(result, message):
    lines = [line for line in result.err.splitlines() if line.startswith("error")]
    assert result.code == 2
    assert len(lines) == 1 and message in lines[0], result.err
    assert "Traceback" not in result.err
    assert result.err.endswith(lines[0] + "\n") and not result.out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), 'expected one of: "a prompt", --chat, --prompts FILE'),
        (("a", "--chat"), "expected one of"),
        ((" \n",), "the prompt is empty; expected a text"),
        (("a", "--system", "/dev/zero"), "/dev/zero: more than 1,000,000 bytes in it"),
        (("--prompts", "/dev/zero", "--out", "o"), "/dev/zero: more than 1,000,000,000 bytes in it"),
        (("a", "--system", "nowhere.txt"), "--system nowhere.txt: no readable text file"),
        (("a", "--adapter", "nowhere"), "nowhere: no adapter there"),
        (("a", "--compare", "base,nowhere"), "nowhere: no adapter there"),
        (("a", "--model", "nowhere"), "nowhere: no such model folder"),
        (("a", "--merge"), "--merge: there is no adapter to merge"),
        (("a", "--compare", "base,"), "--compare base,: an empty name"),
        (("a", "--compare", "base,b,b"), "--compare base,b,b: a name stands twice"),
        (("a", "--compare", "base,b", "--merge"), "--compare names the adapters itself"),
        (("a", "--temperature", "-1"), "temperature is -1.0, expected 0, or a number from 1e-06 on"),
        (("a", "--top-k", "many"), "argument --top-k: invalid int value: 'many'"),
        (("a", "--temp", "1"), "unknown flag '--temp'; did you mean --temperature?"),
        (("a", "--max_tokens=5"), "unknown flag '--max-tokens=5'; did you mean --max-new-tokens?"),
        (("a", "--xyzzy"), "unknown flag '--xyzzy'; see --help"),
        (("a", "b"), "unexpected argument 'b'; settings are given as --key value, a text of several words in quotes"),
        (("a", "--limit", "2"), "--limit is for --prompts FILE"),
        (("--prompts", "rows", "--out", "o", "--limit", "0"), "--limit is 0, expected at least 1"),
        (("-",), "stdin is empty; expected a prompt"),
        (("a", "--stop", ""), "stop is empty; expected a text that ends the answer"),
        (("a", "--context", "10"), "prompt 1: 22 tokens, but prompt and answer together have room for 10"),
        (("--prompts", "rows"), "--prompts FILE and --out FILE go together"),
        (("--prompts", "nowhere", "--out", "o"), "nowhere: cannot be read"),
        (("--prompts", "./rows", "--out", "rows"), "--out is the file of --prompts"),
    ],
)
def test_a_mistake_gets_one_line(argv, message, run, tmp_path):
    write_rows(tmp_path / "rows", [{"prompt": "a"}])
    assert_one_line(run(*argv), message)


@pytest.mark.parametrize("flag", ["--top-k=3", "--top_p=0.5", "--min-p=0.1", "--seed=7"])
def test_a_flag_of_sampling_without_a_temperature_is_refused(flag, run, base, tmp_path):
    """And is no part of what an answer file says of itself. The model's own temperature counts, too."""
    why = "has no effect without a --temperature above 0; leave it out"
    name = flag.partition("=")[0].replace("_", "-")
    rows = write_rows(tmp_path / "rows", ROWS[:1])
    for more in ((), ("--temperature", "0"), ("--sampling", "model")):
        assert_one_line(run("--prompts", rows, "--out", "out", *SHORT, *more, flag), f"{name} {why}")
    assert not (tmp_path / "out").exists()
    assert run("hi", *SHORT, "--temperature", "1", flag).code == run(*SHORT, "--", flag).code == 0
    folder = shutil.copytree(base, tmp_path / "own")
    own = json.loads((base / "generation_config.json").read_text()) | {"do_sample": True, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(own))
    assert run("hi", *SHORT, "--model", folder, "--sampling", "model", flag).code == 0


def test_a_limit_on_reasoning_without_reasoning_is_refused(run):
    message = "--max-think-tokens has no effect with --no-thinking; leave it out"
    assert_one_line(run("hi", "--no-thinking", "--max-think-tokens", "3"), message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": "b"\n', "malformed JSON at line 2"),
        ('{"prompt": "a"}\n{"ask": "b"}\n', "row 2 (line 2): no prompt in it (found: ask); expected"),
        ('{"prompt": "a"}\n{"prompt": " "}\n', 'row 2 (line 2): prompt is " " (str), expected a text that is not'),
        ('{"prompt": 3}\n', "row 1 (line 1): prompt is 3"),
        ('[{"prompt": "a"}, 7]', "row 2: 7 (int), expected an object with a prompt"),
        ('{"messages": [{"role": "judge", "content": "a"}]}\n', "row 1 (line 1): Unexpected message role 'judge'"),
        ('{"messages": null}\n', "row 1 (line 1): no prompt in it (found: messages); expected"),
        ('{"messages": ["hi"]}\n', "row 1 (line 1): message 1 is 'hi'"),
        ('{"messages": []}\n', "row 1 (line 1): No messages provided"),
        ('{"prompt": "\\ud83d"}\n', "row 1 (line 1): '\\ud83d' at character"),
        ('{"prompt": "a"}\n{"prompt": "' + "b" * 90 + '"}\n', "row 2 (line 2): 111 tokens, but prompt and answer"),
        ("", "no rows in it"),
    ],
)
def test_a_broken_row_is_named(text, message, run, tmp_path):
    """Before anything is answered: the file of answers stays empty."""
    (tmp_path / "rows").write_text(text)
    assert_one_line(run("--prompts", "rows", "--out", "out", "--context", "80", *SHORT), message)
    assert not (tmp_path / "out").exists() or not (tmp_path / "out").read_bytes()


def test_an_adapter_of_another_model_is_named(run, tmp_path, base):
    wide = write_text_model(tmp_path / "wide", hidden_size=64)
    other = write_adapter(tmp_path / "other", wide)
    assert_one_line(run("a", "--model", base, "--adapter", other), f"{other}: does not fit this model")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert_one_line(run("a", "--adapter", other), "names no base model; give --model")


def test_the_first_words_come_quickly(base, tmp_path):
    """From a cold start, in CPU time: at most 5 s to the whole of a short answer."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(ROOT / "generate.py"), "hello", "--model", str(base), *SHORT]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{spent:.2f} s of CPU")
    assert spent <= 5
