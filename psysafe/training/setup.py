"""What a run is built from, in this order: data, model, adapters, optimiser, memory plan. `Run` holds all of it."""

import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from psysafe.checkpoint.adapter import adapter_shape, load_adapter
from psysafe.data.documents import Dataset, MicroBatch, encode_rows, split_rows, steps_per_epoch
from psysafe.data.prompts import system_text
from psysafe.data.rows import Row, pinned, read_rows
from psysafe.data.tokenizer import load_tokenizer
from psysafe.files import expand
from psysafe.model.decoder import Qwen3_5
from psysafe.model.lora import Adapters, attach, resolve_targets
from psysafe.model.shard import GATHERED
from psysafe.program import UserError
from psysafe.runtime import Runtime, memory_total
from psysafe.training.config import TrainConfig
from psysafe.training.memory_plan import H100_MEMORY, RESERVE, Plan, Sizes
from psysafe.training.optim import AdamW
from psysafe.training.roofline import context, flops_per_token
from psysafe.training.watchdog import Watchdog

USE_RSLORA = "use_rslora"  # in a state's meta: how the adapter is scaled, which no setting says


@dataclass
class Run:
    """Everything that a step needs, and how far the run has come."""

    config: TrainConfig
    runtime: Runtime
    model: Qwen3_5
    adapters: Adapters
    optimizer: AdamW
    train_set: Dataset
    val_set: Dataset | None
    total_steps: int
    watch: Watchdog
    plan: Plan | None = None  # on a GPU: what the backward pass recomputes
    rows_digest: str = ""  # of both sets, for the saved state
    step: int = 0  # steps done
    validation_due: bool = True  # before the first step, and after an epoch's last one until it is done
    save_due: bool = False  # a step of --save-every
    best_val: float | None = None
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])  # for the tracker; a resumed run keeps it
    save_error: str = ""  # why the last save failed, if it did
    contrast_set: Dataset | None = None
    contrast_val_set: Dataset | None = None
    say: Callable[[str], None] = print  # RunLog.say, once there is one
    lock: AbstractContextManager = field(default_factory=nullcontext)  # on the main rank: of the run directory

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.train_set), self.config.batch_size)

    @property
    def useful_flops_per_token(self) -> float:
        """Useful FLOP of a training token, for the MFU."""
        rows = self.row_counts
        return flops_per_token(self.model.config, rows.context, rows.trained / rows.tokens)

    @property
    def row_counts(self) -> "RowCounts":
        """Of the training rows, each with its share of contrast rows."""
        return RowCounts.of(self.train_set).with_contrast(self.contrast_set, self.config.contrast_ratio)

    def finish_step(self) -> None:
        """Count a step as done, and note what has to follow it."""
        self.step += 1
        self.validation_due = self.step % self.steps_per_epoch == 0 or self.step == self.total_steps
        self.save_due = self.config.save_every > 0 and self.step % self.config.save_every == 0

    def note_validation(self, losses: Mapping[str, float]) -> None:
        """losses: as `validate` returns them."""
        if (val_loss := losses.get("val_loss")) is not None:
            self.best_val = val_loss if self.best_val is None else min(val_loss, self.best_val)

    def fit_into_memory(self, batch: MicroBatch) -> None:
        """On a GPU: choose what the backward pass of this micro-batch recomputes. Changes no number."""
        if self.plan is not None:
            self.plan.apply(self.model, Sizes.of(batch.cu_seqlens.diff().tolist(), len(batch.rows)))


class DataSets(NamedTuple):
    """The encoded rows of a run; None: there are none."""

    train: Dataset
    val: Dataset | None
    contrast: Dataset | None
    contrast_val: Dataset | None


class RowCounts(NamedTuple):
    """What the arithmetic of a run needs to know of its training rows."""

    rows: int
    tokens: float
    trained: float  # tokens
    longest: int  # tokens of the longest row
    context: float  # mean length of the row that a token lies in
    summary: str

    @staticmethod
    def of(data: Dataset) -> "RowCounts":
        lengths = [len(document) for document in data.documents]
        return RowCounts(len(data), data.n_tokens, data.n_targets, max(lengths), context(lengths), data.summary())

    def with_contrast(self, contrast: "Dataset | RowCounts | None", ratio: float) -> "RowCounts":
        """The counts of these rows with `ratio` contrast rows for each, as the steps see them on average."""
        if contrast is None:
            return self
        contrast = contrast if isinstance(contrast, RowCounts) else RowCounts.of(contrast)
        passes = ratio * self.rows / contrast.rows
        tokens, trained = self.tokens + passes * contrast.tokens, self.trained + passes * contrast.trained
        mean = (self.tokens * self.context + passes * contrast.tokens * contrast.context) / tokens
        return RowCounts(self.rows, tokens, trained, max(self.longest, contrast.longest), mean, self.summary)


def load_data(config: TrainConfig, folder: Path) -> DataSets:
    """The documents of a run, encoded by the tokenizer in folder.

    Without validation files a share of the training rows, and of the contrast rows, is set apart.
    """
    if not config.data:
        raise UserError("no training rows: give --data FILE, or data = [...] in the config file")
    if config.contrast_ratio and not config.contrast_data:
        what = f"no contrast rows for contrast_ratio {config.contrast_ratio:g}"
        raise UserError(f"{what}: give --contrast-data FILE, or --contrast-ratio 0")
    tokenizer, system = load_tokenizer(folder), system_text(config.system)
    options = (tokenizer, config.max_tokens, system, config.train_turns, config.long_rows)
    contrast_data = config.contrast_data if config.contrast_ratio else []
    rows = _read_and_split(config, config.data, config.val_data)
    contrast_rows = _read_and_split(config, contrast_data, config.contrast_val_data)
    encoded = [encode_rows(part, *options) if part else None for part in rows]
    return DataSets(*encoded, *(encode_rows(part, *options, True) if part else None for part in contrast_rows))


def _read_and_split(config: TrainConfig, data: list[str], val_data: list[str]) -> tuple[list[Row], list[Row]]:
    """(rows that are trained, rows that validate)."""
    rows, val_rows = read_rows(data), read_rows(val_data)
    if rows and config.val_fraction and not val_data:
        return split_rows(rows, seed=config.seed, fraction=config.val_fraction)
    return rows, val_rows


def with_pinned_data(config: TrainConfig) -> TrainConfig:
    """The config with data sets of the hub at the commit that they have now, so that config.toml records it."""
    names = "data", "val_data", "contrast_data", "contrast_val_data"
    return replace(config, **{name: [*map(pinned, getattr(config, name))] for name in names})


def count_steps(config: TrainConfig, n_rows: int) -> int:
    """Optimiser steps of the whole run."""
    return config.max_steps or config.epochs * steps_per_epoch(n_rows, config.batch_size)


def check_vocabulary(config: TrainConfig, model: Qwen3_5, *sets: Dataset | None) -> None:
    """Raise UserError when a token has no row in the embedding: the tokenizer belongs to another model."""
    # On a GPU an index out of range is an illegal memory access, which names neither the token nor the file.
    largest = max(int(document.tokens.max()) for data in sets if data is not None for document in data.documents)
    if largest >= model.config.vocab_size:
        raise UserError(
            f"{config.model}: its tokenizer gives token {largest}, its config.json says vocab_size "
            f"{model.config.vocab_size}; take both from the same model"
        )


def with_adapter_shape(
    config: TrainConfig, sources: dict[str, str], saved: Mapping = MappingProxyType({})
) -> tuple[TrainConfig, dict[str, str]]:
    """(config, sources) with rank, alpha and targets of --adapter-init: those of the adapter count, and are recorded.

    saved: the meta of the state that the run goes on from; its shape counts then, and the folder may be gone. Raises
    UserError where a flag says otherwise.
    """
    if not config.adapter_init:
        return config, sources
    names = "lora_rank", "lora_alpha", "lora_targets"
    if USE_RSLORA in saved:
        shape = {name: saved["recipe"][name] for name in names}
    else:
        shape = dict(zip(names, adapter_shape(expand(config.adapter_init)), strict=True))
    for name, value in shape.items():
        wanted = getattr(config, name)
        differs = set(resolve_targets(wanted)) != set(value) if name == "lora_targets" else wanted != value
        if sources[name].startswith("--") and differs:
            shape_text = f"the adapter of --adapter-init {config.adapter_init} has {value}"
            raise UserError(f"{sources[name]} {wanted}: {shape_text}, which cannot change; leave the flag out")
    return replace(config, **shape), sources | dict.fromkeys(names, "--adapter-init")


def attach_adapters(model: Qwen3_5, config: TrainConfig, saved: Mapping = MappingProxyType({})) -> Adapters:
    """Fresh adapters (B = 0, so that the model starts as the base), or those of --adapter-init.

    saved: the meta of a state; its numbers will be filled in, so the folder is not read.
    """
    if config.adapter_init and USE_RSLORA not in saved:
        return load_adapter(model, expand(config.adapter_init))
    shape = config.lora_rank, config.lora_alpha, config.lora_targets
    return attach(model, *shape, config.seed, use_rslora=saved.get(USE_RSLORA, False))


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
    """The memory plan for a GPU, in a dry run without one for an H100; None on a CPU, where nothing is planned."""
    device = runtime.device
    if device.type == "cuda":
        total = memory_total(device)
    elif assumes_gpu(config, model):
        total = H100_MEMORY
    elif config.memory_limit:
        raise UserError(f"--memory-limit plans a GPU's memory, this run is on {device.type}; leave the flag out")
    else:
        return None
    return plan_within(total, config, model, adapters, optimizer, runtime.world_size)


def plan_within(
    total: int, config: TrainConfig, model: Qwen3_5, adapters: Adapters, optimizer: AdamW, ranks: int
) -> Plan:
    """The plan for a GPU with so many bytes, or --memory-limit if that is less."""
    if config.memory_limit:
        total = min(total, round(config.memory_limit * 1e9))
    fixed, element = fixed_bytes(config, model, adapters, optimizer, ranks), model.norm.element_size()
    return Plan(model.config, adapters.projections, adapters.rank, total - RESERVE, fixed, element)


def fixed_bytes(config: TrainConfig, model: Qwen3_5, adapters: Adapters, optimizer: AdamW, ranks: int) -> int:
    """Bytes on each GPU that stay there through every step: weights, adapter, its gradient, optimiser state."""
    weights = [p for p in model.parameters() if p is not model.embed_tokens or config.embedding == "gpu"]
    fixed = nbytes(*weights, adapters.grad, *optimizer.state_tensors().values())
    if config.shard:  # of the blocks a rank holds its share, and whole ones while they are gathered
        blocks = [nbytes(*(p for p in block.parameters() if not p.requires_grad)) for block in model.layers]
        fixed -= sum(blocks) - sum(blocks) // ranks - GATHERED * max(blocks)
    return fixed


def assumes_gpu(config: TrainConfig, model: Qwen3_5) -> bool:
    """Whether a dry run on a machine without a GPU plans for one: nobody trains a billion parameters on a CPU."""
    return config.dry_run and config.device == "auto" and sum(p.numel() for p in model.parameters()) > 1e9


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
