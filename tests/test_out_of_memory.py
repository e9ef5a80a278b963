"""A GPU that runs out of memory (injected): the pass is done again to the same bits, or the run is saved and ends."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import train
from psysafe import load_model
from psysafe.model.lora import attach
from psysafe.program import StopRequest, UserError
from psysafe.runtime import Runtime, start
from psysafe.training import out_of_memory, step
from psysafe.training.memory_plan import Plan, Sizes
from psysafe.training.run_log import RunLog, read_metrics
from psysafe.training.watchdog import Watchdog
from tests.test_resume import ENVIRONMENT, ROOT, assert_same_run, command, workspace  # noqa: F401
from tests.test_shard import CONFIG as SMALL
from tests.test_shard import spawn
from tests.test_train import CONFIG, curve, dataset, setup

STEPS = 4
ERROR = "CUDA out of memory. Tried to allocate 2.00 GiB."


def planned_run(folder, **changes):
    """A run with micro-batches of one document and a plan for a GPU that is large enough."""
    run, _ = setup(folder, torch.float32, micro_batch_tokens=1, **changes)
    run.plan = Plan(run.model.config, run.adapters.targets, 1, 84 * 10**9, 0, element=4)
    return run


def inject(monkeypatch, fails, in_backward: bool = False) -> None:
    """Calls of batch_loss whose number (from 0) `fails` names run out of memory, there or in their backward pass."""
    original, calls = step.batch_loss, [0]

    def out_of_memory(*_):
        raise torch.OutOfMemoryError(ERROR)

    def loss(*args):
        number, calls[0] = calls[0], calls[0] + 1
        if fails(number) and not in_backward:
            out_of_memory()
        loss = original(*args)
        if fails(number):
            loss.register_hook(out_of_memory)
        return loss

    monkeypatch.setattr(step, "batch_loss", loss)


def unharmed(folder) -> tuple[list[float], torch.Tensor]:
    run = planned_run(folder)
    return curve(run, STEPS), run.adapters.param


def compare(folder, monkeypatch, fails, in_backward: bool = False) -> train.Run:
    losses, param = unharmed(folder / "unharmed")
    run = planned_run(folder / "harmed")
    with monkeypatch.context() as patch:
        inject(patch, fails, in_backward)
        assert curve(run, STEPS) == losses
    assert torch.equal(run.adapters.param, param)
    return run


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("micro_batch", [0, 1, 2])
def test_a_step_that_runs_out_of_memory_is_done_again_to_the_same_bits(
    micro_batch, in_backward, tmp_path, monkeypatch, capsys
):
    """The first, second or third micro-batch of step 2."""
    run = compare(tmp_path, monkeypatch, lambda n: n == 3 + micro_batch, in_backward)
    line = "step 2: out of GPU memory on rank 0; done again on all ranks with 83.0 GB planned for, 1 GB less\n"
    assert capsys.readouterr().out == line and run.plan.lowered == 10**9


def test_five_times_in_a_row_are_survived(tmp_path, monkeypatch):
    assert compare(tmp_path, monkeypatch, lambda n: 3 <= n < 8).plan.lowered == 5 * 10**9


def test_gradients_of_the_failed_pass_that_stay_are_caught(tmp_path, monkeypatch):
    run = planned_run(tmp_path / "wrong")
    monkeypatch.setattr(run.optimizer, "zero_grad", lambda: None)
    monkeypatch.setattr(f"{__name__}.planned_run", lambda folder: run if folder.name == "harmed" else setup(folder)[0])
    with pytest.raises(AssertionError):
        compare(tmp_path, monkeypatch, lambda n: n == 4)


def test_a_lowered_plan_recomputes_more_and_never_refuses_what_the_first_one_took(tmp_path):
    run = planned_run(tmp_path)
    sizes = Sizes.of([60])
    fullest = run.plan.choose(sizes)
    plan = replace(run.plan, limit=fullest.peak)
    assert plan.choose(sizes) == fullest
    lowered = replace(plan, lowered=fullest.saved // 2).choose(sizes)
    assert lowered.peak <= fullest.peak - fullest.saved // 2 and lowered.seconds > 0
    smallest = replace(plan, lowered=10**9).choose(sizes)
    assert smallest.peak < lowered.peak and smallest.saved > 0


@pytest.mark.parametrize("save_error", ["", "step 2 was not saved: disk full"])
def test_when_it_does_not_help_the_run_is_saved_and_ends_in_one_line(save_error, tmp_path, monkeypatch):
    run = planned_run(tmp_path / "model")
    run.config = replace(run.config, out=str(tmp_path / "run"))
    saved = []

    def save(run, log):
        log.sync()
        saved.append(run.step)
        run.save_error = save_error

    for module in (train, out_of_memory):
        monkeypatch.setattr(module, "save_run", save)
    inject(monkeypatch, lambda n: n >= 7)
    log = RunLog(tmp_path, run.config, run.runtime, run.total_steps)
    with pytest.raises(UserError) as caught, log, out_of_memory.saved_if_out_of_memory(run, log):
        train.train(run, log, StopRequest())
    line = str(caught.value)
    expected = "continue from the last saved state" if save_error else "the run is saved: continue"
    assert line.startswith("step 3: out of GPU memory with 79.0 GB planned for (CUDA out of memory); " + expected)
    assert f"with --out {run.config.out} --resume auto --memory-limit 78, or lower" in line and "\n" not in line
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2] and saved == [0, 2]


def ranks_that_run_out(folder, failures: dict[int, set[int]], meet: bool = True) -> None:
    """On every rank: a curve without failures, then one in which calls of batch_loss fail as given for that rank."""
    place = start("cpu", "float32")
    if not meet:
        Runtime.largest = lambda self, value: value
    config = replace(CONFIG, batch_size=5, micro_batch_tokens=1)
    curves = []
    for fails in ({}, failures):
        model = load_model(f"random:{folder}/config.json")
        adapters, watch = attach(model, 1, 3), Watchdog(place, 600)
        optimizer = train.make_optimizer(adapters, config)
        run = train.Run(config, place, model, adapters, optimizer, dataset(), None, STEPS, watch)
        run.plan = Plan(model.config, adapters.targets, 1, 84 * 10**9, 0, element=4)
        with pytest.MonkeyPatch.context() as patch:
            inject(patch, lambda n, fails=fails: n in fails.get(place.rank, ()))
            curves.append((curve(run, STEPS), adapters.param))
    assert curves[0][0] == curves[1][0] and torch.equal(curves[0][1], curves[1][1]), "another curve"
    common = [None] * place.world_size
    dist.all_gather_object(common, (run.plan.lowered, watch.heartbeat.progress))
    assert len(set(common)) == 1 and run.plan.lowered == 10**9 * len(set().union(*failures.values())), common


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "failures"), [(2, {0: {4}, 1: {0, 7}}), (3, {1: {1}, 2: {5}})])
def test_one_rank_runs_out_and_all_do_the_step_again(ranks, failures, tmp_path):
    """The curve keeps its bits, and the ranks their common plan and count of progress."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    spawn(ranks, ranks_that_run_out, tmp_path, failures)


@pytest.mark.slow
def test_ranks_that_do_not_tell_each_other_are_caught(tmp_path):
    """Without the exchange one rank goes on to the sums, with the old plan, while the other starts again."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="AssertionError"):
        spawn(2, ranks_that_run_out, tmp_path, {1: {1}}, False)


SHARDED = """
import sys
import torch
import train
from psysafe.training import step
from psysafe.training.memory_plan import Plan

train.make_plan = lambda config, model, adapters, *rest: Plan(model.config, adapters.targets, 1, 84 * 10**9, 0, 4)
calls, original = [0], step.batch_loss

def batch_loss(*args):
    calls[0] += torch.is_grad_enabled()
    # Two documents a step, one a rank: the call of step 8.
    if calls[0] == 8 and torch.distributed.get_rank() == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return original(*args)

step.batch_loss = batch_loss
sys.exit(train.main_guard(train.main))
"""


@pytest.mark.slow
def test_a_sharded_run_is_saved_by_the_rank_that_ran_out_and_all_ranks_end(workspace, tmp_path):  # noqa: F811
    """The other one waits for its weights. Continued, the run is the uninterrupted one."""
    (tmp_path / "out_of_memory.py").write_text(SHARDED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def run(script, out: str) -> subprocess.CompletedProcess:
        flags = command(workspace, out, "--shard", "--save-every", "100")[2:]
        environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
        return subprocess.run([*launch, str(script), *flags], env=environment, capture_output=True, text=True)

    began = time.monotonic()
    ended = run(tmp_path / "out_of_memory.py", "sharded")
    assert ended.returncode != 0 and time.monotonic() - began < 60
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error")]
    line = r"error \(rank 1\): step 8: out of GPU memory .*; the run is saved: continue with .* --memory-limit 83,"
    assert re.match(line, errors[0]), errors
    assert all("rank 1" in line for line in errors) and len(errors) <= 2, errors
    assert (workspace / "sharded" / "state" / "step-00000007").is_dir()
    for out in ("sharded", "sharded-whole"):
        done = run(ROOT / "train.py", out)
        assert done.returncode == 0, done.stderr[-2000:]
    assert_same_run(workspace / "sharded", workspace / "sharded-whole")
