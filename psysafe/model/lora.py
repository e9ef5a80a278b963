"""LoRA adapters: attached from outside to the fused linear layers, counted, read and written in PEFT's format.

    y = W x + s B A x        A (r, in), B (out, r) in fp32, s = alpha / r

The projections of one fused layer keep their A matrices one above the other and their B matrices likewise, because the
kernels read them so; PEFT's tensors are row slices of these. All adapters of a model live in one flat buffer, their
gradients in another: the optimiser, the gradient norm and the all-reduce each handle one tensor.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from psysafe.files import read_json, write_atomic
from psysafe.model.decoder import Qwen3_5
from psysafe.model.layers import FusedLinear
from psysafe.program import UserError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DELTA_NET_TARGETS = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
PRESETS = {"all-linear": TARGETS + DELTA_NET_TARGETS}

# Fields of PEFT's adapter_config.json under which y = W x + s B A x would not be what the adapter means.
UNSUPPORTED = (
    *("use_dora", "use_qalora", "use_bdlora", "kasa_config", "arrow_config", "alora_invocation_tokens"),
    *("modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform", "layer_replication"),
)
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts that take a part of W away when they begin


class Adapter(nn.Module):
    """The adapters of one fused layer: A (P*r, in), B (out, r) of its P projections. Projections that are no targets
    have zero rows in both, which stay zero: their gradients vanish identically."""

    def __init__(self, A: Tensor, B: Tensor, scale: float):
        super().__init__()
        self.A, self.B, self.scale = nn.Parameter(A), nn.Parameter(B), scale


@dataclass(frozen=True)
class Segment:
    """One tensor of PEFT's in the flat buffer: elements [start, stop), `shape` as PEFT has it."""

    name: str  # "layers.3.self_attn.q_proj.lora_A"
    start: int
    stop: int
    shape: tuple[int, int]


@dataclass
class Adapters:
    """All adapters of a model. `param` and `grad` (P,) are flat; the layers' A and B are views of them."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    param: Tensor
    grad: Tensor
    segments: list[Segment]
    use_rslora: bool = False

    @property
    def count(self) -> int:
        """Trained parameters."""
        return sum(segment.stop - segment.start for segment in self.segments)

    def tensors(self, flat: Tensor | None = None) -> dict[str, Tensor]:
        """PEFT's tensors by name, views of the flat parameters (or of another buffer of that layout)."""
        flat = self.param if flat is None else flat
        return {s.name: flat[s.start : s.stop].view(s.shape) for s in self.segments}


def resolve_targets(targets: str | list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """A preset's name or a list of projection names -> the names. Raises UserError for unknown ones."""
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    names = tuple(name for entry in names for name in PRESETS.get(entry, (entry,)))
    unknown = sorted(set(names) - set(PRESETS["all-linear"]))
    if unknown or not names:
        raise UserError(f"lora_targets: {unknown or 'empty'}; expected all-linear or names of {PRESETS['all-linear']}")
    return names


def attach(
    model: Qwen3_5,
    rank: int,
    alpha: float,
    targets: str | list[str] | tuple[str, ...] = TARGETS,
    seed: int = 0,
    use_rslora: bool = False,
) -> Adapters:
    """Gives every targeted projection of the model an adapter: A Kaiming-uniform(a = sqrt 5), B zero, as PEFT does.

    Adapters from before are taken off first: one left on a projection that is no target now would still add its term,
    but lie outside the new buffer. The initial values depend on the seed and the names alone, not on the device.
    """
    targets = resolve_targets(targets)
    scale = lora_scale(rank, alpha, use_rslora)
    layers = [(name, layer) for name, layer in fused_layers(model) if set(layer.parts) & set(targets)]
    if not layers:
        raise UserError(f"lora_targets {list(targets)}: the model has none of these projections")
    most = max(min(layer.weight.shape) for _, layer in layers)
    if rank > most:
        raise UserError(f"lora_rank {rank:,}: the model's projections have at most {most:,}")
    detach(model)
    device = model.norm.device  # not the embedding's, which may lie in host memory
    dtype = torch.promote_types(model.embed_tokens.dtype, torch.float32)
    sizes = [((len(layer.parts) * rank, layer.weight.shape[1]), (layer.weight.shape[0], rank)) for _, layer in layers]
    total = sum(math.prod(shape) for pair in sizes for shape in pair)
    param = torch.zeros(total, dtype=dtype, device=device)
    adapters = Adapters(rank, alpha, targets, param, torch.zeros_like(param), [], use_rslora)

    at = 0
    for (path, layer), shapes in zip(layers, sizes, strict=True):
        starts = at, at + math.prod(shapes[0])
        at = starts[1] + math.prod(shapes[1])
        A, B = (param[s : s + math.prod(shape)].view(shape) for s, shape in zip(starts, shapes, strict=True))
        layer.adapter = Adapter(A, B, scale)
        for p, s, shape in zip((layer.adapter.A, layer.adapter.B), starts, shapes, strict=True):
            p.grad = adapters.grad[s : s + math.prod(shape)].view(shape)
        adapters.segments += _segments(path, layer, starts, rank, targets)
    _initialise(adapters, seed)
    return adapters


def detach(model: Qwen3_5) -> None:
    """Takes the adapters off again."""
    for _, layer in fused_layers(model):
        layer.adapter = None


def fused_layers(model: nn.Module) -> Iterator[tuple[str, FusedLinear]]:
    """Every fused linear layer, with the published name of what it is part of ("layers.3.self_attn")."""
    for name, module in model.named_modules():
        if isinstance(module, FusedLinear):
            yield name.rpartition(".")[0], module


def _segments(path: str, layer: FusedLinear, starts: tuple[int, int], rank: int, targets) -> list[Segment]:
    found, row, features = [], 0, layer.weight.shape[1]
    for i, (part, size) in enumerate(layer.parts.items()):
        if part in targets:
            a, b = starts[0] + i * rank * features, starts[1] + row * rank
            found.append(Segment(f"{path}.{part}.lora_A", a, a + rank * features, (rank, features)))
            found.append(Segment(f"{path}.{part}.lora_B", b, b + size * rank, (size, rank)))
        row += size
    return found


def _initialise(adapters: Adapters, seed: int) -> None:
    if adapters.param.is_meta:
        return
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in adapters.tensors().items():
        if name.endswith("lora_A"):
            bound = 1 / math.sqrt(tensor.shape[1])
            tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator))


def save_adapter(
    adapters: Adapters, directory: str | Path, base: str, multimodal: bool, layout: str = "auto", revision: str = ""
) -> None:
    """Writes adapter_model.safetensors and adapter_config.json as PEFT does (0.21), each file whole or not at all.

    layout: the key names follow the base's class: `multimodal` has a `language_model.` in them, `text` has not.
    """
    nested = multimodal if layout == "auto" else layout == "multimodal"
    prefix = "base_model.model.model." + ("language_model." if nested else "")
    tensors = {f"{prefix}{name}.weight": x.detach().float().cpu() for name, x in adapters.tensors().items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
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
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_atomic(directory / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_atomic(directory / "adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())


def load_adapter(model: Qwen3_5, directory: str | Path) -> Adapters:
    """Attaches an adapter folder of ours or PEFT's, either key layout. Raises UserError for what cannot be honoured
    (DoRA, biases, extra trained modules, other shapes, keys that match nothing)."""
    config, loaded = read_adapter(directory)
    targets = _held_targets(loaded, directory)
    check_matrices(config, loaded, directory)
    adapters = attach(
        model, config["r"], config["lora_alpha"], targets, use_rslora=config.get("use_rslora", False)
    )
    fill_adapter(adapters, loaded, directory)
    return adapters


def adapter_shape(directory: str | Path) -> tuple[int, float, list[str]]:
    """(rank, alpha, targets) of an adapter folder."""
    config, loaded = read_adapter(directory)
    return config["r"], float(config["lora_alpha"]), _held_targets(loaded, directory)


def _held_targets(loaded: dict[str, Tensor], directory: str | Path) -> list[str]:
    # What the file holds decides: PEFT's target_modules may also be a regular expression.
    held = {name.rpartition(".")[0].rpartition(".")[2] for name in loaded}
    targets = sorted(held & set(PRESETS["all-linear"]))
    if not targets:
        raise UserError(f"{directory}: adapts {', '.join(sorted(held))}; expected some of {PRESETS['all-linear']}")
    return targets


def read_adapter(directory: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """(adapter_config.json, tensors by our names) of an adapter folder in PEFT's format, checked."""
    config = read_adapter_config(directory)
    file = Path(directory, "adapter_model.safetensors")
    tensors = read_adapter_tensors(file)
    if not tensors:
        raise UserError(f"{file}: holds no tensors")
    return config, tensors


def check_matrices(config: dict, tensors: dict[str, Tensor], source: str | Path) -> None:
    """Raises UserError where a tensor is no matrix of the rank that the config says: a wrong rank could ask for any
    amount of memory."""
    for name, x in tensors.items():
        if not x.is_floating_point() or x.dim() != 2 or x.shape[0 if name.endswith("A") else 1] != config["r"]:
            found = f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
            raise UserError(f"{source}: {name} is {found}; expected a matrix of the config's rank {config['r']}")


def read_adapter_config(directory: str | Path) -> dict:
    """adapter_config.json of an adapter folder. Raises UserError for what is broken in it or cannot be honoured."""
    file = Path(directory, "adapter_config.json")
    if not file.exists():
        raise UserError(f"{directory}: no adapter there (an adapter_config.json); train.py --out makes one")
    config = read_json(file)
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
    for key, kinds in (("r", (int,)), ("lora_alpha", (int, float))):
        if type(config.get(key)) not in kinds or not 0 < config[key] < 2**31:
            raise UserError(f"{file}: {key} is {config.get(key)!r:.60}, expected a number above 0 and below 2^31")
    for key, kind in (("base_model_name_or_path", str), ("revision", str), ("use_rslora", bool)):
        if not isinstance(config.get(key), kind | None):
            raise UserError(f"{file}: {key} is {config[key]!r:.60}, expected {kind.__name__}")
    return config


def lora_scale(rank: int, alpha: float, use_rslora: bool) -> float:
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def fill_adapter(adapters: Adapters, loaded: dict[str, Tensor], source: str | Path) -> None:
    """Copies tensors by name into attached adapters; one ValueError lists everything that does not fit."""
    wanted = adapters.tensors()
    if not wanted.keys() & loaded.keys():
        raise UserError(f"{source}: none of its {len(loaded)} tensors belongs to this model; is it another model's?")
    wrong = [f"missing {name}" for name in wanted.keys() - loaded.keys()]
    wrong += [f"unknown {name}" for name in loaded.keys() - wanted.keys()]
    for name in wanted.keys() & loaded.keys():
        if wanted[name].shape != loaded[name].shape:
            wrong.append(f"{name} is {tuple(loaded[name].shape)}, expected {tuple(wanted[name].shape)}")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{source}: does not fit this model: {'; '.join(sorted(wrong)[:5])}{more}")
    with torch.no_grad():
        for name, target in wanted.items():
            target.copy_(loaded[name])


def read_adapter_tensors(path: Path) -> dict[str, Tensor]:
    """PEFT's tensors by our names: "layers.3.self_attn.q_proj.lora_A" from either key layout."""
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            tensors = {_our_name(key, path): file.get_tensor(key) for key in keys}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    if len(tensors) < len(keys):
        raise UserError(f"{path}: holds a tensor twice, under the names of both layouts")
    return tensors


def _our_name(key: str, path: Path) -> str:
    name = key.removeprefix("base_model.model.").removeprefix("model.").removeprefix("language_model.")
    name = name.removesuffix(".weight").removesuffix(".default")
    if not name.endswith(("lora_A", "lora_B")):
        raise UserError(f"{path}: tensor {key} is no LoRA matrix; only plain LoRA adapters can be loaded")
    return name
