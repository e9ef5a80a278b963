"""Compiles every kernel at its 27B shapes without a GPU and says what it needs of one.

    python -m kernels.compile_check [--op NAME ...] [--target sm_90|sm_80|sm_89|sm_100] [--json FILE]

Compiled is what real steps launch (kernels/proof/launches.json, which the step on paper writes). Printed per kernel:
registers a thread, shared memory and stack, and the bytes that ptxas spilled. Exit code 1: a compile error, a spill
above its stated budget, serialised wgmma, or more than the target offers. Triton's cache makes a second run fast.
"""

import dataclasses
import sys

from kernels.proof.command import Parser, versions, write_json
from kernels.proof.compile import SHARED_LIMIT, compile_all, complaints, table


def main() -> int:
    parser = Parser("kernels.compile_check", "Compile every kernel without a GPU.")
    parser.add_argument("--target", default="sm_90", choices=SHARED_LIMIT)
    args = parser.parse()
    specs = [spec for op in args.ops for spec in op.compile_specs()]
    results = compile_all(specs, args.target)
    wrong = [complaints(spec, used, args.target) for spec, used in zip(specs, results, strict=True)]
    print(table(specs, results, args.target))
    failed = sum(map(bool, wrong))
    print(f"{len(specs)} kernels for {args.target}, {failed} failed")
    if args.json:
        rows = [
            {"kernel": s.name, "warps": s.num_warps, "stages": s.num_stages, **dataclasses.asdict(r), "complaints": w}
            for s, r, w in zip(specs, results, wrong, strict=True)
        ]
        write_json(args.json, {"target": args.target, "triton": versions()["triton"], "kernels": rows})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
