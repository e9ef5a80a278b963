"""Writes kernels/proof/launches.json: every kernel that real steps of the 27B launch, for kernels.compile_check.

    python tools/write_launches.py

The steps run on paper (psysafe/training/paper/): training with and without recomputation, at ranks 1 and 2, with
adapters on all projections; with KL to the base; validation; prefill and decoding with an adapter and of the base.
tests/kernels/test_launches.py traces them again and compares.
"""

import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from kernels.paper import Variant  # noqa: E402
from psysafe.checkpoint.base import build  # noqa: E402
from psysafe.data.documents import pack  # noqa: E402
from psysafe.model.lora import attach, detach  # noqa: E402
from psysafe.model.recompute import STAGES, recompute  # noqa: E402
from psysafe.training.config import TrainConfig  # noqa: E402
from psysafe.training.dry_run import read_architecture  # noqa: E402
from psysafe.training.loss import batch_loss, contrast_losses  # noqa: E402
from psysafe.training.paper.run import META, documents_of, paper_run, trace_generation, trace_step  # noqa: E402
from psysafe.training.paper.trace import Trace, record  # noqa: E402
from psysafe.training.setup import Run, make_optimizer  # noqa: E402

FILE = ROOT / "kernels" / "proof" / "launches.json"
# One long row, the recipe's rows, rows of any length, many short ones: attention spreads its heads differently.
LONG, SHORT, RAGGED, TINY = [4096], [640] * 4, [2100, 65, 700, 1, 1230], [37] * 110
CONTRAST = [400]


def run_of(lengths: list[int], layers: int = 8, contrast: Sequence[int] = (), **settings) -> Run:
    """A step of the 27B, cut to so many layers: their kernels are those of all."""
    config = TrainConfig(dtype="bfloat16", micro_batch_tokens=sum(lengths) + sum(contrast), **settings)
    architecture, _ = read_architecture("Qwen/Qwen3.5-27B")
    architecture = replace(architecture, num_hidden_layers=layers, layer_types=architecture.layer_types[:layers])
    model = build(architecture, "meta", torch.bfloat16)
    adapters = attach(model, config.lora_rank, config.lora_alpha, config.lora_targets)
    return paper_run(config, model, adapters, make_optimizer(adapters, config), None, lengths, contrast=contrast)


def traces() -> Iterator[tuple[str, Trace]]:
    """(what runs, its trace). Only the first has all layers, on whose number the optimiser's arguments depend."""
    yield "training", trace_step(run_of(SHORT, layers=64))
    for lengths in (LONG, RAGGED, TINY):
        run = run_of(lengths)
        yield "training", without_optimizer(trace_step(run))
        for block in run.model.layers:
            recompute(block, STAGES)
        yield "recomputation", without_optimizer(trace_step(run))
    run = run_of(SHORT)
    (batch,) = pack(run.train_set.documents, sum(SHORT))
    with record(run.model) as validation, torch.no_grad():
        batch_loss(run.model, batch, META)
    yield "validation", validation
    yield "KL to the base", without_optimizer(trace_step(run_of(SHORT, contrast=CONTRAST, kl_weight=1.0)))
    (batch,) = pack(documents_of(CONTRAST, is_contrast=True).documents, sum(CONTRAST))
    with record(run.model) as validation, torch.no_grad():
        contrast_losses(run.model, batch, META)
    yield "KL validation", validation
    yield from trace_generation(run.model, SHORT, 4096).items()
    detach(run.model)
    for name, trace in trace_generation(run.model, SHORT, 4096).items():
        yield f"{name} of the base", trace
    yield "rank 2", without_optimizer(trace_step(run_of(SHORT, lora_rank=2)))
    yield "all projections", without_optimizer(trace_step(run_of(SHORT, lora_targets=["all-linear"])))


def without_optimizer(trace: Trace) -> Trace:
    trace.ops = [op for op in trace.ops if op.phase != "optimizer"]
    return trace


def launches() -> list[dict]:
    """Every variant once, in a fixed order, with what launches it and a name that tells variants of a kernel apart."""
    variants: dict[str, tuple[str, Variant, list[str]]] = {}
    for used_by, trace in traces():
        for op in trace.ops:
            if op.launch is not None:
                _, _, users = variants.setdefault(op.launch.variant.key(), (op.name, op.launch.variant, []))
                users += [used_by] if used_by not in users else []
    ordered = [variants[key] for key in sorted(variants)]
    names = [name + _distinction(variant, [v for n, v, _ in ordered if n == name]) for name, variant, _ in ordered]
    fields = ("kernel", "types", "constants", "options")
    return [
        {"name": name, **{field: getattr(variant, field) for field in fields}, "used": used}
        for name, (_, variant, used) in zip(names, ordered, strict=True)
    ]


def _distinction(variant: Variant, group: list[Variant]) -> str:
    """What this variant of a kernel has and others have not: ", J 2, no p_dy"."""

    def given(v: Variant, argument: str) -> str:
        value = v.constants.get(argument, v.types.get(argument))
        if argument.startswith(("p_", "desc_")):
            return f"no {argument}" if value is None else f"{argument} {str(value).removesuffix(':16')}"
        return f"{argument} {value}"

    arguments = [*variant.types, *variant.constants]
    differing = [a for a in sorted(arguments) if len({given(v, a) for v in group}) > 1]
    # Arguments that are absent together need one name.
    shown, seen = [], set()
    for a in differing:
        pattern = tuple(given(v, a) == given(variant, a) for v in group)
        if pattern not in seen:
            seen.add(pattern)
            shown.append(given(variant, a))
    return "".join(f", {text}" for text in shown)


def text() -> str:
    lines = ",\n".join(f" {json.dumps(launch)}" for launch in launches())
    return f"[\n{lines}\n]\n"


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="Anomaly Detection")
    FILE.write_text(text())
    print(f"{len(json.loads(FILE.read_text()))} kernels in {FILE.relative_to(ROOT)}")
