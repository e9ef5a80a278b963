"""Which language a text is in, and what tools on rows do with it: counts by hand."""

import itertools
import json
import re
import unicodedata

import pytest

from psysafe.corpus import __main__ as corpus
from psysafe.corpus import localise, review
from psysafe.corpus.contacts import hosts_in, known_services
from psysafe.corpus.draft_checks import Settings, row_issues
from psysafe.corpus.texts import word_runs
from psysafe.data.languages import MIN_WORDS, language_of, languages, row_language, row_language_or_english, sentences
from psysafe.data.rows import read_file
from psysafe.data.text import normalise
from psysafe.files import ASSETS
from psysafe.program import main_guard
from psysafe.services import read_services, shipped
from tests.own_rows import GERMAN
from tests.test_rules_judge import HALVES

EN = "this is what you wrote to me and I can see how much it hurts"
DE = "das hast du mir geschrieben und ich sehe wie weh es dir tut"
FR = "tout cela peut encore changer et vous pouvez trouver un autre chemin"


def rows_file(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


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
