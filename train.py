"""Fine-tunes rank-1 LoRA adapters on a frozen Qwen3.5: rows in, an adapter out.

    torchrun train.py                                      # the paper in miniature, about a minute on a CPU
    torchrun train.py --config configs/qwen3.5-27b.toml    # the paper's recipe on one 80 GB GPU
    python train.py --help                                 # every setting, with its default

The run directory receives config.toml, metrics.jsonl, the adapter in PEFT's format, and state/ for exact resuming.
"""

import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

import kernels
from psysafe.checkpoint import load_model, resolve_model
from psysafe.config import TrainConfig, expand, resolve, to_toml
from psysafe.data import Dataset, encode_rows, pack, read_rows, split_rows, step_documents, steps_per_epoch
from psysafe.files import write_atomic
from psysafe.lora import Adapters, attach, load_adapter, save_adapter
from psysafe.model import Qwen3_5
from psysafe.optim import AdamW, cosine_schedule
from psysafe.prompts import system_text
from psysafe.run_log import RunLog, check_optional, plot_loss, print_run
from psysafe.run_state import StateNotSaved, check_resume, load_state, prepare_run_dir, recipe, save_state
from psysafe.runtime import Runtime, StopRequest, main_guard, start, versions
from psysafe.tokenizer import load_tokenizer

MAX_SKIPPED = 3  # steps in a row whose gradient norm is not finite


def main(argv: Sequence[str]) -> int:
    config, sources = resolve(argv)
    check_optional(config)
    runtime = start(config.device, config.dtype, config.seed)
    folder, commit = resolve_model(config.model, config.revision)
    config = replace(config, revision=commit, dtype=str(runtime.dtype).removeprefix("torch."))

    # Rows -> documents. Every rank reads them all; a step's documents are a pure function of (rows, seed, step).
    train_set, val_set = load_data(config, folder)
    rows_digest = digest(train_set, val_set)
    per_epoch = steps_per_epoch(len(train_set), config.batch_size)
    total_steps = config.max_steps or config.epochs * per_epoch

    model = load_model(config.model, device=runtime.device, dtype=runtime.dtype, revision=commit or None)
    adapters = attach_adapters(model, config)
    optimizer = AdamW(
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

    step, best_val, epoch_open = 0, None, True
    state = load_state(config.out, config.resume)
    if state is not None:
        check_resume(state.meta["recipe"], config)
        if state.meta["data"] != rows_digest:
            raise ValueError(f"{state.path}: was saved with other rows; resume with the same --data and --val-data")
        adapters.param.copy_(state.tensors.pop("adapter"))
        optimizer.load_state_tensors(state.tensors)
        step, best_val, epoch_open = state.step, state.meta["best_val"], state.meta["epoch_open"]

    if runtime.is_main:
        print_run(config, sources, facts(config, runtime, model, adapters, optimizer, train_set, val_set, total_steps))
        for warning in state.warnings if state else ():
            print(f"  warning: {warning}")
        if state:
            print(f"  resuming after step {step} from {state.path}\n")
    if config.dry_run:
        return 0
    if runtime.is_main:
        out = prepare_run_dir(config.out, config.resume)
        write_atomic(out / "config.toml", to_toml(config, sources))
    if runtime.world_size > 1:
        dist.barrier()

    def save(log: RunLog) -> None:
        """The run's state, and the adapter as PEFT reads it. A full disk costs a warning, never the run."""
        log.sync()
        if not runtime.is_main:
            return
        meta = {"recipe": recipe(config), "data": rows_digest, "versions": versions()}
        meta |= {"best_val": best_val, "epoch_open": epoch_open, "world_size": runtime.world_size}
        try:
            save_state(config.out, step, {"adapter": adapters.param, **optimizer.state_tensors()}, meta)
            save_adapter(adapters, config.out, config.model, model.config.multimodal, config.adapter_layout, commit)
        except StateNotSaved as error:
            log.say(f"warning: {error}; training goes on, the state before it is kept")

    with RunLog(config.out, config, runtime, total_steps, step) as log, StopRequest() as stop:
        waiting = None  # the last step's row: its loss is read when the next step is already on its way
        while step < total_steps or not epoch_open:
            stopping = runtime.largest(stop.received)
            if stopping:
                log_step(log, optimizer, waiting)
                save(log)
                return stop.exit_code or 128 + stopping
            if not epoch_open:
                log_step(log, optimizer, waiting)
                waiting = None
                if val_set is not None:
                    val_loss = validate(model, val_set, config, runtime)
                    log.validation(step, val_loss)
                    best_val = val_loss if best_val is None else min(best_val, val_loss)
                epoch_open = True
                save(log)
                continue
            row = train_step(model, adapters, optimizer, train_set, config, runtime, step, total_steps)
            log_step(log, optimizer, waiting)
            waiting, step = row, step + 1
            epoch_open = step % per_epoch != 0 and step != total_steps
            if config.save_every and step % config.save_every == 0 and epoch_open:
                log_step(log, optimizer, waiting)
                waiting = None
                save(log)
    if runtime.is_main:
        done = f"adapter in {config.out}" + (f", best validation loss {best_val:.4f}" if best_val is not None else "")
        print(f"{done}\nask it:  python generate.py \"...\" --adapter {config.out}")
        if config.plot:
            print(f"plot in {plot_loss(config.out)}")
    return 0


def train_step(
    model: Qwen3_5,
    adapters: Adapters,
    optimizer: AdamW,
    train_set: Dataset,
    config: TrainConfig,
    runtime: Runtime,
    step: int,
    total_steps: int,
) -> dict:
    """One optimiser step over this rank's share of the step's documents. Returns the row to log; its loss, gradient
    norm and skip counter are still on the device.

    Token losses are summed over micro-batches and ranks and divided by the step's trained tokens: how the documents
    are cut changes memory, never the result.
    """
    began = time.perf_counter()
    chosen = step_documents(len(train_set), step, config.batch_size, config.seed)
    documents = [train_set.documents[i] for i in chosen]
    targets = sum(document.n_targets for document in documents)
    optimizer.zero_grad()
    loss = torch.zeros((), dtype=adapters.param.dtype, device=runtime.device)
    for batch in pack(documents[runtime.rank :: runtime.world_size], config.micro_batch_tokens):
        part = batch_loss(model, batch, runtime) / targets
        part.backward()
        loss += part.detach()
    if runtime.world_size > 1:
        dist.all_reduce(adapters.grad)
        dist.all_reduce(loss)
    lr = cosine_schedule(step, total_steps, config.warmup_steps, config.lr)
    optimizer.step(lr)
    return {
        "step": step + 1,
        "loss": loss,
        "lr": lr,
        "grad_norm": optimizer.grad_norm.clone(),
        "skipped": optimizer.skipped.clone(),
        "tokens": sum(map(len, documents)),
        "trained_tokens": targets,
        "epoch": step // steps_per_epoch(len(train_set), config.batch_size) + 1,
        "documents": chosen,
        "began": began,
    }


def batch_loss(model: Qwen3_5, batch, runtime: Runtime) -> torch.Tensor:
    """The summed cross-entropy of a micro-batch's trained tokens."""
    tokens, rows, labels = (x.to(runtime.device, non_blocking=True) for x in (batch.tokens, batch.rows, batch.labels))
    hidden = model(tokens, kernels.Documents(batch.cu_seqlens, runtime.device), rows=rows)
    return kernels.linear_cross_entropy(hidden, model.head, labels)


@torch.no_grad()
def validate(model: Qwen3_5, val_set: Dataset, config: TrainConfig, runtime: Runtime) -> float:
    """The mean cross-entropy over all trained tokens of the validation rows."""
    total = torch.zeros((), dtype=torch.float64)
    for batch in pack(val_set.documents[runtime.rank :: runtime.world_size], config.micro_batch_tokens):
        total += batch_loss(model, batch, runtime).cpu()
    if runtime.world_size > 1:
        dist.all_reduce(total)
    return total.item() / val_set.n_targets


def log_step(log: RunLog, optimizer: AdamW, row: dict | None) -> None:
    """Reads a step's numbers from the device and logs them; ends the run after too many steps without a finite norm."""
    if row is None:
        return
    row = {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in row.items()}
    skipped, chosen = row.pop("skipped"), row.pop("documents")
    row["seconds"] = time.perf_counter() - row.pop("began")
    if skipped:
        row |= {"skipped": skipped, "documents": chosen}
        log.say(f"warning: step {row['step']}: gradient norm {row['grad_norm']}, nothing updated; documents {chosen}")
    log.step(**row)
    if skipped >= MAX_SKIPPED:
        raise ValueError(
            f"step {row['step']}: gradient norm not finite {skipped} times in a row; the parameters are untouched. "
            "Look at the documents named above, lower --lr, and continue with --resume auto"
        )


def load_data(config: TrainConfig, folder: Path) -> tuple[Dataset, Dataset | None]:
    """Training and validation documents; without validation files a share of the training rows is set apart."""
    if not config.data:
        raise ValueError("no training rows: give --data FILE, or data = [...] in the config file")
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


def digest(*sets: Dataset | None) -> str:
    """SHA-256 over all documents: a resumed run must see the same rows, wherever their files lie now."""
    sha = hashlib.sha256()
    for document in (document for data in sets if data is not None for document in data.documents):
        sha.update(len(document).to_bytes(8, "little") + document.tokens.tobytes() + document.trained.tobytes())
    return sha.hexdigest()


def facts(
    config: TrainConfig,
    runtime: Runtime,
    model: Qwen3_5,
    adapters: Adapters,
    optimizer: AdamW,
    train_set: Dataset,
    val_set: Dataset | None,
    total_steps: int,
) -> dict[str, str]:
    """What follows from the settings, for the reader of the log."""

    def size(*tensors: torch.Tensor) -> str:
        count = sum(x.numel() * x.element_size() for x in tensors)
        return f"{count / 1e9:.2f} GB" if count > 1e8 else f"{count / 1e6:.2f} MB"

    weights = [p for name, p in model.named_parameters() if ".adapter." not in name]
    per_step = train_set.n_tokens / len(train_set) * config.batch_size
    per_epoch = steps_per_epoch(len(train_set), config.batch_size)
    return {
        "device": f"{runtime.world_size} x {runtime.device_name}, {config.dtype}",
        "kernels": kernels.describe(runtime.device, model.config.head_dim),
        "model": f"{sum(p.numel() for p in weights):,} frozen parameters, {size(*weights)}",
        "adapter": f"{adapters.count:,} parameters in {len(adapters.segments)} tensors, {size(adapters.param)}; "
        f"optimiser state {size(*optimizer.state_tensors().values())}",
        "training rows": train_set.summary(),
        "validation rows": val_set.summary() if val_set else "none",
        "steps": f"{config.batch_size} documents, about {per_step:,.0f} tokens each; {per_epoch:,} an epoch, "
        f"{total_steps:,} in all, {train_set.n_tokens * total_steps / per_epoch:,.0f} tokens",
    }


if __name__ == "__main__":
    sys.exit(main_guard(main))
