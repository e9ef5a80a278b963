"""The transcript beside a result, read by a Markdown parser: every text is there as it was, and none is markup."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from psysafe.evaluation.criteria import Scores
from psysafe.evaluation.transcript import Answer, Entry, Judgement, in_words, markdown, reasoning_of
from psysafe.printable import plain
from tests.stub_endpoint import StubEndpoint, reply_by
from tests.test_eval_judge import VALUES, reply
from tests.test_eval_refusals import FIXTURES, encode_caesar
from tests.test_eval_run import run

PARSER = MarkdownIt("commonmark")
EVIL = ["```", "````\n# heading", "~~~\n<script>x</script>", "</details>", "<details>\n\n# x", "``` text\n```\n- a",
        "\r# x\r", "\u2028# x", "    code", "[a](http://b.invalid)", "```" * 9, "a\n```text\nb\n```\nc",
        "\x00\x1b[31m"]  # fmt: skip
TEXT = st.text(alphabet="`~#<>\n\r ab*_-|[]()&;\\\u2028", max_size=30) | st.sampled_from(EVIL)


def parsed(text: str) -> tuple[list[str], list[str], list[str]]:
    """(the fenced texts, the headings, the HTML) of a page."""
    tokens = PARSER.parse(text)
    fences = [token.content.removesuffix("\n") for token in tokens if token.type == "fence"]
    headings = [b.content for a, b in itertools.pairwise(tokens) if a.type == "heading_open"]
    inline = [child for token in tokens for child in token.children or []]
    html = [token.content for token in [*tokens, *inline] if token.type in ("html_block", "html_inline")]
    assert not [token for token in tokens if token.type in ("code_block", "blockquote_open", "bullet_list_open")]
    assert not [child for child in inline if child.type in ("link_open", "image")]
    return fences, headings, html


def row(answer: str, reasoning: str = "", unfinished: bool = False) -> dict:
    return {"answer": answer, "reasoning": reasoning, "unfinished_thinking": unfinished}


@given(TEXT, TEXT, TEXT, TEXT, TEXT, TEXT)
def test_no_text_is_markup(prompt, answer, reasoning, shown, words, name):
    one = Answer(f"v {name}", row(answer, reasoning), shown, [Judgement(f"j {name}", f"s {name}", words)])
    text = markdown(f"T {name}", [Entry(f"h {name}", prompt, [one]), Entry("last", "p", [])])
    fences, headings, html = parsed(text)
    texts = [prompt, *([reasoning] if reasoning else []), *([answer] if answer else [])]
    texts += [*([shown] if shown != answer else []), *([words] if words else []), "p"]
    assert fences == [plain(one) for one in texts]
    assert len(headings) == 4 and headings[-1] == "last"
    summary = [block for block in html if block.startswith("<details><summary>Reasoning, ")]
    assert len(summary) == bool(reasoning) and len(html) == 2 * bool(reasoning)


def test_what_a_page_says():
    answered = Answer("base", row("No.", "They ask."), "No.", [Judgement("j", "refusal yes", "Score: 1")])
    stuck = Answer("tuned", row("", "I could", True), None, [])
    assert (
        markdown("A *b*", [Entry("prompt 1", "How?", [answered, stuck])])
        == """\
# A \\*b\\*

What models and judges wrote, as they wrote it. No answer of a model replaces professional care.

## prompt 1

```text
How?
```

### base

<details><summary>Reasoning, 9 characters</summary>

```text
They ask.
```

</details>

```text
No.
```

j: **refusal yes**

```text
Score: 1
```

### tuned

<details><summary>Reasoning that never ended, 7 characters</summary>

```text
I could
```

</details>

(no answer)

Not judged.
"""
    )


@pytest.mark.parametrize(("answer", "reasoning"), [
    ({"response": "<think>\nso\n</think>\nNo.", "unfinished_thinking": False}, "so"),
    ({"response": "so\n</think>\nNo.", "unfinished_thinking": False}, "so"),
    ({"response": "No.", "unfinished_thinking": False}, ""),
    ({"response": "<think>and then", "unfinished_thinking": True}, "and then"),
    ({"unfinished_thinking": False}, ""),
    ({"reasoning": "so", "response": "so</think>No.", "unfinished_thinking": False}, "so"),
])  # fmt: skip
def test_the_reasoning_of_an_answer(answer, reasoning):
    assert reasoning_of(answer) == reasoning


def test_scores_in_words():
    assert in_words(Scores(True, 4, False, 2)) == "refusal yes, grounding 4, references no, relevance 2, overall 50.0 %"
    assert in_words(Scores(None, 4)) == "refusal –, grounding 4, references –, relevance –, overall –"
    assert in_words(None) == "no reply"


def test_the_transcripts_of_judge_and_sorry_bench(tmp_path, monkeypatch):
    """All judges' words on one page; a decoded answer both ways; the same again from stored replies."""
    reply_by(monkeypatch, lambda asked: "1" if asked.endswith("[Score]") else reply(VALUES))
    prompt = json.loads((FIXTURES / "sorry" / "question_caesar.jsonl").read_text().splitlines()[0])["turns"][0]
    rows = [{"prompt": prompt, "variant": "v", "answer": encode_caesar("Hello"), "risk cluster": "weapon"}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with StubEndpoint() as stub:
        words = ["--answers", str(tmp_path / "a.jsonl"), "--judge-url", stub.url, "--judge-model", "j"]
        run(
            "sorry-bench",
            "--data",
            str(FIXTURES / "sorry"),
            "--mutations",
            "caesar",
            *words,
            "--out",
            str(tmp_path / "s"),
        )
        run("judge", *words, "--judge", "rules", "--out", str(tmp_path / "j"))
    fences, headings, _ = parsed((tmp_path / "s" / "transcript.md").read_text())
    assert fences == [prompt, "Khoor", "Hello", "1"] and headings[1:] == ["caesar, question 1", "v"]
    text = (tmp_path / "j" / "transcript.md").read_text()
    assert parsed(text)[0] == [prompt, "Khoor", reply(VALUES)]
    assert "j: **refusal yes, grounding 4, references no, relevance 2, overall 50.0 %**" in text
    assert "the rule-based judge (word lists): **refusal no, grounding 1" in text
    run("judge", "--replies", str(tmp_path / "j" / "judges" / "j" / "items.jsonl"), "--out", str(tmp_path / "again"))
    assert parsed((tmp_path / "again" / "transcript.md").read_text())[0] == [prompt, "Khoor", reply(VALUES)]
