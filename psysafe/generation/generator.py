"""Text in, text out: conversations become prompts, and what the engine continues them by becomes answers.

generator = Generator(model, tokenizer, Options(Sampling(temperature=0.6, top_k=20, top_p=0.95)))
for answer in generator.answers([[{"role": "user", "content": "..."}], ...]):
    answer.row, answer.reasoning, answer.answer
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from psysafe.data.tokenizer import THINK_END, Message, Tokenizer
from psysafe.generation.engine import LENGTH, STOP, Engine, OnToken, Options, Progress, Request
from psysafe.generation.slots import MAX_SLOTS, choose_slots
from psysafe.model.decoder import Qwen3_5
from psysafe.program import UserError

REASONS = {STOP: "stop", LENGTH: "length"}
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
    ):
        """say: where to report how much memory the slots take, whenever slots are made."""
        self.model, self.tokenizer, self.options, self.say = model, tokenizer, options or Options(), say
        self.engine: Engine | None = None

    def encode(self, messages: Sequence[Message], tools: object = None) -> list[int]:
        """The conversation as the prompt's ids. UserError for one that the chat template refuses."""
        return self.tokenizer.encode_chat(messages, True, self.options.thinking, tools)

    def answers(
        self,
        conversations: Sequence[Sequence[Message]],
        rows: Sequence[int] | None = None,
        on_token: OnToken | None = None,
        tools: Sequence[object] | None = None,
    ) -> Iterator[Answer]:
        """Answers in the order in which they are finished. A row's number (default: 1, 2, ...) names its random
        numbers. on_token(row, id) sees every token as soon as it is known. tools: what may be called in each
        conversation, None in those without."""
        rows = range(1, len(conversations) + 1) if rows is None else rows
        asked = zip(rows, conversations, tools or [None] * len(conversations), strict=True)
        return self.complete([Request(row, self.encode(messages, called)) for row, messages, called in asked], on_token)

    def complete(self, requests: Sequence[Request], on_token: OnToken | None = None) -> Iterator[Answer]:
        """As `answers`, for prompts that are token ids already. Raises UserError for one that no slot can hold."""
        if requests:
            self._prepare(requests)
            for progress in self.engine.run(requests, on_token, self._holds_stop if self.options.stop else None):
                yield self._answer(progress)

    def _prepare(self, requests: Sequence[Request]) -> None:
        """An engine for these requests: the one that is there if it is large enough, else a new one."""
        options, longest = self.options, max(len(request.ids) for request in requests)
        positions = self.model.config.max_position_embeddings
        if options.context > positions:
            raise UserError(f"--context {options.context:,}: the model was made for {positions:,} tokens at most")
        limit = options.context or min(longest + options.max_new_tokens, positions)
        for request in requests:
            if len(request.ids) >= limit:
                remedy = "raise --context or shorten it" if limit < positions else "the model's limit; shorten it"
                raise UserError(
                    f"{request.name or f'prompt {request.row}'}: {len(request.ids):,} tokens, but prompt and answer "
                    f"together have room for {limit:,}; {remedy}"
                )
        wanted = min(len(requests), options.batch_size or MAX_SLOTS[self.model.embed_tokens.device.type])
        cache = self.engine and self.engine.cache
        if cache is not None and cache.max_tokens >= limit and cache.slots >= wanted:
            return
        self.engine = cache = None  # first of all: its cache is free memory for the next one
        slots = choose_slots(self.model, limit, wanted, exactly=options.batch_size > 0)
        tokenizer = self.tokenizer
        closing = tokenizer.encode(CLOSING)
        self.engine = Engine(self.model, options, slots, limit, tokenizer.eos_ids, closing, tokenizer.think_end_id)
        if self.say is not None:
            slot_mb = self.engine.cache.bytes_per_slot / 1e6
            total_mb = slots * slot_mb
            self.say(f"memory for {slots} x {limit:,} tokens: {slot_mb:,.1f} MB each, {total_mb:,.1f} MB in all")

    def _holds_stop(self, progress: Progress) -> bool:
        """Whether the answer, without its reasoning, ends in a token that completes a stop text."""
        ids = progress.ids
        if self.options.thinking:
            if self.tokenizer.think_end_id not in ids:
                return False
            ids = ids[ids.index(self.tokenizer.think_end_id) + 1 :]
        # A token has one byte or more: a stop text that its last token completes began at most so many tokens ago.
        window = max(len(stop.encode()) for stop in self.options.stop)
        tail = self.tokenizer.decode(ids[-window:])
        return any(stop in tail for stop in self.options.stop)

    def _answer(self, progress: Progress) -> Answer:
        is_ended = progress.finish == STOP and progress.ids[-1] in self.tokenizer.eos_ids
        text = self.tokenizer.decode(progress.ids[:-1] if is_ended else progress.ids)
        reasoning, end, answer = text.partition(THINK_END) if self.options.thinking else ("", "", text)
        for stop in self.options.stop:
            answer = answer.partition(stop)[0]
        return Answer(
            row=progress.request.row,
            response=reasoning + end + answer,
            reasoning=reasoning.strip(),
            answer=answer.rpartition(THINK_END)[2].strip(),
            finish_reason=REASONS[progress.finish],
            prompt_tokens=len(progress.request.ids),
            new_tokens=len(progress.ids),
            unfinished_thinking=self.options.thinking and not end,
        )
