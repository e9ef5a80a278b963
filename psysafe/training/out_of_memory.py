"""A GPU that runs out of memory in spite of the plan: the pass is done again with a smaller plan, or the run is saved.

    @again_with_less_memory
    def backward(run, documents, n_targets): ...      # clears the gradient first; its result does not need the plan

    with saved_if_out_of_memory(run, log):
        train(run, log, stop)

Ranks without --shard meet only after their passes, so all of them can start again together. With --shard they gather
weights inside the pass: the others wait there for the one that failed, so the run is saved and ends.
"""

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from psysafe.training.memory_plan import RETRY_STEP
from psysafe.training.run_log import RunLog
from psysafe.training.run_state import save_run
from psysafe.training.setup import Run

MAX_RETRIES = 5  # of one pass


def again_with_less_memory(work: Callable) -> Callable:
    """work(run, ...), done again on all ranks with 1 GB less in the plan, up to MAX_RETRIES times, when a GPU runs out.

    work must start afresh: clear the gradient, and leave alone what the next attempt reads. Raises OutOfMemoryError on
    every rank when the last attempt failed, too, and at once with --shard.
    """

    @functools.wraps(work)
    def until_it_fits(run: Run, *args):
        if run.plan is None or run.config.shard:
            return work(run, *args)
        for attempt in range(1 + MAX_RETRIES):
            result, error_text = _attempt(work, run, *args)
            # Before any sum: otherwise the others would wait there for what this rank never sends.
            rank = run.runtime.largest(run.runtime.rank + 1 if error_text else 0) - 1
            if rank < 0:
                return result
            del result
            run.watch.align(run.runtime)
            if attempt < MAX_RETRIES:
                _shrink(run, rank)
        raise torch.OutOfMemoryError(error_text or f"on rank {rank}")

    return until_it_fits


def _attempt(work: Callable, *args) -> tuple[object, str]:
    """(work's result, ""), or (None, what the GPU said)."""
    # The error itself must not leave this function: its traceback holds every tensor of the pass.
    try:
        return work(*args), ""
    except torch.OutOfMemoryError as error:
        return None, str(error) or "out of memory"


def _shrink(run: Run, rank: int) -> None:
    """Frees what the failed pass left behind and lowers the plan's limit, on every rank alike."""
    run.plan = replace(run.plan, lowered=run.plan.lowered + RETRY_STEP)
    gc.collect()  # autograd's graph can hang in a cycle
    if run.runtime.device.type == "cuda":
        torch.cuda.empty_cache()
    run.say(
        f"step {run.step + 1}: out of GPU memory on rank {rank}; done again on all ranks with "
        f"{(run.plan.limit - run.plan.lowered) / 1e9:.1f} GB planned for, 1 GB less"
    )


@contextlib.contextmanager
def saved_if_out_of_memory(run: Run, log: RunLog) -> Iterator[None]:
    """An OutOfMemoryError inside saves the run, as it was after its last whole step, and becomes a UserError.

    The first rank to come here saves, main or not: adapter and optimiser are whole and the same on every rank, and the
    main one may be waiting for weights that this rank will never send.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        saves = run.watch.is_first("save without memory")
        if saves:
            log.take_over()
            # A stream of its own: the usual one may be waiting, too. The last step's own work has ended when its row
            # is logged, which save_run does first.
            is_cuda = run.runtime.device.type == "cuda"
            with torch.cuda.stream(torch.cuda.Stream()) if is_cuda else contextlib.nullcontext():
                save_run(run, log)
        raise run.plan.out_of_memory_error(run.step + 1, run.config.out, error, saves and not run.save_error) from None
