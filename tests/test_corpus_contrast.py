"""python -m psysafe.corpus contrast: which of the base's answers become rows, and why the others do not."""

import json
import random
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from psysafe.corpus import contrast
from psysafe.corpus.__main__ import main
from psysafe.corpus.texts import prompts_of
from psysafe.data.rows import Row, read_file, read_rows
from psysafe.data.text import normalise
from psysafe.evaluation import behaviour
from psysafe.files import ASSETS
from psysafe.program import main_guard
from tests.mistakes import refused_by
from tests.stub_endpoint import StubEndpoint, reply_by
from tests.test_assets import HOW_TO, MEANS_AND_PEOPLE

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ASSETS / "contrast_prompts.jsonl"
# Prompts that evaluations ask: nothing near them may be trained.
FIXTURES = ROOT / "tests" / "fixtures"
EVALUATED = [ASSETS / "rows" / "val.jsonl", FIXTURES / "unseen_prompts.jsonl", FIXTURES / "eval" / "xstest.csv"]
EVALUATED += sorted((ROOT / "benchmarks" / "selective").glob("*.jsonl"))
REFUSES, ANSWERS = "I can't help with that.", "Here is how it is done."


def answer(prompt: str, group: str, text: str, **more) -> dict:
    fields = {"prompt": prompt, "group": group, "answer": text, "reasoning": "Why.", "finish_reason": "stop"}
    return {**fields, "adapter": "base", "row": 1, "settings": {"system": "none"}, **more}


ROWS = [
    answer("Which river crosses Vienna?", "plain", ANSWERS, **{"class": "geography"}),
    answer("Can a bug kill my program?", "scary", ANSWERS),
    answer("Forge a letter for me.", "out_of_domain", REFUSES),
    answer("Is the knife sharp?", "scary", REFUSES),  # harmless, but refused
    answer("Copy a film for me.", "out_of_domain", ANSWERS),  # unsafe, but answered
    answer("Hello there.", "plain", ANSWERS, stucked="true"),
    answer("Good morning.", "plain", ANSWERS, finish_reason="length"),
    answer("Good evening.", "plain", "  "),
    answer("So which river crosses Vienna?", "plain", ANSWERS),  # one word more: near the first
    answer("My aunt asks: what is the best bread in town?", "plain", ANSWERS),  # near an evaluation prompt
    answer("What may a very long answer be?", "plain", ANSWERS * 40),
]


@pytest.fixture
def files(tmp_path):
    paths = {"answers": ROWS, "evaluated": [{"prompt": "What is the best bread for me?"}]}
    for name, rows in paths.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def words(folder: Path, *more: str) -> list[str]:
    judge = () if "--judge-url" in more else ("--judge", "rules")
    return ["contrast", str(folder / "answers.jsonl"), "--out", str(folder / "out.jsonl"), *judge, *more]


def test_every_answer_becomes_a_row_or_is_counted(files, capsys):
    assert main(words(files, "--not-in", str(files / "evaluated.jsonl"), "--max-tokens", "100")) == 0
    rows = [json.loads(line) for line in (files / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in ROWS[:3]]
    assert rows[0] == {"prompt": ROWS[0]["prompt"], "answer": ANSWERS, "reasoning": "Why.", "group": "plain",
                       "class": "geography"}  # fmt: skip
    printed = capsys.readouterr().out
    reasons = ("unfinished reasoning", "cut at the token limit", "empty", "harmless, but refused", "near duplicate",
               "unsafe, but answered", "5 words in a row with an evaluation prompt", "over 100 tokens")  # fmt: skip
    assert all(f"1 {reason}" in printed for reason in reasons), printed
    assert "11 answers" in printed and "3 contrast rows" in printed
    assert [row.reasoning for row in read_rows(files / "out.jsonl")] == ["Why."] * 3  # training reads them


def test_a_judge_decides_and_a_failed_item_is_told(files, monkeypatch, capsys):
    monkeypatch.setenv("PSYSAFE_JUDGE_KEY", "none")

    def class_of(asked: str) -> str:
        return "2_full_refusal" if "Forge" in asked else "3_partial_refusal" if "kill" in asked else "1_full_compliance"

    reply_by(monkeypatch, class_of)
    with StubEndpoint() as stub:
        code = main(words(files, "--judge-url", stub.url, "--judge-model", "j", "--max-tokens", "100"))
    assert code == 0
    prompts = [row.fields["prompt"] for row in read_file(files / "out.jsonl")]
    # The judge finds "Is the knife sharp?" answered, whatever the words say; a partial refusal is no contrast row.
    assert prompts == [ROWS[i]["prompt"] for i in (0, 2, 3, 9)]
    assert "1 refused in part, or no clear verdict" in capsys.readouterr().out


def test_a_prompt_that_is_too_long_is_refused_before_a_judge_is_asked(files, capsys):
    rows = [*ROWS, answer("word " * 5_000, "plain", ANSWERS)]
    (files / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with StubEndpoint() as stub:
        line = refused_by(main, words(files, "--judge-url", stub.url, "--judge-model", "j"), capsys)
    assert "row 12 (line 12): the prompt has 25,000 characters, some 6,250 tokens" in line and not stub.seen


WRONG = {
    "no group": ({"group": None}, r"group is null, expected rows of generate.py"),
    "a risky prompt": ({"group": "risky"}, "group is 'risky', expected one of plain, scary, out_of_domain"),
    "a tuned model's": ({"adapter": "runs/x"}, "answered with adapter 'runs/x'; contrast rows hold the base's own"),
    "a conversation": ({"messages": [{"role": "user", "content": "Hi"}]}, "answers a conversation or has tools"),
    "no end": ({"finish_reason": 3}, "finish_reason is 3, expected rows of generate.py"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_row_of_something_else_is_refused(name, files, capsys):
    change, expected = WRONG[name]
    (files / "answers.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1] | change) + "\n")
    line = refused_by(main, words(files), capsys)
    assert f"{files / 'answers.jsonl'} row 2 (line 2): {expected}" in line
    assert not (files / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--device", "cpu"], "--device has no effect without --judge-local"),
        (["--workers", "3"], "--workers has no effect without --judge-url"),
        (["--max-tokens", "3"], "no contrast row is left of 11 answers"),
    ],
)
def test_mistakes(more, named, files, capsys):
    assert named in refused_by(main, words(files, *more), capsys)
    assert not (files / "out.jsonl").exists()


def test_the_answers_are_not_overwritten(files, capsys):
    argv = ["contrast", str(files / "answers.jsonl"), "--out", str(files / "answers.jsonl"), "--judge", "rules"]
    assert "would be overwritten" in refused_by(main, argv, capsys)
    assert main_guard(main, ["contrast", "missing.jsonl", "--out", str(files / "o"), "--judge", "rules"]) == 2


def test_near_duplicates_are_those_of_the_definition():
    """The search compares only rows with a rare word in common; all pairs give the same answer."""
    generator = random.Random(0)
    prompts = [" ".join(generator.choices("abcdefghij", k=generator.randint(1, 9))) for _ in range(400)]
    rows = [Row({"prompt": p, "group": generator.choice("xy")}, Path("f"), i) for i, p in enumerate(prompts)]
    selected: list[Row] = []
    for row in rows:
        words = set(row.fields["prompt"].split())
        others = (set(o.fields["prompt"].split()) for o in selected if o.fields["group"] == row.fields["group"])
        if not any(len(words & other) >= 0.8 * len(words | other) for other in others):
            selected.append(row)
    assert contrast.without_near_duplicates(rows) == selected
    assert 100 < len(selected) < 390


def test_word_runs():
    runs = contrast.word_runs(["One two, three FOUR five six!", "Just two"])
    assert runs == {"one two three four five", "two three four five six", "just two"}


# The bundled prompts


def test_the_bundled_prompts_are_many_and_unlike():
    rows = [row.fields for row in read_file(BUNDLED)]
    groups = Counter(row["group"] for row in rows)
    assert len(rows) >= 600 and groups.keys() == contrast.EXPECTED.keys() and min(groups.values()) >= 150
    assert all(row.keys() == {"prompt", "group", "class"} and row["prompt"].strip() == row["prompt"] for row in rows)
    assert contrast.without_near_duplicates(read_file(BUNDLED)) == read_file(BUNDLED)
    assert max(len(row["prompt"].split()) for row in rows) <= 25


def test_no_bundled_prompt_is_near_an_evaluation_prompt():
    evaluated = contrast.word_runs(prompt for path in EVALUATED for prompt in prompts_of(path))
    assert {p for p in prompts_of(BUNDLED) if contrast.word_runs([p]) & evaluated} == set()
    planted = next(p for p in prompts_of(EVALUATED[-1]) if len(normalise(p).split()) >= contrast.RUN)
    assert contrast.word_runs([f"Well, {planted}"]) & evaluated


def test_the_bundled_contrast_rows_are_the_bases_answers_to_bundled_prompts():
    group_of = {row.fields["prompt"]: row.fields["group"] for row in read_file(BUNDLED)}
    rows = read_rows(ASSETS / "rows" / "contrast.jsonl")
    assert len(rows) > 500 and all(group_of[row.fields["prompt"]] == row.fields["group"] for row in rows)
    for row in rows:
        expected = contrast.EXPECTED[row.fields["group"]]
        assert behaviour.by_word_lists(row.fields["answer"]) == expected, row.fields


def test_rows_in_other_words_are_the_demos_with_other_prompts():
    rows, other = (read_rows(ASSETS / "rows" / f"{name}.jsonl") for name in ("train", "wide"))
    answers = {row.fields["risk category"]: {**row.fields, "prompt": ""} for row in rows}
    for row in other:
        prompt = row.fields["prompt"]
        assert {**row.fields, "prompt": ""} == answers[row.fields["risk category"]]
        assert not HOW_TO.search(prompt) and not MEANS_AND_PEOPLE.search(prompt), prompt
    prompts = [row.fields["prompt"].lower() for row in (*rows, *other)]
    assert len(set(prompts)) == len(prompts)
    evaluated = contrast.word_runs(prompt for path in EVALUATED for prompt in prompts_of(path))
    assert not [row for row in other if contrast.word_runs([row.fields["prompt"]]) & evaluated]


def test_what_choices_were_made_on_is_not_what_is_reported():
    folder = ROOT / "benchmarks" / "selective"
    texts = {path.name: list(map(normalise, prompts_of(path))) for path in sorted(folder.glob("*.jsonl"))}
    assert len(texts) >= 2
    for first, second in combinations(texts, 2):
        assert not set(texts[first]) & set(texts[second])
    runs = {name: contrast.word_runs(prompts) for name, prompts in texts.items()}
    assert not runs["dev.jsonl"] & set().union(*(r for name, r in runs.items() if name.startswith("unseen")))
