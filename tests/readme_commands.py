"""Prints the shell commands of a README's code blocks marked `sh`, one a line, in order.

Lines that begin with `#` and blocks marked otherwise (`console` for output, `text`) are left out.
"""

import re
import sys
from pathlib import Path


def commands(text: str) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = (line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


if __name__ == "__main__":
    print("\n".join(commands(Path(sys.argv[1]).read_text(encoding="utf-8"))))
