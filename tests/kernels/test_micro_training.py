"""Two optimiser steps of a whole model whose every fused operation runs as Triton kernels, in Triton's interpreter.

The ops are proven one by one elsewhere; this shows that they fit together: dtypes, strides and adapter terms at the
layers, gradients through the whole stack, the optimiser behind them. configs/micro.json: four layers, two documents.
"""

from pathlib import Path

import pytest
import torch

import kernels
from kernels.proof.closeness import relative_error
from kernels.proof.registry import OPERATIONS
from psysafe import load_model
from psysafe.model.lora import attach
from psysafe.training.optim import AdamW

MICRO = Path(__file__).resolve().parents[2] / "configs" / "micro.json"
LENGTHS, STEPS, LR = (40, 27), 2, 1e-3
# Every operation of a training step. The others run in decoding alone, with --kl-weight, or where only the bench asks.
TRAINING = {
    *("residual_rms_norm", "qk_norm_rope", "causal_attention", "sigmoid_gate", "causal_conv1d_silu"),
    *("gated_delta_rule", "gated_rms_norm", "swiglu", "linear_cross_entropy", "adamw_8bit"),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not kernels.HAS_TRITON or torch.cuda.is_available(), reason="needs Triton's interpreter"),
]


def train() -> dict[str, torch.Tensor]:
    """Losses, norms and gradients of both steps and the adapter after them, by name; kernels as the switch has them."""
    model = load_model(f"random:{MICRO}", dtype=torch.float32)
    adapters = attach(model, rank=1, alpha=32, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, x in adapters.tensors().items():
        if name.endswith("lora_B"):  # as after some training: while B is zero, A gets no gradient
            x.copy_(0.02 * torch.randn(x.shape, generator=generator))
    optimizer = AdamW(
        *(adapters.param, adapters.grad, adapters.segments),
        **{"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "max_grad_norm": 1.0},
        **{"state_bits": 8, "min_8bit_size": 1},
    )
    tokens = torch.randint(model.config.vocab_size, (sum(LENGTHS),), generator=generator)
    documents = kernels.Documents(torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32))
    rows = torch.cat([torch.arange(b + n // 2, b + n - 1) for b, n in zip(documents.bounds, LENGTHS, strict=False)])
    results = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        hidden = model(tokens, documents, rows=rows)
        loss = kernels.linear_cross_entropy(hidden, model.head, tokens[rows + 1]) / len(rows)
        loss.backward()
        results[f"loss {step}"] = loss.detach()
        results |= {f"gradient {step} of {name}": g.clone() for name, g in adapters.tensors(adapters.grad).items()}
        optimizer.step(LR)
        results[f"norm {step}"] = optimizer.grad_norm
    return results | {f"adapter {name}": x.clone() for name, x in adapters.tensors().items()}


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PSYSAFE_KERNELS", "reference")
        return train()


def compare(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Losses and norms to 1e-5 and gradients to 1e-4, relative; adapters to 5 % of a step.

    Both sides are fp32, so gradients differ by the rounding of both, amplified by four layers. Adam divides every
    element's gradient by its own size: an element that is rounding noise throughout moves by noise.
    """
    worst = {}
    for name, x in expected.items():
        kind = name.split()[0]
        error = (actual[name] - x).abs().max().item() / LR if kind == "adapter" else relative_error(actual[name], x)
        worst[kind] = max(worst.get(kind, 0.0), error)
        limit = {"loss": 1e-5, "norm": 1e-5, "gradient": 1e-4, "adapter": 5e-2}[kind]
        assert error <= limit, f"{name}: {error:.1e}, limit {limit}"
    print(", ".join(f"{kind} {error:.1e}" for kind, error in worst.items()))


def test_two_steps_equal_the_reference(monkeypatch, expected):
    calls = set()

    def counted(name, op):
        def call(*args, **kwargs):
            calls.add(name)
            return op(*args, **kwargs)

        return call

    for op in OPERATIONS:
        monkeypatch.setattr(getattr(kernels, op.name), "triton", counted(op.name, op.triton))
    monkeypatch.setenv("PSYSAFE_KERNELS", "triton")
    compare(train(), expected)
    assert calls == TRAINING


@pytest.mark.parametrize(
    ("op", "mutant"),
    [
        ("causal_attention", "missing group sum"),
        ("causal_conv1d_silu", "no restart at documents"),
        ("swiglu", "adapter term dropped"),
        ("adamw_8bit", "no clipping"),
    ],
)
def test_one_wrong_op_is_caught(monkeypatch, expected, op, mutant):
    """All other ops run their references: what the comparison finds is the mutant."""
    for other in OPERATIONS:
        wrong = other.mutants[mutant] if other.name == op else other.reference
        monkeypatch.setattr(getattr(kernels, other.name), "triton", wrong)
    monkeypatch.setenv("PSYSAFE_KERNELS", "triton")
    with pytest.raises(AssertionError, match="limit"):
        compare(train(), expected)
