"""Chat completions over an OpenAI-compatible endpoint, and many items at once.

    endpoint = Endpoint("http://localhost:8000/v1", "my-judge", key_from("PSYSAFE_JUDGE_KEY"), temperature=0.1)
    outcome = run_items(items, lambda item: {"text": endpoint.chat(item).text}, "scores.jsonl")

An item either has a whole answer or is listed as failed with the reason; there is nothing in between. `run_items` knows
nothing of judges: `call` may be any function.
"""

import base64
import concurrent.futures
import contextlib
import email.utils
import http.client
import json
import math
import os
import queue
import random
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from psysafe.cli import progress
from psysafe.files import parse_json
from psysafe.journal import Journal
from psysafe.printable import one_line
from psysafe.program import UserError
from psysafe.version import __version__

NO_KEY = "none"  # what endpoints without a key are sent; they ignore it
TRANSIENT = {408, 425, 429, 500, 502, 503, 504, *range(520, 530)}  # 520 to 529: what proxies say of the server behind
STANDARD_PORTS = {"http": 80, "https": 443}
REDIRECTS = {301, 302, 307, 308}
MAX_REPLY = 4 << 20  # bytes of a reply that are read; the longest answers have a tenth of that
MAX_SHOWN = 300  # characters of a server's text in a reason
MIN_KEY_LENGTH = 8  # of a key that is masked; a placeholder such as "none" or "EMPTY" is also a word of replies
RESERVED_PARAMETERS = ("messages", "model", "stream", "n")  # of a request: what the caller's options may not set


class ItemFailed(Exception):
    """An item got no usable answer; the text says why. It is tried again at the next start."""


class EndpointUnusable(UserError):
    """No item can get an answer: no server listens, or it wants another key."""


class Reply(NamedTuple):
    """A finished answer. reasoning: what a server parsed out of the think block, if it did."""

    text: str
    reasoning: str


@dataclass(frozen=True)
class RetryPolicy:
    """How long one item may take, and how it is tried again."""

    deadline_s: float = 600  # of an item, all attempts and waits together
    attempt_s: float = 300  # of one attempt
    attempts: int = 6
    min_wait_s: float = 1  # before the second attempt; it doubles with each
    max_wait_s: float = 60

    def wait(self, failures: int, asked: float | None) -> float:
        """Seconds before the next attempt: doubling, with jitter, and never less than the server asked for."""
        wait_s = min(self.min_wait_s * 2 ** (failures - 1), self.max_wait_s)
        return max(random.uniform(wait_s / 2, wait_s), asked or 0)


class Endpoint:
    """A model behind an OpenAI-compatible URL. Thread-safe. Raises UserError for a URL that cannot be meant."""

    def __init__(self, url: str, model: str, key: str = "", retry_policy: RetryPolicy | None = None, **options):
        """key: sent as a bearer token; "" for none. options: of every completion (temperature, max_tokens, ...)."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{url!r} is no endpoint; expected something like http://localhost:8000/v1")
        if parts.username or parts.password or parts.query:
            # The URL is written into results; a key in it would be, too.
            raise UserError(f"the endpoint at {parts.hostname}: no user, password or query in the URL; "
                             "give the key in an environment variable")  # fmt: skip
        if taken := [name for name in RESERVED_PARAMETERS if name in options]:
            raise UserError(f"{taken[0]} is no option of a request; messages, model, stream and n are set here")
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE and f".{parts.hostname}".endswith(".huggingface.co"):
            raise UserError(f"HF_HUB_OFFLINE is set, and {parts.hostname} is the hub's; unset it, or give another URL")
        self.url, self.model, self.options = url, model, options
        self.retry_policy = retry_policy or RetryPolicy()
        self._key = key
        self._reached = False  # whether a server has taken any request
        self._address = f"{url.rstrip('/').removesuffix('/chat/completions')}/chat/completions"

    def chat(self, messages: Sequence[dict]) -> Reply:
        """The model's reply, or ItemFailed. Overload, server errors, time-outs, dropped connections and unreadable
        replies are tried again; any other refusal fails at once. EndpointUnusable for a key that is refused, and for a
        URL where no server listens and none ever has."""
        end, failures = time.monotonic() + self.retry_policy.deadline_s, 0
        while True:
            left = end - time.monotonic()
            try:
                return within(min(left, self.retry_policy.attempt_s), lambda: self._complete(messages))
            except ItemFailed as failed:
                raise ItemFailed(self._shown(failed)) from None
            except _Refused as refused:
                reason, asked = self._shown(refused), refused.retry_after
                if refused.status == 401:
                    remedy = "give it in the environment"
                    raise EndpointUnusable(f"{self.url} wants another key ({reason}); {remedy}") from None
                if not refused.transient:
                    raise ItemFailed(reason) from None
            failures += 1
            wait = self.retry_policy.wait(failures, asked)
            if failures == self.retry_policy.attempts:
                raise ItemFailed(f"{reason}, after {failures} attempts")
            if time.monotonic() + wait >= end:
                raise ItemFailed(f"{reason}, and {self.retry_policy.deadline_s:g} s for this item are used up")
            time.sleep(wait)

    def _complete(self, messages: Sequence[dict]) -> Reply:
        """One request. Raises _Refused, or ItemFailed for a reply that is whole and holds no answer."""
        request = {"messages": list(messages), "model": self.model, **self.options}
        content = self._post(self._address, json.dumps(request).encode())
        try:
            completion = parse_json(content)
        except ValueError as error:
            raise _Refused(f"no JSON in the reply ({error})") from None
        text, reasoning = _answer(completion)
        return Reply(self._masked(text), self._masked(reasoning))

    def _post(self, address: str, body: bytes, redirects_left: int = 3) -> bytes:
        """The body of the reply to one POST; _Refused for any other than a success."""
        headers = {"authorization": f"Bearer {self._key or NO_KEY}", "content-type": "application/json",
                   "user-agent": f"psysafe/{__version__}"}  # fmt: skip
        try:
            connection, target, proxy_headers = _connect(address, self.retry_policy.attempt_s)
            with contextlib.closing(connection):
                connection.request("POST", target, body, headers | proxy_headers)
                self._reached = True
                response = connection.getresponse()
                content = _read(response)
        except (OSError, http.client.HTTPException, ValueError) as error:  # no connection, or no HTTP on it
            if isinstance(error, ConnectionRefusedError | socket.gaierror) and not self._reached:
                # Not a passing trouble: six attempts at each item would be minutes of waiting for a mistyped URL.
                reason = f"no server answers there ({error.strerror})"
                raise EndpointUnusable(f"{self.url}: {reason}; start it, or give another URL") from None
            raise _Refused(f"{type(error).__name__}: {error}".rstrip(": ")) from None
        status, location = response.status, response.getheader("location")
        if 200 <= status < 300:
            return content
        if status in REDIRECTS and location:
            # To another host would go prompts and answers, and the key.
            if redirects_left and (target := _on_same_host(address, location)):
                return self._post(target, body, redirects_left - 1)
            raise _Refused(f"HTTP {status}: redirects to {location}; give that URL if it is meant", transient=False)
        asked = _retry_after(response.getheader("retry-after"))
        reason = f"HTTP {status}: {content.decode(errors='replace')}".rstrip(": ")
        raise _Refused(reason, status in TRANSIENT, asked, status)

    def _masked(self, text: str) -> str:
        """The text without the key, in any spelling in which a server may quote it back."""
        if len(self._key) >= MIN_KEY_LENGTH:
            for spelling in (self._key, json.dumps(self._key)[1:-1], urllib.parse.quote(self._key, safe="")):
                text = text.replace(spelling, "***")
        return text

    def _shown(self, error: Exception) -> str:
        """The reason on one line. The key is masked before the text is cut: half of one would not be found."""
        return one_line(self._masked(str(error)))[:MAX_SHOWN]


class _Refused(Exception):
    """An attempt without a usable reply. transient: another attempt may have one; retry_after: seconds that the server
    asks to wait; status: of HTTP, 0 where there was no reply."""

    def __init__(self, reason: str, transient: bool = True, retry_after: float | None = None, status: int = 0):
        super().__init__(reason)
        self.transient, self.retry_after, self.status = transient, retry_after, status


def _connect(address: str, timeout_s: float) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
    """(a connection for one request, what to ask for on it, headers for the proxy), through the environment's proxy
    where there is one."""
    parts = urllib.parse.urlsplit(address)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or urllib.request.proxy_bypass(parts.hostname):
        return kind(parts.hostname, parts.port, timeout=timeout_s), path, {}
    proxy = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    connection = kind(proxy.hostname, proxy.port or 80, timeout=timeout_s)
    if parts.scheme == "https":  # the proxy sees the request for a tunnel, and nothing of what goes through it
        connection.set_tunnel(parts.hostname, parts.port or 443, _proxy_authorization(proxy))
        return connection, path, {}
    return connection, address, _proxy_authorization(proxy)


def _proxy_authorization(proxy: urllib.parse.SplitResult) -> dict[str, str]:
    """The header with the user and password of a proxy's URL, where each may be percent-encoded; {} without a user."""
    if not proxy.username:
        return {}
    user, password = (urllib.parse.unquote(part or "") for part in (proxy.username, proxy.password))
    return {"proxy-authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}


def _on_same_host(address: str, location: str) -> str | None:
    """Where a redirect leads, if that is the same host and port, or from http to https there; else None."""
    try:
        target = urllib.parse.urljoin(address, location)
        old, new = urllib.parse.urlsplit(address), urllib.parse.urlsplit(target)
        ports = old.port or STANDARD_PORTS[old.scheme], new.port or STANDARD_PORTS[new.scheme]
    except (ValueError, KeyError):  # no URL, or one of another kind
        return None
    same = old.scheme == new.scheme and ports[0] == ports[1]
    to_https = (old.scheme, new.scheme, *ports) == ("http", "https", 80, 443)
    return target if old.hostname == new.hostname and (same or to_https) else None


def _read(response: http.client.HTTPResponse) -> bytes:
    """The whole body. One that is larger than any answer is not read to its end, which may not exist."""
    content = response.read(MAX_REPLY + 1)
    if len(content) > MAX_REPLY:
        raise _Refused(f"HTTP {response.status}: a reply of more than {MAX_REPLY >> 20} MB", transient=False)
    return content


def _answer(completion: object) -> tuple[str, str]:
    """(text, reasoning) of a completion, which may be any JSON.

    _Refused, which is tried again, for JSON that is no completion; ItemFailed for a completion without a usable text.
    """
    if not isinstance(completion, dict):
        raise _Refused(f"the reply is no completion but a {type(completion).__name__}")
    choices = completion.get("choices")
    if not choices:
        raise ItemFailed("the reply has no choices")
    choice = choices[0] if isinstance(choices, list) else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise _Refused(f"the reply's choices are no list of messages but a {type(choices).__name__}")
    text = message.get("content")
    if choice.get("finish_reason") == "length":
        raise ItemFailed("the reply was cut at the token limit (finish_reason length)")
    if not isinstance(text, str | None):
        raise _Refused(f"the reply's content is no text but a {type(text).__name__}")
    if not text or not text.strip():
        raise ItemFailed("the reply has no content")
    reasoning = message.get("reasoning") or message.get("reasoning_content")
    return text, reasoning if isinstance(reasoning, str) else ""


def _retry_after(value: str | None) -> float | None:
    """Retry-After in seconds; it may be a number or a date. None for one that says nothing, such as NaN."""
    if value is None:
        return None
    seconds = math.nan
    with contextlib.suppress(ValueError, TypeError, OverflowError, OSError):
        seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    with contextlib.suppress(ValueError):
        seconds = float(value)
    return None if math.isnan(seconds) else max(seconds, 0)


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
