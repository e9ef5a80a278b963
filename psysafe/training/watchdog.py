"""Ends a run of several ranks, with one line that names the rank and the step, when one of them dies or hangs.

    with Watchdog(runtime, timeout=600) as watch:
        ...
        watch.progress(step)        # before every micro-batch, and before waiting for the other ranks

On every rank a thread writes a heartbeat, once a second, into the store in which the ranks met, and reads the others'.
So a death is noticed although the other ranks wait in a collective that never returns (NCCL's do not), and the message
can name the rank that is missing; the collective's own error cannot. A heartbeat carries the number of calls of
`progress`, which are as many on every rank: the rank with the fewest is the one that hangs.

On leaving the block every rank waits for the others. What a rank does there after its last call of `progress`, a plot
or an upload, may take as long as the timeout.
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

from psysafe.program import print_error
from psysafe.runtime import Runtime

INTERVAL = 1.0  # seconds between two heartbeats
MAX_SILENCE = 20.0  # seconds without one after which a rank is dead; torchrun kills the others 30 s after a death
GRACE = 5.0  # seconds after another rank's error: time to end by the same error, or to finish a save
REPORTED = "psysafe/reported"  # the store's key: how many ranks wanted to print why the run ends
REMEDY = "all ranks end here; see its own last lines, then continue with --resume auto"


class Heartbeat(NamedTuple):
    """What a rank writes into the store to show that it is alive."""

    number: int  # of this heartbeat: a rank that writes no new one is silent
    progress: int  # calls of `Watchdog.progress` so far
    step: int  # 0 before the first
    failed: bool  # the last one: the rank ended by an error of its own


class Watchdog:
    """Does nothing for a single rank. timeout: seconds without progress after which the run has hung. unit: what is
    counted, in messages; remedy: how they end."""

    def __init__(self, runtime: Runtime, timeout: float, unit: str = "step", remedy: str = REMEDY):
        self.rank, self.ranks, self.timeout = runtime.rank, runtime.world_size, timeout
        self.unit, self.remedy = unit, remedy
        self.max_silence = min(MAX_SILENCE, timeout / 2)
        self.heartbeat = Heartbeat(0, 0, 0, False)
        self.progress_at = time.monotonic()
        # rank -> its newest heartbeat, and when it was read here. Number 0: none has come yet.
        self.others = {rank: (Heartbeat(0, 0, 0, False), self.progress_at) for rank in range(self.ranks)}
        del self.others[self.rank]
        self.local_rank = runtime.local_rank
        self.lock, self.stop, self.ending = threading.Lock(), threading.Event(), threading.Lock()
        # A connection of its own: on a shared one a call that waits would delay the thread's.
        self.store = runtime.store.clone() if self.ranks > 1 else None
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def progress(self, step: int) -> None:
        """This rank has made progress, and is in that step (from 1); 0: before it waits for the others in start-up."""
        is_new_step = step != self.heartbeat.step
        with self.lock:
            self.heartbeat = self.heartbeat._replace(progress=self.heartbeat.progress + 1, step=step)
            self.progress_at = time.monotonic()
        if is_new_step and self.store is not None:
            self._write()  # at once: should the rank die now, the others can still name the right step

    def align(self, runtime: Runtime) -> None:
        """Take the largest of all ranks' counts of progress, after work that not every rank came to the end of."""
        progress = runtime.largest(self.heartbeat.progress)  # outside the lock: the thread must go on writing
        with self.lock:
            self.heartbeat = self.heartbeat._replace(progress=progress)

    def is_first(self, key: str) -> bool:
        """Whether this rank is the first to ask for this key: so ranks that fail together choose one that acts."""
        return self.store is None or self.store.add(f"psysafe/first/{key}", 1) == 1

    def __enter__(self) -> "Watchdog":
        if self.store is not None:
            self._write()
            self.thread.start()
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        if self.store is None:
            return
        if error is None:
            self.progress(self.heartbeat.step)  # so that a rank that never comes here has the fewest calls
            try:
                dist.barrier()  # the thread goes on until every rank is here: a rank without heartbeats counts as dead
            except RuntimeError as collective_error:
                self._explain(f"; here {_first_line(collective_error)}")
                raise
        elif isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            self._explain(f"; here {_first_line(error)}")
        elif isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM:
            self._explain("")  # torchrun sends it when a rank is gone, and others do to stop the run
        self.stop.set()
        self.thread.join()
        if error is None:
            # The store may live in the first rank that ends. So none ends while another's thread still reads it.
            dist.barrier()
        elif not isinstance(error, SystemExit):
            last = self.heartbeat._replace(number=self.heartbeat.number + 1, failed=True)
            with contextlib.suppress(RuntimeError):  # without a store, too, its own error must still be printed
                self.store.set(_key(self.rank), json.dumps(last))

    def _watch(self) -> None:
        while not self.stop.wait(INTERVAL):
            self._write()
            self._read()
            if self._try(self.store.check, [REPORTED]):
                self._end("")
            now = time.monotonic()
            for rank, (heartbeat, read_at) in self.others.items():
                silence = now - read_at
                if heartbeat.failed and silence > GRACE:
                    self._end(self._failed(rank, heartbeat))
                # Before its first step a rank may load weights for longer, and its thread then gets no turn.
                max_silence = self.max_silence if heartbeat.step else self.timeout
                if silence > max_silence:
                    where = f"rank {rank} is dead or frozen {self._place(heartbeat)}"
                    self._end(f"{where}: silent for {max_silence:.0f} s; {self.remedy}")
            # Before the first step only a rank that waits for another one judges: all may load for as long as it takes.
            waits = any(heartbeat.progress < self.heartbeat.progress for heartbeat, _ in self.others.values())
            if (self.heartbeat.step or waits) and now - self.progress_at > self.timeout:
                self._end(self._who_hangs())

    def _explain(self, here: str) -> None:
        """If another rank's death can be why this one ends, ends the process with a line that says so. here: what
        happened to this one."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which torchrun sends as soon as a rank is gone
        self.timeout = self.max_silence = math.inf  # from here on the thread reads heartbeats, and judges none
        began = time.monotonic()
        while time.monotonic() - began < 5 * INTERVAL:
            for rank, (heartbeat, read_at) in list(self.others.items()):
                if heartbeat.failed:
                    self._end(f"{self._failed(rank, heartbeat)}{here}")
                if heartbeat.step and time.monotonic() - read_at > 3 * INTERVAL:
                    self._end(f"rank {rank} died {self._place(heartbeat)}; {self.remedy}{here}")
            time.sleep(INTERVAL / 4)

    def _who_hangs(self) -> str:
        heartbeats = {self.rank: self.heartbeat, **{rank: heartbeat for rank, (heartbeat, _) in self.others.items()}}
        min_progress = min(heartbeat.progress for heartbeat in heartbeats.values())
        late = [rank for rank, heartbeat in heartbeats.items() if heartbeat.progress == min_progress]
        who = f"rank {late[0]} hangs" if len(late) == 1 else f"ranks {', '.join(map(str, late))} hang"
        place = self._place(heartbeats[late[0]])
        return f"{who} {place}: no progress for {self.timeout:.0f} s (--timeout); {self.remedy}"

    def _failed(self, rank: int, heartbeat: Heartbeat) -> str:
        return f"rank {rank} ended {self._place(heartbeat)} by an error of its own; {self.remedy}"

    def _place(self, heartbeat: Heartbeat) -> str:
        return f"in {self.unit} {heartbeat.step}" if heartbeat.step else f"before the first {self.unit}"

    def _write(self) -> None:
        with self.lock:
            self.heartbeat = self.heartbeat._replace(number=self.heartbeat.number + 1)
        self._try(self.store.set, _key(self.rank), json.dumps(self.heartbeat))

    def _read(self) -> None:
        # Reading a key that nobody has written yet would wait for it.
        came = {rank: heartbeat.number > 0 for rank, (heartbeat, _) in self.others.items()}
        ranks = [rank for rank in came if came[rank] or self._try(self.store.check, [_key(rank)])]
        values = self._try(self.store.multi_get, [_key(rank) for rank in ranks]) if ranks else []
        for rank, value in zip(ranks, values, strict=True):
            heartbeat = Heartbeat(*json.loads(value))
            if heartbeat.number != self.others[rank][0].number:
                self.others[rank] = heartbeat, time.monotonic()

    def _try(self, call: Callable, *args):
        try:
            return call(*args)
        except RuntimeError:
            gone = "torchrun, through which the ranks met, is gone" if _in_torchrun() else "rank 0 is gone"
            self._end(f"{gone} {self._place(self.heartbeat)}; {self.remedy}")

    def _end(self, message: str) -> None:
        """Ends this process, from any thread. The first rank to come here prints for all; "": one already has."""
        self.ending.acquire()  # for ever: the other thread may come here, too
        try:
            is_first = self.store.add(REPORTED, 1) == 1
        except RuntimeError:  # the store is gone: one rank of a machine speaks, or the first after the one that held it
            is_first = bool(message) and (self.local_rank == 0 if _in_torchrun() else self.rank == 1)
        if is_first:
            print_error(f"error (rank {self.rank}): {message}")
            time.sleep(2 * INTERVAL)  # the store may be in this process: time for the others to read that one printed
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(1)


def _in_torchrun() -> bool:
    """Whether the store lives in torchrun, and not in rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _first_line(error: RuntimeError) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _key(rank: int) -> str:
    return f"psysafe/heartbeat/{rank}"
