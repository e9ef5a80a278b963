"""Text to token ids: tokenizer.json, the chat template of Qwen3.5, and which tokens of a conversation are trained.

Every turn of a conversation is the text `<|im_start|>{role}\\n{content}<|im_end|>\\n`. The assistant turns after the
last user query begin with a think block. They are what is trained: everything after their marker
`<|im_start|>assistant\\n<think>`, up to and including the turn's last newline.

Only the template writes control tokens. `<|im_end|>` in what somebody typed stays text and becomes the tokens of its
letters: as a control token it would end the turn, and the text behind it could begin one of any role.
"""

import itertools
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from tokenizers import Tokenizer as Backend

from psysafe.data.tool_calls import listed_tools, read_calls, read_tools, written_calls
from psysafe.files import expand, parse_json
from psysafe.hub import HubError, MissingFileError, fetch_file
from psysafe.program import UserError

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
THINK, THINK_END = "<think>", "</think>"
TOOL_RESPONSE, TOOL_RESPONSE_END = "<tool_response>", "</tool_response>"
TEMPLATE_TOKENS = (IM_START, IM_END, THINK, THINK_END, TOOL_RESPONSE, TOOL_RESPONSE_END, "<tool_call>", "</tool_call>")
ASSISTANT_MARKER = f"{IM_START}assistant\n{THINK}"

# Why an assistant turn is not trained.
EARLIER, SWITCHED_OFF, WITHOUT_TEXT = "before the last user query", "switched off", "without text"

EXPECTED_SOURCE = "model folder or a hub id such as Qwen/Qwen3.5-27B"

Message = dict  # {"role", "content"}, and what `read_turns` names
TrainTurns = Literal["last", "all"]


class Piece(NamedTuple):
    """A piece of the rendered conversation. markup: the template wrote it, and control tokens in it are tokens."""

    text: str
    markup: bool
    trained: bool = False


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
        ids ("\n" twice is two tokens, "\n\n" is one). A trained piece begins behind a control token, or behind
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


@dataclass(frozen=True)
class Turn:
    """A message, checked and in the template's terms."""

    role: str  # system, user, assistant or tool
    text: str
    reasoning: str | None = None  # of an assistant turn after the last user query; earlier ones have no think block
    calls: Sequence[dict] = ()  # {"name", "arguments"}
    untrained: str = ""  # why an assistant turn is not trained; "" where it is


def read_turns(messages: Sequence[Message], train_turns: TrainTurns = "last") -> list[Turn]:
    """The messages as turns. UserError for a conversation that the template refuses.

    A message has a role and, under "content", a text or a list of text parts; no content (None) is an empty text where
    the template has a use for it: beside an assistant's "tool_calls" and from a tool. An assistant may carry
    "reasoning_content", else a think block in its content is split off. `weight` 0, `train` false or `loss` false in an
    assistant message keep it from being trained; without text and calls it is not trained either.
    """
    if not messages:
        raise UserError("No messages provided.")
    texts = [_text(message, number) for number, message in enumerate(messages, 1)]
    roles = [message["role"] for message in messages]
    queries = [i for i, role in enumerate(roles) if role == "user" and not _is_tool_response(texts[i])]
    if not queries:
        raise UserError("No user query found in messages.")
    turns = []
    for i, (message, role, text) in enumerate(zip(messages, roles, texts, strict=True)):
        if role == "system" and i > 0:
            raise UserError(f"System message must be at the beginning, message {i + 1} is one.")
        if role == "tool" and i == 0:  # the template would leave out the beginning of its turn
            raise UserError("message 1 is a tool's answer; expected it behind the assistant's call")
        if role != "assistant":
            turns.append(Turn(role, text))
            continue
        reasoning, text = _split_reasoning(message, text, i + 1)
        calls, is_last = read_calls(message, i + 1), i > queries[-1]
        untrained = ""
        if not _is_switched_on(message, i + 1):
            untrained = SWITCHED_OFF
        elif not (text.strip() or calls):
            untrained = WITHOUT_TEXT
        elif not is_last and train_turns == "last":
            untrained = EARLIER
        turns.append(Turn(role, text, reasoning if is_last else None, calls, untrained))
    return turns


def chat_pieces(
    turns: Sequence[Turn],
    tools: object = None,
    add_generation_prompt: bool = False,
    enable_thinking: bool | None = True,
) -> list[Piece]:
    """The rendered conversation in order, cut into pieces."""
    pieces, tools = [], read_tools(tools)
    if tools:
        system = turns[0].text if turns[0].role == "system" else ""
        pieces.append(Piece(f"{IM_START}system\n", markup=True))
        pieces += [Piece(*part) for part in listed_tools(tools, system)]
        pieces.append(Piece(f"{IM_END}\n", markup=True))
    for i, turn in enumerate(turns):
        if turn.role == "assistant":
            pieces += _assistant_pieces(turn)
        elif turn.role == "tool":  # the answers of several tools in a row are one turn
            is_first = turns[i - 1].role != "tool"
            is_last = i + 1 == len(turns) or turns[i + 1].role != "tool"
            pieces.append(Piece(f"{IM_START}user" * is_first + f"\n{TOOL_RESPONSE}\n", markup=True))
            pieces.append(Piece(turn.text, markup=False))
            pieces.append(Piece(f"\n{TOOL_RESPONSE_END}" + f"{IM_END}\n" * is_last, markup=True))
        elif turn.role == "user" or not tools:  # with tools the system text stands behind them
            pieces.append(Piece(f"{IM_START}{turn.role}\n", markup=True))
            pieces += _typed_pieces(turn)
            pieces.append(Piece(f"{IM_END}\n", markup=True))
    if add_generation_prompt:
        no_thoughts = f"\n{THINK_END}\n\n" if enable_thinking is False else ""
        pieces.append(Piece(f"{ASSISTANT_MARKER}\n{no_thoughts}", markup=True))
    return pieces


def _assistant_pieces(turn: Turn) -> list[Piece]:
    trained = not turn.untrained
    if turn.reasoning is None:
        pieces = [Piece(f"{IM_START}assistant\n", markup=True)]
    else:
        pieces = [
            Piece(ASSISTANT_MARKER, markup=True),
            Piece("\n", True, trained),
            Piece(turn.reasoning, False, trained),
            Piece(f"\n{THINK_END}\n\n", True, trained),
        ]
    # An assistant's text may hold calls as the model writes them: their tags are the model's own control tokens.
    for i, part in enumerate(re.split("(</?tool_call>)", turn.text)):
        pieces.append(Piece(part, i % 2 == 1, trained))
    pieces += [Piece(*part, trained) for part in written_calls(turn.calls, turn.text)]
    return [*pieces, Piece(f"{IM_END}\n", True, trained)]


def _typed_pieces(turn: Turn) -> list[Piece]:
    """What a user or the system prompt says: text, but for the tags of a tool's answer."""
    if turn.role == "user" and _is_tool_response(turn.text):
        answer = turn.text.removeprefix(TOOL_RESPONSE).removesuffix(TOOL_RESPONSE_END)
        return [Piece(TOOL_RESPONSE, True), Piece(answer, False), Piece(TOOL_RESPONSE_END, True)]
    return [Piece(turn.text, False)]


def _text(message: Message, number: int) -> str:
    """The message's text without white space at its edges; its role is checked, too."""
    if not isinstance(message, dict):
        raise UserError(f'message {number} is {message!r:.60}, expected an object with a text under "content"')
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant", "tool"):
        expected = "system, user, assistant or tool"
        raise UserError(f"Unexpected message role {role!r:.60} in message {number}; expected {expected}")
    if content is None and role in ("assistant", "tool"):
        content = ""
    text = content_text(content)
    if text is None:
        expected = 'an object with a text, or a list of text parts, under "content"'
        raise UserError(f"message {number} is {message!r:.60}, expected {expected}")
    return text.strip()


def content_text(content: object) -> str | None:
    """A message's content, a text or a list of text parts, as one text; None for anything else, such as an image."""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") if part.get("type", "text") == "text" else None for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    return content if isinstance(content, str) else None


def _is_tool_response(text: str) -> bool:
    """A tool's answer may travel as a user message; the template does not take it for a query."""
    return text.startswith(TOOL_RESPONSE) and text.endswith(TOOL_RESPONSE_END)


def _is_switched_on(message: Message, number: int) -> bool:
    """False where the message says so: `weight` 0 (OpenAI), `train` false (axolotl), `loss` false (ms-swift)."""
    for key in ("weight", "train", "loss"):
        value = message.get(key)
        if value is not None and value not in (0, 1):  # True and False are equal to them
            raise UserError(f"message {number}: {key} is {value!r:.60}, expected 0 or 1, false or true")
    return all(message.get(key) in (None, 1) for key in ("weight", "train", "loss"))


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
