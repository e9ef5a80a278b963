"""The state of a run, saved so that a resumed run repeats the uninterrupted one bit for bit.

    run_dir/state/step-00000042/    state.safetensors   the tensors: adapter, optimiser codes and scales
                                    state.json          the rest: step, best validation, recipe, digests, versions
                                    SHA256SUMS          of both; `sha256sum -c SHA256SUMS` checks it by hand

A state appears under its name by one rename, when all of it is on the disk: a kill or a power cut at any moment leaves
the states before it as they were. Nothing is ever unpickled.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import BinaryIO

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from psysafe.checkpoint.adapter import save_adapter
from psysafe.files import nearest_existing, open_locked, parse_json, remove_leftovers, sync, temporary_for, write_atomic
from psysafe.program import UserError
from psysafe.runtime import versions
from psysafe.training.config import DEFAULTS, KEYS, TrainConfig, to_toml
from psysafe.training.run_log import RunLog
from psysafe.training.setup import USE_RSLORA, Best, Run

# All that a run leaves in its directory: other files there are not touched (--out . is a legal choice).
RUN_FILES = "config.toml", "metrics.jsonl", "adapter_config.json", "adapter_model.safetensors", "loss.png", "state"

LOCK = ".lock"  # the file that keeps a second run out of the directory; empty, and it stays

BEST = "best_adapter"  # of the tensors: what --keep-best keeps
TENSORS, META, SUMS = "state.safetensors", "state.json", "SHA256SUMS"
# A second save at the same step (before and after a validation, say) gets a suffix: no valid state is ever overwritten.
_NAME = re.compile(r"step-(\d{8,18})(?:\.(\d{1,9}))?")

# A resumed run may change these: they say where it runs and where it reports, or leave the result the same. The rows
# are compared by their content, so that a data file may move.
FREE_ON_RESUME = {
    "data", "val_data", "contrast_data", "contrast_val_data", "long_rows", "out", "resume", "save_every",
    "micro_batch_tokens", "device", "threads", "shard", "timeout", "memory_limit", "embedding", "report", "project",
    "plot", "dry_run", "adapter_layout",
}  # fmt: skip


class StateNotSaved(OSError):
    """A state could not be written, for want of space say. Those before it are whole: warn, and go on training."""


@dataclass
class State:
    """One saved state. meta: as given to `save_state`; warnings: a line for each newer state that was damaged."""

    step: int
    tensors: dict[str, Tensor]
    meta: dict
    path: Path
    warnings: list[str] = field(default_factory=list)

    def entry(self, name: str, *kinds: type):
        """meta[name], of one of these types. Raises UserError where a state of another version has no such entry."""
        if not isinstance(self.meta.get(name, ...), kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise UserError(f"{self.path / META}: {name} is {self.meta.get(name)!r:.60}, expected {expected}")
        return self.meta[name]

    def tensor(self, name: str, like: Tensor) -> Tensor:
        """tensors[name] in the shape and type of `like`, else UserError."""
        pair = self.tensors.get(name), like
        saved, expected = ("nothing" if x is None else f"{x.dtype} {tuple(x.shape)}" for x in pair)
        if saved != expected:
            file = self.path / TENSORS
            raise UserError(f"{file}: {name} is {saved}, this run needs {expected}; resume with the model it is of")
        return self.tensors[name]

    def changed(self, now: Mapping) -> list[str]:
        """One warning when software or number of ranks differ from the saved run's: other sums, other roundings.

        now: `runtime.versions()`, and `ranks`.
        """
        before = self.entry("versions", dict) | {"ranks": self.entry("world_size", int)}
        keys = [key for key in ("psysafe", "torch", "triton", "ranks") if before.get(key) != now[key]]
        if not keys:
            return []
        old, new = (", ".join(f"{key} {state.get(key) or 'unknown'}" for key in keys) for state in (before, now))
        return [f"warning: saved with {old}, continued with {new}: no longer bit for bit the uninterrupted run"]


def save_state(run_dir: str | Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping, keep: int = 2) -> Path:
    """Save a state and remove all but the last `keep` whole ones. Returns its folder.

    tensors: any device, shapes and dtypes; views of one buffer are saved one by one. meta: what JSON holds (floats
    come back bit for bit). States of later steps are removed, too: the run was resumed from before them, and they
    are no longer part of it. Raises StateNotSaved, and leaves nothing behind, when the disk refuses.
    """
    folder = Path(run_dir) / "state"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # One above the highest, not the first free: as the lowest this state would be taken for the oldest.
        suffixes = [suffix for number, suffix in map(_order, _states(folder)) if number == step]
        path = folder / (f"step-{step:08d}" + (f".{max(suffixes) + 1}" if suffixes else ""))
        temporary = temporary_for(path)
        try:
            _write_state(temporary, step, tensors, meta)
            os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync(folder)
    except OSError as error:
        raise StateNotSaved(f"state of step {step} not saved in {folder}: {error.strerror or error}") from error
    earlier = [old for old in _states(folder) if _order(old) < _order(path) and _is_whole(old)]
    for old in _states(folder):
        if old not in (path, *earlier[: keep - 1]):
            with contextlib.suppress(OSError):  # it costs space only, and the next save tries again
                _discard(old)
    return path


def load_state(place: str | Path, resume: str = "auto") -> State | None:
    """The state to resume from; its tensors lie on the CPU.

    resume "" is none. "auto" is the newest whole state below place, a run directory, or none when there is none yet.
    A folder is that one state, or the newest whole one of that run directory. A damaged state is passed over for the
    one before it, with a line in `warnings`. Raises UserError when states are there and none is whole, or when a
    named folder holds none.
    """
    if not resume:
        return None
    place = Path(place if resume == "auto" else resume)
    paths = [place] if _NAME.fullmatch(place.absolute().name) else _states(_run_dir_of(place) / "state")
    if not paths and resume == "auto":
        return None
    if not paths:
        raise UserError(f"--resume {resume}: no saved state there; give a run directory or one of its state/step-*")
    warnings = []
    for path in paths:
        try:
            return State(*_read_state(path), path, warnings)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            warnings.append(f"{path} is damaged and passed over: {error}")
    remedy = "restore one from a copy, or start afresh without --resume"
    raise UserError(f"no whole state to resume from; {'; '.join(warnings)}; {remedy}")


def check_run_dir(out: str | Path) -> None:
    """Raise UserError when `out` cannot become a writable folder, or another run writes there.

    Creates nothing: a check before long loads.
    """
    check_writable(out)
    if os.path.exists(Path(out) / LOCK):
        open_locked(Path(out) / LOCK, f"--out {out}").close()


def check_writable(out: str | Path) -> None:
    """Raise UserError when `out` cannot become a writable folder. Creates nothing."""
    nearest = nearest_existing(out)
    if not os.path.isdir(nearest):
        raise UserError(f"--out {out}: {nearest} is a file, not a folder; choose another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: {nearest} cannot be written by this user; choose another folder")


def prepare_run_dir(out: str | Path, resume: str = "") -> BinaryIO:
    """Create the run directory, prove that it can be written, and clear what interrupted writes left. Main rank only.

    Returns the file whose lock keeps other runs out until it is closed.

    A run that does not continue the one in `out` moves that one's files into RUN_DIR/earlier-N: nothing is lost, and
    the new run can never resume from the old one's state. Raises UserError when `out` cannot be a writable folder.
    """
    run_dir, lock = Path(out), None
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open_locked(run_dir / LOCK, f"--out {out}")  # before anything is moved: it may be another run's
        for name in RUN_FILES:
            remove_leftovers(run_dir, name)
        remove_leftovers(run_dir / "state", "step-*")
        probe = temporary_for(run_dir / RUN_FILES[0])
        probe.write_bytes(b"?")
        probe.unlink()
        continues = resume == "auto" or (resume and _run_dir_of(resume).resolve() == run_dir.resolve())
        if not continues and (_states(run_dir / "state") or (run_dir / "metrics.jsonl").exists()):
            _set_aside(run_dir)
    except OSError as error:
        if lock is not None:
            lock.close()
        check_run_dir(out)
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}; choose another folder") from None
    return lock


def enter_run_dir(run: Run, sources: dict[str, str], state: State | None) -> None:
    """Make the run's directory its own until run.lock is closed, and write config.toml into it. Main rank only.

    state: from which the run goes on. Later ones in the directory go: a kill before the next save would leave them
    without the rows of metrics.jsonl that lead to them, which are about to be cut.
    """
    run.lock = prepare_run_dir(run.config.out, run.config.resume)
    if state and run.config.resume != "auto":
        for later in _states(Path(run.config.out) / "state"):
            if later.parent.samefile(state.path.parent) and _order(later) > _order(state.path.absolute()):
                _discard(later)
                print(f"{later} was saved later and is removed, with its rows of metrics.jsonl")
    write_atomic(Path(run.config.out, "config.toml"), to_toml(run.config, sources))


def open_log(run: Run) -> RunLog:
    """The log of a run, which goes on where the run stands."""
    # Where a resumed run still has a validation to do, an older row of it is cut from metrics.jsonl.
    flops, validated, config = run.useful_flops_per_token, not run.validation_due, run.config
    log = RunLog(config.out, config, run.runtime, run.total_steps, run.step, flops, validated, run.run_id)
    run.say = log.say
    return log


def recipe(config: TrainConfig) -> dict:
    """The settings that fix the numbers of a run, for the state's meta."""
    return {key: getattr(config, key) for key in KEYS if key not in FREE_ON_RESUME}


def check_resume(state: State, config: TrainConfig) -> None:
    """Raise UserError that names each setting which differs from the saved run's `recipe`."""
    # A run saved before a setting existed did what its default does.
    saved, now = DEFAULTS | state.entry("recipe", dict), recipe(config)
    changed = [f"{key} (saved {saved[key]!r}, now {now[key]!r})" for key in now if saved[key] != now[key]]
    if changed:
        remedy = "set them back, or start another run with --out (--adapter-init DIR starts from this adapter)"
        differ = f"a resumed run keeps its recipe, but these settings differ: {', '.join(changed)}"
        raise UserError(f"{state.path}: {differ}; {remedy}")


def check_rows(state: State, rows_digest: str) -> None:
    """Raise UserError when the state was saved with other rows, for then the steps to come are others."""
    if state.entry("rows", str) != rows_digest:
        remedy = "resume with the same --data, --val-data, --contrast-data and --contrast-val-data"
        raise UserError(f"{state.path}: was saved with other rows; {remedy}")


def save_run(run: Run, log: RunLog) -> None:
    """Log what is not yet logged, then write the run's state, and the adapter as PEFT reads it (with --keep-best the
    best one, as soon as there is one).

    A full disk costs a warning and sets run.save_error; training goes on. UserError where the directory is another
    run's by now.
    """
    config = run.config
    if log.writes:
        _keep_run_dir(run)  # before the log writes: the rows would stand among another run's
    log.sync()  # before the state: one whose rows of metrics.jsonl were lost could never be completed
    if not log.writes:
        return
    meta = {
        "recipe": recipe(config),
        "rows": run.rows_digest,
        "versions": versions(),
        "best_val": run.best_val,
        "best": run.best and {"step": run.best.step, "score": run.best.score},
        "epoch_open": not run.validation_due,
        "world_size": run.runtime.world_size,
        "run_id": run.run_id,
        USE_RSLORA: run.adapters.use_rslora,
    }
    tensors = {"adapter": run.adapters.param, **run.optimizer.state_tensors()}
    adapters = run.adapters
    if run.best:
        tensors[BEST] = run.best.adapter
        adapters = replace(adapters, param=run.best.adapter)
    multimodal, run.save_error = run.model.config.multimodal, ""
    try:
        save_adapter(adapters, config.out, config.model, multimodal, config.adapter_layout, config.revision)
        save_state(config.out, run.step, tensors, meta)
    except OSError as error:  # StateNotSaved is one
        run.save_error = f"step {run.step} was not saved: {error}"
        log.say(f"warning: {run.save_error}; training goes on, what was saved before is kept")


def _keep_run_dir(run: Run) -> None:
    """Make a deleted run directory, and its lock, anew (RunLog says so). UserError where another run was faster."""
    if not run.runtime.is_main:  # another rank saves when it ran out of memory; the main one still holds the lock
        return
    out, path = run.config.out, Path(run.config.out) / LOCK
    with contextlib.suppress(OSError):  # what cannot be made now is tried again at the next save
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            run.lock = open_locked(path, f"--out {out}")
        elif not os.path.samestat(os.fstat(run.lock.fileno()), path.stat()):
            event = "was deleted or moved while this run was going on, and is another run's now"
            raise UserError(f"--out {out}: {event}; step {run.step} is not saved; start again with another --out")


def saved_best(state: State, like: Tensor) -> Best | None:
    """What --keep-best had kept; None also in a state that was saved before there was this setting."""
    if (best := state.meta.get("best")) is None:
        return None
    if not (isinstance(best, dict) and type(best.get("step")) is int and type(best.get("score")) is float):
        raise UserError(f"{state.path / META}: best is {best!r:.60}, expected an object with step and score")
    return Best(best["step"], best["score"], state.tensor(BEST, like=like))


def restore_run(run: Run, state: State) -> None:
    """Put a fresh run where a saved state stands. Raises UserError, and changes nothing, where they do not fit."""
    best_val, epoch_open = state.entry("best_val", float, NoneType), state.entry("epoch_open", bool)
    adapter, best = state.tensor("adapter", like=run.adapters.param), saved_best(state, run.adapters.param)
    try:
        optimizer_state = {name: x for name, x in state.tensors.items() if name not in ("adapter", BEST)}
        run.optimizer.load_state_tensors(optimizer_state)
    except UserError as error:
        raise UserError(f"{state.path}: {error}") from None
    run.adapters.param.copy_(adapter)
    run.step, run.best_val, run.best, run.validation_due = state.step, best_val, best, not epoch_open
    if _run_dir_of(state.path).resolve() == Path(run.config.out).resolve():  # else two runs would go on from it
        run.run_id = state.meta.get("run_id", run.run_id)


def _write_state(folder: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping) -> None:
    own = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}  # views share storage
    contents = {
        TENSORS: safetensors.torch.save(own),
        META: (json.dumps({"step": step, "meta": dict(meta)}, indent=1) + "\n").encode(),
    }
    contents[SUMS] = _sums(contents)
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        sync(folder / name)
    sync(folder)


def _read_state(folder: Path) -> tuple[int, dict[str, Tensor], dict]:
    contents = _read_whole(folder)
    saved = parse_json(contents[META])
    step, meta = saved["step"], saved["meta"]
    if step != _order(folder.absolute())[0] or type(step) is not int or not isinstance(meta, dict):
        raise UserError(f"{META} does not describe a state")
    return step, safetensors.torch.load(contents[TENSORS]), meta


def _read_whole(folder: Path) -> dict[str, bytes]:
    contents = {name: (folder / name).read_bytes() for name in (TENSORS, META)}
    if (folder / SUMS).read_bytes() != _sums(contents):
        raise UserError("its checksums do not hold")
    return contents


def _is_whole(folder: Path) -> bool:
    try:
        return bool(_read_whole(folder))
    except (OSError, ValueError):
        return False


def _sums(contents: Mapping[str, bytes]) -> bytes:
    """In the format of sha256sum, which also checks it."""
    return "".join(f"{hashlib.sha256(contents[name]).hexdigest()}  {name}\n" for name in (TENSORS, META)).encode()


def _states(folder: Path) -> list[Path]:
    """The saved states in a folder, newest first."""
    paths = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(paths, key=_order, reverse=True)


def _run_dir_of(path: str | Path) -> Path:
    """The run directory of itself, of its state/, or of one of its states."""
    path = Path(path).absolute()
    path = path.parent if _NAME.fullmatch(path.name) else path
    return path.parent if path.name == "state" else path


def _order(path: Path) -> tuple[int, int]:
    step, suffix = _NAME.fullmatch(path.name).groups()
    return int(step), int(suffix or 0)


def _discard(path: Path) -> None:
    """Take a state's name away first: a kill on the way leaves a temporary, not half a state."""
    temporary = temporary_for(path)
    os.rename(path, temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def _set_aside(run_dir: Path) -> None:
    """Move an earlier run's files into the first free earlier-N, and say so."""
    number = next(n for n in range(1, 10**6) if not (run_dir / f"earlier-{n}").exists())
    place = run_dir / f"earlier-{number}"
    place.mkdir()
    for name in RUN_FILES:
        if (run_dir / name).exists():
            os.rename(run_dir / name, place / name)
    print(f"the run that was in {run_dir} is now in {place}")
