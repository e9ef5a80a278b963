"""The push: one private repository, one commit with everything, and only then, if asked, public.

    push = Push("owner/name", public=False, edited_card="")
    push.preview(uploads)
    url = push.run(uploads)

huggingface_hub talks to the hub; the token is the one that it finds (HF_TOKEN, or its own login), and never appears in
what is printed. The same command continues after any failure: data that has arrived is not sent again, and as long as
the commit is not there, readers see the repository as it was.
"""

import contextlib
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import validate_repo_id

from psysafe.checkpoint.peft_format import CONFIG, WEIGHTS
from psysafe.checkpoint.tensor_files import INDEX
from psysafe.cli import say
from psysafe.files import read_text
from psysafe.hub import REPOSITORY
from psysafe.printable import one_line
from psysafe.program import UserError, print_error
from psysafe.publish.card import is_as_written
from psysafe.publish.contents import BESIDE, CARD, Upload
from psysafe.publish.figures import BENCHMARKS

KEEP, REPLACE = "keep", "replace"  # of a card that was edited on the hub
OF_THE_HUB = {".gitattributes"}  # which every repository has
MAX_LISTED = 20  # files that are left as they are
PREVIEW_TIMEOUT_S = 10


def check_repository(name: str) -> None:
    """Raises UserError for what is no owner/name that the hub would take."""
    try:
        if not re.fullmatch(REPOSITORY, name):
            raise HFValidationError("expected OWNER/NAME")
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--repo {name}: no name of a repository ({one_line(str(error))[:150]})") from None


class Push:
    """reached: what of it is on the hub so far, in words."""

    def __init__(self, repository: str, public: bool, edited_card: str):
        self.repository, self.public, self.edited_card = repository, public, edited_card
        self.api = HfApi()
        self.reached = "nothing was changed on the hub"

    def run(self, uploads: Sequence[Upload]) -> str:
        """The address of the commit that holds everything. UserError of one line for whatever the hub refuses."""
        if not huggingface_hub.get_token():
            raise UserError("no token for the hub; run `hf auth login`, or set HF_TOKEN to one that may write")
        huggingface_hub.utils.logging.set_verbosity_error()  # its warnings quote signed addresses
        if not sys.stderr.isatty():
            huggingface_hub.utils.disable_progress_bars()
        with self._end_on_signals(), self._one_line_errors():
            return self._push(uploads)

    def preview(self, uploads: Sequence[Upload]) -> None:
        """Says which files on the hub a push would remove, and which it would leave. It only asks, and where the hub
        does not answer says so: the rest of a dry run needs no hub. UserError for what a push would be refused for."""
        if not huggingface_hub.get_token():
            say("no token for the hub, so it was not asked what is there already")
            return
        try:
            before = self.api.model_info(self.repository, timeout=PREVIEW_TIMEOUT_S)
        except RepositoryNotFoundError:
            say(f"{self.repository} is not on the hub yet, or this token may not see it")
            return
        except (OSError, HTTPError, ValueError) as error:
            say(f"what is on the hub already is not known: {self._reason(error)}")
            return
        self._refuse_public(before)
        stale, left = changes(before, uploads, self.repository)
        for path in stale:
            say(f"would be removed from the newest commit, of an earlier push: {path}")
        say_left(left)

    def _push(self, uploads: Sequence[Upload]) -> str:
        before = self._repository()
        operations, left = self._operations(uploads, before)
        with warnings.catch_warnings(record=True) as remarks:  # Python would print them with a path of this machine
            commit = self.api.create_commit(
                self.repository, operations, commit_message="Publish with psysafe", parent_commit=before.sha
            )
        for remark in remarks:
            say(one_line(str(remark.message)))
        self.reached = f"all files are in {self.repository}"
        if self.public and before.private:
            self.reached += ", which is private"
            self.api.update_repo_settings(self.repository, private=False)
        if commit.oid == before.sha:
            say(f"{self.repository}: every file was there already")
        say_left(left)
        return f"{self.api.endpoint}/{self.repository}"

    def _repository(self) -> ModelInfo:
        """The repository as it is now; made, private, where there is none."""
        try:
            info = self.api.model_info(self.repository)
            self.reached = f"{self.repository} is as it was"
        except RepositoryNotFoundError:
            self.api.create_repo(self.repository, private=True, exist_ok=True)
            self.reached = f"{self.repository} is there, private, without these files"
            info = self.api.model_info(self.repository)
        self._refuse_public(info)
        return info

    def _refuse_public(self, info: ModelInfo) -> None:
        if not info.private and not self.public:
            raise UserError(f"{self.repository} is public on the hub; give --public to push to it, or another --repo")

    def _operations(self, uploads: Sequence[Upload], before: ModelInfo) -> tuple[list, list[str]]:
        """(what the commit does, the files that it leaves)."""
        stale, left = changes(before, uploads, self.repository)
        if CARD in files_of(before) and not self._may_replace_card(before):
            uploads = [upload for upload in uploads if upload.path != CARD]
        for path in stale:
            say(f"removed from the newest commit, of an earlier push: {path}")
        additions = [CommitOperationAdd(upload.path, upload.content) for upload in uploads]
        return [*additions, *(CommitOperationDelete(path) for path in stale)], left

    def _may_replace_card(self, before: ModelInfo) -> bool:
        """Whether the hub's card is ours as we wrote it, or may go. UserError where it was edited and nobody said."""
        try:
            path = self.api.hf_hub_download(self.repository, CARD, revision=before.sha)
        except EntryNotFoundError:
            return True
        if is_as_written(read_text(path)) or self.edited_card == REPLACE:
            return True
        if self.edited_card == KEEP:
            say(f"{CARD} was edited on the hub and stays as it is there")
            return False
        raise UserError(
            f"{self.repository}: {CARD} was edited on the hub since the last push; nothing was changed. Give "
            f"--edited-card {KEEP} to leave it, or --edited-card {REPLACE} to write this one over it"
        )

    @contextlib.contextmanager
    def _end_on_signals(self) -> Iterator[None]:
        """Inside, Ctrl-C, SIGTERM and SIGHUP say what is on the hub, and end the process at once. As an exception they
        would wait for huggingface_hub's threads, which first finish their files, of 5 GB perhaps."""

        def end(number: int, frame) -> None:
            print_error(f"stopped; {self.reached}. The same command continues")
            os._exit(128 + number)  # nothing is being written here that could be left half-done

        sys.stdout.flush()  # that exit loses what still waits
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        numbers = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup asks
        before = {number: signal.signal(number, end) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        # RuntimeError: how huggingface_hub passes on what happened while a file was on its way. ValueError: what it or
        # the hub finds wrong with the card's metadata or a file. An OSError with a name is about a file here.
        except (OSError, HTTPError, RuntimeError, ValueError) as error:
            if getattr(error, "filename", None):
                raise
            raise UserError(f"{self._reason(error)}; {self.reached}. The same command continues") from None

    def _reason(self, error: Exception) -> str:
        cause = error
        while isinstance(cause, RuntimeError) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, HfHubHTTPError):
            return self._refusal(cause)
        if isinstance(cause, HTTPError | OSError):
            return f"the connection to the hub failed ({self._safe(cause)})"
        return f"the hub did not take it ({self._safe(cause)})"

    def _refusal(self, error: HfHubHTTPError) -> str:
        """What a status of the hub means here, and what to do."""
        owner, status = self.repository.partition("/")[0], error.response.status_code
        known = {
            401: "the hub does not know this token (401); run `hf auth login`, or set HF_TOKEN to a valid one",
            403: f"this token may not write to {self.repository} (403); take one with the right to write there",
            404: f"the hub has no {owner}, or this token may not see it (404); check --repo",
            409: f"somebody else changed {self.repository} at the same time (409)",
            412: f"somebody else changed {self.repository} at the same time (412)",
            429: "too many requests (429); wait some minutes",
        }
        said = f" ({self._safe(error.server_message)})" if error.server_message else ""
        return known.get(status, f"the hub answers with status {status}{said}")

    def _safe(self, words: object) -> str:
        """Words of others without the token and without addresses, whose queries can hold signatures."""
        text = one_line(str(words)) or type(words).__name__
        text = text.replace(huggingface_hub.get_token() or "\0", "***")
        return re.sub(r"https?://\S+", "...", text)[:200]


def files_of(info: ModelInfo) -> set[str]:
    return {sibling.rfilename for sibling in info.siblings or ()}


def changes(before: ModelInfo, uploads: Sequence[Upload], repository: str) -> tuple[list[str], list[str]]:
    """(files on the hub that a push of these removes, those that it leaves as they are). UserError as of
    `stale_files`."""
    there, new = files_of(before), {upload.path for upload in uploads}
    stale = stale_files(there, new, repository)
    return stale, sorted(there - new - {*stale} - OF_THE_HUB)


def say_left(paths: Sequence[str]) -> None:
    """A line for each file on the hub that no push of now has: nobody deletes it, and nobody forgets it."""
    for path in paths[:MAX_LISTED]:
        say(f"on the hub, not part of this push, left as it is: {path}")
    if len(paths) > MAX_LISTED:
        say(f"on the hub, not part of this push, left as they are: {len(paths) - MAX_LISTED:,} more")


def stale_files(there: set[str], new: set[str], repository: str) -> list[str]:
    """Files of an earlier push that would make others load something else than what is pushed now.

    UserError where the repository holds merged weights or a GGUF file, of which this push and its card know nothing.
    """
    if "config.json" in there and "config.json" not in new:
        raise UserError(f"{repository} holds a merged model of an earlier push; give --merged, too, or another --repo")
    gguf = [sorted(name for name in names if name.endswith(".gguf")) for names in (there, new)]
    if gguf[0] and not gguf[1]:
        raise UserError(f"{repository} holds {gguf[0][0]} of an earlier push; give --gguf, too, or another --repo")
    old = {prefix + name for prefix in ("", BESIDE) for name in (CONFIG, WEIGHTS)}
    old |= {f".eval_results/{benchmark.kind}.yaml" for benchmark in BENCHMARKS}
    if "config.json" in new:  # a loader would take the shards of the earlier model
        old |= {name for name in there if "/" not in name and name.endswith((".safetensors", INDEX))}
    return sorted((there & old) - new)
