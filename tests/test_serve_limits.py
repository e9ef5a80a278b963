"""The server under pressure: who may ask, how much at once, clients that leave, an engine that fails, an end in order;
and not a word of anybody in any log."""

# ruff: noqa: F811  (a test's arguments are fixtures, which are imported)

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from psysafe.serve.settings import bind, host_names
from tests.live_server import CHAT, JSON, TEXT, Live, config, live_server, model, question, tokenizer  # noqa: F401
from tests.mistakes import refused

ROOT = Path(__file__).resolve().parents[1]
MARKER = "zebra-lantern-7431"  # stands in what is asked and answered, and so must not stand in any log
LONG = question("Tell me about the sea", max_tokens=200) | {"temperature": 1.0, "seed": 1}


@pytest.fixture(scope="module")
def live(model, tokenizer):
    with live_server(model, tokenizer, ends=False, max_body=50_000) as server:
        yield server


class Gate:
    """Lets the engine make so many forward passes, and then wait."""

    def __init__(self, live: Live):
        self.live, self.passes = live, threading.Semaphore(0)

    def __enter__(self) -> "Gate":
        self.live.pace = self.passes.acquire
        return self

    def __exit__(self, *error) -> None:
        self.live.pace = None
        self.passes.release(10**6)


def leave(live: Live, body: dict, read: int = 0) -> socket.socket:
    """A connection with a request on it, of whose answer so many bytes have been read."""
    connection = socket.create_connection(("127.0.0.1", live.port), timeout=20)
    content = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1:{live.port}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    while read > 0:
        received = connection.recv(read)
        assert received
        read -= len(received)
    return connection


def test_clients_that_leave_free_their_slots_after_two_forward_passes(live):
    """Twelve of them, streamed and plain: four in slots, eight in the queue."""
    with Gate(live) as gate:
        connections = [leave(live, {**LONG, "stream": i % 2 == 0}) for i in range(12)]
        live.until(lambda: live.worker.reserved == 12)
        gate.passes.release(8)
        live.until(lambda: gate.passes._value == 0 and live.engine.active == 4 and live.engine.queued == 8)
        assert live.health() == {"status": "ok", "active": 4, "queued": 8, "slots": 4}
        for connection in connections:
            connection.close()
        live.until(lambda: live.worker.reserved == 0)
        before = live.advances
        gate.passes.release(2)
        live.until(lambda: live.engine.active == live.engine.queued == 0)
        assert live.advances - before <= 2
        assert live.health() == {"status": "ok", "active": 0, "queued": 0, "slots": 4}
    assert live.ask(question(max_tokens=2))[0] == 200


def test_a_client_that_leaves_in_the_middle_of_a_stream(live, capsys):
    leave(live, {**LONG, "stream": True}, read=3000).close()
    live.until(lambda: live.worker.reserved == 0 and live.engine.active == 0)
    said = []  # its line in the log is written after its places are free

    def is_logged() -> bool:
        said.append(capsys.readouterr().err)
        return bool(re.search(r"499 \S+ base \d+\+\d+ tokens", "".join(said)))

    live.until(is_logged)
    assert "Traceback" not in "".join(said)


def test_what_finds_no_place_is_refused_at_once_and_nothing_hangs(live):
    """200 at the same time, four slots and a queue of 16. The refusals come while the engine makes no pass at all."""
    seconds, body = [], json.dumps(LONG | {"max_tokens": 3}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1:{live.port}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def ask() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", live.port)
        start = time.perf_counter()
        writer.write(request)
        status = int((await reader.readline()).split()[1])
        headers = await reader.readuntil(b"\r\n\r\n")
        if status == 429:
            seconds.append(time.perf_counter() - start)
            assert b"retry-after: 1" in headers.lower()
        writer.close()
        return status

    async def all_at_once() -> list[int]:
        return await asyncio.wait_for(asyncio.gather(*(ask() for _ in range(200))), 60)

    with Gate(live):
        tasks = threading.Thread(target=lambda: statuses.extend(asyncio.run(all_at_once())))
        statuses: list[int] = []
        tasks.start()
        live.until(lambda: len(seconds) == 180, 60)
    tasks.join(60)
    assert sorted(statuses) == [200] * 20 + [429] * 180
    print(f"429 after {statistics.median(seconds) * 1000:.0f} ms (median), {max(seconds) * 1000:.0f} ms (slowest)")
    assert live.health()["active"] == 0


def test_more_answers_than_places_are_refused_before_any_work(live):
    with Gate(live):
        connections = [leave(live, LONG | {"n": 10})]
        live.until(lambda: live.worker.reserved == 10)
        status, headers, body = live.ask(question(n=11))
        assert (status, headers["retry-after"], body["error"]["type"]) == (429, "1", "rate_limit_error")
        assert live.ask(question(n=21))[0] == 400  # never possible
        assert live.worker.reserved == 10
        for connection in connections:
            connection.close()
    live.until(lambda: live.worker.reserved == 0)


# Who may ask


@pytest.mark.parametrize("host", ["evil.invalid", "127.0.0.1", "localhost:1", "127.0.0.1.evil.invalid:{port}", ""])
def test_another_host_is_refused(live, host):
    for path, method in ((CHAT, "POST"), ("/", "GET"), ("/health", "GET")):
        status, _, body = live.ask(question(), path, JSON | {"host": host.format(port=live.port)}, method)
        assert (status, body["error"]["code"]) == (400, "wrong_host")
    assert live.ask(question(max_tokens=1), headers=JSON | {"host": f"LOCALHOST:{live.port}"})[0] == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", None,
                                  "text/plain; application/json", "application/jsonx"])  # fmt: skip
def test_a_body_that_is_not_called_json_is_refused(live, kind):
    headers = {} if kind is None else {"content-type": kind}
    assert live.ask(question(), headers=headers)[0] == 415
    assert live.ask(question(max_tokens=1), headers={"content-type": "Application/JSON; charset=utf-8"})[0] == 200


@pytest.mark.parametrize("secret", ["s3cret-ü", "s3cret-à", "s3cret-\udcff"], ids=ascii)
def test_the_key(model, tokenizer, secret):
    """Also one whose last byte is a space in Latin-1, and one that is no UTF-8."""
    right = b"bearer " + os.fsencode(secret)
    with live_server(model, tokenizer, key=secret) as live:
        for key in (b"Bearer wrong", right[7:], b"Bearer ", b"Basic" + right[6:], right + b"x", right[:-1], None):
            headers = JSON if key is None else JSON | {"authorization": key}
            status, answered, body = live.ask(question(), headers=headers)
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")
            assert answered["www-authenticate"] == "Bearer"
            assert live.ask(None, "/v1/models", headers, "GET")[0] == 401
            assert live.ask(None, "/metrics", headers, "GET")[0] == 401
        assert live.ask(question(max_tokens=1), headers=JSON | {"authorization": right})[0] == 200
        assert live.ask(None, "/health", {}, "GET")[0] == live.ask(None, "/", {}, "GET")[0] == 200


def test_the_host_does_not_decide_the_path(model, tokenizer):
    """Where any Host is taken, as behind 0.0.0.0, it may hold what looks like a path."""
    with live_server(model, tokenizer, hosts=None, key="k") as live:
        for host in ("[", "x/health?", "x/#", "a b", "::1"):
            assert live.ask(question(), headers=JSON | {"host": host})[0] == 401
            assert live.ask(None, "/v1/models", {"host": host, "authorization": "Bearer k"}, "GET")[0] == 200


def test_a_body_is_counted_while_it_is_read(live):
    """Whether its length is announced or not. An end is not waited for."""
    assert live.ask(question("x" * 60_000))[0] == 413
    status, headers, body = live.ask(b" " * 60_000)
    assert (status, body["error"]["code"], headers["connection"]) == (413, "too_large", "close")
    connection = socket.create_connection(("127.0.0.1", live.port), timeout=20)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1:{live.port}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
    with contextlib.suppress(OSError):
        for _ in range(10_000):
            connection.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")
        pytest.fail("an endless body was read")
    connection.close()


def test_paths_and_methods(live):
    assert live.ask(question(), "/v1/embeddings")[0] == 404
    status, headers, body = live.ask(None, CHAT, {}, "GET")
    assert (status, headers["allow"], body["error"]["type"]) == (405, "POST", "invalid_request_error")
    assert live.ask(None, "/v1/models/base", {}, "GET")[2]["id"] == "base"
    assert live.ask(None, "/v1/models/other", {}, "GET")[2]["error"]["code"] == "model_not_found"
    assert [entry["id"] for entry in live.ask(None, "/v1/models", {}, "GET")[2]["data"]] == ["base"]
    assert live.ask(question(model="other"))[2]["error"]["code"] == "model_not_found"


def test_web_pages_may_ask_only_where_they_are_named(model, tokenizer, live):
    origin = "http://localhost:3000"
    asks = {"origin": origin, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    assert live.ask(None, CHAT, asks, "OPTIONS")[0] == 405
    with live_server(model, tokenizer, origins=(origin,), key="k") as open_to_one:
        status, headers, _ = open_to_one.ask(None, CHAT, asks, "OPTIONS")
        assert status == 200 and headers["access-control-allow-origin"] == origin
        status, headers, _ = open_to_one.ask(question(), headers=JSON | {"origin": origin})
        assert status == 401 and headers["access-control-allow-origin"] == origin  # the page may read why
        _, headers, _ = open_to_one.ask(None, CHAT, asks | {"origin": "http://localhost:3001"}, "OPTIONS")
        assert "access-control-allow-origin" not in headers


def test_without_a_key_only_this_machine_is_served():
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        refused("without a key only this machine is served; set PSYSAFE_API_KEY", bind, host, 0, "")
    refused("--host 192.0.2.1 --port 0: .*; give another --port or --host", bind, "192.0.2.1", 0, "key")
    refused("no address of this machine", bind, "no-such-machine.invalid", 0, "key")
    with bind("0.0.0.0", 0, "key") as listener:
        assert host_names("0.0.0.0", listener) is None
    with bind("localhost", 0, "") as listener:
        port = listener.getsockname()[1]
        assert host_names("localhost", listener) >= {f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"}
        listener.listen()
        refused("--port .*in use; give another --port", bind, "localhost", port, "")


# What goes wrong


def test_a_prompt_that_cannot_be_read_fails_alone(live, monkeypatch):
    forward = type(live.engine.model).forward

    def failing(self, tokens, *args, **kwargs):
        if 7 in tokens[: len(tokens)].tolist() and len(tokens) > 30:
            raise RuntimeError(MARKER)
        return forward(self, tokens, *args, **kwargs)

    monkeypatch.setattr(type(live.engine.model), "forward", failing)
    bad = {"model": "base", "prompt": [7] * 40, "temperature": 0}
    status, _, body = live.ask(bad, TEXT)
    assert status == 503 and MARKER not in json.dumps(body)
    assert live.ask(question(max_tokens=3))[0] == 200


def test_a_dead_engine_says_so(model, tokenizer, capsys):
    with live_server(model, tokenizer, ends=False) as live, Gate(live) as gate:
        connections = [leave(live, LONG | {"stream": i == 0}) for i in range(2)]
        live.until(lambda: live.worker.reserved == 2)
        gate.passes.release(5)
        live.until(lambda: gate.passes._value == 0)

        def broken():
            raise RuntimeError(MARKER)

        live.pace = broken
        gate.passes.release(1)
        replies = [connection.makefile("rb").read(4000) for connection in connections]
        assert b"the engine has failed" in replies[0] and b" 503 " in replies[1]
        assert live.ask(None, "/health", {}, "GET")[0] == 503 and live.ask(question())[0] == 503
        assert "engine_alive 0" in live.ask(None, "/metrics", {}, "GET")[2]
    said = capsys.readouterr().err
    assert "the engine has failed: RuntimeError" in said and MARKER not in said


def test_a_request_that_comes_while_the_engine_fails_gets_its_error(model, tokenizer):
    """It is in no list of the engine's thread yet: its command waits for the pass that fails."""
    failing = threading.Event()

    def broken():
        failing.set()
        gate.passes.acquire()
        raise RuntimeError(MARKER)

    with live_server(model, tokenizer, ends=False) as live, Gate(live) as gate:
        live.pace = broken
        connections = [leave(live, LONG)]
        live.until(failing.is_set)
        connections.append(leave(live, LONG))
        live.until(lambda: live.worker.reserved == 2 and live.worker._commands)
        gate.passes.release(1)
        for connection in connections:
            assert b" 503 " in connection.makefile("rb").readline()
        assert live.worker.reserved == 0


def test_a_request_has_its_time(model, tokenizer):
    """In the queue, in a slot, and as a stream; then its place is free."""
    with live_server(model, tokenizer, ends=False, timeout_s=1) as live:
        live.pace = lambda: time.sleep(0.02)
        status, headers, body = live.ask(LONG)
        assert (status, body["error"]["code"], headers["retry-after"]) == (503, "timeout", "1")
        text = live.ask(LONG | {"stream": True})[2]
        assert '"code":"timeout"' in text and "[DONE]" not in text
        live.until(lambda: live.worker.reserved == live.engine.active == 0)
        connection = socket.create_connection(("127.0.0.1", live.port), timeout=20)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1:{live.port}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())  # and nothing more
        assert b" 408 " in connection.recv(1000)


def test_an_error_of_ours_ends_one_request_and_is_logged_without_its_message(live, monkeypatch, capsys):
    def broken(*args):
        raise KeyError(MARKER)

    monkeypatch.setattr("psysafe.serve.app.ChatCompletion.push", broken)
    assert live.ask(question())[0] == 500
    monkeypatch.undo()
    said = capsys.readouterr().err
    assert "an error of the server: KeyError" in said and MARKER not in said
    live.until(lambda: live.worker.reserved == 0)
    assert live.ask(question(max_tokens=1))[0] == 200


def test_nothing_that_is_asked_or_answered_is_logged(model, tokenizer, capfd, caplog):
    caplog.set_level(0)
    text = json.dumps(MARKER).encode()
    with live_server(model, tokenizer) as live:
        live.says = tokenizer.encode(f"{MARKER}</think>{MARKER}")
        answer = live.ask(question(MARKER))
        assert answer[2]["choices"][0]["message"]["content"] == MARKER
        assert "[DONE]" in live.ask(question(MARKER, stream=True))[2]
        live.says = None
        bodies = [question(MARKER, model=MARKER), question(**{MARKER: MARKER}), question(stop=MARKER * 99), b"{" + text,
                  text, question(messages=[{"role": MARKER, "content": MARKER}]), question(MARKER * 999)]  # fmt: skip
        assert [live.ask(body)[0] for body in bodies] == [404, 400, 400, 400, 400, 400, 400]
        for path in (f"/{MARKER}", f"/v1/models/{MARKER}", f"{CHAT}?q={MARKER}"):
            live.ask(question(MARKER), path, JSON | {"origin": f"http://{MARKER}.invalid", "x-prompt": MARKER})
            live.ask(None, path, {}, "GET")
        live.ask(question(), headers=JSON | {"host": MARKER})
        live.ask(question(), headers={"content-type": MARKER})
        leave(live, question(MARKER, max_tokens=200, stream=True), read=400).close()
        with socket.create_connection(("127.0.0.1", live.port)) as connection:
            connection.sendall(f"{MARKER} HTTP\r\n\r\n".encode())
            connection.recv(1000)
        live.until(lambda: live.worker.reserved == 0)
        metrics = live.ask(None, "/metrics", {}, "GET")[2]
    said = "".join(capfd.readouterr())
    assert said.count("tokens") > 10 and re.search(r"200 /v1/chat/completions base \d+\+\d+ tokens \d+ ms", said)
    assert MARKER not in said + metrics + caplog.text and "Traceback" not in said


# The program


def start(*words: str, **environment: str) -> tuple[subprocess.Popen, str]:
    """The server as its own process, and the line that says where it serves."""
    process = subprocess.Popen(
        [sys.executable, "-m", "psysafe.serve", "--port", "0", "--context", "256", *words], cwd=ROOT,
        env=os.environ | environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stderr:
        if line.startswith("serving"):
            return process, line
    raise AssertionError(process.wait())


def test_sigterm_lets_answers_come_to_their_end():
    process, line = start("--slots", "2", "--model", f"random:{ROOT}/psysafe/assets/tiny/config.json")
    port = int(re.search(r":(\d+)/v1", line)[1])
    connection = leave(Live(None, None, None, port), LONG | {"stream": True, "max_tokens": 40}, read=300)
    process.send_signal(signal.SIGTERM)
    text = connection.makefile("rb").read().decode()
    said = process.stderr.read()
    assert process.wait(20) == 143 and "Traceback" not in said and "stopping" in said
    assert "[DONE]" in text and '"finish_reason":"' in text


def test_what_takes_longer_than_the_grace_gets_an_error_instead_of_silence(model, tokenizer):
    with live_server(model, tokenizer, slots=1, ends=False, grace_s=0.1) as live:
        live.pace = lambda: time.sleep(0.05)
        connections = [leave(live, LONG | {"stream": i == 0}) for i in range(2)]  # in the slot, and in the queue
        live.until(lambda: live.worker.reserved == 2)
        assert connections[0].recv(15) == b"HTTP/1.1 200 OK"
    replies = [connection.makefile("rb").read().decode() for connection in connections]
    assert "the server is stopping" in replies[0] and "[DONE]" not in replies[0] and " 503 " in replies[1]
