"""Refuses to publish what is this machine's own: paths, names of bundled assets, tokens.

What is uploaded is checked as text before anything is sent. No error repeats what it found: a log is read by others,
too.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import get_token
from safetensors import SafetensorError, safe_open

from psysafe.program import UserError

# Two folders or more, as in /home/me/rows.jsonl. In front of it stands no part of a URL, a word, or a relative path.
ABSOLUTE = re.compile(
    r"(?<![\w.:/~<-])/(?:[\w.@+-]+/)+[\w.@+-]*|(?<!\w)~/[\w.@+-]+|\b[A-Za-z]:\\{1,2}\w+\\|\bfile:/+[\w.@+%/-]+"
)
PATTERNS = {
    "a path of this machine": ABSOLUTE,
    "the name of a bundled asset (assets:)": re.compile(r"\bassets:[\w.]"),
    "a token": re.compile(
        r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}|\bsk-[\w-]{20,}|\bgh[pousr]_\w{30,}|\bgithub_pat_\w{20,}"
        r"|\bAKIA[A-Z0-9]{16}\b|\bBearer\s+[\w.~+/-]{16,}|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}"
    ),
}
SECRET = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD)$")  # names of environment variables
# Files of the base, with vocabularies in which any of these may stand as a piece of a word.
VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "chat_template.jinja")
TEXT = (".md", ".json", ".jsonl", ".yaml", ".txt", ".toml", ".jinja")
TERMS = ("LICENSE", "NOTICE")  # how the names of the base's own terms begin
HEAD = 4096  # bytes of a GGUF file in which its name and origin stand


def check(files: Iterable[tuple[str, bytes | Path]]) -> None:
    """files: (path in the repository, content or file). UserError names the first file and line that must not leave."""
    secrets = _secrets()
    for path, content in files:
        for number, line in enumerate(_text(path, content).splitlines(), 1):
            what = next((kind for kind, pattern in PATTERNS.items() if pattern.search(line)), "")
            if any(secret in line for secret in secrets):
                what = "a token"
            if what:
                raise UserError(
                    f"{path} line {number}: holds {what}, which must not be published; nothing was sent. Take it out "
                    "of what the file is made from (the results, the merged folder), or leave that out"
                )


def without_folders(text: str) -> str:
    """Absolute paths, as an evaluation's notes and variants may have them, by their last part alone."""
    return ABSOLUTE.sub(lambda match: Path(match[0]).name, text)


def _secrets() -> list[str]:
    """The hub's token, and what this process has under names of tokens and keys."""
    values = [value for name, value in os.environ.items() if SECRET.search(name.upper())]
    return [value for value in (get_token(), *values) if value and len(value) >= 8]


def _text(path: str, content: bytes | Path) -> str:
    """What of a file is read: text files whole, of weights what stands in front of the numbers."""
    name = Path(path).name
    if isinstance(content, bytes):
        return content.decode("utf-8", "replace")
    if name.endswith(".safetensors"):
        return _metadata(content)
    if name.endswith(".gguf"):
        with open(content, "rb") as file:
            return file.read(HEAD).decode("latin-1")
    if name in VOCABULARY or not (name.endswith(TEXT) or name.upper().startswith(TERMS)):
        return ""
    return content.read_text(encoding="utf-8", errors="replace")


def _metadata(path: Path) -> str:
    try:
        with safe_open(path, framework="pt") as file:
            return "\n".join(f"{key}: {value}" for key, value in (file.metadata() or {}).items())
    except SafetensorError as error:
        raise UserError(f"{path.name}: not a whole safetensors file ({error})") from None
