"""The system prompts by name, and any file instead of them."""

from pathlib import Path

from psysafe.files import ASSETS, expand
from psysafe.program import UserError

NAMES = ("none", "v0", "v1")


def system_text(name: str) -> str | None:
    """none -> None (no system message); v0, v1 -> the bundled prompts; anything else is a text file."""
    if name == "none":
        return None
    path = ASSETS / f"system_{name}.txt" if name in NAMES else Path(expand(name))
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--system {name}: no readable text file ({error}); expected none, v0, v1 or a file") from None
    if not text:
        raise UserError(f"--system {name}: the file is empty; use none to send no system message")
    return text
