"""From logits to a token: penalties, temperature, top-k, top-p, min-p, and noise that depends on nothing but its name.

A token is drawn by the Gumbel-max trick: argmax over tokens of log p + G has exactly the distribution p when the G are
independent Gumbel numbers. G is a hash of (seed, row, position, token), not the next number of a generator. So the
draw of a row is the same whatever the batch, the slot, the order of the queue or the device; unlike one uniform number
and a running sum over the vocabulary it needs no order of the tokens; and rounding in the logits changes the token only
where two sums all but tie.

Rows with different settings are chosen together, and each takes a path that its own settings name: greedy, among the
`WINDOW` likeliest, or among all tokens. So a row's token does not depend on the others, which only decide what paths a
step has to compute (`Paths`).

Letters: n rows, V vocabulary, k candidates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from psysafe.cli import setting
from psysafe.files import read_json
from psysafe.program import UserError

MASK = 0xFFFFFFFF
WINDOW = 64  # top-k up to here finds its candidates, ties among them, without sorting the vocabulary
MAX_LOGPROBS = 20
MIN_TEMPERATURE = 1e-6  # lower ones differ from 0 by no token, and logits divided by them may overflow
MAX_INTEGER = 2**63 - 1  # of a seed and of a number of tokens: both are kept as int64


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the defaults choose the most likely one. Raises UserError for values out of range."""

    temperature: float = setting(0.0, "Divides the logits; 0 always takes the most likely token.")
    top_k: int = setting(0, "Only the k most likely tokens and what ties with them; 0 for all.")
    top_p: float = setting(1.0, "Only the most likely tokens that together reach this probability.")
    min_p: float = setting(0.0, "Only tokens at least this probable relative to the most likely one.")
    repetition_penalty: float = setting(1.0, "Makes tokens of the prompt and of the answer so far less likely.")
    presence_penalty: float = setting(0.0, "Subtracted from the logits of tokens of the answer so far.")
    seed: int = setting(0, "With the row and the position it fixes every random number.")
    frequency_penalty: float = setting(0.0, "Subtracted from a token's logit for every time the answer has it.")

    def __post_init__(self):
        for name, fits, expected in (
            ("temperature", self.temperature == 0 or MIN_TEMPERATURE <= self.temperature < math.inf,
             f"0, or a number from {MIN_TEMPERATURE:g} on"),
            ("top_k", 0 <= self.top_k <= MAX_INTEGER, "0 (all) or a positive number below 2^63"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            # Far beyond any use, and far from where a logit in fp32 would overflow.
            ("repetition_penalty", 1e-6 <= self.repetition_penalty <= 1e6, "1e-6 to 1e6, 1 for none"),
            ("presence_penalty", -1e6 <= self.presence_penalty <= 1e6, "-1e6 to 1e6, 0 for none"),
            ("frequency_penalty", -1e6 <= self.frequency_penalty <= 1e6, "-1e6 to 1e6, 0 for none"),
            ("seed", 0 <= self.seed <= MAX_INTEGER, "0 to 2^63 - 1"),
        ):  # fmt: skip
            if not fits:
                raise UserError(f"{name.replace('_', '-')} is {getattr(self, name)}, expected {expected}")

    @property
    def penalises(self) -> bool:
        """Whether it matters which tokens a row has seen."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


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


class Paths(NamedTuple):
    """What some row of a step needs beside the likeliest token; a step computes nothing else."""

    window: bool = False  # candidates among the WINDOW likeliest
    vocabulary: bool = False  # candidates among all tokens
    ordered: bool = False  # these from the likeliest on: for top-p, and for a top-k beyond the window
    penalties: bool = False

    @classmethod
    def of(cls, sampling: Sampling) -> "Paths":
        sampled = sampling.temperature > 0
        window = sampled and 0 < sampling.top_k <= WINDOW
        vocabulary = sampled and not window
        return cls(window, vocabulary, vocabulary and (sampling.top_p < 1 or sampling.top_k > 0), sampling.penalises)

    def __or__(self, other: "Paths") -> "Paths":
        return Paths(*(a or b for a, b in zip(self, other, strict=True)))


class SamplingRows:
    """The settings of n rows: numbers (n, 6), in the dtype that logits are computed in, and integers (n, 3) int64."""

    def __init__(self, numbers: Tensor, integers: Tensor):
        self.all_numbers, self.all_integers = numbers, integers
        columns = numbers[..., None].unbind(1)  # each (n, 1)
        self.temperature, self.top_p, self.log_min_p, self.repetition, self.presence, self.frequency = columns
        self.seed, self.choice, self.top_k = integers.unbind(1)  # each (n,)

    @classmethod
    def of(cls, samplings: Sequence[Sampling], choices: Sequence[int], like: "SamplingRows | None" = None):
        """choices: what names the random numbers of each row beside its seed. like: whose dtype and device to take."""
        numbers = []
        for s in samplings:
            log_min_p = math.log(s.min_p) if s.min_p else -math.inf
            penalties = s.repetition_penalty, s.presence_penalty, s.frequency_penalty
            numbers.append((s.temperature, s.top_p, log_min_p, *penalties))
        integers = [(s.seed, choice, s.top_k) for s, choice in zip(samplings, choices, strict=True)]
        rows = cls(torch.tensor(numbers, dtype=torch.float64), torch.tensor(integers, dtype=torch.int64))
        return rows if like is None else cls(rows.all_numbers.to(like.all_numbers), rows.all_integers.to(like.choice))

    def __getitem__(self, at: Tensor | slice) -> "SamplingRows":
        return SamplingRows(self.all_numbers[at], self.all_integers[at])

    def __setitem__(self, at: Tensor, rows: "SamplingRows") -> None:
        self.all_numbers[at], self.all_integers[at] = rows.all_numbers, rows.all_integers


def choose(
    logits: Tensor,
    settings: SamplingRows,
    paths: Paths,
    positions: Tensor,
    prompted: Tensor | None = None,
    written: Tensor | None = None,
) -> Tensor:
    """logits (n, V) -> tokens (n,) int64. positions (n,) int64 name the random numbers, with seed and choice.

    paths: what some row needs. prompted (n, V) bool, written (n, V) int: whether a token stands in the prompt, and how
    often in the answer so far; needed where some row penalises.
    """
    # Penalties and the division by the temperature would round bf16 logits a second time.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if paths.penalties:
        logits = penalised(logits, settings, prompted, written)
    # After the penalties, which also change the most likely token.
    token = logits.argmax(-1)
    if not (paths.window or paths.vocabulary):
        return token
    sampled, in_window = settings.temperature[:, 0] > 0, (settings.top_k > 0) & (settings.top_k <= WINDOW)
    if paths.window:
        scores, tokens = logits.topk(min(WINDOW, logits.shape[1]))
        drawn = draw(filtered(scores, settings, ordered=True), tokens, settings, positions)
        token = torch.where(sampled & in_window, drawn, token)
    if paths.vocabulary:
        tokens = torch.arange(logits.shape[1], device=logits.device).expand_as(logits)
        scores, tokens = logits.sort(descending=True) if paths.ordered else (logits, tokens)
        drawn = draw(filtered(scores, settings, paths.ordered), tokens, settings, positions)
        token = torch.where(sampled & ~in_window, drawn, token)
    return token


def penalised(logits: Tensor, settings: SamplingRows, prompted: Tensor, written: Tensor) -> Tensor:
    """Repetition penalty of CTRL (arXiv 1909.05858) over prompt and answer; presence and frequency penalty over the
    answer alone: once for a token that it has, and once for every time."""
    # A negative logit is multiplied: divided, it would make the token more likely.
    repeated = torch.where(logits < 0, logits * settings.repetition, logits / settings.repetition)
    logits = torch.where(prompted | (written > 0), repeated, logits)
    return logits - settings.presence * (written > 0) - settings.frequency * written


def filtered(scores: Tensor, settings: SamplingRows, ordered: bool) -> Tensor:
    """Logits of candidates (n, k) -> scores (n, k), -inf where filtered. Filters in the order of transformers' warpers:
    temperature, top-k, top-p (arXiv 1904.09751), min-p (arXiv 2407.01082).

    ordered: the candidates are the likeliest, likeliest first; otherwise top-k and top-p are left out.
    """
    scores = scores / settings.temperature
    keep = scores >= scores.amax(-1, keepdim=True) + settings.log_min_p
    if ordered:
        top_k = settings.top_k[:, None]
        # What is as likely as the k-th stays, as in transformers: bf16 logits are often equal.
        kth = scores.gather(1, top_k.clamp(1, scores.shape[1]) - 1)
        scores = scores.masked_fill((top_k > 0) & (scores < kth), -math.inf)
        p = scores.softmax(-1)
        # A token stays while those before it have not reached top_p; their sum may round to 1 too early.
        keep &= (p.cumsum(-1) - p < settings.top_p) | (settings.top_p >= 1)
    return scores.masked_fill(~keep, -math.inf)


def draw(scores: Tensor, tokens: Tensor, settings: SamplingRows, positions: Tensor) -> Tensor:
    """scores (n, k) of tokens (n, k) -> one token a row (n,), with probability softmax(scores)."""
    noise = gumbel(settings.seed, settings.choice, positions, tokens)
    return tokens.gather(1, (scores + noise).argmax(-1, keepdim=True)).squeeze(1)


def log_probabilities(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits (n, V), tokens (n,) -> ln p of these tokens (n,), and (n, k) of the likeliest MAX_LOGPROBS with their ids.
    Of the model alone: before penalties, temperature and filters."""
    logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    top, ids = logp.topk(min(MAX_LOGPROBS, logits.shape[1]))
    return logp.gather(1, tokens[:, None]).squeeze(1), top, ids


def gumbel(seeds: Tensor, choices: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Gumbel(0, 1) numbers (n, k) fp32, a function of seeds, choices and positions (n,) and tokens (n, k) alone."""
    # Two 32-bit keys a row and position: with one, 65,536 draws would suffice for two of them to share their noise.
    keys = []
    for salt in (0x9E3779B9, 0x7F4A7C15):
        key = _mix(_mix((seeds & MASK) ^ salt) ^ (seeds >> 32))
        key = _mix(_mix(key ^ (choices & MASK)) ^ (choices >> 32))
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
