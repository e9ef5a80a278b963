"""Times every op on the GPU at hand, at the 27B sizes, against plain PyTorch and whatever else is installed.

    python -m kernels.bench [--op NAME ...] [--json FILE] [--plot DIR]

Measured first, in the same run: the bandwidth of a large copy and the rate of a large bf16 matrix product. They are
the two ceilings. Then per op and case, forward and backward apart: the median time, GB/s and TFLOP/s of the work that
the op cannot avoid (`work` of its record, counted in the open), and the share of the roofline, which is the larger of
bytes / copy bandwidth and FLOPs / matrix rate over the time. Beside it: the same op without its adapters, the
reference in eager mode and through torch.compile, and other people's kernels (`peers` of its record).

Times are CUDA events around one call each. Two sets of random inputs take turns, and 1 GiB is overwritten before every
call: nothing is found in the L2, and the host is ahead of the device. An op whose check fails is not timed, nor a peer
whose result is not the op's. The last line of stdout is one JSON document.
Without a GPU nothing can be timed: it says so and runs the interpreter's check instead.
"""

import json
import sys
from pathlib import Path

import torch

from kernels.proof.bench import Timing, bench_case, document, measure_ceilings, plot, table, worth_timing
from kernels.proof.check import shown
from kernels.proof.command import Parser, in_interpreter, versions, write_json
from kernels.proof.contract import Op


def main() -> int:
    parser = Parser("kernels.bench", "Time every op on this GPU.")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw a PNG for every op there")
    args = parser.parse()
    if args.plot and not args.plot.is_dir():
        parser.refuse(f"--plot {args.plot}: this folder does not exist; create it first")
    if not torch.cuda.is_available():
        return without_gpu(args.ops)
    ceilings = measure_ceilings()
    print(", ".join(f"{name} {value}" for name, value in versions().items()))
    print(f"copy {ceilings.copy / 1e9:,.0f} GB/s, bf16 matrix product {ceilings.gemm / 1e12:,.0f} TFLOP/s")
    rows = []
    for op in args.ops:
        for size in worth_timing(op):
            timings = list(bench_case(op, size, ceilings))
            print(table(timings), flush=True)
            rows += timings
    result = document(rows, ceilings)
    if args.json:
        write_json(args.json, result)
    if args.plot:
        plot(rows, args.plot, result["gpu"])
    print(json.dumps(result))
    return 1 if any(row.remark.startswith("REFUSED") for row in rows) else 0


def without_gpu(ops: list[Op]) -> int:
    """Says what is not measured and checks the kernels in the interpreter instead. No file is written."""
    print("no GPU: no time, bandwidth or rate can be measured here, and no file is written; not measured:")
    remark = "not measured: no GPU"
    rows = [Timing(op.name, shown(size), "", "Triton", remark=remark) for op in ops for size in worth_timing(op)]
    for row in rows:
        print(f"  {row.op}: {row.case}")
    print("instead, the check in Triton's interpreter, which takes some minutes:", flush=True)
    failed = in_interpreter("kernels.check", ["--op", *(op.name for op in ops)])
    print(json.dumps(document(rows, None) | {"check": "failed" if failed else "ok"}))
    return failed


if __name__ == "__main__":
    sys.exit(main())
