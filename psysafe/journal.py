"""Results that survive a kill: one JSON object a line, appended at once, found again by what it depends on."""

import fcntl
import hashlib
import json
import os
from pathlib import Path

from psysafe.files import parse_json
from psysafe.program import UserError

START = b'{"key": "'
FOREIGN = "no result of an evaluation; give another --out, or move this file away"


def key_of(*parts) -> str:
    """A short name for everything that a result depends on. Other settings give another key, never a wrong reuse."""
    text = json.dumps(parts, ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


class Journal:
    """A JSONL file of results by key; `rows` holds what is in it. One process at a time.

    A last line that a kill tore is dropped and its item done again. Lines of other settings stay and are ignored by
    whoever asks for keys. Raises UserError for a file that holds something else.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115  (closed by __exit__)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.rows = self._read()
        except BlockingIOError:
            self._file.close()
            raise UserError(f"{self.path}: another process is writing it; wait, or give another --out") from None
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error) -> None:
        self._file.close()

    def append(self, key: str, row: dict) -> None:
        """One write, so that a kill between two lines tears none."""
        self._file.write(json.dumps({"key": key, **row}, ensure_ascii=True).encode() + b"\n")
        self.rows[key] = row

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def _read(self) -> dict[str, dict]:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            torn = content[whole:]
            if not (torn.startswith(START) or START.startswith(torn)):  # never cut somebody else's file
                raise UserError(f"{self.path}: {FOREIGN}")
            self._file.truncate(whole)
        rows = {}
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
            try:
                row = parse_json(line)
                rows[row.pop("key")] = row
            except (ValueError, KeyError, AttributeError, TypeError):
                raise UserError(f"{self.path} line {number}: {FOREIGN}") from None
        return rows
