"""What the engine is asked, and what it says: requests with options of their own, and an event for every token."""

from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from psysafe.cli import setting
from psysafe.generation.sampling import MAX_INTEGER, Sampling
from psysafe.program import UserError


@dataclass(frozen=True)
class RequestOptions:
    """How one prompt is continued. Raises UserError for values out of range."""

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = setting(2048, "Tokens of an answer, its reasoning included.")
    max_think_tokens: int = setting(0, "Reasoning longer than this is closed, and the answer begins; 0 for no limit.")
    thinking: bool = setting(True, "Let the model reason before it answers, as it has learnt to.")
    close_thinking_at_eos: bool = False  # an end token in the reasoning closes it instead, and the answer begins

    def __post_init__(self):
        self._check(max_new_tokens=1, max_think_tokens=0)

    def _check(self, **minimum: int) -> None:
        for name, least in minimum.items():
            if not least <= getattr(self, name) <= MAX_INTEGER:
                expected = f"expected at least {least}, and below 2^63"
                raise UserError(f"{name.replace('_', '-')} is {getattr(self, name)}, {expected}")


@dataclass(frozen=True)
class Options(RequestOptions):
    """How all prompts of a run are continued, and in how much memory; the defaults are those of `generate.py`."""

    batch_size: int = setting(0, "Sequences decoded together; 0 for what fits in memory, up to 64 (CPU: 8).")
    context: int = setting(0, "Tokens of prompt and answer together, at most; 0 for what is needed.")
    prefill_tokens: int = setting(4096, "Most prompt tokens in one forward pass; longer prompts are read in pieces.")
    deterministic: bool = setting(False, "Read prompts one by one: in bfloat16, too, other rows change no answer.")
    stop: tuple[str, ...] = ()  # texts that end an answer, and are no part of it; its reasoning may hold them

    def __post_init__(self):
        super().__post_init__()
        if not all(self.stop):
            raise UserError("stop is empty; expected a text that ends the answer")
        self._check(batch_size=0, context=0, prefill_tokens=1)

    def fingerprint_fields(self) -> dict:
        """What answers depend on, flat: how they are computed is not part of it.

        A setting that came later is named only where it is used, so that older files of answers go on counting.
        """
        fields = asdict(self) | asdict(self.sampling)
        for name in ("sampling", "batch_size", "prefill_tokens", "deterministic"):
            del fields[name]
        for name in ("stop", "close_thinking_at_eos", "frequency_penalty"):
            if not (value := fields.pop(name)):
                continue
            fields[name] = list(value) if name == "stop" else value
        return fields


@dataclass(frozen=True)
class Request:
    """A prompt to be continued."""

    row: int  # unique among the requests that an engine holds
    ids: list[int]
    name: str = ""  # in errors
    options: RequestOptions = field(default_factory=RequestOptions)
    choice: int | None = None  # with the seed and the position it names the random numbers; None: the row
    logprobs: int | None = None  # of so many of the likeliest tokens, beside the chosen one's; None for none at all
    adapter: str | None = None  # None: the model as it is
    adapter_scale: float = 1.0

    @property
    def where(self) -> str:
        return self.name or f"prompt {self.row}"


class Event(NamedTuple):
    """What became known of a row: its next token, or why its prompt could not be read.

    logprob: ln p of the token by the model alone, before penalties, temperature and filters; top_logprobs: (token,
    ln p), likeliest first.
    """

    row: int
    token: int | None  # None beside an error
    finish: str = ""  # "stop", "length" or "error" is the row's last event
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] | None = None
    error: Exception | None = None
