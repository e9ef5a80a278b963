"""Checkpoints and adapters out.

    python -m psysafe.checkpoint merge --adapter DIR --out DIR
    python -m psysafe.checkpoint adapter RUN --layout both|text|multimodal --out DIR
    python -m psysafe.checkpoint gguf --adapter DIR --out FILE.gguf        # after pip install -r requirements-gguf.txt
"""

import psysafe.interrupt  # noqa: F401  # isort: skip  (first: Ctrl-C during the imports ends quietly)
import argparse
import sys
from collections.abc import Sequence

from psysafe.checkpoint.adapter import LAYOUTS, convert_adapter
from psysafe.checkpoint.gguf_adapter import write_gguf
from psysafe.checkpoint.merge import merge
from psysafe.cli import Parser, out_file, out_folder
from psysafe.program import exit_on_signals, main_guard


def main(argv: Sequence[str]) -> int:
    kind = argparse.RawDescriptionHelpFormatter
    parser = Parser("python -m psysafe.checkpoint", description=__doc__, formatter_class=kind, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("merge", help="write the base with an adapter merged into its weights")
    command.add_argument("--model", default="", metavar="DIR|HUB_ID", help="the base (the one that the adapter names)")
    command.add_argument("--adapter", required=True, metavar="DIR|HUB_ID", help="an adapter of ours or PEFT's")
    command.add_argument("--out", type=out_folder, required=True, metavar="DIR",
                         help="new or empty folder for the merged checkpoint")  # fmt: skip
    command.add_argument("--revision", default="", help="commit or branch of a hub id")
    command.add_argument("--shard-size", default="", metavar="5GB", help="cut new shards (default: the base's own)")

    command = commands.add_parser("adapter", help="write an adapter under the key names of other classes")
    command.add_argument("adapter", metavar="RUN", help="folder or hub id of an adapter of ours or PEFT's")
    names = "text: as AutoModelForCausalLM has them; multimodal: as AutoModelForImageTextToText; both: equal doubles"
    command.add_argument("--layout", required=True, choices=LAYOUTS, help=names)
    command.add_argument("--out", type=out_folder, required=True, metavar="DIR", help="new or empty folder")

    command = commands.add_parser("gguf", help="write an adapter as a GGUF file, for llama.cpp")
    command.add_argument("--adapter", required=True, metavar="DIR|HUB_ID", help="an adapter of ours or PEFT's")
    command.add_argument("--out", type=out_file, required=True, metavar="FILE",
                         help="new file, whose name ends in .gguf")  # fmt: skip

    args = parser.parse_args(argv)
    if args.command == "gguf":
        out = write_gguf(args.adapter, args.out)
        print(f"adapter in {out}; in llama.cpp: llama-server -m BASE.gguf --lora {out}")
    elif args.command == "adapter":
        out = convert_adapter(args.adapter, args.out, args.layout)
        print(f"adapter in {out}, under the key names of layout {args.layout}")
    else:
        with exit_on_signals():  # what is half-written may be 54 GB
            out = merge(args.model, args.adapter, args.out, args.shard_size, args.revision)
        print(f"merged checkpoint in {out}, read back and checked")
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
