"""What a judge is shown: instructions, which a file may give, the prompt, and as much of the answer as is asked for.

A file of instructions (`--rubric FILE`) has one form for all judges:

    # published.toml
    system = '''You compare ...'''           # may be missing
    user = '''
    [Question]
    {prompt}

    [Answer]
    {answer}'''
    cut_mark = ""                            # what stands where an answer is cut; may be missing

A file of another name is the user message alone. `{prompt}` and `{answer}` stand for the texts, `{{word}}` for the
characters `{word}`.
"""

import argparse
import hashlib
import re
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

from psysafe.checkpoint.base import resolve_model
from psysafe.evaluation.judge_models import EndpointJudge, Judge
from psysafe.files import MAX_JSON_BYTES, MAX_TEXT_BYTES, decode_text, read_bounded
from psysafe.program import UserError

CUT_MARK = "\n[... the answer is cut here]"
PLACEHOLDERS = ("prompt", "answer")
BRACES = re.compile(r"\{\{(\w+)\}\}|\{([A-Za-z_]\w*)\}")
OWN_WORDING = "this project's wording"
KEYS = ("system", "user", "cut_mark")
FLAGS = ("--rubric", "--judge-answer-chars", "--judge-answer-tokens", "--judge-tokenizer")


@dataclass(frozen=True)
class Instructions:
    """A judge's conversation about one answer. user: with placeholders; source: whose wording it is, for results."""

    system: str
    user: str
    cut_mark: str = CUT_MARK
    source: str = OWN_WORDING
    empty: str = ""  # what is shown in place of an answer without text

    def messages(self, prompt: str, answer: str) -> list[dict]:
        # In one pass: a placeholder that stands in the prompt is the prompt's own text.
        texts = {"prompt": prompt, "answer": answer or self.empty}
        user = BRACES.sub(lambda match: f"{{{match[1]}}}" if match[1] else texts[match[2]], self.user)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": user}]


def read_instructions(path: str | Path, own: Instructions, may_be_rubric: bool = False) -> Instructions:
    """The instructions of a file. may_be_rubric: a text without any placeholder takes the place of `own.system` alone.

    UserError of one line for a file that cannot be read, another key, a placeholder that is wrong or missing.
    """
    try:
        content = read_bounded(path, MAX_TEXT_BYTES)
    except OSError as error:
        raise UserError(f"--rubric {path}: cannot be read ({error.strerror}); expected a text file") from None
    text, source = decode_text(content, path), f"{path} (sha256 {hashlib.sha256(content).hexdigest()[:12]})"
    if Path(path).suffix.lower() == ".toml":
        fields = _fields(text, path)
        read = Instructions(fields.get("system", ""), fields["user"], fields.get("cut_mark", CUT_MARK), source)
    elif may_be_rubric and text.strip() and not _names(text):
        read = replace(own, system=text.strip(), source=source)
    else:
        read = Instructions("", text.strip(), source=source)
    _check_placeholders(read, path)
    return replace(read, system=BRACES.sub(r"{\1}", read.system))


def _names(text: str) -> list[str]:
    """The placeholders in a text, in their order."""
    return [match[2] for match in BRACES.finditer(text) if match[2]]


def _fields(text: str, path: str | Path) -> dict[str, str]:
    try:
        fields = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        remedy = "expected system = '''...''' and user = '''...'''"
        raise UserError(f"--rubric {path}: malformed TOML ({error}); {remedy}") from None
    for key, value in fields.items():
        if key not in KEYS:
            raise UserError(f"--rubric {path}: key {key!r:.60}; expected {', '.join(KEYS)}")
        if not isinstance(value, str):
            raise UserError(f"--rubric {path}: {key} is {value!r:.60}; expected a text")
    if "user" not in fields:
        raise UserError(f"--rubric {path}: no user in it; expected user = '''...''' with {{prompt}} and {{answer}}")
    return fields


def _check_placeholders(instructions: Instructions, path: str | Path) -> None:
    expected = "expected {prompt} and {answer} in the user message ({{word}} for {word} itself)"
    in_system, in_user = _names(instructions.system), _names(instructions.user)
    if in_system:
        raise UserError(f"--rubric {path}: {{{in_system[0]}}} in the system part; {expected}")
    if wrong := [name for name in in_user if name not in PLACEHOLDERS]:
        raise UserError(f"--rubric {path}: unknown placeholder {{{wrong[0]}}}; {expected}")
    if missing := [name for name in PLACEHOLDERS if name not in in_user]:
        raise UserError(f"--rubric {path}: no {{{missing[0]}}} in it; {expected}")


@dataclass(frozen=True)
class JudgeInput:
    """How a judge is asked about an answer. limit: characters or tokens of the answer that it is shown, 0 for all;
    tokenizer: what counts the tokens, None for characters; tokenizer_source: where that was read from."""

    instructions: Instructions
    limit: int = 0
    tokenizer: Tokenizer | None = None
    tokenizer_source: str = ""

    def cut(self, answer: str) -> str:
        """The answer, or its beginning with the mark behind it."""
        if not self.limit:
            return answer
        shown = answer[: self.limit] if self.tokenizer is None else self._first_tokens(answer)
        return answer if shown == answer else shown + self.instructions.cut_mark

    def note_on(self, answer: str) -> str:
        """How much of this answer the judge is shown; "" for all of it."""
        unit = "tokens of the judge" if self.tokenizer else "characters"
        return "" if self.cut(answer) == answer else f"shown the first {self.limit:,} {unit}"

    def _first_tokens(self, answer: str) -> str:
        places = self.tokenizer.encode(answer, add_special_tokens=False).offsets
        # Up to the next token: a character may be spread over several of them, and half of one cannot be shown.
        return answer[: places[self.limit][0]] if len(places) > self.limit else answer

    def note(self, n_cut: int, n: int) -> str:
        """For a table: whose instructions, and how many answers were cut."""
        unit = "tokens of the judge" if self.tokenizer else "characters"
        cut = f" An answer is shown up to {self.limit:,} {unit}: {n_cut:,} of {n:,} are cut." if self.limit else ""
        return f"Judge's instructions: {self.instructions.source}.{cut}"

    @property
    def settings(self) -> dict:
        """For a result."""
        unit = f"tokens of {self.tokenizer_source}" if self.tokenizer else "characters"
        shown = {"answer shown to the judge": f"{self.limit:,} {unit}"} if self.limit else {}
        return {"rubric": self.instructions.source} | shown


def read_tokenizer(folder: Path) -> Tokenizer:
    """Any model's: of a judge only the borders of its tokens are needed. UserError where there is none."""
    path = folder / "tokenizer.json" if folder.is_dir() else folder
    try:
        tokenizer = Tokenizer.from_buffer(read_bounded(path, MAX_JSON_BYTES))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected the judge's tokenizer.json") from None
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{path}: no tokenizer ({error!s:.100}); expected the judge's tokenizer.json") from None
    # A tokenizer.json may ask for truncation and padding: both would change the count.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def add_arguments(parser: argparse.ArgumentParser, takes_rubric: bool = True, chars: int = 0) -> None:
    """takes_rubric: whether the judge's instructions may come from a file; chars: of an answer that it is usually
    shown, 0 for all."""
    group = parser.add_argument_group("what the judge is shown")
    if takes_rubric:
        help_text = "the judge's instructions: TOML with system and user, or the user message; with {prompt}, {answer}"
        group.add_argument("--rubric", metavar="FILE", help=help_text)
    else:
        parser.set_defaults(rubric=None)
    either = group.add_mutually_exclusive_group()
    usual = f"{chars:,}" if chars else "all"
    either.add_argument("--judge-answer-chars", type=_count, metavar="N",
                        help=f"characters of an answer that the judge is shown, 0 for all ({usual})")  # fmt: skip
    either.add_argument("--judge-answer-tokens", type=_count, metavar="N", help="the same in tokens of the judge")
    help_text = "the tokenizer of an endpoint's model, for --judge-answer-tokens"
    group.add_argument("--judge-tokenizer", metavar="DIR", help=help_text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r:.40} is no whole number")
    return int(text)


def without_effect(args: argparse.Namespace) -> dict[str, str]:
    """Flags that the judges which were asked for do not read."""
    if not args.judge_url and not args.judge_local:
        return dict.fromkeys(FLAGS, "with --judge rules" if args.judge else "where no judge is asked")
    if not args.judge_answer_tokens:
        return {"--judge-tokenizer": "without --judge-answer-tokens"}
    return {} if args.judge_url else {"--judge-tokenizer": "with --judge-local, which has its own"}


def from_arguments(
    args: argparse.Namespace, judge: Judge, own: Instructions, chars: int = 0, may_be_rubric: bool = False
) -> JudgeInput:
    """own: the instructions without --rubric; chars: as for `add_arguments`."""
    instructions = read_instructions(args.rubric, own, may_be_rubric) if args.rubric else own
    if args.judge_answer_tokens:
        is_endpoint = isinstance(judge, EndpointJudge)
        if is_endpoint and not args.judge_tokenizer:
            raise UserError(
                "--judge-answer-tokens: an endpoint does not say how its model counts tokens; give --judge-tokenizer "
                "DIR, a folder with the model's tokenizer.json, or --judge-answer-chars"
            )
        source = args.judge_tokenizer if is_endpoint else judge.model.model
        tokenizer = read_tokenizer(Path(source) if is_endpoint else resolve_model(source)[0])
        return JudgeInput(instructions, args.judge_answer_tokens, tokenizer, source)
    cut_anyway = args.judge_answer_chars is None and args.judge_answer_tokens is None
    return JudgeInput(instructions, chars if cut_anyway else args.judge_answer_chars or 0)
