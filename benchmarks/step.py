"""Times one optimiser step of the recipe: psysafe and the baselines, with the same weights, adapters and tokens.

    python benchmarks/step.py --device cpu --all      # on any machine: a small model, psysafe and transformers + PEFT
    python benchmarks/step.py --all --layers 64       # on a GPU: every contender that is installed
    python benchmarks/step.py --arm ours --layers 64 --profile trace.json

Each contender runs in a process of its own. First loss and LoRA gradients are compared; the contenders that agree are
timed. Where transformers + PEFT are missing or fail, nothing is compared, and the table and the JSON say so.
The last line on stdout is one JSON document. Method and results: benchmarks/README.md.
"""

# ruff: noqa: E402  (the repository's root has to be on the path first)
import argparse
import contextlib
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from safetensors.torch import load_file

from benchmarks.baselines import CONTENDERS
from benchmarks.measure import TURN_OVER, Task
from psysafe.cli import Parser
from psysafe.files import write_atomic
from psysafe.program import UserError, main_guard
from psysafe.runtime import versions

RECIPE_ROW, RECIPE_PROMPT = 640, 80  # tokens of the recipe's average row, and how many of them are not trained
# Largest relative errors of loss and of a gradient, ||a - b|| / ||b||, against transformers + PEFT. In bf16 every
# contender rounds its activations at other places; there the comparison finds a missing term, not the last bits.
MAX_ERRORS = {"cpu": {"loss": 1e-5, "gradients": 1e-4}, "cuda": {"loss": 0.01, "gradients": 0.1}}
PACKAGES = (
    *("transformers", "peft", "bitsandbytes", "flash-linear-attention", "fla-core", "flash-qla", "causal-conv1d"),
    *("liger-kernel", "unsloth", "nvidia-cudnn-cu13"),
)
ORACLE = "hf-peft"


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    tasks = {label(task): task for task in entries(args)}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        agreement, not_compared = {}, "--arm runs one contender alone; --all compares"
        if args.all:
            agreement, not_compared = compare(tasks, folder, args.compare_layers)
        wrong = {name: errors["failed"] for name, errors in agreement.items() if "failed" in errors}
        results = {name: {"failed": wrong[task.contender]} for name, task in tasks.items() if task.contender in wrong}
        to_time = {name: task for name, task in tasks.items() if task.contender not in wrong}
        print(f"timing {'; '.join(to_time)}{', step by step in turn' if args.device == 'cpu' else ''}", flush=True)
        if args.device == "cpu":
            results |= take_turns(to_time, folder)
        else:
            for name, task in to_time.items():
                results[name] = run(task, folder)
                if "failed" in results[name] and args.layers > 16:
                    results[name] |= extrapolated(task, folder)
    results = {name: results[name] for name in tasks}
    add_ratios(results, args.device)
    missing = {name: contender.missing(args.device) for name, contender in CONTENDERS.items()}
    not_measured = {name: reason for name, reason in missing.items() if args.all and reason}
    report = {"setting": conditions(args), "agreement": agreement, "not compared": not_compared}
    report |= {"contenders": results, "not measured": not_measured}
    print_table(report)
    line = json.dumps(report)
    if args.out:
        write_atomic(Path(args.out), line + "\n")
    print(line)
    return int(any("failed" in x and "extrapolated" not in x for x in results.values()))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="step.py", description=__doc__.split("\n")[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--arm", choices=CONTENDERS, dest="contender", help="one contender alone; nothing is compared")
    which.add_argument("--all", action="store_true", help="every contender that is installed; compares, then times")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=8, help="of the 27B's 64; on a CPU of the small model (8)")
    parser.add_argument("--compare-layers", type=int, default=8, help="layers for comparing gradients (8)")
    parser.add_argument("--tokens", help="COUNTxLENGTH or recipe (4x640); default 4x4096, on a CPU 4x128")
    parser.add_argument("--labelled", default="recipe", help="share of trained tokens, or recipe (all but 80 of 640)")
    parser.add_argument("--checkpointing", choices=("off", "on", "both"), default="both", help="default: both")
    parser.add_argument("--warmups", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profile", metavar="FILE", help="write a Chrome trace, and print the time by kind of work")
    parser.add_argument("--out", metavar="FILE", help="write the JSON document there, too")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; take --device cpu")
    if args.contender and (reason := CONTENDERS[args.contender].missing(args.device)):
        raise UserError(f"--arm {args.contender}: {reason}")
    limits = {"layers": (1, 64), "compare_layers": (1, 64), "warmups": (0, 1000), "steps": (1, 1000)}
    for name, (minimum, maximum) in limits.items():
        if not minimum <= getattr(args, name) <= maximum:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {minimum} to {maximum}")
    args.tokens = args.tokens or ("4x4096" if args.device == "cuda" else "4x128")
    args.lengths, args.trained = documents(args.tokens, args.labelled)
    return args


def documents(tokens: str, labelled: str) -> tuple[list[int], int]:
    """--tokens and --labelled -> (length of each document, how many tokens of each are trained)."""
    size = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", f"4x{RECIPE_ROW}" if tokens == "recipe" else tokens)
    if not size or int(size[2]) < 2:
        raise UserError(f"--tokens {tokens}: expected recipe or COUNTxLENGTH, like 4x4096, of two tokens or more each")
    share = 1 - RECIPE_PROMPT / RECIPE_ROW
    if labelled != "recipe":
        number = re.fullmatch(r"\d*\.?\d+", labelled)
        share = float(labelled) if number else 0
        if not 0 < share <= 1:
            raise UserError(f"--labelled {labelled}: expected recipe or a share above 0, at most 1.0")
    count, length = int(size[1]), int(size[2])
    # A document's first token is never predicted, so at most length - 1 tokens are trained.
    return [length] * count, min(length - 1, max(1, round(share * length)))


def entries(args: argparse.Namespace) -> list[Task]:
    """One task for each row of the table: every contender with and without checkpointing. On a GPU psysafe has one row,
    because its memory plan decides what is recomputed."""
    installed = [name for name, contender in CONTENDERS.items() if not contender.missing(args.device)]
    tasks = []
    for name in [args.contender] if args.contender else installed:
        planned = name == "ours" and args.device == "cuda"
        choices = {"off": [False], "on": [True], "both": [False, True]}["off" if planned else args.checkpointing]
        tasks += [
            Task(name, on, args.device, args.layers, args.lengths, args.trained, args.warmups, args.steps, result="")
            for on in choices
        ]
    if not args.profile:
        return tasks
    path = Path(args.profile).resolve()
    if len(tasks) == 1:
        return [replace(tasks[0], profile=str(path))]
    return [replace(task, profile=str(path.with_stem(f"{path.stem}-{slug(task)}"))) for task in tasks]


def label(task: Task) -> str:
    return task.contender + (", checkpointed" if task.checkpointing else "")


def slug(task: Task) -> str:
    return label(task).replace(", ", "-")


def run(task: Task, folder: Path) -> dict:
    """Runs a task in its own process and returns its results; {"failed": reason} if the process fails."""
    task = replace(task, result=str(folder / f"{slug(task)}.json"))
    process = subprocess.run(command(task), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return finished(task, process.returncode, process.stderr)


def command(task: Task) -> list[str]:
    return [sys.executable, "-m", "benchmarks.measure", json.dumps(asdict(task))]


def finished(task: Task, returncode: int, stderr: str) -> dict:
    if returncode:
        return {"failed": (stderr.strip().splitlines() or [f"exit code {returncode}"])[-1][:300]}
    return json.loads(Path(task.result).read_text())


def take_turns(tasks: dict[str, Task], folder: Path) -> dict[str, dict]:
    """Runs every task in its own process, all at once, but only one of them works at a time: a step of the first, a
    step of the second, ... So other load on the machine slows all of them down alike."""
    turns = max((1 + task.warmups + task.steps for task in tasks.values()), default=0)  # the first turn loads
    running = {}
    for name, task in tasks.items():
        task = replace(task, result=str(folder / f"{slug(task)}.json"), turns=True)
        stderr = (folder / f"{slug(task)}.txt").open("w+")  # a file: a full pipe that nobody reads would block it
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": stderr, "text": True}
        running[name] = task, subprocess.Popen(command(task), cwd=ROOT, **pipes), stderr
    for _ in range(turns):
        for _, process, _ in running.values():
            with contextlib.suppress(BrokenPipeError):  # the process has failed: `finished` reports why
                process.stdin.write("go\n")
                process.stdin.flush()
                while process.stdout.readline() not in (f"{TURN_OVER}\n", ""):
                    pass  # a line that a library has printed
    results = {}
    for name, (task, process, stderr) in running.items():
        process.communicate()
        stderr.seek(0)
        results[name] = finished(task, process.returncode, stderr.read())
        stderr.close()
    return results


def compare(tasks: dict[str, Task], folder: Path, layers: int) -> tuple[dict[str, dict], str]:
    """Compares every contender's loss and LoRA gradients with those of transformers + PEFT.

    Returns contender -> relative errors (of the gradients the largest), with "failed": reason where they are too large
    or the contender fails; and the reason why nothing was compared, "" if it was.
    """
    by_contender = {task.contender: task for task in tasks.values()}
    device = by_contender["ours"].device
    if ORACLE not in by_contender:
        return {}, f"{ORACLE}: {CONTENDERS[ORACLE].missing(device)}"
    print(f"comparing loss and LoRA gradients at {layers} layers", flush=True)
    results, files = {}, {}
    for name, task in by_contender.items():
        files[name] = folder / f"{name}.safetensors"
        once = replace(task, checkpointing=False, layers=layers, gradients=str(files[name]), profile="")
        results[name] = run(once, folder)
    if "failed" in results[ORACLE]:
        return {ORACLE: results[ORACLE]}, f"{ORACLE} failed: {results[ORACLE]['failed']}"
    loss, gradients = results.pop(ORACLE)["loss"], load_file(files[ORACLE])
    agreement = {}
    for name, result in results.items():
        if "failed" in result:
            agreement[name] = result
            continue
        errors = {"loss": abs(result["loss"] - loss) / abs(loss)} | gradient_error(load_file(files[name]), gradients)
        # `not <=` instead of `>`: an error of NaN is too large.
        too_large = [
            f"{what} by {errors[what]:.1e} (at most {limit:.0e})"
            for what, limit in MAX_ERRORS[device].items()
            if not errors[what] <= limit
        ]
        failure = {"failed": f"differs from {ORACLE}: {', '.join(too_large)}"} if too_large else {}
        agreement[name] = errors | failure
    return agreement, ""


def gradient_error(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict:
    """The largest relative error of all tensors, infinite if the names differ; and the number of tensors."""
    if gradients.keys() != expected.keys():
        return {"gradients": float("inf"), "tensors": len(gradients)}
    errors = [(gradients[name] - x).norm() / x.norm() for name, x in expected.items()]
    # torch's max keeps a NaN; Python's can lose it.
    return {"gradients": torch.stack(errors).max().item(), "tensors": len(expected)}


def extrapolated(task: Task, folder: Path) -> dict:
    """The time of a step at all layers, from the slope between 8 and 16: for a baseline that fails at all layers."""
    at_8, at_16 = (run(replace(task, layers=n, profile=""), folder) for n in (8, 16))
    if "failed" in at_8 or "failed" in at_16:
        return {}
    seconds = at_16["seconds"] + (at_16["seconds"] - at_8["seconds"]) / 8 * (task.layers - 16)
    rate = sum(task.lengths) / seconds
    return {"extrapolated": {"seconds": seconds, "tokens_per_s": rate, "8 layers": at_8, "16 layers": at_16}}


def add_ratios(results: dict[str, dict], device: str) -> None:
    """Adds to every other row its time and its memory over those of `ours`."""
    # On a CPU the ratio is of CPU time: other processes on the machine lengthen wall time, not CPU time.
    key = "cpu_seconds" if device == "cpu" else "seconds"
    ours = results.get("ours", {})
    for result in results.values():
        seconds = result.get("extrapolated", result).get(key)
        if result is not ours and seconds and key in ours:
            result["time_ratio"] = seconds / ours[key]
            if "peak" in result:
                result["memory_ratio"] = result["peak"] / ours["peak"]


def conditions(args: argparse.Namespace) -> dict:
    cuda = args.device == "cuda"
    package_versions = versions()
    for package in PACKAGES:
        try:
            package_versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            package_versions[package] = ""
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "machine": platform.machine(),
        "model": "Qwen3.5-27B's layers" if cuda else "small model",
        "layers": args.layers,
        "documents": args.lengths,
        "trained": args.trained,
        "dtype": "bfloat16" if cuda else "float32",
        "warmups": args.warmups,
        "steps": args.steps,
        "versions": package_versions,
    }


def print_table(report: dict) -> None:
    setting, results = report["setting"], report["contenders"]
    print(f"\n{setting['device']}, {setting['dtype']}, {setting['model']}, {setting['layers']} layers, "
          f"{len(setting['documents'])} documents of {setting['documents'][0]} tokens, {setting['trained']} of them "
          "trained")  # fmt: skip
    print(", ".join(f"{name} {version}" for name, version in setting["versions"].items() if version))
    if report["not compared"]:
        print(f"not compared: {report['not compared']}")
    for name, errors in report["agreement"].items():
        if "gradients" in errors:
            both = f"loss {errors['loss']:.1e}, {errors['tensors']} gradients {errors['gradients']:.1e}"
            print(f"{name} against {ORACLE}, relative error: {both}")
    columns = (("ms a step", 11), ("spread", 8), ("CPU ms", 9), ("spread", 8), ("tokens/s", 10), ("MFU", 7),
               ("peak MB", 10), ("reserved", 10), ("launches", 10), ("time", 7), ("memory", 8))  # fmt: skip
    print(f"\n{'contender':<24}" + "".join(f"{title:>{width}}" for title, width in columns))
    for name, result in results.items():
        if "extrapolated" in result:
            step = result["extrapolated"]
            print(f"{name:<24}{1e3 * step['seconds']:>11.1f}{'':>25}{step['tokens_per_s']:>10,.0f}  extrapolated from "
                  f"8 and 16 layers; at {setting['layers']}: {result['failed']}")  # fmt: skip
        elif "failed" in result:
            print(f"{name:<24}  not measured: {result['failed']}")
        else:
            row = zip(cells(result), columns, strict=True)
            print(f"{name:<24}" + "".join(f"{cell:>{width}}" for cell, (_, width) in row))
    for name, reason in report["not measured"].items():
        print(f"{name:<24}  not measured: {reason}")
    print("time, memory: how many times ours; spread: between the quartiles")
    for name, result in results.items():
        if "profile" in result:
            print_profile(name, result["profile"])
    print(flush=True)


def cells(result: dict) -> list[str]:
    """The texts of a row's columns; "-" for what was not measured here."""

    def cell(key: str, form: str, scale: float = 1.0) -> str:
        return f"{scale * result[key]:{form}}" if key in result else "-"

    return [
        *(cell(key, ".1f", 1e3) for key in ("seconds", "seconds_spread", "cpu_seconds", "cpu_seconds_spread")),
        *(cell("tokens_per_s", ",.0f"), cell("mfu", ".1%"), cell("peak", ",.0f", 1e-6), cell("reserved", ",.0f", 1e-6)),
        *(cell("launches", ","), cell("time_ratio", ".2f"), cell("memory_ratio", ".2f")),
    ]


def print_profile(name: str, kinds: dict[str, dict]) -> None:
    """The time of one step by kind of work, beside the roofline's."""
    total = sum(times["seconds"] or 0 for times in kinds.values())
    print(f"\n{name:<16}{'ms':>10}{'share':>8}{'roofline ms':>13}")
    for kind, times in sorted(kinds.items(), key=lambda item: -(item[1]["seconds"] or 0)):
        seconds, roofline = (f"{1e3 * s:.1f}" if s is not None else "-" for s in (times["seconds"], times["roofline"]))
        print(f"{kind:<16}{seconds:>10}{(times['seconds'] or 0) / total:>8.1%}{roofline:>13}")


if __name__ == "__main__":
    sys.exit(main_guard(main))
