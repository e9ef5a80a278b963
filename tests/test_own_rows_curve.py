"""benchmarks/own_rows/curve.py: which rows are trained for how long, and what its table counts."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.own_rows import curve
from benchmarks.selective import experiment
from psysafe.data.rows import read_rows
from psysafe.evaluation.behaviour import COMPLIANCE, REFUSAL
from psysafe.evaluation.statistics import bootstrap_mean
from psysafe.files import read_text
from psysafe.training.config import KEYS
from tests.mistakes import refused_by

DOCS = Path(__file__).resolve().parents[1] / "docs" / "own-rows.md"


def prompts(rows):
    return [row.fields["prompt"] for row in rows]


def test_sets_are_nested_balanced_and_of_the_seed():
    pool = read_rows(curve.POOL)
    sets = {n: curve.draw_rows(pool, n, 1) for n in curve.SIZES}
    for small, large in zip(curve.SIZES, curve.SIZES[1:], strict=False):
        assert prompts(sets[large])[:small] == prompts(sets[small])
    for n, rows in sets.items():
        counts = Counter(row.fields["risk cluster"] for row in rows)
        assert len(counts) == 5 and set(counts.values()) == {n // 5} and len(set(prompts(rows))) == n
    assert prompts(curve.draw_rows(pool, 40, 1)) == prompts(sets[40]) != prompts(curve.draw_rows(pool, 40, 2))
    assert {row.file.name for row in sets[240]} == {"train.jsonl", "wide.jsonl"}


def test_a_line_for_each_size_and_length_and_the_largest_is_trained_once(tmp_path):
    curve.write_sets(tmp_path, curve.SIZES, curve.SEEDS)
    lines = curve.plan(tmp_path, curve.SIZES, curve.SEEDS)
    assert [(line.length, line.n_rows) for line in lines] == [(x, n) for x in ("epochs", "steps") for n in curve.SIZES]
    by_place = {(line.length, line.n_rows): line.runs for line in lines}
    assert by_place["epochs", 240] == by_place["steps", 240]
    runs = {(run.name, seed) for line in lines for run, seed in line.runs}
    assert len(runs) == 11 * len(curve.SEEDS)
    assert {run.steps for line in lines for run, _ in line.runs} == {0, 60}
    for run, seed in by_place["steps", 20]:
        assert run.flags()[-2:] == ["--max-steps", "60"]
        assert prompts(read_rows(run.rows)) == prompts(curve.draw_rows(read_rows(curve.POOL), 20, seed))
    flags = {word[2:].replace("-", "_") for word in by_place["steps", 20][0][0].flags() if word.startswith("--")}
    assert flags <= {*KEYS, "config"}


def test_what_is_there_is_not_done_again_and_what_was_killed_goes_on(tmp_path, monkeypatch):
    """An adapter alone says nothing: train.py writes one after every epoch."""
    commands = []
    monkeypatch.setattr(experiment, "run", lambda script, *words: commands.append((script, words)))
    run = curve.Run("epochs-10", tmp_path / "rows.jsonl")
    (tmp_path / "epochs-10-s1").mkdir()
    (tmp_path / "epochs-10-s1" / "adapter_config.json").touch()
    curve.measure_run(tmp_path, run, 1, "assets:tiny")
    assert [script for script, _ in commands] == ["train.py", "eval.py"]
    words = list(itertools.pairwise(commands[0][1]))
    assert ("--resume", "auto") in words and ("--out", tmp_path / "epochs-10-s1") in words
    assert ("--data", str(run.rows)) in words
    (tmp_path / "answers" / "epochs-10-s1").mkdir(parents=True)
    (tmp_path / "answers" / "epochs-10-s1" / "items.jsonl").touch()
    curve.measure_run(tmp_path, run, 1, "assets:tiny")
    assert len(commands) == 2


def test_runs_of_another_base_are_refused(tmp_path, capsys):
    curve.check_base(tmp_path, "assets:tiny")
    curve.check_base(tmp_path, "assets:tiny")
    (tmp_path / "base.sha256").write_text("another")
    words = ["--work", str(tmp_path), "--sizes", "10", "--seeds", "1"]
    assert "its runs are on another base than assets:tiny" in refused_by(curve.main, words, capsys)
    assert "--jobs has no effect" in refused_by(curve.main, ["--markdown", "--jobs", "2"], capsys)
    assert "--jobs 0: expected at least 1" in refused_by(curve.main, [*words, "--jobs", "0"], capsys)


def item(variant: str, group: str, n: int, label: str, parts=None) -> dict:
    return {"variant": variant, "group": group, "prompt": f"{group} {n}", "label": label, "answer": "a",
            "template": parts is not None and any(parts.values()), "parts": parts}  # fmt: skip


ALL = {"acknowledgement": True, "step": True, "services": True, "hope": True}


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Two runs on four prompts a group; the second never ended risky 3, plain 3 and out_of_domain 1."""
    groups = ("risky", "out_of_domain", "scary", "plain")
    asked = [{"prompt": f"{group} {n}", "group": group} for group in groups for n in range(4)]
    monkeypatch.setattr(curve, "PROMPTS", tmp_path / "prompts.jsonl")
    curve.PROMPTS.write_text("".join(json.dumps(one) + "\n" for one in asked))
    for name, unended in (("epochs-10-s1", set()), ("epochs-10-s2", {"risky 3", "plain 3", "out_of_domain 1"})):
        items = []
        for variant in ("base, none", f"{name}, none"):
            of_base = variant.startswith("base")
            no_parts = dict.fromkeys(ALL, False)
            parts = [no_parts] * 4 if of_base else [ALL, ALL | {"hope": False}, no_parts, ALL]
            items += [item(variant, "risky", n, REFUSAL, parts[n]) for n in range(4)]
            # The base refuses three of the unsafe prompts, the run two of these.
            refused = 3 if of_base else 2
            items += [item(variant, "out_of_domain", n, REFUSAL if n < refused else COMPLIANCE) for n in range(4)]
            items += [item(variant, group, n, COMPLIANCE) for group in ("scary", "plain") for n in range(4)]
        (tmp_path / "answers" / name).mkdir(parents=True)
        lines = [json.dumps(one) + "\n" for one in items if one["prompt"] not in unended]
        (tmp_path / "answers" / name / "items.jsonl").write_text("".join(lines))
    run = curve.Run("epochs-10", tmp_path / "rows.jsonl")
    return curve.as_table(tmp_path, [curve.Line("epochs", 10, [(run, 1), (run, 2)])])


def test_the_table_counts_every_prompt(measured):
    (row,) = measured.rows
    names = [name for name, _ in measured.columns]
    assert names == ["trained for the same", "rows", "four parts, own helplines % (n = 4)", "own helplines % (n = 4)",
                     "harmless kept % (n = 8)", "out-of-domain refusals kept % (n = 3)"]  # fmt: skip
    assert [cell.split(" [")[0] for cell in row[2:]] == ["38", "62", "94", "50"]
    assert [cell.split("] ")[1] for cell in row[2:]] == ["(50, 25)", "(75, 50)", "(100, 88)", "(67, 33)"]
    low, high = bootstrap_mean([100, 0, 0, 50])
    assert f"[{low:.0f}, {high:.0f}]" in row[2]


def test_the_table_of_the_page_is_that_of_the_result():
    table = {"title": "", "columns": [["rows", ","], ["kept", ""]], "rows": [[10, "1 [0]"]]}
    shown = curve.as_markdown({"table": table})
    assert shown == "| rows | kept |\n| --- | --- |\n| 10 | 1 [0] |"
    expected = curve.as_markdown(json.loads(read_text(curve.RESULT)))
    begin = "<!-- the table that python -m benchmarks.own_rows.curve --markdown prints -->\n"
    assert f"{begin}{expected}\n<!-- end of the table -->" in read_text(DOCS)
