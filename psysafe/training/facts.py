"""What follows from a run's settings, told before its first step; and the dry run, which tells it without weights.

    train.py --config configs/qwen3.5-27b.toml --dry-run

reads no weights and needs no GPU: the model stands on tensors without memory, the plan is made for an 80 GB H100 where
there is no GPU, and the rows are taken from the recipe's description where they cannot be read. What was assumed is
said.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

import kernels
from psysafe.checkpoint.base import build
from psysafe.data.documents import Dataset, encode_rows, split_rows, steps_per_epoch
from psysafe.data.prompts import system_text
from psysafe.data.rows import read_rows
from psysafe.data.tokenizer import load_tokenizer
from psysafe.files import expand, read_json
from psysafe.hub import HubError, fetch_file
from psysafe.model.config import ModelConfig
from psysafe.model.decoder import Qwen3_5
from psysafe.model.lora import Adapters, adapter_shape, attach, load_adapter
from psysafe.model.shard import GATHERED, check_ranks
from psysafe.program import UserError
from psysafe.runtime import Runtime, memory_total
from psysafe.training.config import TrainConfig
from psysafe.training.memory_plan import H100_MEMORY, RESERVE, Plan, Sizes
from psysafe.training.optim import AdamW
from psysafe.training.roofline import SPEEDS, context, flops_per_token, step_seconds

ARCHITECTURES = Path(__file__).resolve().parents[2] / "configs"


class Rows(NamedTuple):
    """What the arithmetic of a run needs to know of its training rows."""

    count: int
    tokens: int
    trained: int
    longest: int
    context: float  # mean length of the row that a token lies in
    summary: str

    @staticmethod
    def of(data: Dataset) -> "Rows":
        lengths = [len(document) for document in data.documents]
        return Rows(len(data), data.n_tokens, data.n_targets, max(lengths), context(lengths), data.summary())

    @staticmethod
    def published(max_tokens: int, why: str) -> "Rows":
        """The recipe's own rows, which are not bundled: 7,019 of about 640 tokens, of which 80 are not trained."""
        n, length = 7_019, 640
        summary = f"assumed: {n:,} rows of {length} tokens, as the recipe describes its own ({why})"
        return Rows(n, n * length, n * (length - 80), max_tokens, length, summary)


def load_data(config: TrainConfig, folder: Path) -> tuple[Dataset, Dataset | None]:
    """Training and validation documents; without validation files a share of the training rows is set apart."""
    if not config.data:
        raise UserError("no training rows: give --data FILE, or data = [...] in the config file")
    tokenizer, system = load_tokenizer(folder), system_text(config.system)
    rows, val_rows = read_rows([expand(path) for path in config.data]), []
    if config.val_data:
        val_rows = read_rows([expand(path) for path in config.val_data])
    elif config.val_fraction:
        rows, val_rows = split_rows(rows, seed=config.seed, fraction=config.val_fraction)
    train_set = encode_rows(rows, tokenizer, config.max_tokens, system)
    return train_set, encode_rows(val_rows, tokenizer, config.max_tokens, system) if val_rows else None


def attach_adapters(model: Qwen3_5, config: TrainConfig) -> Adapters:
    if config.adapter_init:
        return load_adapter(model, expand(config.adapter_init))
    return attach(model, config.lora_rank, config.lora_alpha, config.lora_targets, config.seed)


def adapted(config: TrainConfig) -> TrainConfig:
    """An adapter given by --adapter-init brings its own shape; the run is recorded with it."""
    if not config.adapter_init:
        return config
    rank, alpha, targets = adapter_shape(expand(config.adapter_init))
    return replace(config, lora_rank=rank, lora_alpha=alpha, lora_targets=targets)


def make_optimizer(adapters: Adapters, config: TrainConfig) -> AdamW:
    return AdamW(
        adapters.param,
        adapters.grad,
        adapters.segments,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        min_8bit_size=config.min_8bit_size,
        state_bits=8 if config.optimizer == "adamw8bit" else 32,
    )


def make_plan(
    config: TrainConfig, model: Qwen3_5, adapters: Adapters, optimizer: AdamW, runtime: Runtime
) -> Plan | None:
    """The memory plan for a GPU (in a dry run on another device: for an H100); None where there is nothing to plan."""
    device = runtime.device
    total = memory_total(device) if device.type == "cuda" else H100_MEMORY
    if device.type != "cuda" and not assumes_gpu(config, model):
        if config.memory_limit:
            raise UserError(f"--memory-limit plans a GPU's memory, this run is on {device.type}; leave the flag out")
        return None
    total = min(total, round(config.memory_limit * 1e9)) if config.memory_limit else total
    weights = [p for p in model.parameters() if p is not model.embed_tokens or config.embedding == "gpu"]
    fixed = nbytes(*weights, adapters.grad, *optimizer.state_tensors().values())
    if config.shard:
        blocks = [nbytes(*(p for p in block.parameters() if not p.requires_grad)) for block in model.layers]
        fixed -= sum(blocks) - sum(blocks) // runtime.world_size - GATHERED * max(blocks)
    element = model.norm.element_size()
    return Plan(model.config, adapters.targets, adapters.rank, total - RESERVE, fixed, element)


def assumes_gpu(config: TrainConfig, model: Qwen3_5) -> bool:
    """Whether a dry run without a GPU is told for one: nobody trains a billion parameters on a CPU."""
    return config.dry_run and config.device == "auto" and sum(p.numel() for p in model.parameters()) > 1e9


def facts(
    config: TrainConfig,
    model: Qwen3_5,
    adapters: Adapters,
    optimizer: AdamW,
    rows: Rows,
    validation: str,
    plan: Plan | None,
    device: str,
    live_kernels: str,
) -> dict[str, str]:
    """Label -> text, for print_run."""
    weights = [p for name, p in model.named_parameters() if ".adapter." not in name]
    per_step = rows.tokens / rows.count * config.batch_size
    per_epoch = steps_per_epoch(rows.count, config.batch_size)
    steps = config.max_steps or config.epochs * per_epoch
    total = rows.tokens * steps / per_epoch
    told = {
        "device": f"{device}, {config.dtype}",
        "kernels": live_kernels,
        "model": f"{sum(p.numel() for p in weights):,} frozen parameters, {_size(nbytes(*weights))}",
        "adapter": f"{adapters.count:,} parameters in {len(adapters.segments)} tensors, "
        f"{_size(nbytes(adapters.param))}; optimiser state {_size(nbytes(*optimizer.state_tensors().values()))}",
        "training rows": rows.summary,
        "validation rows": validation,
        "steps": f"{config.batch_size} documents, about {per_step:,.0f} tokens each; {per_epoch:,} an epoch, "
        f"{steps:,} in all, {total:,.0f} tokens",
    }
    if plan is None:
        return told
    # A longer row stands alone; a step has no more than its documents.
    most = min(max(config.micro_batch_tokens, rows.longest), config.batch_size * rows.longest)
    largest = Sizes.largest(most, config.batch_size)
    told["memory"] = ("\n" + " " * 22).join(plan.describe(largest))
    usual = Sizes.largest(min(most, round(per_step)), config.batch_size)
    if usual.tokens < most:
        told["usual micro-batch"] = ("\n" + " " * 22).join(plan.describe(usual))
    return told | predictions(config, plan, rows, usual, largest, steps)


def predictions(
    config: TrainConfig, plan: Plan, rows: Rows, usual: Sizes, largest: Sizes, steps: int
) -> dict[str, str]:
    """The time of a step and of the run on the GPUs whose speed is known. Computed from the roofline, not measured."""
    share, per_step = rows.trained / rows.tokens, rows.tokens / rows.count * config.batch_size
    told = {"useful work": f"{flops_per_token(plan.config, rows.context, share) / 1e9:.1f} GFLOP a token"}
    for name, speed in SPEEDS.items():
        here = plan if config.memory_limit else replace(plan, limit=speed.memory - RESERVE)
        again, again_largest = (here.choose(sizes).seconds / sizes.tokens for sizes in (usual, largest))
        step = sum(step_seconds(plan.config, per_step, rows.context, share, speed, again).values())
        packed = 4 * largest.tokens
        full = sum(step_seconds(plan.config, packed, largest.tokens, 1.0, speed, again_largest).values())
        told[f"on one {name}"] = (
            f"at best {step:.2f} s a step, {step * steps / 3600:.1f} hours in all; 4 x {largest.tokens:,} tokens "
            f"{full:.2f} s, {packed / full:,.0f} tokens/s (computed from the roofline, not measured)"
        )
    return told


def dry_run(config: TrainConfig, runtime: Runtime) -> dict[str, str]:
    """The facts of a run without its weights."""
    if config.shard:
        check_ranks(runtime.world_size)
    architecture, where = read_architecture(config.model)
    # On tensors without memory in bf16, to count parameters; what the run would use follows from where it would run.
    assumed = runtime.device.type != "cuda" and assumes_gpu(config, build(architecture, "meta", torch.bfloat16))
    if config.dtype == "auto":
        config = replace(config, dtype="bfloat16" if assumed else str(runtime.dtype).removeprefix("torch."))
    model = build(architecture, "meta", getattr(torch, config.dtype))
    adapters = attach(model, config.lora_rank, config.lora_alpha, config.lora_targets, config.seed)
    optimizer = make_optimizer(adapters, config)
    rows, validation = _rows(config)
    plan = make_plan(config, model, adapters, optimizer, runtime)
    device = "H100 80GB (assumed: there is no GPU here)" if assumed else runtime.device_name
    live = "Triton (assumed)" if assumed else kernels.describe(runtime.device, architecture.head_dim)
    told = facts(config, model, adapters, optimizer, rows, validation, plan, f"{runtime.world_size} x {device}", live)
    return {"dry run": f"no weights are read; architecture from {_near(where)}", **told}


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
            f"config.json: {error}"
        ) from None


def _rows(config: TrainConfig) -> tuple[Rows, str]:
    """The rows as training would see them, if both they and a tokenizer are here; otherwise the recipe's own."""
    folder = Path(expand(config.model.removeprefix("random:"))).expanduser()
    folder = folder.parent if config.model.startswith("random:") else folder
    files = [Path(expand(path)) for path in (*config.data, *config.val_data)]
    absent = [path for path in (*files, folder / "tokenizer.json") if not path.is_file()]
    if config.data and not absent:
        train_set, val_set = load_data(config, folder)
        return Rows.of(train_set), val_set.summary() if val_set else "none"
    why = f"no file {absent[0]} here" if absent else "no --data"
    return Rows.published(config.max_tokens, why), "not read"


def _near(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count > 1e8 else f"{count / 1e6:.2f} MB"
