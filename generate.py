"""Answers prompts with the base model or an adapter: prompt in, text out.

python generate.py "I feel like giving up."                   # the bundled model, tuned once train.py has run
python generate.py "..." --compare base,runs/tiny             # the same question before and after
python generate.py --chat --adapter runs/psysafe              # a conversation; the model is the adapter's base
echo "..." | python generate.py                               # the prompt from a pipe, or by - from stdin
python generate.py --prompts rows.jsonl --out answers.jsonl   # many; killed and started again it continues
torchrun --nproc-per-node 8 generate.py --prompts ...         # the same on 8 GPUs; any number of them continues
"""

import psysafe.interrupt  # noqa: F401  # isort: skip  (first: Ctrl-C during the imports ends quietly)
import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import kernels
from psysafe import services
from psysafe.checkpoint.adapter import BASE, attach_named, base_of_adapter, warn_of_other_base
from psysafe.checkpoint.base import load_model, resolve_model
from psysafe.cli import Parser, add_settings, out_file, read_settings, refuse_ranks, refuse_without_effect, say
from psysafe.data.prompts import system_text, with_system
from psysafe.data.rows import read_prompts
from psysafe.data.tokenizer import load_tokenizer
from psysafe.generation.answer_file import AnswerFile, answer_rows
from psysafe.generation.generator import Generator
from psysafe.generation.ranks import Ranks
from psysafe.generation.request import Options
from psysafe.generation.sampling import Sampling, recommended
from psysafe.generation.terminal import COMMANDS, ask, chat, compare
from psysafe.model.lora import merge_adapters
from psysafe.program import UserError, main_guard
from psysafe.runtime import start
from psysafe.training.config import resolve

MAX_PROMPT = 10**6  # characters from stdin


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    if not args.prompts:
        refuse_ranks("a prompt or a chat")
    options = read_options(argv)
    system = system_text(args.system)
    helplines = services.from_arguments(args, every_cluster=False)
    rows = read_prompts(args.prompts)[: args.limit] if args.prompts else []
    source, revision, adapters = what_answers(args)
    runtime = start(args.device, args.dtype)
    torch.set_deterministic_debug_mode("default")  # deterministic index_put sorts; ours writes no place twice
    folder, commit = resolve_model(source, revision)
    if args.sampling:
        options = read_options(argv, recommended(folder))
    refuse_without_effect(argv, without_effect(options))
    if options.thinking and options.sampling.temperature == 0 and not args.sampling:
        say("always the likeliest token: while thinking a model may repeat itself without end; try --sampling model")
    tokenizer = load_tokenizer(folder)
    dtype = str(runtime.dtype).removeprefix("torch.")
    settings = {"model": source, "revision": commit, "dtype": dtype, "system": args.system, "merge": args.merge}
    settings |= options.fingerprint_fields()
    for adapter in adapters:
        if adapter != BASE:
            warn_of_other_base(adapter, source)

    def open_file() -> AnswerFile | contextlib.nullcontext:
        return AnswerFile(args.out, rows, adapters, settings, runtime.rank) if rows else contextlib.nullcontext()

    # Before the weights, which take minutes: whose file it is, and that no other process writes it.
    with Ranks(runtime) as ranks, ranks.in_order(open_file) as file:
        model = load_model(source, device=runtime.device, dtype=runtime.dtype, revision=commit or None)
        live = kernels.describe(runtime.device, model.config.head_dim)
        say(f"{source}, {' and '.join(adapters)}, {dtype} on {runtime.device_name}; kernels: {live}")
        mixed = attach_named(model, adapters)
        if args.merge:
            merge_adapters(model)
        generator = Generator(model, tokenizer, options, None if args.chat else say, mixed)
        if args.chat:
            chat(generator, system, helplines)
        elif file:
            answer_rows(generator, file, system, ranks)
            file.finish(ranks.wait)
        else:
            messages = with_system([{"role": "user", "content": args.prompt}], system)
            if args.compare:
                compare(generator, messages, adapters)
            else:
                ask(generator, messages)
    return 0


def what_answers(args: argparse.Namespace) -> tuple[str, str | None, list[str]]:
    """(model, its revision, adapters). Without --model it is the base that the adapter names, else the bundled model,
    which brings the adapter of the bundled run once there is one."""
    adapters = args.compare.split(",") if args.compare else [args.adapter] if args.adapter else []
    named = [adapter for adapter in adapters if adapter != BASE]
    bundled, _ = resolve([])
    if not adapters and not args.model and Path(bundled.out, "adapter_config.json").exists():
        say(f"with the adapter in {bundled.out} (--adapter {BASE} leaves it off)")
        adapters = [bundled.out]
    if args.merge and not any(adapter != BASE for adapter in adapters):
        raise UserError("--merge: there is no adapter to merge; name one with --adapter")
    if args.model or not named:
        return args.model or bundled.model, None, adapters or [BASE]
    return *base_of_adapter(named[0]), adapters


def read_options(argv: Sequence[str], defaults: dict | None = None) -> Options:
    """The options that the command line gives. defaults: of flags that it does not give, instead of their own."""
    parser = Parser(allow_abbrev=False, add_help=False)
    add_options(parser)
    parser.set_defaults(**defaults or {})
    settings, _ = parser.parse_known_args(argv)
    sampling = Sampling(**read_settings(Sampling, settings))
    return Options(sampling, stop=tuple(settings.stop), **read_settings(Options, settings))


def without_effect(options: Options) -> dict[str, str]:
    """Flag -> why it has no effect beside the others."""
    reasons = {}
    if options.sampling.temperature == 0:
        reasons = dict.fromkeys(("--top-k", "--top-p", "--min-p", "--seed"), "without a --temperature above 0")
    if not options.thinking:
        reasons["--max-think-tokens"] = "with --no-thinking"
    return reasons


def add_options(parser: Parser) -> None:
    add_settings(parser, Options, Sampling)
    sentence = "end the answer before this text; may be given several times"
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help=sentence)


def read_stdin() -> str:
    text = sys.stdin.read(MAX_PROMPT + 1)
    if len(text) > MAX_PROMPT:
        raise UserError(f"stdin: more than {MAX_PROMPT:,} characters in it; expected a prompt")
    return text.strip()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    epilog = """Equal settings and seeds give equal answers. In float32 that holds for every batch size; in bfloat16
another one rounds differently and may take another word. So may other rows beside it, which --deterministic keeps
apart. Qwen recommends --temperature 0.6 --top-k 20 --top-p 0.95 for thinking: --sampling model."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = Parser("generate.py", description=__doc__, epilog=epilog, formatter_class=kind, allow_abbrev=False)
    add = parser.add_argument
    add("prompt", nargs="?", help="what to answer; - or a pipe: what stdin says")
    add("--chat", action="store_true", help=f"talk; every answer knows the conversation so far ({COMMANDS})")
    add("--prompts", metavar="FILE", help="rows with a prompt, or messages, in any form that docs/recipe.md lists")
    add("--limit", type=int, metavar="N", help="only the first N rows of --prompts")
    about = "JSONL: the rows of --prompts with response, reasoning, answer and more"
    add("--out", type=out_file, metavar="FILE", help=about)
    add("--model", help="folder, hub id or random:CONFIG.json (the base that --adapter names, else the bundled one)")
    add("--adapter", metavar="DIR", help="folder or hub id (PEFT), or base for none (for the bundled model: its run's)")
    add("--merge", action="store_true", help="add the adapter into the weights instead of computing it beside them")
    add("--compare", metavar="base,DIR", help="answer with each of these adapters")
    add("--system", default="none", metavar="v0|v1|none|FILE", help="system prompt (none)")
    services.add_arguments(parser, "helplines on the notice of --chat")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(auto)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="(auto: bfloat16 on a GPU)")
    add("--sampling", choices=("model",), help="what the model's generation_config.json says; a flag beside it wins")
    add_options(parser)
    args = parser.parse_args(argv)
    if args.prompt == "-":
        args.prompt = read_stdin()
        if not args.prompt:
            parser.error("stdin is empty; expected a prompt")
    elif args.prompt is None and not (args.chat or args.prompts or sys.stdin.isatty()):
        args.prompt = read_stdin() or None
    if (args.prompt is not None) + args.chat + (args.prompts is not None) != 1:
        parser.error('expected one of: "a prompt", --chat, --prompts FILE')
    if args.prompt is not None and not args.prompt.strip():
        parser.error("the prompt is empty; expected a text")
    if (args.prompts is None) != (args.out is None):
        parser.error("--prompts FILE and --out FILE go together")
    if args.services and not args.chat:
        parser.error("--services is for --chat, whose notice names them; for a system prompt see docs/services.md")
    if args.unchecked and not args.services:
        parser.error("--unchecked is for --services FILE")
    if args.limit is not None and args.prompts is None:
        parser.error("--limit is for --prompts FILE")
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit is {args.limit}, expected at least 1")
    if args.out and os.path.realpath(args.out) == os.path.realpath(args.prompts):
        parser.error("--out is the file of --prompts and would be overwritten")
    if args.compare and (args.adapter or args.chat or args.merge):
        parser.error("--compare names the adapters itself, and goes with no --adapter, --chat or --merge")
    names = args.compare.split(",") if args.compare else []
    if not all(names):
        parser.error(f"--compare {args.compare}: an empty name; expected folders or base, separated by one comma each")
    if len(set(names)) < len(names):
        parser.error(f"--compare {args.compare}: a name stands twice; expected each folder, and base, once")
    return args


if __name__ == "__main__":
    sys.exit(main_guard(main))
