"""Rows of one's own: a large model writes reasoning and answer for prompts of one's own.

    python -m psysafe.corpus write prompts.txt --url http://localhost:8000/v1 --model-name NAME --out drafts.jsonl

For each prompt several candidates are asked for, and the one with the fewest issues of `check` becomes the draft. Every
reply is kept beside the output as soon as it arrives, so a second start asks only for what is missing.
"""

import argparse
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from psysafe import services
from psysafe.cli import amount, out_file, whole_number
from psysafe.corpus import check
from psysafe.corpus.common_text import shared_text
from psysafe.corpus.contacts import Services, known_services
from psysafe.corpus.draft_checks import GROUP, OUT_OF_DOMAIN, RISKY, Settings, row_issues
from psysafe.corpus.draft_requests import UnusableReply, draft, messages, read_own_prompts
from psysafe.corpus.outputs import refuse_inputs
from psysafe.corpus.stats import tokenizer_of
from psysafe.corpus.texts import refuse_long
from psysafe.data.languages import known_languages, languages
from psysafe.data.rows import CLUSTER, Row, write_rows
from psysafe.data.text import normalise
from psysafe.endpoint import Endpoint, RetryPolicy, key_from
from psysafe.evaluation.judge_models import EndpointJudge, Judge, LocalJudge
from psysafe.evaluation.models_under_test import ModelUnderTest
from psysafe.files import BUNDLED_MODEL
from psysafe.generation.request import Options
from psysafe.generation.sampling import Sampling
from psysafe.journal import Journal, key_of
from psysafe.printable import counted, one_line
from psysafe.program import UserError

KEY_VARIABLE = "PSYSAFE_API_KEY"
OF_ENDPOINT = ("--model-name", "--key-variable", "--workers", "--deadline")


class Request(NamedTuple):
    """One candidate for one prompt."""

    prompt: int  # its place
    candidate: int
    messages: list[dict]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", metavar="PROMPTS", help="risky prompts: rows, or a .txt file, one a line")
    add = parser.add_argument
    add("--benign", nargs="+", default=[], metavar="FILE", help="harmless prompts, which get a plain helpful answer")
    add(
        "--out-of-domain",
        nargs="+",
        default=[],
        metavar="FILE",
        help="unsafe ones outside the clusters: refused plainly",
    )
    add("--out", type=out_file, required=True, metavar="DRAFTS", help="JSONL of the drafts")
    add("--url", help="OpenAI-compatible endpoint, like http://localhost:8000/v1")
    add("--model-name", help="the model's name at the endpoint")
    add("--key-variable", default=KEY_VARIABLE, help=f"environment variable that holds the key ({KEY_VARIABLE})")
    add("--workers", type=whole_number, default=8, help="requests under way at once (8)")
    about = "for a candidate in all, with every attempt and wait (600)"
    add("--deadline", type=float, default=600, metavar="S", help=f"seconds {about}")
    add("--local", metavar="DIR", help="in place of --url: a model folder or hub id that writes here")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="of --local (auto)")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of --local (auto)")
    add("--candidates", type=int, default=3, metavar="N", help="drafts of each prompt, of which the best is taken (3)")
    add("--temperature", type=amount, default=0.9)
    add("--max-tokens", type=whole_number, default=2048, help="longest reply (2048)")
    check.add_settings(parser)
    add("--dry-run", action="store_true", help="count requests and tokens, and ask for nothing")
    add(
        "--tokenizer",
        default=BUNDLED_MODEL,
        metavar="DIR",
        help="counts the tokens (the bundled, which counts too many)",
    )
    add("--price-in", type=amount, metavar="P", help="of a million tokens that are sent, to print the cost")
    add("--price-out", type=amount, metavar="P", help="of a million tokens of replies, to print the cost")


def without_effect(args: argparse.Namespace) -> dict[str, str]:
    reasons = dict.fromkeys(("--device", "--dtype"), "without --local") if not args.local else {}
    reasons |= services.without_effect(args)
    return reasons | (dict.fromkeys(OF_ENDPOINT, "without --url") if not args.url else {})


def run(args: argparse.Namespace) -> int:
    inputs = {"the prompts": args.files, "--benign": args.benign, "--out-of-domain": args.out_of_domain}
    inputs["--services"] = services.paths(args.services)
    journal = Path(f"{args.out}.replies.jsonl")
    for file in (args.out, journal):
        refuse_inputs("--out", file, inputs)
    if args.candidates < 1:
        raise UserError(f"--candidates is {args.candidates}, expected at least 1")
    if not args.deadline > 0:
        raise UserError(f"--deadline is {args.deadline:g}, expected seconds above 0")
    if (args.price_in is None) != (args.price_out is None):
        raise UserError("--price-in and --price-out belong together; give both, or none")
    writer, name = writer_of(args)
    kinds = {RISKY: args.files, "plain": args.benign, OUT_OF_DOMAIN: args.out_of_domain}
    prompts = [row for group, paths in kinds.items() for path in paths for row in read_own_prompts(path, group)]
    refuse_long(prompts, "prompt")
    prompts, n_repeated = without_repeated(prompts)
    if n_repeated:
        print(f"{counted(n_repeated, 'repeated line')} left out")
    if not prompts:
        raise UserError("no prompts; give PROMPTS, --benign or --out-of-domain a file")
    helplines = known_services(args.services, args.unchecked)
    settings = Settings(args.language, args.min_words, args.max_words)
    requests = requests_of(prompts, args.candidates, writer.identity, helplines, settings)
    out = Path(args.out)
    if settings.code not in languages():  # before anything is paid for: a large model may know it, or it is a slip
        known = f"known are {known_languages()}"
        print(one_line(f"no word lists for {settings.language!r:.40}: {known}; candidates are ranked without"))
    print(plan(requests, journal, args))
    if args.dry_run:
        return 0
    out.parent.mkdir(parents=True, exist_ok=True)
    outcome = writer.ask({key: request.messages for key, request in requests.items()}, journal)
    candidates, reasons = read_replies(prompts, requests, outcome.rows, outcome.failed, name, args.language)
    drafts = choose(prompts, candidates, helplines, settings)
    if drafts:  # a file without rows would be a mistake of every command that reads it
        write_rows(drafts, out)
    return report(prompts, drafts, candidates, reasons, helplines, settings, out)


def writer_of(args: argparse.Namespace) -> tuple[Judge, str]:
    """(the model that is asked, its name in the rows). The models that judge and those that write are asked alike."""
    if bool(args.url) == bool(args.local):
        raise UserError("expected one model that writes: --url URL --model-name NAME, or --local DIR")
    if args.local:
        options = Options(Sampling(temperature=args.temperature), max_new_tokens=args.max_tokens)
        writer = LocalJudge(ModelUnderTest(args.local, "", args.device, args.dtype, options))
        return writer, writer.name
    if not args.model_name:
        raise UserError("--url needs --model-name NAME, the model to ask for there")
    options = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    retry_policy = RetryPolicy(deadline_s=args.deadline)
    endpoint = Endpoint(args.url, args.model_name, key_from(args.key_variable), retry_policy, **options)
    return EndpointJudge(endpoint, args.workers), args.model_name


def without_repeated(prompts: Sequence[Row]) -> tuple[list[Row], int]:
    """(the prompts without those that stand there already, how many those were). UserError for a prompt in two groups,
    which cannot be answered in both ways."""
    first: dict[str, Row] = {}
    kept, seen = [], set()
    for row in prompts:
        words = normalise(row.fields["prompt"])
        earlier = first.setdefault(words, row)
        if earlier.fields[GROUP] != row.fields[GROUP]:
            groups = f"{row.fields[GROUP]}, and as {earlier.fields[GROUP]} in {earlier.where}"
            raise UserError(f"{row.where}: {row.fields['prompt']!r:.80} stands there as {groups}; leave it in one")
        if (words, row.fields.get(CLUSTER)) not in seen:
            kept.append(row)
        seen.add((words, row.fields.get(CLUSTER)))
    return kept, len(prompts) - len(kept)


def requests_of(
    prompts: Sequence[Row], candidates: int, identity: list, services: Services, settings: Settings
) -> dict[str, Request]:
    """Each candidate by a key of all that it depends on: the model, the conversation, its number. Equal prompts are
    asked once."""
    requests = {}
    for number, row in enumerate(prompts):
        conversation = messages(row.fields, services, settings)
        for candidate in range(candidates):
            key = key_of("write", identity, conversation, candidate)
            requests.setdefault(key, Request(number, candidate, conversation))
    return requests


def plan(requests: Mapping[str, Request], journal: Path, args: argparse.Namespace) -> str:
    """What is going to be asked, in requests, tokens and money; replies that are there already are left out."""
    answered: dict = {}
    if journal.exists():
        with Journal(journal) as file:
            answered = file.rows
    tokenizer = tokenizer_of(args.tokenizer)
    missing = [request for key, request in requests.items() if key not in answered]
    nothing = {"role": "user", "content": ""}

    @functools.cache  # of ten thousand prompts a handful of instructions, which are most of the tokens
    def tokens_of(instruction: str) -> int:
        both = [{"role": "system", "content": instruction}, nothing]
        return len(tokenizer.encode_chat(both)) - len(tokenizer.encode_chat([nothing]))

    sent: dict[int, int] = {}  # by prompt: its candidates are asked alike
    for request in missing:
        if request.prompt not in sent:
            system, question = request.messages
            sent[request.prompt] = tokens_of(system["content"]) + len(tokenizer.encode_chat([question]))
    tokens_in = sum(sent[request.prompt] for request in missing)
    tokens_out = len(missing) * args.max_tokens
    line = (f"{counted(len(missing), 'request')} of {len(requests):,} to ask; {counted(tokens_in, 'token')} sent, "
            f"at most {tokens_out:,} in replies")  # fmt: skip
    if args.price_in is not None:
        cost_in, cost_out = tokens_in * args.price_in / 1e6, tokens_out * args.price_out / 1e6
        line += f"; cost {cost_in:,.2f} + at most {cost_out:,.2f}"
    return line


def read_replies(
    prompts: Sequence[Row], requests: Mapping[str, Request], rows: dict, failed: dict, model: str, language: str
) -> tuple[dict[int, list[dict]], dict[int, str]]:
    """(the drafts of each prompt by its place, the last reason by the place of each prompt whose replies gave none)."""
    candidates: dict[int, list[dict]] = {}
    reasons = {}
    for key, request in requests.items():
        try:
            if key not in rows:
                raise UnusableReply(failed.get(key, "not asked"))
            row = draft(prompts[request.prompt].fields, rows[key]["text"], model, language)
            candidates.setdefault(request.prompt, []).append(row)
        except UnusableReply as error:
            reasons[request.prompt] = str(error)
    return candidates, reasons


def choose(
    prompts: Sequence[Row], candidates: Mapping[int, list[dict]], services: Services, settings: Settings
) -> list[Row]:
    """For each prompt the candidate with the fewest issues; of equal ones the one that shares least text with the
    drafts chosen before it, the first of these where that is equal, too."""
    drafts: list[Row] = []
    for number, rows in candidates.items():
        issues = [len(row_issues(row, services, settings)) for row in rows]
        fewest = [row for row, count in zip(rows, issues, strict=True) if count == min(issues)]
        best = fewest[0]
        if len(fewest) > 1:
            earlier = [draft.fields["answer"] for draft in drafts]
            best = min(fewest, key=lambda row: shared_text([*earlier, row["answer"]], services)[-1].share)
        prompt = prompts[number]
        drafts.append(Row({**best, "candidates": len(rows)}, prompt.file, prompt.number, prompt.line))
    return drafts


def report(
    prompts: Sequence[Row],
    drafts: Sequence[Row],
    candidates: Mapping[int, list[dict]],
    reasons: Mapping[int, str],
    services: Services,
    settings: Settings,
    out: Path,
) -> int:
    """Prints what was written; the exit code: 1 where a prompt has no draft."""
    missing = {number: reason for number, reason in reasons.items() if number not in candidates}
    for number, reason in missing.items():
        print(one_line(f"{prompts[number].where}: no draft: {reason}"))
    groups = Counter(row.fields[GROUP] for row in drafts)
    if not drafts:
        print(f"no reply gave a draft, and {out} was not written; start the same command for replies that never came, "
              "give more --candidates for others")  # fmt: skip
        return 1
    print(f"{counted(len(drafts), 'draft')} in {out}: {', '.join(f'{n:,} {group}' for group, n in groups.items())}")
    assigned = Counter(row.fields[CLUSTER] for row in drafts if row.fields.get("cluster_assigned"))
    if assigned:
        print(f"clusters that the model assigned: {', '.join(f'{name} {n:,}' for name, n in assigned.items())}")
    with_issue = sum(bool(row_issues(row.fields, services, settings)) for row in drafts)
    shared = sum(item.is_template for item in shared_text([row.fields["answer"] for row in drafts], services))
    print(f"{with_issue:,} with an issue, {shared:,} with more than half of their text in other rows; see the reasons "
          f"with python -m psysafe.corpus check {out}")  # fmt: skip
    if missing:
        print("ask again for what is missing: start the same command, or give more --candidates")
    return 1 if missing else 0
