"""docs/lesson.md, run from top to bottom: every block prints what the page says it prints."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
LESSON = (ROOT / "docs" / "lesson.md").read_text(encoding="utf-8")


def steps(page: str) -> list[tuple[str, str]]:
    """(code, what it prints) of every pair of blocks."""
    return re.findall(r"^```python\n(.*?)^```\n+^```text\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def run(page: str) -> None:
    """All steps in one namespace, as in one session."""
    names = {"__name__": "lesson"}
    for code, expected in steps(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "docs/lesson.md", "exec"), names)
        assert printed.getvalue() == expected


def test_every_number_of_the_lesson(monkeypatch):
    monkeypatch.chdir(ROOT)
    threads = torch.get_num_threads()  # the lesson takes one
    assert LESSON.count("```python") == len(steps(LESSON)) >= 5
    try:
        run(LESSON)
    finally:
        torch.set_num_threads(threads)


def test_a_wrong_number_is_seen():
    page = "```python\nprint(1 + 1)\n```\n\n```text\n{}\n```\n"
    run(page.format(2))
    with pytest.raises(AssertionError):
        run(page.format(3))
