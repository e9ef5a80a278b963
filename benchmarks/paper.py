"""The race on paper: a training step of transformers + PEFT and ours, executed without a GPU and counted alike.

    python benchmarks/paper.py [--tokens 4096] [--layers 64] [--gpu H100] [--as-written] [--out FILE]

Both run on PyTorch's meta device under the same recorder (psysafe/training/paper/trace.py) and are charged the same
rates. Attention, the delta rule and the convolution of transformers count as single kernels, as if flash-attention,
flash-linear-attention and causal-conv1d were installed, and the two cores take the time of ours: so the difference lies
in all the rest. With --as-written the delta rule and the convolution are counted as transformers writes them in torch.
Traced are 4 and 8 layers; from the difference follow the others. Nothing is measured.
"""

import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.baselines import LORA, architecture  # noqa: E402
from psysafe.checkpoint.base import build  # noqa: E402
from psysafe.cli import Parser, out_file, whole_number  # noqa: E402
from psysafe.files import write_atomic  # noqa: E402
from psysafe.model.config import ModelConfig  # noqa: E402
from psysafe.model.lora import attach  # noqa: E402
from psysafe.model.recompute import STAGES, recompute  # noqa: E402
from psysafe.program import UserError, main_guard  # noqa: E402
from psysafe.training.config import TrainConfig  # noqa: E402
from psysafe.training.paper.rates import PaperGPU, kind  # noqa: E402
from psysafe.training.paper.run import META, paper_run, trace_step  # noqa: E402
from psysafe.training.paper.trace import Op, Trace, record  # noqa: E402
from psysafe.training.roofline import SPEEDS  # noqa: E402
from psysafe.training.setup import make_optimizer  # noqa: E402

BLOCK = 4  # layers of the pattern: three delta-net, one attention
WORK = ("GEMM", "attention", "delta rule", "elementwise")


# Other people's fused kernels as one operation each, forward and backward: what goes in, comes out, and is saved. Only
# shapes are computed, on meta; whoever runs one on a real device gets an error instead of numbers.


@torch.library.custom_op("paper::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("on paper only")


@torch.library.custom_op("paper::attention_backward", mutates_args=())
def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("on paper only")


@torch.library.custom_op("paper::delta_rule", mutates_args=())
def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("on paper only")


@torch.library.custom_op("paper::delta_rule_backward", mutates_args=())
def delta_rule_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, A: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    raise NotImplementedError("on paper only")


@torch.library.custom_op("paper::conv", mutates_args=())
def conv(x: Tensor, weight: Tensor) -> Tensor:
    raise NotImplementedError("on paper only")


@torch.library.custom_op("paper::conv_backward", mutates_args=())
def conv_backward(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    raise NotImplementedError("on paper only")


attention.register_fake(lambda q, k, v: (torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)))
attention_backward.register_fake(lambda do, q, k, v, o, lse: tuple(map(torch.empty_like, (q, k, v))))
# A (B, T, H, 64): the inverse of every chunk's triangle.
delta_rule.register_fake(lambda q, k, v, g, beta: (torch.empty_like(v), v.new_empty(*v.shape[:-1], 64)))
delta_rule_backward.register_fake(lambda do, q, k, v, g, beta, A: tuple(map(torch.empty_like, (q, k, v, g, beta))))
conv.register_fake(lambda x, weight: torch.empty_like(x))
conv_backward.register_fake(lambda dy, x, weight: torch.empty_like(x))


def _save_attention(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)


def _save_delta_rule(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1])


attention.register_autograd(
    lambda ctx, do, _: attention_backward(do, *ctx.saved_tensors), setup_context=_save_attention
)
delta_rule.register_autograd(
    lambda ctx, do, _: delta_rule_backward(do, *ctx.saved_tensors), setup_context=_save_delta_rule
)
conv.register_autograd(
    lambda ctx, dy: (conv_backward(dy, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@contextmanager
def fused_kernels(as_written: bool) -> Iterator[None]:
    """transformers' calls of attention, delta rule and convolution go to the operations above."""
    from transformers import masking_utils
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    def sdpa(query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> Tensor:
        return attention(query, key, value)[0]

    def rule(query, key, value, g, beta, **kwargs) -> tuple[Tensor, None]:
        return delta_rule(query, key, value, g, beta)[0], None

    def short_conv(hidden_states, weight, bias=None, activation=None, **kwargs) -> Tensor:
        return conv(hidden_states, weight)

    patches = [
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", sdpa),
        # It looks at a value: on a GPU the host waits there in every forward pass. On meta it cannot.
        mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda *args, **kwargs: None),
    ]
    if not as_written:
        patches.append(mock.patch.object(modeling, "torch_chunk_gated_delta_rule", rule))
        patches.append(mock.patch.object(modeling, "causal_conv1d_fn", short_conv))
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def trace_peft(layers: int, tokens: int, checkpointing: bool, as_written: bool) -> Trace:
    """One row in bf16 with bf16 adapters: forward pass, loss of every token, backward pass; no optimiser."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    text = architecture(SimpleNamespace(type="cuda"), layers)
    config = Qwen3_5TextConfig(**{k: v for k, v in text.items() if k not in ("model_type", "dtype")})
    config._attn_implementation = "sdpa"
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with META:
            base = Qwen3_5ForCausalLM(config)
            model = get_peft_model(base, LoraConfig(**LORA), autocast_adapter_dtype=False)
    finally:
        torch.set_default_dtype(default_dtype)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=META)
    with fused_kernels(as_written), record(base.model, *model.parameters()) as trace:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
        loss.backward()
    return trace


def trace_ours(layers: int, tokens: int, checkpointing: bool) -> Trace:
    """The same work of ours. checkpointing: every stage is recomputed that can be."""
    config = TrainConfig(dtype="bfloat16", micro_batch_tokens=tokens)
    architecture_ = ModelConfig.from_dict(architecture(SimpleNamespace(type="cuda"), layers))
    model = build(architecture_, "meta", torch.bfloat16)
    adapters = attach(model, config.lora_rank, config.lora_alpha, config.lora_targets)
    for block in model.layers:
        recompute(block, STAGES if checkpointing else ())
    trace = trace_step(paper_run(config, model, adapters, make_optimizer(adapters, config), None, [tokens]))
    trace.ops = [op for op in trace.ops if op.phase != "optimizer"]
    return trace


@dataclass
class Count:
    """Of one contender, for all layers. saved: bytes at the peak beside weights and optimiser."""

    kernels: float
    gemm_tflop: float
    gb: float
    saved_gb: float
    ms: dict[str, float]

    def extended(self, larger: "Count", blocks: float) -> "Count":
        """This one and `blocks` times the difference to a larger one."""

        def line(a: float, b: float) -> float:
            return a + blocks * (b - a)

        ms = {name: line(self.ms[name], larger.ms[name]) for name in WORK}
        numbers = (line(getattr(self, f), getattr(larger, f)) for f in ("kernels", "gemm_tflop", "gb", "saved_gb"))
        return Count(*numbers, ms)


def work_of(op: Op) -> str:
    names = {"paper::attention": "attention", "paper::delta_rule": "delta rule"}
    name = next((work for prefix, work in names.items() if op.name.startswith(prefix)), kind(op))
    return name if name in WORK else "elementwise"


def count(trace: Trace, gpu: PaperGPU) -> Count:
    ms = dict.fromkeys(WORK, 0.0)
    for op in trace.ops:
        ms[work_of(op)] += 1e3 * gpu.seconds(op)
    gemm = sum(op.flops for op in trace.ops if work_of(op) == "GEMM")
    traffic = sum(op.bytes for op in trace.ops)
    return Count(len(trace.ops), gemm / 1e12, traffic / 1e9, (trace.peak - trace.fixed) / 1e9, ms)


def race(tokens: int, layers: int, gpu: PaperGPU, as_written: bool) -> dict[str, Count]:
    """Contender -> its counts, all layers."""
    results = {}
    for checkpointing in (False, True):
        mode = "checkpointed" if checkpointing else "everything saved"
        makers = {
            "ours": lambda n, c=checkpointing: trace_ours(n, tokens, c),
            "transformers + PEFT": lambda n, c=checkpointing: trace_peft(n, tokens, c, as_written),
        }
        for name, trace in makers.items():
            small, large = (count(trace(n), gpu) for n in (BLOCK, 2 * BLOCK))
            results[f"{name}, {mode}"] = small.extended(large, (layers - BLOCK) / BLOCK)
        if not as_written:  # the two cores at our kernels' time for both
            ours = results[f"ours, {mode}"].ms
            results[f"transformers + PEFT, {mode}"].ms |= {name: ours[name] for name in ("attention", "delta rule")}
    return results


def table(results: dict[str, Count]) -> str:
    columns = ("kernels", "GEMM TFLOP", "GB moved", "GB saved", *WORK, "ms on paper", "measured")
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, x in results.items():
        numbers = [f"{x.kernels:,.0f}", f"{x.gemm_tflop:,.1f}", f"{x.gb:,.0f}", f"{x.saved_gb:,.1f}"]
        numbers += [f"{x.ms[work]:,.0f}" for work in WORK]
        lines.append(f"| {name} | " + " | ".join([*numbers, f"{sum(x.ms.values()):,.0f}", "not measured"]) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    parser = Parser(description="A training step on paper: transformers + PEFT and ours.")
    parser.add_argument("--tokens", type=whole_number, default=4096, help="of the one row (4096)")
    parser.add_argument("--layers", type=whole_number, default=64, help="a multiple of 4 (64)")
    parser.add_argument("--gpu", choices=SPEEDS, default="H100")
    parser.add_argument("--as-written", action="store_true", help="delta rule and convolution as written in torch")
    parser.add_argument("--out", type=out_file, metavar="FILE", help="also write the counts as JSON")
    args = parser.parse_args(argv)
    if args.layers % BLOCK:
        raise UserError(f"--layers {args.layers}: expected a multiple of {BLOCK}, the layers that repeat")
    if args.tokens < 2:  # nothing predicts the first one
        raise UserError(f"--tokens {args.tokens}: expected 2 or more")
    warnings.filterwarnings("ignore")
    results = race(args.tokens, args.layers, PaperGPU(args.gpu, args.tokens), args.as_written)
    print(table(results))
    if args.out:
        document = {"on_paper": True, "tokens": args.tokens, "layers": args.layers, "gpu": args.gpu}
        counts = {name: asdict(x) for name, x in results.items()}
        write_atomic(Path(args.out), json.dumps(document | {"as_written": args.as_written, "counts": counts}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
