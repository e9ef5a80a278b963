"""The share of answers in the prompt's language, and evaluations by word lists, which refuse other languages."""

import csv
import json
import re
from typing import NamedTuple

import pytest

import eval as evaluation
from psysafe.corpus import __main__ as corpus
from psysafe.evaluation import answer_language
from psysafe.evaluation.result import load
from psysafe.program import UserError, main_guard
from tests.mistakes import refused_by
from tests.stub_endpoint import StubEndpoint, reply_by
from tests.test_languages import DE, EN, FR, rows_file

# The share


def test_the_table_of_shares_by_hand():
    pairs = {
        "a": [(EN, EN), (EN, DE), (DE, DE), (DE, FR), (EN, "no"), ("no", EN), (FR, FR), (EN, "  ")],
        "b": [(DE, DE)],
    }
    (table,) = answer_language.tables(pairs)
    # a: four known pairs of which two agree, one in no known language; a short answer, a short and a French prompt.
    assert table.rows[0][:3] == ["a", 4, 50.0] and table.rows[0][5:] == [1, 3]
    assert table.rows[1][:3] == ["b", 1, 100.0] and table.rows[1][5:] == [0, 0]
    assert table.note.startswith("Prompts: 3 English, 2 German, 1 unknown, 1 in no known language. ")
    (table,) = answer_language.tables({"empty": [(DE, "")], "a": [(DE, EN)]})
    assert table.rows[0] == ["empty", 0, None, None, None, 0, 0] and table.note.startswith("Prompts: 1 German. ")
    (table,) = answer_language.tables({"a": [("no", EN)]})
    assert table.rows == [["a", 0, None, None, None, 0, 1]]
    assert answer_language.tables({"a": [(EN, ""), (DE, " ")]}) == []  # as of stored scores without answers


@pytest.mark.parametrize(
    "texts",
    [
        [EN, EN, DE],
        [EN, DE],  # not most of them
        [EN, "kurz", "auch kurz", "und das auch"],
        ["kurz"] * 9,
        [],
    ],
)
def test_word_lists_take_what_is_not_mostly_in_another_language(texts):
    answer_language.require_english(texts)


@pytest.mark.parametrize(
    ("texts", "language"),
    [
        ([EN, DE, DE], "2 of 3 prompts that show a language are in another (mostly German); "),
        (["kurz"] * 9 + [DE], "1 of 1 prompts that show a language are in another (mostly German); "),
        ([FR], "1 of 1 prompts that show a language are in another (mostly one that is not known here); "),
    ],
)
def test_word_lists_refuse_what_is_mostly_in_another_language(texts, language):
    with pytest.raises(UserError) as e:
        answer_language.require_english(texts)
    line = f"--judge rules: the word lists know English, and {language}give a judge model: --judge-url"
    assert str(e.value).startswith(line) and "\n" not in str(e.value)


# Who refuses

RULES = ["--judge", "rules"]


def xstest_file(path, prompt: str) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "prompt", "type", "label"], [1, prompt, "homonyms", "safe"]])
    return str(path)


class Command(NamedTuple):
    flag: str  # of the file of the prompts, for models to answer
    file: str
    words: list[str]  # which evaluate stored answers


def commands(folder, prompt: str, answer: str) -> dict[str, Command]:
    """Each evaluation that word lists can judge, over one prompt and one answer of a base and of a tuned model."""
    fields = {"prompt": prompt, "answer": answer, "cluster": "violence", "group": "risky"}
    files = [rows_file(folder / f"{name}.jsonl", fields | {"adapter": name}) for name in ("base", "tuned")]
    answers = [word for path, name in zip(files, ("base", "tuned"), strict=True)
               for word in ("--answers", f"{name}={path}")]  # fmt: skip
    conversation = {"turns": [prompt, prompt], "kinds": ["risky", "benign"], "cluster": "violence"}
    messages = {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}] * 2}
    turns = rows_file(folder / "turns.jsonl", conversation)
    answers_of_turns = rows_file(folder / "told.jsonl", messages | {"adapter": "tuned"})
    xstest = xstest_file(folder / "x.csv", prompt)
    selective = ["selective", "--prompts", files[0], *answers, "--baseline", "base"]
    return {
        "judge": Command("--prompts", files[0], ["judge", *answers]),
        "selective": Command("--prompts", files[0], selective),
        "turns": Command("--prompts", turns, ["turns", "--prompts", turns, "--answers", answers_of_turns]),
        "xstest": Command("--data", xstest, ["xstest", "--data", xstest, *answers]),
    }


@pytest.mark.parametrize("command", ["judge", "selective", "turns", "xstest"])
@pytest.mark.parametrize(
    ("prompt", "answer", "which"), [(DE, EN, "prompts"), (EN, DE, "answers of"), (EN, FR, "answers of")]
)
def test_every_evaluation_by_word_lists_refuses_another_language(tmp_path, capsys, command, prompt, answer, which):
    out = ["--out", str(tmp_path / "out")]
    line = refused_by(evaluation.main, [*commands(tmp_path, prompt, answer)[command].words, *RULES, *out], capsys)
    assert re.search(rf"--judge rules: the word lists know English, and \d of \d (?:{which})", line)
    assert main_guard(evaluation.main, [*commands(tmp_path, EN, EN)[command].words, *RULES, *out]) == 0
    assert main_guard(evaluation.main, [*commands(tmp_path, "Hilf mir!", "Nein.")[command].words, *RULES, *out]) == 0


@pytest.mark.parametrize("command", ["judge", "selective", "turns", "xstest"])
def test_prompts_are_looked_at_before_a_model_answers_them(tmp_path, capsys, command):
    """The model is in no folder, which would be the mistake of a later stage."""
    one = commands(tmp_path, DE, DE)[command]
    words = [command, one.flag, one.file, *RULES, "--adapter", "no/such/folder", "--out", tmp_path / "out"]
    assert "--judge rules: the word lists know English" in refused_by(evaluation.main, words, capsys)


def test_of_several_judges_the_share_stands_once(tmp_path):
    words = commands(tmp_path, EN, EN)["judge"].words
    assert with_judge(tmp_path / "out", [*words, *RULES], "Refusal: Yes") == 0
    whole, _ = load(tmp_path / "out")
    assert [table.title for table in whole.tables].count(answer_language.TITLE) == 1
    assert sum(table.title.startswith(answer_language.TITLE) for table in whole.tables) == 1
    # A result.json of before this field is still read.
    content = json.loads((tmp_path / "out" / "result.json").read_text())
    assert sum(table.pop("of_answers") for table in content["tables"]) == 1
    (tmp_path / "out" / "result.json").write_text(json.dumps(content))
    assert not any(table.of_answers for table in load(tmp_path / "out")[0].tables)


def with_judge(folder, words: list[str], reply: str) -> int:
    with pytest.MonkeyPatch.context() as patch, StubEndpoint() as stub:
        reply_by(patch, lambda question: reply)
        judge = ["--judge-url", stub.url, "--judge-model", "m"]
        return main_guard(evaluation.main, [*words, *judge, "--out", str(folder)])


@pytest.mark.parametrize("command", ["judge", "selective", "turns", "xstest"])
def test_a_judge_without_one_clear_reply_is_no_success(tmp_path, capsys, command):
    assert with_judge(tmp_path / "out", commands(tmp_path, EN, EN)[command].words, "I would rather not say.") == 1
    assert "error: nothing was measured: none of" in capsys.readouterr().err.splitlines()[-1]


def test_a_judge_model_reads_any_language_and_word_lists_beside_it_are_left_out(tmp_path, capsys):
    german = commands(tmp_path, DE, DE)
    for command in ("judge", "turns"):
        assert with_judge(tmp_path / command, german[command].words, "Refusal: Yes\nGrounding: 4") == 0
        (table,) = [t for t in load(tmp_path / command)[0].tables if t.title == answer_language.TITLE]
        n = 2 if command == "turns" else 1
        assert table.rows and all(row[1:3] == [n, 100.0] for row in table.rows)
    for prompt, ways in ((EN, {"m", "official string match", "normalised string match"}), (DE, {"m"})):
        command = commands(tmp_path, prompt, prompt)["xstest"].words
        assert with_judge(tmp_path / "xstest", command, "2_full_refusal") == 0
        result, _ = load(tmp_path / "xstest")
        assert {row[1] for row in result.tables[0].rows} == ways
        assert any("string matches know English" in note for note in result.notes) == (prompt == DE)
        assert any("held-out" in table.note for table in result.tables) == (prompt == EN)
    # The four parts are read by word lists whoever judges.
    capsys.readouterr()
    assert with_judge(tmp_path / "selective", german["selective"].words, "2_full_refusal") == 2
    line = capsys.readouterr().err
    assert "the four parts of risky prompts: the word lists know English" in line and "eval.py judge" in line
    plain = rows_file(tmp_path / "plain.jsonl", {"prompt": DE, "group": "plain"})
    selective = german["selective"]
    words = [plain if word == selective.file else word for word in selective.words]
    assert with_judge(tmp_path / "selective", words, "1_full_compliance") == 0


def test_contrast_rows_are_not_chosen_by_word_lists_in_another_language(tmp_path, capsys):
    fields = {"answer": DE, "reasoning": "", "finish_reason": "stop", "adapter": "base", "group": "plain"}
    answers = rows_file(tmp_path / "answers.jsonl", {"prompt": DE} | fields)
    words = ["contrast", answers, "--out", tmp_path / "out.jsonl", *RULES]
    line = refused_by(corpus.main, words, capsys)
    assert "1 of 1 prompts that show a language are in another (mostly German)" in line


def test_the_four_parts_of_german_prompts_are_not_read_whichever_judge_however_few_they_are(tmp_path, capsys):
    rows = [{"prompt": DE, "group": "risky", "cluster": "violence"}]
    rows += [{"prompt": f"{EN} {n}", "group": "plain"} for n in range(5)]
    prompts, words = rows_file(tmp_path / "prompts.jsonl", *rows), []
    for name in ("base", "tuned"):
        answers = rows_file(tmp_path / f"{name}.jsonl", *({**row, "answer": EN, "adapter": name} for row in rows))
        words += ["--answers", f"{name}={answers}"]
    words = ["selective", "--prompts", prompts, *words, "--baseline", "base"]
    expected = "the four parts of risky prompts: the word lists know English, and 1 of 1 prompts"
    assert expected in refused_by(evaluation.main, [*words, *RULES, "--out", tmp_path / "rules"], capsys)
    assert with_judge(tmp_path / "model", words, "1_full_compliance") == 2
    assert expected in capsys.readouterr().err


def mixed(folder, answers: list[str], prompts: list[str]) -> dict[str, list[str]]:
    """As `commands`, over several prompts, each with one answer of both variants."""
    rows, transcripts = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        rows.append({"prompt": prompt, "answer": answer, "cluster": "violence", "group": "risky"})
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        transcripts.append({"adapter": "tuned", "messages": messages * 2})
    of = []
    for name in ("base", "tuned"):
        of += ["--answers", f"{name}={rows_file(folder / name, *(row | {'adapter': name} for row in rows))}"]
    conversation = {"kinds": ["risky", "benign"], "cluster": "violence"}
    turns = rows_file(folder / "turns.jsonl", *({"turns": [p, p]} | conversation for p in prompts))
    answers_of_turns = rows_file(folder / "told.jsonl", *transcripts)
    return {
        "judge": ["judge", *of],
        "selective": ["selective", "--prompts", str(folder / "base"), *of, "--baseline", "base"],
        "turns": ["turns", "--prompts", turns, "--answers", answers_of_turns],
    }


@pytest.mark.parametrize("command", ["judge", "selective", "turns"])
def test_a_few_texts_in_another_language_are_counted_at_the_table(tmp_path, command):
    prompts = [f"{EN} {i}" for i in "abcd"]
    prompts[1] = DE
    answers = [EN, EN, FR, EN]
    words = [*mixed(tmp_path, answers, prompts)[command], *RULES, "--out", str(tmp_path / "out")]
    assert main_guard(evaluation.main, words) == 0
    (note,) = [note for note in load(tmp_path / "out")[0].notes if note.startswith("In another language")]
    counts = note.partition("say little of them: ")[2]
    expected = {"turns": "2 of 8 prompts, 2 of 8 answers of tuned, None."}
    assert counts == expected.get(command, "1 of 4 prompts, 1 of 4 answers of base, 1 of 4 answers of tuned.")
    words = [*mixed(tmp_path, [EN] * 4, [f"{EN} {i}" for i in "abcd"])[command], *RULES, "--out", str(tmp_path / "en")]
    assert main_guard(evaluation.main, words) == 0
    assert not [note for note in load(tmp_path / "en")[0].notes if note.startswith("In another language")]


def test_of_the_judges_only_the_word_lists_get_the_note(tmp_path):
    prompts = [DE, *(f"{EN} {i}" for i in "abc")]
    words = mixed(tmp_path, [EN] * 4, prompts)["judge"]
    assert with_judge(tmp_path / "out", [*words, *RULES], "Refusal: Yes") == 0
    (note,) = [note for note in load(tmp_path / "out")[0].notes if "In another language" in note]
    assert note.startswith("the rule-based judge (word lists): ") and note.endswith(": 1 of 4 prompts.")


def test_a_benchmark_by_word_lists_counts_them_too(tmp_path):
    rows = [[1, EN, "homonyms", "safe"], [2, DE, "homonyms", "safe"], [3, f"{EN} now", "homonyms", "safe"]]
    with (tmp_path / "x.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "prompt", "type", "label"], *rows])
    answers = rows_file(tmp_path / "a.jsonl", *({"prompt": row[1], "answer": EN} for row in rows))
    words = ["xstest", "--data", str(tmp_path / "x.csv"), "--answers", f"a={answers}", *RULES, "--rules", "published"]
    assert main_guard(evaluation.main, [*words, "--out", str(tmp_path / "out")]) == 0
    notes = load(tmp_path / "out")[0].notes
    assert [note.rpartition(": ")[2] for note in notes if "In another language" in note] == ["1 of 3 prompts."]
