"""Fine-tunes rank-1 LoRA adapters on a frozen Qwen3.5: rows in, an adapter out.

    torchrun train.py                                      # the paper in miniature, about a minute on a CPU
    torchrun train.py --config configs/qwen3.5-27b.toml    # the paper's recipe on one 80 GB GPU
    python train.py --help                                 # every setting, with its default

The run directory receives config.toml, metrics.jsonl, the adapter in PEFT's format, and state/ for exact resuming.
"""

import psysafe.interrupt  # noqa: F401  # isort: skip  (first: Ctrl-C during the imports ends quietly)
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from psysafe.checkpoint.adapter import peft_check_command, warn_of_other_base
from psysafe.checkpoint.base import load_model, resolve_model
from psysafe.program import OutputError, StopRequest, main_guard
from psysafe.runtime import Runtime, start, versions
from psysafe.training.config import TrainConfig, resolve
from psysafe.training.dry_run import dry_run, run_summary
from psysafe.training.out_of_memory import saved_if_out_of_memory
from psysafe.training.run_log import RunLog, check_packages, plot_loss, print_run
from psysafe.training.run_state import (
    State,
    check_resume,
    check_rows,
    check_run_dir,
    check_writable,
    enter_run_dir,
    load_state,
    open_log,
    recipe,
    restore_run,
    save_run,
)
from psysafe.training.setup import (
    Run,
    attach_adapters,
    check_vocabulary,
    count_steps,
    load_data,
    make_optimizer,
    make_plan,
    with_adapter_shape,
    with_pinned_data,
)
from psysafe.training.step import train_step
from psysafe.training.tracker import check_login
from psysafe.training.validation import record_best, validate
from psysafe.training.watchdog import Watchdog


def main(argv: Sequence[str]) -> int:
    config, sources = resolve(argv)
    check_packages(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    runtime = start(config.device, config.dtype, config.seed, config.timeout)
    if config.dry_run:
        if runtime.is_main:
            check_writable(config.out)
            config, sources = with_adapter_shape(config, sources)
            print_run(config, sources, dry_run(config, runtime))
        return 0
    with Watchdog(runtime, config.timeout) as watch:  # of several ranks: when one dies or hangs, all end
        run = prepare(config, sources, runtime, watch)
        with run.lock, open_log(run) as log, StopRequest() as stop, saved_if_out_of_memory(run, log):
            code = train(run, log, stop)
        return code or finish(run)


def prepare(config: TrainConfig, sources: dict[str, str], runtime: Runtime, watch: Watchdog) -> Run:
    """All that a step needs. What a user can get wrong is checked before the weights, which take minutes to load."""
    if runtime.is_main:
        check_run_dir(config.out)
        check_login(config)
    folder, commit = resolve_model(config.model, config.revision)
    # The run is recorded with what it really uses: a commit instead of a branch, a type instead of "auto".
    config = replace(config, revision=commit, dtype=str(runtime.dtype).removeprefix("torch."))
    config = with_pinned_data(config)
    state = load_state(config.out, config.resume)
    config, sources = with_adapter_shape(config, sources, state.meta if state else {})
    # Every rank reads all rows: then a step's documents are a pure function of (rows, seed, step).
    data = load_data(config, folder)
    rows_digest = data.digest()
    if state:
        check_resume(state, config)
        check_rows(state, rows_digest)
    watch.progress(0)
    runtime.agree(**recipe(config), rows=rows_digest, resumes_after_step=state.step if state else 0)

    model = load_model(
        config.model, None, runtime.device, runtime.dtype, commit, embedding=config.embedding, shard=config.shard
    )
    check_vocabulary(config, model, *data)
    adapters = attach_adapters(model, config, state.meta if state else {})
    optimizer = make_optimizer(adapters, config)
    # A step's sums, of zeros: NCCL takes its buffers at the first of them. Here the plan can leave room for them; after
    # the first backward pass there may be none.
    watch.progress(0)
    runtime.sum(adapters.grad, torch.zeros((), dtype=adapters.param.dtype, device=runtime.device))
    plan = make_plan(config, model, adapters, optimizer, runtime)
    total_steps = count_steps(config, len(data.train))
    run = Run(
        config, runtime, model, adapters, optimizer, data.train, data.val, total_steps, watch, plan, rows_digest,
        contrast_set=data.contrast, contrast_val_set=data.contrast_val,
    )  # fmt: skip
    if state:
        restore_run(run, state)
    if runtime.is_main:
        announce(run, sources, state)
    watch.progress(0)
    return run


def announce(run: Run, sources: dict[str, str], state: State | None) -> None:
    """Print the resolved run, and make its directory."""
    with contextlib.suppress(OutputError):  # a full disk costs lines, not the run: the log will say so
        print_run(run.config, sources, run_summary(run))
        if state:
            warnings = state.warnings + state.changed(versions() | {"ranks": run.runtime.world_size})
            print(*warnings, f"resuming after step {run.step} from {state.path}", sep="\n", flush=True)
    if run.config.adapter_init and not state:
        warn_of_other_base(run.config.adapter_init, run.config.model)
    enter_run_dir(run, sources, state)


def train(run: Run, log: RunLog, stop: StopRequest) -> int:
    """The loop over the steps. Returns the exit code: 0, or 128 + the signal that asked for a stop."""
    while run.validation_due or run.step < run.total_steps:
        # A signal reaches the ranks at different moments, even during different steps. They take the largest of their
        # answers: so all stop after the same step, and none waits for gradients that another will never send.
        if signal := run.runtime.largest(stop.received or log.signal):
            save_run(run, log)
            if not run.save_error:
                log.say(f"stopped and saved after step {run.step}; continue with --resume auto")
            return 128 + signal
        if run.validation_due:  # before the first step and after an epoch's last one
            validate_and_save(run, log)
        else:
            if run.save_due:
                save_run(run, log)
            result = train_step(run)
            # Logged one step late. Reading a loss waits until the GPU has computed it, and a waiting host queues no
            # work. Once the next step is queued, this one's numbers can be read while the GPU is busy.
            log.later(result)
            run.finish_step()
    return 0


def validate_and_save(run: Run, log: RunLog) -> None:
    """At the end of each epoch, and before the first step.

    Why before the first step: fresh adapters add nothing (B = 0), so this is the base's own loss, to which all later
    ones are compared. And a disk that cannot hold a state shows it now, not after the first epoch.
    """
    log.catch_up()
    if losses := validate(run):
        log.validation(run.step, losses)
        record_best(run, losses)
    run.validation_due = False  # before the save: a resumed run must not validate again
    save_run(run, log)


def finish(run: Run) -> int:
    """Print where the adapter lies. Exit code 1 when its last save failed."""
    out = run.config.out
    if run.save_error:
        print(f"error: {run.save_error}; make room and finish with --resume auto", file=sys.stderr)
        return 1
    if run.runtime.is_main:
        best = "" if run.best_val is None else f", best validation loss {run.best_val:.4f}"
        if run.best:
            best += f"; it is that of step {run.best.step}, --keep-best {run.config.keep_best} {run.best.score:.4f}"
        print(f"adapter in {out}{best}; try:")
        print(f"  python generate.py --adapter {out} \"I feel like giving up.\"")
        if not run.config.model.startswith("random:"):  # a base that nobody else could load
            print(f"  python -m psysafe.publish {out} --repo YOUR-NAME/YOUR-MODEL --dry-run")
        print(peft_check_command(out, run.config.model))
        if run.config.plot:
            print(f"plot in {plot_loss(out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
