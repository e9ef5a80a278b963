"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors of a folder, out and in.

    save_adapter(adapters, "runs/x", base="Qwen/Qwen3.5-27B", multimodal=True)
    adapters = load_adapter(model, "runs/x")

A multimodal base has two classes in transformers, and PEFT looks for other names under each: `model.layers...` where
AutoModelForCausalLM loaded it, `model.language_model.layers...` under AutoModelForImageTextToText. PEFT passes over
names that it does not know, with a warning, and the model is then the bare base. So the file holds every tensor under
both names (layout "both"), and either class finds its own.

`psysafe.checkpoint.peft_format` reads and checks files, also those of others.
"""

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from psysafe.checkpoint.peft_format import (
    CONFIG,
    VISION,
    WEIGHTS,
    PeftAdapter,
    adapter_folder,
    read_adapter,
    read_adapter_config,
)
from psysafe.cli import say
from psysafe.files import as_asset, expand, new_folder, write_atomic
from psysafe.model.decoder import Qwen3_5
from psysafe.model.lora import Adapters, attach, lora_scale, resolve_targets, targeted_layers
from psysafe.model.mixed_adapters import MixedAdapters, Shape, attach_mixed
from psysafe.program import UserError

BASE = "base"  # how programs name the model without an adapter

# Key prefixes of the two classes of a multimodal base.
LAYOUTS = {"text": ("base_model.model.model.",), "multimodal": ("base_model.model.model.language_model.",)}
LAYOUTS["both"] = LAYOUTS["text"] + LAYOUTS["multimodal"]


def save_adapter(
    adapters: Adapters, directory: str | Path, base: str, multimodal: bool, layout: str = "both", revision: str = ""
) -> None:
    """Writes adapter_model.safetensors and adapter_config.json as PEFT does (0.21), each file whole or not at all.

    multimodal: whether the base is. layout: `text` names the tensors as the base's text class does, `multimodal` has a
    `language_model.` in the names; `both` writes both for a multimodal base (a text base has one class, and one name).
    """
    layout = "text" if layout == "both" and not multimodal else layout
    tensors = {name: x.detach().float().cpu() for name, x in adapters.tensors().items()}
    _write(Path(directory), tensors, _peft_config(adapters, base, revision), layout)


def convert_adapter(source: str | Path, out: str | Path, layout: str) -> Path:
    """Writes an adapter of ours or PEFT's under the key names of another layout to `out`, a new or empty folder, and
    returns it. The numbers, their type and every other entry of the config stay. Raises UserError as `load_adapter`."""
    adapter, out = read_adapter(source), new_folder(out)
    base = expand(adapter.config.get("base_model_name_or_path") or "") or None
    config = {**adapter.config, "base_model_name_or_path": base}
    if not adapter.fits_every_layout:
        config |= _by_path(adapter)
    tensors = {}
    for name, module in adapter.modules.items():
        tensors |= {f"{name}.lora_A": module.A, f"{name}.lora_B": module.B}
    _write(out, tensors, config, layout)
    return out


def _by_path(adapter: PeftAdapter) -> dict:
    """Entries of the config that select the same modules in every layout: a path from `layers` on ends the path that
    each class has; a regular expression may be written for one class."""
    r, alpha = adapter.config["r"], adapter.config["lora_alpha"]
    return {
        "target_modules": list(adapter.modules),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {name: len(module.A) for name, module in adapter.modules.items() if len(module.A) != r},
        "alpha_pattern": {name: module.alpha for name, module in adapter.modules.items() if module.alpha != alpha},
    }


def _write(directory: Path, tensors: dict[str, Tensor], config: dict, layout: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    by_key = {}
    for name, x in tensors.items():
        # The vision tower has one name, and none in the text class.
        prefixes = LAYOUTS[layout] if not name.startswith(VISION) else LAYOUTS["text"] if layout != "text" else ()
        # Copies, because safetensors refuses two names for one memory (20 MB more for the 27B's adapter).
        by_key |= {f"{prefix}{name}.weight": x.clone() for prefix in prefixes}
    if dropped := sum(name.startswith(VISION) for name in tensors) if layout == "text" else 0:
        say(f"{directory}: left out: {dropped} tensors of the vision tower, which the text class has not")
    write_atomic(directory / WEIGHTS, save(by_key, metadata={"format": "pt"}))
    write_atomic(directory / CONFIG, json.dumps(config, indent=2) + "\n")


def peft_check_command(directory: str | Path, base: str) -> str:
    """A command that shows whether PEFT, at the user's place, really applies this adapter; or why there is none."""
    if base.startswith("random:"):
        return f"PEFT cannot load it by itself: its base, {base}, is no folder or hub id"
    code = (
        f"import torch, peft; model = peft.AutoPeftModelForCausalLM.from_pretrained({json.dumps(str(directory))}); "
        "ids = torch.arange(9)[None]; on = model(ids).logits; model.base_model.disable_adapter_layers(); "
        "print((on - model(ids).logits).abs().max().item())"
    )
    return f"in PEFT check that it is on, by the same prompt without it (above 0):\n  python -c {shlex.quote(code)}"


def _peft_config(adapters: Adapters, base: str, revision: str) -> dict:
    # The options that are off are written, too: a reader must not have to guess a default.
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": expand(base),  # assets:NAME is a name that only this project knows
        "revision": revision or None,
        "inference_mode": True,
        "r": adapters.rank,
        "lora_alpha": adapters.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(adapters.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": adapters.use_rslora,
        "use_dora": False,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def load_adapter(model: Qwen3_5, source: str | Path) -> Adapters:
    """Attaches an adapter of ours or PEFT's: a folder in either key layout, or a hub id. Raises UserError for what
    cannot be honoured (DoRA, biases, extra trained modules, other shapes, keys that match nothing)."""
    adapter, rank, alpha, use_rslora, tensors = _read_one_rank_and_scale(source)
    try:
        adapters = attach(model, rank, alpha, adapter.targets, use_rslora=use_rslora)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    fill_adapter(adapters.tensors(), tensors, source)
    return adapters


def attach_many(model: Qwen3_5, sources: Mapping[str, str | Path]) -> MixedAdapters:
    """Attaches several adapters by name, for batches in which each token has one of them, or none. sources: folders or
    hub ids. Ranks, scales and targets may differ. Raises UserError as `load_adapter`."""
    shapes, tensors = {}, {}
    for name, source in sources.items():
        adapter, rank, alpha, use_rslora, tensors[name] = _read_one_rank_and_scale(source)
        shapes[name] = Shape(rank, lora_scale(rank, alpha, use_rslora), resolve_targets(adapter.targets))
        try:
            targeted_layers(model, shapes[name].targets, rank)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
    mixed = attach_mixed(model, shapes)
    for name, source in sources.items():
        fill_adapter(mixed.tensors[name], tensors[name], source)
    return mixed


def attach_named(model: Qwen3_5, names: Sequence[str]) -> MixedAdapters | None:
    """Attaches the adapters among the names of what is compared: folders, hub ids, BASE. None where one adapter is all
    that answers, or the base: then there is nothing to mix."""
    sources = {name: expand(name) for name in names if name != BASE}
    if len(set(names)) > 1:
        return attach_many(model, sources)
    for source in sources.values():
        load_adapter(model, source)
    return None


def _read_one_rank_and_scale(source: str | Path) -> tuple[PeftAdapter, int, float, bool, dict[str, Tensor]]:
    """(adapter, rank, alpha, use_rslora, tensors); says what of the folder is left out or brought into another form."""
    adapter = read_adapter(source)
    rank, alpha, use_rslora, tensors = adapter.with_one_rank_and_scale()
    if vision := len(adapter.modules) - len(adapter.decoder_modules):
        say(f"{source}: left out: its adapters of {vision} modules of the vision tower, which does not run here")
    if len({(len(module.A), adapter.scale(name)) for name, module in adapter.decoder_modules.items()}) > 1:
        # It matters for who trains it further: the step of a B that has taken up a factor is another one.
        say(f"{source}: its ranks or scales differ: brought to rank {rank} and one scale, with the same products")
    return adapter, rank, alpha, use_rslora, tensors


def adapter_shape(source: str | Path) -> tuple[int, float, list[str]]:
    """(rank, alpha, targets) of an adapter, as `load_adapter` attaches it."""
    adapter = read_adapter(source)
    rank, alpha, _, _ = adapter.with_one_rank_and_scale()
    return rank, alpha, adapter.targets


def base_of_adapter(source: str | Path) -> tuple[str, str]:
    """(model, revision or "") that an adapter names as its base. Raises UserError where it names none."""
    config = read_adapter_config(adapter_folder(source))
    if not config.get("base_model_name_or_path"):
        raise UserError(f"{source}/adapter_config.json names no base model; give --model")
    return as_asset(config["base_model_name_or_path"]), config.get("revision") or ""


def warn_of_other_base(source: str | Path, model: str) -> None:
    """Says so where an adapter names another base than the model that it is to run on; it fits by shape alone."""
    named = read_adapter_config(adapter_folder(source)).get("base_model_name_or_path")
    if named and not is_same_base(named, model):
        say(f"warning: {source}: the adapter was trained on {as_asset(named)}, and runs on {model}")


def is_same_base(named: str, model: str) -> bool:
    """Whether two names, each a folder, a hub id or random:CONFIG.json, can mean one model.

    Two that lie here are compared as places. Else the last part of the name decides: the adapter may come from another
    machine, with the same base in another folder or from a mirror on the hub.
    """
    places = _place(named), _place(model)
    if all(map(os.path.exists, places)):
        return places[0] == places[1]
    return Path(places[0]).name.casefold() == Path(places[1]).name.casefold()


def _place(model: str) -> str:
    """The path without links where there is one, else the name; of a snapshot in the hub's cache the hub id."""
    path = os.path.realpath(Path(expand(model.removeprefix("random:"))).expanduser())
    if snapshot := re.search("/models--([^/]+)--([^/]+)/snapshots/[^/]+$", path):
        return "/".join(snapshot.groups())
    return path if os.path.exists(path) else model


def fill_adapter(views: dict[str, Tensor], tensors: dict[str, Tensor], source: str | Path) -> None:
    """Copies tensors by name into those of attached adapters. One UserError lists everything that does not fit."""
    if not views.keys() & tensors.keys():
        raise UserError(f"{source}: none of its {len(tensors)} tensors belongs to this model; is it another model's?")
    faults = [f"missing {name}" for name in views.keys() - tensors.keys()]
    faults += [f"unknown {name}" for name in tensors.keys() - views.keys()]
    for name in views.keys() & tensors.keys():
        if views[name].shape != tensors[name].shape:
            faults.append(f"{name} is {tuple(tensors[name].shape)}, expected {tuple(views[name].shape)}")
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(f"{source}: does not fit this model: {'; '.join(sorted(faults)[:5])}{more}")
    with torch.no_grad():
        for name, view in views.items():
            view.copy_(tensors[name])
