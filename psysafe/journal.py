"""Results that survive a kill: one JSON object a line, appended at once, read again at the next start."""

import glob
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from psysafe.files import open_locked, parse_json
from psysafe.program import UserError, named_errors

REMEDY = "give another --out, or move this file away"
NOT_SHARED = "answers of other ranks did not come here; give --out on a file system that all ranks share"


def key_of(*parts) -> str:
    """A short name for everything that a result depends on. Other settings give another key, never a wrong reuse."""
    text = json.dumps(parts, ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


class AppendFile:
    """A JSONL file that one process at a time appends to. A subclass says what a line must hold: `_add`.

    A last line that a kill tore is cut off, so that its item is done again. Raises UserError for a file that holds
    something else, and leaves that file as it is: nothing is cut before every line is recognised, also the torn one.

    Of several ranks, rank 0 writes the file, and each other one a file of its own beside it (NAME.rank1), after rank 0
    has read and opened the first. `collect` puts them together; the next start does so for ranks that were killed.
    """

    FOREIGN: str  # what a line is that is none of this file's, and what to do

    def __init__(self, path: str | Path, rank: int = 0):
        self.path, self.rank = Path(path), rank
        if self.path.exists() and not self.path.is_file():  # a pipe or a device would be read without end
            raise UserError(f"{self.path}: not a regular file; {REMEDY}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if rank and self.path.exists():
            self._read(self.path.read_bytes(), self.path)
        self._file = open_locked(self._rank_file(rank) if rank else self.path)
        try:
            self._read_own()
            if not rank:
                self._take_rank_files()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        if not self._file.closed:
            self._close()

    def collect(self, wait: Callable[[], None]) -> None:
        """Puts what all ranks have written into the one file. wait: returns when every rank has called it."""
        self.sync()
        if self.rank:
            self._close()  # before rank 0 opens it
        wait()
        if not self.rank:
            self._take_rank_files()

    def sync(self) -> None:
        with named_errors(self.path):
            os.fsync(self._file.fileno())

    def _write(self, line: str) -> None:
        # With no buffer: a kill between two lines tears none. Half a surrogate pair, which JSON allows and UTF-8 does
        # not, becomes its JSON escape again.
        self._write_bytes(line.encode(errors="backslashreplace") + b"\n")

    def _write_bytes(self, content: bytes) -> None:
        with named_errors(self.path):
            while content:  # where there is room for a part, the first call writes that, and the second one fails
                content = content[self._file.write(content) :]

    def _read_own(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        size = self._read(content, self._rank_file(self.rank) if self.rank else self.path)
        if size < len(content):
            self._file.truncate(size)

    def _read(self, content: bytes, path: Path, copy: bool = False) -> int:
        """Takes in the lines of a file, and with `copy` writes those that are new into this one; bytes of whole lines.

        A torn last line is left out.
        """
        size = content.rfind(b"\n") + 1
        torn = content[size:]
        for number, line in enumerate(content[:size].split(b"\n")[:-1], 1):
            where = f"{path} line {number}"
            try:
                row = parse_json(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise UserError(f"{where}: {self.FOREIGN}")
            if copy and self._holds(row):  # a kill came between copying the file and removing it
                continue
            self._add(row, where)
            if copy:
                self._write_bytes(line + b"\n")
        # Last: nothing is ever cut off somebody else's file.
        if torn and not self._began_as_own(torn):
            raise UserError(f"{path}: {self.FOREIGN}")
        return size

    def _take_rank_files(self) -> None:
        """Copies what other ranks wrote, in this run or in one that was killed, and removes their files."""
        paths = self.path.parent.glob(f"{glob.escape(self.path.name)}.rank*")
        for path in sorted(path for path in paths if re.fullmatch(r"\.rank[1-9]\d*", path.suffix)):
            with open_locked(path) as file:
                file.seek(0)
                self._read(file.read(), path, copy=True)
                self.sync()
                path.unlink()

    def _close(self) -> None:
        is_empty = self.rank and os.fstat(self._file.fileno()).st_size == 0
        self._file.close()
        if is_empty:
            self._rank_file(self.rank).unlink()

    def _rank_file(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.name}.rank{rank}")

    def _holds(self, row: dict) -> bool:
        """Whether the row has been taken in; each kind of file defines it."""
        raise NotImplementedError

    def _add(self, row: dict, where: str) -> None:
        """Takes in one row that the file holds; each kind of file defines it, and refuses what is not its own."""
        raise NotImplementedError

    def _began_as_own(self, torn: bytes) -> bool:
        """Whether a line without its end is the beginning of one that this file would write."""
        raise NotImplementedError


class Journal(AppendFile):
    """Results by key; `rows` holds what is in the file.

    Lines of other settings stay in it and do no harm: their keys are never asked for.
    """

    FIRST_BYTES = b'{"key": "' + 20 * b"0" + b'"'  # of every line, with another key
    FOREIGN = f"no result of an evaluation; {REMEDY}"

    def __init__(self, path: str | Path, rank: int = 0):
        self.rows: dict[str, dict] = {}
        super().__init__(path, rank)

    def append(self, key: str, row: dict) -> None:
        self._write(json.dumps({"key": key, **row}, ensure_ascii=True))
        self.rows[key] = row

    def _add(self, row: dict, where: str) -> None:
        key = row.pop("key", None)
        if not isinstance(key, str):
            raise UserError(f"{where}: {self.FOREIGN}")
        self.rows[key] = row

    def _holds(self, row: dict) -> bool:
        return row.get("key") in self.rows

    def _began_as_own(self, torn: bytes) -> bool:
        # Alone in the file it needs a key of `key_of`: other programs write objects with a "key", too.
        key = rb"[^\"]*" if self.rows else rb"[0-9a-f]{20}"
        beginning = torn + self.FIRST_BYTES[len(torn) :]
        return re.match(rb'\{"key": "' + key + rb'"', beginning) is not None
