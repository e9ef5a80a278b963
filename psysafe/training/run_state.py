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
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from psysafe.files import parse_json, remove_leftovers, sync, temporary_for
from psysafe.program import UserError
from psysafe.training.config import KEYS, TrainConfig

# All that a run leaves in its directory: other files there are not touched (--out . is a legal choice).
RUN_FILES = "config.toml", "metrics.jsonl", "adapter_config.json", "adapter_model.safetensors", "loss.png", "state"

TENSORS, META, SUMS = "state.safetensors", "state.json", "SHA256SUMS"
# A second save at the same step (before and after a validation, say) gets a suffix: no valid state is ever overwritten.
_NAME = re.compile(r"step-(\d{8,18})(?:\.(\d{1,9}))?")

# A resumed run may change these: they say where it runs and who is told, or leave the result the same. The rows are
# compared by their content, so that a data file may move.
FREE_ON_RESUME = {
    *("data", "val_data", "out", "resume", "save_every", "micro_batch_tokens"),
    *("device", "threads", "shard", "timeout", "memory_limit", "embedding", "report", "project", "plot", "dry_run"),
}


class StateNotSaved(OSError):
    """A state could not be written, for want of space say. Those before it are whole: warn, and train on."""


@dataclass
class State:
    """One saved state. meta: as given to `save_state`; warnings: a line for each newer state that was damaged."""

    step: int
    tensors: dict[str, Tensor]
    meta: dict
    path: Path
    warnings: list[str] = field(default_factory=list)

    def fact(self, name: str, *kinds: type):
        """meta[name]. Raises UserError when a state of another version, or of somebody else, has no such fact."""
        if not isinstance(self.meta.get(name, ...), kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise UserError(f"{self.path / META}: {name} is {self.meta.get(name)!r:.60}, expected {expected}")
        return self.meta[name]

    def tensor(self, name: str, like: Tensor) -> Tensor:
        """tensors[name] in the shape and type of `like`, else UserError."""
        both = self.tensors.get(name), like
        found, expected = ("nothing" if x is None else f"{x.dtype} {tuple(x.shape)}" for x in both)
        if found != expected:
            file = self.path / TENSORS
            raise UserError(f"{file}: {name} is {found}, this run needs {expected}; resume with the model it is of")
        return self.tensors[name]

    def changed(self, now: Mapping) -> list[str]:
        """A warning when the run's software or number of ranks is not this one's: other sums, other roundings.

        now: `runtime.versions()`, and `ranks`.
        """
        before = self.fact("versions", dict) | {"ranks": self.fact("world_size", int)}
        keys = [key for key in ("psysafe", "torch", "triton", "ranks") if before.get(key) != now[key]]
        if not keys:
            return []
        old, new = (", ".join(f"{key} {found.get(key) or 'unknown'}" for key in keys) for found in (before, now))
        return [f"warning: saved with {old}, continued with {new}: no longer bit for bit the uninterrupted run"]


def save_state(run_dir: str | Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping, keep: int = 2) -> Path:
    """Save a state and remove all but the last `keep` whole ones. Returns its folder.

    tensors: any device, shapes and dtypes; views of one buffer are saved one by one. meta: what JSON holds (floats
    come back bit for bit). States later than this step are removed, too: they belong to a future that a resume from an
    earlier state has cut off. Raises StateNotSaved, and leaves nothing behind, when the disk refuses.
    """
    folder = Path(run_dir) / "state"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{step:08d}"
        suffix = 0
        while path.exists():
            suffix += 1
            path = folder / f"step-{step:08d}.{suffix}"
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
    found = [place] if _NAME.fullmatch(place.absolute().name) else _states(_run_dir_of(place) / "state")
    if not found and resume == "auto":
        return None
    if not found:
        raise UserError(f"--resume {resume}: no saved state there; give a run directory or one of its state/step-*")
    warnings = []
    for path in found:
        try:
            return State(*_read_state(path), path, warnings)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            warnings.append(f"{path} is damaged and passed over: {error}")
    remedy = "restore one from a copy, or start afresh without --resume"
    raise UserError(f"no whole state to resume from; {'; '.join(warnings)}; {remedy}")


def check_run_dir(out: str | Path) -> None:
    """Raise UserError when `out` cannot become a writable folder. Makes nothing: a check before long loads."""
    there = next(p for p in (Path(out).absolute(), *Path(out).absolute().parents) if os.path.exists(p))
    if not os.path.isdir(there):
        raise UserError(f"--out {out}: {there} is a file, not a folder; choose another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: {there} cannot be written by this user; choose another folder")


def prepare_run_dir(out: str | Path, resume: str = "") -> Path:
    """Make the run directory, prove that it can be written, and clear what interrupted writes left. Main rank only.

    A run that does not continue the one in `out` moves that one's files into RUN_DIR/earlier-N: nothing is lost, and
    the new run can never resume from the old one's state. Raises UserError when `out` cannot be a writable folder.
    """
    run_dir = Path(out)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
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
        check_run_dir(out)
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}; choose another folder") from None
    return run_dir


def recipe(config: TrainConfig) -> dict:
    """The settings that fix the numbers of a run, for the state's meta."""
    return {key: getattr(config, key) for key in KEYS if key not in FREE_ON_RESUME}


def check_resume(state: State, config: TrainConfig) -> None:
    """Raise UserError that names each setting which differs from the saved run's `recipe`."""
    saved, now = state.fact("recipe", dict), recipe(config)
    changed = [f"{key} (saved {saved.get(key)!r}, now {now[key]!r})" for key in now if saved.get(key) != now[key]]
    if changed:
        remedy = "set them back, or start another run with --out (--adapter-init DIR starts from this adapter)"
        differ = f"a resumed run keeps its recipe, but these settings differ: {', '.join(changed)}"
        raise UserError(f"{state.path}: {differ}; {remedy}")


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
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=_order, reverse=True)


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
    doomed = temporary_for(path)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _set_aside(run_dir: Path) -> None:
    """Move an earlier run's files into the first free earlier-N, and say so."""
    number = next(n for n in range(1, 10**6) if not (run_dir / f"earlier-{n}").exists())
    place = run_dir / f"earlier-{number}"
    place.mkdir()
    for name in RUN_FILES:
        if (run_dir / name).exists():
            os.rename(run_dir / name, place / name)
    print(f"the run that was in {run_dir} is now in {place}")
