"""Answers translated back into English: where they are cut, what counts as untranslated, and what becomes of it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psysafe.evaluation.benchmarks.sorry_bench import SorryBench
from psysafe.evaluation.translation import REQUESTS, cut, joined, untranslated
from tests.mistakes import refused
from tests.stub_endpoint import StubEndpoint, reply_by
from tests.test_eval_refusals import FIXTURES, answering, arguments  # noqa: F401

FRENCH = "Je ne peux pas vous aider avec cela, mais je peux vous écouter."
ENGLISH = "I cannot help you with that, but I can listen to you."
# The same refusal in the languages of the benchmark's translated files.
OTHERS = {
    "ml": "എനിക്ക് അതിൽ നിങ്ങളെ സഹായിക്കാൻ കഴിയില്ല, പക്ഷേ എനിക്ക് കേൾക്കാൻ കഴിയും.",
    "ta": "அதில் என்னால் உங்களுக்கு உதவ முடியாது, ஆனால் என்னால் கேட்க முடியும்.",
    "mr": "मी त्यात तुम्हाला मदत करू शकत नाही, पण मी ऐकू शकतो.",
    "zh": "我不能帮你做这件事，但我可以倾听。",
}

TEXT = st.text("ab .!?\n。！é我മി\u0d3f", max_size=80)


@given(TEXT, st.integers(1, 30))
def test_the_pieces_are_the_text(text, size):
    pieces = cut(text, size)
    assert "".join(pieces) == text and all(0 < len(piece) <= size for piece in pieces if text)
    # Put together again: nothing but spaces where a cut had none.
    whole = joined(pieces, [piece.strip() for piece in pieces])
    assert "".join(whole.split()) == "".join(text.split())


@pytest.mark.parametrize(("text", "size", "pieces"), [
    ("One. Two.\n\nThree.\nFour.", 20, ["One. Two.\n\n", "Three.\nFour."]),
    ("One. Two.\nThree. Four.", 15, ["One. Two.\n", "Three. Four."]),
    ("One two. Three four.", 15, ["One two. ", "Three four."]),
    ("one two three", 9, ["one two ", "three"]),
    ("我不能。你可以。", 5, ["我不能。", "你可以。"]),
    ("abcdef", 4, ["abcd", "ef"]),
    ("മി" * 3, 3, ["മി", "മി", "മി"]),  # a sign stays with its letter
    ("short", 5, ["short"]),
])  # fmt: skip
def test_where_a_text_is_cut(text, size, pieces):
    assert cut(text, size) == pieces


def test_the_order_and_the_paragraphs_stay():
    pieces = cut("un\n\ndeux. trois", 7)
    assert joined(pieces, ["one", "two.", "three"]) == "one\n\ntwo. three"
    assert joined(cut("我不能。你可以。", 5), ["I cannot.", "You can."]) == "I cannot. You can."


@pytest.mark.parametrize(("source", "reply", "reason"), [
    (FRENCH, ENGLISH, ""),
    (FRENCH, FRENCH, "not English"),
    (FRENCH, f"{ENGLISH}\n{FRENCH}\n{ENGLISH} {ENGLISH}", "not English"),  # one paragraph stayed as it was
    (ENGLISH, ENGLISH, ""),  # the model had answered in English
    (FRENCH, f"{ENGLISH}\n- La Paz, Bolivia\n- La Rochelle, Saint-Denis\n{ENGLISH}", ""),
    (FRENCH, f"{ENGLISH} You need:\nflour, sugar, butter, eggs, milk, vanilla, salt, yeast, nuts, oil, cream, tea", ""),
    ("Bonjour", "Bonjour", "the same text"),
    ("Bonjour", "Hello", ""),
    ("Nein", "Ich kann dir dabei nicht helfen, aber ich höre dir gern zu, wenn du magst.", "not English"),
    (FRENCH, "42", "no words in it"),
    ("1. 2. 3.", "1. 2. 3.", ""),
    ("```\nprint(le, la)\n```", "```\nprint(le, la)\n```", ""),  # code is the same in every language
    ("https://le.la.les.invalid", "https://le.la.les.invalid", ""),
    *((text, text, "mostly in another script") for text in OTHERS.values()),
    *((text, ENGLISH, "") for text in OTHERS.values()),
    *((text, f"{ENGLISH} (\u201e{text[:8]}\u201c)", "") for text in OTHERS.values()),  # a word is quoted
    *((text, f"{ENGLISH}\n\n{ENGLISH}\n\n{text * 2}", "mostly in another script") for text in OTHERS.values()),
])  # fmt: skip
def test_what_counts_as_untranslated(source, reply, reason):
    assert untranslated(source, reply) == reason


def run_bench(out, monkeypatch, translate, *words: str) -> tuple:
    """(the result, what the translator was asked, what the judge was shown). translate: (request, text) -> reply."""
    asked, shown = [], []

    def server(text):
        request = next((r for r in REQUESTS if text.startswith(r)), None)
        if request is None:
            shown.append(text.split("[Response]\n")[1].split("\n\n[Score]")[0])
            return "0"
        asked.append((REQUESTS.index(request), text.removeprefix(request)))
        return translate(*asked[-1])

    reply_by(monkeypatch, server)
    with StubEndpoint() as stub:
        urls = ["--judge-url", stub.url, "--judge-model", "j", "--translator-url", stub.url]
        data = ["--data", str(FIXTURES / "sorry"), "--mutations", "translate-fr", "--limit", "2"]
        args = arguments(SorryBench(), *data, *urls, "--translator-model", "t", *words, "--out", str(out))
        return SorryBench().run(args), asked, shown


def test_a_long_answer_is_translated_in_order(answering, tmp_path, monkeypatch):  # noqa: F811
    paragraphs = [f"Phrase {i} est dans la langue." for i in range(5)]
    answering(lambda variant, prompt: "\n\n".join(paragraphs))
    result, asked, shown = run_bench(
        tmp_path, monkeypatch, lambda _, text: text.replace("est dans la langue", "is in the language"),
        "--translator-chars", "60",
    )  # fmt: skip
    assert shown == ["\n\n".join(f"Phrase {i} is in the language." for i in range(5))] * 2  # of both questions
    # Both answers are one text, so that each chunk is asked once.
    assert sorted(text for _, text in asked) == ["\n\n".join(paragraphs[i : i + 2]) for i in (0, 2, 4)]
    assert result.notes[1] == ("translate-fr: 2 answers translated, 3 chunks of at most 60 characters, 0 of them only "
                               "at the second try")  # fmt: skip
    assert result.settings["translator"] == "t" and not result.failed


def test_what_comes_back_untranslated_is_asked_again_and_else_fails(answering, tmp_path, monkeypatch):  # noqa: F811
    """The first answer is translated at the second try. The second one never is: no verdict, but a reason; and at the
    next start only it is asked again."""
    answering(lambda variant, prompt: f"{FRENCH} Numéro {prompt.split()[-1]}")
    mends = []

    def translate(request, text):
        first = text.endswith("1.")
        return f"<think>le la les</think>{ENGLISH} {text[-2]}" if (first and request) or mends else text

    result, asked, shown = run_bench(tmp_path, monkeypatch, translate)
    assert len(asked) == 4 and {request for request, _ in asked} == {0, 1}
    reason = "translation: it came back untranslated in 2 tries (not English)"
    assert result.failed == {"base, none, translate-fr: question 2": reason}
    assert shown == [f"{ENGLISH} 1"]
    assert result.tables[1].rows == [["translate-fr", "base, none", 1, 0.0]]
    assert "1 of them only at the second try" in result.notes[1]
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert [item["score"] for item in items] == [0, None]
    mends.append(True)
    result, asked, _ = run_bench(tmp_path, monkeypatch, translate)
    assert len(asked) == 1 and not result.failed and result.tables[1].rows[0][2] == 2


def test_an_answer_without_text_needs_no_translation(answering, tmp_path, monkeypatch):  # noqa: F811
    answering(lambda variant, prompt: " ")
    result, asked, shown = run_bench(tmp_path, monkeypatch, lambda *_: "x")
    assert not asked and shown == [" ", " "] and result.tables[1].rows[0][2] == 2


def test_a_failed_chunk_is_named_by_its_place(answering, tmp_path, monkeypatch):  # noqa: F811
    answering(lambda variant, prompt: f"{ENGLISH}\n\n{FRENCH}")
    result, _, _ = run_bench(tmp_path, monkeypatch, lambda _, text: text, "--translator-chars", "80")
    reasons = {reason.partition(" (")[0] for reason in result.failed.values()}
    assert reasons == {"translation: chunk 2 of 2: it came back untranslated in 2 tries"}


def test_stored_scores_of_translated_files_need_no_translator(tmp_path):
    """They were left out "for want of a translator", although nothing is left to translate."""
    rows = [json.loads(line) for line in (FIXTURES / "sorry" / "question_translate-fr.jsonl").read_text().splitlines()]
    scores = [{"prompt": row["turns"][0], "variant": "m", "part": "translate-fr", "score": 1} for row in rows]
    path = tmp_path / "scores.jsonl"
    path.write_text("".join(json.dumps(score) + "\n" for score in scores if score["prompt"]))
    words = ["--data", str(FIXTURES / "sorry"), "--mutations", "translate-fr", "--scores", str(path)]
    result = SorryBench().run(arguments(SorryBench(), *words, "--out", str(tmp_path / "out")))
    assert result.tables[1].rows == [["translate-fr", "m", sum(bool(score["prompt"]) for score in scores), 100.0]]
    assert not any("want of a translator" in note for note in result.notes)
    asked = arguments(SorryBench(), *words, "--translator-url", "http://localhost:1", "--out", str(tmp_path / "out"))
    assert "--translator-url" in SorryBench().without_effect(asked)


def test_a_missing_model_is_found_before_an_answer_is_written(tmp_path):
    words = ["--data", str(FIXTURES / "sorry"), "--mutations", "translate-fr", "--judge-url", "http://localhost:1",
             "--judge-model", "j", "--translator-url", "http://localhost:1", "--out", str(tmp_path)]  # fmt: skip
    refused("--translator-url needs --translator-model NAME", SorryBench().run, arguments(SorryBench(), *words))
