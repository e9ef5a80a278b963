"""Text to token ids: tokenizer.json, the chat template of Qwen3.5 (`chat_template.py`), and which tokens are trained.

Only the template writes control tokens. `<|im_end|>` in what somebody typed stays text and becomes the tokens of its
letters: as a control token it would end the turn, and the text after it could begin one of any role.
"""

import itertools
import json
import operator
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend

from psysafe.data.chat_template import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    TEMPLATE_TOKENS,
    THINK,
    THINK_END,
    Message,
    Piece,
    TrainTurns,
    chat_pieces,
    read_turns,
)
from psysafe.files import MAX_JSON_BYTES, expand, read_bounded, read_json
from psysafe.hub import HubError, MissingFileError, did_you_mean, fetch_file, is_repository
from psysafe.printable import one_line
from psysafe.program import UserError

EXPECTED_SOURCE = "model folder or a hub id such as Qwen/Qwen3.5-27B"

# The ways in which the tokenizers of Qwen2 to Qwen3.5 split a text, each an alternative of one regular expression.
SPLITS = {
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\p{N}", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
    r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*",
}  # fmt: skip

# How byte-level BPE spells bytes: printable ones of Latin-1 as themselves, the others by letters from U+0100 on.
PRINTABLE = (*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), 256))
BYTE_OF_LETTER = {chr(byte): byte for byte in PRINTABLE}
BYTE_OF_LETTER |= {chr(256 + n): byte for n, byte in enumerate(sorted({*range(256)} - {*PRINTABLE}))}


class Tokenizer:
    """Byte-level BPE read from a tokenizer.json, with the chat template of Qwen3.5 (4B, 9B, 27B).

    eos_ids: the ids that end a generation, that of `<|im_end|>` always among them; think_end_id: the id of `</think>`;
    vocab_size: the highest id plus one (a model's embedding may have more rows than that).
    """

    def __init__(self, backend: Backend, eos_ids: Sequence[int] | None = None):
        added = {token.content: token_id for token_id, token in backend.get_added_tokens_decoder().items()}
        missing = [token for token in (IM_START, IM_END, THINK, THINK_END) if token not in added]
        if missing:
            raise UserError(f"no added token {', '.join(missing)}: expected the tokenizer of a Qwen3.5 model")
        _check_parts(backend)
        # A tokenizer.json may also ask for truncation and padding, which cut and add ids, and for a post-processor,
        # which may add tokens of its own.
        backend.no_truncation()
        backend.no_padding()
        backend.post_processor = None
        self._backend = backend
        # The same vocabulary without added tokens: what it encodes stays text.
        self._plain = Backend(backend.model)
        self._plain.normalizer, self._plain.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
        self._added = added
        self._template_token = re.compile(f"({'|'.join(re.escape(t) for t in TEMPLATE_TOKENS if t in added)})")
        self._any_token = re.compile("|".join(map(re.escape, added)))
        # A base model's generation_config.json may name `<|endoftext|>` alone. The template ends turns by `<|im_end|>`,
        # and a generation that ran through it would go on and write the user's next turn.
        default = (added[END_OF_TEXT],) if END_OF_TEXT in added else ()
        self.eos_ids = tuple(dict.fromkeys((added[IM_END], *(eos_ids or default))))
        self.think_end_id = added[THINK_END]
        self.vocab_size = max(backend.get_vocab_size(with_added_tokens=False), max(added.values()) + 1)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; added tokens such as `<|im_end|>` in it are recognised, none is added."""
        return self._backend.encode(_checked(text), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, control tokens such as `<|im_end|>` included."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The part of a text, in UTF-8, that one id stands for; a character may be spread over several ids."""
        token = self._backend.id_to_token(token_id) or ""
        # A token of the vocabulary is spelt in 256 letters that stand for bytes; an added one may be spelt as it is.
        values = [BYTE_OF_LETTER.get(letter) for letter in token]
        return token.encode() if None in values else bytes(values)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        enable_thinking: bool | None = True,
        tools: object = None,
    ) -> str:
        """The conversation as text, to be read. UserError for a conversation that the template refuses.

        What the model reads are the ids of `encode_chat`: in this text a typed `<|im_end|>` looks like the template's.

        messages: [{"role", "content"}, ...], see `read_turns`. tools: the JSON schemas of what the model may call.
        Thinking is off only for `enable_thinking=False`, as in the templates of 4B, 9B and 27B. (In those of 0.8B and
        2B it is off unless `enable_thinking` is True: for these models pass True or False.)
        """
        pieces = chat_pieces(read_turns(messages), tools, add_generation_prompt, enable_thinking)
        return "".join(piece.text for piece in pieces)

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        enable_thinking: bool | None = True,
        tools: object = None,
    ) -> list[int]:
        """Ids of the conversation, control tokens in what somebody typed as text. Arguments and errors as `render`.

        Equal to transformers' `apply_chat_template` for conversations without such tokens in their texts.
        """
        return self._encode_pieces(chat_pieces(read_turns(messages), tools, add_generation_prompt, enable_thinking))[0]

    def encode_trained(
        self, messages: Sequence[Message], tools: object = None, train_turns: TrainTurns = "last"
    ) -> tuple[list[int], list[bool]]:
        """Ids of the conversation, as `encode_chat`, and for each whether it is trained.

        Which pieces are trained is known from how the text was put together. The marker is never searched for in the
        text: a user may have typed it.
        """
        return self._encode_pieces(chat_pieces(read_turns(messages, train_turns), tools))

    def has_typed_tokens(self, messages: Sequence[Message], tools: object = None) -> bool:
        """Whether a text of the conversation holds a control token, which `encode_chat` takes for text."""
        pieces = chat_pieces(read_turns(messages), tools)
        return any(self._any_token.search(piece.text) for piece in pieces if not piece.markup)

    def _encode_pieces(self, pieces: Sequence[Piece]) -> tuple[list[int], list[bool]]:
        """(ids, trained) of the rendered text."""
        ids, trained = [], []
        for text, is_token, is_trained in self._runs(pieces):
            run = [self._added[text]] if is_token else self._plain.encode(_checked(text), add_special_tokens=False).ids
            ids += run
            trained += [is_trained] * len(run)
        return ids, trained

    def _runs(self, pieces: Sequence[Piece]) -> Iterator[tuple[str, bool, bool]]:
        """The rendered text as (text, whether it is a control token, trained).

        Texts between two control tokens are one run, as in the tokenizer itself: piece by piece they would have other
        ids ("\n" twice is two tokens, "\n\n" is one). A trained piece begins after a control token, or after
        "assistant\n": the split pattern ends a token at a newline that no white space follows.
        """
        parts = (
            (part, i % 2 == 1, piece.trained)
            for piece in pieces
            for i, part in enumerate(self._template_token.split(piece.text) if piece.markup else [piece.text])
            if part
        )
        for (is_token, trained), group in itertools.groupby(parts, key=operator.itemgetter(1, 2)):
            texts = [text for text, _, _ in group]
            for text in texts if is_token else ["".join(texts)]:
                yield text, is_token, trained


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
        backend = Backend.from_buffer(read_bounded(path, MAX_JSON_BYTES))
    except UserError:
        raise
    except Exception as error:  # the library raises nothing more precise
        raise UserError(f"{path}: damaged ({_reason(error)}); copy it from the model again") from None
    eos_ids = _read_eos_ids(_find_file(source, "generation_config.json", revision))
    try:
        return Tokenizer(backend, eos_ids)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _check_parts(backend: Backend) -> None:
    """UserError unless text is normalised and split as in Qwen's tokenizers.

    Other parts give other ids than the model learnt, and may never end: replacements can multiply a text, and a regular
    expression can try for ever.
    """
    normalizer, splitter = (
        json.loads(part.__getstate__()) if part is not None else {"type": "none"}
        for part in (backend.normalizer, backend.pre_tokenizer)
    )
    if normalizer["type"] not in ("NFC", "none"):
        raise UserError(f"its normalizer is {normalizer['type']}, expected NFC as in Qwen3.5")
    for part in splitter.get("pretokenizers", [splitter]):
        pattern = part.get("pattern", {}).get("Regex", "")
        unknown = set(re.split(r"\|(?![^(]*\))", pattern)) - SPLITS if part["type"] == "Split" else set()
        if part["type"] not in ("Split", "ByteLevel", "none") or unknown:
            what = f"the pattern {min(unknown)!r:.60}" if unknown else part["type"]
            raise UserError(f"it splits text by {what}, expected the pattern of Qwen3.5")


def _find_file(source: str | Path, name: str, revision: str | None) -> Path | None:
    """The file in the folder, or in the hub's cache after a download; None where the folder or repository lacks it."""
    folder = Path(source)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    if not is_repository(str(source)):
        raise UserError(f"{source}: no such folder (expected a {EXPECTED_SOURCE}){did_you_mean(source)}")
    try:
        return fetch_file(str(source), name, revision or "")
    except MissingFileError:
        return None
    except HubError as error:
        reason = did_you_mean(source, error)
        raise UserError(f"{source}: no such folder, and {name} could not be had from the hub{reason}") from None


def _read_eos_ids(path: Path | None) -> list[int] | None:
    if path is None:
        return None
    eos_ids = read_json(path).get("eos_token_id")
    eos_ids = eos_ids if isinstance(eos_ids, list) else [] if eos_ids is None else [eos_ids]
    if not all(type(eos_id) is int and 0 <= eos_id < 2**31 for eos_id in eos_ids):
        raise UserError(f"{path}: eos_token_id is {eos_ids!r:.60}, expected a token's id or a list of ids")
    return eos_ids


def _reason(error: Exception) -> str:
    return one_line(str(error))[:200] or type(error).__name__


def _checked(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"{text[error.start]!r} at character {error.start}"
        raise UserError(f"{half} is half of a surrogate pair; expected whole Unicode characters") from None
    return text
