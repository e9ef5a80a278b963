"""From logits to a token: penalties, temperature, top-k, top-p, min-p, and noise that depends on nothing but its name.

A token is drawn by the Gumbel-max trick: argmax over tokens of log p + G has exactly the distribution p when the G are
independent Gumbel numbers. G is a hash of (seed, row, position, token), not the next number of a generator. So the
draw of a row is the same whatever the batch, the slot, the order of the queue or the device; unlike one uniform number
and a running sum over the vocabulary it needs no order of the tokens; and rounding in the logits changes the token only
where two sums all but tie.

Letters: n rows, V vocabulary, k candidates.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from psysafe.cli import setting
from psysafe.files import read_json
from psysafe.program import UserError

MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the defaults choose the most likely one. Raises UserError for values out of range."""

    temperature: float = setting(0.0, "Divides the logits; 0 always takes the most likely token.")
    top_k: int = setting(0, "Only the k most likely tokens; 0 for all.")
    top_p: float = setting(1.0, "Only the most likely tokens that together reach this probability.")
    min_p: float = setting(0.0, "Only tokens at least this probable relative to the most likely one.")
    repetition_penalty: float = setting(1.0, "Makes tokens of the prompt and of the answer so far less likely.")
    presence_penalty: float = setting(0.0, "Subtracted from the logits of tokens of the answer so far.")
    seed: int = setting(0, "With the row and the position it fixes every random number.")

    def __post_init__(self):
        for name, fits, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "a number from 0 on"),
            ("top_k", self.top_k >= 0, "0 (all) or a positive number"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a positive number, 1 for none"),
            ("presence_penalty", -math.inf < self.presence_penalty < math.inf, "a number, 0 for none"),
            ("seed", 0 <= self.seed < 2**63, "0 to 2^63 - 1"),
        ):
            if not fits:
                raise UserError(f"{name.replace('_', '-')} is {getattr(self, name)}, expected {expected}")

    @property
    def penalises(self) -> bool:
        """Whether it matters which tokens a row has seen."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0


def recommended(folder: Path) -> dict:
    """The settings of `Sampling` in a model's generation_config.json. UserError without that file."""
    path = folder / "generation_config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no generation_config.json in it; give --temperature and the rest as flags")
    config, settings = read_json(path), {}
    for item in fields(Sampling):
        value = config.get(item.name)
        if value is not None:
            # JSON has one type of number: some writers have 20.0 for 20.
            if type(value) not in (int, float) or (item.type is int and value != value // 1):
                kind = "a whole number" if item.type is int else "a number"
                raise UserError(f"{path}: {item.name} is {value!r:.60}, expected {kind}")
            settings[item.name] = item.type(value)
    return settings if config.get("do_sample") else settings | {"temperature": 0.0}


def choose(
    logits: Tensor,
    sampling: Sampling,
    rows: Tensor,
    positions: Tensor,
    prompted: Tensor | None = None,
    written: Tensor | None = None,
) -> Tensor:
    """logits (n, V) -> tokens (n,) int64. rows, positions (n,) int64 name the random numbers.

    prompted, written (n, V) bool: the tokens of the prompt and of the answer so far; needed where sampling penalises.
    """
    # Penalties and the division by the temperature would round bf16 logits a second time.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if sampling.penalises:
        logits = penalised(logits, sampling, prompted, written)
    # After the penalties, which also change the most likely token.
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scores, tokens = candidates(logits, sampling)
    noise = gumbel(sampling.seed, rows, positions, tokens)
    return tokens.gather(1, (scores + noise).argmax(-1, keepdim=True)).squeeze(1)


def penalised(logits: Tensor, sampling: Sampling, prompted: Tensor, written: Tensor) -> Tensor:
    """Repetition penalty of CTRL (arXiv 1909.05858) over prompt and answer, presence penalty over the answer alone."""
    penalty = sampling.repetition_penalty
    # A negative logit is multiplied: divided, it would make the token more likely.
    repeated = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(prompted | written, repeated, logits) - sampling.presence_penalty * written


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """logits (n, V) -> scores (n, k), -inf where filtered, and their tokens (n, k). Filters in the order of
    transformers' warpers: temperature, top-k, top-p (arXiv 1904.09751), min-p (arXiv 2407.01082)."""
    vocab = logits.shape[1]
    if 0 < sampling.top_k < vocab:
        scores, tokens = logits.topk(sampling.top_k)
    elif sampling.top_p < 1:
        scores, tokens = logits.sort(descending=True)
    else:
        scores, tokens = logits, torch.arange(vocab, device=logits.device).expand_as(logits)
    # After top-k, which no division changes, so that it divides k numbers instead of V.
    scores = scores / sampling.temperature
    keep = torch.ones_like(scores, dtype=torch.bool)
    if sampling.top_p < 1:  # scores are sorted: a token stays while those before it have not reached top_p
        p = scores.softmax(-1)
        keep = p.cumsum(-1) - p < sampling.top_p
    if sampling.min_p > 0:
        keep &= scores >= scores.amax(-1, keepdim=True) + math.log(sampling.min_p)
    return scores.masked_fill(~keep, -math.inf), tokens


def gumbel(seed: int, rows: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Gumbel(0, 1) numbers (n, k) fp32, a function of seed, rows (n,), positions (n,) and tokens (n, k) alone."""
    # Two 32-bit keys a row and position: with one, 65,536 draws would suffice for two of them to share their noise.
    keys = []
    for salt in (0x9E3779B9, 0x7F4A7C15):
        key = _mix(_mix(torch.full_like(rows, salt ^ (seed & MASK))) ^ (seed >> 32))
        key = _mix(_mix(key ^ (rows & MASK)) ^ (rows >> 32))
        keys.append(_mix(key ^ positions)[:, None])
    bits = _mix(_mix(tokens ^ keys[0]) ^ keys[1])
    # All 32 bits: the smallest of V numbers decides, and fp32 is fine near 0. Above 1 - 2^-24 it would round to 1.
    u = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-u))


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words (held in int64) in which every bit depends on every bit.

    Multiply-xorshift with constants below 2^31, so that no product overflows int64.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & MASK
    return x ^ (x >> 15)
