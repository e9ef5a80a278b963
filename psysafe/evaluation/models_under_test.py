"""The models under test: the base and adapters, each with each system prompt, and what they answer."""

import argparse
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from psysafe.checkpoint.adapter import BASE, attach_named, base_of_adapter, warn_of_other_base
from psysafe.checkpoint.base import load_model, resolve_model
from psysafe.checkpoint.peft_format import adapter_folder
from psysafe.cli import is_first_rank, progress, say, whole_number
from psysafe.data.chat_template import Message, chat_pieces, content_text, read_turns
from psysafe.data.prompts import system_text, with_system
from psysafe.data.rows import Row, prompt_messages
from psysafe.data.tokenizer import Tokenizer, load_tokenizer
from psysafe.data.tool_calls import read_calls, written_calls
from psysafe.generation.generator import TYPED_TOKENS, Answer, Generator
from psysafe.generation.ranks import Ranks
from psysafe.generation.request import Options, Request
from psysafe.generation.sampling import Sampling
from psysafe.hub import is_repository
from psysafe.journal import NOT_SHARED, Journal, key_of
from psysafe.model.decoder import Qwen3_5
from psysafe.program import UserError
from psysafe.runtime import start
from psysafe.training.config import resolve

SAVED = ("answer", "reasoning", "response", "finish_reason", "new_tokens", "unfinished_thinking")  # of an answer


class ShareAnswered(Exception):
    """This rank has answered its share of the questions. What is done with the answers rank 0 does alone."""


def only_rank_0() -> None:
    """Raises ShareAnswered on every other rank."""
    if not is_first_rank():
        raise ShareAnswered


class Variant(NamedTuple):
    """What is compared: an adapter (or BASE) with a system prompt (none, v0, v1, or a file)."""

    adapter: str
    system: str

    @property
    def name(self) -> str:
        return f"{Path(self.adapter).name}, {self.system}"


class Question(NamedTuple):
    """number: seeds the sampling of its answer, so it must not depend on what else is asked. messages: the conversation
    to answer; None for the prompt alone. tools: what may be called in it, as `tokenizer.encode_chat` takes them."""

    number: int
    prompt: str
    messages: tuple[dict, ...] | None = None
    tools: object = None

    @property
    def identity(self) -> list:
        """What its answer depends on."""
        conversation = [list(self.messages)] if self.messages else []
        return [self.number, self.prompt, *conversation, *([self.tools] if self.tools else [])]

    def turns(self) -> list[dict]:
        return list(self.messages or [{"role": "user", "content": self.prompt}])


@dataclass(frozen=True)
class ModelUnderTest:
    """A base model, where it runs, and how it writes."""

    model: str
    revision: str = ""
    device: str = "auto"
    dtype: str = "auto"
    options: Options = field(default_factory=Options)

    def load(self, variants: Sequence[Variant] = ()) -> tuple[Qwen3_5, Tokenizer]:
        """The model on its device, and its tokenizer. variants: whose adapters it is to run with; none is attached."""
        for adapter in dict.fromkeys(variant.adapter for variant in variants):
            if adapter != BASE:
                warn_of_other_base(adapter, self.model)
        runtime = start(self.device, self.dtype)
        # `start` asks for determinism, for which index_put would sort. Nothing here writes one place twice.
        torch.set_deterministic_debug_mode("default")
        folder, commit = resolve_model(self.model, self.revision)
        model = load_model(self.model, device=runtime.device, dtype=runtime.dtype, revision=commit or None)
        return model, load_tokenizer(folder)

    @property
    def identity(self) -> list:
        """What answers depend on besides adapter, system prompt and question: weights, number type, options."""
        folder, _ = resolve_model(self.model, self.revision)
        dtype = str(start(self.device, self.dtype).dtype)
        return [fingerprint(folder), Path(self.model).name, dtype, self.options.fingerprint_fields()]

    def weights_summary(self) -> dict:
        """For the settings of a result: the weights."""
        _, commit = resolve_model(self.model, self.revision)
        return {"model": self.model, "revision": commit}

    def summary(self) -> dict:
        """For the settings of a result: the weights, and how answers are written."""
        return self.weights_summary() | self.options.fingerprint_fields()

    def answers(
        self, variants: Sequence[Variant], questions: Sequence[Question], out: str | Path
    ) -> dict[Variant, dict[int, dict]]:
        """What each variant answers to each question: by number, the rows that `out` (JSONL) holds afterwards."""
        return self.answers_of(dict.fromkeys(variants, questions), out)

    def answers_of(
        self,
        asked_of: Mapping[Variant, Sequence[Question]],
        out: str | Path,
        generator: Callable[[], Generator] | None = None,
    ) -> dict[Variant, dict[int, dict]]:
        """As `answers`, where each variant has questions of its own. generator: gives what answers, for callers that
        ask several times; called where anything is left to answer. Without it the model is loaded here.

        A row has prompt, answer, reasoning, response, finish_reason, new_tokens and unfinished_thinking. It is written
        as soon as it is there. What `out` has already is not answered again, and if that is everything, no model is
        loaded. Several ranks share the work; rank 0 has the answers, the others nothing, and end in `only_rank_0`.
        """
        identity = self.identity
        # "answered": rows under "answer" were written before they said `unfinished_thinking`, and are asked again.
        keys = {}
        for variant, questions in asked_of.items():
            parts = "answered", identity, *variant_identity(variant)
            keys[variant] = {q.number: key_of(*parts, *q.identity) for q in questions}
        runtime = start(self.device, self.dtype)
        with Ranks(runtime) as ranks, ranks.in_order(lambda: Journal(out, runtime.rank)) as journal:
            asked = [(v, q) for v, questions in asked_of.items() for q in questions]
            asked = [(v, q) for v, q in asked if keys[v][q.number] not in journal.rows]
            ranks.agree([keys[v][q.number] for v, q in asked])
            if asked:
                self._answer(generator() if generator else self.generator(asked_of), asked, keys, journal, ranks)
            journal.collect(ranks.wait)
            if not runtime.is_main:
                return {}
            if n_missing := sum(key not in journal.rows for of_variant in keys.values() for key in of_variant.values()):
                raise UserError(f"{out}: {n_missing:,} {NOT_SHARED}")
            return {v: {number: journal.rows[key] for number, key in of.items()} for v, of in keys.items()}

    def generator(self, variants: Iterable[Variant]) -> Generator:
        """The loaded model, with the adapters of these variants attached."""
        variants = list(variants)
        # Those of all variants, also of the answered ones: the rounding must not depend on what a kill left to do.
        model, tokenizer = self.load(variants)
        adapters = attach_named(model, [variant.adapter for variant in variants])
        return Generator(model, tokenizer, self.options, adapters=adapters)

    def _answer(
        self,
        generator: Generator,
        asked: list[tuple[Variant, Question]],
        keys: dict[Variant, dict[int, str]],
        journal: Journal,
        ranks: Ranks,
    ) -> None:
        """Answers this rank's share of the questions, each as its variant, in one batch; every answer goes into the
        journal under its key."""
        requests, n_typed = [], 0
        systems = {name: system_text(name) for name in {variant.system for variant, _ in asked}}
        for i, (variant, question) in enumerate(asked):
            messages = with_system(question.turns(), systems[variant.system])
            ids, name = generator.encode(messages, question.tools), f"{variant.name}: prompt {question.number}"
            adapter = generator.adapter_named(variant.adapter)
            requests.append(Request(i, ids, name, choice=question.number, adapter=adapter))
            n_typed += generator.tokenizer.has_typed_tokens(messages, question.tools)
        if n_typed:
            say(f"{n_typed:,} of {len(asked):,} prompts hold {TYPED_TOKENS}")
        names = " and ".join(dict.fromkeys(variant.name for variant, _ in asked))
        generator.check(requests)
        requests = ranks.share(requests)
        with progress(len(requests), names, "answers") as bar:
            for answer in ranks.complete(generator, requests):
                variant, question = asked[answer.row]
                row = {"variant": variant.name, "number": question.number, "prompt": question.prompt}
                for field_name in SAVED:
                    row[field_name] = getattr(answer, field_name)
                journal.append(keys[variant][question.number], row)
                bar.update()


def answer_all(
    generator: Generator, conversations: Sequence[list[dict]], numbers: Sequence[int], description: str
) -> Iterator[Answer]:
    """The answers in the order in which they end, with a progress line. numbers: seed the sampling of each."""
    with progress(len(conversations), description, "answers") as bar:
        for answer in generator.answers(conversations, numbers):
            yield answer
            bar.update()


def fingerprint(folder: Path) -> str:
    """A folder's weights, config and tokenizer as a short name.

    Only sizes and the first megabyte of each file are read: that tells a newly trained model without reading 50 GB.
    """
    sha = hashlib.sha256()
    for path in sorted([*folder.glob("*config.json"), *folder.glob("*.safetensors"), *folder.glob("tokenizer.json")]):
        with open(path, "rb") as file:
            sha.update(f"{path.name} {path.stat().st_size}".encode() + file.read(1 << 20))
    return sha.hexdigest()[:20]


def variant_identity(variant: Variant) -> tuple[str, str | None]:
    """What answers depend on in a variant: (the adapter's weights, the text of the system prompt)."""
    if variant.adapter == BASE:
        return BASE, system_text(variant.system)
    folder = adapter_folder(variant.adapter)
    if not (folder / "adapter_config.json").exists():
        raise UserError(f"{variant.adapter}: no adapter_config.json in it; expected a run directory, or base")
    return fingerprint(folder), system_text(variant.system)


@dataclass
class VariantAnswers:
    """One variant's answers: rows with answer, cluster and unfinished_thinking, by exact prompt text."""

    is_base: bool  # answered without an adapter
    rows: dict[str, dict] = field(default_factory=dict)
    repeated: int = 0  # rows whose prompt stood in an earlier row

    def add(self, prompt: str, row: dict) -> None:
        """Of several answers to one prompt the first counts."""
        self.repeated += prompt in self.rows
        self.rows.setdefault(prompt, row)

    @property
    def unfinished_thinking(self) -> set[str]:
        """The prompts whose think block never closed."""
        return {prompt for prompt, row in self.rows.items() if row["unfinished_thinking"]}


def conversation(row: Row) -> list[Message]:
    """What of a row a model is asked, as generate.py asks it. UserError for what the chat template refuses."""
    try:
        if not isinstance(row.messages, list | None):
            raise UserError(f"messages is {row.messages!r:.60}, expected a list of messages")
        messages = prompt_messages(row)
        chat_pieces(read_turns(row.messages or messages), row.tools)
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from None
    return messages


def conversation_text(messages: Sequence[Message]) -> str:
    """A conversation as one text: its only message of a user, or all turns with their roles. No system message."""
    turns = [message for message in messages if message["role"] != "system"]
    texts = []
    for number, turn in enumerate(turns, 1):
        text = content_text(turn.get("content")) or ""
        texts.append(text + "".join(part for part, _ in written_calls(read_calls(turn, number), text)))
    if [turn["role"] for turn in turns] == ["user"]:
        return texts[0]
    return "\n\n".join(f"{turn['role']}: {text}" for turn, text in zip(turns, texts, strict=True))


def add_arguments(parser: argparse.ArgumentParser, max_new_tokens: int = 0, temperature: float = 0.0) -> None:
    """max_new_tokens: the usual length of an answer; 0 where none is written, and then no flag speaks of it."""
    group = parser.add_argument_group("model under test")
    group.add_argument("--model", metavar="DIR|HUB_ID", help="the base (default: the adapter's own, else the bundled)")
    group.add_argument("--revision", default="", metavar="COMMIT", help="commit or branch of a hub id")
    group.add_argument("--adapter", action="append", metavar="base|DIR", default=[],
                       help="a variant per adapter; base is none; may be given several times (base)")  # fmt: skip
    group.add_argument("--system", default="none", metavar="v0,v1,none,FILE", help="a variant per system prompt (none)")
    if max_new_tokens:
        group.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N",
                           help=f"tokens of an answer with its reasoning ({max_new_tokens})")  # fmt: skip
        group.add_argument("--temperature", type=float, default=temperature, metavar="X",
                           help=f"of sampling; 0 takes the likeliest token ({temperature:g})")  # fmt: skip
        group.add_argument("--batch-size", type=int, default=0, metavar="N", help="answers written at once (what fits)")
        group.add_argument("--seed", type=int, default=0, metavar="N", help="of all random numbers (0)")
    else:
        parser.set_defaults(max_new_tokens=1, temperature=0.0, batch_size=0, seed=0)
    group.add_argument("--thinking", action=argparse.BooleanOptionalAction, default=True,
                       help="the chat template opens a think block (yes)")  # fmt: skip
    group.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="(auto: cuda if there is one)")
    group.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float64"],
                       help="(auto: bfloat16 on cuda, else float32)")  # fmt: skip
    parser.add_argument("--limit", type=whole_number, default=0, metavar="N", help="only the first N rows")


FLAGS = ("--model", "--revision", "--adapter", "--system", "--max-new-tokens", "--temperature", "--batch-size",
         "--seed", "--thinking", "--no-thinking", "--device", "--dtype")  # fmt: skip


def without_effect(args: argparse.Namespace) -> dict[str, str]:
    """Flags that the model under test does not read."""
    return {} if args.temperature else {"--seed": "without a --temperature above 0: nothing is drawn at random"}


def from_arguments(args: argparse.Namespace) -> tuple[ModelUnderTest, list[Variant]]:
    """The model, and a variant for every pair of --adapter and --system."""
    # Without a draw the seed is none of what answers depend on: it may be another draw's.
    sampling = Sampling(temperature=args.temperature, seed=args.seed if args.temperature else 0)
    options = Options(sampling, args.max_new_tokens, thinking=args.thinking, batch_size=args.batch_size)
    adapters = args.adapter or [BASE]
    variants = [Variant(adapter, system) for adapter in adapters for system in args.system.split(",")]
    names = [variant.name for variant in variants]
    if len(set(names)) < len(names):
        raise UserError(f"two variants have one name among {'; '.join(names)}; adapters' folders need different names")
    # Without --model: the base that the first adapter names, and the bundled one without an adapter.
    named = [adapter for adapter in adapters if adapter != BASE]
    if args.model or not named:
        model, revision = args.model or resolve([])[0].model, ""
    else:
        model, revision = base_of_adapter(named[0])
    if args.revision and (revision or not is_repository(model)):
        why = f"{named[0]} names {revision} of {model}" if revision else f"{model} is no hub id"
        raise UserError(f"--revision has no effect: {why}; leave it out")
    return ModelUnderTest(model, revision or args.revision, args.device, args.dtype, options), variants
