"""A training step and generation on paper: the real ones, executed without memory, arithmetic or a GPU.

    python -m psysafe.paper --config configs/qwen3.5-27b.toml                      # one step of one 4,096-token row
    python -m psysafe.paper --config configs/qwen3.5-27b.toml --lengths 640x4 --html step.html
    python -m psysafe.paper --config configs/qwen3.5-27b.toml --lengths 640x4 --contrast-ratio 0.25 --kl-weight 1
    python -m psysafe.paper --config configs/qwen3.5-27b.toml --generate 640x16    # a prefill and one decode step

Every launch of Triton, every operation of torch, all live memory is recorded as the training loop's own functions make
them (psysafe/training/paper/trace.py). Their time is computed from one table of rates, which is printed as well:
nothing here is measured. All settings of train.py can be given, too (python train.py --help).
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import kernels
from psysafe.checkpoint.base import build, check_embedding
from psysafe.cli import Parser, out_file, whole_number
from psysafe.files import write_atomic
from psysafe.model.layers import frozen
from psysafe.model.lora import attach
from psysafe.model.shard import check_ranks
from psysafe.printable import counted
from psysafe.program import UserError, main_guard
from psysafe.training.config import TrainConfig, resolve
from psysafe.training.dry_run import read_architecture
from psysafe.training.paper import timeline
from psysafe.training.paper.rates import PaperGPU
from psysafe.training.paper.report import HOST_US, assumptions, report
from psysafe.training.paper.run import (
    CUBLAS_WORKSPACE,
    host_seconds,
    paper_run,
    parse_lengths,
    trace_generation,
    trace_step,
)
from psysafe.training.paper.shard import describe_gathers
from psysafe.training.paper.trace import Trace
from psysafe.training.roofline import SPEEDS, context
from psysafe.training.setup import make_optimizer, plan_within, with_adapter_shape

PICTURES = {
    "html": "write the step as a page: hover over an operation to see what it is",
    "svg": "write it as a picture",
    "chrome": "write it for ui.perfetto.dev",
}


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m psysafe.paper", description="A step and its parts, on paper.", allow_abbrev=False)
    number = {"type": whole_number, "metavar": "N"}
    parser.add_argument("--lengths", nargs="+", default=["4096"], metavar="N[xM]", help="the step's documents (4096)")
    parser.add_argument("--contrast-length", **number, default=400, help="of a contrast document (400)")
    parser.add_argument("--untrained", **number, default=1, help="tokens of each that are not trained (1)")
    parser.add_argument("--generate", nargs="+", metavar="N[xM]", help="instead: a prefill's prompts")
    parser.add_argument("--context", **number, default=4096, help="tokens of a sequence, at most (4096)")
    parser.add_argument("--gpu", choices=SPEEDS, default="H100", help="whose rates and memory (H100)")
    parser.add_argument("--ranks", **number, default=1, help="GPUs that a step is spread over (1)")
    parser.add_argument("--top", **number, default=12, help="heaviest lines to print (12)")
    parser.add_argument("--host-us", type=float, default=HOST_US, metavar="N", help=f"of Python a launch ({HOST_US:g})")
    for name, what in PICTURES.items():
        parser.add_argument(f"--{name}", type=out_file, metavar="FILE", help=what)
    args, rest = parser.parse_known_args(argv)
    if not kernels.HAS_TRITON:
        raise UserError("a step on paper records Triton's launches; install it (Linux and `pip install triton`)")
    if not 0 <= args.host_us < math.inf:
        raise UserError(f"--host-us {args.host_us:g}: expected a number of microseconds, 0 or more")
    config, _ = with_adapter_shape(*resolve(rest))
    if config.dtype == "auto":
        config = replace(config, dtype="bfloat16")
    try:
        print("\n".join(trace_all(args, config)))
    except UserError:
        raise
    except ValueError as error:  # of a kernel, which may not import psysafe: what it does not take
        raise UserError(f"{error} (a GPU would refuse it, too)") from None
    return 0


def trace_all(args: argparse.Namespace, config: TrainConfig) -> list[str]:
    """The lines to print."""
    architecture, _ = read_architecture(config.model)
    check_embedding(architecture, config.model, config.embedding)
    model = build(architecture, "meta", getattr(torch, config.dtype))
    if config.embedding == "cpu":  # memory that is never touched: the tokens of a trace are all 0
        model.embed_tokens = frozen(*model.embed_tokens.shape, dtype=model.norm.dtype)
    adapters = attach(model, config.lora_rank, config.lora_alpha, config.lora_targets, config.seed)
    if args.generate:
        prompts = parse_lengths("--generate", args.generate)
        gpu = PaperGPU(args.gpu, context(prompts))
        lines = []
        for name, trace in trace_generation(model, prompts, args.context).items():
            title = f"{config.model}, {name}, {len(prompts)} sequences"
            if name == "decode":
                draw(args, title, trace, gpu)
            lines += [*report(title, trace, gpu, args.top, args.host_us), ""]
        return lines + assumptions(gpu)
    lengths = parse_lengths("--lengths", args.lengths)
    contrast = [args.contrast_length] * round(config.contrast_ratio * len(lengths))
    gpu = PaperGPU(args.gpu, context(lengths + contrast))
    optimizer = make_optimizer(adapters, config)
    if config.shard:
        check_ranks(args.ranks)
    plan = plan_within(SPEEDS[args.gpu].memory, config, model, adapters, optimizer, args.ranks)
    share = lengths[:: args.ranks]  # of the first rank, which has the most
    # Documents are dealt out in one order, contrast documents last.
    contrast_share = (lengths + contrast)[:: args.ranks][len(share) :]
    run = paper_run(config, model, adapters, optimizer, plan, share, args.untrained, contrast_share)
    rank = f", rank 0 of {args.ranks}" if args.ranks > 1 else ""
    documents = counted(len(lengths), "document")
    documents += f" and {counted(len(contrast), 'contrast document')}" if contrast else ""
    title = f"{config.model}, a step of {sum(lengths) + sum(contrast):,} tokens in {documents}{rank}"
    trace = trace_step(run)
    if config.shard:  # traced whole, but a rank holds its share
        shift = plan.fixed + CUBLAS_WORKSPACE - trace.fixed
        trace.fixed, trace.peak = trace.fixed + shift, trace.peak + shift
    lines = report(title, trace, gpu, args.top, args.host_us, host_seconds(run))
    draw(args, title, trace, gpu)
    if config.shard:
        lines.append(describe_gathers(model, args.ranks, run))
    return [*lines, "", *assumptions(gpu)]


def draw(args: argparse.Namespace, title: str, trace: Trace, gpu: PaperGPU) -> None:
    """Writes the pictures that were asked for."""
    makers = {"html": timeline.page, "svg": timeline.svg, "chrome": timeline.chrome_trace}
    for name, make in makers.items():
        if file := getattr(args, name):
            write_atomic(Path(file), make(title, trace, gpu))


if __name__ == "__main__":
    sys.exit(main_guard(main))
