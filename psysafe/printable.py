r"""Text of others, made harmless before it is shown: a server's error, a row's prompt, a model's answer.

    plain(text)        without what steers a terminal; lines stay lines
    escaped(text)      shows control characters as escapes such as \x1b
    one_line(text)     without it, on one line
    in_markdown(text)  one line whose Markdown and HTML are shown, not obeyed
    hidden(text)       names what a reader does not see: control characters, marks that turn a text's direction around
    counted(n, noun)   a number and its noun: 1 row, 2 rows

What is data stays as it is: JSONL files and piped answers hold every character.
"""

import re

# Control characters but tab and newline, and the marks that turn the direction of a text around: with one of them a
# line can show other words than it holds.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)])
_CONTROLS |= dict.fromkeys([0x2028, 0x2029], "\n")
# With a backslash before it CommonMark shows each of these as it is. An underscore inside a word marks nothing.
_MARKDOWN = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)|^(?:[-+#=](?=\W|$)|\d+(?=[.)]\s))")


def plain(text: str) -> str:
    return text.translate(_CONTROLS)


def escaped(text: str) -> str:
    return "".join(repr(c)[1:-1] if ord(c) in _CONTROLS else c for c in text)


def hidden(text: str) -> list[str]:
    """The number of each character, once, that a reader does not see in a text and `plain` leaves out; line ends of
    Windows are none. And halves of surrogate pairs, which no file can hold."""
    characters = dict.fromkeys(text.replace("\r\n", "\n"))
    unseen = [c for c in characters if _CONTROLS.get(ord(c), "") is None or "\ud800" <= c <= "\udfff"]
    return [f"U+{ord(character):04X}" for character in unseen]


def one_line(text: str) -> str:
    return " ".join(plain(text).split())


def counted(n: int, noun: str) -> str:
    """A number with its noun: 1 row, 1,024 rows."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def in_markdown(text: str) -> str:
    line = _MARKDOWN.sub(_escaped, one_line(text))
    return line.replace("<", "&lt;").replace(">", "&gt;")


def _escaped(match: re.Match) -> str:
    # `1.` at the start of a line begins a list; of these two characters the dot can be escaped.
    return f"{match[0]}\\" if match[0].isdigit() else f"\\{match[0]}"
