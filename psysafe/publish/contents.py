"""Which files go where in the repository.

Never state/, and not config.toml, which names files of this machine: the card's table has the recipe. Where whole
weights stand at the root, the adapter lies in adapter/: transformers loads the base of an adapter_config.json that it
finds beside a config.json, and would add the adapter a second time.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from psysafe.checkpoint.peft_format import CONFIG, WEIGHTS
from psysafe.checkpoint.tensor_files import INDEX
from psysafe.cli import say
from psysafe.evaluation.result import Result
from psysafe.files import read_json
from psysafe.program import UserError
from psysafe.publish.run import Base, Run
from psysafe.publish.scrub import TERMS, without_folders
from psysafe.training.run_log import METRICS

CARD = "README.md"
SUFFIXES = (".safetensors", ".json", ".txt", ".jinja", ".model")  # of a merged checkpoint
BESIDE = "adapter/"  # where the adapter lies beside whole weights
EXTRAS = ("results", "metrics")  # of --include


class Upload(NamedTuple):
    """path: in the repository. content: bytes that are written here, or a file. origin: in words, for the list."""

    path: str
    content: bytes | Path
    origin: str

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def adapter_prefix(merged: str, gguf: str) -> str:
    return BESIDE if merged or gguf else ""


def adapter_files(run: Run, base: Base, prefix: str) -> list[Upload]:
    """adapter_config.json, which names the base as others know it (nothing for the bundled one), and the weights."""
    config = run.adapter.config | {
        "base_model_name_or_path": base.hub_id or None,
        "revision": base.revision or None,
    }
    return [
        Upload(prefix + CONFIG, (json.dumps(config, indent=2) + "\n").encode(), "the run, its base renamed"),
        Upload(prefix + WEIGHTS, run.folder / WEIGHTS, "the run"),
    ]


def merged_files(folder: str) -> list[Upload]:
    """The files of a merged checkpoint. UserError where shards are missing or it is none."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise UserError(f"--merged {folder}: no config.json in it; expected what `psysafe.checkpoint merge` wrote")
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    taken = [file for file in files if file.name.endswith(SUFFIXES) or file.name.upper().startswith(TERMS)]
    names = {file.name for file in taken}
    if CONFIG in names:  # the adapter would be added to weights that hold it already
        raise UserError(f"--merged {folder}: {CONFIG} in it; expected merged weights in a folder without an adapter")
    shards = {"model.safetensors"} if INDEX not in names else set(_weight_map(path / INDEX).values())
    if missing := sorted(shards - names):
        raise UserError(f"--merged {folder}: {missing[0]} is missing; merge again")
    if left_out := [file.name for file in files if file not in taken and file.name != CARD]:
        say(f"--merged: left out, no part of a checkpoint: {', '.join(left_out)}")
    return [Upload(file.name, file, "--merged") for file in taken]


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{path}: no weight_map in it; merge again")
    return weight_map


def is_gguf_adapter(path: str) -> bool:
    """Whether a GGUF file is an adapter for llama.cpp: its header, which comes first, names the kind of adapter."""
    with open(path, "rb") as file:
        return b"adapter.type" in file.read(4096)


def gguf_file(path: str) -> Upload:
    """UserError where the file does not begin, or its name does not end, as those of GGUF files do."""
    if not re.fullmatch(r"[\w.-]+\.gguf", Path(path).name):  # the card's command has the name, without quotes
        raise UserError(f"--gguf {path}: expected a name of letters, digits, . _ and - that ends in .gguf; rename it")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"--gguf {path}: not a GGUF file; expected what llama.cpp loads")
    return Upload(Path(path).name, Path(path), "--gguf")


def extra_files(run: Run, results: Sequence[tuple[Result, dict]], wanted: Sequence[str]) -> list[Upload]:
    """What goes up only where --include asks for it: the tables as JSON, metrics.jsonl."""
    files = []
    if "metrics" in wanted:
        if not run.rows:
            raise UserError(f"--include metrics: {run.folder} has no {METRICS}; leave it out")
        files.append(Upload(METRICS, run.folder / METRICS, "the run"))
    if "results" in wanted:
        if not results:
            raise UserError("--include results has no effect without --results DIR; leave it out")
        for number, (result, rest) in enumerate(results, 1):
            content = tables_only(result) | {"finished": rest["finished"]}
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            files.append(Upload(f"results/{number}-{result.kind}.json", text.encode(), "--results, tables alone"))
    return files


def tables_only(result: Result) -> dict:
    """A result without its settings, which hold folders and addresses of judges."""
    published = {key: value for key, value in asdict(result).items() if key in ("kind", "title", "tables", "notes")}
    published["contamination"] = result.contamination
    return json.loads(without_folders(json.dumps(published, ensure_ascii=False)))
