"""The endpoint under every kind of failure: no item is lost, none is scored wrongly, deadlines hold, no key leaks."""

import base64
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from psysafe.endpoint import Endpoint, ItemFailed, RetryPolicy, key_from, run_items
from psysafe.journal import Journal, key_of
from tests.mistakes import refused, refused_by
from tests.stub_endpoint import Handler, StubEndpoint
from tests.stub_server import reserved_port
from tests.test_run_log import FullDisk

ROOT = Path(__file__).resolve().parents[1]
# An attempt has more time than a busy machine takes: one that ends by the clock would be an attempt too many.
RETRY_POLICY = RetryPolicy(deadline_s=120, attempt_s=60, attempts=4, min_wait_s=0.02, max_wait_s=0.1)
KEY = "sk-not-a-real-key-7431"


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_must_not_leave_this_machine")
    with StubEndpoint() as server:
        yield server


def chat(stub, text: str, key: str = "", retry_policy: RetryPolicy = RETRY_POLICY):
    return Endpoint(stub.url, "stub", key, retry_policy, temperature=0.1).chat([{"role": "user", "content": text}])


def through_proxy(monkeypatch, stub, scheme: str, user: str) -> list:
    """A request to a host that only the proxy can reach -> (method, target, headers) of each request to the proxy."""
    requests, port = [], stub.server_address[1]

    def reply(self):
        requests.append((self.command, self.path, dict(self.headers)))
        if self.command == "CONNECT":
            return self.send(403, "no tunnel")
        self.request_body()
        self.answer("fine")

    for method in ("do_POST", "do_CONNECT"):
        monkeypatch.setattr(Handler, method, reply, raising=False)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(f"{scheme}_proxy", f"http://{user}127.0.0.1:{port}")
    endpoint = Endpoint(f"{scheme}://judge.invalid/v1", "stub", KEY, RetryPolicy(attempts=1))
    with contextlib.suppress(ItemFailed):
        endpoint.chat([{"role": "user", "content": "ok"}])
    return requests


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_user_and_password_of_a_proxy_are_sent_to_the_proxy_alone(stub, scheme, monkeypatch):
    (method, target, headers), *more = through_proxy(monkeypatch, stub, scheme, "me:p%40ss%3Aword@")
    headers = {name.lower(): value for name, value in headers.items()}
    assert not more and headers["proxy-authorization"] == f"Basic {base64.b64encode(b'me:p@ss:word').decode()}"
    if scheme == "https":
        assert (method, target) == ("CONNECT", "judge.invalid:443") and "authorization" not in headers
    else:
        assert (method, target) == ("POST", f"{scheme}://judge.invalid/v1/chat/completions")
        assert headers["authorization"] == f"Bearer {KEY}"
    ((_, _, headers),) = through_proxy(monkeypatch, stub, scheme, "")
    assert "proxy-authorization" not in {name.lower() for name in headers}


def test_where_no_server_listens_the_run_ends_at_once(tmp_path, monkeypatch):
    """Refused connections of a server that has answered are a passing trouble."""
    monkeypatch.setenv("no_proxy", "*")
    slow = RetryPolicy(deadline_s=5, min_wait_s=30)
    with reserved_port() as port:
        nobody = f"http://127.0.0.1:{port}/v1"
        for url, reason in ((nobody, "Connection refused"), ("http://judge.invalid/v1", "[^)]+")):
            endpoint = Endpoint(url, "stub", KEY, slow)
            items = {key_of(n): [{"role": "user", "content": f"{n}"}] for n in range(20)}
            line = rf"^{re.escape(url)}: no server answers there \({reason}\); start it, or give another URL$"
            refused(line, run_items, items, endpoint.chat, tmp_path / "items.jsonl")
        with StubEndpoint(port) as stub:
            endpoint = Endpoint(stub.url, "stub", KEY, RETRY_POLICY)
            endpoint.chat([{"role": "user", "content": "ok:fine"}])
        with pytest.raises(ItemFailed, match="refused, after 4 attempts"):
            endpoint.chat([{"role": "user", "content": "ok:fine"}])


@pytest.mark.parametrize("trouble", ["429", "500", "503", "badjson", "wrongjson", "drop"])
def test_a_passing_trouble_costs_an_attempt_and_nothing_else(stub, trouble):
    assert chat(stub, f"{trouble} ok:fine").text == "fine"
    assert len(stub.seen) == 2


@pytest.mark.parametrize("trouble", ["hang", "drip"])
def test_an_attempt_that_does_not_end_costs_its_time_and_nothing_else(stub, trouble):
    assert chat(stub, f"{trouble} ok:fine", retry_policy=RetryPolicy(attempt_s=3, min_wait_s=0.01)).text == "fine"
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


@pytest.mark.parametrize(
    ("trouble", "reason", "tries"),
    [
        ("drip", "no whole reply in [0-9.]+ s, and 1 s for this item are used up", 1),
        ("hang", "no whole reply in [0-9.]+ s, and 1 s for this item are used up", 1),
        ("429", "1 s for this item are used up|no whole reply in 0", 3),  # which asks for 0.4 s each time
    ],
)
def test_the_deadline_is_kept(stub, trouble, reason, tries):
    """Counted in requests, and by what ended the last one: the seconds would be the machine's."""
    with pytest.raises(ItemFailed, match=reason):
        chat(stub, trouble, retry_policy=RetryPolicy(deadline_s=1.0, attempts=100, min_wait_s=0.01, max_wait_s=0.05))
    assert len(stub.seen) <= tries and not stub.ended


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


@pytest.mark.parametrize(
    "url", ["localhost:80", "ftp://localhost", "http://" + "me:secret@localhost", "http://localhost?key=secret"]
)
def test_a_url_that_cannot_be_meant(url):
    assert "secret" not in refused("endpoint", Endpoint, url, "stub")


def test_offline_mode_is_the_hubs_and_leaves_other_endpoints_alone(stub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert chat(stub, "ok:fine").text == "fine"
    refused("HF_HUB_OFFLINE", Endpoint, "https://huggingface.co/v1", "stub")


@pytest.mark.parametrize("code", [408, 425, 429, 500, 502, 503, 504, 520, 524, 529])
def test_a_status_that_passes_is_tried_again(stub, code):
    assert chat(stub, f"status:{code} ok:fine").text == "fine"


@pytest.mark.parametrize("code", [400, 403, 404, 413, 422, 501])
def test_a_status_that_stays_fails_at_once(stub, code):
    with pytest.raises(ItemFailed, match=f"HTTP {code}"):
        chat(stub, f"status:{code} ok:fine")
    assert len(stub.seen) == 1


@pytest.mark.parametrize(
    "after",
    ["Fri,_31_Dec_99999_23:59:59_GMT", "Fri,_99_Foo_2026", "nan", "-inf", "-5", "soon", "",
     "Mon,_01_Jan_0001_00:00:00_-0000"],
)  # fmt: skip
def test_a_retry_after_that_says_nothing_is_not_waited_for(stub, after):
    assert chat(stub, f"status:503:{after} ok:fine").text == "fine"


@pytest.mark.parametrize("after", ["inf", "1e999", "Fri,_31_Dec_9999_23:59:59_GMT", "99999999999999999999"])
def test_a_retry_after_beyond_the_deadline_fails_the_item(stub, after):
    with pytest.raises(ItemFailed, match="used up"):
        chat(stub, f"status:503:{after} ok:fine")


STRANGE = ["null", "1", "[]", '"text"', "{}", '{"choices":"text"}', '{"choices":{"0":1}}', '{"choices":[1]}',
           '{"choices":[null]}', '{"choices":[{"message":"text"}]}', '{"choices":[{"message":{"content":7}}]}',
           '{"choices":[{"message":{"content":[{"type":"text"}]}}]}', '{"choices":[[]]}', "[" * 5000,
           '{"error":"overloaded"}', '{"choices":[{"message":{"content":"\\ud800"}}' + "}" * 3]  # fmt: skip


@pytest.mark.parametrize("reply", STRANGE, ids=lambda reply: reply[:40])
def test_a_reply_of_another_shape_fails_its_item_and_no_other(stub, tmp_path, reply):
    items = {"strange": f"raw:{reply}", "good": "ok:fine"}
    outcome = run_items(items, call_through(stub), tmp_path / "items.jsonl", workers=1)
    assert outcome.rows == {"good": {"text": "fine"}} and list(outcome.failed) == ["strange"]


def test_what_is_not_needed_of_a_reply_may_be_anything(stub):
    reply = '{"usage":NaN,"model":[],"choices":[{"finish_reason":7,"message":{"content":"1","reasoning":3}}]}'
    assert chat(stub, f"raw:{reply}") == ("1", "")


def test_a_reply_without_end_is_not_read_to_its_end(stub):
    with pytest.raises(ItemFailed, match="more than 4 MB"):
        chat(stub, "endless", retry_policy=RetryPolicy(deadline_s=30, attempt_s=20, attempts=2))
    assert 4 << 20 < stub.sent < 32 << 20  # the rest is what the sockets buffer


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_a_redirect_to_another_host_is_refused(stub, code):
    with StubEndpoint() as other, pytest.raises(ItemFailed, match=f"redirects to {re.escape(other.url)}"):
        chat(stub, f"redirect:{code}:{other.url}/chat/completions", KEY)
    assert other.seen == [] and len(stub.seen) == 1


def test_a_redirect_on_the_same_host_is_followed_with_the_same_request(stub):
    assert chat(stub, f"redirect:308:/v1/chat/completions/ redirect:307:{stub.url}/other ok:fine", KEY).text == "fine"
    assert [seen[1]["model"] for seen in stub.seen] == ["stub"] * 3
    with pytest.raises(ItemFailed, match="redirects to"):
        chat(stub, f"redirect:307:{stub.url}/for-ever")
    for location in ("http://127.0.0.1:x/", "//[", "ftp://127.0.0.1/"):
        with pytest.raises(ItemFailed, match="HTTP 307"):
            chat(stub, f"redirect:307:{location}")


@pytest.mark.parametrize("before", range(240, 310, 7))
def test_a_key_across_the_cut_of_a_reason_is_masked(stub, monkeypatch, before):
    def quotes(self):
        self.request_body()
        self.send(400, "x" * before + KEY + "y" * 100)

    monkeypatch.setattr(Handler, "do_POST", quotes)
    with pytest.raises(ItemFailed) as failed:
        chat(stub, "anything", KEY)
    assert not any(KEY[: n + 1] in str(failed.value) for n in range(3, len(KEY)))


def test_a_key_in_a_good_reply_is_masked(stub):
    reply = chat(stub, "echo", KEY)
    assert reply == ("Score: 1, by Bearer ***", "Bearer ***")
    assert chat(stub, "echo", "none").text == "Score: 1, by Bearer none"  # a placeholder is no secret, but a word
    odd = 'sk-"quoted"/and+more'
    quoting = json.dumps({"choices": [{"message": {"content": f"{odd},{odd}"}}]}, separators=(",", ":"))
    assert chat(stub, f"raw:{quoting}", odd).text == "***,***"


PROMPTS = [f"{trouble} ok:{i}" for i, trouble in enumerate(["429", "500", "drop", "badjson", "503", "wrongjson"] * 3)]
LASTING = ["400", "null", "length", "nochoices"]


def call_through(stub, key=KEY):
    endpoint = Endpoint(stub.url, "stub", key, RETRY_POLICY)
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


def test_a_full_disk_is_named_with_its_file_and_costs_the_last_line_alone(tmp_path, capsys):
    """First there is room for a part of a line, which is cut off again at the next start, then for none."""
    out, row = tmp_path / "items.jsonl", {"x": "long " * 20}

    def main(argv):
        with Journal(out) as journal:
            journal._file = FullDisk(journal._file, 500)
            for number in range(4):
                journal.append(key_of(number), row)

    assert refused_by(main, [], capsys) == f"error: {out}: No space left on device\n"
    assert out.stat().st_size == 500
    with Journal(out) as journal:
        assert list(journal.rows.values()) == [row] * 3
        journal.append(key_of("next"), row)
    with Journal(out) as journal:
        assert key_of("next") in journal.rows


def test_two_writers_are_refused(tmp_path):
    with Journal(tmp_path / "j"), pytest.raises(ValueError, match="another process"):
        Journal(tmp_path / "j")


def test_keys_tell_settings_apart_and_come_from_the_environment(monkeypatch):
    assert key_of("a", {"t": 0.1, "u": 1}) == key_of("a", {"u": 1, "t": 0.1}) != key_of("a", {"t": 0.2, "u": 1})
    monkeypatch.setenv("SOME_KEY", " secret\n")
    assert key_from("SOME_KEY") == "secret" and key_from("NOT_SET_ANYWHERE") == ""
