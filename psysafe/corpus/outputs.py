"""Files that the tools write, which never take the place of what they read."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from psysafe.files import expand, write_atomic
from psysafe.program import UserError


def refuse_inputs(flag: str, out: str | Path, inputs: Mapping[str, Sequence[str]]) -> None:
    """UserError where a file to write is a folder, or one of the files that a command reads (under any name).

    flag: that names the file to write. inputs: what names the files to read -> the files.
    """
    out = Path(out)
    if out.is_dir():
        raise UserError(f"{flag} {out}: a folder; expected the name of a file to write")
    for source, paths in inputs.items():
        for path in map(Path, map(expand, paths)):  # of the hub's data sets nothing exists under that path
            if out.exists() and path.exists() and out.samefile(path):
                raise UserError(f"{flag} {out}: that is a file of {source}, and would be overwritten; give another")


def write_json(path: str | Path, content: dict) -> None:
    """The whole file or none of it, in a folder that is made where there is none."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
