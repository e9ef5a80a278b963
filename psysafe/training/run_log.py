"""What a run prints and writes: the resolved settings, a line per step, metrics.jsonl, a tracker, a plot.

    print_run(config, sources, {"model": "...", "batch": "...", "memory": "..."})
    with RunLog(run_dir, config, runtime, total_steps, first_step, flops_per_token) as log:
        log.later(StepResult(...))                  # logs the step before this one
        log.catch_up()                              # logs this one, too
        log.validation(step, {"val_loss": 0.5})
        log.sync()                                  # before a state is saved: its rows must be on the disk first

Only the main rank prints and writes, so the loop needs no branches. A full disk costs a warning: rows wait in memory
until there is room, and training goes on. So does output that fails; where nobody reads it any more, `signal` says so.
"""

import contextlib
import errno
import importlib.util
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from psysafe.files import parse_json, write_atomic
from psysafe.printable import counted
from psysafe.program import UserError, discard_stdout, print_error
from psysafe.runtime import DeviceTime, Runtime, memory_peak
from psysafe.training.config import KEYS, TrainConfig
from psysafe.training.tracker import Tracker

# What a validation measures: its name in metrics.jsonl, and for the screen.
VALIDATION = {
    "val_loss": "validation loss", "contrast_loss": "on contrast rows", "contrast_kl": "KL from the base",
}  # fmt: skip
METRICS, NEWLINE = "metrics.jsonl", b"\n"
MAX_SKIPPED = 3  # steps in a row without a finite gradient norm that end the run
HEADER = f"{'step':>11} {'loss':>9} {'lr':>9} {'grad norm':>9} {'tokens/s':>9} {'MFU':>6} {'memory':>9} {'left':>8}"


def check_packages(config: TrainConfig) -> None:
    """Raise UserError at the start, not at the end, when the run asks for a package that is not installed."""
    packages = {"--plot": "matplotlib" if config.plot else "", f"--report {config.report}": config.report}
    for flag, package in packages.items():
        if package not in ("", "none") and importlib.util.find_spec(package) is None:
            raise UserError(f"{flag}: {package} is not installed; pip install {package}, or leave the flag out")


def print_run(config: TrainConfig, sources: Mapping[str, str], summary: Mapping[str, object]) -> None:
    """Print each setting with where it came from, then what follows from them: dtypes, kernels, arithmetic, estimates.

    summary: label -> text, printed in this order.
    """
    values = {key: _plain(getattr(config, key)) for key in KEYS}
    width = min(40, max(map(len, values.values())))
    for key, value in values.items():
        print(f"  {key:<20}{value:<{width}}  {sources[key]}".rstrip())
    print()
    for label, text in summary.items():
        print(f"  {label:<20}{text}")
    print(flush=True)


class StepResult:
    """A step's numbers on their way to the host: the copy is queued on the device, and read when it has arrived.

    fields: entries of the step's row that the host knows already. scalars: tensors () on the device.
    """

    def __init__(self, began: DeviceTime, fields: dict, **scalars: torch.Tensor):
        self.fields, self.names = fields, tuple(scalars)
        # One copy for all of them. In fp64, which holds every fp32 number and every count exactly.
        self.values = torch.stack([x.detach().double() for x in scalars.values()]).to("cpu", non_blocking=True)
        self.began, self.ended = began, DeviceTime(began.device)

    def read(self) -> dict:
        """The row of the step; waits until the device has finished it."""
        seconds = self.ended.since(self.began)
        return self.fields | dict(zip(self.names, self.values.tolist(), strict=True)) | {"seconds": seconds}


class RunLog:
    """Metrics of a run, to the screen, to metrics.jsonl and to the tracker.

    first_step: steps that are already done (0, or the resumed state's): later rows are cut from metrics.jsonl.
    validated: whether the validation after first_step is part of the resumed state.
    flops_per_token: useful FLOP of a training token; without it, or on an unknown GPU, no MFU is shown.
    run_id: for the tracker.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: TrainConfig,
        runtime: Runtime,
        total_steps: int,
        first_step: int = 0,
        flops_per_token: float = 0.0,
        validated: bool = True,
        run_id: str = "",
    ):
        self.runtime, self.total_steps, self.last_step = runtime, total_steps, first_step
        peak = runtime.peak
        self.flops_share = flops_per_token / (peak.flops * runtime.world_size) if peak else 0.0
        self.began, self.steps_seen = time.monotonic(), 0
        self.unread: StepResult | None = None  # the newest step, not yet logged
        self.signal = 0  # SIGPIPE when nobody reads the output any more: time to save and end
        self.output_fails = False
        self.file = self.bar = self.tracker = None
        self.path = Path(run_dir) / METRICS
        self.unwritten = b""  # rows that the disk refused
        self.refused = False
        if not runtime.is_main:
            return
        rows = cut_metrics(self.path, first_step, validated)
        self.file = self.path.open("ab", buffering=0)
        if missing := sorted({*range(1, first_step + 1)} - {row["step"] for row in rows if "loss" in row}):
            which = f"{len(missing)} of the steps {missing[0]} to {missing[-1]}"
            self.say(f"warning: {self.path} has no rows of {which}: they were made elsewhere, or lost")
        if config.report != "none":
            self.tracker = Tracker(config, run_id, self.say)
        if sys.stdout.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, file=sys.stdout)
        else:
            self._show(print, HEADER, flush=True)

    @property
    def writes(self) -> bool:
        """True on the one rank that prints and writes: the main one, or one that took over."""
        return self.file is not None

    def take_over(self) -> None:
        """Write from here on. For a rank other than the main one, when that will never write again."""
        if not self.writes:
            self.file = self.path.open("ab", buffering=0)

    def later(self, result: StepResult) -> None:
        """Log the step before this one; this one with the next call. Raises UserError as `catch_up` does."""
        self.catch_up()
        self.unread = result

    def catch_up(self) -> None:
        """Log the step that `later` still holds; waits for the device.

        Raises UserError, on every rank, when MAX_SKIPPED steps in a row had no finite gradient norm.
        """
        if self.unread is None:
            return
        row, self.unread = self.unread.read(), None
        skipped, documents = int(row.pop("skipped")), row.pop("documents")
        if skipped:
            row |= {"skipped": skipped, "documents": documents}
            self.say(f"warning: step {row['step']}: gradient norm {row['grad_norm']}, nothing updated: {documents}")
        self.step(**row)
        if skipped >= MAX_SKIPPED:
            raise UserError(
                f"step {row['step']}: gradient norm not finite {skipped} times in a row, the last good state is kept; "
                "look at the rows named above, or lower --lr and start again"
            )

    def step(
        self, step: int, *, loss: float, lr: float, grad_norm: float, tokens: int, seconds: float, **more: object
    ) -> None:
        """Log one optimiser step. tokens: all tokens of the step over all ranks; more: further entries of its row."""
        if self.file is None:
            return
        speed = tokens / max(seconds, 1e-9)
        memory = memory_peak(self.runtime.device)
        row = {"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens": tokens, **more}
        row |= {"seconds": seconds, "tokens_per_s": speed, "memory": memory}
        if self.flops_share:
            row["mfu"] = speed * self.flops_share
        self._write(row)
        self.steps_seen += step - self.last_step
        self.last_step = step
        # From this process's own steps: a resumed run has not spent the time of those before.
        left = (time.monotonic() - self.began) / max(self.steps_seen, 1) * (self.total_steps - step)
        mfu = f"{row['mfu']:.1%}" if "mfu" in row else "-"
        if self.bar is not None:
            self._show(
                self.bar.set_postfix_str,
                f"loss {loss:.4f} lr {lr:.1e} norm {grad_norm:.3f} {speed:,.0f} tok/s MFU {mfu} {memory / 1e9:.1f} GB",
                refresh=False,
            )
            self._show(self.bar.update, step - self.bar.n)
        else:
            count = f"{step}/{self.total_steps}"
            columns = f"{count:>11} {loss:>9.4f} {lr:>9.2e} {grad_norm:>9.4f} {speed:>9,.0f} {mfu:>6}"
            self._show(print, f"{columns} {memory / 1e9:>6.2f} GB {_clock(left):>8}", flush=True)

    def validation(self, step: int, losses: Mapping[str, float]) -> None:
        """Log a validation, measured after the given step. losses: by the names of VALIDATION."""
        if self.file is not None:
            self._write({"step": step, **losses})
            text = ", ".join(f"{VALIDATION[name]} {loss:.4f}" for name, loss in losses.items())
            self.say(f"{step:>5}/{self.total_steps:<5} {text}")

    def say(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self.bar is not None:
            self._show(self.bar.write, text, file=sys.stdout)
        elif self.file is not None:
            self._show(print, text, flush=True)

    def _show(self, show: Callable, *args, **options) -> None:
        """Prints by show(...). Output that fails costs lines, not the run."""
        try:
            show(*args, **options)
        except OSError as error:
            text = f"warning: standard output: {error.strerror}; training goes on, lines are missing"
            if error.errno in (errno.EPIPE, errno.EIO):  # as after `| head`, or when the terminal is closed
                self.signal = signal.SIGPIPE
                text = "nobody reads this output any more: finishing this step, then saving"
            if not self.output_fails:
                print_error(text)
            self.output_fails = True

    def sync(self) -> None:
        """Log the newest step, and bring all rows to the disk if it takes them."""
        if self.file is not None:
            self._open_again_if_gone()
        self.catch_up()
        if self.file is not None:
            self._flush(os.fsync)

    def _open_again_if_gone(self) -> None:
        """Rows that are written to a deleted file would be lost without a word."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path)):
                return
        self.say(f"warning: {self.path} was deleted or moved while the run was going on: a new one begins here")
        with contextlib.suppress(OSError):  # what cannot be made now is tried again at the next save
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("ab", buffering=0)
            self.file.close()
            self.file = file

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error) -> None:
        if self.file is not None:
            self._flush(os.fsync)  # not sync: on the way out of an error the newest step may never arrive
            if self.unwritten:
                lost = counted(self.unwritten.count(NEWLINE), "row")
                self.say(f"warning: {self.file.name} lacks its last {lost}, which the disk did not take")
            self.file.close()
        if self.bar is not None:
            self._show(self.bar.close)
        if self.output_fails:
            discard_stdout()  # what cannot be printed at the end is no error of its own
        if self.tracker is not None:
            self.tracker.finish()
        self.file = self.bar = self.tracker = None

    def _write(self, row: dict) -> None:
        # Python prints a float so that it reads back bit for bit. JSON has no word for nan and infinity: null.
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.unwritten += json.dumps(row, allow_nan=False).encode() + NEWLINE
        self._flush()
        if self.tracker is not None:
            self.tracker.log(row)

    def _flush(self, then: Callable[[int], object] = lambda descriptor: None) -> None:
        """Writes the rows that wait, unbuffered: a kill leaves at most one torn line. A refusal is printed once."""
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
            then(self.file.fileno())
            self.refused = False
        except OSError as error:
            if not self.refused:
                self.say(f"warning: {self.file.name}: {error.strerror}; training goes on, its rows wait for room")
            self.refused = True


def read_metrics(path: str | Path) -> list[dict]:
    """The rows of a metrics.jsonl without a torn last line, which a kill can leave. Other damage is a UserError."""
    lines = Path(path).read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is empty or torn
        try:
            row = parse_json(line)
            if not isinstance(row["step"], int):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            if not any(lines[number:]):  # a power cut can leave the last line whole in length and not in content
                break
            remedy = "mend that line, or move the file away"
            raise UserError(f"{path} line {number}: not a JSON object with a step; {remedy}") from None
        rows.append(row)
    return rows


def cut_metrics(path: str | Path, step: int, validated: bool = True) -> list[dict]:
    """Drop the rows after a step, and a torn last line: the file is then as the run left it at that step -> its rows.

    validated: whether that step's validation, if it has one, is already part of the saved state.
    """
    path = Path(path)
    rows = read_metrics(path) if path.exists() else []
    rows = [row for row in rows if row["step"] < step or (row["step"] == step and (validated or "loss" in row))]
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def plot_loss(run_dir: str | Path) -> Path:
    """Draw training and validation loss over the steps into RUN_DIR/loss.png. Needs matplotlib (`check_packages`)."""
    from matplotlib.figure import Figure

    rows = read_metrics(Path(run_dir) / METRICS)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    lines = ("loss", "training", "-"), ("val_loss", "validation", "o-"), ("contrast_loss", "contrast rows", "o--")
    lines += (("contrast_kl", "KL from the base", "s:"),)
    for key, label, style in lines:
        points = [(row["step"], math.nan if row[key] is None else row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=4)
    axes.set(xlabel="step", ylabel="loss per trained token", title=Path(run_dir).resolve().name)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    path = Path(run_dir) / "loss.png"
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
    return path


def _plain(value) -> str:
    text = " ".join(value) if isinstance(value, list) else str(value)
    return text.lower() if isinstance(value, bool) else text or "-"


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{s:02}"
