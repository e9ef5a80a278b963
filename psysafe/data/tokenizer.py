"""Text to token ids: tokenizer.json, the chat template of Qwen3.5, and which tokens of a conversation are trained.

Every turn of a conversation is the text `<|im_start|>{role}\\n{content}<|im_end|>\\n`. The assistant turns after the
last user query begin with a think block. They are what is trained: everything after their marker
`<|im_start|>assistant\\n<think>`, up to and including the turn's last newline.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend

from psysafe.files import expand, parse_json
from psysafe.hub import HubError, MissingFileError, fetch_file
from psysafe.program import UserError

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
THINK, THINK_END = "<think>", "</think>"
ASSISTANT_MARKER = f"{IM_START}assistant\n{THINK}"

EXPECTED_SOURCE = "model folder or a hub id such as Qwen/Qwen3.5-27B"

Message = dict[str, str]


class Tokenizer:
    """Byte-level BPE read from a tokenizer.json, with the chat template of Qwen3.5 (4B, 9B, 27B).

    eos_ids: the ids that end a generation; think_end_id: the id of `</think>`; vocab_size: the highest id plus one (a
    model's embedding may have more rows than that).
    """

    def __init__(self, backend: Backend, eos_ids: Sequence[int] | None = None):
        added = {token.content: token_id for token_id, token in backend.get_added_tokens_decoder().items()}
        missing = [token for token in (IM_START, IM_END, THINK, THINK_END) if token not in added]
        if missing:
            raise UserError(f"no added token {', '.join(missing)}: expected the tokenizer of a Qwen3.5 model")
        # A tokenizer.json may also ask for truncation and padding, which cut and add ids, and for a post-processor,
        # which can trim spaces off the offsets: a token of spaces alone would then have no place in the text.
        backend.no_truncation()
        backend.no_padding()
        backend.post_processor = None
        self._backend = backend
        self.eos_ids = tuple(eos_ids or (added[token] for token in (IM_END, END_OF_TEXT) if token in added))
        self.think_end_id = added[THINK_END]
        self.vocab_size = max(backend.get_vocab_size(with_added_tokens=False), max(added.values()) + 1)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; added tokens such as `<|im_end|>` in it are recognised, none is added."""
        return self._backend.encode(_checked(text), add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each its (start, end) in characters of `text`.

        The starts are exact in the text as given, before NFC. The tokens of one character all have its start; a
        character that NFC composed out of several has the start of the first.
        """
        encoding = self._backend.encode(_checked(text), add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, control tokens such as `<|im_end|>` included."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, enable_thinking: bool | None = True
    ) -> str:
        """The conversation as the text that the model reads. UserError for a conversation the template refuses.

        messages: [{"role", "content"}, ...]; an assistant may carry "reasoning_content", else a think block in its
        content is split off. Thinking is off only for `enable_thinking=False`, as in the templates of 4B, 9B and 27B.
        (In those of 0.8B and 2B it is off unless `enable_thinking` is True: for these models pass True or False.)
        """
        text = "".join(piece for piece, _ in rendered_pieces(messages))
        if add_generation_prompt:
            text += ASSISTANT_MARKER + "\n"
            if enable_thinking is False:
                text += f"\n{THINK_END}\n\n"
        return text

    def encode_trained(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Ids of the rendered conversation, and for each whether it is trained.

        The text is tokenised once, as a whole: pieces tokenised one by one would give other ids ("\\n" twice is two
        tokens, "\\n\\n" is one). Which pieces are trained is known from how the text was put together. The marker is
        never searched for in the text: a user may have typed it. A trained piece lies between added tokens, so no token
        belongs to two pieces.
        """
        pieces = rendered_pieces(messages)
        ids, offsets = self.encode_with_offsets("".join(piece for piece, _ in pieces))
        trained_at = [trained for piece, trained in pieces for _ in piece]
        return ids, [trained_at[start] for start, _ in offsets]


def load_tokenizer(source: str | Path, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a model folder or of a hub id (`owner/name`, at `revision`); UserError where there is none.

    Reads tokenizer.json, and the ids that end a generation from generation_config.json where there is one (else they
    are those of `<|im_end|>` and `<|endoftext|>`).
    """
    source = expand(str(source))
    path = _find_file(source, "tokenizer.json", revision)
    if path is None:
        raise UserError(f"{source}: no tokenizer.json in it; expected a {EXPECTED_SOURCE}")
    try:
        backend = Backend.from_buffer(path.read_bytes())
    except Exception as error:  # the library raises nothing more precise
        raise UserError(f"{path}: damaged ({_one_line(error)}); copy it from the model again") from None
    eos_ids = _read_eos_ids(_find_file(source, "generation_config.json", revision))
    try:
        return Tokenizer(backend, eos_ids)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _find_file(source: str | Path, name: str, revision: str | None) -> Path | None:
    """The file in the folder, or in the hub's cache after a download; None where the folder or repository lacks it."""
    folder = Path(source)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        raise UserError(f"{source}: no such folder; expected a {EXPECTED_SOURCE}")
    try:
        return fetch_file(str(source), name, revision or "")
    except MissingFileError:
        return None
    except HubError as error:
        raise UserError(f"{source}: no such folder, and {name} could not be had from the hub ({error})") from None


def _read_eos_ids(path: Path | None) -> list[int] | None:
    if path is None:
        return None
    try:
        eos_ids = parse_json(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError, OSError) as error:
        raise UserError(f"{path}: damaged ({_one_line(error)}); copy it from the model again") from None
    eos_ids = eos_ids if isinstance(eos_ids, list) else [] if eos_ids is None else [eos_ids]
    if not all(type(eos_id) is int and 0 <= eos_id < 2**31 for eos_id in eos_ids):
        raise UserError(f"{path}: eos_token_id is {eos_ids!r:.60}, expected a token's id or a list of ids")
    return eos_ids


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _checked(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"{text[error.start]!r} at character {error.start}"
        raise UserError(f"{half} is half of a surrogate pair; expected whole Unicode characters") from None
    return text


def rendered_pieces(messages: Sequence[Message]) -> list[tuple[str, bool]]:
    """The rendered conversation in order, cut into (text, trained). UserError for one that the template refuses."""
    if not messages:
        raise UserError("No messages provided.")
    contents = [_content(message, number) for number, message in enumerate(messages, 1)]
    roles = [message["role"] for message in messages]
    queries = [i for i, role in enumerate(roles) if role == "user" and not _is_tool_response(contents[i])]
    if not queries:
        raise UserError("No user query found in messages.")
    pieces = []
    for i, (role, content) in enumerate(zip(roles, contents, strict=True)):
        if role == "system" and i > 0:
            raise UserError(f"System message must be at the beginning, message {i + 1} is one.")
        if role == "assistant":
            reasoning, content = _split_reasoning(messages[i], content, i + 1)
            if i > queries[-1]:
                pieces.append((ASSISTANT_MARKER, False))
                pieces.append((f"\n{reasoning}\n{THINK_END}\n\n{content}{IM_END}\n", True))
                continue
        pieces.append((f"{IM_START}{role}\n{content}{IM_END}\n", False))
    return pieces


def _content(message: Message, number: int) -> str:
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        raise UserError(f"message {number} is {message!r:.60}, expected an object with a text under \"content\"")
    role = message.get("role")
    if role not in ("system", "user", "assistant"):
        raise UserError(f"Unexpected message role {role!r} in message {number}; expected system, user or assistant")
    return message["content"].strip()


def _is_tool_response(content: str) -> bool:
    """A tool's answer travels as a user message; the template does not take it for a query."""
    return content.startswith("<tool_response>") and content.endswith("</tool_response>")


def _split_reasoning(message: Message, content: str, number: int) -> tuple[str, str]:
    """(reasoning, answer) of an assistant message whose stripped content is `content`."""
    reasoning = message.get("reasoning_content")
    if isinstance(reasoning, str):
        return reasoning.strip(), content
    if reasoning is not None:
        raise UserError(f"message {number}: reasoning_content is {reasoning!r:.60}, expected a text")
    if THINK_END not in content:
        return "", content
    reasoning = content.split(THINK_END)[0].split(THINK)[-1].strip()
    return reasoning, content.split(THINK_END)[-1].lstrip("\n")
