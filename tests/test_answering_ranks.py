"""Several ranks answer together: one file, that of one rank; a killed rank loses nothing, and any number of ranks
goes on."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import eval as script
import generate
from psysafe import load_model, load_tokenizer
from psysafe.data.rows import read_prompts
from psysafe.files import ASSETS, open_locked
from psysafe.generation.answer_file import AnswerFile, answer_rows
from psysafe.generation.generator import Answer, Generator
from psysafe.generation.ranks import Ranks, share
from psysafe.generation.request import Options, Request
from psysafe.journal import Journal, key_of
from psysafe.runtime import start
from tests.mistakes import refused
from tests.test_resume import ENVIRONMENT, ROOT
from tests.test_runtime import END_S, two_ranks
from tests.tiny_text_model import write_text_model


def test_long_prompts_are_dealt_out_evenly():
    draw = random.Random(3)
    for n, ranks in ((0, 2), (1, 3), (7, 3), (200, 3), (200, 8)):
        requests = [Request(row, [0] * draw.choice((3, 40, 900))) for row in range(n)]
        shares = [share(requests, rank, ranks) for rank in range(ranks)]
        assert sorted(request.row for part in shares for request in part) == list(range(n))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        tokens = [sum(len(request.ids) for request in part) for part in shares]
        assert max(tokens) - min(tokens) <= 2 * 900
    assert share(requests, 0, 1) == requests


def answer(row: int) -> Answer:
    return Answer(row, f"text {row}", "", f"text {row}", "stop", 3, 4, False)


def answer_file(folder, rank=0, **settings) -> AnswerFile:
    rows = folder / "rows.jsonl"
    if not rows.exists():
        rows.write_text("".join(json.dumps({"prompt": f"question {n}"}) + "\n" for n in range(8)))
    return AnswerFile(folder / "out.jsonl", read_prompts(rows), ["base"], {"seed": 0, **settings}, rank)


def test_what_killed_ranks_wrote_is_taken_over(tmp_path):
    """Also a torn line's row is asked again, and a row that was copied before a kill is there once."""
    with answer_file(tmp_path) as first, answer_file(tmp_path, 1) as second, answer_file(tmp_path, 12) as third:
        first.write("base", answer(1))
        second.write("base", answer(2))
        third.write("base", answer(3))
    rank_file = tmp_path / "out.jsonl.rank1"
    content = rank_file.read_bytes()
    rank_file.write_bytes(content + (tmp_path / "out.jsonl").read_bytes() + content[:50])
    (tmp_path / "out.jsonl.rank1.bak").write_text("not ours")
    with answer_file(tmp_path) as file:
        assert [row.number for row in file.missing("base")] == [4, 5, 6, 7, 8]
        for row in (8, 7, 6, 5, 4):
            file.write("base", answer(row))
        file.finish(lambda: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.rank1.bak", "rows.jsonl"]
    assert [json.loads(line)["row"] for line in (tmp_path / "out.jsonl").open()] == list(range(1, 9))


def test_files_of_ranks_that_do_not_fit_are_refused(tmp_path):
    with answer_file(tmp_path), answer_file(tmp_path, 1) as second:
        second.write("base", answer(2))
    rank_file = tmp_path / "out.jsonl.rank1"
    content = rank_file.read_bytes()
    refused("out.jsonl.rank1 line 1: was made with seed 0, not 5", answer_file, tmp_path, seed=5)
    with open_locked(rank_file):  # its rank still runs
        refused("out.jsonl.rank1: another process is writing it", answer_file, tmp_path)
    rank_file.write_bytes(content + b"notes")
    refused("out.jsonl.rank1: no answer to a row of these prompts", answer_file, tmp_path)
    assert rank_file.read_bytes() == content + b"notes"
    rank_file.write_bytes(content)
    with answer_file(tmp_path) as file:
        refused("out.jsonl: 7 answers of other ranks did not come here", file.finish, lambda: None)


def test_a_rank_without_answers_leaves_no_file(tmp_path):
    with answer_file(tmp_path), answer_file(tmp_path, 1):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_journals_of_ranks_are_put_together(tmp_path):
    keys = [key_of(n) for n in range(4)]
    with Journal(tmp_path / "j") as first, Journal(tmp_path / "j", 1) as second:
        first.append(keys[0], {"n": 0})
        second.append(keys[1], {"n": 1})
        second.collect(lambda: None)
        first.collect(lambda: None)
        assert first.rows == {keys[n]: {"n": n} for n in range(2)}
    with Journal(tmp_path / "j") as first:
        assert len(first.rows) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["j"]


@pytest.mark.parametrize("argv", [["hello"], ["--chat"]])
def test_a_single_prompt_takes_one_rank(argv, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("a prompt or a chat has no rows to share with other ranks; start it without torchrun", generate.main, argv)


class OtherRank(Ranks):
    """One to which no prompt falls."""

    def agree(self, missing):
        pass

    def share(self, requests):
        return []


def test_every_rank_checks_every_prompt(tmp_path):
    generator = Generator(load_model("assets:tiny"), load_tokenizer("assets:tiny"), Options(context=2))
    with answer_file(tmp_path) as file:
        refused(r"row 1 \(line 1\): .* tokens, but prompt and answer together have room for 2; raise --context",
                answer_rows, generator, file, None, OtherRank(start("cpu")))  # fmt: skip


# Real ranks


def flags(folder: Path, out: str) -> list[str]:
    return [
        *("--prompts", str(folder / "rows.jsonl"), "--out", str(folder / out), "--model", str(folder / "base")),
        *("--max-new-tokens", "24", "--temperature", "1", "--device", "cpu"),
    ]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A model, prompts, and what one rank answers (alone.jsonl)."""
    folder = tmp_path_factory.mktemp("ranks")
    write_text_model(folder / "base", num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    prompts = [{"prompt": f"question {n} " * (1 + n % 9)} for n in range(48)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    assert generate.main(flags(folder, "alone.jsonl")) == 0
    return folder


def rank_process(torchrun: subprocess.Popen, rank: int) -> int | None:
    """The process id of a rank, once it runs."""
    for pid in Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return int(pid)
    return None


def answers_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_a_killed_rank_loses_nothing(workspace):
    """Three ranks under torchrun, one killed; two ranks go on; the file is that of one rank, byte for byte."""
    out = workspace / "out.jsonl"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    torchrun = subprocess.Popen(
        [*launch, str(ROOT / "generate.py"), *flags(workspace, "out.jsonl"), "--batch-size", "1"],
        env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while answers_in(workspace / "out.jsonl.rank1") < 3:
        assert torchrun.poll() is None, torchrun.stderr.read()[-2000:]
        time.sleep(0.02)
    os.kill(rank_process(torchrun, 1), signal.SIGKILL)
    _, err = torchrun.communicate(timeout=END_S)
    errors = [line for line in err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "rank 1 died in answer " in errors[0], err[-3000:]
    assert "their answers so far are saved: start again, with any number of ranks" in errors[0]
    n_saved = sum(map(answers_in, [out, *(workspace / f"out.jsonl.rank{rank}" for rank in (1, 2))]))
    assert 3 <= n_saved < 48
    ranks = two_ranks(
        f"import sys, generate\nfrom psysafe.program import main_guard\n"
        f"sys.exit(main_guard(generate.main, {flags(workspace, 'out.jsonl')!r}))"
    )
    errs = [process.communicate(timeout=END_S)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errs
    assert f"base: {n_saved} of 48 rows are in" in errs[0] and not errs[1]
    by_rank_0, in_all = re.search(r"base: (\d+) of (\d+) rows by rank 0, ", errs[0]).groups()
    assert int(in_all) == 48 - n_saved and abs(int(by_rank_0) - int(in_all) / 2) <= 1  # its own share, as in its bar
    assert out.read_bytes() == (workspace / "alone.jsonl").read_bytes()
    assert not list(workspace.glob("out.jsonl.*"))


@pytest.mark.slow
def test_eval_answers_on_ranks(workspace, tmp_path):
    """Two ranks answer, rank 0 judges alone; answers and tables are those of one rank."""
    argv = [
        *("judge", "--prompts", str(ASSETS / "rows" / "val.jsonl"), "--limit", "6", "--model", str(workspace / "base")),
        *("--system", "none,v0", "--no-thinking", "--max-new-tokens", "12", "--judge", "rules", "--device", "cpu"),
    ]
    code = "import sys, eval\nfrom psysafe.program import main_guard\nsys.exit(main_guard(eval.main, {!r}))"
    ranks = two_ranks(code.format([*argv, "--out", str(tmp_path / "two")]))
    _, err = ranks[0].communicate(timeout=END_S)
    assert (ranks[1].wait(), ranks[0].returncode) == (0, 0), err
    assert ranks[1].communicate() == ("", "")
    assert script.main([*argv, "--out", str(tmp_path / "one")]) == 0

    def rows(name):
        return sorted((tmp_path / name / "answers.jsonl").read_text().splitlines())

    assert rows("one") == rows("two") and len(rows("one")) == 12
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert results[0]["tables"] == results[1]["tables"]
