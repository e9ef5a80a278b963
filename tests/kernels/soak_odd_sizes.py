"""Every size of odd_sizes.py, in fp32 and bf16, for minutes on end; what test_odd_sizes.py shows with a few.

    python -m tests.kernels.soak_odd_sizes [--op NAME ...] [--json FILE]

Prints a row a size and the worst error of every operation; docs/kernels.md holds the table, benchmarks/results/ the
rows. Exit code 0: everything held.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Iterator

from kernels.proof import check
from kernels.proof.check import Row
from kernels.proof.command import Parser, in_interpreter, versions, write_json
from kernels.proof.contract import Op
from tests.kernels.odd_sizes import ODD, worst_error


def rows(op: Op) -> Iterator[Row]:
    sizes = ODD[op.name]
    for size in (*sizes.fast, *sizes.slow, *sizes.soak):
        for dtype in op.dtypes:
            began, error, result = time.process_time(), None, "ok"
            try:
                error = worst_error(op, size, dtype)
            except Exception as problem:  # the other sizes go on
                result = f"{type(problem).__name__}: {problem}"
            name = str(dtype).removeprefix("torch.")
            yield Row(op.name, check.shown(size), name, error, result, time.process_time() - began)


def main() -> int:
    args = Parser("tests.kernels.soak_odd_sizes", "Every operation at odd sizes, in Triton's interpreter.").parse()
    if os.environ.get("TRITON_INTERPRET") != "1":
        return in_interpreter("tests.kernels.soak_odd_sizes", sys.argv[1:])
    done = []
    for op in args.ops:
        for row in rows(op):
            done.append(row)
            error = "" if row.error is None else f"{row.error:.1e}"
            print(f"{row.op:<24}{row.dtype:<9}{row.seconds:6.1f} s {error:>8}  {row.case}: {row.result}", flush=True)
        failed = sum(not row.ok for row in done)
        if args.json:  # after every operation, so that a run cut off leaves what it has shown
            write_json(args.json, {**versions(), "failed": failed, "rows": [dataclasses.asdict(row) for row in done]})
    print(f"\n{check.table(done)}\n{len(done)} checks in the interpreter, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
