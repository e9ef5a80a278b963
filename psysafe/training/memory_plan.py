"""The memory plan: what every layer saves for its backward pass and what it recomputes, so that a step just fits.

    plan = Plan(model.config, adapters.projections, adapters.rank, limit=84_000_000_000, fixed=53_840_000_000)
    plan.choose(Sizes.largest(tokens=4096, documents=4))     # what is recomputed, what is saved, the peak, the cost
    plan.apply(model, Sizes.of([650, 1200, 800]))            # before a micro-batch's forward pass; host work only

Counted is what the Triton kernels save, byte for byte (tests/test_memory.py compares with autograd's own count). Per
layer, five stages can be recomputed (psysafe/model/recompute.py). They are dropped cheapest first, by time per byte:
convolution and rotary embedding, then the delta rule, then the GEMMs of gate|up and of the mixer's input. Attention's
output is always saved. So is the residual stream, whose recomputation would need down_proj: 17,408 FLOP a byte, three
times the price of any other GEMM.
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
CONTEXT = 600_000_000  # of RESERVE, for CUDA's context (assumed, not measured); more beside torch is left free as well
RETRY_STEP = 1_000_000_000  # by how much the limit is lowered when a GPU runs out all the same (out_of_memory.py)
H100_MEMORY = SPEEDS["H100"].memory
SEGMENT = 1024  # tokens between two saved states of the delta rule
MIN_LOSS_ROWS = 2048  # of a chunk of logits, if there are as many (kernels/ops/linear_cross_entropy.py)
MAX_FUSED_RANK = 3  # rows of A that the output gate's and the gated norm's kernels take (kernels/ops/_launch.py)
WORKSPACE = 110_000_000  # cuBLAS's workspaces, column sums of the adapters' gradients, schedules


class Sizes(NamedTuple):
    """What the sizes of a micro-batch's saved tensors depend on."""

    tokens: int
    chunks: int  # of 64 tokens, none across documents
    checkpoints: int  # saved states of the delta rule
    rows: int  # that feed a trained token
    base_rows: int = 0  # those of them that are compared with the base's (--kl-weight)

    @staticmethod
    def of(lengths: Iterable[int], rows: int | None = None, base_rows: int = 0) -> "Sizes":
        lengths = list(lengths)
        chunks, segments = (sum(-(-n // size) for n in lengths) for size in (DELTA_CHUNK, SEGMENT))
        tokens = sum(lengths)
        # A document's first segment starts at zero: no state is saved for it.
        return Sizes(tokens, chunks, segments - len(lengths), tokens if rows is None else rows, base_rows)

    @staticmethod
    def largest(tokens: int, documents: int, base_rows: int = 0) -> "Sizes":
        """The largest sizes that so many tokens in so many documents can have."""
        # Nothing predicts the first token.
        rows = max(1, tokens - 1)
        return Sizes(tokens, tokens // DELTA_CHUNK + documents, tokens // SEGMENT, rows, min(base_rows, rows))


@dataclass(frozen=True)
class Saved:
    """Bytes that one layer saves for its backward pass: `always`, and those of each stage unless it is recomputed."""

    always: int
    stages: dict[str, int]

    def __add__(self, other: "Saved") -> "Saved":
        return Saved(self.always + other.always, self.stages | other.stages)


class Choice(NamedTuple):
    """The choice for micro-batches of one size."""

    recomputed: tuple[frozenset[str], ...]  # stages by layer
    layers: tuple[int, ...]  # bytes saved by each layer
    saved: int  # bytes saved in all
    peak: int
    seconds: float  # of recomputation, at an H100's speed


def saved_bytes(
    config: ModelConfig, layer: int, sizes: Sizes, targets: Iterable[str], rank: int = 1, element: int = 2
) -> Saved:
    """What layer `layer` saves on the Triton path. element: bytes of an activation (2: bf16)."""
    return _LayerBytes(config, layer, sizes, frozenset(targets), rank, element).saved()


@dataclass(frozen=True)
class _LayerBytes:
    config: ModelConfig
    layer: int
    sizes: Sizes
    targets: frozenset[str]
    rank: int
    element: int

    def saved(self) -> Saved:
        is_attention = self.config.layer_types[self.layer] == "full_attention"
        saved = self.mlp() + (self.attention() if is_attention else self.delta_net())
        # The input norm adds the previous layer's down_proj term: it saves that u.
        return saved + Saved(self.u(self.sizes.tokens, "down_proj") if self.layer else 0, {})

    @property
    def rows(self) -> int:
        """Rows that pass the MLP: in the last layer only those that feed a trained token."""
        return self.sizes.rows if self.layer == self.config.num_hidden_layers - 1 else self.sizes.tokens

    def u(self, rows: int, *parts: str) -> int:
        """A fused layer's u has columns for each of its projections as soon as one of them has an adapter."""
        return 4 * rows * self.rank * len(parts) if self.targets & set(parts) else 0

    def stream(self, rows: int) -> int:
        """The residual stream and its inverse RMS."""
        return rows * (self.config.hidden_size * self.element + 4)

    def mlp(self) -> Saved:
        D, size, rows = self.config.hidden_size, self.config.intermediate_size, self.rows
        into, out = self.u(rows, "gate_proj", "up_proj"), self.u(rows, "down_proj")
        # The norm saves its input for its own gradient, which layer 0 does not need, and at rank 1 for dA.
        always = into + (self.stream(rows) if self.layer or self.rank == 1 else 0)
        if rows < self.sizes.tokens:
            always += 8 * rows  # their indices
        gate_up = rows * 2 * size * self.element
        # Above rank 1 the adapter is not fused and saves its operands in fp32: x where A is applied, and where B is,
        # the sum of GEMM and term. Nothing saves the GEMM's own output, so dropping it would free nothing.
        if self.rank > 1 and into:
            always, gate_up = always + 4 * rows * (D + 2 * size), 0
        if self.rank > 1 and out:
            always += 4 * rows * size
        return Saved(always, {"gate_up": gate_up})

    def attention(self) -> Saved:
        config, T = self.config, self.sizes.tokens
        into, out = self.u(T, "q_proj", "k_proj", "v_proj"), self.u(self.rows, "o_proj")
        # Attention's output and, for each head, the logarithm of its softmax's sum.
        core = T * (config.attention_out * self.element + 4 * config.num_attention_heads)
        always = self.stream(T) + into + out + core
        # The rotary kernel's outputs have the columns of its input.
        in_proj = rope = T * config.attention_in * self.element
        if self.rank > 1 and into:
            # As in the MLP; but the sum of GEMM and term, in fp32, belongs to the rotary stage. Dropping that stage
            # frees the sum and its outputs, and saves its input instead, until the input's own stage is dropped, too.
            always, rope = always + 4 * T * config.hidden_size, 4 * T * config.attention_in
        if self.rank > MAX_FUSED_RANK and out:
            always += 4 * T * config.attention_out
        return Saved(always, {"in_proj": in_proj, "rope": rope})

    def delta_net(self) -> Saved:
        config, T = self.config, self.sizes.tokens
        into = self.u(T, "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
        out = self.u(self.rows, "out_proj")
        if not (self.layer or into or out):
            return Saved(0, {})  # below the first adapter there is no backward pass
        always = into + out
        if self.layer:
            always += self.stream(T)
        if into:
            always += 4 * T * config.hidden_size
        if self.rank > MAX_FUSED_RANK and out:
            always += 4 * T * config.delta_out
        in_proj, conv, o = (T * n * self.element for n in (config.delta_in, config.conv_channels, config.delta_out))
        rule = o + delta_rule_states(config, self.sizes, self.element)
        return Saved(always, {"in_proj": in_proj, "conv": conv, "delta_rule": rule})


def delta_rule_states(config: ModelConfig, sizes: Sizes, element: int) -> int:
    """Two (64, 64) tiles a chunk and head; gates and norms of its tokens in fp32; the saved states in fp32."""
    H, dk, dv = config.state_shape
    tokens = sizes.chunks * DELTA_CHUNK
    tiles = tokens * (2 * H * DELTA_CHUNK * element + 4 * (3 * H + 2 * config.linear_num_key_heads))
    return tiles + sizes.checkpoints * H * dk * dv * 4


def loss_rows(rows: int, buffers: int = 1) -> int:
    """Rows of logits that exist at once: the chunks of kernels/ops/linear_cross_entropy.py, and of linear_kl.py."""
    return buffers * -(-rows // max(1, rows // (MIN_LOSS_ROWS // buffers)))


def tail_bytes(config: ModelConfig, sizes: Sizes, targets: Iterable[str], rank: int = 1, element: int = 2) -> int:
    """What is saved outside the layers: rotary angles, final norm, the loss's gradient, the base's hidden rows."""
    D, rows = config.hidden_size, sizes.rows
    u = 4 * rank * ("down_proj" in set(targets))
    saved = sizes.tokens * 4 * config.rotary_dim + rows * (D * element + 4 + u) + rows * D * element
    return saved + sizes.base_rows * D * element


def recompute_seconds(config: ModelConfig) -> dict[tuple[str, str], float]:
    """Seconds a token to recompute a stage on an H100, by layer type and stage."""
    D, speed = config.hidden_size, SPEEDS["H100"]
    norm = 2 * 2 * D / speed.bandwidth  # the GEMM's input x is recomputed with it
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
    """Chooses what is recomputed, for a micro-batch of any size, so that `limit` bytes are never exceeded.

    fixed: bytes that are there whatever the micro-batch: weights, adapter, optimiser.
    lowered: bytes below the limit that are aimed at since a GPU ran out of memory. What cannot be that small is tried
    at its smallest, as long as it keeps to the limit.
    """

    config: ModelConfig
    targets: tuple[str, ...]
    rank: int
    limit: int
    fixed: int
    element: int = 2
    lowered: int = 0

    def choose(self, sizes: Sizes) -> Choice:
        """The cheapest choice that fits; UserError with the numbers and the flags to change if none does."""
        config, layers = self.config, range(self.config.num_hidden_layers)
        saved = [saved_bytes(config, i, sizes, self.targets, self.rank, self.element) for i in layers]
        by_layer = [x.always + sum(x.stages.values()) for x in saved]
        total = sum(by_layer) + tail_bytes(config, sizes, self.targets, self.rank, self.element)
        rest = self.fixed + WORKSPACE + self.scratch(sizes)
        recomputed: list[set[str]] = [set() for _ in layers]
        seconds = 0.0
        # Start with everything saved; recompute the stages with the fewest seconds per byte until it fits.
        for price, i, stage in self._by_price(saved, sizes):
            if rest + total <= self.limit - self.lowered:
                break
            size = saved[i].stages[stage]
            recomputed[i].add(stage)
            by_layer[i], total, seconds = by_layer[i] - size, total - size, seconds + price * size
        if rest + total > self.limit:
            raise UserError(
                f"micro-batches of {sizes.tokens:,} tokens need {(rest + total) / 1e9:.1f} GB even with everything "
                f"recomputed that can be; {self.limit / 1e9:.1f} GB are free for it: lower --micro-batch-tokens (and "
                "--max-tokens, for a longer row stands alone), take --embedding cpu, or raise --memory-limit"
            )
        return Choice(tuple(map(frozenset, recomputed)), tuple(by_layer), total, rest + total, seconds)

    def _by_price(self, saved: list[Saved], sizes: Sizes) -> list[tuple[float, int, str]]:
        """(seconds a byte, layer, stage), cheapest first.

        At the same price early layers come first: when backward reaches them, the tensors of the late ones are gone.
        """
        seconds = recompute_seconds(self.config)
        return sorted(
            (seconds[self.config.layer_types[i], stage] * sizes.tokens / size, i, stage)
            for i, layer in enumerate(saved)
            for stage, size in layer.stages.items()
            if size
        )

    def scratch(self, sizes: Sizes) -> int:
        """Bytes in use at once beside what is saved, at most: one chunk of logits, or one layer's backward pass."""
        config, T = self.config, sizes.tokens
        D, size = config.hidden_size, config.intermediate_size
        logits = max(loss_rows(sizes.rows), loss_rows(sizes.base_rows, buffers=2)) * config.vocab_size
        # gate|up recomputed, its gradient, that of SwiGLU's output, and the stream's on both sides.
        mlp = T * (5 * size + 2 * D)
        # Recomputed: the mixer's input, q, k and v, and what the delta rule saves. Gradients of the gated norm's two
        # inputs, of q, k and v, and of the stream. R, S, dS, dP and Y of the delta rule; in fp32 its factors and dc.
        (H, dk, dv), G = config.state_shape, config.linear_num_key_heads
        delta = T * (config.delta_in + config.conv_channels + 3 * config.delta_out + 2 * config.delta_key + 2 * D)
        delta += sizes.chunks * (H * (2 * dk * dv + DELTA_CHUNK * dv) + 2 * G * DELTA_CHUNK**2)
        delta += sizes.chunks * H * 6 * DELTA_CHUNK * 4 // self.element
        delta += delta_rule_states(config, sizes, self.element) // self.element
        # Recomputed: the mixer's input, q, gate, k and v. Gradients of gate and o, of q, k and v, and of the stream; in
        # fp32 the parts of dk or dv, one for each query head of a group at most.
        parts = 2 * config.attention_out
        attention = T * (2 * config.attention_in + 3 * config.attention_out + 2 * config.attention_kv + 2 * D + parts)
        kinds = {"full_attention": attention, "linear_attention": delta}
        return self.element * max(logits, mlp, *(kinds[kind] for kind in set(config.layer_types)))

    def apply(self, model: Qwen3_5, sizes: Sizes) -> Choice:
        """Sets for every block of the model what backward recomputes, from the next forward pass on."""
        choice = self.choose(sizes)
        for block, stages in zip(model.layers, choice.recomputed, strict=True):
            recompute(block, stages)
        return choice

    def out_of_memory_error(self, step: int, out: str, error: Exception, saved: bool) -> UserError:
        """For a GPU that ran out of memory in spite of the plan. saved: by this rank, with all whole steps."""
        limit = self.limit - self.lowered
        lower_limit = (limit + RESERVE) / 1e9 - 2
        state = "the run is saved: continue" if saved else "continue from the last saved state"
        return UserError(
            f"step {step}: out of GPU memory with {limit / 1e9:.1f} GB planned for ({str(error).split('.')[0]}); "
            f"{state} with --out {out} --resume auto --memory-limit {lower_limit:.0f}, or lower "
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
            groups.setdefault((kind, choice.layers[i], choice.recomputed[i]), []).append(i)
        for (kind, size, recomputed), layers in groups.items():
            stages = ", ".join(name for name in STAGES if name in recomputed) or "nothing"
            which = f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers {layers[0]} to {layers[-1]}"
            name = {"full_attention": "attention", "linear_attention": "delta-net"}[kind]
            lines.append(
                f"{which + ', ' + name:<32}{size / sizes.tokens / 1e3:>7.1f} KB a token{size / 1e6:>9.1f} MB"
                f"  recomputed: {stages}"
            )
        lines.append(f"recomputed in {1e3 * choice.seconds:.0f} ms a micro-batch on an H100 (computed, not measured)")
        return lines
