"""Text in, text out: conversations become prompts, and what the engine continues them by becomes answers.

generator = Generator(model, tokenizer, Options(Sampling(temperature=0.6, top_k=20, top_p=0.95)))
for answer in generator.answers([[{"role": "user", "content": "..."}], ...]):
    answer.row, answer.reasoning, answer.answer
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from psysafe.data.tokenizer import THINK_END, Message, Tokenizer
from psysafe.generation.engine import Engine
from psysafe.generation.request import Event, Options, Request
from psysafe.generation.slots import MAX_SLOTS, choose_slots
from psysafe.generation.text import ANSWER, CLOSE, REASONING, Piece, TextSplitter
from psysafe.model.decoder import Qwen3_5
from psysafe.model.mixed_adapters import MixedAdapters
from psysafe.program import UserError

OnPiece = Callable[[int, Piece], None]  # (row, what is certain of its text)
TYPED_TOKENS = "control tokens such as <|im_end|>, which are taken for text"  # said of prompts that hold some
CLOSING = f"\n{THINK_END}\n\n"  # what the template puts between reasoning and answer


@dataclass(frozen=True)
class Answer:
    """What the model wrote for a row. finish_reason: "stop" at an end-of-text token, "length" at a limit."""

    row: int
    response: str
    reasoning: str
    answer: str
    finish_reason: str
    prompt_tokens: int
    new_tokens: int
    unfinished_thinking: bool  # the think block never closed: everything is reasoning, and there is no answer


class Generator:
    """A model and a tokenizer as one function from conversations to answers.

    The model must not change meanwhile: a CUDA graph goes on with the tensors and adapters that it was captured with.
    """

    def __init__(
        self,
        model: Qwen3_5,
        tokenizer: Tokenizer,
        options: Options | None = None,
        say: Callable[[str], object] | None = None,
        adapters: MixedAdapters | None = None,
    ):
        """say: where to report how much memory the slots take, whenever slots are made. adapters: those of the model
        that requests may name."""
        self.model, self.tokenizer, self.options, self.say = model, tokenizer, options or Options(), say
        self.adapters = adapters
        self.engine: Engine | None = None

    def encode(self, messages: Sequence[Message], tools: object = None) -> list[int]:
        """The conversation as the prompt's ids. UserError for one that the chat template refuses."""
        return self.tokenizer.encode_chat(messages, True, self.options.thinking, tools)

    def adapter_named(self, name: str) -> str | None:
        """What a request says for an adapter, or the base, by the name that `attach_named` was given."""
        return name if self.adapters is not None and name in self.adapters.names else None

    def answers(
        self,
        conversations: Sequence[Sequence[Message]],
        rows: Sequence[int] | None = None,
        on_piece: OnPiece | None = None,
        tools: Sequence[object] | None = None,
    ) -> Iterator[Answer]:
        """Answers in the order in which they are finished. A row's number (default: 1, 2, ...) names its random
        numbers. on_piece(row, piece) sees an answer's text as soon as it is known. tools: what may be called in each
        conversation, None in those without."""
        rows = range(1, len(conversations) + 1) if rows is None else rows
        asked = zip(rows, conversations, tools or [None] * len(conversations), strict=True)
        return self.complete([Request(row, self.encode(messages, called)) for row, messages, called in asked], on_piece)

    def complete(self, requests: Sequence[Request], on_piece: OnPiece | None = None) -> Iterator[Answer]:
        """As `answers`, for prompts that are token ids already; how they are answered say the options of all.

        Raises UserError for a prompt that no slot can hold.
        """
        if not requests:
            return
        self._prepare(requests)
        requests = [replace(request, options=self.options) for request in requests]
        drafts = {request.row: Draft(request, self._splitter()) for request in requests}
        for event in self.engine.run(requests):
            if event.error is not None:
                raise event.error
            draft = drafts[event.row]
            for piece in draft.add(event):
                if on_piece is not None:
                    on_piece(event.row, piece)
            if draft.finish_reason:
                self.engine.cancel(event.row)  # the engine knows nothing of stop texts
                yield drafts.pop(event.row).answer()

    def _splitter(self) -> TextSplitter:
        return TextSplitter(self.tokenizer, self.options.thinking, self.options.stop)

    def _prepare(self, requests: Sequence[Request]) -> None:
        """An engine for these requests: the one that is there if it is large enough, else a new one."""
        options, limit = self.options, self.check(requests)
        wanted = min(len(requests), options.batch_size or MAX_SLOTS[self.model.embed_tokens.device.type])
        cache = self.engine and self.engine.cache
        if cache is not None and cache.max_tokens >= limit and cache.slots >= wanted:
            return
        self.engine = cache = None  # first of all: its cache is free memory for the next one
        slots = choose_slots(self.model, limit, wanted, exactly=options.batch_size > 0)
        of_run = options.prefill_tokens, options.deterministic, self.adapters
        self.engine = text_engine(self.model, self.tokenizer, slots, limit, *of_run)
        if self.say is not None:
            slot_mb = self.engine.cache.bytes_per_slot / 1e6
            total_mb = slots * slot_mb
            self.say(f"memory for {slots} x {limit:,} tokens: {slot_mb:,.1f} MB each, {total_mb:,.1f} MB in all")

    def check(self, requests: Sequence[Request]) -> int:
        """How many tokens a slot for any of these requests has to hold. Raises UserError for a prompt that none can."""
        options, longest = self.options, max(len(request.ids) for request in requests)
        positions = check_context(self.model, options.context)
        limit = options.context or min(longest + options.max_new_tokens, positions)
        for request in requests:
            if len(request.ids) >= limit:
                remedy = "raise --context or shorten it" if limit < positions else "the model's limit; shorten it"
                raise UserError(
                    f"{request.where}: {len(request.ids):,} tokens, but prompt and answer together have room for "
                    f"{limit:,}; {remedy}"
                )
        return limit


def text_engine(
    model: Qwen3_5,
    tokenizer: Tokenizer,
    slots: int,
    max_tokens: int,
    prefill_tokens: int = Options.prefill_tokens,
    deterministic: bool = False,
    adapters: MixedAdapters | None = None,
) -> Engine:
    """An engine whose answers and think blocks end as this tokenizer's do. The arguments are `Engine`'s."""
    ends = tokenizer.eos_ids, tokenizer.encode(CLOSING), tokenizer.think_end_id
    return Engine(model, slots, max_tokens, *ends, prefill_tokens, deterministic, adapters)


def check_context(model: Qwen3_5, context: int) -> int:
    """How many tokens the model was made for. Raises UserError where --context is more."""
    positions = model.config.max_position_embeddings
    if context > positions:
        raise UserError(f"--context {context:,}: the model was made for {positions:,} tokens at most")
    return positions


class Draft:
    """An answer while it is written."""

    def __init__(self, request: Request, splitter: TextSplitter):
        self.request, self.splitter = request, splitter
        self.pieces: list[Piece] = []
        self.n_tokens, self.finish_reason = 0, ""

    def add(self, event: Event) -> list[Piece]:
        """The pieces that the next token makes certain; all that is left once the answer has ended."""
        pieces = self.splitter.push(event.token)
        self.n_tokens += 1
        self.finish_reason = "stop" if self.splitter.stopped else event.finish
        if self.finish_reason:
            pieces += self.splitter.finish()
        self.pieces += pieces
        return pieces

    def answer(self) -> Answer:
        reasoning, end, answer = (
            "".join(piece.text for piece in self.pieces if piece.kind == kind) for kind in (REASONING, CLOSE, ANSWER)
        )
        return Answer(
            row=self.request.row,
            response=reasoning + end + answer,
            reasoning=reasoning.strip(),
            answer=answer.rpartition(THINK_END)[2].strip(),
            finish_reason=self.finish_reason,
            prompt_tokens=len(self.request.ids),
            new_tokens=self.n_tokens,
            unfinished_thinking=self.splitter.thinking,
        )
