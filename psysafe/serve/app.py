"""The web application: who may ask, what is asked, and answers whole or as streams (ASGI, for uvicorn).

Before any work: the Host header, the key, the content type, free places, and the size of the body, counted while it is
read. What goes wrong afterwards is an error in OpenAI's shape; a client that leaves takes its rows out of the engine.
No prompt and no answer is ever logged: what people ask here may be health data.
"""

import asyncio
import hmac
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from psysafe.data.tokenizer import Tokenizer
from psysafe.program import print_error
from psysafe.serve.answers import DONE, ChatCompletion, Completion, TextCompletion, Update, sse_event
from psysafe.serve.fields import ApiError
from psysafe.serve.metrics import Metrics, Record
from psysafe.serve.page import Page
from psysafe.serve.protocol import Asked, Served, read_chat, read_text
from psysafe.serve.worker import Generation, Worker, without_message

GONE = 499  # the status of a client that has left, in the log
UNREAD = 4  # a body may be so many times too large and is still read, so that its client sees the answer
SEND_S = 60  # after the time for a request is over, for a client that is slow to read

# Answers may be health data: no cache keeps them. And no browser takes one for a script.
HEADERS = [(b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff")]

Reader = Callable[[bytes, Served, Tokenizer], Asked]


@dataclass(frozen=True)
class Policy:
    """Who may ask, how much, and how long. hosts: what a Host header may say; None for anything."""

    hosts: frozenset[str] | None
    key: str = ""
    max_body: int = 4_000_000
    timeout_s: float = 600
    origins: tuple[str, ...] = ()


class App:
    """The application. `worker` is started by who runs it."""

    def __init__(self, served: Served, tokenizer: Tokenizer, worker: Worker, policy: Policy, page: Page):
        self.served, self.tokenizer, self.worker, self.policy, self.page = served, tokenizer, worker, policy, page
        self.metrics, self.started = Metrics(), int(time.time())
        self.routes = {
            "/": ("GET", self.show_page),
            "/health": ("GET", self.health),
            "/metrics": ("GET", self.show_metrics),
            "/v1/models": ("GET", self.models),
            "/v1/chat/completions": ("POST", self.chat),
            "/v1/completions": ("POST", self.text),
        }
        self.app = self._respond
        if policy.origins:
            self.app = CORSMiddleware(
                self._respond, policy.origins, allow_methods=("GET", "POST"), allow_headers=("*",)
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Any request: its headers, its line in the log, and what it comes to if all goes wrong."""
        if scope["type"] != "http":
            return
        record, start = Record(), time.perf_counter()
        scope["record"] = record

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = record.status or message["status"]
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        try:
            self._check_host(Request(scope))
            await self.app(scope, receive, noting)
        except ApiError as error:
            await error_response(error)(scope, receive, noting)
        finally:
            record.seconds = time.perf_counter() - start
            self._log(record)

    def _log(self, record: Record) -> None:
        is_completion = record.path in ("/v1/chat/completions", "/v1/completions")
        if is_completion:
            self.metrics.note(record)
        if is_completion or record.status >= 400:  # not every look at /health
            print_error(f"{time.strftime('%H:%M:%S')} {record.line}")

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            response = await self._answer(request)
            await response(scope, receive, send)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
        except ClientDisconnect:
            scope["record"].status = GONE
        except Exception as error:  # a bug of ours: one request's, not the server's
            print_error(f"an error of the server: {without_message(error)}")
            if scope["record"].status:  # the answer has begun: all that is left is to end it
                return
            await error_response(ApiError(500, "an error of the server; its log says where"))(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        path = request.scope["path"]  # not request.url.path: that is made of the Host header, too
        method, handler = self.routes.get(path, ("GET", None))
        if handler is None and path.startswith("/v1/models/"):
            handler = self.model
        if handler is None:
            raise ApiError(404, "there is no such path here; see /v1/models", code="not_found")
        request.scope["record"].path = path if path in self.routes else "/v1/models/..."
        self._check_key(request, path)
        if request.method != method and (request.method, method) != ("HEAD", "GET"):
            raise ApiError(405, f"{request.method} is not for this path, {method} is", allow=method)
        return await handler(request)

    def _check_host(self, request: Request) -> None:
        """Against pages whose own name leads to this machine (DNS rebinding): their requests bring that name."""
        host = request.headers.get("host", "").lower()
        if self.policy.hosts is not None and host not in self.policy.hosts:
            expected = " or ".join(sorted(self.policy.hosts))
            raise ApiError(400, f"the Host header names another server; expected {expected}", code="wrong_host")

    def _check_key(self, request: Request, path: str) -> None:
        if not self.policy.key or path in ("/", "/health"):
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        # Bytes on both sides, and only ASCII white space off: a letter of UTF-8 may end in the byte of a Latin-1 space.
        sent_key, right_key = key.encode("latin-1").strip(b" \t"), os.fsencode(self.policy.key)
        if scheme.lower() != "bearer" or not hmac.compare_digest(sent_key, right_key):
            message = "expected the server's key as Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", www_authenticate="Bearer")

    # What is asked

    async def show_page(self, request: Request) -> Response:
        return Response(self.page.html, media_type="text/html", headers=self.page.headers)

    async def health(self, request: Request) -> Response:
        worker = self.worker
        active = worker.engine.active
        status = "ok" if worker.is_alive else "dead"
        body = {
            "status": "stopping" if worker.is_draining else status,
            "active": active,
            "queued": max(worker.reserved - active, 0),
            "slots": worker.engine.slots,
        }
        return JSONResponse(body, 200 if body["status"] == "ok" else 503)

    async def show_metrics(self, request: Request) -> Response:
        worker = self.worker
        gauges = {
            "engine_alive": (worker.is_alive, "1 while the engine works, 0 once it has failed."),
            "active": (worker.engine.active, "Answers that are being computed."),
            "reserved": (worker.reserved, "Answers that are being computed or wait."),
            "slots": (worker.engine.slots, "Answers that can be computed at the same time."),
        }
        return PlainTextResponse(self.metrics.text(gauges), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self.served.models]})

    async def model(self, request: Request) -> Response:
        name = request.scope["path"].removeprefix("/v1/models/")
        if name not in self.served.models:
            raise ApiError(404, "there is no such model; see /v1/models", "model", "model_not_found")
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict:
        owner = {"object": "model", "created": self.started, "owned_by": "psysafe"}
        return {"id": name, **owner, "max_model_len": self.served.context}

    async def chat(self, request: Request) -> Response:
        return await self._complete(request, read_chat, ChatCompletion)

    async def text(self, request: Request) -> Response:
        return await self._complete(request, read_text, TextCompletion)

    async def _complete(self, request: Request, read: Reader, kind: type[Completion]) -> Response:
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            # A page elsewhere can have a browser send text here without asking; JSON it cannot.
            raise ApiError(415, "expected the header Content-Type: application/json", code="unsupported_media_type")
        self.worker.check(1)
        body = await self._read_body(request)
        job = Job(Generation(self.worker), request.scope["record"])
        try:
            job.generation.reserve(1)
            # Long prompts take a while: meanwhile streams go on.
            asked = await asyncio.to_thread(read, body, self.served, self.tokenizer)
            job.begin(kind(asked, self.tokenizer), self.policy.timeout_s)
            if not asked.stream:
                return JSONResponse(await until_gone(request, job.whole()))
            first = await until_gone(request, job.next())
        except BaseException:
            job.close()
            raise
        return Stream(job, first, self.policy.timeout_s + SEND_S)

    async def _read_body(self, request: Request) -> bytes:
        body, size, limit = bytearray(), 0, self.policy.max_body
        try:
            async with asyncio.timeout(self.policy.timeout_s):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > limit * UNREAD:
                        break
                    body += chunk if size <= limit else b""
        except TimeoutError:
            raise ApiError(
                408, f"the body did not come within {self.policy.timeout_s:g} s", connection="close"
            ) from None
        if size > limit:
            raise ApiError(413, f"the body has more than {limit:,} bytes", code="too_large", connection="close")
        return bytes(body)


class Job:
    """A completion on its way: what the engine says of it, put together."""

    def __init__(self, generation: Generation, record: Record):
        self.generation, self.record, self.start = generation, record, time.perf_counter()
        self.completion: Completion | None = None
        self.timer: asyncio.TimerHandle | None = None

    def begin(self, completion: Completion, timeout_s: float) -> None:
        """Submits the request. Raises ApiError 429 or 503 where there is no place for all its answers."""
        asked, self.completion = completion.asked, completion
        self.record.model = asked.model
        self.record.prompt_tokens = sum(map(len, asked.prompts))
        self.generation.reserve(len(completion.choices) - 1)
        self.generation.begin(asked)
        timeout = ApiError(503, f"no whole answer within {timeout_s:g} s", code="timeout", retry_after="1")
        self.timer = asyncio.get_running_loop().call_later(timeout_s, self.generation.fail, timeout)

    async def next(self) -> list[dict]:
        """Waits for news -> the chunks of all that became known since the last call. Raises ApiError where the request
        ends with an error."""
        updates = [await self.generation.updates.get()]
        while not self.generation.updates.empty():
            updates.append(self.generation.updates.get_nowait())
        chunks = [self._push(update) for update in updates]
        if self.record.first_token_seconds is None:
            self.record.first_token_seconds = time.perf_counter() - self.start
        return [chunk for chunk in chunks if chunk]

    def _push(self, update: Update | ApiError) -> dict | None:
        if isinstance(update, ApiError):
            raise update
        self.record.tokens += 1
        return self.completion.push(update)

    async def whole(self) -> dict:
        """The body of the whole answer, once it has ended. Raises ApiError as `next`."""
        while not self.completion.is_finished:
            await self.next()
        self.close()
        return self.completion.whole()

    def close(self) -> None:
        """Frees what it holds. Does nothing the second time."""
        if self.timer:
            self.timer.cancel()
        self.generation.close()


class Stream(StreamingResponse):
    """A completion as server-sent events. Its first chunks are known: what fails earlier has a status of its own."""

    def __init__(self, job: Job, first: list[dict], timeout_s: float):
        super().__init__(self._events(first), media_type="text/event-stream")
        self.job, self.timeout_s = job, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self.timeout_s):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            scope["record"].status = GONE  # it has read nothing for a long time
        finally:
            self.job.close()
            if not self.job.completion.is_finished and scope["record"].status == 200:
                scope["record"].status = GONE

    async def _events(self, chunks: list[dict]) -> AsyncIterator[bytes]:
        completion = self.job.completion
        try:
            chunks = completion.opening() + chunks
            while not completion.is_finished:
                if chunks:
                    yield b"".join(map(sse_event, chunks))
                chunks = await self.job.next()
            chunks += [completion.usage_chunk()] if completion.asked.include_usage else []
            yield b"".join(map(sse_event, chunks)) + DONE
        except ApiError as error:
            self.job.record.status = error.status
            yield sse_event(error.body())


async def until_gone(request: Request, work: Awaitable):
    """What `work` comes to; ClientDisconnect as soon as the client has left."""
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():  # the body has been read: what is received now is that the client has left
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


def error_response(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, headers=error.headers)
