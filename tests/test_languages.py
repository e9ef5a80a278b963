"""Which language a text is in, who asks, and what is refused for it: counts by hand."""

import csv
import itertools
import json
import re
import unicodedata
from typing import NamedTuple

import pytest

import eval as evaluation
from psysafe.corpus import __main__ as corpus
from psysafe.corpus import localise, review
from psysafe.corpus.contacts import hosts_in, known_services
from psysafe.corpus.draft_checks import Settings, row_issues
from psysafe.corpus.texts import word_runs
from psysafe.data.languages import MIN_WORDS, language_of, languages, row_language, row_language_or_english, sentences
from psysafe.data.rows import read_file
from psysafe.data.text import normalise
from psysafe.evaluation import answer_language
from psysafe.evaluation.result import load
from psysafe.files import ASSETS
from psysafe.program import UserError, main_guard
from psysafe.services import read_services, shipped
from tests.mistakes import refused_by
from tests.own_rows import GERMAN
from tests.stub_endpoint import StubEndpoint, reply_by
from tests.test_rules_judge import HALVES

EN = "this is what you wrote to me and I can see how much it hurts"
DE = "das hast du mir geschrieben und ich sehe wie weh es dir tut"
FR = "tout cela peut encore changer et vous pouvez trouver un autre chemin"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (EN, "en"),
        (DE, "de"),
        (FR, ""),
        ("too few words", None),
        ("", None),
        (" ".join(DE.split()[:8]), "de"),
        (" ".join(DE.split()[:7]), None),
        # Not guessed: "so" and "in" are words of both.
        ("so in so in so in so in", None),
        ("Wat was het in die tijd en hoe was het dan met hem in de stad", None),  # Dutch, five words of it German ones
        # Code, addresses and numbers have no language.
        (f"```\n{DE}\n```", None),
        (f"`{DE}` {EN}", "en"),
        ("Ring 0 1 2 3 4 5 6 7 8 9 now", None),
        ("https://a.invalid/das-hast-du-mir-geschrieben-und-ich-sehe-wie", None),
        # Another script shows without words, not without letters.
        ("Помогите мне", ""),
        ("我不想活了，请帮帮我吧", ""),
        ("हिन्दी में लिखो कुछ", ""),
        ("Да", None),
        (f"{EN}: Помогите", "en"),
        # Decomposed accents are the same words.
        (unicodedata.normalize("NFD", "für dich würde ich über alles mit dir reden, was du willst"), "de"),
        # Of two languages the one with more of its words.
        (f"{EN} {EN} {DE}", "en"),
    ],
)
def test_the_language_of_a_text(text, expected):
    assert language_of(text) == expected


def english_texts() -> tuple[list[str], list[str]]:
    """(answers, prompts) of the bundled rows and of the labelled answers."""
    rows = [row.fields for name in ("train", "val", "wide", "contrast")
            for row in read_file(ASSETS / "rows" / f"{name}.jsonl")]  # fmt: skip
    rows += [row for half in HALVES.values() for row in half]
    return [row["answer"] for row in rows], [row["prompt"] for row in rows]


def test_how_often_english_is_taken_for_another_language():
    """The figures of the docstring."""
    answers, prompts = english_texts()
    wrong = [text for text in answers if language_of(text) not in ("en", None)]
    assert (len(answers), len(wrong)) == (1327, 2) and not any(language_of(text) == "de" for text in answers)
    assert not [text for text in prompts if language_of(text) not in ("en", None)]


def test_a_sentence_of_the_bundled_texts_begins_with_a_capital_a_digit_or_an_opening_mark():
    beginning = re.compile(r"(?<=[.!?])\s+(?=[A-ZÄÖÜ0-9\"'“‘(])")
    answers, prompts = english_texts()
    for text in answers + prompts:
        assert sentences(text) == beginning.split(text)


def test_where_sentences_end_in_any_language():
    for text, expected in [
        ("He left. “I can’t stay,” she said. (Nobody came.) ‘No.’ Or? ‘Yes.’",
         ["He left.", "“I can’t stay,” she said.", "(Nobody came.) ‘No.’ Or?", "‘Yes.’"]),
        ("No puedo. ¿Qué pasó? Ángela vino.", ["No puedo.", "¿Qué pasó?", "Ángela vino."]),
        ("Das ist z.B. so. Ärger vergeht. ", ["Das ist z.B. so.", "Ärger vergeht. "]),
        ("Не могу. Это так.", ["Не могу.", "Это так."]),
        ("मैं यहाँ हूँ। तुम भी।", ["मैं यहाँ हूँ।", "तुम भी।"]),
        ("Etwa 3 km. dann links.", ["Etwa 3 km. dann links."]),
    ]:
        assert sentences(text) == expected


def test_words_keep_their_letters_in_every_script():
    """Five words in a row are five words of the language, not what is left of them between a and z."""
    assert word_runs(["Müde Brüder hören süße Grüße"]) == {"müde brüder hören süsse grüsse"}
    assert word_runs([unicodedata.normalize("NFD", "Müde Brüder")]) == word_runs(["MÜDE BRÜDER"])
    assert word_runs(["мне очень грустно без тебя сегодня"]) == {
        "мне очень грустно без тебя", "очень грустно без тебя сегодня",
    }  # fmt: skip
    # Vowels of Hindi and Thai are marks: without them these two would be the same.
    assert normalise("कि") != normalise("का") and normalise("हिन्दी में।") == "हिन्दी में"
    assert normalise("❤\ufe0f 1\ufe0f\u20e3 ok") == "1 ok"


def test_addresses_and_names_outside_ascii_are_seen():
    assert hosts_in("Auf müller.invalid, auch помощь.рф, z.B. hier, d.h. dort.") == ["müller.invalid", "помощь.рф"]
    row = GERMAN | {"answer": GERMAN["answer"] + "\n\nОткрой помощь.рф."}
    assert any("помощь.рф" in issue.text for issue in row_issues(row, known_services(), Settings("de", 40)))


def test_rows_without_spaces_are_not_counted_in_words(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "我不想活了", "answer": "我听见你了。" * 20, "language": "zh"}))
    corpus.main(["check", str(path)])
    printed = capsys.readouterr().out
    assert "not checked in 1 row without spaces between words: length; template, duplicate, leak see little" in printed
    assert "length (answer)" not in printed


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


def test_in_a_row_of_another_language_no_english_call_words_are_touched(tmp_path, capsys):
    """A row that says de, with an English quotation: emergency and short numbers stay, and are listed as unknown."""
    answer = "Auf dem Schild stand: call 911 now, or call 988."
    rows = [{"prompt": "p", "answer": answer, "language": code} for code in ("de", "en")]
    out, path = tmp_path / "out.jsonl", rows_file(tmp_path / "rows.jsonl", *rows)
    words = ["localise", path, "--services", "AU", "--unchecked", "--out", str(out)]
    assert corpus.main(words) == 1 and not out.exists()
    unknown = [line.rpartition(": ")[2] for line in capsys.readouterr().out.splitlines() if "row 1" in line]
    assert unknown == ["call 911", "call 988", "911", "988"]
    assert corpus.main([*words, "--keep-unknown"]) == 0
    german, english = (row.fields["answer"] for row in read_file(out))
    assert german == answer and "call 911" not in english


# Who refuses

RULES = ["--judge", "rules"]


def rows_file(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


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
    told = rows_file(folder / "told.jsonl", messages | {"adapter": "tuned"})
    xstest = xstest_file(folder / "x.csv", prompt)
    selective = ["selective", "--prompts", files[0], *answers, "--baseline", "base"]
    return {
        "judge": Command("--prompts", files[0], ["judge", *answers]),
        "selective": Command("--prompts", files[0], selective),
        "turns": Command("--prompts", turns, ["turns", "--prompts", turns, "--answers", told]),
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


# Other tools


def test_the_parts_on_the_review_page_are_read_in_the_rows_language():
    german = GERMAN["answer"].split("\n\n")
    assert review.parts_of(GERMAN["answer"], "de") == ["acknowledgement", "step", "services", "closing"]
    assert review.parts_of(GERMAN["answer"], "en") == ["", "step", "services", ""]
    # No word list of another language: what needs none is still labelled.
    assert review.parts_of("\n\n".join([german[0], german[1], "555-0134", german[3]]), "nl") == [
        "", "step", "services", "",
    ]  # fmt: skip
    assert review.part_of("555-0134", False, "en") == ""
    assert review.part_of("SOBER: zähl bis 100 und atme.", False, "de") == "step"
    for named, text, expected in [("de", EN, "de"), (None, "Ja.", "en"), ("", DE, "de"), (None, FR, ""), (3, EN, "en"),
                                  ("en-GB", DE, "en"), ("PT_br", EN, "pt")]:  # fmt: skip
        assert row_language_or_english({"language": named}, text) == expected
        assert row_language({"language": named}, text) == (None if text == "Ja." else expected)


def test_localise_leaves_no_short_number_unseen_in_another_language():
    """`call 988` is replaced in English; no other language has that word, so the number is named as unknown."""
    localiser = localise.Localiser(shipped(), read_services(["AU"]))
    text = "Ich sehe, wie schwer das für dich ist. Ruf noch heute die 988 an, auch in der Nacht."
    assert localiser.unknown({"answer": text}) == ["988"]
    assert localiser.unknown({"answer": "Ruf 988 an.", "language": "de"}) == ["988"]
    assert localiser.unknown({"answer": f"Im Jahr 1999 war es so, und das ist für dich nicht neu. {DE}"}) == []
    emergency = next(iter(read_services(["AU"]).emergency.values()))
    assert localiser.unknown({"answer": f"{DE}. Im Notfall {emergency}."}) == []
    assert localiser.unknown({"answer": f"{EN}. It was page 988."}) == []
    assert localiser.unknown({"answer": "Page 988."}) == []


def test_a_german_row_passes_through_localise_but_for_what_it_cannot_replace(tmp_path, capsys):
    row = {"prompt": DE, "answer": f"{DE}. Wähle 911.", "risk cluster": "violence"}
    path, out = rows_file(tmp_path / "rows.jsonl", row), tmp_path / "out.jsonl"
    words = ["localise", path, "--services", "AU", "--unchecked", "--out", str(out)]
    assert main_guard(corpus.main, words) == 1 and not out.exists()
    assert "row 1 (line 1): 911" in capsys.readouterr().out


def test_words_of_both_lists_do_not_decide_between_english_and_german():
    """A text of frequent words is in one of the two only if a quarter of them or more stand in its list alone."""
    english, german = languages()["en"].function_words, languages()["de"].function_words
    both, alone = 2 * sorted(english & german), {"en": sorted(english - german), "de": sorted(german - english)}
    assert len(both) >= 8
    for code, n_both, n_alone in itertools.product(alone, range(9), range(9)):
        if n_both + n_alone >= MIN_WORDS:
            text = " ".join(both[:n_both] + alone[code][:n_alone])
            assert language_of(text) == (code if 4 * n_alone >= n_both + n_alone else None), text


def mixed(folder, answers: list[str], prompts: list[str]) -> dict[str, list[str]]:
    """As `commands`, over several prompts, each with one answer of both variants."""
    rows, told = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        rows.append({"prompt": prompt, "answer": answer, "cluster": "violence", "group": "risky"})
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        told.append({"adapter": "tuned", "messages": messages * 2})
    of = []
    for name in ("base", "tuned"):
        of += ["--answers", f"{name}={rows_file(folder / name, *(row | {'adapter': name} for row in rows))}"]
    conversation = {"kinds": ["risky", "benign"], "cluster": "violence"}
    turns = rows_file(folder / "turns.jsonl", *({"turns": [p, p]} | conversation for p in prompts))
    told = rows_file(folder / "told.jsonl", *told)
    return {
        "judge": ["judge", *of],
        "selective": ["selective", "--prompts", str(folder / "base"), *of, "--baseline", "base"],
        "turns": ["turns", "--prompts", turns, "--answers", told],
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
