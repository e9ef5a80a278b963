"""What a run is built from, in this order: data, model, adapters, optimiser, memory plan. `Run` holds all of it."""

import hashlib
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
from psysafe.runtime import Runtime, memory_beside_torch, memory_total
from psysafe.training.config import TrainConfig
from psysafe.training.memory_plan import CONTEXT, H100_MEMORY, RESERVE, Plan, Sizes
from psysafe.training.optim import AdamW
from psysafe.training.roofline import context, flops_per_token
from psysafe.training.watchdog import Watchdog

# What --keep-best compares: the sum of these, as metrics.jsonl names them.
KEEP_BEST = {"val": ("val_loss",), "contrast": ("contrast_kl",), "both": ("val_loss", "contrast_kl")}
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
    best: "Best | None" = None  # what --keep-best keeps
    say: Callable[[str], None] = print  # RunLog.say, once there is one
    lock: AbstractContextManager = field(default_factory=nullcontext)  # on the main rank: of the run directory

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.train_set), self.config.batch_size)

    @property
    def useful_flops_per_token(self) -> float:
        """Useful FLOP of a training token, for the MFU."""
        rows = self.row_counts
        return flops_per_token(self.model.config, rows.context, rows.trained / rows.tokens, rows.base / rows.tokens)

    @property
    def row_counts(self) -> "RowCounts":
        """Of the training rows, each with its share of contrast rows."""
        rows = RowCounts.of(self.train_set)
        return rows.with_contrast(RowCounts.of(self.contrast_set), self.config) if self.contrast_set else rows

    def finish_step(self) -> None:
        """Count a step as done, and note what has to follow it."""
        self.step += 1
        self.validation_due = self.step % self.steps_per_epoch == 0 or self.step == self.total_steps
        is_save_step = self.config.save_every > 0 and self.step % self.config.save_every == 0
        self.save_due = is_save_step and not self.validation_due  # a validation saves by itself

    def fit_into_memory(self, batch: MicroBatch) -> None:
        """On a GPU: choose what the backward pass of this micro-batch recomputes. Changes no number."""
        if self.plan is not None:
            base_rows = batch.n_contrast if self.config.kl_weight else 0
            self.plan.apply(self.model, Sizes.of(batch.cu_seqlens.diff().tolist(), len(batch.rows), base_rows))


class Best(NamedTuple):
    """The best validation so far: after which step, what was compared, and all adapter parameters then, on the CPU."""

    step: int
    score: float
    adapter: torch.Tensor


class DataSets(NamedTuple):
    """The encoded rows of a run; None: there are none."""

    train: Dataset
    val: Dataset | None
    contrast: Dataset | None
    contrast_val: Dataset | None

    def digest(self) -> str:
        """SHA-256 over all documents' tokens and masks: whatever their files are called, these are the same rows.

        Contrast rows have digests of their own, trained ones and those that validate, behind a colon each.
        """
        digest = _digest(self.train, self.val)
        if self.contrast is None and self.contrast_val is None:
            return digest
        return ":".join([digest, _digest(self.contrast), _digest(self.contrast_val)])


def _digest(*sets: Dataset | None) -> str:
    sha = hashlib.sha256()
    for document in (document for data in sets if data is not None for document in data.documents):
        sha.update(len(document).to_bytes(8, "little") + document.tokens.tobytes() + document.trained.tobytes())
    return sha.hexdigest()


class RowCounts(NamedTuple):
    """What the arithmetic of a run needs to know of its training rows."""

    rows: int
    tokens: float
    trained: float  # tokens
    longest: int  # tokens of the longest row
    context: float  # mean length of the row that a token lies in
    summary: str
    base: float = 0.0  # tokens that the base reads as well (--kl-weight)

    @staticmethod
    def of(data: Dataset) -> "RowCounts":
        lengths = [len(document) for document in data.documents]
        return RowCounts(len(data), data.n_tokens, data.n_targets, max(lengths), context(lengths), data.summary())

    def with_contrast(self, contrast: "RowCounts", config: TrainConfig) -> "RowCounts":
        """The counts of these rows with contrast_ratio contrast rows for each, as the steps see them on average."""
        passes = config.contrast_ratio * self.rows / contrast.rows
        more = passes * contrast.tokens
        return self._replace(
            tokens=self.tokens + more,
            trained=self.trained + passes * contrast.trained,
            longest=max(self.longest, contrast.longest),
            context=(self.tokens * self.context + more * contrast.context) / (self.tokens + more),
            base=more if config.kl_weight else 0.0,
        )


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
    data = DataSets(*encoded, *(encode_rows(part, *options, True) if part else None for part in contrast_rows))
    for name in KEEP_BEST.get(config.keep_best, ()):
        if (data.val if name == "val_loss" else data.contrast_val) is None:
            more = "--val-data" if name == "val_loss" else "--contrast-val-data"
            raise UserError(f"keep_best {config.keep_best}: no rows validate {name}; give {more}, or --keep-best last")
    return data


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
        # Beyond the context: NCCL's buffers, and other processes. Without them a run gets the plan of its dry run.
        total = memory_total(device) - max(0, memory_beside_torch(device) - CONTEXT)
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
