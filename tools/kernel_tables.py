"""Writes the generated tables of docs/ and benchmarks/README.md, each between its two markers.

    python tools/kernel_tables.py            all of them: compiles every kernel for sm_90 (minutes, no GPU)
    python tools/kernel_tables.py --bytes    the tables that need no compiler
    python tools/kernel_tables.py --speed    the predicted times only, and what follows from them

Bytes come from every operation's own `work` (kernels/proof/cases/); the traffic of PEFT and Unsloth is counted by hand
below, pass by pass. Errors at odd sizes are those of the committed soak (tests/kernels/soak_odd_sizes.py). Predicted
times come from machine code (kernels/proof/sass/). From them follow the speeds of attention and the delta rule in
psysafe/training/roofline.py, which are written there, and from these the table of a step in benchmarks/README.md.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kernels.proof.compile import compile_all, table  # noqa: E402
from kernels.proof.registry import OPERATIONS, operations  # noqa: E402
from kernels.proof.sass.estimate import ERROR, Report, report  # noqa: E402
from psysafe.checkpoint.base import build  # noqa: E402
from psysafe.model.config import ForwardBackward, ModelConfig  # noqa: E402
from psysafe.model.lora import attach  # noqa: E402
from psysafe.training import roofline  # noqa: E402
from psysafe.training.config import TrainConfig  # noqa: E402
from psysafe.training.dry_run import read_architecture  # noqa: E402
from psysafe.training.memory_plan import RESERVE, Plan, Sizes  # noqa: E402
from psysafe.training.paper import rates  # noqa: E402
from psysafe.training.paper.rates import RATES, PaperGPU, busy  # noqa: E402
from psysafe.training.paper.run import trace_step  # noqa: E402
from psysafe.training.setup import fixed_bytes, make_optimizer  # noqa: E402
from tools.write_launches import run_of  # noqa: E402

DOCS = ROOT / "docs"
MODEL = "Qwen/Qwen3.5-27B"
SOAK = ROOT / "benchmarks" / "results" / "kernels-odd-sizes.json"
T = 4096  # tokens a micro-batch: A, B and the norm's weights are read once for all of them
STEP = 16_384  # tokens an optimiser step of the worked example
BANDWIDTH = 4.3e12  # B/s: a copy on one H200, measured
ATTENTION_LAYERS, DELTA_LAYERS = 16, 48


class Launch(NamedTuple):
    """One fused kernel of a block: its sizes in the paper's recipe, and the same without adapters (off)."""

    title: str
    op: str
    size: dict
    off: dict


def _norm(title: str, J: int, rank: int) -> Launch:
    size = {"T": T, "D": 5120}
    return Launch(title, "residual_rms_norm", size | {"J": J, "rank": rank}, size | {"J": 0, "rank": 0})


_HEADS = {"T": T, "H": 24, "G": 4, "K": 256, "P": 32}
_MLP = {"T": T, "I": 17408}
_DOCUMENT = {"lengths": (T,)}
_ATTENTION = {"lengths": [T], "heads": 24, "kv_heads": 4, "head_dim": 256}
_CONV = _DOCUMENT | {"splits": (2048, 2048, 6144)}
_DELTA = _DOCUMENT | {"key_heads": 16, "value_heads": 48, "K": 128, "V": 128}
_GATED_NORM = {"T": T, "H": 48, "V": 128, "J": 0}
SWIGLU = Launch("SwiGLU", "swiglu", _MLP | {"rank": 1}, _MLP | {"rank": 0})
ATTENTION_BLOCK = (
    _norm("residual + RMSNorm, A of q, k, v", 3, 1),
    Launch("q/k norm + RoPE", "qk_norm_rope", _HEADS | {"rank": 1}, _HEADS | {"rank": 0}),
    Launch("causal attention", "causal_attention", _ATTENTION, _ATTENTION),
    Launch("output gate, A of o", "sigmoid_gate", {"T": T, "F": 6144, "J": 1}, {"T": T, "F": 6144, "J": 0}),
    _norm("residual + RMSNorm, A of gate, up", 2, 1),
    SWIGLU,
)
DELTA_BLOCK = (
    _norm("residual + RMSNorm", 0, 1),
    Launch("causal convolution + SiLU", "causal_conv1d_silu", _CONV, _CONV),
    Launch("gated delta rule", "gated_delta_rule", _DELTA, _DELTA),
    Launch("gated RMSNorm", "gated_rms_norm", _GATED_NORM, _GATED_NORM),
    _norm("residual + RMSNorm, A of gate, up", 2, 0),
    SWIGLU,
)


def per_token(launch: Launch) -> tuple[float, float, float, float]:
    """Bytes a token: forward, backward, and the adapters' part of each."""
    (op,) = operations([launch.op])
    on, off = op.work(**launch.size), op.work(**launch.off)
    numbers = on.forward_bytes, on.backward_bytes
    return *(n / T for n in numbers), (numbers[0] - off.forward_bytes) / T, (numbers[1] - off.backward_bytes) / T


def totals(block: tuple[Launch, ...]) -> tuple[float, ...]:
    return tuple(map(sum, zip(*map(per_token, block), strict=True)))


def block_table() -> str:
    lines = ["| kernel | forward | backward | of it for LoRA | |", "|---|---:|---:|---:|---:|"]
    for name, layers, block in (
        ("delta-net block", DELTA_LAYERS, DELTA_BLOCK), ("attention block", ATTENTION_LAYERS, ATTENTION_BLOCK)
    ):  # fmt: skip
        lines.append(f"| **{name}** ({layers} of 64) | B/token | B/token | forward | backward |")
        rows = [(launch.title, per_token(launch)) for launch in block] + [("sum", totals(block))]
        lines += [f"| {title} | " + " | ".join(f"{n:,.0f}" for n in numbers) + " |" for title, numbers in rows]
    return "\n".join(lines)


# Features (in, out) of the adapted projections, and in how many layers: q (with its gate), k, v, o; gate, up, down.
PROJECTIONS = (
    (ATTENTION_LAYERS, ((5120, 12288), (5120, 1024), (5120, 1024), (6144, 5120))),
    (ATTENTION_LAYERS + DELTA_LAYERS, ((5120, 17408), (5120, 17408), (17408, 5120))),
)


def projections(per_in: int, per_out: int) -> int:
    """Bytes a token over all adapted projections, at so many bytes an input and an output feature."""
    return sum(n * (per_in * i + per_out * o) for n, group in PROJECTIONS for i, o in group)


def partial_sums() -> int:
    """Bytes a micro-batch for the norms' partial sums of dA and dB: one fp32 row a multiprocessor, written and read."""
    rows = 132 * 5120 * 4 * 2
    sums = [
        launch.size["J"] + launch.size["rank"]
        for block, n in ((DELTA_BLOCK, DELTA_LAYERS), (ATTENTION_BLOCK, ATTENTION_LAYERS))
        for launch in block * n
        if launch.op == "residual_rms_norm"
    ]
    return rows * sum(sums)


def traffic_table() -> str:
    """Everything the adapters add to the traffic of a step. Arithmetic, not measurement."""
    rows = (
        ("PEFT, fp32 adapters on a bf16 model", projections(10, 28), projections(20, 28)),
        ("Unsloth", projections(2, 4), projections(8, 6)),
    )
    lines = [
        "| by arithmetic | forward, B/token | backward, B/token | ms a step of 16,384 tokens at 4.3 TB/s |",
        "|---|---:|---:|---:|",
    ]
    for name, forward, backward in rows:
        ms = (forward + backward) * STEP / BANDWIDTH * 1e3
        lines.append(f"| {name} | {forward:,} | {backward:,} | {ms:,.0f} |")
        recompute_ms = forward * STEP / BANDWIDTH * 1e3
        recomputed = f"{2 * forward:,} | {backward:,} | {ms + recompute_ms:,.0f}"
        lines.append(f"| ... if the forward pass is recomputed | {recomputed} |")
    halves = [
        sum(n * totals(b)[i] for n, b in ((DELTA_LAYERS, DELTA_BLOCK), (ATTENTION_LAYERS, ATTENTION_BLOCK)))
        for i in (2, 3)
    ]
    sums = partial_sums() / T
    ms = (sum(halves) + sums) * STEP / BANDWIDTH * 1e3
    numbers = f"{halves[0]:,.0f} | {halves[1] + sums:,.0f} | {ms:,.1f}"
    lines.append(f"| psysafe, the norms' partial sums included | {numbers} |")
    return "\n".join(lines)


def compile_table(target: str = "sm_90") -> str:
    specs = [spec for op in OPERATIONS for spec in op.compile_specs()]
    return table(specs, compile_all(specs, target), target)


# Predicted times, and what follows from them


def speed_table(speeds: Report) -> str:
    return "\n\n".join((speeds.table(), speeds.calibration_text(), ERROR))


def core_speeds(speeds: Report, config: ModelConfig) -> dict[str, ForwardBackward]:
    """Constant of roofline.py -> FLOP/s, in whole TFLOP/s: the useful FLOP of a step over its predicted seconds."""
    flops = config.useful_flops(context=T)
    cores = {"ATTENTION": ("attention core", "causal_attention"), "DELTA_RULE": ("delta rule", "gated_delta_rule")}
    return {
        constant: ForwardBackward(
            *(round(part * STEP / speeds.seconds(op, backward), -12) for backward, part in enumerate(flops[core]))
        )
        for constant, (core, op) in cores.items()
    }


def with_speeds(source: str, speeds: dict[str, ForwardBackward]) -> str:
    """roofline.py's text with these constants."""
    for constant, (forward, backward) in speeds.items():
        line = f"{constant} = ForwardBackward({forward / 1e12:.0f}e12, {backward / 1e12:.0f}e12)"
        source, count = re.subn(rf"^{constant} = ForwardBackward\(.*\)$", line, source, flags=re.MULTILINE)
        assert count == 1, f"no line for {constant}"
    return source


def kernel_rates(speeds: Report) -> dict[str, int]:
    """Kernel of paper/rates.py -> FLOP/s with the whole GPU busy: its counted FLOP over its predicted seconds."""
    seconds = {row.kernel: row.launch_seconds for row in speeds.rows}
    gpu = PaperGPU("H100", T)
    launches = {op.name: op for op in trace_step(run_of([T])).ops if op.name in RATES}
    return {name: round(gpu.flops(op) / seconds[name] / busy(op), -12) for name, op in launches.items()}


def with_rates(source: str, by_kernel: dict[str, int]) -> str:
    """rates.py's text with these rates."""
    for kernel, rate in by_kernel.items():
        source, count = re.subn(rf'("{kernel}": Rate\()\d+e12', rf"\g<1>{rate / 1e12:.0f}e12", source)
        assert count == 1, f"no line for {kernel}"
    return source


def step_table() -> str:
    """The roofline of a step by kind of kernel in ms, as the dry run computes it; nothing in it is measured."""
    architecture, _ = read_architecture(MODEL)
    config = TrainConfig(model=MODEL)
    model = build(architecture, "meta", torch.bfloat16)
    adapters = attach(model, config.lora_rank, config.lora_alpha, config.lora_targets, config.seed)
    fixed = fixed_bytes(config, model, adapters, make_optimizer(adapters, config), 1)
    columns, heads = [], []
    # Documents of 4,096 tokens, all trained; the recipe's, of 640 tokens with 80 of prompt.
    for title, length, trained in (("4 x 4,096", T, 1.0), ("recipe", 640, 560 / 640)):
        for name, speed in roofline.SPEEDS.items():
            sizes = Sizes.largest(min(4 * length, T), 4)
            plan = Plan(architecture, adapters.targets, adapters.rank, speed.memory - RESERVE, fixed)
            recompute = plan.choose(sizes).seconds / sizes.tokens
            seconds = roofline.step_seconds(architecture, 4 * length, length, trained, speed, recompute)
            loss = 4 * length * sum(roofline.elementwise_bytes(architecture, trained)["loss"]) / speed.bandwidth
            step = sum(seconds.values())
            seconds |= {"elementwise": seconds["elementwise"] - loss, "loss": loss}
            columns.append(seconds | {"**step**": step, "tokens/s": 4 * length / step / 1e3})
            heads.append(f"{name}, {title}")
    kinds = ("GEMM", "attention", "delta rule", "elementwise", "loss", "recompute", "**step**", "tokens/s")
    lines = ["| | " + " | ".join(f"{head} | measured" for head in heads) + " |", "|---" * (1 + 2 * len(heads)) + "|"]
    for kind in kinds:
        cells = " | ".join(f"{1e3 * column[kind]:,.0f} | not measured" for column in columns)
        lines.append(f"| {kind} | {cells} |")
    return "\n".join(lines)


def write_speeds() -> None:
    """The table of predicted times, the speeds in roofline.py and paper/rates.py, the table of a step."""
    speeds = report(["causal_attention", "gated_delta_rule"], say=print)
    write(DOCS / "kernels.md", "predicted times", speed_table(speeds))
    constants = core_speeds(speeds, read_architecture(MODEL)[0])
    path = Path(roofline.__file__)
    path.write_text(with_speeds(path.read_text(), constants))
    path = Path(rates.__file__)
    path.write_text(with_rates(path.read_text(), kernel_rates(speeds)))
    # This process has read the old constants, which the memory plan has a copy of: the table is another process's.
    command = [sys.executable, "-c", "from tools.kernel_tables import write_step; write_step()"]
    subprocess.run(command, check=True, cwd=ROOT)


def write_step() -> None:
    write(ROOT / "benchmarks" / "README.md", "roofline of a step", step_table())


def write(page: Path, name: str, content: str) -> None:
    page.write_text(between(page.read_text(), name, content))


def odd_sizes_table() -> str:
    """The worst RMS errors against fp64 of every operation, in the interpreter."""
    rows = json.loads(SOAK.read_text())["rows"]
    lines = ["| operation | checks | worst fp32 | worst bf16 |", "|---|---:|---:|---:|"]
    for op in OPERATIONS:
        of_op = [row for row in rows if row["op"] == op.name]
        worst = {}
        for row in of_op:
            worst[row["dtype"]] = max(worst.get(row["dtype"], 0.0), row["error"])
        cells = [f"{worst[dtype]:.1e}" if dtype in worst else "-" for dtype in ("float32", "bfloat16")]
        lines.append(f"| `{op.name}` | {len(of_op)} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def between(text: str, name: str, content: str) -> str:
    """The text with `content` between the markers of that name."""
    pattern = rf"(<!-- {name}: written by tools/kernel_tables.py -->\n).*?(<!-- end of {name} -->)"
    assert re.search(pattern, text, re.DOTALL), f"no markers for {name}"
    return re.sub(pattern, lambda m: f"{m[1]}\n{content}\n\n{m[2]}", text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the generated tables of docs/.")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--bytes", action="store_true", help="the byte tables only")
    only.add_argument("--speed", action="store_true", help="the predicted times and what follows from them only")
    args = parser.parse_args()
    if not args.speed:
        write(DOCS / "rank1-lora-for-free.md", "bytes of a block", block_table())
        write(DOCS / "rank1-lora-for-free.md", "bytes of an adapter", traffic_table())
        write(DOCS / "kernels.md", "errors at odd sizes", odd_sizes_table())
    if not args.bytes and not args.speed:
        write(DOCS / "kernels.md", "compiled resources", compile_table())
    if not args.bytes:
        write_speeds()


if __name__ == "__main__":
    main()
