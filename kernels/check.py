"""Proves every Triton kernel on the GPU at hand: one command, a table, an exit code.

    python -m kernels.check [--op NAME ...] [--seeds N] [--json FILE]

Every operation shows what its record states (kernels/proof/contract.py): all its cases, the 27B sizes among them, in
bf16 and in fp32, with several seeds; every output and gradient against the reference in fp64, over memory that was
filled with NaN; twice, the same bits; every mutant rejected by at least one case. Beyond that: attention at awkward
lengths is no worse than torch's flash kernel, and documents that change places keep their bits.

fp32 stands for the logic, bf16 for what training runs. Where a case is more than FP32_FLOPS of arithmetic it runs in
bf16 alone: its fp32 kernels are not meant for that size, and 1e-5 would measure the length of the sums. The fp64
references run at full size on the same GPU; the largest, the 27B head with 2,048 rows, needs about 40 GB (arithmetic).
Without a GPU the small cases run in Triton's interpreter, which kernels/proof/interpreter.py makes right for bf16 and
strict about memory; there the second run takes the programs in reverse order. Exit code 0: everything held.
"""

import dataclasses
import os
import sys

import torch

from kernels.proof.check import check_op, table
from kernels.proof.command import Parser, in_interpreter, versions, write_json


def main() -> int:
    parser = Parser("kernels.check", "Prove every Triton kernel on this GPU.")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="random inputs a case (default 3)")
    args = parser.parse()
    if args.seeds < 1:
        parser.refuse(f"--seeds {args.seeds}: expected 1 or more")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return in_interpreter("kernels.check", sys.argv[1:])
    if device == "cpu":
        print("no GPU: the small cases run in Triton's interpreter, in bf16 and fp32; the 27B sizes are not run")
    rows = []
    for op in args.ops:
        for row in check_op(op, args.seeds, device):
            rows.append(row)
            error = "" if row.error is None else f"{row.error:.1e}"
            print(f"{row.op:<22} {row.dtype:<9} {row.seconds:6.1f} s {error:>8}  {row.case}: {row.result}", flush=True)
    failed = sum(not row.ok for row in rows)
    print(f"\n{table(rows)}\n{len(rows)} checks on {versions()['gpu'] or 'the interpreter'}, {failed} failed")
    if args.json:
        results = [dataclasses.asdict(row) for row in rows]
        write_json(args.json, {**versions(), "seeds": args.seeds, "failed": failed, "rows": results})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
