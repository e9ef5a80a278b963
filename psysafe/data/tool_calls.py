"""Tools as the chat template of Qwen3.5 writes them: what a model is told of them, and how it calls one.

Everything comes as parts (text, markup). In markup `<tool_call>` is the control token; in a value that somebody else
wrote it is text.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence

from psysafe.files import parse_json
from psysafe.program import UserError

Part = tuple[str, bool]

# Word for word the official template's: the model was trained on these sentences.
FORMAT = """

If you choose to call a function ONLY reply in the following format with NO suffix:

<tool_call>
<function=example_function_name>
<parameter=example_parameter_1>
value_1
</parameter>
<parameter=example_parameter_2>
This is the value for the second parameter
that can span
multiple lines
</parameter>
</function>
</tool_call>

<IMPORTANT>
Reminder:
- Function calls MUST follow the specified format: an inner <function=...></function> block must be nested within \
<tool_call></tool_call> XML tags
- Required parameters MUST be specified
- You may provide optional reasoning for your function call in natural language BEFORE the function call, but NOT after
- If there is no function call available, answer the question like normal with your current knowledge and do not tell \
the user about function calls
</IMPORTANT>"""


def listed_tools(tools: Sequence[dict], system: str) -> Iterator[Part]:
    """The text of the system turn: the tools as JSON, how to call one, then the conversation's own system text."""
    yield "# Tools\n\nYou have access to the following functions:\n\n<tools>", True
    for tool in tools:
        yield "\n" + json.dumps(tool, ensure_ascii=False), False
    yield "\n</tools>" + FORMAT, True
    if system:
        yield "\n\n" + system, False


def written_calls(calls: Sequence[dict], text: str) -> Iterator[Part]:
    """The calls of an assistant turn, as they stand after its text."""
    for i, call in enumerate(calls):
        yield "\n" if i else "\n\n" if text.strip() else "", True
        yield "<tool_call>\n<function=", True
        yield call["name"], False
        yield ">\n", True
        for name, value in call["arguments"].items():
            yield f"<parameter={name}>\n", False
            yield json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value), False
            yield "\n</parameter>\n", True
        yield "</function>\n</tool_call>", True


def read_tools(tools: object) -> list[dict]:
    """The tools of a conversation: a list of JSON schemas or its JSON text; none for None and "". UserError for others.
    """
    schemas = _parsed(tools, empty=[])
    if not isinstance(schemas, list) or not all(isinstance(schema, dict) for schema in schemas):
        raise UserError(f"tools is {tools!r:.60}, expected a list of objects with the functions' JSON schemas")
    return schemas


def read_calls(message: dict, number: int) -> list[dict]:
    """The calls of a message as {"name", "arguments"}. Arguments may be an object, or its JSON text as in OpenAI's API.

    UserError for anything else: a call that is left out in silence would leave an empty answer to be trained.
    """
    if message.get("function_call"):  # OpenAI's form before tool_calls
        call = message["function_call"]
        raise UserError(f"message {number}: function_call is {call!r:.60}, expected calls under tool_calls")
    calls = message.get("tool_calls")
    calls = [] if calls in (None, "") else calls
    if not isinstance(calls, list):
        raise UserError(f"message {number}: tool_calls is {calls!r:.60}, expected a list")
    checked_calls = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        arguments = _parsed(function.get("arguments"), empty={}) if isinstance(name, str) else None
        if not isinstance(arguments, dict):
            expected = "a function with a name, and arguments as an object"
            raise UserError(f"message {number}: a tool call is {call!r:.60}, expected {expected}")
        checked_calls.append({"name": name, "arguments": arguments})
    return checked_calls


def _parsed(value: object, empty: object) -> object:
    """A value that may come as JSON text, too; `empty` for None and a blank text."""
    if isinstance(value, str):
        if not value.strip():
            return empty
        with contextlib.suppress(ValueError):
            value = parse_json(value)
    return empty if value is None else value
