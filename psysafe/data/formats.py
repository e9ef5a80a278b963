"""The shapes in which data sets keep a conversation, each brought into ours.

    standard({"instruction": "Sum up:", "input": "A long text.", "output": "Short."}).fields
        {"prompt": "Sum up:\\nA long text.", "answer": "Short."}

A new shape is one function and one entry in FORMATS. The function takes the fields of a row and gives a `Standard`, or
None where the row is not of its shape; UserError where it is, and cannot be read. docs/recipe.md shows users the same.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from psysafe.data.chat_template import THINK, THINK_END, content_text
from psysafe.data.prompts import with_system
from psysafe.program import UserError

ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}  # ShareGPT's names; others are the template's own
ANSWERS = ("answer", "completion", "response", "output")
SYSTEMS = ("system", "system_prompt")
REASONINGS = ("reasoning", "reasoning_language")
# Columns of data sets for models that see and hear. A row without its picture would teach an answer to nothing.
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


class Standard(NamedTuple):
    """A row's fields under our names, `messages` or `prompt`, `answer` and `system`, beside all its other fields.

    names: ours -> the row's own, of fields that have another name there. An error speaks of the row's own.
    """

    fields: dict
    names: dict[str, str]


def standard(fields: dict) -> Standard:
    """A row of any shape; one of no known shape as it is. UserError for a conversation that cannot be read."""
    shapes = (shape(fields) for shape in FORMATS.values())
    match = next((row for row in shapes if row is not None), None)
    if match and (key := _first(fields, MEDIA)):
        raise UserError(f"{key} is {fields[key]!r:.60}; only text is read here: leave out the row, or the field")
    if match is None and fields.get("messages") == []:
        return Standard(fields, {})  # the chat template refuses it in its own words
    row = match or Standard(fields, {})
    if "messages" in row.fields and not _has(row.fields, "messages"):
        # Joined data sets have the columns of all in every row: null means that this row has no messages.
        return row._replace(fields={key: value for key, value in row.fields.items() if key != "messages"})
    return row


def user_texts(fields: dict) -> list[str]:
    """What the person typed, turn by turn, in a row of any shape; nothing where there is nothing of the kind."""
    fields = standard(fields).fields
    contents = [fields.get("prompt")]
    if isinstance(messages := fields.get("messages"), list):
        contents = [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "user"]
    return [text for text in map(content_text, contents) if text and text.strip()]


def _has(fields: dict, key: str) -> bool:
    """Whether the field holds something. None, "" and [] are what a table puts where a row has no such field."""
    return fields.get(key) not in (None, "", [])


def _first(fields: dict, keys: Iterable[str]) -> str | None:
    """The first of these fields that holds something."""
    return next((key for key in keys if _has(fields, key)), None)


def _replaced(fields: dict, used: Iterable[str | None], own: dict) -> dict:
    """Our own fields instead of the used ones, and all others."""
    return own | {key: value for key, value in fields.items() if key not in used and key not in own}


def _pair(fields: dict, prompt: str) -> Standard:
    """A prompt under this name, the first answer that there is, and the row's own system message.

    A think block at the beginning of the answer is the row's reasoning, unless it has one of its own.
    """
    if _has(fields, "history"):
        raise UserError(f"history: earlier turns beside {prompt} are not read; write the row as messages")
    names = {"prompt": prompt, "answer": _first(fields, ANSWERS) or "answer", "system": _first(fields, SYSTEMS)}
    renamed = {ours: theirs for ours, theirs in names.items() if theirs}
    own = {ours: fields[theirs] for ours, theirs in renamed.items() if theirs in fields}
    used = [*renamed.values(), "history"]
    if (block := _think_block(own.get("answer"))) and not _first(fields, REASONINGS):
        own["reasoning"], own["answer"] = block[1].strip(), block[2].lstrip()
    return Standard(_replaced(fields, used, own), renamed)


def _think_block(answer: object) -> re.Match | None:
    """(reasoning, answer) of a text that begins with one whole think block and has no other of its tags."""
    tag = f"{THINK}|{THINK_END}"
    pattern = rf"\s*{THINK}((?:(?!{tag}).)*){THINK_END}((?:(?!{tag}).)*)"
    return re.fullmatch(pattern, answer, re.DOTALL) if isinstance(answer, str) else None


def _conversation(fields: dict, messages: object, names: dict[str, str], used: Iterable[str] = ()) -> Standard:
    """A conversation, with the row's own system message in front where it has none, as in Anthropic's API."""
    if (key := _first(fields, SYSTEMS)) and isinstance(messages, list):
        messages = with_system(messages, fields[key])
    return Standard(_replaced(fields, (*used, *SYSTEMS), {"messages": messages}), names)


def _messages(fields: dict) -> Standard | None:
    """OpenAI: `messages`, a list of {"role", "content"}. The chat template checks the turns."""
    return _conversation(fields, fields["messages"], {}) if _has(fields, "messages") else None


def _sharegpt(fields: dict) -> Standard | None:
    """ShareGPT: `conversations`, a list of {"from": "human", "value": ...}, of {"role", "content"}, or of texts."""
    name = _first(fields, ("conversations", "conversation"))
    if name is None:
        return None
    turns = fields[name]
    if isinstance(turns, list):
        turns = [_turn(turn, i, name) for i, turn in enumerate(turns)]
    return _conversation(fields, turns, {"messages": name}, [name])


def _turn(turn: object, i: int, name: str) -> dict:
    if isinstance(turn, str):
        return {"role": ("user", "assistant")[i % 2], "content": turn}
    if isinstance(turn, dict):
        role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if isinstance(role, str) and isinstance(content, str):
            # What else the turn has (a weight, a flag whether it is trained) counts as in messages.
            return _replaced(turn, ("from", "value"), {"role": ROLES.get(role, role), "content": content})
    raise UserError(f"turn {i + 1} of {name} is {turn!r:.60}, expected an object with from and value, both texts")


def _messages_in_two(fields: dict) -> Standard | None:
    """TRL's conversational form: `prompt` and `completion` are lists of messages."""
    prompt, completion = fields.get("prompt"), fields.get("completion") or []
    if not prompt or not isinstance(prompt, list):
        return None
    if not isinstance(completion, list):
        raise UserError(f"completion is {completion!r:.60}, expected a list of messages, for prompt is one")
    return _conversation(fields, prompt + completion, {}, ["prompt", "completion"])


def _prompt(fields: dict) -> Standard | None:
    """Ours: `prompt` and `answer`. Others call the answer completion, response or output."""
    return _pair(fields, "prompt") if _has(fields, "prompt") else None


def _alpaca(fields: dict) -> Standard | None:
    """Alpaca: `instruction`, `input` and `output`. LLaMA-Factory joins the first two in the same way. Dolly calls the
    second one `context`."""
    if not _has(fields, "instruction"):
        return None
    keys = "instruction", "input", "context"
    for key in keys:
        if not isinstance(fields.get(key), str | None):
            raise UserError(f"{key} is {fields[key]!r:.60}, expected a text")
    texts = [text for key in keys if (text := fields.get(key)) and text.strip()]
    row = _pair(fields | {"instruction": "\n".join(texts)}, "instruction")
    return row._replace(fields=_replaced(row.fields, keys, {}))


def _question(fields: dict) -> Standard | None:
    """Benchmarks and OpenOrca: `question`, with an answer under any name and a `system_prompt`."""
    return _pair(fields, "question") if _has(fields, "question") else None


def _turns(fields: dict) -> Standard | None:
    """SORRY-Bench and MT-bench: `turns`, the texts that the person types one after the other. The first is asked."""
    if not _has(fields, "turns"):
        return None
    turns = fields["turns"]
    return _pair(fields | {"turns": turns[0] if isinstance(turns, list) else turns}, "turns")


def _hh_rlhf(fields: dict) -> Standard | None:
    """hh-rlhf: `chosen`, a dialogue as one text. Its first turn: what the person says first, and the reply to it."""
    name = _first(fields, ("chosen", "transcript"))
    text = fields[name] if name else None
    dialogue = re.split(r"(?:\A|\n\n)(Human|Assistant):", text.strip()) if isinstance(text, str) else []
    if dialogue[1:2] != ["Human"]:
        return None
    own = {"prompt": dialogue[2].strip()}
    if dialogue[3:4] == ["Assistant"]:
        own["answer"] = dialogue[4].strip()
    return Standard(_replaced(fields, (name,), own), {})


FORMATS: dict[str, Callable[[dict], Standard | None]] = {  # the first that fits counts
    "messages": _messages,
    "ShareGPT": _sharegpt,
    "prompt and completion of messages": _messages_in_two,
    "prompt and answer": _prompt,
    "Alpaca": _alpaca,
    "question": _question,
    "turns": _turns,
    "hh-rlhf": _hh_rlhf,
}
