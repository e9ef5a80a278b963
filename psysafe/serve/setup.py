"""What is served, in order: the model, its adapters, cache slots, the engine and its thread."""

from pathlib import Path

import torch

import kernels
from psysafe.checkpoint.adapter import attach_many, base_of_adapter, warn_of_other_base
from psysafe.checkpoint.base import load_model, resolve_model
from psysafe.cli import say
from psysafe.data.prompts import system_text
from psysafe.data.tokenizer import Tokenizer, load_tokenizer
from psysafe.files import BUNDLED_MODEL
from psysafe.generation.engine import Engine
from psysafe.generation.generator import check_context, text_engine
from psysafe.generation.sampling import recommended
from psysafe.generation.slots import MAX_SLOTS, choose_slots
from psysafe.model.decoder import Qwen3_5
from psysafe.model.mixed_adapters import MixedAdapters
from psysafe.program import UserError
from psysafe.runtime import start
from psysafe.serve.fields import ApiError, Fields
from psysafe.serve.protocol import Served, read_sampling
from psysafe.serve.settings import Limits, Settings
from psysafe.serve.worker import Worker

MAX_CONTEXT = 8192  # where --context says nothing: memory for the 262,144 tokens of a large model would be too much


def set_up(settings: Settings) -> tuple[Served, Tokenizer, Worker]:
    """Loads what is asked for. The worker's thread is not started."""
    limits, system = settings.limits, system_text(settings.system)
    source, revision = settings.model or BUNDLED_MODEL, None
    if settings.adapters and not settings.model:
        source, revision = base_of_adapter(next(iter(settings.adapters.values())))
    runtime = start(settings.device, settings.dtype)
    torch.set_deterministic_debug_mode("default")  # deterministic index_put sorts; ours writes no place twice
    folder, commit = resolve_model(source, revision)
    for adapter in settings.adapters.values():
        warn_of_other_base(adapter, source)
    tokenizer = load_tokenizer(folder)
    model = load_model(source, device=runtime.device, dtype=runtime.dtype, revision=commit or None)
    live = kernels.describe(runtime.device, model.config.head_dim)
    say(f"{source}, {runtime.dtype} on {runtime.device_name}; kernels: {live}")
    adapters = attach_many(model, settings.adapters) if settings.adapters else None
    engine = make_engine(model, tokenizer, adapters, limits, settings.deterministic)
    base = {settings.base_name: None} if settings.base_name else {}
    served = Served(
        models=base | {name: name for name in settings.adapters},
        context=engine.max_tokens,
        vocab_size=model.config.vocab_size,
        max_rows=engine.slots + limits.max_queue,
        max_new_tokens=limits.max_new_tokens,
        max_think_tokens=limits.max_think_tokens,
        system=system,
        sampling=default_sampling(folder),
    )
    return served, tokenizer, Worker(engine, tokenizer, limits.max_queue)


def make_engine(
    model: Qwen3_5, tokenizer: Tokenizer, adapters: MixedAdapters | None, limits: Limits, deterministic: bool
) -> Engine:
    """The engine, with as many slots as are asked for, else as fit. Raises UserError where they have no room."""
    positions = check_context(model, limits.context)
    context = limits.context or min(positions, MAX_CONTEXT)
    wanted = limits.slots or MAX_SLOTS[model.embed_tokens.device.type]
    slots = choose_slots(model, context, wanted, limits.slots > 0, remedy="lower --slots or --context")
    engine = text_engine(model, tokenizer, slots, context, deterministic=deterministic, adapters=adapters)
    total_mb = slots * engine.cache.bytes_per_slot / 1e6
    say(f"memory for {slots} x {context:,} tokens: {total_mb:,.1f} MB")
    return engine


def default_sampling(folder: Path) -> dict[str, float]:
    """What holds where a request says nothing: the model's generation_config.json, else OpenAI's defaults. Raises
    UserError for values that no request may have."""
    file = folder / "generation_config.json"
    settings = recommended(folder) if file.is_file() else {}
    settings.pop("seed", None)  # without one each request has another
    try:
        read_sampling(Fields(settings), {})
    except ApiError as error:
        raise UserError(f"{file}: {error.message}") from None
    listed = ", ".join(f"{name} {value:g}" for name, value in settings.items())
    say(f"where a request says nothing: {listed or 'temperature 1'}")
    return settings
