"""One optimiser step of the recipe, ours and the peers': the same weights, adapters and tokens in every arm.

    python benchmarks/step.py --device cpu --all      # the race in miniature, anywhere: ours and transformers + PEFT
    python benchmarks/step.py --all --layers 16       # on a GPU: every arm that is installed
    python benchmarks/step.py --arm ours --layers 64 --profile trace.json

Each arm runs in a process of its own. First the arms' loss and LoRA gradients are compared, then steps are timed. The
last line on stdout is one JSON document. Method and results: benchmarks/README.md.
"""

# ruff: noqa: E402  (the repository's root has to be on the path first)
import argparse
import importlib
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from safetensors.torch import load_file, save_file

from kernels.closeness import relative_error
from psysafe.lora import read_json
from psysafe.model_config import ModelConfig
from psysafe.roofline import SPEEDS, context, flops_per_token, step_seconds
from psysafe.runtime import PEAKS, Moment, memory_peak, versions

ARCHITECTURE = ROOT / "configs" / "qwen3.5-27b-architecture.json"
NEEDS = {  # the packages of every arm, and the device it is for
    "ours": (),
    "hf-peft": ("transformers", "peft"),
    "trl-liger": ("transformers", "peft", "trl", "liger_kernel"),
    "unsloth": ("unsloth",),
}
ON_CPU = ("ours", "hf-peft")
# The CPU's model: every part of the 27B, its ratios of heads, its MLP's 3.4, its share of attention layers.
SMALL = {
    **{"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 896, "head_dim": 64, "num_attention_heads": 6},
    **{"num_key_value_heads": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_conv_kernel_dim": 4},
    **{"linear_key_head_dim": 64, "linear_value_head_dim": 64, "tie_word_embeddings": False, "rms_norm_eps": 1e-3},
    "initializer_range": 0.05,
    "rope_parameters": {
        **{"rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.25},
        **{"mrope_section": [4, 2, 2], "mrope_interleaved": True},
    },
}
RECIPE_ROW, RECIPE_PROMPT = 640, 80  # tokens of the recipe's average row, and how many of them are not trained


def main() -> int:
    args = parse()
    if args.result:
        child(args)
        return 0
    arms = [args.arm] if args.arm else [arm for arm in NEEDS if not missing(arm, args.device)]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        if len(arms) > 1:
            print(f"comparing loss and LoRA gradients at {args.compare_layers} layers", flush=True)
            compared = {arm: run_arm(args, arm, Path(folder), compare=True) for arm in arms}
            agreement = agree(compared, Path(folder))
        else:
            agreement = {}
        for arm in arms:
            print(f"timing {arm}", flush=True)
            results[arm] = run_arm(args, arm, Path(folder), compare=False)
    left_out = {arm: missing(arm, args.device) for arm in NEEDS if arm not in arms and not args.arm}
    report = {"setting": setting(args), "agreement": agreement, "arms": results, "not run": left_out}
    print_table(report)
    print(json.dumps(report))
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arm", choices=NEEDS)
    parser.add_argument("--all", action="store_true", help="every arm that is installed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, help="of the 27B's 64; on the CPU of the small model (8)")
    parser.add_argument("--compare-layers", type=int, default=8, help="layers for comparing gradients (8)")
    parser.add_argument("--tokens", help="NxLENGTH or recipe (4x640); 4x4096 on a GPU, 4x128 on a CPU")
    parser.add_argument("--labelled", default="recipe", help="share of trained tokens, or recipe (all but 80 of 640)")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=None,
                        help="of the peers; without the flag: on a GPU on, on a CPU off")  # fmt: skip
    parser.add_argument("--warmups", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profile", metavar="FILE", help="write a Chrome trace and print a table by kind of kernel")
    parser.add_argument("--out", metavar="FILE", help="also write the JSON document there")
    parser.add_argument("--result", help=argparse.SUPPRESS)
    parser.add_argument("--gradients", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not (args.arm or args.all):
        parser.error("give --arm NAME or --all")
    if args.arm and missing(args.arm, args.device):
        parser.error(f"{args.arm}: {missing(args.arm, args.device)}")
    cuda = args.device == "cuda"
    args.layers = args.layers or 8
    args.tokens = args.tokens or ("4x4096" if cuda else "4x128")
    args.checkpointing = cuda if args.checkpointing is None else args.checkpointing
    return args


def missing(arm: str, device: str) -> str:
    """Why an arm cannot run here; "" if it can."""
    if device == "cpu" and arm not in ON_CPU:
        return "needs a GPU"
    absent = [name for name in NEEDS[arm] if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def setting(args: argparse.Namespace) -> dict:
    lengths, trained = documents(args)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        **{"device": name, "machine": platform.machine(), "layers": args.layers, "documents": lengths},
        **{"trained": trained, "dtype": "bfloat16" if args.device == "cuda" else "float32", "versions": versions()},
        **{"steps": args.steps, "warmups": args.warmups, "checkpointing of peers": args.checkpointing},
    }


def documents(args: argparse.Namespace) -> tuple[list[int], int]:
    """(lengths, trained tokens of each document)."""
    count, length = (4, RECIPE_ROW) if args.tokens == "recipe" else map(int, args.tokens.split("x"))
    share = 1 - RECIPE_PROMPT / RECIPE_ROW if args.labelled == "recipe" else float(args.labelled)
    return [length] * count, min(length - 1, max(1, round(share * length)))


def run_arm(args: argparse.Namespace, arm: str, folder: Path, compare: bool) -> dict:
    """Runs an arm in its own process; {"failed": reason} if it does not come through."""
    result = folder / f"{arm}.json"
    command = [sys.executable, __file__, "--arm", arm, "--device", args.device, "--tokens", args.tokens]
    command += ["--labelled", args.labelled, "--result", str(result), "--steps", str(args.steps)]
    command += ["--warmups", str(args.warmups), "--layers", str(args.compare_layers if compare else args.layers)]
    command += ["--checkpointing" if args.checkpointing else "--no-checkpointing"]
    command += ["--gradients", str(folder / f"{arm}.safetensors")] if compare else []
    command += ["--profile", args.profile] if args.profile and not compare else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]}
    if args.profile and not compare:
        print(done.stdout)
    return json.loads(result.read_text())


def agree(compared: dict[str, dict], folder: Path) -> dict:
    """Every arm's loss and LoRA gradients against transformers + PEFT: relative error, the largest over all tensors."""
    if "failed" in compared.get("hf-peft", {"failed": ""}):
        return {"not compared": compared.get("hf-peft", {}).get("failed", "hf-peft did not run")}
    expected, found = load_file(folder / "hf-peft.safetensors"), {}
    for arm, result in compared.items():
        if arm == "hf-peft" or "failed" in result:
            continue
        tensors = load_file(folder / f"{arm}.safetensors")
        assert tensors.keys() == expected.keys(), f"{arm} trains other tensors"
        loss = abs(result["loss"] - compared["hf-peft"]["loss"]) / compared["hf-peft"]["loss"]
        worst = max(relative_error(tensors[name], expected[name]) for name in expected)
        found[arm] = {"loss": loss, "gradients": worst, "tensors": len(expected)}
    return found


def print_table(report: dict) -> None:
    settings, arms = report["setting"], report["arms"]
    print(f"\n{settings['device']}, {settings['dtype']}, {settings['layers']} layers, "
          f"documents {settings['documents']}, {settings['trained']} trained tokens each")  # fmt: skip
    for arm, error in report["agreement"].items():
        if isinstance(error, dict):
            found = f"loss {error['loss']:.1e}, {error['tensors']} gradients {error['gradients']:.1e}"
            print(f"{arm} against hf-peft, relative error: {found}")
    columns = f"{'ms a step':>11}{'spread':>9}{'CPU ms':>9}{'tokens/s':>10}{'MFU':>7}{'peak MB':>10}{'launches':>10}"
    print(f"\n{'arm':<12}{columns}")
    for arm, x in arms.items():
        if "failed" in x:
            print(f"{arm:<12}failed: {x['failed']}")
            continue
        mfu, launches = (f"{x[key]:{form}}" if key in x else "-" for key, form in (("mfu", ".1%"), ("launches", ",")))
        print(f"{arm:<12}{1e3 * x['seconds']:>11.1f}{1e3 * x['spread']:>9.1f}{1e3 * x['cpu_seconds']:>9.1f}"
              f"{x['tokens_per_s']:>10,.0f}{mfu:>7}{x['peak'] / 1e6:>10,.0f}{launches:>10}")  # fmt: skip
    for arm, why in report["not run"].items():
        print(f"{arm:<12}not measured ({why})")
    ours = arms.get("ours", {})
    for arm, x in arms.items():
        if arm != "ours" and "seconds" in x and "seconds" in ours:
            # Busy neighbours stretch wall time on a CPU, so that there the ratio is that of CPU time.
            key = "cpu_seconds" if settings["device"].startswith("CPU") else "seconds"
            x["ratio"], x["memory_ratio"] = x[key] / ours[key], x["peak"] / ours["peak"]
            print(f"\nours is {x['ratio']:.2f} x as fast as {arm}, which needs {x['memory_ratio']:.2f} x the memory")
    print(flush=True)


# What runs in an arm's own process.


def child(args: argparse.Namespace) -> None:
    from benchmarks.arms import ARMS, CAP

    device = torch.device(args.device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / total))
    layers = (["linear_attention"] * 3 + ["full_attention"]) * -(-args.layers // 4)
    text = dict(SMALL) if device.type == "cpu" else read_json(ARCHITECTURE)
    text |= {"num_hidden_layers": args.layers, "layer_types": layers[: args.layers]}
    lengths, trained = documents(args)
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, text["vocab_size"], (n,), generator=generator) for n in lengths]
    arm = ARMS[args.arm](text, tokens, trained, device, args.checkpointing)
    for package in NEEDS[args.arm]:
        importlib.import_module(package)  # what a package weighs by itself is not the step's memory
    before = 0 if device.type == "cuda" else resident()
    arm.load()
    if args.gradients:
        result = {"loss": arm.backward().item()}
        save_file({name: g.float().cpu().contiguous() for name, g in arm.gradients().items()}, args.gradients)
    else:
        result = timed(arm, args, device) | {"peak": memory_peak(device) - before}
        result["tokens_per_s"] = sum(lengths) / result["seconds"]
        if device.type == "cuda":
            result["reserved"] = torch.cuda.max_memory_reserved(device)
            peak = PEAKS.get(torch.cuda.get_device_name(device))
            useful = flops_per_token(ModelConfig.from_dict(text), context(lengths), trained / lengths[0])
            result |= {"mfu": result["tokens_per_s"] * useful / peak.flops} if peak else {}
            result["launches"] = launches(arm)
        if args.profile:
            profile(arm, args.profile, device, text, lengths, trained)
    Path(args.result).write_text(json.dumps(result))


def resident() -> int:
    """Bytes of resident memory now."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024


def timed(arm, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Medians over the steps after the warm-ups: by CUDA events or the clock, and the process's CPU time."""
    for _ in range(args.warmups):
        arm.step()
    seconds, cpu = [], []
    for _ in range(args.steps):
        start, busy = Moment(device), time.process_time()
        arm.step()
        end = Moment(device)
        seconds.append(end.since(start))
        cpu.append(time.process_time() - busy)
    spread = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return {
        "seconds": statistics.median(seconds),
        "spread": spread[2] - spread[0],
        "cpu_seconds": statistics.median(cpu),
    }


def launches(arm) -> int:
    """Kernels that one step launches."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        arm.step()
    return sum("aunchKernel" in event.name for event in trace.events())


def profile(arm, path: str, device: torch.device, text: dict, lengths: list[int], trained: int) -> None:
    """One step: a Chrome trace in `path`, and where the time went, beside the least it could take."""
    import kernels

    for name in kernels.OPS:  # names for what happens inside an op, also in the references
        op = getattr(kernels, name)
        setattr(kernels, name, lambda *x, _op=op, _name=name, **k: _scoped(_op, _name, x, k))
    with torch.profiler.profile() as trace:
        start = time.perf_counter()
        arm.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        wall = time.perf_counter() - start
    trace.export_chrome_trace(path)
    spent = by_kind(trace.events(), device.type == "cuda")
    spent["idle"] = max(0.0, wall - sum(spent.values()))
    config = ModelConfig.from_dict(text)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    speed = next((speed for gpu, speed in SPEEDS.items() if gpu in name), None)
    share = trained / lengths[0]
    least = step_seconds(config, sum(lengths), context(lengths), share, speed) if speed else {}
    print(f"{'kind':<14}{'ms':>10}{'share':>8}{'roofline ms':>13}   ({path})")
    for kind, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        roof = f"{1e3 * least[kind]:.1f}" if kind in least else "-"
        print(f"{kind:<14}{1e3 * seconds:>10.1f}{seconds / wall:>8.1%}{roof:>13}")


def _scoped(op, name: str, args: tuple, kwargs: dict):
    with torch.profiler.record_function(f"op:{name}"):
        return op(*args, **kwargs)


OP_KINDS = {
    **{"causal_attention": "attention", "gated_delta_rule": "delta rule", "linear_cross_entropy": "loss"},
    "adamw_8bit": "optimiser",
}
GEMMS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::linear", "aten::matmul")


def by_kind(events, cuda: bool) -> dict[str, float]:
    """Seconds by kind of work. An event belongs to the op that encloses it; a backward node to that of its forward."""

    def scope(event) -> str:
        while event is not None:
            if event.name.startswith("op:"):
                return event.name[3:]
            if event.name.startswith(("optimiser", "Optimizer")):
                return "adamw_8bit"
            if "Backward" in event.name and forward.get(event.sequence_nr):
                return forward[event.sequence_nr]
            event = event.cpu_parent
        return ""

    forward: dict[int, str] = {}
    for event in events:
        if event.sequence_nr >= 0 and "Backward" not in event.name:
            found = scope(event)
            if found:
                forward[event.sequence_nr] = found
    spent: Counter = Counter()
    for event in events:
        # A GEMM inside the loss is the head's; those inside attention and the delta rule are theirs.
        seconds = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        if cuda and event.device_type != torch.autograd.DeviceType.CPU:
            continue  # counted with the operation that launched it
        kind = OP_KINDS.get(scope(event), "elementwise")
        if event.name in GEMMS and kind in ("elementwise", "loss"):
            kind = "GEMM"
        spent[kind] += seconds
    return dict(spent)


if __name__ == "__main__":
    sys.exit(main())
