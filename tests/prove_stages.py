"""Stages of benchmarks/prove.py for its tests, as their processes import them: what can go wrong in one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.prove_child import NotMeasured, Task


def fine() -> list[Task]:
    return [Task("one", lambda: {"numbers": {"ms": 1.5}}), Task("two", dict)]


def troubled() -> list[Task]:
    def fails() -> dict:
        raise ValueError("a wrong value")

    def absent() -> dict:
        raise NotMeasured("no such peer")

    def loses_the_gpu() -> dict:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def crashes() -> dict:
        os.kill(os.getpid(), signal.SIGSEGV)

    def process() -> dict:
        return {"pid": os.getpid()}

    runs = [fails, absent, process, loses_the_gpu, process, crashes, process]
    return [Task(f"{i} {run.__name__}", run) for i, run in enumerate(runs)]


def hanging() -> list[Task]:
    def hangs() -> dict:
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        Path(os.environ["PROVE_TEST_PID"]).write_text(str(process.pid))
        time.sleep(60)

    return [Task("before", dict), Task("hangs", hangs), Task("after", dict)]


def broken() -> list[Task]:
    raise ImportError("no module of that name")
