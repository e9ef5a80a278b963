"""The sizes at which tests/kernels/test_triton.py tries each operation: odd lengths, masked blocks, other ranks."""

from typing import NamedTuple

from kernels.proof.cases import attention_decode, causal_attention, gated_delta_rule


class Trial(NamedTuple):
    """sizes: compared with fp64. mutant: rejects every mutant. rounded: shows where 16 bits are rounded. adapter: the
    size at which the outputs `terms` show the adapter's term alone, at rank 1 and at one that is not fused.
    """

    sizes: list[dict]
    mutant: dict
    rounded: dict | None = None
    adapter: dict | None = None
    terms: tuple[str, ...] = ()


def small(cases) -> list[dict]:
    """The cases that the interpreter can run, of which one (marked slow) is longer than a checkpoint of 16 chunks."""
    return [case for case in cases if sum(case["lengths"]) < 1100 and case.get("key_heads", 1) < 16]


TRIALS = {
    "residual_rms_norm": Trial(
        [
            {"T": 1, "D": 64, "J": 1},
            {"T": 63, "D": 64, "J": 2},
            {"T": 64, "D": 40, "J": 3},
            {"T": 65, "D": 64, "J": 0},
            {"T": 5, "D": 1100, "J": 3},  # two pieces, the second one masked
            {"T": 5, "D": 2560, "J": 2, "strided": True},  # three pieces
            {"T": 9, "D": 64, "J": 4, "rank": 4},  # more than is fused: the plain terms
            {"T": 9, "D": 48, "J": 2, "rank": 0, "strided": True},
            {"T": 9, "D": 64, "J": 3, "pending": False, "strided": True},  # backward reads the caller's own h
            {"T": 9, "D": 64, "J": 0, "rank": 0, "pending": False},
        ],
        mutant={"T": 5, "D": 40, "J": 2},
        rounded={"T": 33, "D": 64, "J": 2},
        adapter={"T": 9, "D": 64, "J": 1},
        terms=("h_out",),
    ),
    "qk_norm_rope": Trial(
        [
            {"T": 1, "H": 2, "G": 1, "K": 32, "P": 4},
            {"T": 63, "H": 2, "G": 1, "K": 32, "P": 4},
            {"T": 64, "H": 1, "G": 1, "K": 24, "P": 3},  # no powers of two
            {"T": 65, "H": 1, "G": 1, "K": 32, "P": 16, "rank": 0},  # every dim rotated
            {"T": 4, "H": 4, "G": 2, "K": 64, "P": 8, "strided": True},
            {"T": 4, "H": 3, "G": 1, "K": 128, "P": 16, "rank": 4},  # the plain term
            {"T": 4, "H": 2, "G": 2, "K": 256, "P": 32, "strided": True},
        ],
        mutant={"T": 5, "H": 2, "G": 1, "K": 24, "P": 3},
        rounded={"T": 17, "H": 2, "G": 1, "K": 32, "P": 4},
        adapter={"T": 9, "H": 2, "G": 1, "K": 32, "P": 4},
        terms=("gate", "v"),
    ),
    "causal_attention": Trial(
        small(causal_attention.CASES),
        mutant=small(causal_attention.CASES)[1],
        rounded={"lengths": [33, 100], "heads": 2, "kv_heads": 1, "head_dim": 64},
    ),
    "attention_decode": Trial(small(attention_decode.CASES), mutant=small(attention_decode.CASES)[0]),
    "sigmoid_gate": Trial(
        [
            {"T": 1, "F": 64, "J": 1},
            {"T": 63, "F": 64, "J": 0},
            {"T": 64, "F": 40, "J": 3},
            {"T": 65, "F": 48, "J": 1, "strided": True},
            {"T": 5, "F": 1100, "J": 1},  # two pieces, the second one masked
            {"T": 5, "F": 2100, "J": 4, "strided": True},  # more rows than are fused: the plain projection
        ],
        mutant={"T": 5, "F": 40, "J": 1},
        rounded={"T": 33, "F": 64, "J": 1},
    ),
    "causal_conv1d_silu": Trial(
        [
            {"lengths": (1,), "splits": (8, 8, 24)},
            {"lengths": (2, 1, 3, 1, 9), "splits": (8, 4, 24), "strided": True},
            {"lengths": (64,), "splits": (20,)},
            {"lengths": (33, 32), "splits": (24,), "taps": 3},
            {"lengths": (1, 2, 1, 5), "splits": (8, 24), "state": True, "strided": True},
            # a split of two column blocks beside one that is smaller than a block
            {"lengths": (5, 2), "splits": (1100, 8), "taps": 2},
        ],
        mutant={"lengths": (3, 9, 4), "splits": (8, 8, 24)},
    ),
    "causal_conv1d_silu_step": Trial(
        [
            {"batch": 1, "channels": 64},
            {"batch": 3, "channels": 300, "strided": True},  # two blocks, the second one masked
            {"batch": 2, "channels": 256, "taps": 2},
            {"batch": 5, "channels": 7, "taps": 5, "strided": True},
        ],
        mutant={"batch": 2, "channels": 40},
        rounded={"batch": 3, "channels": 300},
    ),
    # Two documents, two key heads with two value heads each, states: every mutant has something to get wrong.
    "gated_delta_rule": Trial(small(gated_delta_rule.CASES), mutant=gated_delta_rule.CASES[-1]),
    "gated_rms_norm": Trial(
        [
            {"T": 1, "H": 2, "V": 32, "J": 1},
            {"T": 63, "H": 2, "V": 32},
            {"T": 64, "H": 3, "V": 24, "J": 3},
            {"T": 65, "H": 1, "V": 16, "J": 1, "strided": True},
            {"T": 4, "H": 20, "V": 128, "J": 1, "strided": True},  # three pieces of eight heads, the last one masked
            {"T": 4, "H": 20, "V": 128},  # two programs share a row
            {"T": 5, "H": 3, "V": 32, "J": 4},  # more rows than are fused: the plain projection
        ],
        mutant={"T": 5, "H": 3, "V": 24, "J": 1},
        rounded={"T": 33, "H": 2, "V": 32, "J": 1},
    ),
    "swiglu": Trial(
        [
            {"T": 1, "I": 40, "rank": 1},
            {"T": 63, "I": 40, "rank": 1, "strided": True},
            {"T": 64, "I": 33, "rank": 0},
            {"T": 65, "I": 40, "rank": 4},
            {"T": 5, "I": 1100, "rank": 1},  # two column blocks: the row sums come in parts
        ],
        mutant={"T": 9, "I": 40, "rank": 1},
        adapter={"T": 9, "I": 40},
        terms=("x",),
    ),
    "linear_cross_entropy": Trial(
        [
            {"T": 1, "D": 16, "vocab": 100},
            {"T": 65, "D": 24, "vocab": 64},
            {"T": 63, "D": 24, "vocab": 101},
            {"T": 5, "D": 16, "vocab": 8209},  # two blocks of columns, the second nearly empty
        ],
        mutant={"T": 7, "D": 24, "vocab": 101},
    ),
    "linear_kl": Trial(
        [
            {"T": 1, "D": 16, "vocab": 100},
            {"T": 17, "D": 24, "vocab": 64},  # three chunks
            {"T": 63, "D": 24, "vocab": 101},
            {"T": 5, "D": 16, "vocab": 8209},  # three blocks of columns, the last one nearly empty
        ],
        mutant={"T": 7, "D": 24, "vocab": 7},  # few words: the last one counts in bf16, too
        rounded={"T": 33, "D": 24, "vocab": 101},
    ),
}
