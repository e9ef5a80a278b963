"""The memory plan: what every layer keeps for its backward pass and what it makes again, so that a step just fits.

    plan = Plan(model.config, adapters.targets, adapters.rank, limit=84_000_000_000, fixed=53_840_000_000)
    plan.choose(Sizes.largest(tokens=4096, documents=4))     # what is dropped, what is kept, the peak, the cost
    plan.apply(model, Sizes.of([650, 1200, 800]))            # before a micro-batch's forward pass; host work only

Counted is what the Triton kernels save, byte for byte (tests/test_memory.py compares with autograd's own count), for
adapters of rank 1. Per layer, five calls can be made again (recompute.py). They are dropped cheapest first, by time per
byte: convolution and rotary embedding, then the delta rule, then the GEMMs of gate|up and of the mixer's input.
Attention's output is always kept, and so is the residual stream, whose recomputation would need down_proj: 17,408 FLOP
a byte, three times the price of any other GEMM.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from psysafe.model.config import DELTA_CHUNK, ModelConfig
from psysafe.model.decoder import Qwen3_5
from psysafe.model.recompute import STAGES, recompute
from psysafe.program import UserError
from psysafe.training.roofline import DELTA_RULE, SPEEDS

RESERVE = 1_000_000_000  # CUDA's context, which torch does not count, and gaps between allocations
H100_MEMORY = SPEEDS["H100"].memory
SEGMENT = 1024  # tokens between two saved states of the delta rule
LOSS_ROWS = 4095  # most rows of logits that exist at once (kernels/ops/linear_cross_entropy.py: chunks)
FUSED_ROWS = 3  # rows of A that the output gate's and the gated norm's kernels take (kernels/ops/_launch.py)
WORKSPACE = 150_000_000  # cuBLAS's workspaces, column sums of the adapters' gradients, schedules


class Sizes(NamedTuple):
    """What the sizes of a micro-batch's saved tensors depend on."""

    tokens: int
    chunks: int  # of 64 tokens, none across documents
    checkpoints: int  # saved states of the delta rule
    rows: int  # that feed a trained token

    @staticmethod
    def of(lengths: Iterable[int], rows: int | None = None) -> "Sizes":
        lengths = list(lengths)
        chunks, checkpoints = (sum(-(-n // size) for n in lengths) for size in (DELTA_CHUNK, SEGMENT))
        tokens = sum(lengths)
        return Sizes(tokens, chunks, checkpoints - len(lengths), tokens if rows is None else rows)

    @staticmethod
    def largest(tokens: int, documents: int) -> "Sizes":
        """The most that so many tokens in so many documents can need."""
        return Sizes(tokens, tokens // DELTA_CHUNK + documents, tokens // SEGMENT, tokens)


@dataclass(frozen=True)
class Saved:
    """Bytes that one layer keeps for its backward pass: `kept` always, and each stage's unless it is made again."""

    kept: int
    stages: dict[str, int]


class Choice(NamedTuple):
    """A plan for one size of micro-sizes."""

    dropped: tuple[frozenset[str], ...]  # by layer
    layers: tuple[int, ...]  # bytes kept by each layer
    saved: int  # bytes kept in all
    peak: int
    seconds: float  # time for what is made again, at an H100's speed


def saved_bytes(
    config: ModelConfig, layer: int, sizes: Sizes, targets: Iterable[str], rank: int = 1, element: int = 2
) -> Saved:
    """What layer `layer` saves on the Triton path. element: bytes of an activation (2: bf16)."""
    T, D, size = sizes.tokens, config.hidden_size, config.intermediate_size
    heads, values, keys = config.num_attention_heads, config.linear_num_value_heads, config.linear_num_key_heads
    rows = sizes.rows if layer == config.num_hidden_layers - 1 else T
    fused, targets = rank == 1, set(targets)

    def u(T: int, *parts: str) -> int:
        """A fused layer's u has a column for each of its projections as soon as one of them has an adapter."""
        return 4 * T * rank * len(parts) if targets & set(parts) else 0

    def stream(T: int) -> int:
        return T * (D * element + 4)  # the residual stream and its inverse RMS

    mlp, down = u(rows, "gate_proj", "up_proj"), u(rows, "down_proj")
    kept = (stream(rows) if layer or fused else 0) + mlp + (8 * rows if rows < T else 0)
    stages = {"gate_up": rows * 2 * size * element}
    # What is not fused keeps its operands in fp32: x where A is applied, the GEMM's output where B is.
    if not fused and mlp:
        kept, stages["gate_up"] = kept + 4 * rows * (D + 2 * size), 0
    kept += 4 * rows * size if not fused and down else 0
    if config.layer_types[layer] == "full_attention":
        into, out = u(T, "q_proj", "k_proj", "v_proj"), u(rows, "o_proj")
        kept += stream(T) + into + out + T * (config.attention_out * element + 4 * heads)
        # The rotary kernel's outputs have the columns of its input.
        stages |= {"in_proj": T * config.attention_in * element, "rope": T * config.attention_in * element}
        if not fused and into:
            kept, stages["in_proj"] = kept + 4 * T * (D + config.attention_in), 0
        if rank > FUSED_ROWS and out:
            kept += 4 * T * config.attention_out
    else:
        into, out = u(T, "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"), u(rows, "out_proj")
        if not (layer or into or out):
            return Saved(kept, stages)  # below the first adapter there is no backward pass
        kept += (stream(T) if layer else 0) + into + out + (4 * T * D if into else 0)
        if rank > FUSED_ROWS and out:
            kept += 4 * T * config.delta_out
        tiles = sizes.chunks * DELTA_CHUNK * (2 * values * DELTA_CHUNK * element + 4 * (3 * values + 2 * keys))
        states = sizes.checkpoints * values * config.linear_key_head_dim * config.linear_value_head_dim * 4
        stages |= {
            "in_proj": T * config.delta_in * element,
            "conv": T * config.conv_channels * element,
            "delta_rule": T * config.delta_out * element + tiles + states,
        }
    return Saved(kept + (u(T, "down_proj") if layer else 0), stages)


def tail_bytes(config: ModelConfig, sizes: Sizes, targets: Iterable[str], rank: int = 1, element: int = 2) -> int:
    """What is saved outside the layers: rotary angles, final norm, the loss's gradient."""
    D, rows = config.hidden_size, sizes.rows
    u = 4 * rank * ("down_proj" in set(targets))
    return sizes.tokens * 4 * config.rotary_dim + rows * (D * element + 4 + u) + rows * D * element


def again_seconds(config: ModelConfig) -> dict[tuple[str, str], float]:
    """Seconds a token to make a stage again on an H100, by layer type and stage."""
    D, speed = config.hidden_size, SPEEDS["H100"]
    norm = 2 * 2 * D / speed.bandwidth
    rule = config.useful_flops(context=0)["delta rule"].forward / max(1, config.delta_layers)

    def gemm(columns: int) -> float:
        return norm + 2 * D * columns / speed.gemm

    seconds = {
        ("full_attention", "rope"): 2 * 2 * config.attention_in / speed.bandwidth,
        ("full_attention", "in_proj"): gemm(config.attention_in),
        ("linear_attention", "conv"): 2 * 2 * config.conv_channels / speed.bandwidth,
        ("linear_attention", "delta_rule"): rule / DELTA_RULE.forward,
        ("linear_attention", "in_proj"): gemm(config.delta_in),
    }
    return seconds | {(kind, "gate_up"): gemm(2 * config.intermediate_size) for kind, _ in seconds}


@dataclass(frozen=True)
class Plan:
    """Chooses what is made again, for a micro-batch of any size, so that `limit` bytes are never exceeded.

    fixed: bytes that are there whatever the micro-batch: weights, adapter, optimiser.
    """

    config: ModelConfig
    targets: tuple[str, ...]
    rank: int
    limit: int
    fixed: int
    element: int = 2

    def choose(self, sizes: Sizes) -> Choice:
        """The cheapest choice that fits; UserError with the numbers and the flags to change if none does."""
        config, layers = self.config, range(self.config.num_hidden_layers)
        saved = [saved_bytes(config, i, sizes, self.targets, self.rank, self.element) for i in layers]
        kept = [x.kept + sum(x.stages.values()) for x in saved]
        total = sum(kept) + tail_bytes(config, sizes, self.targets, self.rank, self.element)
        beside = self.fixed + WORKSPACE + self.scratch(sizes)
        cost = again_seconds(config)
        # Early layers first: when backward comes to them, the late layers' tensors are gone.
        order = sorted(
            (cost[config.layer_types[i], name] * sizes.tokens / size, i, name)
            for i in layers
            for name, size in saved[i].stages.items()
            if size
        )
        dropped: list[set[str]] = [set() for _ in layers]
        seconds = 0.0
        for price, i, name in order:
            if beside + total <= self.limit:
                break
            size = saved[i].stages[name]
            dropped[i].add(name)
            kept[i], total, seconds = kept[i] - size, total - size, seconds + price * size
        if beside + total > self.limit:
            raise UserError(
                f"micro-batches of {sizes.tokens:,} tokens need {(beside + total) / 1e9:.1f} GB even with everything "
                f"made again that can be; {self.limit / 1e9:.1f} GB are free for it: lower --micro-batch-tokens (and "
                "--max-tokens, for a longer row stands alone), take --embedding cpu, or raise --memory-limit"
            )
        return Choice(tuple(map(frozenset, dropped)), tuple(kept), total, beside + total, seconds)

    def scratch(self, sizes: Sizes) -> int:
        """Most bytes in use at once beside what is saved: one chunk of logits, or one layer's backward pass."""
        config, T = self.config, sizes.tokens
        D, size = config.hidden_size, config.intermediate_size
        logits = min(sizes.rows, LOSS_ROWS) * config.vocab_size
        # gate|up made again, its gradient, that of SwiGLU's output, and the stream's on both sides.
        mlp = T * (5 * size + 6 * D)
        # The mixer's tensors made again and their gradients; R, S and dS of the delta rule.
        heads = config.linear_num_value_heads
        states = 2 * sizes.chunks * heads * config.linear_key_head_dim * config.linear_value_head_dim
        delta = T * (2 * (config.delta_in + config.conv_channels) + 4 * config.delta_out + 6 * D)
        delta += 2 * sizes.chunks * DELTA_CHUNK**2 * heads + states
        attention = T * (4 * config.attention_in + 3 * config.attention_out + 6 * D)
        kinds = {"full_attention": attention, "linear_attention": delta}
        return self.element * max(logits, mlp, *(kinds[kind] for kind in set(config.layer_types)))

    def apply(self, model: Qwen3_5, sizes: Sizes) -> Choice:
        """Sets for every block of the model what backward recomputes, from the next forward pass on."""
        choice = self.choose(sizes)
        for block, dropped in zip(model.layers, choice.dropped, strict=True):
            recompute(block, dropped)
        return choice

    def out_of_memory(self, step: int, out: str, error: Exception, saved: bool) -> str:
        """The message for a GPU that ran out of memory in spite of the plan. saved: with all steps before this one."""
        lower = (self.limit + RESERVE) / 1e9 - 2
        kept = "the run is saved: continue" if saved else "continue from the last saved state"
        return (
            f"step {step}: out of GPU memory with {self.limit / 1e9:.1f} GB planned for ({str(error).split('.')[0]}); "
            f"{kept} with --out {out} --resume auto --memory-limit {lower:.0f}, or lower "
            "--micro-batch-tokens, or take --embedding cpu"
        )

    def describe(self, sizes: Sizes) -> list[str]:
        """The plan for a reader: the peak and what it is made of, then layers of a kind in one line."""
        choice, config = self.choose(sizes), self.config
        lines = [
            f"at {sizes.tokens:,} tokens: predicted peak {choice.peak / 1e9:.2f} GB of {self.limit / 1e9:.2f} GB: "
            f"weights, adapter, optimiser {self.fixed / 1e9:.2f}, saved for backward {choice.saved / 1e9:.2f}, "
            f"scratch {(choice.peak - choice.saved - self.fixed) / 1e9:.2f}"
        ]
        groups: dict[tuple, list[int]] = {}
        for i, kind in enumerate(config.layer_types):
            groups.setdefault((kind, choice.layers[i], choice.dropped[i]), []).append(i)
        for (kind, size, dropped), layers in groups.items():
            again = ", ".join(name for name in STAGES if name in dropped) or "nothing"
            which = f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers {layers[0]} to {layers[-1]}"
            name = {"full_attention": "attention", "linear_attention": "delta-net"}[kind]
            lines.append(
                f"{which + ', ' + name:<32}{size / sizes.tokens / 1e3:>7.1f} KB a token{size / 1e6:>9.1f} MB"
                f"  made again: {again}"
            )
        lines.append(f"made again in {1e3 * choice.seconds:.0f} ms a micro-batch on an H100 (computed, not measured)")
        return lines
