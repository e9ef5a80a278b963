"""A stratified sample of prompts: drawn per cluster, the same for every variant, and said."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import eval as script
from psysafe.evaluation.models_under_test import ModelUnderTest
from psysafe.evaluation.sample import Sample
from tests.mistakes import refused_by
from tests.test_eval_run import run

CLUSTERS = {f"p{i}": ("substance", "weapon", "violence", "")[i % 4] for i in range(60)}


@given(st.permutations(list(CLUSTERS)), st.integers(1, 20), st.integers(0, 99))
def test_a_draw_depends_on_the_seed_and_the_prompts_alone(prompts, n, seed):
    drawn, _ = Sample(n, seed).draw({p: CLUSTERS[p] for p in prompts})
    again, _ = Sample(n, seed).draw(CLUSTERS)
    assert drawn == [p for p in prompts if p in set(again)]
    for cluster in set(CLUSTERS.values()):
        assert sum(CLUSTERS[p] == cluster for p in drawn) == min(n, 15)
    # What another cluster holds changes nothing, and a larger sample holds the smaller one.
    alone, _ = Sample(n, seed).draw({p: c for p, c in CLUSTERS.items() if c == "weapon"})
    assert alone == [p for p in again if CLUSTERS[p] == "weapon"]
    assert set(again) <= set(Sample(n + 1, seed).draw(CLUSTERS)[0])
    assert ("fewer" in Sample(n, seed).draw(CLUSTERS)[1]) == (n > 15)


def test_every_prompt_is_as_likely():
    """4,000 seeds: how often each of 15 prompts is among 5 (binomial: 1,333, standard deviation 30)."""
    weapons = {p: c for p, c in CLUSTERS.items() if c == "weapon"}
    counts = dict.fromkeys(weapons, 0)
    for seed in range(4000):
        for prompt in Sample(5, seed).draw(weapons)[0]:
            counts[prompt] += 1
    assert all(abs(count - 4000 / 3) < 150 for count in counts.values()), counts


def rows(tmp_path: Path, name: str, **more) -> Path:
    path = tmp_path / f"{name}.jsonl"
    texts = [{"prompt": f"p{i}", "risk cluster": cluster, **more} for i, cluster in
             enumerate(["substance"] * 9 + ["weapon"] * 3 + ["benign"] * 9)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in (texts if name == "base" else texts[::-1])))
    return path


def judged(out: Path) -> tuple[dict[str, set], list[str]]:
    """(the judged prompts by variant, the notes)."""
    prompts: dict[str, set] = {}
    for line in (out / "items.jsonl").read_text().splitlines():
        prompts.setdefault(json.loads(line)["variant"], set()).add(json.loads(line)["prompt"])
    return prompts, json.loads((out / "result.json").read_text())["notes"]


NOTE = (
    "sample of 5 prompts per cluster, seed 3: 8 of 12 prompts, 2 clusters; taken whole, for they have fewer: weapon (3)"
)


def test_stored_answers_and_prompts_are_sampled_alike(tmp_path, monkeypatch):
    files = [f"--answers={name}={rows(tmp_path, name, answer='No.')}" for name in ("base", "tuned")]
    sampled = ["--judge", "rules", "--sample-per-cluster", "5", "--seed", "3"]
    assert run("judge", *files, *sampled, "--out", str(tmp_path / "stored")) == 0
    prompts, notes = judged(tmp_path / "stored")
    assert notes[-1] == NOTE and prompts["base"] == prompts["tuned"] and len(prompts["base"]) == 8
    assert notes[0].endswith("benign, not judged: 9, compared: 8")
    assert {"p9", "p10", "p11"} <= prompts["base"]
    asked = []

    def answers(self, variants, questions, out):
        asked.extend(question.prompt for question in questions)
        row = {"answer": "No.", "response": "No.", "unfinished_thinking": False}
        return {v: {q.number: {"prompt": q.prompt, **row} for q in questions} for v in variants}

    monkeypatch.setattr(ModelUnderTest, "answers", answers)
    monkeypatch.setattr(ModelUnderTest, "summary", lambda self: {"model": "stub"})
    words = ["judge", "--prompts", str(rows(tmp_path, "prompts")), *sampled, "--system", "none,v0"]
    assert run(*words, "--out", str(tmp_path / "answered")) == 0
    by_variant, notes = judged(tmp_path / "answered")
    assert set(asked) == prompts["base"] and notes[-1] == NOTE  # only these were answered
    assert list(by_variant.values()) == [prompts["base"]] * 2
    other = ["judge", *files, "--judge", "rules", "--sample-per-cluster", "5", "--out", str(tmp_path / "seed 0")]
    assert run(*other) == 0 and judged(tmp_path / "seed 0")[0] != prompts


@pytest.mark.parametrize(("words", "message"), [
    (["--sample-per-cluster", "0"], "'0' is no whole number above 0"),
    (["--sample-per-cluster", "2"], "no row names a cluster"),
])  # fmt: skip
def test_mistakes(words, message, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "answer": "a"}\n')
    command = ["judge", "--answers", tmp_path / "a.jsonl", "--judge", "rules", "--out", tmp_path / "out", *words]
    assert message in refused_by(script.main, command, capsys)


def test_benign_rows_alone_are_said_to_be_that(tmp_path, capsys):
    """Not that no row names a cluster."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "risk cluster": "benign"}\n')
    command = ["judge", "--prompts", tmp_path / "a.jsonl", "--judge", "rules", "--out", tmp_path / "out"]
    assert "every row is benign" in refused_by(script.main, [*command, "--sample-per-cluster", "2"], capsys)
