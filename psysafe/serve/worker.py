"""The thread that owns the engine: requests come in from the event loop, and what becomes known goes back to it.

The engine is called by this thread alone. The loop leaves commands (submit, cancel), which are carried out in order
between two forward passes: a request whose client has left frees its slots after at most one more `advance`.
"""

import asyncio
import contextlib
import itertools
import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from psysafe.data.tokenizer import Tokenizer
from psysafe.generation.engine import Engine
from psysafe.generation.request import Event, Request
from psysafe.generation.text import TextSplitter
from psysafe.program import UserError, print_error
from psysafe.serve.answers import Update
from psysafe.serve.fields import ApiError
from psysafe.serve.protocol import Asked

RETRY_AFTER_S = "1"
STOP_S = 30  # for the forward pass that it is in
STOPPING = "the server is stopping"


class Generation:
    """The rows of one request, from the loop's side. `updates` gets an Update for every token of every row, or an
    ApiError, after which nothing follows. Called on the loop only."""

    def __init__(self, worker: "Worker"):
        self.worker = worker
        self.updates: asyncio.Queue[Update | ApiError] = asyncio.Queue()
        self.places = 0  # in slots or in the queue that it holds
        self.rows: list[int] = []

    def reserve(self, places: int) -> None:
        """Takes places, all that a request needs before its work begins. ApiError 429 where there are not so many."""
        self.worker.check(places)
        self.places += places
        self.worker.reserved += places

    def begin(self, asked: Asked) -> None:
        """Submits the rows, for which places are reserved."""
        self.worker.submit(self, asked)

    def take(self, update: Update) -> None:
        """Passes an update on; a row's last one gives its place back."""
        if update.finish and self.places:
            self._release(1)
        self.updates.put_nowait(update)

    def fail(self, error: ApiError) -> None:
        """Ends it with an error, for whoever reads `updates`."""
        self.close()
        self.updates.put_nowait(error)

    def close(self) -> None:
        """Cancels what still runs. Does nothing the second time."""
        if self.places and self.rows:
            self.worker.cancel(self)
        self._release(self.places)

    def _release(self, places: int) -> None:
        self.places -= places
        self.worker.reserved -= places
        if not self.places:
            self.worker.generations.discard(self)


@dataclass(frozen=True)
class Row:
    """A row of the engine, from the thread's side."""

    request: Request
    index: int  # which answer of its request
    splitter: TextSplitter
    generation: Generation


class Worker:
    """The engine's thread, and the loop's access to it."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, max_queue: int):
        self.engine, self.tokenizer = engine, tokenizer
        self.capacity = engine.slots + max_queue  # rows that are computed or wait
        self.reserved = 0
        self.generations: set[Generation] = set()  # those that hold places and have begun
        self.is_draining = False
        self.failure = ""  # why the engine is dead
        self._loop: asyncio.AbstractEventLoop | None = None
        self._numbers = itertools.count(1)
        self._rows: dict[int, Row] = {}  # the thread's own
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # On the loop

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts the thread. loop: where everything else of this class is called."""
        self._loop = loop
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self.failure

    def check(self, places: int) -> None:
        """Raises ApiError where so many rows cannot be taken now."""
        if self.is_draining or not self.is_alive:
            reason = STOPPING if self.is_draining else f"the engine has failed ({self.failure}); restart the server"
            raise ApiError(503, reason, code="unavailable")
        if self.reserved + places > self.capacity:
            reason = f"busy: {self.reserved} of {self.capacity} places are taken, this request needs {places}"
            raise ApiError(429, f"{reason}; try again", code="queue_full", retry_after=RETRY_AFTER_S)

    def submit(self, generation: Generation, asked: Asked) -> None:
        """Has the engine take the request's rows, n for each prompt. A row that it refuses is an error in `updates`."""
        rows = []
        for index, (prompt, _) in enumerate(itertools.product(asked.prompts, range(asked.n))):
            # Its place in the request names an answer's random numbers: equal requests with equal seeds agree.
            request = Request(
                next(self._numbers), prompt, f"answer {index}", asked.options, index, asked.logprobs, asked.adapter,
                asked.adapter_scale,
            )  # fmt: skip
            splitter = TextSplitter(self.tokenizer, asked.options.thinking, asked.stop)
            rows.append(Row(request, index, splitter, generation))
        generation.rows = [row.request.row for row in rows]
        self.generations.add(generation)
        self._command(lambda: self._submit(rows))

    def cancel(self, generation: Generation) -> None:
        """Has the engine end what of the rows still runs."""
        self._command(lambda: self._cancel(generation.rows))

    def drain(self) -> None:
        """From now on new requests are refused; those that are there go on."""
        self.is_draining = True

    def abort(self, reason: str = STOPPING) -> None:
        """Ends all requests with an error."""
        for generation in list(self.generations):
            generation.fail(ApiError(503, reason, code="unavailable"))

    def stop(self) -> None:
        """Ends the thread after the forward pass that it is in."""
        self._stopping = True
        self._command(lambda: None)
        self._thread.join(STOP_S)

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    # On the thread

    def _run(self) -> None:
        device = self.engine.model.embed_tokens.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # which every thread has to be told
        try:
            while self._work():
                pass
        except Exception as error:
            self.failure = type(error).__name__
            print_error(f"the engine has failed: {without_message(error)}")
            # Not by `_rows`: a request that came meanwhile is not among them. From here on `check` refuses new ones.
            self._call(self.abort, "the engine has failed")

    def _work(self) -> bool:
        """Carries out what the loop asked for and makes one forward pass. False once the thread has to end."""
        with self._wake:
            self._wake.wait_for(lambda: self._commands or self._rows)
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()
        updates = [self._update(self._rows[event.row], event) for event in self.engine.advance()]
        self._deliver(updates)
        return not self._stopping

    def _submit(self, rows: list[Row]) -> None:
        for row in rows:
            try:
                self.engine.submit(row.request)
                self._rows[row.request.row] = row
            except UserError as error:  # what only the engine can see
                self._deliver([self._error(row, ApiError(400, str(error)))])

    def _cancel(self, numbers: list[int]) -> None:
        for number in numbers:
            if self._rows.pop(number, None):
                self.engine.cancel(number)

    def _update(self, row: Row, event: Event) -> tuple[Generation, Update]:
        if event.error:
            print_error(f"a prompt could not be read: {without_message(event.error)}")
            reason = f"the prompt could not be read ({type(event.error).__name__})"
            del self._rows[event.row]
            return self._error(row, ApiError(503, reason))
        splitter, in_reasoning = row.splitter, row.splitter.thinking
        pieces, finish = splitter.push(event.token), event.finish
        if splitter.stopped:
            finish = "stop"
            self.engine.cancel(event.row)
        if finish:
            pieces += splitter.finish()
            del self._rows[event.row]
        return row.generation, Update(row.index, event, pieces, in_reasoning, finish)

    def _error(self, row: Row, error: ApiError) -> tuple[Generation, Update]:
        event = Event(row.request.row, None, "error", error=error)
        return row.generation, Update(row.index, event, [], False, "error")

    def _deliver(self, updates: list[tuple[Generation, Update]]) -> None:
        if updates:
            self._call(_hand_over, updates)

    def _call(self, function: Callable[..., None], *args) -> None:
        """Has the loop call a function."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it everybody who waits
            self._loop.call_soon_threadsafe(function, *args)


def _hand_over(updates: list[tuple[Generation, Update]]) -> None:
    for generation, update in updates:
        if update.finish == "error":
            generation.fail(update.event.error)
        else:
            generation.take(update)


def without_message(error: BaseException) -> str:
    """Where an error of ours came from. Its message may quote a prompt, which is never logged."""
    frames = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    return f"{type(error).__name__} (message left out: it may quote a prompt)\n{frames}"
