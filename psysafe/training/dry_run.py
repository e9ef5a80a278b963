"""The summary of a run, printed before its first step; and the dry run, which prints it without reading weights.

    train.py --config configs/qwen3.5-27b.toml --dry-run

needs no GPU: the model has shapes but no memory (torch's meta device). Where there is no GPU, the plan is made for an
80 GB H100; where the rows cannot be read, the recipe's own numbers are taken. Every assumption is printed.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

import kernels
from psysafe.checkpoint.base import build, check_embedding
from psysafe.data.documents import Dataset, steps_per_epoch
from psysafe.files import expand, read_json
from psysafe.hub import HubError, did_you_mean, fetch_file
from psysafe.model.config import ModelConfig
from psysafe.model.decoder import Qwen3_5
from psysafe.model.lora import Adapters, attach
from psysafe.model.shard import check_ranks
from psysafe.printable import counted
from psysafe.program import UserError
from psysafe.runtime import Runtime
from psysafe.training.config import TrainConfig
from psysafe.training.memory_plan import RESERVE, Plan, Sizes
from psysafe.training.optim import AdamW, cosine_schedule
from psysafe.training.paper.rates import PaperGPU
from psysafe.training.paper.run import CUBLAS_WORKSPACE, paper_run, trace_step
from psysafe.training.roofline import SPEEDS, flops_per_token, step_seconds
from psysafe.training.setup import (
    DataSets,
    RowCounts,
    Run,
    assumes_gpu,
    count_steps,
    load_data,
    make_optimizer,
    make_plan,
    nbytes,
)

ARCHITECTURES = Path(__file__).resolve().parents[2] / "configs"
NEXT_LINE = "\n" + " " * 22  # of a text of several lines, under its first (run_log.print_run)


def run_summary(run: Run) -> dict[str, str]:
    """Label -> text of a run that is about to start, for `print_run`."""
    runtime = run.runtime
    rows = _rows_of(run.config, DataSets(run.train_set, run.val_set, run.contrast_set, run.contrast_val_set))
    return {
        "device": f"{runtime.world_size} x {runtime.device_name}, {run.config.dtype}",
        "kernels": kernels.describe(runtime.device, run.model.config.head_dim),
        **_model_summary(run.model, run.adapters, run.optimizer),
        **_rows_summary(run.config, rows),
        **_memory_summary(run.config, rows.mixed, run.plan),
    }


def dry_run(config: TrainConfig, runtime: Runtime) -> dict[str, str]:
    """Label -> text of a run that is not started, for `print_run`: the same summary, without weights."""
    if config.shard:
        check_ranks(runtime.world_size)
    architecture, file = read_architecture(config.model)
    check_embedding(architecture, config.model, config.embedding)
    # The type does not matter yet: only parameters are counted. Which one the run would use follows from its device.
    assumed = runtime.device.type != "cuda" and assumes_gpu(config, build(architecture, "meta", torch.bfloat16))
    if config.dtype == "auto":
        config = replace(config, dtype="bfloat16" if assumed else str(runtime.dtype).removeprefix("torch."))
    model = build(architecture, "meta", getattr(torch, config.dtype))
    adapters = attach(model, config.lora_rank, config.lora_alpha, config.lora_targets, config.seed)
    optimizer = make_optimizer(adapters, config)
    rows = _readable_rows(config)
    plan = make_plan(config, model, adapters, optimizer, runtime)
    device = "H100 80GB (assumed: there is no GPU here)" if assumed else runtime.device_name
    return {
        "dry run": f"no weights are read; architecture from {_relative(file)}",
        "device": f"{runtime.world_size} x {device}, {config.dtype}",
        "kernels": "Triton (assumed)" if assumed else kernels.describe(runtime.device, architecture.head_dim),
        **_model_summary(model, adapters, optimizer),
        **_rows_summary(config, rows),
        **_memory_summary(config, rows.mixed, plan),
        **(_paper_summary(config, rows.mixed, model, adapters, optimizer, plan) if plan else {}),
    }


def _paper_summary(
    config: TrainConfig, rows: RowCounts, model: Qwen3_5, adapters: Adapters, optimizer: AdamW, plan: Plan
) -> dict[str, str]:
    """The largest micro-batch, executed on paper: the memory that it needs and where, kernels, time."""
    if not kernels.HAS_TRITON:
        return {"on paper": "not traced: Triton is not installed"}
    tokens = _max_tokens(config, rows)
    run = paper_run(replace(config, micro_batch_tokens=tokens), model, adapters, optimizer, plan, [tokens])
    try:
        trace = trace_step(run)
    except ValueError as error:  # of a kernel: what it does not take
        return {"on paper": f"not traced: {error}"}
    peak = plan.fixed + CUBLAS_WORKSPACE + trace.peak - trace.fixed  # the model here is whole, and on one device
    whole = PaperGPU("H100", tokens).total(trace.ops)[""]
    lines = [
        f"one row of {tokens:,} tokens: simulated peak {peak / 1e9:.2f} GB, at {trace.peak_name}, {trace.peak_where}",
        f"{whole.ops:,} kernels and copies, {whole.launches:,} of them Triton's; {1e3 * whole.seconds:,.0f} ms on one "
        "H100, computed and not measured; python -m psysafe.paper shows it in parts",
    ]
    return {"on paper": NEXT_LINE.join(lines)}


def _model_summary(model: Qwen3_5, adapters: Adapters, optimizer: AdamW) -> dict[str, str]:
    weights = [p for name, p in model.named_parameters() if ".adapter." not in name]
    state = nbytes(*optimizer.state_tensors().values())
    return {
        "model": f"{sum(p.numel() for p in weights):,} frozen parameters, {_size(nbytes(*weights))}",
        "adapter": f"{adapters.count:,} parameters in {len(adapters.segments)} tensors, "
        f"{_size(nbytes(adapters.param))}; optimiser state {_size(state)}",
    }


class Rows(NamedTuple):
    """The rows of a run, for its summary. validation: label -> text. mixed: both kinds, in the ratio of a step."""

    training: RowCounts
    contrast: RowCounts | None
    validation: dict[str, str]
    mixed: RowCounts


def _rows_of(config: TrainConfig, data: DataSets) -> Rows:
    training, contrast = RowCounts.of(data.train), RowCounts.of(data.contrast) if data.contrast else None
    validation = {"validation rows": _validation_summary(config, data.val, config.val_data, "training rows")}
    if data.contrast or data.contrast_val:
        summary = _validation_summary(config, data.contrast_val, config.contrast_val_data, "contrast rows")
        validation["contrast validation"] = summary
    return Rows(training, contrast, validation, training.with_contrast(contrast, config) if contrast else training)


def _rows_summary(config: TrainConfig, rows: Rows) -> dict[str, str]:
    n_rows, tokens = rows.training.rows, rows.mixed.tokens
    steps, per_epoch = count_steps(config, n_rows), steps_per_epoch(n_rows, config.batch_size)
    documents = f"{config.batch_size} documents"
    if rows.contrast:
        documents = f"{config.batch_size} training and {config.contrast_ratio * config.batch_size:g} contrast documents"
    return {
        "training rows": rows.training.summary,
        **_contrast_summary(config, rows, steps / per_epoch),
        **rows.validation,
        "steps": f"{documents}, about {_step_tokens(config, rows.mixed):,.0f} tokens each; "
        f"{per_epoch:,} an epoch, {steps:,} in all, {tokens * steps / per_epoch:,.0f} tokens"
        + ("; --max-steps counts, not --epochs" if config.max_steps else ""),
        **_warm_up_warning(config, steps),
    }


def _contrast_summary(config: TrainConfig, rows: Rows, epochs: float) -> dict[str, str]:
    """The contrast rows, how often each is trained, and the tokens that they add."""
    if rows.contrast is None:
        return {}
    passes = config.contrast_ratio * rows.training.rows * epochs / rows.contrast.rows
    more = rows.mixed.tokens / rows.training.tokens - 1
    how = f"{config.contrast_ratio:g} for each training row; a row is trained {passes:.1f} times; {more:+.1%} tokens"
    how += f"; KL to the base, weight {config.kl_weight:g}, for which it reads them too" if config.kl_weight else ""
    return {"contrast rows": f"{rows.contrast.summary}; {how}"}


def _validation_summary(config: TrainConfig, data: Dataset | None, files: list[str], apart_from: str) -> str:
    """What validates, and where it comes from."""
    if data is None:
        return "none (val_fraction is 0)"
    if files:
        return data.summary()
    return f"{data.summary()}; set apart from the {apart_from} (val_fraction {config.val_fraction:g})"


def _warm_up_warning(config: TrainConfig, steps: int) -> dict[str, str]:
    """A word about a run that ends before the learning rate has reached its peak."""
    if steps > config.warmup_steps:
        return {}
    largest = max(cosine_schedule(step, steps, config.warmup_steps, config.lr) for step in range(steps))
    what = f"a run of {counted(steps, 'step')} is not longer than --warmup-steps {config.warmup_steps:,}: "
    what += f"the learning rate never reaches --lr {config.lr:g}, at most {largest:.3g}"
    return {"warning": what + ("; the run learns nothing" if largest == 0 else "")}


def _memory_summary(config: TrainConfig, rows: RowCounts, plan: Plan | None) -> dict[str, str]:
    """The plan's peak for the largest and for the usual micro-batch, and the predicted time; nothing without a plan."""
    if plan is None:
        return {}
    max_tokens = _max_tokens(config, rows)
    base_rows = math.ceil(rows.base / rows.rows * config.batch_size)
    # Of a document of the largest size all rows can be compared with the base's.
    largest = Sizes.largest(max_tokens, _max_documents(config), max_tokens if base_rows else 0)
    usual = Sizes.largest(min(max_tokens, round(_step_tokens(config, rows))), _max_documents(config), base_rows)
    summary = {"memory": NEXT_LINE.join(plan.describe(largest))}
    if usual.tokens < max_tokens:
        summary["usual micro-batch"] = NEXT_LINE.join(plan.describe(usual))
    return summary | _predictions(config, rows, plan, usual, largest)


def _predictions(config: TrainConfig, rows: RowCounts, plan: Plan, usual: Sizes, largest: Sizes) -> dict[str, str]:
    """The time of a step and of the run on the GPUs whose speed is known. Computed from the roofline, not measured."""
    steps, tokens = count_steps(config, rows.rows), _step_tokens(config, rows)
    trained, base = rows.trained / rows.tokens, rows.base / rows.tokens
    summary = {"useful work": f"{flops_per_token(plan.config, rows.context, trained, base) / 1e9:.1f} GFLOP a token"}
    for name, speed in SPEEDS.items():
        gpu_plan = plan if config.memory_limit else replace(plan, limit=speed.memory - RESERVE)
        # Seconds a token that recomputation costs.
        recompute, recompute_largest = (gpu_plan.choose(sizes).seconds / sizes.tokens for sizes in (usual, largest))
        step = sum(step_seconds(plan.config, tokens, rows.context, trained, speed, recompute, base).values())
        full_tokens = 4 * largest.tokens
        full = sum(step_seconds(plan.config, full_tokens, largest.tokens, 1.0, speed, recompute_largest).values())
        summary[f"on one {name}"] = (
            f"at best {step:.2f} s a step, {step * steps / 3600:.1f} hours in all; 4 x {largest.tokens:,} tokens "
            f"{full:.2f} s, {full_tokens / full:,.0f} tokens/s (computed from the roofline, not measured)"
        )
    return summary


def _max_tokens(config: TrainConfig, rows: RowCounts) -> int:
    """Of a micro-batch: a row longer than the limit stands alone, and there are no more than the step's documents."""
    return min(max(config.micro_batch_tokens, rows.longest), _max_documents(config) * rows.longest)


def _max_documents(config: TrainConfig) -> int:
    """Of a step."""
    return config.batch_size + math.ceil(config.contrast_ratio * config.batch_size)


def _step_tokens(config: TrainConfig, rows: RowCounts) -> float:
    """Tokens of a step on average, without the last short one of an epoch."""
    return rows.tokens / rows.rows * config.batch_size


def read_architecture(source: str) -> tuple[ModelConfig, Path]:
    """(architecture, its file) of a folder, of random:CONFIG.json, or of a hub id.

    For a hub id the committed copy, configs/NAME-architecture.json, is taken if there is one, else the hub is asked.
    """
    path = Path(expand(source.removeprefix("random:"))).expanduser()
    if path.is_dir():
        path = path / "config.json"
    elif not source.startswith("random:"):
        path = ARCHITECTURES / f"{source.rpartition('/')[2].lower()}-architecture.json"
        if not path.is_file():
            path = _from_hub(source)
    return ModelConfig.from_dict(read_json(path), path), path


def _from_hub(source: str) -> Path:
    try:
        return fetch_file(source, "config.json")
    except HubError as error:
        raise UserError(
            f"{source}: no such folder, no architecture of that name in {ARCHITECTURES}, and the hub did not give its "
            f"config.json{did_you_mean(source, error)}"
        ) from None


def _readable_rows(config: TrainConfig) -> Rows:
    """The rows if they and a tokenizer lie here; else the recipe's own numbers."""
    folder = Path(expand(config.model.removeprefix("random:"))).expanduser()
    folder = folder.parent if config.model.startswith("random:") else folder
    contrast = config.contrast_data if config.contrast_ratio else []
    paths = *config.data, *config.val_data, *contrast, *config.contrast_val_data
    files = [Path(expand(path)) for path in paths]
    absent = [path for path in (*files, folder / "tokenizer.json") if not path.is_file()]
    if config.data and not absent:
        return _rows_of(config, load_data(config, folder))
    why = f"no file {absent[0]} here" if absent else "no --data"
    # The recipe's own rows are not bundled.
    training = _assumed(config, 7_019, 640, f"as the recipe describes its own ({why})")
    contrast = _assumed(config, 1_500, 400, "short answers of the base") if config.contrast_ratio else None
    mixed = training.with_contrast(contrast, config) if contrast else training
    return Rows(training, contrast, {"validation rows": "not read"}, mixed)


def _assumed(config: TrainConfig, rows: int, length: int, why: str) -> RowCounts:
    """So many rows of one length, of which 80 tokens are not trained."""
    summary = f"assumed: {rows:,} rows of {length} tokens, {why}"
    return RowCounts(rows, rows * length, rows * (length - 80), config.max_tokens, length, summary)


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count > 1e8 else f"{count / 1e6:.2f} MB"
