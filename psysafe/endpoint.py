"""Chat completions over an OpenAI-compatible endpoint, and many items at once.

    endpoint = Endpoint("http://localhost:8000/v1", "my-judge", key_from("PSYSAFE_JUDGE_KEY"), temperature=0.1)
    outcome = run_items(items, lambda item: {"text": endpoint.chat(item).text}, "scores.jsonl")

An item either has a whole answer or is listed as failed with the reason; there is nothing in between. `run_items` knows
nothing of judges: `call` may be any function.
"""

import concurrent.futures
import contextlib
import email.utils
import os
import queue
import random
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from psysafe.cli import progress
from psysafe.journal import Journal
from psysafe.program import UserError

NO_KEY = "none"  # what endpoints without a key are sent; they ignore it
TRANSIENT = {429, 500, 502, 503, 504}


class ItemFailed(Exception):
    """An item got no usable answer; the text says why. It is tried again at the next start."""


class Reply(NamedTuple):
    """A finished answer. reasoning: what a server parsed out of the think block, if it did."""

    text: str
    reasoning: str


@dataclass(frozen=True)
class Patience:
    """How long one item may take, and how it is tried again."""

    deadline_s: float = 600  # of an item, all attempts and waits together
    attempt_s: float = 300  # of one attempt
    attempts: int = 6
    first_wait_s: float = 1
    longest_wait_s: float = 60

    def wait(self, failures: int, asked: float | None) -> float:
        """Seconds before the next attempt: doubling, with jitter, and never less than the server asked for."""
        longest = min(self.first_wait_s * 2 ** (failures - 1), self.longest_wait_s)
        return max(random.uniform(longest / 2, longest), asked or 0)


class Endpoint:
    """A model behind an OpenAI-compatible URL. Thread-safe. Raises UserError for a URL that cannot be meant."""

    def __init__(self, url: str, model: str, key: str = "", patience: Patience | None = None, **options):
        """key: sent as a bearer token; "" for none. options: of every completion (temperature, max_tokens, ...)."""
        from huggingface_hub import InferenceClient, constants

        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{url!r} is no endpoint; expected something like http://localhost:8000/v1")
        if parts.username or parts.password or parts.query:
            # The URL is written into results; a key in it would be, too.
            raise UserError(f"the endpoint at {parts.hostname}: no user, password or query in the URL; "
                             "give the key in an environment variable")  # fmt: skip
        if constants.HF_HUB_OFFLINE:
            raise UserError("HF_HUB_OFFLINE is set: it blocks endpoints, local ones too; unset it")
        self.url, self.model, self.options = url, model, options
        self.patience = patience or Patience()
        self._key = key
        # Given None or "", the client would send this machine's HF_TOKEN to whoever runs the endpoint.
        self._client = InferenceClient(base_url=url, api_key=key or NO_KEY, timeout=self.patience.attempt_s)

    def chat(self, messages: Sequence[dict]) -> Reply:
        """The model's reply, or ItemFailed. Overload, server errors, time-outs, dropped connections and unreadable
        replies are tried again; any other refusal fails at once."""
        end, failures = time.monotonic() + self.patience.deadline_s, 0
        while True:
            left = end - time.monotonic()
            try:
                return _reply(within(min(left, self.patience.attempt_s), lambda: self._complete(messages)))
            except _Refused as refused:
                reason, asked = self._shown(refused), refused.retry_after
                if refused.status == 401:
                    raise UserError(f"{self.url} wants another key ({reason}); give it in the environment") from None
                if not refused.transient:
                    raise ItemFailed(reason) from None
            failures += 1
            wait = self.patience.wait(failures, asked)
            if failures == self.patience.attempts:
                raise ItemFailed(f"{reason}, after {failures} attempts")
            if time.monotonic() + wait >= end:
                raise ItemFailed(f"{reason}, and {self.patience.deadline_s:g} s for this item are used up")
            time.sleep(wait)

    def _complete(self, messages: Sequence[dict]):
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return self._client.chat_completion(list(messages), model=self.model, **self.options)
        except HfHubHTTPError as error:
            status, body = error.response.status_code, _body(error.response)
            asked = _retry_after(error.response.headers.get("retry-after"))
            raise _Refused(f"HTTP {status}: {body}".rstrip(": "), status in TRANSIENT, asked, status) from None
        except Exception as error:  # the connection, or a body that the client cannot take apart
            cause = error.__cause__ or error
            raise _Refused(f"{type(cause).__name__}: {cause}".rstrip(": ")) from None

    def _shown(self, error: Exception) -> str:
        """The reason on one line, without the key: a server may quote it back."""
        text = " ".join(str(error).split())
        return (text.replace(self._key, "***") if self._key else text)[:300]


class _Refused(Exception):
    def __init__(self, reason: str, transient: bool = True, retry_after: float | None = None, status: int = 0):
        super().__init__(reason)
        self.transient, self.retry_after, self.status = transient, retry_after, status


def _reply(completion) -> Reply:
    choices = getattr(completion, "choices", None)
    if not choices:
        raise ItemFailed("the reply has no choices")
    message = choices[0].message
    text = getattr(message, "content", None)
    if choices[0].finish_reason == "length":
        raise ItemFailed("the reply was cut at the token limit (finish_reason length)")
    if not isinstance(text, str) or not text.strip():
        raise ItemFailed("the reply has no content")
    reasoning = getattr(message, "reasoning", None) or getattr(message, "reasoning_content", None)
    return Reply(text, reasoning if isinstance(reasoning, str) else "")


def _body(response) -> str:
    try:
        return response.text[:200]
    except Exception as error:  # a body that was never read, or cannot be
        return f"(no readable body: {type(error).__name__})"


def _retry_after(value: str | None) -> float | None:
    """Retry-After in seconds; it may be a number or a date."""
    if value is None:
        return None
    with contextlib.suppress(ValueError):
        return max(float(value), 0)
    with contextlib.suppress(ValueError, TypeError):
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0)
    return None


def within(seconds: float, function: Callable[[], object]):
    """function(), or a transient refusal after that many seconds.

    The client's own time-out starts anew with every byte, so a server that drips could hold it for ever. The thread of
    a call that came too late is left behind; it is a daemon and ends with its connection, or with the process.
    """
    future: concurrent.futures.Future = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(timeout=max(seconds, 0))
    except TimeoutError:
        raise _Refused(f"no whole reply in {seconds:.3g} s") from None


def key_from(variable: str) -> str:
    """The key in an environment variable, "" where it is not set: keys come from nowhere else."""
    return os.environ.get(variable, "").strip()


class Outcome(NamedTuple):
    """rows: the result of each item by key, in the order of the items; failed: the reason for each that has none."""

    rows: dict[str, dict]
    failed: dict[str, str]


def run_items(
    items: Mapping[str, object],
    call: Callable[[object], dict],
    out: str | Path,
    workers: int = 8,
    description: str = "items",
) -> Outcome:
    """call(item) for every item, `workers` at a time; each result is a line of `out` before the next one is taken.

    items: by a key that names everything the result depends on (`journal.key_of`). What `out` holds already is not
    done again. ItemFailed lists an item and goes on; any other error stops the run, and what was done is kept.
    description: what the progress line on stderr calls them.
    """
    if workers < 1:
        raise UserError(f"workers is {workers}, expected at least 1")
    with Journal(out) as journal:
        todo = deque((key, item) for key, item in items.items() if key not in journal.rows)
        done: queue.SimpleQueue = queue.SimpleQueue()
        total, failed = len(todo), {}

        def work() -> None:
            with contextlib.suppress(IndexError):
                while True:
                    key, item = todo.popleft()
                    try:
                        done.put((key, call(item), None))
                    except BaseException as error:
                        done.put((key, None, error))

        # Daemons, so that Ctrl-C does not wait for replies; only this thread writes.
        for _ in range(min(workers, total)):
            threading.Thread(target=work, daemon=True).start()
        try:
            with progress(total, description, "items") as bar:
                for _ in range(total):
                    key, row, error = done.get()
                    if isinstance(error, ItemFailed):
                        failed[key] = str(error)
                        bar.set_postfix_str(f"{len(failed):,} failed", refresh=False)
                    elif error is not None:
                        raise error
                    else:
                        journal.append(key, row)
                    bar.update()
        finally:
            todo.clear()  # after an error the workers end with the items that they have in hand
        journal.sync()
        return Outcome({key: journal.rows[key] for key in items if key in journal.rows},
                       {key: failed[key] for key in items if key in failed})  # fmt: skip
