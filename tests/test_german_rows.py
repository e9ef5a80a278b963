"""Rows in another language, from prompts to a trained model: written, checked, reviewed, collected, trained on, asked.

The texts are German (fixtures/german_rows.toml, services_de.toml); a stub endpoint stands in for the large model. One
row has its accents decomposed (NFD), as some editors write them: it has to arrive as it was typed.
"""

import json
import tomllib
import unicodedata
from pathlib import Path

import pytest
from scipy.stats import binomtest

import eval as evaluation
import generate
import train
from psysafe import load_tokenizer
from psysafe.corpus import __main__ as corpus
from psysafe.corpus.contacts import known_services
from psysafe.data.rows import read_file
from psysafe.evaluation import answer_language
from psysafe.evaluation.result import load
from psysafe.program import main_guard
from psysafe.training.run_log import read_metrics
from tests.mistakes import refused_by
from tests.own_rows import services_text
from tests.stub_endpoint import StubEndpoint, reply_by
from tests.test_rate_page import opened, start_as
from tests.test_review import data_of, export

FIXTURES = Path(__file__).parent / "fixtures"
SERVICES = FIXTURES / "services_de.toml"
TEXTS = tomllib.loads((FIXTURES / "german_rows.toml").read_text(encoding="utf-8"))
RISKY, PLAIN = TEXTS["risky"], TEXTS["plain"]
LANGUAGE = ["--language", "de", "--services", SERVICES, "--min-words", 40]
EDITED = 3  # place of the row that the reviewer changes
WITHOUT_UMLAUTS = str.maketrans("äöüÄÖÜ", "aouAOU")
PARTS = ("acknowledgement", "step", "services", "closing")
FRENCH = "Tout cela peut encore changer, et vous pouvez trouver un autre chemin avec le temps."


def decomposed(row: dict) -> dict:
    return {name: unicodedata.normalize("NFD", text) for name, text in row.items()}


RISKY[0] = decomposed(RISKY[0])


def reply_of(row: dict) -> dict:
    """What the stub says to a prompt."""
    if "answer" in row:
        return {"reasoning": row["reasoning"], "answer": row["answer"]}
    services = services_text(row["cluster"], str(SERVICES))
    if row is RISKY[0]:
        services = unicodedata.normalize("NFD", services)
    return {name: row[name] for name in ("strategy", "reasoning", "acknowledgement", "step", "closing")} | {
        "services": services
    }


def answer_of(row: dict) -> str:
    reply = reply_of(row)
    return reply.get("answer") or "\n\n".join(reply[name] for name in PARTS)


def lines_of(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def run(main, *words) -> int:
    return main_guard(main, [str(word) for word in words])


def write_drafts(folder: Path) -> Path:
    """`corpus write` of all prompts, asked of the stub."""
    prompts, benign = folder / "prompts.jsonl", folder / "benign.txt"
    prompts.write_text(lines_of([{"prompt": r["prompt"], "risk cluster": r["cluster"]} for r in RISKY]), "utf-8")
    benign.write_text("\n".join(row["prompt"] for row in PLAIN), "utf-8")
    replies = {row["prompt"]: json.dumps(reply_of(row), ensure_ascii=False) for row in RISKY + PLAIN}
    with pytest.MonkeyPatch.context() as patch, StubEndpoint() as stub:
        reply_by(patch, lambda question: replies[question.split("\n")[1]])
        url = ["--url", stub.url, "--model-name", "stub", "--candidates", 1]
        out = ["--out", folder / "drafts.jsonl"]
        assert run(corpus.main, "write", prompts, "--benign", benign, *out, *url, *LANGUAGE) == 0
        assert all("in German" in body["messages"][0]["content"] for _, body, _ in stub.seen)
    return folder / "drafts.jsonl"


def approved(path: Path, drafts: Path) -> Path:
    """What a reviewer exports who approves all rows, and gives one another closing."""
    decisions = [(number, "decision", "approve") for number in range(1, len(RISKY + PLAIN) + 1)]
    return export(path, drafts, "Jörg", *decisions, (EDITED + 1, "answer", edited()))


def edited() -> str:
    return f"{answer_of(RISKY[EDITED])} Bis dahin: hör auf dich, groß und klein."


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """drafts.jsonl and, of their review, rows.jsonl."""
    folder = tmp_path_factory.mktemp("german")
    drafts = write_drafts(folder)
    reviewed = ["--collect", approved(folder / "joerg.json", drafts), "--drafts", drafts]
    assert run(corpus.main, "review", *reviewed, "--out", folder / "rows.jsonl") == 0
    return folder


def test_the_texts_hold_what_they_are_to_prove():
    """Five clusters, umlauts in most answers, and one row that is not composed."""
    assert {row["cluster"] for row in RISKY} == set(known_services().by_cluster) and len(RISKY) == 10
    assert sum(any(letter in answer_of(row) for letter in "äöüßÄÖÜ") for row in RISKY[1:] + PLAIN) >= 9
    assert unicodedata.normalize("NFC", answer_of(RISKY[0])) != answer_of(RISKY[0])
    assert all(unicodedata.is_normalized("NFC", answer_of(row)) for row in RISKY[1:] + PLAIN)


def test_drafts_and_reviewed_rows_hold_every_byte(folder):
    """Prompts and texts of the replies, NFC and NFD alike; only what the reviewer wrote is another text."""
    drafts, rows = read_file(folder / "drafts.jsonl"), read_file(folder / "rows.jsonl")
    for place, (row, draft, reviewed) in enumerate(zip(RISKY + PLAIN, drafts, rows, strict=True)):
        assert draft.fields["prompt"] == reviewed.fields["prompt"] == row["prompt"]
        assert draft.fields["reasoning"] == reviewed.fields["reasoning"] == row["reasoning"]
        assert draft.fields["answer"] == answer_of(row)
        assert reviewed.fields["answer"] == (edited() if place == EDITED else answer_of(row))
        assert (reviewed.fields["language"], reviewed.fields["reviewed_by"]) == ("de", ["Jörg"])
    content = (folder / "rows.jsonl").read_bytes()
    assert RISKY[0]["prompt"].encode() in content and b"\\u" not in content


def test_the_check_finds_no_fault(folder, capsys):
    assert run(corpus.main, "check", folder / "drafts.jsonl", *LANGUAGE) == 0
    printed = capsys.readouterr().out
    assert f"0 of {len(RISKY + PLAIN)} rows with an issue" in printed and "not checked in" not in printed


@pytest.mark.parametrize(
    ("part", "text", "issue"),
    [
        ("closing", "", "parts (closing)"),
        ("closing", "It gets better, and you do not have to do all of this on your own.", "language (closing)"),
        ("acknowledgement", "Das ist schwer für dich, und du bist damit nicht allein.", "nothing is refused"),
        ("services", "Nachtlicht-Hilfetelefon: 555-0199.", "Nachtlicht-Hilfetelefon is no known service"),
        ("services", "Rückhalt für heute, jederzeit.", "Rückhalt für heute is missing"),
        ("step", "Schreib heute Abend drei Dinge auf, die dir eine schlimme Stunde leichter machen.", "no step"),
    ],
)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_fault_in_german_is_found_however_its_umlauts_are_written(tmp_path, capsys, part, text, issue, form):
    parts = reply_of(RISKY[1]) | {part: text}
    answer = "\n\n".join(filter(None, (parts[name] for name in PARTS)))
    row = {"prompt": RISKY[1]["prompt"], "answer": answer, "reasoning": "", "risk cluster": RISKY[1]["cluster"],
           "framework_name": RISKY[1]["strategy"]}  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text(lines_of([{name: unicodedata.normalize(form, value) for name, value in row.items()}]), "utf-8")
    assert run(corpus.main, "check", path, *LANGUAGE) == 1
    assert issue in unicodedata.normalize("NFC", capsys.readouterr().out)


def test_a_leak_is_found_through_umlauts(tmp_path, capsys):
    """Five words in a row, each with a letter outside a to z, in another case and normal form."""
    leak = "Müde Brüder hören süße Gerüchte über Köln"
    rows, evaluation_prompts = tmp_path / "rows.jsonl", tmp_path / "evaluation.jsonl"
    rows.write_text(lines_of([{"prompt": f"Warum? {leak}!", "answer": "Sie hören zu.", "group": "plain"}]), "utf-8")
    for prompt, code in [(unicodedata.normalize("NFD", leak.upper()), 1), (leak.replace("ü", "u"), 0)]:
        evaluation_prompts.write_text(lines_of([{"prompt": prompt, "answer": "-"}]), "utf-8")
        assert run(corpus.main, "check", rows, "--not-in", evaluation_prompts, "--language", "de") == code
        is_blamed = "of an evaluation prompt: brüder hören süsse gerüchte über" in capsys.readouterr().out
        assert is_blamed == bool(code)


def test_a_template_is_found_in_either_normal_form(tmp_path, capsys):
    """Two answers that share a paragraph and no more, as NFC and as NFD; without its umlauts it is another one."""
    shared = "Süße Gerüchte über müde Brüder hören früh oder spät auf, natürlich völlig ohne großes Getöse für dich."
    first = {"prompt": "Was tun gegen Gerede?", "answer": f"Bleib ruhig.\n\n{shared}", "group": "plain"}
    rows = tmp_path / "rows.jsonl"
    for text, code in [(unicodedata.normalize("NFD", shared), 1), (shared.translate(WITHOUT_UMLAUTS), 0)]:
        second = {"prompt": "Wie wird Klatsch leiser?", "answer": f"{text}\n\nWarte ab.", "group": "plain"}
        rows.write_text(lines_of([first, second]), "utf-8")
        assert run(corpus.main, "check", rows, "--language", "de") == code
        assert capsys.readouterr().out.count("template (answer)") == 2 * code


def test_the_review_page_labels_the_parts(folder, tmp_path):
    assert run(corpus.main, "review", folder / "drafts.jsonl", "--out", tmp_path) == 0
    items = data_of(tmp_path / "review.html")["items"]
    labels = [item["parts"] for item in items[: len(RISKY)]]
    assert [parts[:3] for parts in labels] == [["acknowledgement", "step", "services"]] * len(RISKY)
    # The list of words of hope is short: a closing without one has no label, and is not called something else.
    assert {parts[3] for parts in labels} == {"closing", ""} and sum(parts[3] == "closing" for parts in labels) >= 5
    assert items[0]["draft"]["answer"] == answer_of(RISKY[0]) and {item["language"] for item in items} == {"de"}


# Evaluation


@pytest.mark.slow
def test_pages_say_which_language_a_text_is_in(browser, tmp_path):
    """For screen readers: German texts on the report's and the raters' page have `lang`, English ones the page's."""
    english = "I can hear how hard this is for you, and I will not help you to hurt anybody."
    texts = [(row["prompt"], answer_of(row), english) for row in RISKY[1:4]]
    files = [stored(tmp_path / "german.jsonl", {p: text for p, text, _ in texts}),
             stored(tmp_path / "english.jsonl", {p: text for p, _, text in texts})]  # fmt: skip
    judged(tmp_path, *files)
    assert run(evaluation.main, "report", tmp_path / "judged", "--out", tmp_path / "report") == 0
    answers = [word for one in files for word in ("--answers", one)]
    assert run(evaluation.main, "rate", *answers, "--out", tmp_path / "rate") == 0
    expected = {text: "de" for row in texts for text in row[:2]} | {english: "en"}
    seen = {}
    with opened(browser, (tmp_path / "report" / "report.html").as_uri()) as page:
        page.locator(".item .text").first.wait_for()
        seen["report"] = read_aloud(page)
    with opened(browser, (tmp_path / "rate" / "rate.html").as_uri()) as page:
        start_as(page, "Jörg")
        seen["rate"] = {}
        for _ in texts:
            seen["rate"] |= read_aloud(page)
            page.get_by_role("button", name="Next").click()
    assert seen == {"report": expected, "rate": expected}


def read_aloud(page) -> dict[str, str]:
    """Each text of others on a page, and its language as the browser has it."""
    langs_of_texts = "nodes => nodes.map(one => [one.textContent, one.closest('[lang]').lang])"
    return dict(page.locator(".text").evaluate_all(langs_of_texts))


def stored(path: Path, answers: dict[str, str]) -> str:
    path.write_text(lines_of([{"prompt": p, "answer": a, "cluster": "violence"} for p, a in answers.items()]), "utf-8")
    return f"{path.stem}={path}"


def judged(folder: Path, *answers: str) -> dict[str, list]:
    """The rows of the table of languages, by variant: answers of files, judged by a stub."""
    with pytest.MonkeyPatch.context() as patch, StubEndpoint() as stub:
        reply_by(patch, lambda question: "Refusal: Yes\nGrounding: 4\nReferences: Yes\nRelevance: 4")
        files = [word for one in answers for word in ("--answers", one)]
        url = ["--judge-url", stub.url, "--judge-model", "stub"]
        assert run(evaluation.main, "judge", *files, *url, "--out", folder / "judged") == 0
    (table,) = [one for one in load(folder / "judged")[0].tables if one.title == answer_language.TITLE]
    assert [name for name, _ in table.columns[1:]] == [
        "n", "in the prompt's %", "from", "to", "in no known one", "not counted",
    ]  # fmt: skip
    return {row[0]: row[1:] for row in table.rows} | {"note": table.note}


def answers_of_two(tmp_path) -> list[str]:
    """Of eleven prompts, ten in German and one too short to tell, in German all the same. tuned: seven answers in
    German, two in English, one in French; base: nine in English, one of three words."""
    prompts = [*(row["prompt"] for row in RISKY), "Ich kann nicht mehr."]
    english = "I can hear how hard this is for you, and I will not help you to hurt anybody."
    tuned = [*(answer_of(row) for row in RISKY[:7]), english, english, FRENCH, answer_of(RISKY[7])]
    base = [english] * 9 + ["I can not.", english]
    return [stored(tmp_path / f"{name}.jsonl", dict(zip(prompts, answers, strict=True)))
            for name, answers in (("base", base), ("tuned", tuned))]  # fmt: skip


def test_the_share_of_answers_in_the_prompts_language_by_value(tmp_path):
    rows = judged(tmp_path, *answers_of_two(tmp_path))
    for name, (same, n, n_other, n_unknown) in {"tuned": (7, 10, 1, 1), "base": (0, 9, 0, 2)}.items():
        interval = binomtest(same, n).proportion_ci(method="wilson")
        expected = [n, 100 * same / n, 100 * interval.low, 100 * interval.high, n_other, n_unknown]
        assert rows[name] == pytest.approx(expected)
    assert rows["note"].startswith("Prompts: 10 German, 1 unknown. Known languages: English, German.")


def test_the_table_stays_when_scores_are_read_again_and_stands_in_the_report(tmp_path):
    rows = judged(tmp_path, *answers_of_two(tmp_path))
    again, page = tmp_path / "again", tmp_path / "report"
    assert run(evaluation.main, "judge", "--scores", tmp_path / "judged" / "items.jsonl", "--out", again) == 0
    (table,) = [one for one in load(again)[0].tables if one.title == answer_language.TITLE]
    assert {row[0]: row[1:] for row in table.rows} == {name: rows[name] for name in ("base", "tuned")}
    assert run(evaluation.main, "report", again, "--out", page) == 0
    assert answer_language.TITLE in (page / "report.md").read_text("utf-8")
    # Scores alone: there is no answer, and no table of answers.
    scores = [{"prompt": row["prompt"], "refusal": "Yes", "variant": "x"} for row in RISKY]
    (tmp_path / "scores.jsonl").write_text(lines_of(scores), "utf-8")
    assert run(evaluation.main, "judge", "--scores", tmp_path / "scores.jsonl", "--out", tmp_path / "none") == 0
    assert not [one for one in load(tmp_path / "none")[0].tables if one.title == answer_language.TITLE]


def test_word_lists_refuse_german_and_say_what_to_do(tmp_path, capsys):
    _, tuned = answers_of_two(tmp_path)
    line = refused_by(
        evaluation.main, ["judge", "--answers", tuned, "--judge", "rules", "--out", tmp_path / "o"], capsys
    )
    assert "word lists know English, and 10 of 10 prompts that show a language are in another (mostly German)" in line
    assert "--judge-url" in line and not (tmp_path / "o").exists()


def test_a_model_is_trained_on_these_rows_and_asked_in_german(folder, tmp_path):
    """What it says depends on the bundled base, so the share is compared with a count over its own answers."""
    rows, out, asked = folder / "rows.jsonl", tmp_path / "run", tmp_path / "asked.jsonl"
    config = Path(__file__).resolve().parents[1] / "configs" / "tiny.toml"
    flags = ["--data", rows, "--val-data", rows, "--max-steps", 6, "--warmup-steps", 1, "--batch-size", 4]
    flags += ["--max-tokens", 1024, "--device", "cpu", "--out", out]
    assert run(train.main, "--config", config, *flags) == 0
    metrics = read_metrics(out / "metrics.jsonl")
    assert sum("loss" in row for row in metrics) == 6
    first, last = (next(row["val_loss"] for row in way if "val_loss" in row) for way in (metrics, metrics[::-1]))
    assert last < first - 0.01  # of these very rows
    asked.write_text(lines_of([{"prompt": row["prompt"], "cluster": row["cluster"]} for row in RISKY[:3]]), "utf-8")
    ask = ["--adapter", out, "--prompts", asked, "--max-new-tokens", 24, "--device", "cpu"]
    assert run(generate.main, *ask, "--out", tmp_path / "answers.jsonl") == 0
    answers = [row.fields for row in read_file(tmp_path / "answers.jsonl")]
    assert [row["prompt"] for row in answers] == [row["prompt"] for row in RISKY[:3]]
    answers_by_prompt = {row["prompt"]: row["answer"] for row in answers}
    shown = judged(tmp_path, f"run={tmp_path / 'answers.jsonl'}", stored(tmp_path / "german.jsonl", {
        row["prompt"]: answer_of(row) for row in RISKY[:3]}))  # fmt: skip
    codes = [answer_language.language_of(text) for text in answers_by_prompt.values() if text.strip()]
    assert len(codes) == 3  # each answer has a text
    known = [code for code in codes if code is not None]
    assert shown["run"][0] == len(known) and shown["run"][-1] == len(codes) - len(known)
    assert shown["german"][:2] == [3, 100.0]


def test_the_tokens_of_both_forms_are_the_same_and_come_back_composed():
    """As the published tokenizer has it: what is trained on does not depend on how an umlaut was typed."""
    tokenizer, text = load_tokenizer("assets:tiny"), answer_of(RISKY[0])
    composed = unicodedata.normalize("NFC", text)
    assert tokenizer.encode(text) == tokenizer.encode(composed) and tokenizer.decode(tokenizer.encode(text)) == composed
