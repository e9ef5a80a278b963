"""Settings of a training run: one dataclass, flat keys; defaults < config file < --flags.

    config, sources = resolve(["--config", "configs/qwen3.5-27b.toml", "--lr", "2e-4"])
    config.lr, sources["lr"], sources["model"]      # 0.0002, "--lr", "configs/qwen3.5-27b.toml"

The defaults are the paper's recipe. Nothing is ignored: an unknown key, a wrong type or a value out of range is a
UserError of one line that says where it stood and what to write instead.

A path is relative to the current directory, in a file as in a flag. A path that begins with `assets:` lies in the
package's own `psysafe/assets/`, so that the bundled start works from any directory; `expand` turns it into a real path.
"""

import argparse
import ast
import contextlib
import inspect
import itertools
import json
import os
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Literal

from psysafe.cli import Parser, hint, shown
from psysafe.data.documents import LongRows
from psysafe.files import MAX_TEXT_BYTES, read_text
from psysafe.hub import is_repository
from psysafe.program import UserError

DEFAULT_FILE = Path(__file__).resolve().parents[2] / "configs" / "tiny.toml"


@dataclass(frozen=True)
class TrainConfig:
    # What is trained, and on what
    model: str = "Qwen/Qwen3.5-27B"
    """Base model: a folder, a hub id, or random:CONFIG.json for seeded random weights."""
    revision: str = ""
    """Commit or branch of a hub id; the commit that was loaded is written to the run's config.toml."""
    data: list[str] = field(default_factory=list)
    """Training rows: files, or data sets of the hub. Given as a flag, the file's val_data is ignored."""
    val_data: list[str] = field(default_factory=list)
    """Validation rows; without any, val_fraction of the training rows is set apart."""
    val_fraction: float = 0.1
    """Share of the training rows that validates without val_data; 0 never validates. As a flag it always counts."""
    contrast_data: list[str] = field(default_factory=list)
    """Rows with the base's own answers, trained beside data so that the base's behaviour stays where it belongs."""
    contrast_ratio: float = 0.0
    """Contrast documents for each training document, on top of batch_size; 0 trains none."""
    kl_weight: float = 0.0
    """Weight of KL(base || model) on contrast rows, in place of their cross-entropy; 0 trains on their words."""
    contrast_val_data: list[str] = field(default_factory=list)
    """Contrast rows to validate on; without any, val_fraction of those that are trained is set apart."""
    system: str = "none"
    """System message of every row: none, v0, v1, or a text file."""
    train_turns: Literal["last", "all"] = "last"
    """Assistant turns that are trained: those after the last user query, or all; earlier ones have no reasoning."""
    max_tokens: int = 4096
    """Longest row in tokens; long_rows says what becomes of a longer one."""
    long_rows: LongRows = "cut"
    """Rows over max_tokens: cut loses their end, drop leaves them out, error refuses them; each time they are named."""

    # Where the run lives
    out: str = "runs/psysafe"
    """Run directory: config.toml, metrics.jsonl, the adapter, and state/ for resuming."""
    resume: str = ""
    """Continue a run exactly: auto takes the newest whole state below out (or starts afresh), DIR a given one."""
    save_every: int = 0
    """Steps between saved states; 0 saves once an epoch."""
    keep_best: Literal["last", "val", "contrast", "both"] = "last"
    """Adapter that is left in out: the last, or the epoch's with the lowest val_loss, contrast_kl, or sum of both."""

    # Steps
    batch_size: int = 4
    """Documents of one optimiser step, over all ranks."""
    micro_batch_tokens: int = 4096
    """Tokens in one forward and backward pass, at most; changes memory, not the result."""
    epochs: int = 5
    """Passes over the training rows, reshuffled each time."""
    max_steps: int = 0
    """Run this many steps, fewer or more than the epochs have; 0 runs the epochs. The learning rate ends at zero."""

    # Adapter
    lora_rank: int = 1
    """Rank of the adapter; the kernels carry rank 1 for free."""
    lora_alpha: float = 32.0
    """Scale of the adapter times its rank."""
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Projections that carry an adapter: names, ends of paths (layers.3.self_attn.q_proj), or all-linear for all."""
    adapter_layout: Literal["both", "text", "multimodal"] = "both"
    """Names of the saved adapter's tensors: those of both classes that load a multimodal base, or of one by force."""
    adapter_init: str = ""
    """Folder or hub id of an adapter to start from instead of a fresh one."""

    # Optimiser
    optimizer: Literal["adamw8bit", "adamw"] = "adamw8bit"
    """AdamW with 8-bit or with fp32 state."""
    min_8bit_size: int = 4096
    """Adapter tensors with fewer elements keep fp32 state."""
    lr: float = 1e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    warmup_steps: int = 100
    """Steps of linear warm-up before the cosine to zero."""
    max_grad_norm: float = 1.0
    """The gradient's norm over all adapter tensors is clipped to this."""
    seed: int = 3407
    """Seed of the adapter's start, the split into training and validation, and the order of the rows."""

    # Machine and reporting
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes a GPU when there is one."""
    threads: int = 0
    """CPU threads; 0 leaves them to torch, which takes OMP_NUM_THREADS or every core."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Type of the frozen weights and activations; auto is bfloat16 on a GPU, float32 on a CPU."""
    memory_limit: float = 0.0
    """GB (1e9 bytes) of GPU memory to plan with, 1 GB of them as a reserve; 0 takes all that the GPU has."""
    embedding: Literal["gpu", "cpu"] = "gpu"
    """Where the input embedding lies: cpu keeps it in host memory, which frees 2.5 GB of the GPU for the 27B."""
    shard: bool = False
    """Spread the frozen blocks over all ranks (torch's FSDP2), for GPUs smaller than the base; changes no number."""
    timeout: float = 600.0
    """Seconds without progress after which several ranks end with a message that names the rank and the step."""
    report: Literal["none", "wandb", "trackio"] = "none"
    """Also send the metrics to this tracker, which must be installed."""
    project: str = "psych-safety-finetuning"
    """Project name for the tracker."""
    plot: bool = False
    """Draw loss.png into the run directory at the end; needs matplotlib."""
    dry_run: bool = False
    """Print the resolved run, for a GPU its memory plan and predicted time; reads no weights and writes nothing."""

    def __post_init__(self):
        for key in KEYS:
            object.__setattr__(self, key, _checked(key, getattr(self, key), "TrainConfig"))


KEYS = {f.name: f.type for f in fields(TrainConfig)}
DEFAULTS = {f.name: f.default_factory() if f.default is MISSING else f.default for f in fields(TrainConfig)}

_RANGES = [  # (what a value must be, its test, the keys)
    ("0 or more", lambda x: x >= 0, ["save_every", "max_steps", "warmup_steps", "min_8bit_size", "threads"]),
    ("0 or more", lambda x: x >= 0, ["weight_decay", "lr", "seed", "memory_limit"]),
    ("1 or more", lambda x: x >= 1, ["max_tokens", "batch_size", "micro_batch_tokens", "epochs", "lora_rank"]),
    ("above 0", lambda x: x > 0, ["lora_alpha", "eps", "max_grad_norm"]),
    ("between 10 seconds and a week", lambda x: 10 <= x <= 604_800, ["timeout"]),
    ("0 or more and below 1", lambda x: 0 <= x < 1, ["val_fraction", "beta1", "beta2"]),
    ("between 0 and 100", lambda x: 0 <= x <= 100, ["contrast_ratio", "kl_weight"]),
    ("not empty", bool, ["model", "out", "system", "project"]),
    ("at least one", lambda x: x and all(x), ["lora_targets"]),
    ("none of them empty", all, ["data", "val_data", "contrast_data", "contrast_val_data"]),
]
_RANGE_OF = {key: (text, test) for text, test, keys in _RANGES for key in keys}

_NEEDS = [  # (a key, when it has an effect, what to do where its flag has none)
    ("epochs", lambda c: not c.max_steps, "max_steps counts instead; give --max-steps 0"),
    ("project", lambda c: c.report != "none", "add --report wandb or --report trackio"),
    ("revision", lambda c: is_repository(c.model), "give a hub id as --model"),
    ("min_8bit_size", lambda c: c.optimizer == "adamw8bit", "take --optimizer adamw8bit"),
    ("contrast_data", lambda c: c.contrast_ratio, "give --contrast-ratio, such as 0.25"),
    ("kl_weight", lambda c: c.contrast_ratio, "give --contrast-data and --contrast-ratio, such as 0.25"),
]

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list[str]: "a list of texts"}


def resolve(argv: Sequence[str]) -> tuple[TrainConfig, dict[str, str]]:
    """The settings of a run, and for each key where its value came from: "default", the file, or the flag.

    argv: the command line without the program's name. Raises UserError (OSError for an unreadable file).
    """
    flags = _parser().parse_args(argv)
    flags = vars(flags)
    file = flags.pop("config")
    values, sources = {}, dict.fromkeys(KEYS, "default")
    for key, value, where in _read_file(file):
        values[key], sources[key] = _checked(key, value, where), file
    for key, value in flags.items():
        flag = "--" + key.replace("_", "-")
        with contextlib.suppress(ValueError):  # a word that is no number stays text, for _checked to name
            value = KEYS[key](value) if KEYS[key] in (int, float) else value
        values[key], sources[key] = _checked(key, value, flag), flag
    _leave_out_the_files_rows(values, sources, file, flags)
    if values.get("contrast_data") and "contrast_ratio" not in values:
        what = f"{sources['contrast_data']}: contrast_data names rows, and no contrast_ratio says how many are trained"
        raise UserError(f"{what}; give --contrast-ratio, such as 0.25, or 0 to leave them out")
    config = TrainConfig(**values)
    for key, has_effect, remedy in _NEEDS:
        if sources[key].startswith("--") and not has_effect(config):
            raise UserError(f"{sources[key]} has no effect here: {remedy}, or leave it out")
    return config, sources


def _leave_out_the_files_rows(values: dict, sources: dict[str, str], file: str, flags: Mapping[str, object]) -> None:
    """Rows come from the flags or from the file, never from both: own rows are not validated on those of a demo."""
    val_data, fraction, data = flags.get("val_data"), "val_fraction" in flags, flags.get("data")
    if val_data and fraction:
        raise UserError("--val-fraction sets rows of --data apart, --val-data names others to validate on; drop one")
    if val_data and not data and values.get("data"):
        raise UserError(f"--val-data names rows, so those of {file} are left out; name the training rows with --data")
    for rows in ("data", "contrast_data"):
        validation = rows.replace("data", "val_data")
        # Also --val-fraction 0, which validates on nothing.
        if (flags.get(rows) or fraction) and not flags.get(validation) and values.get(validation):
            flag = "--val-fraction" if fraction else "--" + rows.replace("_", "-")
            values[validation], sources[validation] = [], f"{flag}: the rows of {file} are left out"


def to_toml(config: TrainConfig, sources: dict[str, str] | None = None) -> str:
    """The resolved settings as TOML that `resolve` reads back to an equal config (dry_run is no part of a recipe)."""
    lines = []
    for key in KEYS:
        if key != "dry_run":
            source = (sources or {}).get(key, "default")
            note = f"  # {source if source.isprintable() else ascii(source)}" if source != "default" else ""
            lines.append(f"{key} = {_toml_value(getattr(config, key))}{note}\n")
    return "".join(lines)


def _parser() -> argparse.ArgumentParser:
    file = os.path.relpath(DEFAULT_FILE)
    parser = Parser(
        prog="train.py",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"""Fine-tune Qwen3.5 into supportive refusals.

    torchrun train.py                                      {file}: the paper in miniature, on any CPU
    torchrun train.py --config configs/qwen3.5-27b.toml    the paper's recipe on one 80 GB GPU; with --dry-run its plan

A flag wins over the file, and the file over the default.""",
    )
    parser.add_argument("--config", default=file, metavar="FILE", help=f"TOML file of the keys below ({file})")
    for key, sentence in sentences().items():
        kind, default = KEYS[key], DEFAULTS[key]
        default_text = "" if default in ("", [], False) else f" ({default if kind != list[str] else ' '.join(default)})"
        # No default of argparse's own: a flag that was not given must not overrule the file.
        options = {"help": (sentence + default_text).replace("%", "%%"), "default": argparse.SUPPRESS, "dest": key}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = "|".join(typing.get_args(kind)) if typing.get_origin(kind) is Literal else "VALUE"
            if kind == list[str]:  # extend: a flag given twice adds to the list, nothing is dropped
                options |= {"nargs": "*", "action": "extend"}
        parser.add_argument("--" + key.replace("_", "-"), **options)
    return parser


def sentences() -> dict[str, str]:
    """The sentence under each field of TrainConfig: one text for the reader of this file and for --help."""
    # Python keeps no docstring of a field, so the class's own source is read. The other way, field(metadata={"help":
    # ...}), would wrap each of the settings in a call, and a reader would have to look for the default inside it.
    body = ast.parse(inspect.getsource(TrainConfig)).body[0].body
    return {a.target.id: b.value.value for a, b in itertools.pairwise(body) if isinstance(a, ast.AnnAssign)}


def _read_file(path: str) -> Iterator[tuple[str, object, str]]:
    """Each (key, value, "FILE line N") of a TOML file."""
    try:
        text = read_text(path, MAX_TEXT_BYTES)
        table = tomllib.loads(text)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shown(path)[1:-1]}: not a TOML file: {error}") from None
    for key, value in table.items():
        line = re.search(rf"""^[ \t]*["'\[]*{re.escape(key)}\b""", text, re.MULTILINE)
        where = f"{path} line {text.count(chr(10), 0, line.start()) + 1}" if line else path
        if key not in KEYS:
            flat = "; keys are flat, without tables" if isinstance(value, dict) else ""
            raise UserError(f"{where}: unknown key {shown(key)}{hint(key, KEYS)}{flat}")
        yield key, value, where


def _checked(key: str, value, where: str):
    """The value in its key's type. Raises UserError with where it stood, what was found, and what is expected."""
    kind = KEYS[key]
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if kind == list[str]:
        value = [value] if isinstance(value, str) else list(value) if isinstance(value, (list, tuple)) else value
        fits = isinstance(value, list) and all(_is_text(x) for x in value)
    elif kind in (int, float, bool):
        fits = type(value) is kind and (kind is bool or abs(value) < 2**63)  # false for nan and infinity, too
    else:
        fits = _is_text(value) and (not choices or value in choices)
    text, test = _RANGE_OF.get(key, ("", lambda x: True))
    if fits and test(value):
        return value
    expected = " or ".join(choices) or f"{_WORDS[kind]}, {text}".removesuffix(", ")
    example = f", such as {_toml_value(DEFAULTS[key])}" if DEFAULTS[key] not in ("", []) and not choices else ""
    raise UserError(f"{where}: {key} is {shown(value)}; expected {expected}{example}")


def _is_text(value) -> bool:
    """True for text that a file can hold and a path can be: no NUL, no bytes that were not UTF-8."""
    return isinstance(value, str) and "\0" not in value and not re.search("[\ud800-\udfff]", value)


def _toml_value(value) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, str):  # JSON's escapes are TOML's, which also forbids a bare DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
