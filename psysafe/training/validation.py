"""What is measured on rows that nothing trains on, after each epoch and before the first step.

    validate(run)      # {"val_loss": 0.0051, "contrast_loss": 0.42}, as metrics.jsonl has them
"""

import torch
import torch.distributed as dist

from psysafe.data.documents import Dataset, pack_share
from psysafe.training.loss import batch_loss, count_targets
from psysafe.training.setup import Run


@torch.no_grad()
def validate(run: Run) -> dict[str, float]:
    """Mean cross-entropy over all trained tokens of the validation rows (`val_loss`) and of those contrast rows that
    are set apart (`contrast_loss`); one that the run has no rows for is left out.
    """
    sets = {"val_loss": run.val_set, "contrast_loss": run.contrast_val_set}
    return {name: _mean_loss(run, data) for name, data in sets.items() if data is not None}


def _mean_loss(run: Run, data: Dataset) -> float:
    runtime = run.runtime
    total = torch.zeros((), dtype=torch.float64)
    for batch in pack_share(data.documents, run.config.micro_batch_tokens, runtime.rank, runtime.world_size):
        run.watch.progress(max(1, run.step))  # the watchdog counts steps from 1, also before the first
        total += batch_loss(run.model, batch, runtime.device).cpu()
    if runtime.world_size > 1:
        dist.all_reduce(total)
    return total.item() / count_targets(data.documents)
