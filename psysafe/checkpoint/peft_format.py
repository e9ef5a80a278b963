"""PEFT's adapter folders, read and checked: which projection gets which matrices, of which rank and scale.

    adapter = read_adapter("DIR or hub id")
    adapter.modules["layers.3.self_attn.q_proj"].A      # (r, in)
    adapter.scale("layers.3.self_attn.q_proj")          # s of y = W x + s B A x

Files of others are checked before anything is attached: what PEFT would compute otherwise is refused by name. PEFT says
in its config which modules an adapter is for (target_modules, exclude_modules, layers_to_transform), and of which rank
and scale each is (rank_pattern, alpha_pattern); its rules are followed here (tuners/tuners_utils.py, utils/other.py).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from psysafe.checkpoint.tensor_files import NOT_FINITE, all_finite
from psysafe.files import expand, read_json
from psysafe.hub import HubError, did_you_mean, fetch_folder, is_repository
from psysafe.model.lora import ALL_LINEAR, is_target, lora_scale
from psysafe.program import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Fields of PEFT's adapter_config.json under which y = W x + s B A x would not be what the adapter means.
UNSUPPORTED = (
    *("use_dora", "use_qalora", "use_bdlora", "kasa_config", "arrow_config", "alora_invocation_tokens"),
    *("modules_to_save", "layer_replication", "lora_bias", "target_parameters", "trainable_token_indices"),
    "monteclora_config",
)
# Initialisations that subtract a part of W when training begins: the adapter fits only the base changed in that way.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
VISION = "visual."


class LoRAModule(NamedTuple):
    """What an adapter adds to one projection: s B A, with A (r, in), B (out, r), and s from alpha and r."""

    A: Tensor
    B: Tensor
    alpha: float


@dataclass
class PeftAdapter:
    """A checked adapter folder. modules: by the decoder's own names; those of the vision tower begin with `visual.`."""

    source: str
    config: dict
    modules: dict[str, LoRAModule]

    @property
    def use_rslora(self) -> bool:
        return bool(self.config.get("use_rslora"))

    @property
    def decoder_modules(self) -> dict[str, LoRAModule]:
        """The modules of the decoder, without the vision tower's."""
        return {name: module for name, module in self.modules.items() if not name.startswith(VISION)}

    @property
    def fits_every_layout(self) -> bool:
        """Whether the config selects the same modules, with the same rank and scale, under the names of each class."""
        patterns = self.config.get("rank_pattern") or self.config.get("alpha_pattern")
        return _selects_whole_projections(self.config) and not patterns

    @property
    def targets(self) -> list[str]:
        """What `attach` needs to reach the same projections: their names, or, where only some layers have an adapter,
        each one's path."""
        names = [name for name in self.decoder_modules if _projection(name) in ALL_LINEAR]
        if _selects_whole_projections(self.config):
            return sorted({_projection(name) for name in names})
        # layers.2 before layers.10
        return sorted(names, key=lambda name: re.sub(r"\d+", lambda number: number[0].zfill(9), name))

    def scale(self, name: str) -> float:
        module = self.modules[name]
        return lora_scale(len(module.A), module.alpha, self.use_rslora)

    def with_one_rank_and_scale(self) -> tuple[int, float, bool, dict[str, Tensor]]:
        """The decoder's modules for `attach`, which has one rank and one scale: (rank, alpha, use_rslora, tensors).

        Where the modules differ, smaller matrices are padded with zeros, and B takes up the ratio of the scales: B A
        times the scale stays what it was.
        """
        modules = self.decoder_modules
        kinds = {(len(module.A), module.alpha) for module in modules.values()}
        if len(kinds) == 1:
            rank, alpha = kinds.pop()
            factors = dict.fromkeys(modules, 1.0)
            rslora = self.use_rslora
        else:
            rank, rslora = max(rank for rank, _ in kinds), False
            scale = lora_scale(self.config["r"], self.config["lora_alpha"], self.use_rslora)
            alpha = scale * rank
            factors = {name: self.scale(name) / scale for name in modules}
        tensors = {}
        for name, (A, B, _) in modules.items():
            missing = rank - len(A)
            tensors[f"{name}.lora_A"] = F.pad(A, (0, 0, 0, missing))
            tensors[f"{name}.lora_B"] = F.pad(B, (0, missing)) if factors[name] == 1 else (
                F.pad(B.float() * factors[name], (0, missing)))  # fmt: skip
        return rank, float(alpha), rslora, tensors


def adapter_folder(source: str | Path) -> Path:
    """The folder of an adapter: as it is, or of a hub id downloaded. Raises UserError where neither has it."""
    if not is_repository(str(source)):
        return Path(expand(str(source))).expanduser()
    try:
        return fetch_folder(str(source), "", [CONFIG, WEIGHTS])
    except HubError as error:
        reason = did_you_mean(source, error)
        raise UserError(f"{source}: no adapter there, and the hub did not give it{reason}") from None


def read_adapter(source: str | Path) -> PeftAdapter:
    """An adapter folder of PEFT's format, or a hub id of one. Raises UserError for what is broken in it, and for what
    cannot be honoured (DoRA, biases, other trained modules, NaN)."""
    folder = adapter_folder(source)
    config = read_adapter_config(folder)
    tensors, paths = read_adapter_tensors(folder / WEIGHTS)
    names = list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
    if not any(_projection(name) in ALL_LINEAR for name in names if not name.startswith(VISION)):
        adapted = ", ".join(sorted({_projection(name) for name in names})) or "nothing"
        raise UserError(f"{folder}: adapts {adapted:.300}; expected some of {ALL_LINEAR}")
    modules = {}
    for name in names:
        matrices = [tensors.get(f"{name}.lora_{letter}") for letter in "AB"]
        for letter, matrix in zip("AB", matrices, strict=True):
            if matrix is None:
                raise UserError(f"{folder / WEIGHTS}: missing {name}.lora_{letter}")
        rank, alpha = _rank_and_alpha(config, name, paths[name], folder)
        if not name.startswith(VISION):  # whose convolutions have other shapes, and which the decoder has no use for
            _check_matrices(name, matrices, rank, folder)
        modules[name] = LoRAModule(*matrices, alpha)
    return PeftAdapter(str(source), config, modules)


def read_adapter_config(folder: str | Path) -> dict:
    """adapter_config.json of an adapter folder. Raises UserError for what is broken in it or cannot be honoured."""
    file = Path(folder, CONFIG)
    if not file.exists():
        raise UserError(f"{folder}: no adapter there (an {CONFIG}); train.py --out makes one{did_you_mean(folder)}")
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
    for key in ("r", "lora_alpha"):
        _check_number(config, key, file, key)
    for key, kind in (("base_model_name_or_path", str), ("revision", str), ("use_rslora", bool)):
        if not isinstance(config.get(key), kind | None):
            raise UserError(f"{file}: {key} is {config[key]!r:.60}, expected {kind.__name__}")
    for key, kind in _SELECTION.items():
        value = config.get(key)
        if not (value is None or isinstance(value, kind) or _is_list_of(value, kind)):
            raise UserError(f"{file}: {key} is {value!r:.60}, expected {kind.__name__} or a list of them")
    for key, number in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        if not isinstance(config.get(key), dict | None):
            raise UserError(f"{file}: {key} is {config[key]!r:.60}, expected an object")
        for pattern in config.get(key) or {}:
            _check_number(config[key], pattern, file, number)
    return config


def read_adapter_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """(PEFT's tensors by our names, for each module the paths that PEFT has for it), from either key layout, or from
    both: "layers.3.self_attn.q_proj.lora_A", and {"layers.3.self_attn.q_proj": ["model.layers.3.self_attn.q_proj"]}."""
    if not path.exists():
        pickled = path.with_name("adapter_model.bin")
        remedy = "a pickle can run code and is never opened; save it with PEFT's save_pretrained, as safetensors"
        raise UserError(f"{pickled}: {remedy}" if pickled.exists() else f"{path}: missing ({pickled.name}: {remedy})")
    tensors: dict[str, Tensor] = {}
    paths: dict[str, list[str]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in list(file.keys()):
                x, (module, matrix) = file.get_tensor(key), _module_and_matrix(key, path)
                if x.is_floating_point() and not all_finite(x):
                    raise UserError(f"{path}: {key} {NOT_FINITE}")
                name = f"{our_name(module)}.{matrix}"
                # Which of two values counts would depend on the class that reads them.
                if not torch.equal(x, tensors.setdefault(name, x)):
                    raise UserError(f"{path}: holds {name} under the names of both layouts, with different values")
                paths.setdefault(our_name(module), []).append(module)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    return tensors, paths


def our_name(module: str) -> str:
    """PEFT's path of a module, in either layout, without what stands before the decoder or the vision tower."""
    return module.removeprefix("model.").removeprefix("language_model.")


def _module_and_matrix(key: str, path: Path) -> tuple[str, str]:
    """("model.layers.3.self_attn.q_proj", "lora_A") of a key; a saved key may name PEFT's adapter, `default`."""
    name = key.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default")
    module, _, matrix = name.rpartition(".")
    if matrix not in ("lora_A", "lora_B") or not module:
        raise UserError(f"{path}: tensor {key} is no LoRA matrix; only plain LoRA adapters can be loaded")
    return module, matrix


def _projection(name: str) -> str:
    return name.rpartition(".")[2]


_SELECTION = {"target_modules": str, "exclude_modules": str, "layers_to_transform": int, "layers_pattern": str}


def _selects_whole_projections(config: dict) -> bool:
    """Whether the config reaches every module of the projections that it names."""
    targets = config.get("target_modules") or "all-linear"
    plain = targets == "all-linear" if isinstance(targets, str) else not any("." in target for target in targets)
    return plain and not config.get("exclude_modules") and _layers(config) is None


def _layers(config: dict) -> list[int] | None:
    layers = config.get("layers_to_transform")
    return [layers] if isinstance(layers, int) else layers or None


def is_selected(config: dict, path: str) -> bool:
    """Whether PEFT gives the module of that path an adapter (its check_target_module_exists)."""
    excluded = config.get("exclude_modules") or []
    if re.fullmatch(excluded, path) if isinstance(excluded, str) else is_target(path, excluded):
        return False
    targets = config.get("target_modules") or "all-linear"
    if targets == "all-linear" or isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, path) is not None
    if path in targets:
        return True  # a whole path counts in every layer
    layers, patterns = _layers(config), config.get("layers_pattern") or r"[^.]*"
    if not is_target(path, targets) or layers is None:
        return is_target(path, targets)
    patterns = [patterns] if isinstance(patterns, str) else patterns
    matches = (re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", path) for pattern in patterns)
    return any(int(match["index"]) in layers for match in matches if match)


def _rank_and_alpha(config: dict, name: str, paths: Sequence[str], folder: Path) -> tuple[int, float]:
    """PEFT's rank and alpha of a module. A file of both layouts has two paths for it, which have to agree."""
    file = folder / CONFIG
    try:
        # One path is enough: a pattern may be written for one of the two classes.
        if not any(is_selected(config, path) for path in paths):
            raise UserError(f"{file}: {name} has an adapter, but target_modules and what limits them leave it out")
        values = {
            (_matching(config, "rank_pattern", path, "r"), _matching(config, "alpha_pattern", path, "lora_alpha"))
            for path in paths
        }
    except re.error as error:
        raise UserError(f"{file}: a pattern in it is no regular expression ({error})") from None
    if len(values) > 1:
        raise UserError(f"{file}: rank_pattern or alpha_pattern give {name} other values in each of the two layouts")
    return values.pop()


def _matching(config: dict, patterns: str, path: str, default: str) -> float:
    """The value of the first pattern that ends the path, else the default's (PEFT's get_pattern_key)."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return config[default]


def _check_matrices(name: str, matrices: Sequence[Tensor], rank: int, folder: Path) -> None:
    """Raises UserError where a tensor is no matrix of the rank that the config says: a wrong rank could ask for any
    amount of memory."""
    for letter, dim, x in zip("AB", (0, 1), matrices, strict=True):
        if not x.is_floating_point() or x.dim() != 2 or x.shape[dim] != rank:
            description = f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
            where = f"{folder}: {name}.lora_{letter}"
            raise UserError(f"{where} is {description}; expected a matrix of the config's rank {rank}")


def _check_number(values: dict, key: str, file: Path, kind: str) -> None:
    # type() and not isinstance(): JSON's true is an int in Python. The bound keeps a file from asking for terabytes.
    types = (int,) if kind == "r" else (int, float)
    if type(values.get(key)) not in types or not 0 < values[key] < 2**31:
        raise UserError(f"{file}: {key:.60} is {values.get(key)!r:.60}, expected a number above 0 and below 2^31")


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)
