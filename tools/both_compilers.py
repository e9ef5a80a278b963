"""Compiles every kernel for sm_90 with both compilers that the project supports, and writes what each kernel needs.

    python tools/both_compilers.py [--out benchmarks/results/compile-sm_90.json] [--folder DIR]

Triton 3.7.1 comes with torch 2.13, 3.6.0 with torch 2.11. Each is installed from PyPI into a folder of its own, without
what it depends on, and `kernels.compile_check` runs with that folder in front of everything else (PYTHONPATH) and with
its own cache. torch stays as it is: it takes no part in compiling. No GPU is needed, but minutes and 1.2 GB. Without
--folder all of it is deleted at the end; with it, what lies there already is used again.

Printed: registers, shared memory and spills under both, side by side. Exit code 1: a kernel does not compile with one
of them, spills more than its budget, its wgmma are serialised, or it needs more than an H100 has.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kernels.proof.command import write_json  # noqa: E402
from kernels.proof.compile import markdown  # noqa: E402

COMPILERS = ("3.7.1", "3.6.0")
MEASURES = ("registers", "shared", "spills", "stack")


def install(version: str, folder: Path) -> Path:
    """The folder of that Triton, which is installed if it is not there yet."""
    target = folder / f"triton-{version}"
    if not (target / "triton").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        subprocess.run([*pip, f"triton=={version}"], check=True)
    return target


def compile_with(version: str, folder: Path) -> list[dict]:
    """The rows of `kernels.compile_check --json` with that compiler. RuntimeError if another one, or none, answered."""
    target, report = install(version, folder), folder / f"{version}.json"
    report.unlink(missing_ok=True)
    environment = os.environ | {"PYTHONPATH": str(target), "TRITON_CACHE_DIR": str(folder / f"cache-{version}")}
    command = [sys.executable, "-m", "kernels.compile_check", "--target", "sm_90", "--json", str(report)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if not report.is_file():
        raise RuntimeError(f"triton {version}: kernels.compile_check wrote no report, exit code {done.returncode}:\n"
                           f"{done.stdout}{done.stderr}")  # fmt: skip
    document = json.loads(report.read_text())
    if document["triton"] != version:
        raise RuntimeError(f"triton {document['triton']} compiled, not {version}: is there one before it on the path?")
    return document["kernels"]


def side_by_side(results: dict[str, list[dict]]) -> str:
    """A Markdown table: one line a kernel, each measure under every compiler; what is wrong at the end."""
    rows = [("kernel", *(f"{measure} {version}" for measure in MEASURES[:3] for version in results), "remark")]
    for group in zip(*results.values(), strict=True):
        remarks = [
            f"{version}: {'; '.join(kernel['complaints'])}"
            for version, kernel in zip(results, group, strict=True)
            if kernel["complaints"]
        ]
        numbers = (f"{kernel[measure]:,}" for measure in MEASURES[:3] for kernel in group)
        rows.append((group[0]["kernel"], *numbers, "; ".join(remarks)))
    return markdown(rows, text_columns=(0, len(rows[0]) - 1))


def document(results: dict[str, list[dict]]) -> dict:
    """What is committed: for every kernel its launch, and under each compiler what it needs."""
    kernels = []
    for group in zip(*results.values(), strict=True):
        launch = {key: group[0][key] for key in ("kernel", "warps", "stages")}
        fields = (*MEASURES, "serialised", "complaints")
        kernels.append(launch | {
            f"triton {version}": {field: kernel[field] for field in fields}
            for version, kernel in zip(results, group, strict=True)
        })  # fmt: skip
    return {"target": "sm_90", "compilers": list(results), "kernels": kernels}


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every kernel with both supported versions of Triton.")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the results there, as JSON")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keep the compilers and their caches there")
    args = parser.parse_args()
    if args.out and not args.out.parent.is_dir():
        parser.error(f"--out {args.out}: the folder {args.out.parent} does not exist; create it first")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder.resolve() if args.folder else Path(temporary)
        try:
            results = {version: compile_with(version, folder) for version in COMPILERS}
        except (RuntimeError, subprocess.CalledProcessError) as error:
            parser.error(str(error))
    print(side_by_side(results))
    failed = sum(bool(kernel["complaints"]) for kernels in results.values() for kernel in kernels)
    print(f"{len(results[COMPILERS[0]])} kernels for sm_90 with triton {' and '.join(COMPILERS)}, {failed} failed")
    if args.out:
        write_json(args.out, document(results))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
