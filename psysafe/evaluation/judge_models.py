"""Who judges: a model behind an endpoint, or one that runs here. Both take conversations and give texts."""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

from psysafe.endpoint import Endpoint, Outcome, Patience, key_from, run_items
from psysafe.evaluation.models_under_test import Subject
from psysafe.evaluation.result import say
from psysafe.generation.engine import Options
from psysafe.generation.generator import Generator
from psysafe.generation.sampling import Sampling
from psysafe.journal import Journal, key_of
from psysafe.program import UserError

KEY_VARIABLE = "PSYSAFE_JUDGE_KEY"


class EndpointJudge:
    """An OpenAI-compatible endpoint, asked for many items at once."""

    def __init__(self, endpoint: Endpoint, workers: int = 8):
        self.endpoint, self.workers = endpoint, workers
        self.identity = ["endpoint", endpoint.model, endpoint.options]
        self.name = endpoint.model
        self.settings = {"judge": endpoint.model, "judge url": endpoint.url, **endpoint.options}

    def ask(self, items: Mapping[str, list[dict]], out: str | Path) -> Outcome:
        """The reply to each conversation, {"text", "reasoning"}, by key; what `out` holds is not asked again."""

        def call(messages: list[dict]) -> dict:
            return self.endpoint.chat(messages)._asdict()

        return run_items(items, call, out, self.workers, self.name)


class LocalJudge:
    """A model of this architecture that runs here."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.identity = ["local", *subject.identity]
        self.name = Path(subject.model).name
        options = subject.options.fingerprint_fields()
        self.settings = {"judge": subject.model, **{f"judge {name}": value for name, value in options.items()}}

    def ask(self, items: Mapping[str, list[dict]], out: str | Path) -> Outcome:
        """As `EndpointJudge.ask`. A reply that was cut at the token limit, or never stopped reasoning, is failed."""
        with Journal(out) as journal:
            missing = [key for key in items if key not in journal.rows]
            failed, count, began, said = {}, 0, time.monotonic(), 0.0
            if missing:
                generator = Generator(*self.subject.loaded(), self.subject.options)
                # The key names the random numbers: a reply does not depend on which items are still missing.
                rows = {int(key[:15], 16): key for key in missing}
                for answer in generator.answers([items[key] for key in rows.values()], list(rows)):
                    key = rows[answer.row]
                    if answer.unfinished_thinking or answer.finish_reason == "length":
                        failed[key] = f"the reply was cut at {answer.new_tokens:,} tokens (--judge-tokens)"
                    elif not answer.answer.strip():
                        failed[key] = "the reply has no content"
                    else:
                        journal.append(key, {"text": answer.answer, "reasoning": answer.reasoning})
                    count, now = count + 1, time.monotonic()
                    if now - said > 2 or count == len(missing):
                        left = (now - began) / count * (len(missing) - count)
                        progress = f"{count:,} of {len(missing):,} items, {len(failed):,} failed"
                        say(f"{self.name}: {progress}, {left:,.0f} s left")
                        said = now
            journal.sync()
            return Outcome({key: journal.rows[key] for key in items if key in journal.rows}, failed)


Judge = EndpointJudge | LocalJudge


def add_arguments(parser: argparse.ArgumentParser, rules: str) -> None:
    """rules: what `--judge rules` means here."""
    group = parser.add_argument_group("judge", "one of --judge-url, --judge-local, --judge rules")
    group.add_argument("--judge", choices=["rules"], help=rules)
    group.add_argument("--judge-url", metavar="URL", help="an OpenAI-compatible endpoint")
    group.add_argument("--judge-model", metavar="NAME", help="the model to ask for there")
    group.add_argument("--judge-key-env", metavar="NAME", default=KEY_VARIABLE,
                       help=f"environment variable with the endpoint's key ({KEY_VARIABLE})")  # fmt: skip
    group.add_argument("--judge-local", metavar="DIR", help="a model folder or hub id to judge with, here")
    group.add_argument("--judge-tokens", type=int, default=4096, metavar="N", help="most tokens of a reply (4096)")
    group.add_argument("--workers", type=int, default=8, metavar="N", help="requests at once (8)")
    group.add_argument("--deadline", type=float, default=600, metavar="S", help="seconds for an item in all (600)")


def from_arguments(args: argparse.Namespace, temperature: float) -> Judge | None:
    """The judge that was asked for; None for the rules."""
    if sum(bool(x) for x in (args.judge, args.judge_url, args.judge_local)) != 1:
        raise UserError("expected one judge: --judge-url URL --judge-model NAME, --judge-local DIR, or --judge rules")
    if args.judge:
        return None
    if args.judge_local:
        options = Options(Sampling(temperature=temperature), max_new_tokens=args.judge_tokens)
        return LocalJudge(Subject(args.judge_local, options=options))
    if not args.judge_model:
        raise UserError("--judge-url needs --judge-model NAME, the model to ask for there")
    key = key_from(args.judge_key_env)
    patience = Patience(deadline_s=args.deadline)
    options = {"temperature": temperature, "max_tokens": args.judge_tokens}
    return EndpointJudge(Endpoint(args.judge_url, args.judge_model, key, patience, **options), args.workers)


def item_key(judge: Judge, messages: list[dict]) -> str:
    return key_of("judge", judge.identity, messages)
