"""Data parallel over gloo: however many ranks share the documents, the run is the same."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from kernels.closeness import relative_error
from tests.test_resume import ENVIRONMENT, command, metrics, workspace  # noqa: F401

# fp32-state AdamW (fp64 here): in 8 bits a last-bit difference can turn a code over. At the lr of test_resume the run
# is chaotic (1e-16 grows to 1e-5 in 30 steps), so a smaller one.
FLAGS = ("--dtype", "float64", "--max-steps", "30", "--optimizer", "adamw", "--lr", "1e-3")


def torchrun(folder, out, ranks, *more) -> None:
    train, *flags = command(folder, out, *FLAGS, *more)[1:]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), train]
    done = subprocess.run(
        [*launch, *flags], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def series(run, key) -> torch.Tensor:
    return torch.tensor([row[key] for row in metrics(run) if key in row], dtype=torch.float64)


def assert_close_runs(a, b, limit=1e-9) -> None:
    for key in ("loss", "grad_norm", "val_loss"):
        first, second = (series(run, key) for run in (a, b))
        assert len(first) > 0
        assert relative_error(second, first) <= limit, key
    first, second = (load_file(run / "adapter_model.safetensors") for run in (a, b))
    # The file is fp32: a last bit may round the other way.
    assert all(relative_error(second[name], first[name]) <= 1e-6 for name in first)


@pytest.mark.slow
def test_rank_count_changes_nothing(workspace):  # noqa: F811
    """One rank, two, and three with batches of two (a rank is left without documents); ragged, a last short batch."""
    for ranks in (1, 2, 3):
        torchrun(workspace, f"ranks{ranks}", ranks, "--batch-size", "2")
    for ranks in (2, 3):
        assert_close_runs(workspace / "ranks1", workspace / f"ranks{ranks}")


@pytest.mark.slow
def test_the_comparison_sees_another_run(workspace):  # noqa: F811
    """Three documents a step instead of two: the very comparison of the rank counts has to fail."""
    torchrun(workspace, "other", 1, "--batch-size", "3")
    torchrun(workspace, "right", 1, "--batch-size", "2")
    with pytest.raises(AssertionError):
        assert_close_runs(workspace / "right", workspace / "other")


@pytest.mark.slow
def test_a_run_moves_between_rank_counts(workspace):  # noqa: F811
    """Saved on two ranks, resumed on one, and the other way round."""
    torchrun(workspace, "whole", 1)
    for first, second in ((2, 1), (1, 2)):
        out = f"moved{first}{second}"
        torchrun(workspace, out, first)
        states = sorted((workspace / out / "state").iterdir())
        assert len(states) == 2
        shutil.rmtree(states[-1])
        torchrun(workspace, out, second)
        assert_close_runs(workspace / "whole", workspace / out)
