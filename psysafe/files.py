"""Files that appear whole or not at all: written to a temporary name in the same folder, fsynced, renamed.

Also locks files, and reads JSON: any defect raises UserError.
"""

import fcntl
import functools
import json
import os
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from psysafe.program import UserError

ASSETS = Path(__file__).resolve().parent / "assets"
TEMPORARY = ".tmp-"  # what marks an unfinished file or folder: NAME.tmp-PID


@functools.cache
def clusters() -> dict:
    """assets/clusters.toml, the single source of risk clusters, strategies, services and emergency numbers."""
    return tomllib.loads((ASSETS / "clusters.toml").read_text(encoding="utf-8"))


def write_atomic(path: str | Path, content: bytes | str | Callable[[Path], object]) -> None:
    """Write a file so that its name never holds half of it, not even after a power cut.

    content: bytes, text (UTF-8), or a function that writes to the path it is given. After an error the old file, if
    there was one, is unchanged, and the temporary is gone.
    """
    path = Path(path)
    temporary = temporary_for(path)
    try:
        if callable(content):
            content(temporary)
        else:
            # Half a surrogate pair, which JSON allows and UTF-8 does not, becomes its JSON escape again.
            temporary.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk names no file
            error.filename = str(path)
        raise
    sync(path.parent)


def temporary_for(path: Path) -> Path:
    """The name under which a file or folder is prepared. The process id keeps two writers apart."""
    return path.with_name(f"{path.name}{TEMPORARY}{os.getpid()}")


def sync(path: str | Path) -> None:
    """fsync of a file or, so that a rename in it lasts, of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_locked(path: str | Path, what: str | Path = "") -> BinaryIO:
    """Open a file to read and append, unbuffered; made where there is none. No other process can until it is closed.

    A killed process keeps nothing locked. Raises UserError, which names `what` (the path), when it is locked already.
    """
    file = open(path, "a+b", buffering=0)  # noqa: SIM115  (the caller closes it)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{what or path}: another process is writing it; wait, or give another --out") from None
    except OSError as error:  # some network file systems have no locks
        print(f"warning: {path}: {error.strerror}; do not start a second process that writes it", file=sys.stderr)
    return file


def parse_json(text: str | bytes) -> object:
    """json.loads; brackets nested without end raise UserError (a ValueError, as every other defect does)."""
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError("nested too deeply") from None


def read_json(path: Path) -> dict:
    """A JSON object, or UserError naming the file and line."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def remove_leftovers(folder: str | Path, name: str) -> None:
    """Remove what an interrupted write of a name (or glob pattern) left in a folder."""
    for path in Path(folder).glob(f"{name}{TEMPORARY}*"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def expand(path: str) -> str:
    """`assets:NAME` as a path into the package's assets; any other text as it is."""
    return str(ASSETS / path.removeprefix("assets:")) if path.startswith("assets:") else path
