"""A real server (uvicorn, on a free port) in a thread of the test's process, and small clients for it."""

import asyncio
import contextlib
import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from psysafe import load_model, load_tokenizer
from psysafe.data.tokenizer import Tokenizer
from psysafe.files import ASSETS
from psysafe.generation.engine import Engine
from psysafe.generation.generator import CLOSING
from psysafe.generation.request import Event
from psysafe.model.decoder import Qwen3_5
from psysafe.model.mixed_adapters import MixedAdapters
from psysafe.serve.app import App, Policy
from psysafe.serve.page import Page
from psysafe.serve.protocol import Served
from psysafe.serve.server import Server
from psysafe.serve.settings import bind, host_names
from psysafe.serve.worker import Worker

JSON = {"content-type": "application/json"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("assets:tiny")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """Four layers with random weights: all kinds of bytes, long answers, fast."""
    config = json.loads((ASSETS / "tiny" / "config.json").read_text())
    config |= {"num_hidden_layers": 4, "layer_types": config["layer_types"][:4]}
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def model(config) -> Qwen3_5:
    return load_model(f"random:{config}")


@dataclass
class Live:
    """A server that runs, from inside and outside."""

    engine: Engine
    worker: Worker
    app: App
    port: int
    advances: int = 0
    pace: Callable[[], object] | None = None  # called before every `advance`
    says: list[int] | None = None  # every answer from now on, whatever the model chooses; none after it ends by itself

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def connect(self, timeout: float = 60) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def ask(self, body: object, path: str = CHAT, headers: dict | None = None, method: str = "POST"):
        """(status, headers, parsed body) of a request on a connection of its own."""
        with contextlib.closing(self.connect()) as connection:
            content = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
            connection.request(method, path, content, JSON if headers is None else headers)
            response = connection.getresponse()
            text = response.read().decode()
            is_json = response.getheader("content-type", "") == "application/json"
            return response.status, dict(response.getheaders()), json.loads(text) if is_json else text

    def health(self) -> dict:
        return self.ask(None, "/health", {}, "GET")[2]

    def until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come to that"
            time.sleep(0.002)

    def advance(self, advance: Callable[[], list[Event]], places: Counter) -> list[Event]:
        """One forward pass, with the tokens of `says` in place of the model's."""
        if self.pace:
            self.pace()
        self.advances += 1
        if self.says is not None:
            # It has an end of its own: an end token that the model samples in the middle of it would cut it short.
            self.engine.state.finish_of_token.zero_()
        events = []
        for event in advance():
            if self.says is not None:
                event = event._replace(token=self.says[places[event.row]])
                places[event.row] += 1
                if places[event.row] == len(self.says):
                    self.engine.cancel(event.row)
                    event = event._replace(finish="stop")
            events.append(event)
        return events


def question(text: str = "Hello", model: str = "base", **fields) -> dict:
    """A chat completion's body; greedy, so that answers can be compared."""
    return {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, **fields}


@contextlib.contextmanager
def live_server(
    model: Qwen3_5, tokenizer: Tokenizer, *, slots: int = 4, context: int = 256, max_queue: int = 16,
    ends: bool = True, adapters: MixedAdapters | None = None, prefill_tokens: int = 4096, grace_s: float = 5,
    served: dict | None = None, **policy,
) -> Iterator[Live]:  # fmt: skip
    """ends: whether answers end at an end token. policy: fields of `Policy`; served: fields of `Served`."""
    eos_ids, closing = tokenizer.eos_ids if ends else (), tokenizer.encode(CLOSING)
    engine = Engine(model, slots, context, eos_ids, closing, tokenizer.think_end_id, prefill_tokens,
                    adapters=adapters)  # fmt: skip
    worker = Worker(engine, tokenizer, max_queue)
    models = {"base": None} | {name: name for name in (adapters.names if adapters else ())}
    offered = Served(models, context, model.config.vocab_size, slots + max_queue, max_new_tokens=context)
    with bind("127.0.0.1", 0, "") as listener:
        port = listener.getsockname()[1]
        allowed = Policy(**{"hosts": host_names("127.0.0.1", listener), **policy})
        app = App(replace(offered, **served or {}), tokenizer, worker, allowed, Page())
        live, advance, places = Live(engine, worker, app, port), engine.advance, Counter()
        engine.advance = lambda: live.advance(advance, places)
        server = Server(app, grace_s)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
        thread.start()
        live.until(lambda: server.started)
        try:
            yield live
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
