"""The models under test: the base and adapters, each with each system prompt, and what they answer."""

import argparse
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from psysafe.checkpoint.base import load_model, resolve_model
from psysafe.data.prompts import system_text
from psysafe.data.rows import read_table
from psysafe.data.tokenizer import load_tokenizer
from psysafe.evaluation.criteria import without_reasoning
from psysafe.evaluation.result import say
from psysafe.files import expand
from psysafe.generation.engine import Options
from psysafe.generation.generator import Generator
from psysafe.generation.sampling import Sampling
from psysafe.journal import Journal, key_of
from psysafe.model.lora import detach, load_adapter, read_adapter_config
from psysafe.program import UserError
from psysafe.runtime import start
from psysafe.training.config import resolve

BASE = "base"


class Setting(NamedTuple):
    """An adapter (or BASE) with a system prompt (none, v0, v1, or a file)."""

    adapter: str
    system: str

    @property
    def name(self) -> str:
        return f"{Path(self.adapter).name}, {self.system}"


class Question(NamedTuple):
    """number: names the question's random numbers, so it must not depend on what else is asked."""

    number: int
    prompt: str


@dataclass(frozen=True)
class Subject:
    """A base model, where it runs, and how it writes."""

    model: str
    revision: str = ""
    device: str = "auto"
    dtype: str = "auto"
    options: Options = field(default_factory=Options)

    def loaded(self):
        """(model, tokenizer) on its device."""
        runtime = start(self.device, self.dtype)
        torch.set_deterministic_debug_mode("default")  # it would make index_put sort; ours writes no place twice
        folder, commit = resolve_model(self.model, self.revision)
        model = load_model(self.model, device=runtime.device, dtype=runtime.dtype, revision=commit or None)
        return model, load_tokenizer(folder)

    @property
    def identity(self) -> list:
        """What answers depend on besides adapter, system prompt and question: weights, number type, options."""
        folder, _ = resolve_model(self.model, self.revision)
        dtype = str(start(self.device, self.dtype).dtype)
        return [fingerprint(folder), Path(self.model).name, dtype, self.options.fingerprint_fields()]

    def facts(self) -> dict:
        """For the settings of a result."""
        _, commit = resolve_model(self.model, self.revision)
        return {"model": self.model, "revision": commit, **self.options.fingerprint_fields()}

    def answers(
        self, settings: Sequence[Setting], questions: Sequence[Question], out: str | Path
    ) -> dict[Setting, dict[int, dict]]:
        """What each setting answers to each question: by number, the rows that `out` (JSONL) holds afterwards.

        A row has prompt, answer, reasoning, response, finish_reason, new_tokens and stuck. It is written as soon as it
        is there; what `out` has already is not made again, and if that is everything, no model is loaded.
        """
        identity = self.identity
        keys = {
            setting: {q: key_of("answer", identity, *setting_identity(setting), q.number, q.prompt) for q in questions}
            for setting in settings
        }
        with Journal(out) as journal:
            missing = {s: [q for q in questions if keys[s][q] not in journal.rows] for s in settings}
            if any(missing.values()):
                model, tokenizer = self.loaded()
                for setting, asked in missing.items():
                    if asked:
                        self._answer(model, tokenizer, setting, asked, keys[setting], journal)
            journal.sync()
            return {s: {q.number: journal.rows[keys[s][q]] for q in questions} for s in settings}

    def _answer(self, model, tokenizer, setting, questions, keys, journal) -> None:
        if setting.adapter != BASE:
            load_adapter(model, expand(setting.adapter))
        system = system_text(setting.system)
        head = [] if system is None else [{"role": "system", "content": system}]
        by_number = {q.number: q for q in questions}
        generator, began, tokens, said = Generator(model, tokenizer, self.options), time.monotonic(), 0, 0.0
        conversations = [[*head, {"role": "user", "content": q.prompt}] for q in questions]
        for count, answer in enumerate(generator.answers(conversations, list(by_number)), 1):
            question = by_number[answer.row]
            journal.append(
                keys[question],
                {"setting": setting.name, "number": question.number, "prompt": question.prompt}
                | {"answer": answer.answer, "reasoning": answer.reasoning, "response": answer.response}
                | {"finish_reason": answer.finish_reason, "new_tokens": answer.new_tokens}
                | {"stuck": answer.unfinished_thinking},
            )
            tokens, now = tokens + answer.new_tokens, time.monotonic()
            if now - said > 2 or count == len(questions):
                left = (now - began) / count * (len(questions) - count)
                rate = tokens / max(now - began, 1e-9)
                progress = f"{count:,} of {len(questions):,} answers"
                say(f"{setting.name}: {progress}, {rate:,.0f} tokens/s, {left:,.0f} s left")
                said = now
        detach(model)


def fingerprint(folder: Path) -> str:
    """A folder's weights and config as a short name, from sizes and the first megabyte of each file: a model trained
    anew has another one, and 50 GB are not read for it."""
    sha = hashlib.sha256()
    for path in sorted([*folder.glob("*config.json"), *folder.glob("*.safetensors"), *folder.glob("tokenizer.json")]):
        with open(path, "rb") as file:
            sha.update(f"{path.name} {path.stat().st_size}".encode() + file.read(1 << 20))
    return sha.hexdigest()[:20]


def setting_identity(setting: Setting) -> tuple[str, str | None]:
    if setting.adapter == BASE:
        return BASE, system_text(setting.system)
    folder = Path(expand(setting.adapter))
    if not (folder / "adapter_config.json").exists():
        raise UserError(f"{setting.adapter}: no adapter_config.json in it; expected a run directory, or base")
    return fingerprint(folder), system_text(setting.system)


@dataclass
class Answered:
    """One setting's answers by exact prompt text. is_base: made without an adapter."""

    is_base: bool
    rows: dict[str, dict]
    repeated: int = 0  # prompts that stood there before; the first answer counts

    @property
    def stuck(self) -> set[str]:
        return {prompt for prompt, row in self.rows.items() if row["stuck"]}


def read_answers(spec: str) -> dict[str, Answered]:
    """`FILE` or `NAME=FILE`, rows of `generate.py --out` or any rows with a prompt and an answer -> settings by name.

    A file with several adapters becomes several settings. An answer's think block is cut off; one that never closed,
    or a row marked `stucked`, is stuck.
    """
    name, equals, path = spec.partition("=")
    path = path if equals else spec
    found: dict[str, Answered] = {}
    for number, fields in enumerate(read_table(path, ["prompt"]), 1):
        made, cluster = fields.get("settings") or {}, fields.get("risk cluster") or ""
        if not isinstance(made, dict) or not isinstance(cluster, str):
            found = f"settings {made!r:.40} and risk cluster {cluster!r:.40}"
            raise UserError(f"{path} row {number}: {found}; expected an object and a text")
        adapter, system = str(fields.get("adapter") or ""), made.get("system")
        label = f"{Path(adapter).name}, {system}" if adapter else Path(path).stem
        answered = found.setdefault(label, Answered(adapter == BASE, {}))
        text = fields.get("answer") if adapter or "response" not in fields else fields["response"]
        if not isinstance(text, str):
            raise UserError(f"{path} row {number}: no answer in it; expected rows of generate.py --out")
        stuck = str(fields.get("stucked", "")).lower() == "true" or ("<think>" in text and "</think>" not in text)
        answered.repeated += fields["prompt"] in answered.rows
        answered.rows.setdefault(
            fields["prompt"],
            {"answer": without_reasoning(text).strip(), "stuck": stuck, "cluster": cluster},
        )
    if equals:
        found = {name if len(found) == 1 else f"{name}: {label}": answered for label, answered in found.items()}
    return found


def add_arguments(parser: argparse.ArgumentParser, max_new_tokens: int = 0, temperature: float = 0.0) -> None:
    """max_new_tokens: the usual length of an answer; 0 where none is written, and then no flag speaks of it."""
    group = parser.add_argument_group("model under test")
    group.add_argument("--model", metavar="DIR|HUB_ID", help="the base (default: the adapter's own, else the bundled)")
    group.add_argument("--revision", default="", metavar="COMMIT", help="commit or branch of a hub id")
    group.add_argument("--adapter", action="append", metavar="base|DIR", default=[],
                       help="a setting per adapter; base is none; may be given several times (base)")  # fmt: skip
    group.add_argument("--system", default="none", metavar="v0,v1,none,FILE", help="a setting per system prompt (none)")
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
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N rows")


def from_arguments(args: argparse.Namespace) -> tuple[Subject, list[Setting]]:
    sampling = Sampling(temperature=args.temperature, seed=args.seed)
    options = Options(sampling, args.max_new_tokens, thinking=args.thinking, batch_size=args.batch_size)
    adapters = args.adapter or [BASE]
    settings = [Setting(adapter, system) for adapter in adapters for system in args.system.split(",")]
    names = [setting.name for setting in settings]
    if len(set(names)) < len(names):
        raise UserError(f"two settings have one name among {'; '.join(names)}; adapters' folders need different names")
    model, revision = args.model, args.revision
    if not model:
        model, revision = base_of(adapters, revision)
    return Subject(model, revision, args.device, args.dtype, options), settings


def base_of(adapters: Sequence[str], revision: str = "") -> tuple[str, str]:
    """(model, revision) that the first adapter names as its base; the bundled one without an adapter."""
    named = [adapter for adapter in adapters if adapter != BASE]
    if not named:
        return resolve([])[0].model, revision
    file = Path(expand(named[0]), "adapter_config.json")
    if not file.exists():
        raise UserError(f"{named[0]}: no adapter_config.json in it; expected a run directory, or base")
    config = read_adapter_config(file.parent)
    if not config.get("base_model_name_or_path"):
        raise UserError(f"{file} names no base model; give --model")
    return config["base_model_name_or_path"], config.get("revision") or revision
