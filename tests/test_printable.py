"""Text of servers, rows and models on a terminal and in report.md: shown, and never obeyed."""

import json

import pytest

import eval as script
from psysafe.cli import say
from psysafe.corpus.__main__ import main as corpus
from psysafe.evaluation.result import Result, Table
from psysafe.generation.terminal import TextStream
from psysafe.generation.text import ANSWER, Piece
from psysafe.printable import counted, escaped, in_markdown, one_line, plain
from psysafe.program import UserError, main_guard
from tests.stub_endpoint import Handler, StubEndpoint
from tests.test_eval_run import run

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31mred\r\u202edlrow\x00 <img src=x onerror=a()> [click](http://localhost) **bold** |"
STEERING = [*map(chr, [*range(9), *range(11, 32), *range(127, 160)]), *"\u202a\u202e\u2066\u2069\u2028"]


def harmless(text: str) -> bool:
    return not set(text).intersection(STEERING)


def test_nothing_that_steers_a_terminal_is_left():
    every = "".join(map(chr, range(0x2100)))
    assert harmless(plain(every)) and harmless(one_line(every)) and harmless(escaped(every))
    assert plain("Grüße,\t日本\nzwei") == "Grüße,\t日本\nzwei" and one_line(" a\n\tb\x1b ") == "a b"
    assert escaped("a\x1b[2J\u202e") == "a\\x1b[2J\\u202e"


MARKDOWN = [
    ("plain words, 82.7 % ± 1.25", "plain words, 82.7 % ± 1.25"),
    ("max_new_tokens", "max_new_tokens"),
    ("_x_ and __y__", r"\_x\_ and \_\_y\_\_"),
    ("**b** *i* ~~s~~", r"\*\*b\*\* \*i\* \~\~s\~\~"),
    ("[a](http://localhost)", r"\[a\](http://localhost)"),
    ("![i](x)", r"!\[i\](x)"),
    ("a|b", r"a\|b"),
    ("`c` $m$", r"\`c\` \$m\$"),
    ("<script>", "&lt;script&gt;"),
    ("&lt;b&gt; R&D", r"\&lt;b\&gt; R&D"),
    ("# head", r"\# head"),
    ("- item", r"\- item"),
    ("---", r"\---"),
    ("1. item", r"1\. item"),
    ("-0.20", "-0.20"),
    ("a\\*b", r"a\\\*b"),
    ("two\nlines\x1b", "two lines"),
]


@pytest.mark.parametrize(("text", "expected"), MARKDOWN, ids=[text for text, _ in MARKDOWN])
def test_markdown_is_shown_and_not_obeyed(text, expected):
    assert in_markdown(text) == expected


def test_messages_and_errors_are_harmless(capsys):
    say(EVIL)

    def fails(argv):
        raise UserError(EVIL)

    main_guard(fails, [])
    shown = capsys.readouterr().err
    assert harmless(shown) and shown.count("owned") == 2


def test_a_result_on_the_terminal_and_in_the_report(tmp_path, capsys):
    """Every text of a result comes from elsewhere: names of variants, titles, notes, reasons."""
    table = Table(EVIL, [("variant", ""), (EVIL, ".1f")], [[EVIL, 1.0]], EVIL)
    result = Result("judge", EVIL, [table], {EVIL: EVIL}, [EVIL], {EVIL: EVIL})
    assert harmless(result.as_text())
    result.save(tmp_path / "judge")
    assert run("report", str(tmp_path / "judge"), "--out", str(tmp_path / "report")) == 0
    markdown, page = ((tmp_path / "report" / name).read_text(encoding="utf-8") for name in ("report.md", "report.html"))
    assert harmless(markdown) and harmless(page)
    assert "<img" not in markdown + page and "[click](" not in markdown and "**bold" not in markdown
    assert markdown.count(r"\[click\]") >= 8


def test_a_servers_error_and_reply_do_not_reach_the_terminal_raw(tmp_path, capsys, monkeypatch):
    """One answer is refused with the text as its reason; of the other the judge's reply is it."""
    rows = [{"prompt": f"{EVIL} {i}", "answer": "No.", "risk cluster": "substance"} for i in range(2)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def judge(self):
        _, asked = self.request_body()
        self.send(400, EVIL) if f"{EVIL} 0" in asked else self.answer(EVIL)

    monkeypatch.setattr(Handler, "do_POST", judge)
    with StubEndpoint() as stub:
        words = ["--answers", f"{EVIL[:30]}={tmp_path / 'a.jsonl'}", "--judge-url", stub.url, "--judge-model", "stub"]
        assert main_guard(script.main, ["judge", *words, "--out", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr()
    assert "HTTP 400" in shown.out and harmless(shown.out) and harmless(shown.err.replace("\r", ""))
    assert EVIL in json.loads((tmp_path / "out" / "items.jsonl").read_text(encoding="utf-8"))["reply"]


def test_corpus_tools_show_rows_harmlessly(tmp_path, capsys):
    row = {"prompt": EVIL, "answer": "No.", "risk cluster": EVIL, "risk category": EVIL, "framework_name": EVIL}
    file = tmp_path / f"rows{EVIL[:4]}.jsonl"
    file.write_text(json.dumps(row) + "\n")
    for words in (["validate"], ["stats"], ["leakage", "--training", str(file), "--held-out"]):
        main_guard(corpus, [words[0], *words[1:], str(file)])
        shown = capsys.readouterr()
        assert shown.out and harmless(shown.out) and harmless(shown.err)


def test_a_model_does_not_steer_the_terminal():
    class Terminal(list):
        isatty, write, flush = (lambda self: True), list.append, lambda self: None

    out = Terminal()
    with TextStream(out) as stream:
        for character in EVIL:
            stream(1, Piece(ANSWER, character))
    assert harmless("".join(out)) and "owned" in "".join(out)


def test_a_number_and_its_noun():
    assert [counted(n, "row") for n in (0, 1, 2, 1024)] == ["0 rows", "1 row", "2 rows", "1,024 rows"]
