"""The proof on a GPU as one command: everything that only a GPU can show, most important first, in N minutes.

    python -m benchmarks.prove [--minutes 9] [--out prove.json]

Stages, each with its own share of the time: environment, compile, check (every operation's 27B case in bf16), bench
(every kernel on paper against measured), step (ours and every installed peer), generate, rest (other sizes, fp32,
mutants). What one stage leaves of its time goes to the next ones.

The document is written anew, whole, after every result, so whenever the command is killed a valid JSON with all results
so far is left. A stage runs in a process of its own; what fails, crashes or hangs there is a row with its reason, and
the stage goes on behind it in a new process. Without a GPU all stages run "on paper": small cases in Triton's
interpreter, predicted times, a small model on the CPU.

Exit code: 0 all held · 1 something failed or hung · 3 nothing failed, but not all was reached · 2 wrong use.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from psysafe.cli import Parser
from psysafe.files import write_atomic
from psysafe.program import UserError, exit_on_signals, main_guard

ROOT = Path(__file__).resolve().parents[1]
FAILED, NOT_REACHED = 1, 3  # exit codes
START = 60  # seconds that a process may take to name its tasks: imports
AGAIN = 75  # a stage's process that wants to go on in a new one, because its GPU context is lost (EX_TEMPFAIL)


class Stage(NamedTuple):
    """share: of the time, relative to the others. silence: seconds without a result after which a task hangs.

    tasks: "module:function", which the stage's process calls for its tasks (benchmarks/prove_tasks.py).
    """

    name: str
    share: float
    silence: float
    tasks: str


STAGES = [
    Stage("environment", 1, 60, "benchmarks.prove_tasks:environment"),
    Stage("compile", 4, 600, "benchmarks.prove_tasks:compile_launches"),
    Stage("check", 5, 90, "benchmarks.prove_tasks:check"),
    Stage("bench", 4, 90, "benchmarks.prove_tasks:bench"),
    Stage("step", 4, 600, "benchmarks.prove_tasks:step"),
    Stage("generate", 2, 120, "benchmarks.prove_tasks:generate"),
    Stage("rest", 4, 60, "benchmarks.prove_tasks:rest"),
]


class Report:
    """What is known so far; every change is in the file before anything else happens.

    A row: stage, task, result, reason, seconds, and what was measured. Results: "ok"; "failed"; "hung"; "not measured",
    where this machine lacks something; "unfinished", where the stage's time was over.
    """

    def __init__(self, out: Path, minutes: float, stages: Sequence[Stage]):
        self.out, self.minutes, self.stages = out, minutes, stages
        self.tasks: dict[str, list[str]] = {}  # of the stages that have begun
        self.rows: list[dict] = []
        self.on_paper, self.ended = True, False
        self.write()

    def of(self, stage: Stage) -> list[dict]:
        return [row for row in self.rows if row["stage"] == stage.name]

    def add(self, stage: Stage, row: dict) -> None:
        self.rows.append({"stage": stage.name} | row)
        self.write()
        self.say(*lines(self.rows[-1]))

    def say(self, *texts: str) -> None:
        for text in texts:
            print(f"on paper: {text}" if self.on_paper else text, flush=True)

    def failed(self) -> list[str]:
        bad = ("failed", "hung")
        return [f"{row['stage']}: {row['task']}: {row['reason']}" for row in self.rows if row["result"] in bad]

    def not_reached(self) -> list[str]:
        names = [f"{row['stage']}: {row['task']}" for row in self.rows if row["result"] == "unfinished"]
        for stage in self.stages:
            done = len(self.of(stage))
            # A stage without tasks has either not begun or failed at its start, which is a row.
            rest = self.tasks.get(stage.name, [] if done else ["all"])[done:]
            names += [f"{stage.name}: {task}" for task in rest]
        return names

    def write(self) -> None:
        document = {
            "on_paper": self.on_paper,
            "ended": self.ended,
            "minutes": self.minutes,
            "failed": self.failed(),
            "not_reached": self.not_reached(),
            "rows": self.rows,
        }
        write_atomic(self.out, json.dumps(document, indent=1) + "\n")
        self.written = time.monotonic()  # when the present task began, at the earliest


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.prove", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=9, help="time for everything (9)")
    parser.add_argument("--out", type=Path, default=Path("prove.json"), metavar="FILE", help="prove.json if not given")
    args = parser.parse_args(argv)
    if not 0 < args.minutes <= 600:
        raise UserError(f"--minutes {args.minutes:g}: expected a number above 0, at most 600")
    if not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: the folder {args.out.parent} does not exist; create it first")
    with exit_on_signals():
        return prove(STAGES, args.minutes, args.out)


def prove(stages: Sequence[Stage], minutes: float, out: Path) -> int:
    """Runs the stages one after the other and returns the exit code."""
    report, end = Report(out, minutes, stages), time.monotonic() + 60 * minutes
    for i, stage in enumerate(stages):
        left = end - time.monotonic()
        if left <= 0:
            break
        run_stage(stage, time.monotonic() + left * stage.share / sum(s.share for s in stages[i:]), report)
    report.ended = True
    report.write()
    failed, not_reached = report.failed(), report.not_reached()
    report.say(*(f"FAILED {name}" for name in failed), *(f"not reached: {name}" for name in not_reached))
    report.say(f"{len(report.rows)} results, {len(failed)} failed, {len(not_reached)} not reached, in {out}")
    return FAILED if failed else NOT_REACHED if not_reached else 0


def run_stage(stage: Stage, deadline: float, report: Report) -> None:
    """All tasks of a stage, in as many processes as it takes, up to the deadline (of time.monotonic)."""
    while time.monotonic() < deadline:
        done = len(report.of(stage))
        with tempfile.TemporaryFile() as errors, child(stage, done, errors) as process:
            stopped = receive(process, stage, deadline, report)
            # Who has closed its end of the pipe ends at once, or never.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0 if stopped else 5)
            reached, tasks = len(report.of(stage)), report.tasks.get(stage.name)
            if tasks is not None and reached >= len(tasks):
                return
            if process.returncode == AGAIN and reached > done:
                continue
            result, reason = stopped or ("failed", f"its process ended ({process.returncode}): {last_line(errors)}")
        report.add(
            stage,
            {
                "task": tasks[reached] if tasks else "start",
                "result": result,
                "reason": reason,
                "seconds": time.monotonic() - report.written,
            },
        )
        if tasks is None or reached + 1 == len(tasks):
            return


@contextlib.contextmanager
def child(stage: Stage, first: int, errors: IO) -> Iterator[subprocess.Popen]:
    """The process of a stage, from its task number `first`. On leaving, it and all that it has started are killed."""
    command = [sys.executable, "-m", "benchmarks.prove_child", stage.tasks, str(first)]
    # stdin: a pipe whose end tells the process that nobody waits for it any more.
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()
        process.stdout.close()


def receive(process: subprocess.Popen, stage: Stage, deadline: float, report: Report) -> tuple[str, str] | None:
    """Takes the messages of a stage's process until it closes its output; else (result, reason) of the present task.

    A message is a line of JSON: first {"tasks": names, "on_paper": bool}, then a row for each task.
    """
    rest, silence, last = b"", START, time.monotonic()
    while True:
        until = min(deadline, last + silence)
        if not select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
            hung = "hung", f"no result for {silence:g} s"
            return ("unfinished", "the stage's time is over") if until == deadline else hung
        # Not readline: it would wait for the end of a line that never comes.
        received = os.read(process.stdout.fileno(), 65536)
        if not received:
            return None
        *messages, rest = (rest + received).split(b"\n")
        for message in map(json.loads, messages):
            silence, last = stage.silence, time.monotonic()
            if "tasks" in message:
                report.tasks[stage.name], report.on_paper = message["tasks"], message["on_paper"]
                report.write()
            else:
                report.add(stage, message)


def last_line(file: IO) -> str:
    file.seek(0)
    texts = file.read().decode(errors="replace").strip().splitlines()
    return texts[-1][:300] if texts else "nothing on stderr"


def lines(row: dict) -> list[str]:
    """A row as text: its result, and below it every kernel on paper against measured."""
    reason = f": {row['reason']}" if row.get("reason") else ""
    numbers = "".join(f"; {key} {value:,.4g}" for key, value in row.get("numbers", {}).items())
    texts = [f"{row['stage']:<11} {row['seconds']:6.1f} s  {row['task']}: {row['result']}{reason}{numbers}"]
    for kernel in row.get("kernels", ()):
        measured, predicted = kernel.get("measured_us"), kernel["paper_us"]
        ratio = f"measured {measured:>7,.0f} us, {measured / predicted:.2f} x" if measured else "not measured"
        texts.append(f"    {kernel['direction']:<9} {kernel['name']:<42} paper {predicted:>7,.0f} us, {ratio}")
    return texts


if __name__ == "__main__":
    sys.exit(main_guard(main))
