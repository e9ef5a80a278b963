"""Fine-tunes rank-1 LoRA adapters on a frozen Qwen3.5: rows in, an adapter out.

    torchrun train.py                                      # the paper in miniature, about a minute on a CPU
    torchrun train.py --config configs/qwen3.5-27b.toml    # the paper's recipe on one 80 GB GPU
    python train.py --help                                 # every setting, with its default

The run directory receives config.toml, metrics.jsonl, the adapter in PEFT's format, and state/ for exact resuming.
"""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import NoneType

import torch
import torch.distributed as dist

import kernels
from psysafe.checkpoint.base import load_model, resolve_model
from psysafe.data.documents import Dataset, MicroBatch, pack_share, step_documents, steps_per_epoch
from psysafe.files import write_atomic
from psysafe.model.decoder import Qwen3_5
from psysafe.model.lora import Adapters, save_adapter
from psysafe.program import StopRequest, UserError, main_guard
from psysafe.runtime import DeviceTime, Runtime, start, versions
from psysafe.training.config import TrainConfig, resolve, to_toml
from psysafe.training.facts import Rows, adapted, attach_adapters, dry_run, facts, load_data, make_optimizer, make_plan
from psysafe.training.memory_plan import Plan, Sizes
from psysafe.training.optim import AdamW, cosine_schedule
from psysafe.training.roofline import flops_per_token
from psysafe.training.run_log import RunLog, check_optional, plot_loss, print_run
from psysafe.training.run_state import (
    State,
    check_resume,
    check_run_dir,
    load_state,
    prepare_run_dir,
    recipe,
    save_state,
)
from psysafe.training.watchdog import Watchdog

MAX_SKIPPED = 3  # steps in a row whose gradient norm is not finite


@dataclass
class Run:
    """Everything a step needs, and how far the run has come."""

    config: TrainConfig
    runtime: Runtime
    model: Qwen3_5
    adapters: Adapters
    optimizer: AdamW
    train_set: Dataset
    val_set: Dataset | None
    total_steps: int
    watch: Watchdog
    step: int = 0  # steps done
    epoch_open: bool = False  # False from an epoch's last step, and before the first, until validated and saved
    best_val: float | None = None
    plan: Plan | None = None  # on a GPU: what backward makes again
    unsaved: str = ""  # why the last save failed, if it did


def main(argv: Sequence[str]) -> int:
    config, sources = resolve(argv)
    config = adapted(config)
    check_optional(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    runtime = start(config.device, config.dtype, config.seed, config.timeout)
    if config.dry_run:
        if runtime.is_main:
            print_run(config, sources, dry_run(config, runtime))
        return 0
    with Watchdog(runtime, config.timeout) as watch:
        return fine_tune(config, sources, runtime, watch)


def fine_tune(config: TrainConfig, sources: dict[str, str], runtime: Runtime, watch: Watchdog) -> int:
    # What a user can have got wrong is looked at before the weights, which take minutes.
    if runtime.is_main:
        check_run_dir(config.out)
    folder, commit = resolve_model(config.model, config.revision)
    config = replace(config, revision=commit, dtype=str(runtime.dtype).removeprefix("torch."))
    state = load_state(config.out, config.resume)
    if state:
        check_resume(state, config)

    # Every rank reads all rows: a step's documents are a pure function of (rows, seed, step).
    train_set, val_set = load_data(config, folder)
    rows_digest = digest(train_set, val_set)
    if state and state.fact("rows", str) != rows_digest:
        raise UserError(f"{state.path}: was saved with other rows; resume with the same --data and --val-data")
    runtime.agree(**recipe(config), rows=rows_digest, resumes_after_step=state.step if state else 0)

    model = load_model(
        config.model, None, runtime.device, runtime.dtype, commit, embedding=config.embedding, shard=config.shard
    )
    check_vocabulary(config, model, train_set, val_set)
    adapters = attach_adapters(model, config)
    total_steps = config.max_steps or config.epochs * steps_per_epoch(len(train_set), config.batch_size)
    optimizer = make_optimizer(adapters, config)
    plan = make_plan(config, model, adapters, optimizer, runtime)
    run = Run(config, runtime, model, adapters, optimizer, train_set, val_set, total_steps, watch, plan=plan)
    if state:
        restore(run, state)

    rows = Rows.of(train_set)
    if runtime.is_main:
        device = f"{runtime.world_size} x {runtime.device_name}"
        live = kernels.describe(runtime.device, model.config.head_dim)
        validation = val_set.summary() if val_set else "none"
        told = facts(config, model, adapters, optimizer, rows, validation, plan, device, live)
        print_run(config, sources, told)
        if state:
            changed = state.changed(versions() | {"ranks": runtime.world_size})
            print(*state.warnings, *changed, f"resuming after step {run.step} from {state.path}", sep="\n", flush=True)
        out = prepare_run_dir(config.out, config.resume)
        write_atomic(out / "config.toml", to_toml(config, sources))

    useful = flops_per_token(model.config, rows.context, rows.trained / rows.tokens)
    log = RunLog(config.out, config, runtime, total_steps, run.step, useful, validated=run.epoch_open)
    with log, StopRequest() as stop:
        code = train(run, log, stop, rows_digest)
    if code == 0 and run.unsaved:
        print(f"error: {run.unsaved}; make room and finish with --resume auto", file=sys.stderr)
        return 1
    if code == 0 and runtime.is_main:
        best = "" if run.best_val is None else f", best validation loss {run.best_val:.4f}"
        print(f"adapter in {config.out}{best}; try:")
        print(f"  python generate.py --adapter {config.out} \"I feel like giving up.\"")
        if config.plot:
            print(f"plot in {plot_loss(config.out)}")
    return code


def train(run: Run, log: RunLog, stop: StopRequest, rows_digest: str) -> int:
    """The loop: steps; before the first and at each epoch's end a validation and a saved state. Returns the exit code.

    A step's numbers are logged when the next step is already on its way, so that the device never waits for the host.
    """
    per_epoch = steps_per_epoch(len(run.train_set), run.config.batch_size)
    waiting: StepResult | None = None
    while run.step < run.total_steps or not run.epoch_open:
        stopping = run.runtime.largest(stop.received)
        every = run.config.save_every
        due = every and run.step % every == 0 and waiting is not None and run.epoch_open
        if stopping or due or not run.epoch_open:
            log_step(run, log, waiting)
            waiting = None
        if stopping:
            save(run, log, rows_digest)
            if not run.unsaved:
                log.say(f"stopped and saved after step {run.step}; continue with --resume auto")
            return 128 + stopping
        if due:
            save(run, log, rows_digest)
        if not run.epoch_open:
            if run.val_set is not None:
                val_loss = validate(run)
                log.validation(run.step, val_loss)
                run.best_val = min(val_loss, run.best_val if run.best_val is not None else val_loss)
            run.epoch_open = True
            save(run, log, rows_digest)
            continue
        try:
            result = train_step(run)
        except torch.OutOfMemoryError as error:
            log_step(run, log, waiting)
            save(run, log, rows_digest)
            saved = run.runtime.is_main and not run.unsaved
            raise UserError(run.plan.out_of_memory(run.step + 1, run.config.out, error, saved)) from None
        log_step(run, log, waiting)
        waiting = result
        run.step += 1
        run.epoch_open = run.step % per_epoch != 0 and run.step != run.total_steps
    return 0


class StepResult:
    """A step's numbers on their way to the host: copied without waiting, read when they are there."""

    def __init__(self, began: DeviceTime, fields: dict, **scalars: torch.Tensor):
        self.fields, self.names = fields, tuple(scalars)
        self.values = torch.stack([x.detach().double() for x in scalars.values()]).to("cpu", non_blocking=True)
        self.began, self.ended = began, DeviceTime(began.device)

    def read(self) -> dict:
        seconds = self.ended.since(self.began)
        return self.fields | dict(zip(self.names, self.values.tolist(), strict=True)) | {"seconds": seconds}


def train_step(run: Run) -> StepResult:
    """One optimiser step over this rank's share of the step's documents.

    Token losses are summed over micro-batches and ranks and divided by the step's trained tokens: how the documents
    are cut changes memory, never the result.
    """
    config, runtime, adapters = run.config, run.runtime, run.adapters
    began = DeviceTime(runtime.device)
    chosen = step_documents(len(run.train_set), run.step, config.batch_size, config.seed)
    documents = [run.train_set.documents[i] for i in chosen]
    targets = sum(document.n_targets for document in documents)
    run.optimizer.zero_grad()
    loss = torch.zeros((), dtype=adapters.param.dtype, device=runtime.device)
    for batch in pack_share(documents, config.micro_batch_tokens, runtime.rank, runtime.world_size):
        run.watch.progress(run.step + 1)
        if run.plan is not None:
            run.plan.apply(run.model, Sizes.of(batch.cu_seqlens.diff().tolist(), len(batch.rows)))
        part = batch_loss(run.model, batch, runtime) / targets
        part.backward()
        loss += part.detach()
    run.watch.progress(run.step + 1)
    if runtime.world_size > 1:
        dist.all_reduce(adapters.grad)
        dist.all_reduce(loss)
    lr = cosine_schedule(run.step, run.total_steps, config.warmup_steps, config.lr)
    run.optimizer.step(lr)
    fields = {
        "step": run.step + 1,
        "lr": lr,
        "tokens": sum(map(len, documents)),
        "trained_tokens": targets,
        "epoch": run.step // steps_per_epoch(len(run.train_set), config.batch_size) + 1,
        "documents": chosen,
    }
    return StepResult(began, fields, loss=loss, grad_norm=run.optimizer.grad_norm, skipped=run.optimizer.skipped)


def batch_loss(model: Qwen3_5, batch: MicroBatch, runtime: Runtime) -> torch.Tensor:
    """The summed cross-entropy of a micro-batch's trained tokens; 0 for a spare one."""
    documents = kernels.Documents(batch.cu_seqlens, runtime.device)
    in_host_memory = model.embed_tokens.device.type == "cpu"
    tokens = batch.tokens if in_host_memory else documents.to_device(batch.tokens)
    hidden = model(tokens, documents, rows=documents.to_device(batch.rows))
    return batch.weight * kernels.linear_cross_entropy(hidden, model.head, documents.to_device(batch.labels))


@torch.no_grad()
def validate(run: Run) -> float:
    """The mean cross-entropy over all trained tokens of the validation rows."""
    runtime, documents, total = run.runtime, run.val_set.documents, torch.zeros((), dtype=torch.float64)
    for batch in pack_share(documents, run.config.micro_batch_tokens, runtime.rank, runtime.world_size):
        run.watch.progress(max(1, run.step))
        total += batch_loss(run.model, batch, runtime).cpu()
    if runtime.world_size > 1:
        dist.all_reduce(total)
    return total.item() / run.val_set.n_targets


def log_step(run: Run, log: RunLog, result: StepResult | None) -> None:
    """Logs a step; ends the run when too many in a row had no finite gradient norm."""
    if result is None:
        return
    row = result.read()
    skipped, chosen = int(row.pop("skipped")), row.pop("documents")
    if skipped:
        row |= {"skipped": skipped, "documents": [run.train_set.documents[i].source for i in chosen]}
        log.say(f"warning: step {row['step']}: gradient norm {row['grad_norm']}, nothing updated: {row['documents']}")
    log.step(**row)
    if skipped >= MAX_SKIPPED:
        raise UserError(
            f"step {row['step']}: gradient norm not finite {skipped} times in a row, the last good state is kept; "
            "look at the rows named above, or lower --lr and start again"
        )


def save(run: Run, log: RunLog, rows_digest: str) -> None:
    """The run's state, and the adapter as PEFT reads it. A full disk costs a warning, never the run."""
    log.sync()
    if not run.runtime.is_main:
        return
    config = run.config
    meta = {"recipe": recipe(config), "rows": rows_digest, "versions": versions()}
    meta |= {"best_val": run.best_val, "epoch_open": run.epoch_open, "world_size": run.runtime.world_size}
    tensors = {"adapter": run.adapters.param, **run.optimizer.state_tensors()}
    multimodal, run.unsaved = run.model.config.multimodal, ""
    try:
        save_adapter(run.adapters, config.out, config.model, multimodal, config.adapter_layout, config.revision)
        save_state(config.out, run.step, tensors, meta)
    except OSError as error:  # StateNotSaved is one
        run.unsaved = f"step {run.step} was not saved: {error}"
        log.say(f"warning: {run.unsaved}; training goes on, what was saved before is kept")


def restore(run: Run, state: State) -> None:
    """Continues exactly where a saved state stands."""
    best_val, epoch_open = state.fact("best_val", float, NoneType), state.fact("epoch_open", bool)
    adapter = state.tensor("adapter", like=run.adapters.param)
    try:
        run.optimizer.load_state_tensors({name: x for name, x in state.tensors.items() if name != "adapter"})
    except ValueError as error:
        raise UserError(f"{state.path}: {error}") from None
    run.adapters.param.copy_(adapter)
    run.step, run.best_val, run.epoch_open = state.step, best_val, epoch_open


def check_vocabulary(config: TrainConfig, model: Qwen3_5, *sets: Dataset | None) -> None:
    """A tokenizer of another model would otherwise end in an illegal memory access on the device."""
    largest = max(int(document.tokens.max()) for data in sets if data is not None for document in data.documents)
    if largest >= model.config.vocab_size:
        raise UserError(
            f"{config.model}: its tokenizer gives token {largest}, its config.json says vocab_size "
            f"{model.config.vocab_size}; take both from the same model"
        )


def digest(*sets: Dataset | None) -> str:
    """SHA-256 over all documents: a resumed run must see the same rows, wherever their files lie now."""
    sha = hashlib.sha256()
    for document in (document for data in sets if data is not None for document in data.documents):
        sha.update(len(document).to_bytes(8, "little") + document.tokens.tobytes() + document.trained.tobytes())
    return sha.hexdigest()


if __name__ == "__main__":
    sys.exit(main_guard(main))
