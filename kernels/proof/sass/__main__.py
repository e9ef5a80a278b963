"""Predicts from machine code how long the kernels of attention and the delta rule take on an H100. No GPU is needed.

    python -m kernels.proof.sass [--op NAME ...] [--json FILE]    the table: cycles, waits, ms of a 27B step, on paper
    python -m kernels.proof.sass --kernel NAME [--listing]        one kernel: its loops, or its code with control codes
    python -m kernels.proof.sass --kernel NAME --trips N ...      ... and a run with so many trips of each loop

Exit code 2: a name that does not exist, or trips that do not fit the code.
"""

import sys

from kernels.proof.command import Parser, versions, write_json
from kernels.proof.sass import hopper
from kernels.proof.sass.estimate import ERROR, Kernel, load, report
from kernels.proof.sass.programs import launches


def main() -> int:
    parser = Parser("kernels.proof.sass", "Predict from machine code how long kernels take on an H100.")
    parser.add_argument("--kernel", metavar="NAME", help="one kernel, by its name in kernels.compile_check")
    parser.add_argument("--listing", action="store_true", help="with --kernel: print its code with control codes")
    parser.add_argument("--trips", type=int, nargs="+", metavar="N", help="with --kernel: run it, each loop so often")
    parser.add_argument("--blocks", type=int, metavar="N", help="with --trips: blocks on a multiprocessor")
    args = parser.parse()
    if not args.kernel and (args.listing or args.trips or args.blocks):
        parser.refuse("--listing, --trips and --blocks are about one kernel: name it with --kernel")
    try:
        return _one(parser, args) if args.kernel else _table(parser, args)
    except ValueError as error:
        parser.refuse(str(error))


def _table(parser: Parser, args) -> int:
    modelled = list(dict.fromkeys(launch.op for launch in launches()))
    if args.op and (unknown := set(args.op) - set(modelled)):
        parser.refuse(f"--op {', '.join(sorted(unknown))}: its launches are not listed; expected {', '.join(modelled)}")
    result = report(args.op or modelled, say=lambda line: print(line, file=sys.stderr))
    print(result.table(), result.calibration_text(), ERROR, sep="\n\n")
    if args.json:
        rows = [r._asdict() for r in result.rows]
        document = {"on paper, not measured": ERROR, "clock": hopper.CLOCK, "triton": versions()["triton"]}
        write_json(args.json, document | {"calibration": result.calibration._asdict(), "kernels": rows})
    return 0


def _one(parser: Parser, args) -> int:
    specs = {spec.name: spec for op in args.ops for spec in op.compile_specs()}
    if args.kernel not in specs:
        parser.refuse(f"--kernel {args.kernel}: no kernel of that name; expected one of {', '.join(specs)}")
    kernel = load([specs[args.kernel]])[args.kernel]
    loops = [tuple(kernel.listing.code[i].address for i in loop) for loop in kernel.listing.loops]
    if args.listing:
        for instruction in kernel.listing.code:
            marks = [f"loop {n} begins" for n, (first, _) in enumerate(loops) if first == instruction.address]
            print("\n".join([*marks, str(instruction)]))
    sizes = ", ".join(f"{first:#x} to {last:#x}" for first, last in loops) or "none"
    print(f"{kernel.name}: {len(kernel.listing.code):,} instructions, {kernel.warps} warps; loops: {sizes}")
    if args.trips is not None or not loops:
        _run(kernel, args.trips or [], args.blocks or kernel.blocks)
    return 0


def _run(kernel: Kernel, trips: list[int], blocks: int) -> None:
    run = kernel.simulate(trips, blocks)
    periods = ", ".join(f"{period:,.0f}" for period in run.periods) or "none"
    print(f"{run.cycles:,.0f} cycles, {blocks} blocks on a multiprocessor; cycles an iteration of each loop: {periods}")
    print("busy:", ", ".join(f"{unit} {cycles / run.cycles:.0%}" for unit, cycles in run.busy.most_common()))
    idle = run.idle.total()
    print("warps wait for:", ", ".join(f"{reason} {cycles / idle:.0%}" for reason, cycles in run.idle.most_common()))


if __name__ == "__main__":
    sys.exit(main())
