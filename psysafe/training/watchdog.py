"""Ends a run of several ranks, with one line that names the rank and the step, when one of them dies or hangs.

    with Watchdog(runtime, timeout=600) as watch:
        ...
        watch.beat(step)        # before every micro-batch, and before waiting for the others

A thread of every rank writes a sign of life into the store in which the ranks met, once a second, and reads those of
the others. So a death is seen although the others wait inside a collective that will never return (NCCL's do not), and
the message can say who is missing: the collective's own error cannot. Who is late is told by counting beats, which are
as many on every rank.

Who is through with the block waits at its end for the others. What one rank does there after its last beat, a plot or
an upload, is bounded by the timeout like any step.
"""

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from psysafe.runtime import Runtime

INTERVAL = 1.0  # seconds between two signs of life
SILENCE = 20.0  # after so many without one a rank is dead; torchrun kills what is left 30 s after a death
GRACE = 5.0  # after another's error: time to end by the same one, or to finish a save
TOLD = "psysafe/told"  # the store's key for it
REMEDY = "all ranks end here; see its own last lines, then continue with --resume auto"


class Sign(NamedTuple):
    """A rank's sign of life."""

    count: int
    beats: int
    step: int  # 0 before the first
    left: bool  # it ended by an error of its own

    @property
    def place(self) -> str:
        return f"in step {self.step}" if self.step else "before the first step"

    @property
    def farewell(self) -> str:
        return f"ended {self.place} by an error of its own; {REMEDY}"


class Watchdog:
    """Does nothing for a single rank. timeout: seconds without a beat after which the run has hung."""

    def __init__(self, runtime: Runtime, timeout: float):
        self.rank, self.ranks, self.timeout = runtime.rank, runtime.world_size, timeout
        self.silence = min(SILENCE, timeout / 2)
        self.mine = Sign(0, 0, 0, False)
        self.beat_at = time.monotonic()
        self.heard: dict[int, tuple[Sign, float]] = {}  # by rank: its newest sign, and when it came here
        self.lock, self.stop = threading.Lock(), threading.Event()
        # A connection of its own: one that waits would hold up the others'.
        self.store = runtime.store.clone() if self.ranks > 1 else None
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, step: int) -> None:
        """This rank has come forward, and is in that step (from 1)."""
        new_step = step != self.mine.step
        with self.lock:
            self.mine = self.mine._replace(beats=self.mine.beats + 1, step=step)
            self.beat_at = time.monotonic()
        if new_step and self.store is not None:  # at once, so that the others know in which step it was lost
            self._sign()

    def __enter__(self) -> "Watchdog":
        if self.store is not None:
            self._sign()
            self.thread.start()
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        if self.store is None:
            return
        if error is None:
            self.beat(self.mine.step)  # whoever is still at work has one less
            try:
                dist.barrier()  # until the last one is through all sign, for silence is death
            except RuntimeError as lost:
                self._explain(lost)
                raise
        elif isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            self._explain(error)
        self.stop.set()
        self.thread.join()
        if error is None:
            dist.barrier()  # nobody leaves while somebody still watches: the store may go with the first one
        else:
            with contextlib.suppress(RuntimeError):  # without the store its own error is still to be shown
                self.store.set(_key(self.rank), json.dumps(self.mine._replace(count=self.mine.count + 1, left=True)))

    def _watch(self) -> None:
        while not self.stop.wait(INTERVAL):
            self._sign()
            self._listen()
            if self._try(self.store.check, [TOLD]):
                self._end("")
            now = time.monotonic()
            for rank, (sign, since) in self.heard.items():
                if sign.left and now - since > GRACE:
                    self._end(f"rank {rank} {sign.farewell}")
                # Before its first step a rank may read files for longer than that without a chance to sign.
                if sign.step and now - since > self.silence:
                    self._end(f"rank {rank} is dead or frozen {sign.place}: silent for {self.silence:.0f} s; {REMEDY}")
            if self.mine.step and now - self.beat_at > self.timeout:
                self._end(self._who_is_late())

    def _explain(self, error: RuntimeError) -> None:
        """Was it a collective that failed because a rank is gone? Then ends the process, else returns."""
        here = f"here {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which torchrun sends as soon as a rank is gone
        self.timeout = self.silence = math.inf  # the thread only listens from here on
        began = time.monotonic()
        while time.monotonic() - began < 5 * INTERVAL:
            for rank, (sign, since) in list(self.heard.items()):
                if sign.left:
                    self._end(f"rank {rank} {sign.farewell}; {here}")
                if sign.step and time.monotonic() - since > 3 * INTERVAL:
                    self._end(f"rank {rank} died {sign.place}; {REMEDY}; {here}")
            time.sleep(INTERVAL / 4)

    def _who_is_late(self) -> str:
        signs = {self.rank: self.mine, **{rank: sign for rank, (sign, _) in self.heard.items()}}
        fewest = min(sign.beats for sign in signs.values())
        late = [rank for rank, sign in signs.items() if sign.beats == fewest]
        who = f"rank {late[0]} hangs" if len(late) == 1 else f"ranks {', '.join(map(str, late))} hang"
        return f"{who} {signs[late[0]].place}: no progress for {self.timeout:.0f} s (--timeout); {REMEDY}"

    def _sign(self) -> None:
        with self.lock:
            self.mine = self.mine._replace(count=self.mine.count + 1)
        self._try(self.store.set, _key(self.rank), json.dumps(self.mine))

    def _listen(self) -> None:
        others = [rank for rank in range(self.ranks) if rank != self.rank]
        there = [rank for rank in others if rank in self.heard or self._try(self.store.check, [_key(rank)])]
        values = self._try(self.store.multi_get, [_key(rank) for rank in there]) if there else []
        for rank, value in zip(there, values, strict=True):
            sign = Sign(*json.loads(value))
            if rank not in self.heard or sign.count != self.heard[rank][0].count:
                self.heard[rank] = sign, time.monotonic()

    def _try(self, ask: Callable, *args):
        try:
            return ask(*args)
        except RuntimeError:
            self._end(f"{self.mine.place}: the store in which the ranks met is gone, and with it rank 0; {REMEDY}")

    def _end(self, message: str) -> None:
        """Ends this process, from whatever thread. The first rank to come here speaks for all; "": one has spoken."""
        try:
            first = self.store.add(TOLD, 1) == 1
        except RuntimeError:
            first = bool(message)
        if first:
            print(f"error (rank {self.rank}): {message}", file=sys.stderr, flush=True)
            time.sleep(2 * INTERVAL)  # the store may be this process's: the others shall still see that it is told
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _key(rank: int) -> str:
    return f"psysafe/sign/{rank}"
