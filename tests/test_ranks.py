"""Data parallel over gloo: however many ranks share the documents, the run is the same."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from kernels.proof.closeness import relative_error
from tests.test_resume import ENVIRONMENT, ROOT, command, metrics, workspace  # noqa: F401

# fp32-state AdamW (fp64 here): in 8 bits a last-bit difference can turn a code over. At the lr of test_resume the run
# is chaotic (1e-16 grows to 1e-5 in 30 steps), so a smaller one.
FLAGS = ("--dtype", "float64", "--max-steps", "30", "--optimizer", "adamw", "--lr", "1e-3")


def torchrun(folder, out, ranks, *more, script=None) -> None:
    train, *flags = command(folder, out, *FLAGS, *more)[1:]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launch, str(script or train), *flags],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


STEP_OF = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("psysafe.training.step", {path!r})
sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""


def mutant(folder, right: str, wrong: str):
    """train.py with another psysafe/training/step.py, in which one expression is exchanged."""
    source = (ROOT / "psysafe" / "training" / "step.py").read_text()
    assert source.count(right) == 1
    step, script = folder / "step.py", folder / "train.py"
    step.write_text("from dataclasses import replace\n" + source.replace(right, wrong))
    script.write_text(STEP_OF.format(path=str(step)) + (ROOT / "train.py").read_text())
    return script


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


@pytest.fixture(scope="module")
def alone(workspace):  # noqa: F811
    torchrun(workspace, "alone", 1)
    assert len(series(workspace / "alone", "loss")) == 30
    return workspace / "alone"


@pytest.mark.slow
def test_rank_count_and_sharding_change_nothing(workspace, alone):  # noqa: F811
    """Two ranks, and three with batches of two (one has padding micro-batches only); ragged documents, a last short
    batch in every epoch. Sharded runs repeat the bits of the unsharded run on as many ranks."""
    for ranks in (2, 3):
        for out, flags in ((f"ranks{ranks}", ()), (f"sharded{ranks}", ("--shard",))):
            torchrun(workspace, out, ranks, *flags)
            assert_close_runs(alone, workspace / out)
        assert metrics(workspace / f"ranks{ranks}") == metrics(workspace / f"sharded{ranks}")


@pytest.mark.slow
def test_kl_to_the_base_on_sharding_ranks(workspace):  # noqa: F811
    """Three ranks of which not every one has a contrast document in every step: all gather weights for the base's pass
    together, or the run would hang."""
    rows = (workspace / "train.jsonl").read_text().splitlines()
    (workspace / "contrast.jsonl").write_text("\n".join(rows[:7]))
    flags = "--contrast-data", f"{workspace}/contrast.jsonl", "--contrast-ratio", "0.75", "--kl-weight", "0.5"
    for out, ranks, more in (("kl1", 1, ()), ("kl3", 3, ("--shard", "--micro-batch-tokens", "100"))):
        torchrun(workspace, out, ranks, *flags, "--max-steps", "12", *more)
    assert_close_runs(workspace / "kl1", workspace / "kl3")
    for key in ("contrast_loss", "contrast_kl"):
        assert relative_error(series(workspace / "kl3", key), series(workspace / "kl1", key)) <= 1e-9
    assert series(workspace / "kl1", "contrast_kl")[-1] > 0


MUTANTS = {
    "a rank divides by its own tokens": (
        "n_targets = count_targets(documents)",
        "n_targets = count_targets(documents[runtime.rank :: runtime.world_size]) or 1",
    ),
    "a padding micro-batch counts": (
        "part = batch_loss(run.model, batch, ",
        "part = batch_loss(run.model, replace(batch, weight=1.0), ",
    ),
    "gradients stay on their rank": ("runtime.sum(adapters.grad, loss)", "runtime.sum(loss)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_share_is_caught(name, workspace, alone, tmp_path):  # noqa: F811
    torchrun(workspace, tmp_path / "out", 3, script=mutant(tmp_path, *MUTANTS[name]))
    with pytest.raises(AssertionError):
        assert_close_runs(alone, tmp_path / "out")


@pytest.mark.slow
def test_a_run_moves_between_rank_counts(workspace, alone):  # noqa: F811
    """Saved on two sharding ranks, resumed on one, and the other way round."""
    for first, second in ((2, 1), (1, 2)):
        out = f"moved{first}{second}"
        torchrun(workspace, out, first, *["--shard"][: first - 1])
        states = sorted((workspace / out / "state").iterdir())
        assert len(states) == 2
        shutil.rmtree(states[-1])
        torchrun(workspace, out, second, *["--shard"][: second - 1])
        assert_close_runs(alone, workspace / out)
