"""The chat template of Qwen3.5: messages become turns, turns become pieces of text.

Every turn is the text `<|im_start|>{role}\\n{content}<|im_end|>\\n`. The assistant turns after the last user query
begin with a think block. Here is also decided which turns are trained (`read_turns`): of these, everything after their
marker `<|im_start|>assistant\\n<think>`, up to and including the turn's last newline.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from psysafe.data.tool_calls import listed_tools, read_calls, read_tools, written_calls
from psysafe.program import UserError

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
THINK, THINK_END = "<think>", "</think>"
TOOL_RESPONSE, TOOL_RESPONSE_END = "<tool_response>", "</tool_response>"
TEMPLATE_TOKENS = (IM_START, IM_END, THINK, THINK_END, TOOL_RESPONSE, TOOL_RESPONSE_END, "<tool_call>", "</tool_call>")
ASSISTANT_MARKER = f"{IM_START}assistant\n{THINK}"

# What servers and data sets call the reasoning of an assistant message. The official template knows the first alone and
# leaves out the others in silence: a model that is trained on such messages would learn not to think.
REASONINGS = ("reasoning_content", "reasoning", "thinking")

# Why an assistant turn is not trained.
EARLIER, SWITCHED_OFF, WITHOUT_TEXT = "before the last user query", "switched off", "without text"

Message = dict  # {"role", "content"}, and what `read_turns` names
TrainTurns = Literal["last", "all"]


class Piece(NamedTuple):
    """A piece of the rendered conversation. markup: the template wrote it, and control tokens in it are tokens."""

    text: str
    markup: bool
    trained: bool = False


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

    A message has a role and, under "content", a text or a list of text parts; no content (None) is an empty text
    from an assistant, usually beside "tool_calls", and from a tool. An assistant may carry "reasoning_content" (vLLM
    calls it "reasoning", TRL "thinking"), else a think block in its content is split off. `weight` 0, `train` false or
    `loss` false in an assistant message keep it from being trained; without text and calls it is not trained either.
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
            raise UserError("message 1 is a tool's answer; expected it after the assistant's call")
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
            begin, end = f"{IM_START}user" if is_first else "", f"{IM_END}\n" if is_last else ""
            pieces.append(Piece(f"{begin}\n{TOOL_RESPONSE}\n", markup=True))
            pieces.append(Piece(turn.text, markup=False))
            pieces.append(Piece(f"\n{TOOL_RESPONSE_END}{end}", markup=True))
        elif turn.role == "user" or not tools:  # with tools the system text stands after them
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
            Piece("\n", markup=True, trained=trained),
            Piece(turn.reasoning, markup=False, trained=trained),
            Piece(f"\n{THINK_END}\n\n", markup=True, trained=trained),
        ]
    # An assistant's text may hold calls as the model writes them: their tags are the model's own control tokens.
    for i, part in enumerate(re.split("(</?tool_call>)", turn.text)):
        pieces.append(Piece(part, markup=i % 2 == 1, trained=trained))
    pieces += [Piece(*part, trained=trained) for part in written_calls(turn.calls, turn.text)]
    return [*pieces, Piece(f"{IM_END}\n", markup=True, trained=trained)]


def _typed_pieces(turn: Turn) -> list[Piece]:
    """What a user or the system prompt says: text, but for the tags of a tool's answer."""
    if turn.role == "user" and _is_tool_response(turn.text):
        answer = turn.text.removeprefix(TOOL_RESPONSE).removesuffix(TOOL_RESPONSE_END)
        return [
            Piece(TOOL_RESPONSE, markup=True),
            Piece(answer, markup=False),
            Piece(TOOL_RESPONSE_END, markup=True),
        ]
    return [Piece(turn.text, markup=False)]


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
    reasonings = {key: message.get(key) for key in REASONINGS}
    for key, value in reasonings.items():
        if not isinstance(value, str | None):
            raise UserError(f"message {number}: {key} is {value!r:.60}, expected a text")
    reasoning = next(filter(None, reasonings.values()), reasonings["reasoning_content"])
    if reasoning is not None:
        return reasoning.strip(), content
    if THINK_END not in content:
        return "", content
    reasoning = content.split(THINK_END)[0].split(THINK)[-1].strip()
    return reasoning, content.split(THINK_END)[-1].lstrip("\n")
