"""What a step leaves out: waits for the device, layer 0's mixer in backward, last-layer rows that train nothing."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

import kernels
import train
from psysafe.checkpoint.base import build
from psysafe.data.documents import Dataset, Document
from psysafe.model.lora import attach
from psysafe.runtime import Runtime
from psysafe.training import step as training_step
from psysafe.training.config import TrainConfig
from psysafe.training.memory_plan import Plan
from psysafe.training.setup import make_optimizer
from psysafe.training.watchdog import Watchdog
from tests.test_memory import CONFIG, FIXED
from tests.test_train import setup


def step_without_a_device(monkeypatch, limit=84 * 10**9):
    """A whole step of the 27B, memory plan and optimiser included, on tensors without memory and without launches:
    whatever would have to wait for a value on the device raises there, and so does an explicit wait.
    """

    def wait(*args):
        raise RuntimeError("the host waits for the device")

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(torch.cuda.Event, "synchronize", wait)
    monkeypatch.setattr(torch.cuda.Stream, "synchronize", wait)
    monkeypatch.setenv("PSYSAFE_KERNELS", "triton")
    monkeypatch.setattr(InterpretedFunction, "run", lambda *args, **kwargs: None)
    result = lambda began, fields, **scalars: SimpleNamespace(fields=fields, **scalars)  # noqa: E731
    monkeypatch.setattr(training_step, "StepResult", result)
    config = TrainConfig(micro_batch_tokens=1500)
    model = build(CONFIG, "meta", torch.bfloat16)
    adapters = attach(model, 1, 32)
    lengths = (700, 640, 1300, 65)
    documents = [Document(np.zeros(n, np.int32), np.arange(n) >= 30, "") for n in lengths]
    runtime = Runtime(torch.device("meta"), torch.bfloat16)
    return train.train_step(
        train.Run(
            config, runtime, model, adapters, make_optimizer(adapters, config), Dataset(documents, 4096, 0, 0), None,
            10, Watchdog(runtime, 600), plan=Plan(CONFIG, adapters.targets, 1, limit, FIXED),
        )
    )  # fmt: skip


@pytest.mark.skipif(not kernels.HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("limit", [84, 68])
def test_no_value_of_the_device_is_asked_for(monkeypatch, limit):
    """Also where backward makes everything again."""
    result = step_without_a_device(monkeypatch, limit * 10**9)
    assert result.loss.is_meta and result.skipped.is_meta and result.fields["tokens"] == 2705


@pytest.mark.skipif(not kernels.HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.item(),
        lambda x: bool(x > 0),
        lambda x: x[None].nonzero(),
        lambda x: x.cpu(),
        lambda x: x[None][x[None] > 0],
        lambda x: torch.cuda.synchronize(),
    ],
    ids=["item", "bool", "nonzero", "cpu", "mask", "synchronize"],
)
def test_a_wait_is_seen(monkeypatch, wait):
    original = training_step.batch_loss

    def waiting(*args):
        loss = original(*args)
        wait(loss)
        return loss

    monkeypatch.setattr(training_step, "batch_loss", waiting)
    with pytest.raises(RuntimeError):  # or NotImplementedError, which is one: a meta tensor has no value to wait for
        step_without_a_device(monkeypatch)


def test_gradients_are_those_of_backward_bit_for_bit(tmp_path):
    """All of them are added after a micro-batch; loss.backward() adds each as it comes, to the same numbers."""
    run, _ = setup(tmp_path, torch.float32, micro_batch_tokens=64)
    documents = training_step.documents_of_step(run)
    n_targets = training_step.count_targets(documents)
    training_step.backward(run, documents, n_targets)
    gradient = run.adapters.grad.clone()
    run.optimizer.zero_grad()
    batches = list(training_step.pack_share(documents, run.config.micro_batch_tokens, 0, 1))
    for batch in batches:
        (training_step.batch_loss(run.model, batch, run.runtime.device) / n_targets).backward()
    assert len(batches) > 1 and gradient.any() and torch.equal(gradient, run.adapters.grad)


def mixers_in_backward(run) -> list[int]:
    """The layers in whose mixer backward computes something."""
    seen = []
    for i, block in enumerate(run.model.layers):

        def watch(module, inputs, pending, i=i):
            if pending.y.requires_grad:
                pending.y.register_hook(lambda _: seen.append(i))

        block.mixer.register_forward_hook(watch)
    train.train_step(run)
    return sorted(set(seen))


def test_layer_0_s_mixer_has_no_backward_pass(tmp_path):
    """Nothing below its output is trained; in every other layer there is."""
    run, _ = setup(tmp_path, torch.float32)
    assert run.model.config.layer_types[0] == "linear_attention"
    assert mixers_in_backward(run) == list(range(1, len(run.model.layers)))


def test_an_adapter_in_layer_0_s_mixer_brings_it_back(tmp_path):
    """What the test above would see if it were not skipped."""
    run, _ = setup(tmp_path, torch.float32)
    run.adapters = attach(run.model, 1, 3, ["all-linear"])
    run.optimizer = make_optimizer(run.adapters, run.config)
    assert mixers_in_backward(run) == list(range(len(run.model.layers)))


def test_the_last_mlp_and_the_head_see_trained_rows_alone(tmp_path, monkeypatch):
    run, _ = setup(tmp_path, torch.float32)
    rows = []
    for block in run.model.layers:
        block.mlp.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    original = kernels.linear_cross_entropy
    monkeypatch.setattr(kernels, "linear_cross_entropy", lambda x, *args: rows.append(len(x)) or original(x, *args))
    fields = train.train_step(run).fields
    *whole, last, head = rows
    assert set(whole) == {fields["tokens"]} and last == head == fields["trained_tokens"] < fields["tokens"]
