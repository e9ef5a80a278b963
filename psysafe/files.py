"""Files that appear whole or not at all: written to a temporary name in the same folder, fsynced, renamed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

TEMPORARY = ".tmp-"  # what marks an unfinished file or folder: NAME.tmp-PID


def write_atomic(path: str | Path, content: bytes | str | Callable[[Path], object]) -> None:
    """Write a file so that its name never holds half of it, not even after a power cut.

    content: bytes, text (UTF-8), or a function that writes to the path it is given. An error leaves the old file, if
    there was one, and no temporary.
    """
    path = Path(path)
    temporary = temporary_for(path)
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
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


def remove_leftovers(folder: str | Path, name: str) -> None:
    """Remove what an interrupted write of a name (or glob pattern) left in a folder."""
    for path in Path(folder).glob(f"{name}{TEMPORARY}*"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
