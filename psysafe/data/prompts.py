"""The system prompts by name, any file instead of them, and a system prompt in front of a conversation."""

from collections.abc import Sequence
from pathlib import Path

from psysafe.data.tokenizer import Message
from psysafe.files import ASSETS, MAX_TEXT_BYTES, expand, read_text
from psysafe.program import UserError

NAMES = ("none", "v0", "v1")


def system_text(name: str) -> str | None:
    """none -> None (no system message); v0, v1 -> the bundled prompts; anything else is a text file."""
    if name == "none":
        return None
    path = ASSETS / f"system_{name}.txt" if name in NAMES else Path(expand(name))
    try:
        text = read_text(path, MAX_TEXT_BYTES).strip()
    except (OSError, UserError) as error:
        raise UserError(f"--system {name}: no readable text file ({error}); expected none, v0, v1 or a file") from None
    if not text:
        raise UserError(f"--system {name}: the file is empty; use none to send no system message")
    return text


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """The conversation with `system` in front, unless it has its own system message or `system` is None."""
    # Messages of a file come here unchecked: one may be of any type.
    has_system = bool(messages) and isinstance(messages[0], dict) and messages[0].get("role") == "system"
    return list(messages) if system is None or has_system else [{"role": "system", "content": system}, *messages]
