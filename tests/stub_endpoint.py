"""A local chat-completion server that misbehaves on purpose: each prompt names what it does to whoever sends it."""

import contextlib
import json
import socket
import threading
import time
from collections import Counter

from tests.stub_server import StubHandler, StubServer


class StubEndpoint(StubServer):
    """The last message says what to do, as words: `429 500 ok:TEXT` fails twice and then answers. Requests' headers,
    bodies and times are kept."""

    def __init__(self, port: int = 0):
        super().__init__(Handler, port)
        self.seen: list[tuple[dict, dict, float]] = []
        self.tries: Counter = Counter()
        self.sent = 0
        self.ended: list[str] = []  # what had no end of its own, and came to one
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"{super().url}/v1"


class Handler(StubHandler):
    def do_POST(self):
        body, prompt = self.request_body()
        with self.server.lock:
            self.server.seen.append((dict(self.headers), body, time.monotonic()))
            turn = self.server.tries[prompt]
            self.server.tries[prompt] += 1
        steps = prompt.split(" ", 9)
        getattr(self, "do_" + steps[min(turn, len(steps) - 1)].split(":")[0])(steps[min(turn, len(steps) - 1)])

    def request_body(self) -> tuple[dict, str]:
        """The request, and the last message of it."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        return body, body["messages"][-1]["content"]

    def answer(self, content, finish: str = "stop", **message) -> None:
        reply = {"id": "1", "object": "chat.completion", "created": 1, "model": "stub", "system_fingerprint": "",
                 "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
                 "choices": [{"index": 0, "finish_reason": finish,
                              "message": {"role": "assistant", "content": content, **message}}]}  # fmt: skip
        self.send(200, json.dumps(reply))

    def send(self, status: int, body: str, **headers) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    def do_ok(self, step):
        self.answer(step.partition(":")[2])

    def do_429(self, step):
        self.send(429, '{"error": "slow down"}', Retry_After="0.4")

    def do_500(self, step):
        self.send(500, '{"error": "server error"}')

    def do_503(self, step):
        self.send(503, "")

    def do_400(self, step):
        # A server that quotes the key back.
        self.send(400, json.dumps({"error": f"bad request with {self.headers.get('authorization')}"}))

    def do_401(self, step):
        self.send(401, '{"error": "no such key"}')

    def do_badjson(self, step):
        self.send(200, '{"choices": [{"mess')

    def do_wrongjson(self, step):
        self.send(200, "[1, 2]")

    def do_nochoices(self, step):
        self.send(200, '{"choices": null}')

    def do_raw(self, step):
        """raw:JSON: a reply of the caller's own making (no spaces)."""
        self.send(200, step.partition(":")[2])

    def do_status(self, step):
        """status:CODE or status:CODE:RETRY-AFTER, in which _ stands for a space."""
        _, code, *after = step.split(":", 2)
        self.send(int(code), '{"error": "trouble"}', **{"Retry_After": after[0].replace("_", " ")} if after else {})

    def do_redirect(self, step):
        """redirect:CODE:LOCATION"""
        _, code, location = step.split(":", 2)
        self.send(int(code), "", Location=location)

    def do_echo(self, step):
        """What the request brought as its key, in the reply of a success."""
        self.answer(f"Score: 1, by {self.headers['authorization']}", reasoning=self.headers["authorization"])

    def do_endless(self, step):
        """A success that never ends; `sent` counts its bytes."""
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        with contextlib.suppress(OSError):
            while self.server.sent < 64 << 20:
                self.server.sent += self.wfile.write(b" " * (1 << 16))

    def do_null(self, step):
        self.answer(None)

    def do_length(self, step):
        self.answer("Criterion 1 - Refusal: Yes", finish="length")

    def do_hang(self, step):
        time.sleep(30)
        self.server.ended.append(step)

    def do_drop(self, step):
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def do_drip(self, step):
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", "100000")
        self.end_headers()
        for _ in range(300):
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(0.1)
        self.server.ended.append(step)


def reply_by(monkeypatch, function) -> None:
    """Every request is answered by function(its last message); None is a reply without content."""
    monkeypatch.setattr(Handler, "do_POST", lambda self: self.answer(function(self.request_body()[1])))
