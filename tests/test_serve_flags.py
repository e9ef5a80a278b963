"""The server's command line: a line for every mistake in it."""

import importlib.util
import re

import pytest

from psysafe.serve import __main__ as program
from psysafe.serve.settings import parse
from tests.mistakes import refused, refused_by


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--adapter", "tuned"], "--adapter 'tuned': expected NAME=DIR, such as tuned=runs/tiny"),
        (["--adapter", "base=x"], "base is the name of another model"),
        (["--adapter", "a=x", "a=y"], "a is the name of another model"),
        (["--no-base"], "--no-base: then there is nothing to serve"),
        (["--name", "a b"], "--name 'a b': expected letters"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0, expected at least 1"),
        (["--request-timeout", "0"], "--request-timeout is 0.0, expected at least 0.001"),
        (["--cors", "*"], "--cors '*': expected an origin"),
        (["--no-base", "--name", "a", "--adapter", "b=x"], "--name has no effect with --no-base"),
        (["--context", "9999999999"], "--context is 9999999999, expected at least 0, and below 2^31"),
        (["--temperature", "1"], "unknown flag '--temperature'"),
    ],
)
def test_a_mistake_in_a_flag(words, expected):
    refused(re.escape(expected), parse, words, "")


@pytest.mark.parametrize("word", ["http://localhost:3000/x", "http://[", "http://Localhost", "http:localhost",
                                  "http://localhost:80", "https://localhost:443", "https://localhost:x",
                                  "localhost:3000"])  # fmt: skip
def test_what_is_no_origin(word):
    refused("expected an origin as browsers send it, such as http://localhost:3000", parse, ["--cors", word], "")


@pytest.mark.parametrize("origin", ["http://localhost:3000", "https://localhost:80", "http://[::1]:8080"])
def test_an_origin(origin):
    assert parse(["--cors", origin], "").origins == (origin,)


def test_a_server_takes_one_rank(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("a server has no rows to share with other ranks; start it without torchrun", program.main, [])


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_package_is_one_line(package, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else object())
    line = refused_by(program.main, [], capsys)
    assert line == f"error: {package} is not installed; pip install -r requirements-serve.txt\n"
