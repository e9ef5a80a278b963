"""Files that appear whole or not at all: written to a temporary name in the same folder, fsynced, renamed.

Also locks files, and reads text and JSON of a bounded size: any defect raises UserError.
"""

import fcntl
import functools
import glob
import json
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from psysafe.program import UserError

ASSETS = Path(__file__).resolve().parent / "assets"
BUNDLED_MODEL = "assets:tiny"  # as `expand` takes it
MAX_TEXT_BYTES = 10**6  # of a prompt or a TOML file
MAX_JSON_BYTES, MAX_ROWS_BYTES = 2 * 10**8, 10**9
TEMPORARY = ".tmp-"  # what marks an unfinished file or folder: NAME.tmp-HOST-PID
HOST = re.sub(r"[^\w.-]", "_", os.uname().nodename)


@functools.cache
def clusters() -> dict:
    """assets/clusters.toml, the single source of risk clusters and strategies."""
    return tomllib.loads(read_text(ASSETS / "clusters.toml"))


def read_text(path: str | Path, max_bytes: int = MAX_JSON_BYTES) -> str:
    """The text of a file. UserError names the line that is not UTF-8, or says that there is more than max_bytes;
    OSError where the file cannot be read."""
    return decode_text(read_bounded(path, max_bytes), path)


def decode_text(content: bytes, path: str | Path) -> str:
    """The text in a file's bytes: UTF-8 without a byte order mark, line ends as \\n. path: for the error."""
    try:
        # Editors on Windows put the mark in front. As a character of the text it would reach a model or break a parser.
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        start = error.start + len(content) - len(error.object)  # the codec counts from behind the mark
        line = content.count(b"\n", 0, start) + 1
        raise UserError(f"{path}: not UTF-8 at line {line} (byte {start}); save the file as UTF-8") from None


def write_atomic(path: str | Path, content: bytes | str | Callable[[Path], object]) -> None:
    """Write a file so that its name never holds half of it, not even after a power cut.

    content: bytes, text (UTF-8), or a function that writes to the path it is given. After an error the old file, if
    there was one, is unchanged, and the temporary is gone. Of a link the file that it names is written, and the link
    stays. UserError for a device, a pipe or a socket.
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):  # the rename would put a file in place of /dev/stdout
        raise UserError(f"{path}: not a regular file; expected the name of a file to write")
    target = Path(os.path.realpath(path))  # after the check: a pipe behind /dev/stdout has no path of its own
    temporary = temporary_for(target)
    remove_leftovers(target.parent, glob.escape(target.name))
    try:
        if callable(content):
            content(temporary)
            make_readable(temporary)
        else:
            # Half a surrogate pair, which JSON allows and UTF-8 does not, becomes its JSON escape again.
            temporary.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
        sync(temporary)
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):  # a full disk names no file
            error.filename = str(path)
        raise
    sync(target.parent)


def write_json_lines(path: Path, rows: Iterable[dict]) -> None:
    """JSONL, a line a row: the whole file or none of it, in a folder that is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def temporary_for(path: Path) -> Path:
    """The name under which a file or folder is prepared. Host and process id keep two writers apart."""
    return path.with_name(f"{path.name}{TEMPORARY}{HOST}-{os.getpid()}")


def sync(path: str | Path) -> None:
    """fsync of a file or, so that a rename in it lasts, of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bounded(path: str | Path, max_bytes: int) -> bytes:
    """The bytes of a file. UserError where there are more than max_bytes: /dev/zero, for one, has no end."""
    content = bytearray()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            content += chunk
            if len(content) > max_bytes:
                raise UserError(f"{path}: more than {max_bytes:,} bytes in it; expected a smaller file")
    return bytes(content)


def open_locked(path: str | Path, what: str | Path = "") -> BinaryIO:
    """Open a file to read and append, unbuffered; made where there is none. No other process can until it is closed.

    A killed process keeps nothing locked. Raises UserError, which names `what` (the path), when it is locked already.
    """
    file = open(path, "a+b", buffering=0)  # noqa: SIM115  (the caller closes it)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between opening and locking another process may have put its finished file in place of this one.
        if not os.path.exists(path) or not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise BlockingIOError
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
        value = parse_json(read_text(path, MAX_JSON_BYTES))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def make_readable(path: str | Path) -> None:
    """Give a file the permissions that open() gives a new one: safetensors' own can be read by nobody else."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def remove_leftovers(folder: str | Path, name: str) -> None:
    """Remove what a killed write of a name (or glob pattern) left in a folder.

    What a living process writes stays. So does what another machine left, as on a shared disk: nothing here can tell
    whether its process still runs.
    """
    for path in Path(folder).glob(f"{name}{TEMPORARY}{HOST}-*"):
        pid = path.name.rpartition(f"{TEMPORARY}{HOST}-")[2]
        if re.fullmatch(r"[1-9]\d{0,8}", pid) and not _is_running(int(pid)):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    """Whether another process of that id runs on this machine."""
    if pid == os.getpid():  # an earlier process had it, as in a container, where every start counts from 1
        return False
    try:
        os.kill(pid, 0)  # signal 0 asks, and sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, as another user's
        return True
    return True


def new_folder(out: str | Path) -> Path:
    """`out`, which must be a new name or an empty folder; nothing is created. Raises UserError."""
    out = Path(out)
    if os.path.ismount(out):  # nothing can be renamed to it, and what is prepared beside it lies on another disk
        raise UserError(f"{out}: a disk is mounted there; give --out a folder in it")
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError(f"{out}: exists already and is no empty folder; give --out a new one")
    return out


def nearest_existing(path: str | Path) -> Path:
    """`path`, absolute, or the nearest folder above it (or file, by a mistake) that is there."""
    path = Path(path).absolute()
    return next(place for place in (path, *path.parents) if os.path.exists(place))


def expand(path: str) -> str:
    """`assets:NAME` as a path into the package's assets; any other text as it is."""
    return str(ASSETS / path.removeprefix("assets:")) if path.startswith("assets:") else path


def as_asset(path: str) -> str:
    """The inverse of `expand`: a path into the package's assets as `assets:NAME`."""
    return f"assets:{Path(path).relative_to(ASSETS)}" if Path(path).is_relative_to(ASSETS) else path
