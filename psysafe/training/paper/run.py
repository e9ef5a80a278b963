"""What is traced: one step of training, one prefill, one step of decoding, on a model without memory."""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from kernels.paper import H100_MULTIPROCESSORS, on_paper
from psysafe.data.documents import Dataset, Document
from psysafe.generation.engine import Engine
from psysafe.generation.request import Request
from psysafe.model.decoder import Qwen3_5
from psysafe.model.lora import Adapters
from psysafe.program import UserError
from psysafe.runtime import Runtime
from psysafe.training.config import TrainConfig
from psysafe.training.memory_plan import Plan
from psysafe.training.optim import AdamW
from psysafe.training.paper.trace import Trace, record
from psysafe.training.setup import Run
from psysafe.training.step import train_step
from psysafe.training.watchdog import Watchdog

META = torch.device("meta")
CUBLAS_WORKSPACE = 8 * 4096 * 1024  # bytes: CUBLAS_WORKSPACE_CONFIG=:4096:8, which psysafe/runtime.py sets


def parse_lengths(flag: str, words: Sequence[str]) -> list[int]:
    """["4096", "640x4"] -> the lengths of five documents. UserError for anything else."""
    lengths: list[int] = []
    for word in words:
        length, _, count = word.partition("x")
        if not (length.isdecimal() and (count or "1").isdecimal() and int(length) > 0 and int(count or 1) > 0):
            raise UserError(f"{flag} {word}: expected a length, or lengthxcount, such as 4096 or 640x4")
        lengths += [int(length)] * int(count or 1)
    return lengths


def documents_of(lengths: Sequence[int], untrained: int = 1) -> Dataset:
    """Documents of these lengths; the first `untrained` tokens of each are not trained (of a shorter one all but one).

    Nothing predicts a document's first token, so with 1 all are trained that can be.
    """
    documents = [
        Document(np.zeros(n, np.int32), np.arange(n) >= min(untrained, n - 1), f"document {i}")
        for i, n in enumerate(lengths)
    ]
    return Dataset(documents, max(lengths), 0, 0)


def paper_run(
    config: TrainConfig,
    model: Qwen3_5,
    adapters: Adapters,
    optimizer: AdamW,
    plan: Plan | None,
    lengths: Sequence[int],
    untrained: int = 1,
) -> Run:
    """A run whose first step is these documents, cut into micro-batches as the config says. Everything lies on meta,
    only an embedding may lie in host memory. plan None: nothing is recomputed."""
    config = replace(config, batch_size=len(lengths))
    runtime = Runtime(META, model.norm.dtype)
    watch = Watchdog(runtime, config.timeout)
    return Run(config, runtime, model, adapters, optimizer, documents_of(lengths, untrained), None, 1, watch, plan)


def trace_step(run: Run, multiprocessors: int = H100_MULTIPROCESSORS) -> Trace:
    """One optimiser step, by the function that the training loop calls."""
    workspace = torch.empty(CUBLAS_WORKSPACE, dtype=torch.uint8, device=META)
    fixed = run.adapters.param, run.adapters.grad, *run.optimizer.state_tensors().values(), workspace
    with record(run.model, *fixed, multiprocessors=multiprocessors) as trace:
        train_step(run)
    return trace


def host_seconds(run: Run) -> float:
    """CPU seconds that Python needs for a step that has been traced: nothing is launched, and nothing is recorded."""
    with on_paper(lambda launch: None):
        began = time.process_time()
        # The step's last act copies its loss to the host; only `record` can stand in for that.
        with contextlib.suppress(NotImplementedError):
            train_step(run)
        return time.process_time() - began


def trace_generation(model: Qwen3_5, prompts: Sequence[int], max_tokens: int) -> dict[str, Trace]:
    """The prefill of prompts of these lengths, and one decode step of as many sequences of max_tokens at most."""
    with torch.inference_mode(), record(model):
        engine = Engine(model, len(prompts), max_tokens, eos_ids=[0], prefill_tokens=sum(prompts))
    memory = [x for layer in engine.cache.layers for x in layer]
    for row, n in enumerate(prompts):
        engine.submit(Request(row, [0] * n))
    with torch.inference_mode():
        with record(model, *memory) as prefill:
            engine.prefill(engine.admit())
        with record(model, *memory) as decode:
            engine.step(max_tokens)
    return {"prefill": prefill, "decode": decode}
