"""Prefill and decode speed of psysafe and the baselines, beside the limit that reading the weights sets.

    python -m benchmarks.generate                                            # the bundled model on this machine
    python -m benchmarks.generate --model Qwen/Qwen3.5-27B --batch 1 8 48    # on a GPU
    python -m benchmarks.generate --model random:CONFIG.json                 # no download

Two kinds of work, greedy, with the same weights and prompts for all. `batch N`: N prompts of one length, all decoded to
one length. `queue N`: 8 N prompts of different lengths, N at a time, each up to its end token; transformers takes them
in padded batches of N, which run until their last sequence ends.

prefill: prompt tokens over the time to the first new one. decode: the tokens after the first over the time after it.
all: new tokens over the whole time. x: psysafe's `all` over that of this row. % limit: decode against reading the
weights once a step. Medians of runs that take turns, in CPU time on one CPU thread; the last line is JSON.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from psysafe.checkpoint.base import load_model, published_tensors, resolve_model
from psysafe.cli import Parser, whole_number
from psysafe.files import read_json, write_atomic
from psysafe.generation.engine import Engine
from psysafe.generation.request import Request, RequestOptions
from psysafe.model.decoder import Qwen3_5
from psysafe.program import main_guard
from psysafe.runtime import start, versions

PROMPTS_PER_SLOT = 8  # of a queue


@dataclass(frozen=True)
class Work:
    name: str  # batch or queue
    batch: int  # prompts that run at the same time
    prompts: list[list[int]]  # token ids
    new_tokens: int  # at most, for each prompt
    eos: list[int]  # ids that end a text


# (most new tokens of each prompt) -> the new ids of each prompt: runs the work once.
Run = Callable[[int], list[list[int]]]


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.generate", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="assets:tiny")
    parser.add_argument("--batch", type=whole_number, nargs="+", default=[1, 8, 48])
    parser.add_argument("--work", nargs="+", default=["batch", "queue"], choices=("batch", "queue"))
    parser.add_argument("--prompt-tokens", type=whole_number, default=64)
    parser.add_argument("--new-tokens", type=whole_number, default=64)
    parser.add_argument("--repeats", type=whole_number, default=3)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--peers", nargs="*", default=list(BASELINES), choices=list(BASELINES), dest="baselines")
    parser.add_argument("--out", metavar="FILE", help="write the JSON document there, too")
    args = parser.parse_args(argv)
    runtime = start(args.device)
    torch.set_deterministic_debug_mode("default")
    model = load_model(args.model, device=runtime.device, dtype=runtime.dtype)
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    if model.lm_head is not None:
        # The embedding is not the head's weight here: a step reads only a few of its rows.
        weight_bytes -= model.embed_tokens.numel() * model.embed_tokens.element_size()
    print(f"{args.model}: {weight_bytes / 1e9:.3g} GB of weights a step, {runtime.dtype} on {runtime.device_name}")
    contenders = {"psysafe": ours}
    for name in args.baselines:
        if importlib.util.find_spec(name):
            contenders[name] = BASELINES[name]
        else:
            print(f"{name} is not installed: not measured")

    print(f"{'work':9s} {'by':13s} {'prefill t/s':>12s} {'decode t/s':>12s} {'all t/s':>9s} {'x':>6s} {'% limit':>8s}")
    results = []
    for work in (make_work(name, batch, args, model) for batch in args.batch for name in args.work):
        runs = {name: prepare(model, args.model, work) for name, prepare in contenders.items()}
        rows = measure(work, runs, args.repeats)
        for row in rows:
            row["x"] = rows[0]["all"] / row["all"]
            if runtime.peak and work.name == "batch":
                row["limit"] = 100 * row["decode"] * weight_bytes / (work.batch * runtime.peak.bandwidth)
            cells = [f"{row[key]:,.0f}" if key in row else "-" for key in ("prefill", "decode", "all")]
            limit = f"{row['limit']:.1f}" if "limit" in row else "-"
            print(f"{work.name:6s}{work.batch:3d} {row['by']:13s} {cells[0]:>12s} {cells[1]:>12s} {cells[2]:>9s} "
                  f"{row['x']:6.2f} {limit:>8s}", flush=True)  # fmt: skip
        results += rows
    baseline_versions = {name: importlib.metadata.version(name) for name in contenders if name in BASELINES}
    report = {"model": args.model, "device": runtime.device_name, "prompt_tokens": args.prompt_tokens,
              "new_tokens": args.new_tokens, "repeats": args.repeats,
              "versions": versions() | baseline_versions, "results": results}  # fmt: skip
    line = json.dumps(report)
    if args.out:
        write_atomic(Path(args.out), line + "\n")
    print(line)
    return 0


def make_work(name: str, batch: int, args: argparse.Namespace, model: Qwen3_5) -> Work:
    vocab, draw = model.config.vocab_size, random.Random(0)
    n, new = args.prompt_tokens, args.new_tokens
    if name == "batch":
        return Work(name, batch, [draw.choices(range(vocab), k=n) for _ in range(batch)], new, [])
    count = PROMPTS_PER_SLOT * batch
    prompts = [draw.choices(range(vocab), k=draw.randint(max(1, n // 2), n * 3 // 2)) for _ in range(count)]
    # Random weights would hardly ever write one given end token. Of many ids spread over the vocabulary they meet one
    # after about new / 4 tokens or more, each row at another time.
    return Work(name, batch, prompts, 2 * new, list(range(7, vocab, max(2, new // 4))))


def measure(work: Work, runs: dict[str, Run], repeats: int) -> list[dict]:
    """One row of the table for each contender: tokens a second, and the share of answers equal to psysafe's."""
    # (until the first new token, whole) of every repeat
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    answers = {name: run(work.new_tokens) for name, run in runs.items()}  # this run is the warm-up, too
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append((timed(run, 1), timed(run, work.new_tokens)))
    rows = []
    for name, ids in answers.items():
        first, whole = (statistics.median(column) for column in zip(*seconds[name], strict=True))
        tokens = sum(map(len, ids))
        row = {"work": work.name, "batch": work.batch, "by": name, "tokens": tokens, "all": tokens / whole}
        row["same_answers"] = sum(a == b for a, b in zip(ids, answers["psysafe"], strict=True)) / len(ids)
        if work.name == "batch":
            row["prefill"] = sum(map(len, work.prompts)) / first
            row["decode"] = (tokens - len(ids)) / (whole - first)
        rows.append(row)
    return rows


def timed(run: Run, new_tokens: int) -> float:
    # On one CPU thread the process's CPU time counts, because other processes may share the machine.
    clock = time.perf_counter if torch.cuda.is_available() or torch.get_num_threads() > 1 else time.process_time
    start_time = clock()
    run(new_tokens)  # returns ids on the host, so a GPU has finished
    return clock() - start_time


def ours(model: Qwen3_5, model_name: str, work: Work) -> Run:
    longest = max(map(len, work.prompts))
    engine = Engine(model, work.batch, longest + work.new_tokens, work.eos)

    def run(new_tokens: int) -> list[list[int]]:
        options = RequestOptions(max_new_tokens=new_tokens)
        ids = [[] for _ in work.prompts]
        for event in engine.run(Request(row, prompt, options=options) for row, prompt in enumerate(work.prompts)):
            ids[event.row].append(event.token)
        return ids

    return run


def run_transformers(model: Qwen3_5, model_name: str, work: Work) -> Run:
    """transformers on the same memory: its weights are views of ours."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    folder, _ = resolve_model(model_name)
    file = Path(model_name).name.removeprefix("random:") if model_name.startswith("random:") else "config.json"
    config = read_json(folder / file)
    with torch.device("meta"):
        baseline = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**config.get("text_config", config)))
    tensors = {(k if k.startswith("lm_head") else f"model.{k}"): v for k, v in published_tensors(model).items()}
    tensors["lm_head.weight"] = model.head
    baseline.load_state_dict(tensors, assign=True)
    device = model.embed_tokens.device
    # Its buffer is in no checkpoint, so on "meta" it has no values: build it anew.
    baseline.model.rotary_emb = type(baseline.model.rotary_emb)(baseline.config).to(device)
    baseline.eval()

    @torch.inference_mode()
    def run(new_tokens: int) -> list[list[int]]:
        ids = []
        for first in range(0, len(work.prompts), work.batch):
            prompts = work.prompts[first : first + work.batch]
            longest = max(map(len, prompts))
            rows = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
            output = baseline.generate(
                rows,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=work.eos or None,
                pad_token_id=0,
            )
            # Rows that end early are padded up to the longest; cut behind the end token.
            for row in output[:, longest:].tolist():
                end = next((i + 1 for i, token in enumerate(row) if token in work.eos), len(row))
                ids.append(row[:end])
        return ids

    return run


def run_vllm(model: Qwen3_5, model_name: str, work: Work) -> Run:
    """vLLM, from the same folder, with its own copy of the weights."""
    from vllm import LLM, SamplingParams

    llm = LLM(str(resolve_model(model_name)[0]), max_num_seqs=work.batch, gpu_memory_utilization=0.4)

    def run(new_tokens: int) -> list[list[int]]:
        end = dict(stop_token_ids=work.eos) if work.eos else dict(ignore_eos=True)
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, detokenize=False, **end)
        outputs = llm.generate([{"prompt_token_ids": p} for p in work.prompts], sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return run


BASELINES = {"transformers": run_transformers, "vllm": run_vllm}

if __name__ == "__main__":
    sys.exit(main_guard(main))
