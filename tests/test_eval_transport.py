"""The endpoint under every kind of failure: no item is lost, none is scored wrongly, deadlines hold, no key leaks."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from psysafe.endpoint import Endpoint, ItemFailed, Patience, key_from, run_items
from psysafe.journal import Journal, key_of
from tests.mistakes import refused
from tests.stub_endpoint import StubEndpoint

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = Patience(deadline_s=6, attempt_s=1, attempts=4, first_wait_s=0.02, longest_wait_s=0.1)
KEY = "sk-not-a-real-key-7431"


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_must_not_leave_this_machine")
    with StubEndpoint() as server:
        yield server


def chat(stub, text: str, key: str = "", patience: Patience = PATIENCE):
    return Endpoint(stub.url, "stub", key, patience, temperature=0.1).chat([{"role": "user", "content": text}])


@pytest.mark.parametrize("trouble", ["429", "500", "503", "badjson", "wrongjson", "drop", "hang", "drip"])
def test_a_passing_trouble_costs_an_attempt_and_nothing_else(stub, trouble):
    assert chat(stub, f"{trouble} ok:fine").text == "fine"
    assert len(stub.seen) == 2


def test_retry_after_is_waited_for(stub):
    chat(stub, "429 ok:fine")
    assert stub.seen[1][2] - stub.seen[0][2] >= 0.4


@pytest.mark.parametrize(
    ("trouble", "reason", "tries"),
    [
        ("400", "HTTP 400", 1),
        ("null", "no content", 1),
        ("nochoices", "no choices", 1),
        ("length", "token limit", 1),
        ("500", "HTTP 500.*after 4 attempts", 4),
        ("drop", "after 4 attempts", 4),
        ("badjson", "after 4 attempts", 4),
    ],
)
def test_a_lasting_trouble_fails_with_its_reason(stub, trouble, reason, tries):
    with pytest.raises(ItemFailed, match=reason):
        chat(stub, trouble)
    assert len(stub.seen) == tries


@pytest.mark.parametrize("trouble", ["drip", "hang", "429"])
def test_the_deadline_is_kept(stub, trouble):
    began = time.monotonic()
    with pytest.raises(ItemFailed):
        chat(stub, trouble, patience=Patience(deadline_s=1.0, attempts=100, first_wait_s=0.01, longest_wait_s=0.05))
    assert time.monotonic() - began < 2.5  # a loaded machine


def test_a_refused_key_ends_the_run_and_names_the_remedy(stub):
    refused(r"another key.*environment", chat, stub, "401", KEY)


def test_the_key_goes_to_the_endpoint_alone(stub):
    chat(stub, "ok:fine", KEY)
    chat(stub, "ok:fine too")
    with_key, without = (headers for headers, _, _ in stub.seen)
    assert with_key["authorization"] == f"Bearer {KEY}"
    assert without["authorization"] == "Bearer none"
    assert "hf_must_not" not in json.dumps([seen[:2] for seen in stub.seen])
    with pytest.raises(ItemFailed) as failed:
        chat(stub, "400", KEY)
    assert KEY not in str(failed.value) and "***" in str(failed.value)


@pytest.mark.parametrize("key", [None, ""])
def test_the_client_would_send_hf_token_without_a_key_of_ours(stub, key):
    """Why a placeholder is sent: if the client stops doing this, the precaution may go."""
    from huggingface_hub import InferenceClient

    client = InferenceClient(base_url=stub.url, api_key=key)
    client.chat_completion([{"role": "user", "content": "ok:fine"}], model="stub")
    assert "hf_must_not" in stub.seen[0][0].get("authorization", "")


@pytest.mark.parametrize("url", ["localhost:80", "ftp://localhost", "http://" + "me:secret@localhost", "http://localhost?key=secret"])
def test_a_url_that_cannot_be_meant(url):
    assert "secret" not in refused("endpoint", Endpoint, url, "stub")


def test_offline_mode_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE", Endpoint, "http://localhost:8000/v1", "stub")


PROMPTS = [f"{trouble} ok:{i}" for i, trouble in enumerate(["429", "500", "drop", "badjson", "503", "wrongjson"] * 3)]
LASTING = ["400", "null", "length", "nochoices"]


def call_through(stub, key=KEY):
    endpoint = Endpoint(stub.url, "stub", key, PATIENCE)
    return lambda text: {"text": endpoint.chat([{"role": "user", "content": text}]).text}


def test_many_items_under_all_troubles_at_once(stub, tmp_path):
    items = {f"k{i}": prompt for i, prompt in enumerate([*PROMPTS, *LASTING])}
    out = tmp_path / "items.jsonl"
    outcome = run_items(items, call_through(stub), out, workers=6)
    assert outcome.rows == {f"k{i}": {"text": str(i)} for i in range(len(PROMPTS))}
    assert set(outcome.failed) == {f"k{len(PROMPTS) + i}" for i in range(len(LASTING))}
    assert KEY not in "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())

    asked = len(stub.seen)
    again = run_items(items, call_through(stub), out, workers=6)
    assert again.rows == outcome.rows
    assert len(stub.seen) - asked == len(LASTING)  # only what failed is asked again


def test_an_error_of_ours_stops_the_run_and_keeps_what_was_done(tmp_path):
    def call(item):
        if item == 5:
            raise ZeroDivisionError
        return {"n": item}

    out = tmp_path / "items.jsonl"
    with pytest.raises(ZeroDivisionError):
        run_items({str(i): i for i in range(20)}, call, out, workers=1)
    assert run_items({str(i): i for i in range(5)}, call, out).rows == {str(i): {"n": i} for i in range(5)}


@pytest.mark.parametrize("n", [1, 3, 8])
def test_killed_and_restarted_gives_the_same_rows(tmp_path, n):
    """kill -9 after n lines, then a second start: every item once, and the same rows as without a kill."""
    out = tmp_path / "items.jsonl"
    program = """if 1:
        import sys, time
        from psysafe.endpoint import run_items
        run_items({str(i): i for i in range(12)}, lambda i: time.sleep(0.05) or {"square": i * i}, sys.argv[1], 2)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program, str(out)], env=environment)
    while process.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") >= n):
        time.sleep(0.005)
    process.kill()
    process.wait()
    done = out.read_bytes().count(b"\n")
    assert n <= done
    outcome = run_items({str(i): i for i in range(12)}, lambda i: {"square": i * i}, out)
    assert outcome.rows == {str(i): {"square": i * i} for i in range(12)}
    assert out.read_bytes().count(b"\n") == 12


def test_a_torn_line_is_done_again_and_foreign_files_are_left_alone(tmp_path):
    out = tmp_path / "items.jsonl"
    keys = [key_of("a"), key_of("b")]
    with Journal(out) as journal:
        journal.append(keys[0], {"x": "Ünïcode\u2028"})
        journal.append(keys[1], {"x": 2})
    whole = out.read_bytes()
    for cut in range(len(whole) + 1):
        out.write_bytes(whole[:cut])
        with Journal(out) as journal:
            assert list(journal.rows) == keys[: whole[:cut].count(b"\n")]
    other_keys = b'{"key": "value"}', b'{"key": "value", "x": 1}', b'{"key": 1', b'{"key": "' + 20 * b"f" + b'x"'
    for foreign in (*other_keys, b'{"model": 1}', b"hello", b"[1]\n", b'{"x": 1}\n', b"\xff\xfe\n"):
        out.write_bytes(foreign)
        refused("another --out", Journal, out)
        assert out.read_bytes() == foreign


def test_two_writers_are_refused(tmp_path):
    with Journal(tmp_path / "j"), pytest.raises(ValueError, match="another process"):
        Journal(tmp_path / "j")


def test_keys_tell_settings_apart_and_come_from_the_environment(monkeypatch):
    assert key_of("a", {"t": 0.1, "u": 1}) == key_of("a", {"u": 1, "t": 0.1}) != key_of("a", {"t": 0.2, "u": 1})
    monkeypatch.setenv("SOME_KEY", " secret\n")
    assert key_from("SOME_KEY") == "secret" and key_from("NOT_SET_ANYWHERE") == ""
