"""The training loop: its curve against PEFT + torch's AdamW, the freedom to cut batches, and what bad steps do."""

import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import get_cosine_schedule_with_warmup

import train
from kernels.proof.closeness import relative_error
from psysafe.data.documents import Dataset, Document, step_documents
from psysafe.model.lora import TARGETS, attach
from psysafe.runtime import Runtime
from psysafe.training import step as training_step
from psysafe.training.config import TrainConfig
from psysafe.training.run_log import RunLog, read_metrics
from psysafe.training.watchdog import Watchdog
from tests.oracles import both_models
from tests.test_lora import peft_model, peft_tensors
from tests.test_model import transformers_in_fp64

CONFIG = TrainConfig(batch_size=3, lr=1e-3, warmup_steps=5, seed=1, micro_batch_tokens=1000, optimizer="adamw")
STEPS = 30


def dataset(count=11, longest=60) -> Dataset:
    """Random documents of unlike lengths; about a third of the tokens is trained."""
    random = np.random.default_rng(0)
    documents = []
    for i in range(count):
        length = int(random.integers(3, longest))
        trained = np.arange(length) >= int(random.integers(1, length))
        documents.append(Document(random.integers(0, 97, length).astype(np.int32), trained, f"row {i}"))
    return Dataset(documents, longest, 0, 0)


def setup(folder, dtype=torch.float64, **changes):
    """Both models, PEFT's and ours with the same adapters, and our optimiser."""
    config = replace(CONFIG, **changes)
    reference, model = both_models(folder, dtype=dtype)
    peft = peft_model(reference, 1, TARGETS)
    adapters = attach(model, 1, 3, TARGETS)
    for name, x in peft_tensors(peft).items():
        adapters.tensors()[name].copy_(x)
    runtime = Runtime(torch.device("cpu"), dtype)
    optimizer, watch = train.make_optimizer(adapters, config), Watchdog(runtime, 600)
    run = train.Run(config, runtime, model, adapters, optimizer, dataset(), None, STEPS, watch)
    return run, peft


def curve(run: train.Run, steps=STEPS) -> list[float]:
    losses = []
    for run.step in range(steps):
        losses.append(train.train_step(run).read()["loss"])
    return losses


def peft_curve(peft, config, data) -> list[float]:
    """The recipe with the field's own parts: PEFT's model, torch's AdamW, clipping and transformers' schedule."""
    peft.double()
    parameters = [p for name, p in peft.named_parameters() if "lora_" in name]
    optimizer = torch.optim.AdamW(
        parameters, config.lr, (config.beta1, config.beta2), config.eps, weight_decay=config.weight_decay
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, STEPS)
    losses = []
    with transformers_in_fp64(peft.base_model.model):
        for step in range(STEPS):
            documents = [data.documents[i] for i in step_documents(len(data), step, config.batch_size, config.seed)]
            total, targets = 0.0, sum(document.n_targets for document in documents)
            optimizer.zero_grad()
            for document in documents:
                tokens = torch.from_numpy(document.tokens).long()
                labels = tokens.where(torch.from_numpy(document.trained), -100)[1:]
                logits = peft(tokens[None], use_cache=False).logits[0, :-1]
                loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / targets
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            schedule.step()
            losses.append(total)
    return losses


def compare_with_peft(tmp_path):
    run, peft = setup(tmp_path)
    ours, theirs = curve(run), peft_curve(peft, run.config, run.train_set)
    assert max(theirs) - min(theirs) > 0.01
    assert relative_error(torch.tensor(ours), torch.tensor(theirs)) <= 1e-7


def test_the_curve_equals_peft_and_torch_adamw(tmp_path):
    compare_with_peft(tmp_path)


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_shifted_mask_is_caught(shift, tmp_path, monkeypatch):
    """The mask of trained tokens moved by one: the curve is another one."""
    original = training_step.pack_share

    def wrong(documents, *share):
        return original([replace(d, trained=np.roll(d.trained, shift)) for d in documents], *share)

    monkeypatch.setattr(training_step, "pack_share", wrong)
    with pytest.raises(AssertionError):
        compare_with_peft(tmp_path)


def cuts(tmp_path, dtype, steps, limits=(1000, 70, 1)):
    for limit in limits:
        run, _ = setup(tmp_path / str(limit), dtype, micro_batch_tokens=limit)
        yield torch.tensor(curve(run, steps), dtype=torch.float64), run.adapters


def test_micro_batches_change_nothing(tmp_path):
    """fp64: one micro-batch, a few, one a document: the same 30 losses and the same adapter."""
    (whole, first), *others = cuts(tmp_path, torch.float64, STEPS)
    for losses, adapters in others:
        assert relative_error(losses, whole) <= 1e-9
        assert relative_error(adapters.param, first.param) <= 1e-9


def test_micro_batches_in_fp32(tmp_path):
    """fp32: the first step's loss and gradients."""
    (whole, first), *others = cuts(tmp_path, torch.float32, 1)
    for losses, adapters in others:
        assert relative_error(losses, whole) <= 1e-5
        for name, g in adapters.tensors(adapters.grad).items():
            assert relative_error(g, first.tensors(first.grad)[name]) <= 1e-5, name


def test_a_loss_averaged_per_micro_batch_is_caught(tmp_path, monkeypatch):
    original = training_step.batch_loss

    def wrong(model, batch, *rest):
        return original(model, batch, *rest) / len(batch.labels)

    monkeypatch.setattr(training_step, "batch_loss", wrong)
    with pytest.raises(AssertionError):
        test_micro_batches_change_nothing(tmp_path)


def test_a_step_without_a_finite_norm_changes_nothing(tmp_path, monkeypatch):
    """The adapter and the optimiser's state stay bit for bit; the next good step goes on as if nothing had been."""
    run, _ = setup(tmp_path, torch.float32, optimizer="adamw8bit")
    curve(run, 2)
    before = {"param": run.adapters.param.clone(), **{k: v.clone() for k, v in run.optimizer.state_tensors().items()}}
    original = training_step.batch_loss
    monkeypatch.setattr(training_step, "batch_loss", lambda *args: original(*args) * float("nan"))
    row = train.train_step(run).read()
    assert row["skipped"] == 1 and row["grad_norm"] != row["grad_norm"]
    after = {"param": run.adapters.param, **run.optimizer.state_tensors()}
    # Counters: [applied steps, skipped steps in a row].
    assert after.pop("counters").tolist() == [before.pop("counters")[0], 1]
    assert all(torch.equal(before[k], after[k]) for k in before)
    monkeypatch.setattr(training_step, "batch_loss", original)
    assert train.train_step(run).read()["skipped"] == 0
    assert not torch.equal(run.adapters.param, before["param"])


def test_eight_bit_state_trains(tmp_path):
    """Codes are uint8, and the curve stays near that of fp32 state."""
    run, _ = setup(tmp_path / "8", torch.float32, optimizer="adamw8bit")
    eight = curve(run)
    assert torch.uint8 in {x.dtype for x in run.optimizer.state_tensors().values()}
    run, _ = setup(tmp_path / "32", torch.float32)
    assert relative_error(torch.tensor(eight), torch.tensor(curve(run))) <= 0.02


class StopAfter:
    """A SIGTERM during the step that makes `steps` of them, or during the validation after it."""

    def __init__(self, run, steps: int, in_validation: bool = False):
        self.run, self.steps, self.in_validation = run, steps, in_validation

    @property
    def received(self) -> int:
        has_come = self.run.step >= self.steps and not (self.in_validation and self.run.validation_due)
        return signal.SIGTERM if has_come else 0


def run_loop(run, folder, monkeypatch, **stop):
    """(exit code, steps after which it validated, steps after which it saved and whether a validation was due)."""
    validated, saved = [], []
    monkeypatch.setattr(train, "validate", lambda run: validated.append(run.step) or {"val_loss": 1.0})
    monkeypatch.setattr(train, "save_run", lambda run, log: (log.sync(), saved.append((run.step, run.validation_due))))
    with RunLog(folder, run.config, run.runtime, run.total_steps) as log:
        code = train.train(run, log, StopAfter(run, **stop))
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, run.step + 1))
    return code, validated, saved


def test_a_stop_during_a_validation_ends_the_run_before_the_next_step(tmp_path, monkeypatch):
    run, _ = setup(tmp_path / "model", torch.float32)
    run.val_set = run.train_set
    code, validated, saved = run_loop(run, tmp_path, monkeypatch, steps=4, in_validation=True)
    assert (code, run.step, validated) == (143, 4, [0, 4]) and saved == [(0, False), (4, False), (4, False)]


@pytest.mark.parametrize(
    ("steps", "stopped_at", "validations", "saves"),
    [
        (6, 99, [0, 4, 6], [0, 3, 4, 6]),  # an epoch is 4 steps; a save every 3; after step 6 one save, not two
        (6, 2, [0], [0, 2]),
        (6, 3, [0], [0, 3]),  # a stop at a save of --save-every: one save
        (6, 4, [0], [0, 3, 4]),  # at an epoch's end: a validation takes minutes, torchrun kills after 30 s
        (6, 6, [0, 4], [0, 3, 4, 6]),  # during the last step: the validation is left to the resumed run
        (15, 99, [0, 4, 8, 12, 15], [0, 3, 4, 6, 8, 9, 12, 15]),  # step 12 ends an epoch and is a save's: one save
    ],
)
def test_when_the_loop_validates_saves_and_stops(steps, stopped_at, validations, saves, tmp_path, monkeypatch):
    run, _ = setup(tmp_path / "model", torch.float32, save_every=3)
    run.total_steps, run.val_set = steps, run.train_set
    code, validated, saved = run_loop(run, tmp_path, monkeypatch, steps=stopped_at)
    assert code == (128 + signal.SIGTERM if stopped_at <= steps else 0)
    assert validated == validations and [step for step, _ in saved] == saves
    ends = [*range(0, steps, 4), steps]  # of epochs, and of the run
    assert all(due == (step in ends and step not in validations) for step, due in saved)


def test_ranks_sum_once_before_the_memory_is_planned(tmp_path, monkeypatch):
    """NCCL takes its buffers at the first sum. After a backward pass that fills the GPU it would find no room."""
    events = []

    def make_plan(config, model, adapters, *rest):
        events.append("plan")
        assert not adapters.grad.any()
        return original(config, model, adapters, *rest)

    original = train.make_plan
    monkeypatch.setattr(train, "make_plan", make_plan)
    monkeypatch.setattr(Runtime, "sum", lambda self, *tensors: events.append([(x.shape, x.dtype) for x in tensors]))
    assert train.main(["--max-steps", "1", "--warmup-steps", "0", "--out", str(tmp_path / "run")]) == 0
    first, planned, step = events
    assert planned == "plan" and first == step and len(step) == 2
