"""What a request asks for: the fields of OpenAI's chat and text completions, checked before any work is done.

Each field is used, harmless (a fixed list, ignored) or refused with a 400 that names it: nothing that a client asks for
is silently left out. Beside OpenAI's own there are those that servers of Qwen3.5 have: top_k, min_p,
repetition_penalty, chat_template_kwargs.enable_thinking, thinking_budget; and adapter_scale.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from psysafe.cli import shown
from psysafe.data.chat_template import content_text
from psysafe.data.prompts import with_system
from psysafe.data.tokenizer import Message, Tokenizer
from psysafe.files import parse_json
from psysafe.generation.request import RequestOptions
from psysafe.generation.sampling import MAX_LOGPROBS, MIN_TEMPERATURE, Sampling
from psysafe.program import UserError
from psysafe.serve.fields import ApiError, Fields, invalid

MAX_STOPS, MAX_STOP = 16, 200  # stop texts of a request, characters of one
MAX_SCALE = 100  # of adapter_scale, to both sides
TEXT_TOKENS = 16  # of a text completion that names no length, as OpenAI has it

HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# What this server does not do, with the values by which a client says that it does not want it.
UNSUPPORTED = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False), "response_format": ({"type": "text"},), "logit_bias": ({},),
    "modalities": (["text"],), "audio": (), "prediction": (), "web_search_options": (), "reasoning_effort": (),
    "reasoning": (), "verbosity": (), "echo": (False,), "best_of": (1,), "suffix": ("",), "guided_json": (),
    "structured_outputs": (), "ignore_eos": (False,), "min_tokens": (0,), "prompt_logprobs": (),
}  # fmt: skip
SHARED = (
    "model", "stream", "stream_options", "max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "seed", "n", "stop", "logprobs", "adapter_scale",
)  # fmt: skip
CHAT = (*SHARED, "messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs", "thinking_budget")
TEXT = (*SHARED, "prompt")
# Of a message: what clients send back of an answer of ours, or of another server's.
MESSAGE_HARMLESS = {"name", "refusal", "annotations", "id"}
MESSAGE_UNSUPPORTED = {
    "tool_calls": ([],), "function_call": (), "audio": (), "tool_call_id": (),
    "reasoning": ("",), "reasoning_content": ("",),  # of other roles than the assistant
}  # fmt: skip


@dataclass(frozen=True)
class Served:
    """What this server has: models by name, each with its adapter (None: the base), and limits."""

    models: Mapping[str, str | None]
    context: int  # tokens of prompt and answer together
    vocab_size: int
    max_rows: int  # answers that are computed or wait at the same time
    max_new_tokens: int = 2048
    max_think_tokens: int = 0
    system: str | None = None  # of conversations that have none
    sampling: Mapping[str, float] = field(default_factory=dict)  # where a request does not say


@dataclass(frozen=True)
class Asked:
    """A request, checked. Each of its prompts is answered n times."""

    model: str
    adapter: str | None
    adapter_scale: float
    options: RequestOptions
    n: int
    stop: tuple[str, ...]
    logprobs: int | None  # how many alternatives of each token; None for no probabilities at all
    stream: bool
    include_usage: bool
    prompts: tuple[list[int], ...] = ()


def read_chat(body: bytes, served: Served, tokenizer: Tokenizer) -> Asked:
    """A chat completion. Raises ApiError."""
    fields = _read_json(body)
    thinking, max_think = _reasoning(fields, served)
    wanted = fields.boolean("logprobs", False)
    if not wanted and "top_logprobs" in fields.values:
        raise ApiError(400, "top_logprobs has no effect without logprobs: true", "top_logprobs", "invalid_value")
    alternatives = fields.integer("top_logprobs", 0, 0, MAX_LOGPROBS)
    max_new = _max_tokens(fields, served, ("max_completion_tokens", "max_tokens"), served.max_new_tokens)
    asked = _shared(fields, served, alternatives if wanted else None, thinking, max_new, max_think)
    messages = with_system(_messages(fields), served.system)
    fields.end(CHAT, HARMLESS, UNSUPPORTED)
    try:
        prompt = tokenizer.encode_chat(messages, True, thinking)
    except UserError as error:
        raise ApiError(400, str(error), "messages", "invalid_value") from None
    return replace(asked, prompts=_fitting([prompt], asked, served, "messages"))


def read_text(body: bytes, served: Served, tokenizer: Tokenizer) -> Asked:
    """A text completion: the prompt is continued as it stands, without template and think block. Raises ApiError."""
    fields = _read_json(body)
    logprobs = fields.integer("logprobs", 0, 0, MAX_LOGPROBS) if "logprobs" in fields.values else None
    max_new = _max_tokens(fields, served, ("max_tokens",), TEXT_TOKENS)
    asked = _shared(fields, served, logprobs, False, max_new, 0)
    prompts = _prompts(fields, served)
    fields.end(TEXT, HARMLESS, UNSUPPORTED)
    _check_rows(len(prompts), asked.n, served, "prompt")
    try:
        encoded = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    except UserError as error:
        raise ApiError(400, str(error), "prompt", "invalid_value") from None
    return replace(asked, prompts=_fitting(encoded, asked, served, "prompt"))


def _read_json(body: bytes) -> Fields:
    try:
        return Fields(parse_json(body))
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON ({error})") from None


def _shared(
    fields: Fields, served: Served, logprobs: int | None, thinking: bool, max_new: int, max_think: int
) -> Asked:
    """What chat and text completions have in common."""
    fields.require("model", f"one of {', '.join(served.models)}")
    model = fields.text("model")
    if model not in served.models:
        names = ", ".join(served.models)
        raise ApiError(404, f"there is no model {shown(model)}; expected one of {names}", "model", "model_not_found")
    adapter = served.models[model]
    if adapter is None and "adapter_scale" in fields.values:
        raise ApiError(400, f"adapter_scale has no effect: {model} is the base", "adapter_scale", "invalid_value")
    sampling, stream = read_sampling(fields, served.sampling), fields.boolean("stream", False)
    return Asked(
        model=model,
        adapter=adapter,
        adapter_scale=fields.number("adapter_scale", 1.0, -MAX_SCALE, MAX_SCALE),
        options=RequestOptions(sampling, max_new, max_think, thinking, close_thinking_at_eos=True),
        n=fields.integer("n", 1, 1, served.max_rows),
        stop=_stop(fields),
        logprobs=logprobs,
        stream=stream,
        include_usage=_include_usage(fields, stream),
    )


def read_sampling(fields: Fields, defaults: Mapping[str, float]) -> Sampling:
    """defaults: where the fields do not say. Raises ApiError for a value out of range."""
    temperature = fields.number("temperature", defaults.get("temperature", 1.0), 0, 2)
    settings = {
        "temperature": 0.0 if temperature < MIN_TEMPERATURE else temperature,
        "top_k": fields.integer("top_k", defaults.get("top_k", 0), -1, 10**9),
        "top_p": fields.number("top_p", defaults.get("top_p", 1.0), 0, 1),
        "min_p": fields.number("min_p", defaults.get("min_p", 0.0), 0, 1),
        "presence_penalty": fields.number("presence_penalty", defaults.get("presence_penalty", 0.0), -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", defaults.get("frequency_penalty", 0.0), -2, 2),
        "repetition_penalty": fields.number("repetition_penalty", defaults.get("repetition_penalty", 1.0), 0.01, 100),
        "seed": fields.integer("seed", secrets.randbits(63), 0, 2**63 - 1),
    }
    settings["top_k"] = max(settings["top_k"], 0)  # -1 for all, as vLLM has it
    if settings["top_p"] == 0:
        raise invalid("top_p", 0, "a number above 0, at most 1 (temperature 0 takes the likeliest token)")
    return Sampling(**settings)


def _reasoning(fields: Fields, served: Served) -> tuple[bool, int]:
    """(whether to reason, most tokens of it; 0 for no limit)."""
    template = Fields(fields.take("chat_template_kwargs", {}), "chat_template_kwargs.")
    thinking = template.boolean("enable_thinking", True)
    template.end(("enable_thinking",), (), {})
    if "thinking_budget" not in fields.values:
        return thinking, served.max_think_tokens if thinking else 0
    budget = fields.integer("thinking_budget", 0, 1, 10**9)
    if not thinking:
        reason = "thinking_budget has no effect: chat_template_kwargs.enable_thinking is false"
        raise ApiError(400, reason, "thinking_budget", "invalid_value")
    return thinking, budget


def _max_tokens(fields: Fields, served: Served, names: Sequence[str], default: int) -> int:
    """The length at which the answer is cut: what the request says, and never more than the server allows."""
    given = {name: fields.integer(name, 1, 1, 10**9) for name in names if name in fields.values}
    if len(set(given.values())) > 1:
        listed = " and ".join(f"{name} {value}" for name, value in given.items())
        raise ApiError(400, f"{listed} say two things; give one of them", names[0], "invalid_value")
    return min([*given.values(), served.max_new_tokens] if given else [default, served.max_new_tokens])


def _include_usage(fields: Fields, stream: bool) -> bool:
    if "stream_options" in fields.values and not stream:
        raise ApiError(400, "stream_options has no effect without stream: true", "stream_options", "invalid_value")
    options = Fields(fields.take("stream_options", {}), "stream_options.")
    include_usage = options.boolean("include_usage", False)
    options.end(("include_usage",), ("include_obfuscation",), {})
    return include_usage


def _stop(fields: Fields) -> tuple[str, ...]:
    stop = fields.take("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > MAX_STOPS:
        raise invalid("stop", stop, f"a text, or a list of at most {MAX_STOPS}")
    for text in stop:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP:
            raise invalid("stop", text, f"a text of 1 to {MAX_STOP} characters")
    return tuple(stop)


def _messages(fields: Fields) -> list[Message]:
    """The conversation in the template's terms. Who says what in which order, the template itself checks."""
    fields.require("messages", "a list of messages")
    messages = fields.list("messages", "a list of messages")
    if not messages:
        raise invalid("messages", messages, "a list of messages, one or more")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: object, where: str) -> Message:
    fields = Fields(message, f"{where}.")
    role = fields.text("role")
    if role not in ("system", "developer", "user", "assistant"):
        raise invalid(f"{where}.role", role, "system, developer, user or assistant (tools are not supported here)")
    content = fields.take("content", "" if role == "assistant" else None)
    text = content_text(content)
    if text is None:
        raise invalid(f"{where}.content", content, "a text, or a list of text parts (no images or audio)")
    names = ("reasoning", "reasoning_content") if role == "assistant" else ()
    reasoning = [fields.text(name) for name in names if name in fields.values]
    fields.end(("role", "content", "reasoning"), MESSAGE_HARMLESS, MESSAGE_UNSUPPORTED)
    read = {"role": "system" if role == "developer" else role, "content": text}
    return read | ({"reasoning_content": reasoning[0]} if reasoning else {})


def _prompts(fields: Fields, served: Served) -> list[str | list[int]]:
    """A text, a list of texts, token ids, or a list of lists of them."""
    prompt = fields.take("prompt", "")
    prompts = prompt if isinstance(prompt, list) and prompt and type(prompt[0]) is not int else [prompt]
    for one in prompts:
        if isinstance(one, list) and one and all(type(i) is int and 0 <= i < served.vocab_size for i in one):
            continue
        if not isinstance(one, str) or not one:
            raise invalid("prompt", one, f"a text, or token ids below {served.vocab_size}; or a list of either")
    return prompts


def _check_rows(n_prompts: int, n: int, served: Served, param: str) -> None:
    """Refuses more answers than can ever be computed or wait, before the prompts become tokens."""
    if n_prompts * n > served.max_rows:
        reason = f"{n_prompts} x {n} answers at once; here {served.max_rows} are the most"
        raise ApiError(400, reason, "n" if n > 1 else param, "invalid_value")


def _fitting(prompts: Sequence[list[int]], asked: Asked, served: Served, param: str) -> tuple[list[int], ...]:
    """The prompts, which have to leave room for an answer."""
    longest = max(map(len, prompts))
    if longest >= served.context:
        reason = f"the prompt has {longest:,} tokens, but prompt and answer together have room for {served.context:,}"
        raise ApiError(400, reason, param, "context_length_exceeded")
    return tuple(prompts)
