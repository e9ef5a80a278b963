"""One optimiser step of the recipe, ours and the peers': the same weights, adapters and tokens in every arm.

    python benchmarks/step.py --device cpu --all      # the race in miniature, anywhere: ours and transformers + PEFT
    python benchmarks/step.py --all --layers 64       # on a GPU: every arm that is installed
    python benchmarks/step.py --arm ours --layers 64 --profile trace.json

Each arm runs in a process of its own. First the arms' loss and LoRA gradients are compared; arms that agree are timed.
Where nothing could be compared, because transformers + PEFT are missing or fail, the table and the JSON say so.
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

from benchmarks.arms import ARMS
from benchmarks.measure import TURN_OVER, Task
from psysafe.files import write_atomic
from psysafe.program import UserError, main_guard
from psysafe.runtime import versions

RECIPE_ROW, RECIPE_PROMPT = 640, 80  # tokens of the recipe's average row, and how many of them are not trained
# Largest relative errors of loss and of a gradient, ||a - b|| / ||b||, against transformers + PEFT. bf16 rounds every
# activation at other places in every arm; there the comparison finds what is left out, not the last bits.
AGREEMENT = {"cpu": (1e-5, 1e-4), "cuda": (0.01, 0.1)}
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
        alone = {}, "--arm runs one arm alone; --all compares"
        agreement, not_compared = compare(tasks, folder, args.compare_layers) if args.all else alone
        wrong = {name: found["failed"] for name, found in agreement.items() if "failed" in found}
        results = {name: {"failed": wrong[task.arm]} for name, task in tasks.items() if task.arm in wrong}
        timed = {name: task for name, task in tasks.items() if task.arm not in wrong}
        print(f"timing {'; '.join(timed)}{', step by step in turn' if args.device == 'cpu' else ''}", flush=True)
        if args.device == "cpu":
            results |= take_turns(timed, folder)
        else:
            for name, task in timed.items():
                results[name] = run(task, folder)
                if "failed" in results[name] and args.layers > 16:
                    results[name] |= extrapolated(task, folder)
    results = {name: results[name] for name in tasks}
    add_ratios(results, args.device)
    not_run = {arm: why for arm in ARMS if args.all and (why := ARMS[arm].missing(args.device))}
    report = {"setting": setting(args), "agreement": agreement, "not compared": not_compared}
    report |= {"arms": results, "not measured": not_run}
    print_table(report)
    line = json.dumps(report)
    if args.out:
        write_atomic(Path(args.out), line + "\n")
    print(line)
    return int(any("failed" in x and "extrapolated" not in x for x in results.values()))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="step.py", description=__doc__.split("\n")[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--arm", choices=ARMS)
    which.add_argument("--all", action="store_true", help="every arm that is installed; compares before it times")
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
    if args.arm and ARMS[args.arm].missing(args.device):
        raise UserError(f"--arm {args.arm}: {ARMS[args.arm].missing(args.device)}")
    for name, least, most in (("layers", 1, 64), ("compare_layers", 1, 64), ("warmups", 0, 1000), ("steps", 1, 1000)):
        if not least <= getattr(args, name) <= most:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {least} to {most}")
    args.tokens = args.tokens or ("4x4096" if args.device == "cuda" else "4x128")
    args.lengths, args.trained = documents(args.tokens, args.labelled)
    return args


def documents(tokens: str, labelled: str) -> tuple[list[int], int]:
    """(lengths, trained tokens of each document)."""
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
    return [length] * count, min(length - 1, max(1, round(share * length)))


def entries(args: argparse.Namespace) -> list[Task]:
    """What is run: every arm with and without checkpointing; on a GPU our memory plan makes that choice."""
    tasks = []
    for arm in [args.arm] if args.arm else [arm for arm in ARMS if not ARMS[arm].missing(args.device)]:
        planned = arm == "ours" and args.device == "cuda"
        choices = {"off": [False], "on": [True], "both": [False, True]}["off" if planned else args.checkpointing]
        tasks += [
            Task(arm, on, args.device, args.layers, args.lengths, args.trained, args.warmups, args.steps, result="")
            for on in choices
        ]
    if args.profile:
        path = Path(args.profile).resolve()
        named = len(tasks) > 1
        tasks = [replace(x, profile=str(path.with_stem(f"{path.stem}-{slug(x)}") if named else path)) for x in tasks]
    return tasks


def label(task: Task) -> str:
    return task.arm + (", checkpointed" if task.checkpointing else "")


def slug(task: Task) -> str:
    return label(task).replace(", ", "-")


def run(task: Task, folder: Path) -> dict:
    """Runs an arm in its own process; {"failed": reason} if it does not come through."""
    task = replace(task, result=str(folder / f"{slug(task)}.json"))
    done = subprocess.run(command(task), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return finished(task, done.returncode, done.stderr)


def command(task: Task) -> list[str]:
    return [sys.executable, "-m", "benchmarks.measure", json.dumps(asdict(task))]


def finished(task: Task, returncode: int, stderr: str) -> dict:
    if returncode:
        return {"failed": (stderr.strip().splitlines() or [f"exit code {returncode}"])[-1][:300]}
    return json.loads(Path(task.result).read_text())


def take_turns(tasks: dict[str, Task], folder: Path) -> dict[str, dict]:
    """Every arm in its own process, one step of each after the other: what else the CPU does hits all alike."""
    turns = max((1 + task.warmups + task.steps for task in tasks.values()), default=0)  # the first one loads
    running = {}
    for name, task in tasks.items():
        task = replace(task, result=str(folder / f"{slug(task)}.json"), turns=True)
        errors = (folder / f"{slug(task)}.txt").open("w+")  # a pipe that nobody reads could fill up
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
        running[name] = task, subprocess.Popen(command(task), cwd=ROOT, **pipes), errors
    for _ in range(turns):
        for _, process, _ in running.values():
            with contextlib.suppress(BrokenPipeError):  # it has failed: `finished` says why
                process.stdin.write("go\n")
                process.stdin.flush()
                while process.stdout.readline() not in (f"{TURN_OVER}\n", ""):
                    pass  # what a library says
    results = {}
    for name, (task, process, errors) in running.items():
        process.communicate()
        errors.seek(0)
        results[name] = finished(task, process.returncode, errors.read())
        errors.close()
    return results


def compare(tasks: dict[str, Task], folder: Path, layers: int) -> tuple[dict[str, dict], str]:
    """Every arm's loss and LoRA gradients against transformers + PEFT, by arm: relative errors, the largest of all
    tensors; {"failed": reason} for one that does not agree. And why nothing was compared; "" if it was."""
    arms = {task.arm: task for task in tasks.values()}
    if ORACLE not in arms:
        return {}, f"{ORACLE}: {ARMS[ORACLE].missing(arms['ours'].device)}"
    print(f"comparing loss and LoRA gradients at {layers} layers", flush=True)
    files = {arm: folder / f"{arm}.safetensors" for arm in arms}
    found = {
        arm: run(replace(task, checkpointing=False, layers=layers, gradients=str(files[arm]), profile=""), folder)
        for arm, task in arms.items()
    }
    if "failed" in found[ORACLE]:
        return {ORACLE: found[ORACLE]}, f"{ORACLE} failed: {found[ORACLE]['failed']}"
    loss, expected = found.pop(ORACLE)["loss"], load_file(files[ORACLE])
    most = dict(zip(("loss", "gradients"), AGREEMENT[arms["ours"].device], strict=True))
    for arm, result in found.items():
        if "failed" in result:
            continue
        errors = {"loss": abs(result["loss"] - loss) / abs(loss)} | gradient_error(load_file(files[arm]), expected)
        far = [name for name, limit in most.items() if not errors[name] <= limit]
        reason = ", ".join(f"{name} by {errors[name]:.1e} (at most {most[name]:.0e})" for name in far)
        found[arm] = errors | ({"failed": f"differs from {ORACLE}: {reason}"} if far else {})
    return found, ""


def gradient_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict:
    if found.keys() != expected.keys():
        return {"gradients": float("inf"), "tensors": len(found)}
    errors = [(found[name] - x).norm() / x.norm() for name, x in expected.items()]
    return {"gradients": torch.stack(errors).max().item(), "tensors": len(expected)}  # Python's max can lose a NaN


def extrapolated(task: Task, folder: Path) -> dict:
    """A step of all layers from the slope between 8 and 16, for an arm that does not get that far."""
    few, more = (run(replace(task, layers=n, profile=""), folder) for n in (8, 16))
    if "failed" in few or "failed" in more:
        return {}
    seconds = more["seconds"] + (more["seconds"] - few["seconds"]) / 8 * (task.layers - 16)
    rate = sum(task.lengths) / seconds
    return {"extrapolated": {"seconds": seconds, "tokens_per_s": rate, "8 layers": few, "16 layers": more}}


def add_ratios(results: dict[str, dict], device: str) -> None:
    """How many times as long a peer takes, and how many times the memory. On a CPU in CPU time: busy neighbours stretch
    the clock."""
    key = "cpu_seconds" if device == "cpu" else "seconds"
    ours = results.get("ours", {})
    for x in results.values():
        spent = x.get("extrapolated", x).get(key)
        if x is not ours and spent and key in ours:
            x["time_ratio"] = spent / ours[key]
            if "peak" in x:
                x["memory_ratio"] = x["peak"] / ours["peak"]


def setting(args: argparse.Namespace) -> dict:
    cuda = args.device == "cuda"
    found = versions()
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
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
        "versions": found,
    }


def print_table(report: dict) -> None:
    it, arms = report["setting"], report["arms"]
    print(f"\n{it['device']}, {it['dtype']}, {it['model']}, {it['layers']} layers, {len(it['documents'])} documents of "
          f"{it['documents'][0]} tokens, {it['trained']} of them trained")  # fmt: skip
    print(", ".join(f"{name} {version}" for name, version in it["versions"].items() if version))
    if report["not compared"]:
        print(f"not compared: {report['not compared']}")
    for arm, error in report["agreement"].items():
        if "gradients" in error:
            found = f"loss {error['loss']:.1e}, {error['tensors']} gradients {error['gradients']:.1e}"
            print(f"{arm} against {ORACLE}, relative error: {found}")
    columns = (("ms a step", 11), ("spread", 8), ("CPU ms", 9), ("spread", 8), ("tokens/s", 10), ("MFU", 7),
               ("peak MB", 10), ("reserved", 10), ("launches", 10), ("time", 7), ("memory", 8))  # fmt: skip
    print(f"\n{'arm':<24}" + "".join(f"{name:>{width}}" for name, width in columns))
    for name, x in arms.items():
        if "extrapolated" in x:
            far = x["extrapolated"]
            print(f"{name:<24}{1e3 * far['seconds']:>11.1f}{'':>25}{far['tokens_per_s']:>10,.0f}  extrapolated from 8 "
                  f"and 16 layers; at {it['layers']}: {x['failed']}")  # fmt: skip
        elif "failed" in x:
            print(f"{name:<24}  not measured: {x['failed']}")
        else:
            row = zip(cells(x), columns, strict=True)
            print(f"{name:<24}" + "".join(f"{cell:>{width}}" for cell, (_, width) in row))
    for arm, why in report["not measured"].items():
        print(f"{arm:<24}  not measured: {why}")
    print("time, memory: how many times ours; spread: between the quartiles")
    for name, x in arms.items():
        if "profile" in x:
            print_profile(name, x["profile"])
    print(flush=True)


def cells(x: dict) -> list[str]:
    def cell(key: str, form: str, scale: float = 1.0) -> str:
        return f"{scale * x[key]:{form}}" if key in x else "-"

    return [
        *(cell(key, ".1f", 1e3) for key in ("seconds", "seconds_spread", "cpu_seconds", "cpu_seconds_spread")),
        *(cell("tokens_per_s", ",.0f"), cell("mfu", ".1%"), cell("peak", ",.0f", 1e-6), cell("reserved", ",.0f", 1e-6)),
        *(cell("launches", ","), cell("time_ratio", ".2f"), cell("memory_ratio", ".2f")),
    ]


def print_profile(name: str, kinds: dict[str, dict]) -> None:
    """The time of one step by kind of work, beside the least it could take."""
    total = sum(x["seconds"] or 0 for x in kinds.values())
    print(f"\n{name:<16}{'ms':>10}{'share':>8}{'roofline ms':>13}")
    for kind, x in sorted(kinds.items(), key=lambda item: -(item[1]["seconds"] or 0)):
        spent, least = (f"{1e3 * s:.1f}" if s is not None else "-" for s in (x["seconds"], x["roofline"]))
        print(f"{kind:<16}{spent:>10}{(x['seconds'] or 0) / total:>8.1%}{least:>13}")


if __name__ == "__main__":
    sys.exit(main_guard(main))
