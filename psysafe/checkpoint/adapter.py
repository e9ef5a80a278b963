"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors of a folder, out and in.

    save_adapter(adapters, "runs/x", base="Qwen/Qwen3.5-27B", multimodal=True)
    adapters = load_adapter(model, "runs/x")

A multimodal base has two classes in transformers, and PEFT looks for other names under each: `model.layers...` where
AutoModelForCausalLM loaded it, `model.language_model.layers...` under AutoModelForImageTextToText. PEFT passes over
names that it does not know, with a warning, and the model is then the bare base. So the file holds every tensor under
both names (layout "both"), and either class finds its own.

Files of others are checked before anything is attached: what PEFT would compute otherwise than y = W x + s B A x is
refused by name.
"""

import json
import shlex
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from psysafe.checkpoint.tensor_files import NOT_FINITE, all_finite
from psysafe.files import as_asset, expand, new_folder, read_json, write_atomic
from psysafe.model.decoder import Qwen3_5
from psysafe.model.lora import ALL_LINEAR, Adapters, attach
from psysafe.program import UserError

# Key prefixes of the two classes of a multimodal base.
LAYOUTS = {"text": ("base_model.model.model.",), "multimodal": ("base_model.model.model.language_model.",)}
LAYOUTS["both"] = LAYOUTS["text"] + LAYOUTS["multimodal"]

# Fields of PEFT's adapter_config.json under which y = W x + s B A x would not be what the adapter means.
UNSUPPORTED = (
    *("use_dora", "use_qalora", "use_bdlora", "kasa_config", "arrow_config", "alora_invocation_tokens"),
    *("modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform", "layer_replication"),
)
# Initialisations that subtract a part of W when training begins: the adapter fits only the base changed in that way.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


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
    config, tensors = read_adapter(source)
    check_matrices(config, tensors, source)
    out = new_folder(out)
    config = {**config, "base_model_name_or_path": expand(config.get("base_model_name_or_path") or "") or None}
    _write(out, tensors, config, layout)
    return out


def _write(directory: Path, tensors: dict[str, Tensor], config: dict, layout: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    # Copies, because safetensors refuses two names for one memory (20 MB more for the 27B's adapter).
    named = {f"{prefix}{name}.weight": x.clone() for prefix in LAYOUTS[layout] for name, x in tensors.items()}
    write_atomic(directory / "adapter_model.safetensors", save(named, metadata={"format": "pt"}))
    write_atomic(directory / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def check_in_peft(directory: str | Path, base: str) -> str:
    """A command that shows whether PEFT, at the user's place, really applies this adapter; or why there is none."""
    if base.startswith("random:"):
        return f"PEFT cannot load it by itself: its base, {base}, is no folder or hub id"
    code = (
        f"import torch, peft; model = peft.AutoPeftModelForCausalLM.from_pretrained({str(directory)!r}); "
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


def load_adapter(model: Qwen3_5, directory: str | Path) -> Adapters:
    """Attaches an adapter folder of ours or PEFT's, either key layout. Raises UserError for what cannot be honoured
    (DoRA, biases, extra trained modules, other shapes, keys that match nothing)."""
    config, tensors = read_adapter(directory)
    targets = _adapted_projections(tensors, directory)
    check_matrices(config, tensors, directory)
    adapters = attach(model, config["r"], config["lora_alpha"], targets, use_rslora=config.get("use_rslora", False))
    fill_adapter(adapters, tensors, directory)
    return adapters


def adapter_shape(directory: str | Path) -> tuple[int, float, list[str]]:
    """(rank, alpha, targets) of an adapter folder."""
    config, tensors = read_adapter(directory)
    return config["r"], float(config["lora_alpha"]), _adapted_projections(tensors, directory)


def base_of_adapter(directory: str | Path) -> tuple[str, str]:
    """(model, revision or "") that an adapter folder names as its base. Raises UserError where it names none."""
    config = read_adapter_config(expand(str(directory)))
    if not config.get("base_model_name_or_path"):
        raise UserError(f"{directory}/adapter_config.json names no base model; give --model")
    return as_asset(config["base_model_name_or_path"]), config.get("revision") or ""


def read_adapter(directory: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """(adapter_config.json, tensors by our names) of an adapter folder in PEFT's format, checked."""
    config = read_adapter_config(directory)
    file = Path(directory, "adapter_model.safetensors")
    tensors = read_adapter_tensors(file)
    if not tensors:
        raise UserError(f"{file}: holds no tensors")
    return config, tensors


def read_adapter_config(directory: str | Path) -> dict:
    """adapter_config.json of an adapter folder. Raises UserError for what is broken in it or cannot be honoured."""
    file = Path(directory, "adapter_config.json")
    if not file.exists():
        raise UserError(f"{directory}: no adapter there (an adapter_config.json); train.py --out makes one")
    config = read_json(file)
    # Whatever would make the adapter mean something else than y = W x + s B A x is refused, never ignored.
    for key in UNSUPPORTED:
        if config.get(key):
            raise UserError(f"{file}: {key} = {config[key]!r:.60} is not supported")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGES_BASE):
        raise UserError(
            f"{file}: init_lora_weights = {start!r:.60} is not supported: such an adapter belongs "
            "to a changed base; have PEFT convert it first (path_initial_model_for_weight_conversion)"
        )
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise UserError(f"{file}: expected peft_type LORA with bias none")
    # type() and not isinstance(): JSON's true is an int in Python. The bound keeps a file from asking for terabytes.
    for key, kinds in (("r", (int,)), ("lora_alpha", (int, float))):
        if type(config.get(key)) not in kinds or not 0 < config[key] < 2**31:
            raise UserError(f"{file}: {key} is {config.get(key)!r:.60}, expected a number above 0 and below 2^31")
    for key, kind in (("base_model_name_or_path", str), ("revision", str), ("use_rslora", bool)):
        if not isinstance(config.get(key), kind | None):
            raise UserError(f"{file}: {key} is {config[key]!r:.60}, expected {kind.__name__}")
    return config


def read_adapter_tensors(path: Path) -> dict[str, Tensor]:
    """PEFT's tensors by our names: "layers.3.self_attn.q_proj.lora_A" from either key layout, or from both."""
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in list(file.keys()):
                x, name = file.get_tensor(key), _our_name(key, path)
                if x.is_floating_point() and not all_finite(x):
                    raise UserError(f"{path}: {key} {NOT_FINITE}")
                # Which of two values counts would depend on the class that reads them.
                if not torch.equal(x, tensors.setdefault(name, x)):
                    raise UserError(f"{path}: holds {name} under the names of both layouts, with different values")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    return tensors


def _our_name(key: str, path: Path) -> str:
    name = key.removeprefix("base_model.model.").removeprefix("model.").removeprefix("language_model.")
    name = name.removesuffix(".weight").removesuffix(".default")
    if not name.endswith(("lora_A", "lora_B")):
        raise UserError(f"{path}: tensor {key} is no LoRA matrix; only plain LoRA adapters can be loaded")
    return name


def _adapted_projections(tensors: dict[str, Tensor], directory: str | Path) -> list[str]:
    # The tensors' names decide: PEFT's target_modules may also be a regular expression.
    names = {name.rpartition(".")[0].rpartition(".")[2] for name in tensors}
    targets = sorted(names & set(ALL_LINEAR))
    if not targets:
        raise UserError(f"{directory}: adapts {', '.join(sorted(names))}; expected some of {ALL_LINEAR}")
    return targets


def check_matrices(config: dict, tensors: dict[str, Tensor], source: str | Path) -> None:
    """Raises UserError where a tensor is no matrix of the rank that the config says: a wrong rank could ask for any
    amount of memory."""
    for name, x in tensors.items():
        rank_dim = 0 if name.endswith("A") else 1
        if not x.is_floating_point() or x.dim() != 2 or x.shape[rank_dim] != config["r"]:
            description = f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
            raise UserError(f"{source}: {name} is {description}; expected a matrix of the config's rank {config['r']}")


def fill_adapter(adapters: Adapters, tensors: dict[str, Tensor], source: str | Path) -> None:
    """Copies tensors by name into attached adapters. One UserError lists everything that does not fit."""
    views = adapters.tensors()
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
