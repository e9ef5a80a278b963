"""Prompts answered by several ranks (torchrun): each rank has the whole model and a share of the prompts.

    with Ranks(runtime) as ranks:
        file = ranks.in_order(lambda: AnswerFile(path, ..., rank=runtime.rank))
        generator.check(requests)       # all of them: no rank begins where another would refuse
        for answer in ranks.complete(generator, ranks.share(requests)):
            file.write(...)
        file.finish(ranks.wait)         # rank 0 puts the files of all ranks together

The ranks meet at the beginning and at the end; in between none waits for another. An answer depends on its prompt, seed
and settings, so any number of ranks gives the same ones. What a rank has answered stays in its own file if it dies: the
others end with one line, and the next start, on any number of ranks, goes on from there.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch.distributed as dist

from psysafe.generation.generator import Answer, Generator
from psysafe.generation.request import Request
from psysafe.journal import key_of
from psysafe.program import exit_on_signals
from psysafe.runtime import Runtime
from psysafe.training.watchdog import Watchdog

REMEDY = "all ranks end here; their answers so far are saved: start again, with any number of ranks"
Result = TypeVar("Result")


class Ranks(contextlib.AbstractContextManager):
    """All ranks of a run that answers prompts; a single one never waits."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        # No timeout: the ranks write answers of different lengths, and how long one may take nobody knows.
        self.watchdog = Watchdog(runtime, math.inf, unit="answer", remedy=REMEDY)
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> "Ranks":
        if self.runtime.world_size > 1:
            # torchrun stops the others when a rank is gone. They live for some seconds more, to say which one.
            self.stack.enter_context(exit_on_signals())
        self.stack.enter_context(self.watchdog)
        return self

    def __exit__(self, *error) -> None:
        self.stack.__exit__(*error)

    def in_order(self, action: Callable[[], Result]) -> Result:
        """The action's result: on rank 0 first, then on the others."""
        if not self.runtime.is_main:
            self._meet()
        result = action()
        if self.runtime.is_main:
            self._meet()
        return result

    def agree(self, missing: Sequence) -> None:
        """Raises UserError on every rank where not all of them miss the same answers."""
        self.runtime.agree(answers_to_write=f"{len(missing):,} ({key_of(*missing)})")

    def share(self, requests: Sequence[Request]) -> list[Request]:
        """This rank's part of the requests. All ranks give the same ones."""
        return share(requests, self.runtime.rank, self.runtime.world_size)

    def complete(self, generator: Generator, requests: Sequence[Request]) -> Iterator[Answer]:
        """The answers to this rank's requests, as they end; the watchdog hears of each."""
        n_answers = 1
        self.watchdog.progress(n_answers)
        for answer in generator.complete(requests):
            yield answer
            n_answers += 1
            self.watchdog.progress(n_answers)

    def wait(self) -> None:
        """Returns when every rank has come here, however long it takes: a collective would run into its timeout."""
        if self.runtime.world_size == 1:
            return
        store = self.runtime.store.clone()  # the watchdog's thread uses its own
        turn = store.add(f"psysafe/waits/{self.runtime.rank}", 1)
        keys = [f"psysafe/waits/{turn}/{rank}" for rank in range(self.runtime.world_size)]
        store.set(keys[self.runtime.rank], b"")
        while not store.check(keys):
            time.sleep(0.1)

    def _meet(self) -> None:
        if self.runtime.world_size > 1:
            dist.barrier()


def share(requests: Sequence[Request], rank: int, ranks: int) -> list[Request]:
    """A rank's part of the requests. Long prompts are dealt out evenly: by length, to and fro over the ranks."""
    if ranks == 1:
        return list(requests)
    longest_first = sorted(requests, key=lambda request: -len(request.ids))
    turns = [*range(ranks), *reversed(range(ranks))]
    return [request for i, request in enumerate(longest_first) if turns[i % len(turns)] == rank]
