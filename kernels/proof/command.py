"""What the three commands share: their arguments, their one-line errors, the JSON file, the interpreter."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from kernels.ops._triton import HAS_TRITON, triton
from kernels.proof.registry import operations


class Parser(argparse.ArgumentParser):
    """Knows --op and --json. A wrong use ends the process with exit code 2 and one line."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog=prog, description=description)
        self.add_argument("--op", nargs="+", metavar="NAME", help="operations; all when absent")
        self.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")

    def parse(self) -> argparse.Namespace:
        """The arguments, `ops` among them: the records of the operations."""
        args = self.parse_args()
        if not HAS_TRITON:
            self.refuse("Triton is not installed; it needs Linux and `pip install triton`")
        if args.json and not args.json.parent.is_dir():
            self.refuse(f"--json {args.json}: the folder {args.json.parent} does not exist; create it first")
        if args.json and args.json.exists() and not args.json.is_file():  # the rename would replace /dev/null
            self.refuse(f"--json {args.json}: not a regular file; give the name of a file to write")
        try:
            args.ops = operations(args.op)
        except ValueError as error:
            self.refuse(str(error))
        return args

    def refuse(self, message: str) -> None:
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def write_json(path: Path, document: dict) -> None:
    """Writes the whole file or none of it. Of a link the file that it names is written, and the link stays."""
    path = Path(os.path.realpath(path))
    # Not by the tempfile module: its files can be read by their owner only, and the result would keep that.
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def in_interpreter(module: str, arguments: list[str]) -> int:
    """Runs this command again in a process that has chosen Triton's interpreter before it imports Triton."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.call([sys.executable, "-m", module, *arguments], env=environment)


def versions() -> dict[str, str | None]:
    """What a result depends on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
