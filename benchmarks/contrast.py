"""What contrast rows and --kl-weight cost: steps of the bundled model measured on this CPU, and the 27B's on paper.

    python benchmarks/contrast.py [--steps 40] [--out benchmarks/results/contrast-cost.json]

On the CPU the variants take turns, step by step and in one process, on the same training rows: their ratios hold on a
busy machine, their seconds do not. The bundled benign rows stand in for contrast rows. Peak memory is that of a process
of its own for each. On paper: four rows of 640 tokens, of which 80 are not trained, and one contrast row of 400.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from psysafe import load_model  # noqa: E402
from psysafe.checkpoint.base import build  # noqa: E402
from psysafe.cli import Parser, whole_number  # noqa: E402
from psysafe.data.rows import CLUSTER, read_rows, write_rows  # noqa: E402
from psysafe.files import ASSETS, write_atomic  # noqa: E402
from psysafe.model.lora import attach  # noqa: E402
from psysafe.program import main_guard  # noqa: E402
from psysafe.runtime import start  # noqa: E402
from psysafe.training.config import TrainConfig, resolve  # noqa: E402
from psysafe.training.dry_run import read_architecture  # noqa: E402
from psysafe.training.paper.rates import PaperGPU  # noqa: E402
from psysafe.training.paper.run import paper_run, trace_step  # noqa: E402
from psysafe.training.roofline import SPEEDS  # noqa: E402
from psysafe.training.setup import Run, load_data, make_optimizer, plan_within  # noqa: E402
from psysafe.training.step import train_step  # noqa: E402
from psysafe.training.watchdog import Watchdog  # noqa: E402

VARIANTS = {
    "no contrast rows": {},
    "R = 0.25": {"contrast_ratio": 0.25},
    "R = 0.25, KL": {"contrast_ratio": 0.25, "kl_weight": 1.0},
    "R = 1": {"contrast_ratio": 1.0},
    "R = 1, KL": {"contrast_ratio": 1.0, "kl_weight": 1.0},
}


def run_of(settings: dict, contrast_file: str) -> Run:
    """A run of the bundled model on the bundled rows."""
    config = replace(resolve([])[0], contrast_data=[contrast_file], **settings)
    runtime = start("cpu", "float32", config.seed, config.timeout)
    data = load_data(config, ASSETS / "tiny")
    model = load_model(config.model, None, runtime.device, runtime.dtype)
    adapters = attach(model, config.lora_rank, config.lora_alpha, config.lora_targets, config.seed)
    optimizer, watch = make_optimizer(adapters, config), Watchdog(runtime, config.timeout)
    run = Run(config, runtime, model, adapters, optimizer, data.train, None, 240, watch)
    run.contrast_set = data.contrast
    return run


def timed_step(run: Run) -> tuple[float, int]:
    """(CPU seconds, tokens)."""
    began = time.process_time()
    row = train_step(run).read()
    run.step += 1
    return time.process_time() - began, row["tokens"]


def measured(contrast_file: str, steps: int) -> list[dict]:
    runs = {name: run_of(settings, contrast_file) for name, settings in VARIANTS.items()}
    for run in runs.values():  # the first step also pays for what is done once
        timed_step(run)
    turns = [{name: timed_step(run) for name, run in runs.items()} for _ in range(steps)]
    rows = []
    for name in VARIANTS:
        # Of each turn the ratio, then the median of these: other jobs on the machine slow whole turns.
        ratios = [turn[name][0] / turn["no contrast rows"][0] for turn in turns]
        memory = subprocess.run(
            [sys.executable, __file__, "--memory", name, contrast_file], capture_output=True, text=True, check=True
        )
        rows.append({
            "variant": name,
            "CPU ms a step": round(1e3 * statistics.median(turn[name][0] for turn in turns), 1),
            "ratio": round(statistics.median(ratios), 3),
            "tokens a step": round(statistics.mean(turn[name][1] for turn in turns), 1),
            "peak MB of the process": round(int(memory.stdout) / 1e3),
        })  # fmt: skip
    return rows


def on_paper(settings: dict) -> dict:
    """A step of the 27B on one H100, planned for its memory; and the memory that it would need without a plan."""
    config = replace(TrainConfig(dtype="bfloat16"), **settings)
    contrast = [400] * round(4 * config.contrast_ratio)
    model = build(read_architecture(config.model)[0], "meta", torch.bfloat16)
    adapters = attach(model, config.lora_rank, config.lora_alpha, config.lora_targets)
    optimizer = make_optimizer(adapters, config)
    plan = plan_within(SPEEDS["H100"].memory, config, model, adapters, optimizer, 1)
    planned, free = (
        trace_step(paper_run(config, model, adapters, optimizer, chosen, [640] * 4, 80, contrast))
        for chosen in (plan, None)
    )
    seconds = PaperGPU("H100", 640).total(planned.ops)[""].seconds
    return {
        "tokens": 4 * 640 + sum(contrast),
        "ms": round(1e3 * seconds, 1),
        "peak GB": round(planned.peak / 1e9, 2),
        "peak GB, nothing recomputed": round(free.peak / 1e9, 2),
    }


def table(rows: list[dict]) -> str:
    lines = [" | ".join(map(str, row)) for row in ([*rows[0]], *(row.values() for row in rows))]
    return "\n".join(f"| {line} |" for line in (lines[0], " | ".join("---" for _ in rows[0]), *lines[1:]))


def main(argv: Sequence[str]) -> int:
    parser = Parser("benchmarks/contrast.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=whole_number, default=40, help="timed steps of each variant (40)")
    parser.add_argument("--out", type=Path, help="also write the numbers there")
    parser.add_argument("--memory", nargs=2, metavar=("VARIANT", "ROWS"), help=SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.memory:
        run = run_of(VARIANTS[args.memory[0]], args.memory[1])
        for _ in range(20):
            timed_step(run)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "contrast.jsonl")
        rows = read_rows("assets:rows/train.jsonl")
        write_rows([row for row in rows if row.fields[CLUSTER] == "benign"], file)
        cpu = measured(str(file), args.steps)
    paper = [{"variant": name, **on_paper(settings)} for name, settings in VARIANTS.items()]
    result = {"torch": torch.__version__, "CPU, bundled model": cpu, "27B on one H100, on paper": paper}
    print(table(cpu), table(paper), sep="\n\n")
    if args.out:
        write_atomic(args.out, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
