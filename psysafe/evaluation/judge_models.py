"""The judges that are models, and the one loop that asks them: `ask_all`.

A judge is a model behind an endpoint, or one that runs here. Both take conversations and give texts.
"""

import argparse
import json
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from psysafe.endpoint import (
    RESERVED_PARAMETERS,
    Endpoint,
    EndpointUnusable,
    Outcome,
    RetryPolicy,
    key_from,
    run_items,
)
from psysafe.evaluation.models_under_test import ModelUnderTest, answer_all
from psysafe.files import parse_json
from psysafe.generation.generator import Answer, Generator
from psysafe.generation.request import Options
from psysafe.generation.sampling import Sampling
from psysafe.journal import Journal, key_of
from psysafe.program import UserError

KEY_VARIABLE = "PSYSAFE_JUDGE_KEY"
WAYS = "--judge-url URL --judge-model NAME, --judge-local DIR, or --judge rules"
Key = TypeVar("Key", bound=Hashable)


class EndpointJudge:
    """A model behind an OpenAI-compatible endpoint, asked for `workers` items at once."""

    unusable = ""  # why it could not be asked, where that cost it items (`ask_apart`)

    def __init__(self, endpoint: Endpoint, workers: int = 8):
        self.endpoint, self.workers = endpoint, workers
        self.identity = ["endpoint", endpoint.model, endpoint.options]
        self.name = endpoint.model
        self.settings = {**endpoint.options, "judge": endpoint.model, "judge url": endpoint.url}

    def ask(self, conversations: Mapping[str, list[dict]], out: str | Path) -> Outcome:
        """The reply to each conversation, {"text", "reasoning"}, by key; what `out` holds is not asked again."""

        def call(messages: list[dict]) -> dict:
            return self.endpoint.chat(messages)._asdict()

        return run_items(conversations, call, out, self.workers, self.name)


class LocalJudge:
    """A model of this architecture that runs here."""

    unusable = ""

    def __init__(self, model: ModelUnderTest):
        self.model = model
        self.identity = ["local", *model.identity]
        self.name = Path(model.model).name
        options = model.options.fingerprint_fields()
        self.settings = {"judge": model.model, **{f"judge {name}": value for name, value in options.items()}}

    def ask(self, conversations: Mapping[str, list[dict]], out: str | Path) -> Outcome:
        """As `EndpointJudge.ask`. A reply that was cut at the token limit, or never stopped reasoning, is failed."""
        failed = {}
        with Journal(out) as journal:
            missing = [key for key in conversations if key not in journal.rows]
            if missing:
                # The row number seeds the sampling. Taken from the key, it makes a reply independent of which items
                # are still missing.
                key_of_row = {int(key[:15], 16): key for key in missing}
                generator = Generator(*self.model.load(), self.model.options)
                asked = [conversations[key] for key in missing]
                for answer in answer_all(generator, asked, list(key_of_row), self.name):
                    key = key_of_row[answer.row]
                    if reason := _no_reply(answer):
                        failed[key] = reason
                    else:
                        journal.append(key, {"text": answer.answer, "reasoning": answer.reasoning})
            journal.sync()
            return Outcome({key: journal.rows[key] for key in conversations if key in journal.rows}, failed)


def file_name(judge: "Judge | None") -> str:
    """A judge's name as that of a folder."""
    return re.sub(r"[^\w.-]+", "_", judge.name if judge else "rules").strip(".") or "_"


def _no_reply(answer: Answer) -> str:
    """Why an answer is no reply of a judge; "" for one that is."""
    if answer.unfinished_thinking or answer.finish_reason == "length":
        return f"the reply was cut at {answer.new_tokens:,} tokens (--judge-tokens)"
    return "" if answer.answer.strip() else "the reply has no content"


Judge = EndpointJudge | LocalJudge


def ask_all(
    judge: Judge, conversations: Mapping[Key, list[dict]], out: str | Path
) -> tuple[dict[Key, str], dict[Key, str]]:
    """(text of each reply, reason for each that failed), both by the caller's keys and in their order.

    conversations: messages by (variant, item), or whatever the caller names a reply by. Replies are kept in `out`
    (JSONL) by what they depend on: the judge and the conversation. So a second start asks only what is missing or has
    changed, and of two equal conversations, as two variants with one answer make them, only one is asked.
    """
    journal_keys = {key: key_of("judge", judge.identity, messages) for key, messages in conversations.items()}
    outcome = judge.ask({journal_keys[key]: messages for key, messages in conversations.items()}, out)
    replies = {key: outcome.rows[saved]["text"] for key, saved in journal_keys.items() if saved in outcome.rows}
    failed = {key: outcome.failed[saved] for key, saved in journal_keys.items() if saved in outcome.failed}
    return replies, failed


def ask_apart(
    judge: Judge, conversations: Mapping[Key, list[dict]], out: str | Path
) -> tuple[dict[Key, str], dict[Key, str]]:
    """As `ask_all`, for one of several judges: an endpoint that cannot be asked costs its own items only. They are
    failed with its reason, which `judge.unusable` keeps; what is in `out` already stays."""
    try:
        return ask_all(judge, conversations, out)
    except EndpointUnusable as error:
        judge.unusable = str(error)
    keys = {key: key_of("judge", judge.identity, messages) for key, messages in conversations.items()}
    with Journal(out) as journal:
        replies = {key: journal.rows[saved]["text"] for key, saved in keys.items() if saved in journal.rows}
    return replies, {key: judge.unusable for key in keys if key not in replies}


def add_arguments(parser: argparse.ArgumentParser, rules: str = "", several: bool = False) -> None:
    """rules: what `--judge rules` means here, "" where no rules can judge. several: whether more than one judge may be
    asked."""
    also = "; as often as there are judges" if several else ""
    choices = "--judge-url, --judge-local, --judge rules" if rules else "--judge-url, --judge-local"
    group = parser.add_argument_group("judge", f"any of {choices}, side by side" if several else f"one of {choices}")
    if rules:
        group.add_argument("--judge", choices=["rules"], action="append", default=[], help=rules)
    else:
        parser.set_defaults(judge=[])
    help_text = "an OpenAI-compatible endpoint" + ("; one for all models, or one for each" if several else "")
    group.add_argument("--judge-url", metavar="URL", action="append", default=[], help=help_text)
    help_text = f"the model to ask for there{also}"
    group.add_argument("--judge-model", metavar="NAME", action="append", default=[], help=help_text)
    help_text = f"environment variable with the endpoint's key ({KEY_VARIABLE})" + (
        "; of several endpoints one for each" if several else ""
    )
    group.add_argument("--judge-key-env", metavar="NAME", action="append", default=[], help=help_text)
    help_text = "a parameter of every request, as in top_p=0.9; null leaves one out; as often as needed"
    group.add_argument("--judge-param", metavar="KEY=JSON", action="append", default=[], help=help_text)
    help_text = f"a model folder or hub id to judge with, here{also}"
    group.add_argument("--judge-local", metavar="DIR", action="append", default=[], help=help_text)
    group.add_argument("--judge-tokens", type=int, default=4096, metavar="N", help="most tokens of a reply (4096)")
    group.add_argument("--workers", type=int, default=8, metavar="N", help="requests at once (8)")
    group.add_argument("--deadline", type=float, default=600, metavar="S", help="seconds for an item in all (600)")


def without_effect(args: argparse.Namespace) -> dict[str, str]:
    """Flags that the judges which were asked for do not read."""
    reasons = {}
    if not args.judge_url:
        flags = ("--judge-model", "--judge-key-env", "--judge-param", "--workers", "--deadline")
        reasons |= dict.fromkeys(flags, "without --judge-url")
    if args.judge and not args.judge_url and not args.judge_local:
        reasons["--judge-tokens"] = "with --judge rules"
    if any(param.partition("=")[0] == "max_tokens" for param in args.judge_param) and not args.judge_local:
        reasons["--judge-tokens"] = "beside --judge-param max_tokens"
    return reasons


def request_parameters(texts: Sequence[str]) -> dict[str, object]:
    """KEY=JSON texts as a dict. UserError for what is no JSON, or is set by the program."""
    parameters = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name in parameters:
            raise UserError(f"--judge-param {text}: {name} stands there twice; give each parameter once")
        try:
            parameters[name] = parse_json(value)
            json.dumps(parameters[name], allow_nan=False)
        except ValueError as error:
            remedy = f"expected KEY=JSON, as in temperature=0 or {name or 'KEY'}='\"text\"'"
            raise UserError(f"--judge-param {text}: {error}; {remedy}") from None
        if name in RESERVED_PARAMETERS or not name:
            reserved = ", ".join(RESERVED_PARAMETERS)
            raise UserError(f"--judge-param {text}: {name or 'no key'}; {reserved} are set by the program")
    return parameters


def from_arguments(args: argparse.Namespace, temperature: float) -> Judge | None:
    """The one judge that was asked for; None for the rules."""
    judges = every_from_arguments(args, temperature)
    if len(judges) != 1:
        raise UserError(f"expected one judge: {WAYS}")
    return judges[0]


def every_from_arguments(args: argparse.Namespace, temperature: float) -> list[Judge | None]:
    """The judges that were asked for, the rules (None) last. UserError for none, and for two of one name."""
    if len(args.judge) > 1:
        raise UserError("--judge rules stands there twice; give it once")
    judges: list[Judge | None] = _endpoint_judges(args, temperature)
    for folder in args.judge_local:
        options = Options(Sampling(temperature=temperature), max_new_tokens=args.judge_tokens)
        judges.append(LocalJudge(ModelUnderTest(folder, "", args.device, args.dtype, options)))
    judges += [None] if args.judge else []
    if not judges:
        raise UserError(f"expected a judge: {WAYS}")
    names = [file_name(judge) for judge in judges]
    if twice := [name for name in names if names.count(name) > 1]:
        # Replies are kept by the model's name: the second one would be given the first one's.
        remedy = "give each a run with an --out of its own"
        raise UserError(f"two judges are called {twice[0]}, and replies are kept by name; {remedy}")
    return judges


def _endpoint_judges(args: argparse.Namespace, temperature: float) -> list[Judge | None]:
    urls, models, variables = args.judge_url, args.judge_model, args.judge_key_env
    if not urls:
        return []
    if not models:
        raise UserError("--judge-url needs --judge-model NAME, the model to ask for there")
    if len(urls) not in (1, len(models)):
        raise UserError(f"{len(urls)} --judge-url for {len(models)} --judge-model; give one for all, or one for each")
    if len(variables) > 1 and len(variables) != len(urls):
        raise UserError(f"{len(variables)} --judge-key-env for {len(urls)} --judge-url; give one for each")
    if len(set(urls)) > 1 and len(variables) < len(urls) and key_from(*(variables or [KEY_VARIABLE])):
        # One host's key would go to another host.
        raise UserError("several --judge-url and one key: whose is it? Give --judge-key-env NAME once for each of them")
    urls = urls * len(models) if len(urls) == 1 else urls
    variables = variables or [KEY_VARIABLE]
    variables = variables * len(models) if len(variables) == 1 else variables
    retry_policy = RetryPolicy(deadline_s=args.deadline)
    options = {"temperature": temperature, "max_tokens": args.judge_tokens} | request_parameters(args.judge_param)
    options = {name: value for name, value in options.items() if value is not None}
    return [
        EndpointJudge(Endpoint(url, model, key_from(variable), retry_policy, **options), args.workers)
        for url, model, variable in zip(urls, models, variables, strict=True)
    ]
