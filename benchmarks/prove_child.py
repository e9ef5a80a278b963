"""A stage of benchmarks/prove.py, in a process of its own.

    python -m benchmarks.prove_child benchmarks.prove_tasks:check FIRST

Writes lines of JSON to stdout: the names of all tasks, then a row for each of them from number FIRST on.
"""

import functools
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.prove import AGAIN


class Task(NamedTuple):
    """run: what was measured, as entries of the row. Raises NotMeasured or whatever went wrong."""

    name: str
    run: Callable[[], dict]


class NotMeasured(Exception):
    """This machine lacks something that the task needs: no failure."""


def main(place: str, first: str) -> int:
    output = os.fdopen(os.dup(1), "w")  # not inherited, so that no process started here keeps it open
    os.dup2(2, 1)  # what libraries print is not ours

    def send(message: dict) -> None:
        print(json.dumps(message), file=output, flush=True)

    threading.Thread(target=_end_with_parent, daemon=True).start()
    module, _, function = place.partition(":")
    tasks = getattr(importlib.import_module(module), function)()
    send({"tasks": [task.name for task in tasks], "on_paper": on_paper()})
    for task in tasks[int(first) :]:
        began, context_lost = time.perf_counter(), False
        try:
            row = {"result": "ok"} | task.run()
        except NotMeasured as error:
            row = {"result": "not measured", "reason": str(error)}
        except Exception as error:  # whatever went wrong is this task's result, and the others go on
            row = {"result": "failed", "reason": one_line(error)}
            context_lost = "CUDA error" in str(error) or "Triton Error [CUDA]" in str(error)
        send({"task": task.name} | row | {"seconds": time.perf_counter() - began})
        if context_lost:  # after an illegal access every further call in this process fails
            return AGAIN
        free_memory()
    return 0


def _end_with_parent() -> None:
    # Not sys.stdin: at exit Python aborts where a thread still holds its lock.
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)  # this process leads a group of its own: all that it has started


@functools.cache
def on_paper() -> bool:
    import torch

    return not torch.cuda.is_available()


def free_memory() -> None:
    """Large cases leave gigabytes in the allocator's cache, in blocks that fit no other case."""
    if not on_paper():
        import torch

        torch.cuda.empty_cache()


def one_line(error: Exception) -> str:
    first = (str(error).strip() or "no message").splitlines()[0][:300]
    return first if isinstance(error, AssertionError) else f"{type(error).__name__}: {first}"


if __name__ == "__main__":
    # As an imported module: the tasks import it, too, and there has to be one NotMeasured.
    sys.exit(importlib.import_module("benchmarks.prove_child").main(*sys.argv[1:]))
