"""Prints the shell commands of a README's code blocks marked `sh`, one a line, in order.

Lines that begin with `#` and blocks marked otherwise (`console` for output, `text`) are left out.
"""

import os
import re
import subprocess
import sys
from pathlib import Path


def commands(text: str) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = (line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def run_page(page: Path, count: int, replaced: dict[str, str]) -> None:
    """Runs every command of the page, in order, as it stands there but for what is replaced. It has to have `count`."""
    listed = commands(page.read_text(encoding="utf-8"))
    assert len(listed) == count
    for command in listed:
        run_command(command, page.parents[1], replaced)


def run_command(command: str, folder: Path, replaced: dict[str, str]) -> str:
    """Runs one command in the folder; what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    shell = ["bash", "-euo", "pipefail", "-c", with_replaced(command, replaced)]
    done = subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"$ {command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def with_replaced(command: str, replaced: dict[str, str]) -> str:
    for old, new in replaced.items():
        command = command.replace(old, new)
    return command


if __name__ == "__main__":
    print("\n".join(commands(Path(sys.argv[1]).read_text(encoding="utf-8"))))
