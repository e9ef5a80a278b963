"""Ways in which a file goes wrong: bytes, JSON, CSV, TOML, safetensors.

Every function takes the chance (a seeded Random) and the good content and returns the bad one.
"""

import json
import struct
from collections.abc import Callable
from random import Random

Damage = Callable[[Random, bytes], bytes]

# Written as marked texts and replaced in the finished JSON, because json.dumps would not write them.
RAW = {
    "@@digits@@": "1" * 5_000,
    "@@huge@@": "1e999",
    "@@deep@@": "[" * 100_000 + "]" * 100_000,
    "@@bare@@": "undefined",
}
NUMBERS = (-1, 0, 1, 2, 3, 5, 255, -(2**31), 2**31, 2**53, 2**63, 2**64, 10**13, 10**30, 0.5, -1.5, 1e-300, 1e300)
VALUES = (
    *NUMBERS, *RAW, None, True, False, float("nan"), float("inf"), -float("inf"), [], {}, [[]], [None], [1, "a"],
    *({"a": 1}, "", " ", "8", "true", "\0", "\ud800", "\udfff\ud800", "é\u2028", "x" * 5_000),
    *("<|im_start|>", "<think>", "</think>"),
    *("..", "../x", "/etc/passwd", "./a/b", "org/name", "a\nb", "\x1b[31m", "base", "%s%n", "{}"),
)  # fmt: skip


def bytes_damaged(chance: Random, content: bytes) -> bytes:
    """Truncated, flipped, repeated, in another encoding, ..."""
    at, end = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    kind = chance.randrange(13)
    if kind <= 1:
        return content[:at]
    if kind <= 4:
        flipped = bytearray(content)
        for _ in range(chance.choice((1, 1, 2, 8))):
            flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
        return bytes(flipped)
    return (
        lambda: content[:at] + content[end:],
        lambda: content[:end] + content[at:],
        lambda: content[:at] + chance.randbytes(chance.randrange(1, 9)) + content[at:],
        lambda: content[:at] + b"\0" * (end - at) + content[end:],
        lambda: b"\xef\xbb\xbf" + content,
        lambda: content.decode("latin-1").encode("utf-16"),
        lambda: chance.choice((b"", b"\n", b" ", b"\0", b"{}", b"[]", b"null", b"1", b'"', b"[[]]", b"\xff\xfe")),
        lambda: content + chance.choice((b"\0", b"}", b"[", b"\x80", content, b"\n\n{")),
    )[kind - 5]()


def json_damaged(chance: Random, content: bytes) -> bytes:
    """Still JSON, or nearly, but another value, key or structure somewhere."""
    value = json.loads(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        value = _changed(chance, value)
    text = json.dumps(value)
    for mark, raw in RAW.items():
        text = text.replace(f'"{mark}"', raw)
    if chance.random() < 0.1 and isinstance(value, dict) and value:
        key = json.dumps(chance.choice(list(value)))
        text = text[:-1] + f", {key}: {json.dumps(chance.choice(NUMBERS))}" + "}"
    return text.encode()


def json_lines_damaged(chance: Random, content: bytes) -> bytes:
    lines = content.splitlines()
    i = chance.randrange(len(lines))
    lines[i] = json_damaged(chance, lines[i])
    return b"\n".join(lines) + b"\n"


def _changed(chance: Random, value, depth: int = 0):
    """The value with one thing in it changed."""
    inside = isinstance(value, dict | list) and value and chance.random() < (0.97 if depth == 0 else 0.7)
    if not inside:
        return chance.choice(VALUES)
    if isinstance(value, list):
        i, value = chance.randrange(len(value)), list(value)
        kind = chance.randrange(5)
        if kind == 0:
            del value[i]
        elif kind == 1:
            value.insert(i, chance.choice((value[i], *VALUES)))
        else:
            value[i] = _changed(chance, value[i], depth + 1)
        return value
    key, value = chance.choice(list(value)), dict(value)
    kind = chance.randrange(8)
    if kind == 0:
        del value[key]
    elif kind == 1:
        value[chance.choice(("", key + "_", "\ud800", "x" * 300, "constructor"))] = value.pop(key)
    elif kind == 2:
        value[chance.choice(("unknown", "\0", key.upper()))] = chance.choice(VALUES)
    elif kind == 3:
        other = chance.choice(list(value))
        value[key], value[other] = value[other], value[key]
    else:
        value[key] = _changed(chance, value[key], depth + 1)
    return value


TOML_VALUES = (
    *("-1", "0", "1", "2", "0x10", "1000000000000", "9" * 18, "9" * 30, "9" * 5_000, "3.5", "-0.5", "1e30", "1e400"),
    *("inf", "-inf", "nan", "true", "false", "nothing", "1979-05-27", "07:32:00", "[]", '[""]', '["a", 1]', "[[]]"),
    *("{}", "{a = 1}", "[" * 2_000, '""', '"x"', '"../x"', '"org/name"', '"\\u0000"', '"auto"', '"none"', '"cuda"'),
    *('"assets:tiny"', "'''a\nb'''", '"' + "x" * 5_000 + '"'),
)


def toml_damaged(chance: Random, content: bytes) -> bytes:
    """Another value for a key, an unknown or repeated key, tables."""
    lines = content.decode().splitlines()
    for _ in range(chance.choice((1, 1, 2))):
        i = chance.randrange(len(lines))
        key = lines[i].partition(" = ")[0]
        kind = chance.randrange(8)
        if kind == 0:
            lines.insert(i, chance.choice((lines[i], "[table]", "[[a.b]]", "learning_rate = 1", '"" = 1', "a.b.c = 2")))
        elif kind == 1:
            lines[i] = f"{key}{chance.choice('_x.-')} = 1"
        else:
            lines[i] = f"{key} = {chance.choice(TOML_VALUES)}"
    return "\n".join(lines).encode() + b"\n"


def csv_damaged(chance: Random, content: bytes) -> bytes:
    """Cells and columns that are missing, too many, or something else."""
    lines = content.decode().splitlines()
    i = chance.randrange(len(lines))
    cells = lines[i].split(",")
    odd = ("", '"', '""', "\0", "x" * 200_000, "nan", "-1", "1_full_compliance", "é", '"a\nb"', "=1+1")
    j = chance.randrange(len(cells))
    kind = chance.randrange(4)
    if kind == 0:
        del cells[j]
    elif kind == 1:
        cells.insert(j, chance.choice(odd))
    else:
        cells[j] = chance.choice(odd)
    lines[i] = ",".join(cells)
    return "\n".join(lines).encode() + b"\n"


DTYPES = ("F8_E4M3", "BOOL", "I64", "U8", "F64", "F32", "F16", "BF16", "X9", "", "f32", None, 5, "C64")
SHAPES = ([], [0], [-1], [2**40], [2**62, 4], [2**63], [2**32, 2**32], [1] * 9, [1.5], ["1"], None, 3, [[1]], [2**64])
OFFSETS = (
    *([0, 0], [0, 10**13], [10**13, 2 * 10**13], [-4, 0], [8, 4], [0, 2**63], [2**64, 2**65], [0], [], [0, 4, 8], None),
    *(["0", "4"], [0.0, 4.0], 7),
)
LENGTHS = (0, 1, 7, 2**20, 10**8, 10**8 + 1, 10**13, 2**63 - 1, 2**63, 2**64 - 1)


def safetensors_damaged(chance: Random, content: bytes) -> bytes:
    """A header that lies: its length, a dtype, a shape, offsets that overlap or leave the file."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    kind = chance.randrange(8)
    if kind == 0:
        lie = chance.choice((*LENGTHS, length - 1, length + 1, length + 8, len(content)))
        return struct.pack("<Q", lie) + content[8:]
    names = [name for name in header if name != "__metadata__"]
    entry = header[chance.choice(names)]
    if kind == 1:
        entry["dtype"] = chance.choice(DTYPES)
    elif kind == 2:
        entry["shape"] = chance.choice(SHAPES)
    elif kind == 3:
        entry["data_offsets"] = chance.choice((*OFFSETS, header[chance.choice(names)]["data_offsets"]))
    elif kind == 4:  # one that adds up: 10 TB that are not there, or nothing at all
        n = chance.choice((0, 10**13, 2**61, len(data)))
        entry.update(dtype=chance.choice(("U8", "F32")), shape=[n], data_offsets=[0, n])
    elif kind == 5:  # the same bytes as another type or shape: a sound file that does not fit
        n = entry["data_offsets"][1] - entry["data_offsets"][0]
        size, dtype = chance.choice(((1, "U8"), (1, "I8"), (2, "BF16"), (2, "F16"), (4, "F32"), (4, "I32"), (8, "F64")))
        entry.update(dtype=dtype, shape=chance.choice(([n // size], [n // size, 1], [1, n // size], [1, 1, n // size])))
    elif kind == 6:
        name = chance.choice(names)
        header[chance.choice(("x", "", "../x", "lm_head.weight", "model.norm.weight", name + ".b"))] = header.pop(name)
    else:
        text = json_damaged(chance, json.dumps(header).encode())
        return struct.pack("<Q", len(text)) + text + data
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def floats_damaged(chance: Random, content: bytes) -> bytes:
    """A sound file of other numbers: nan, infinities, random bits."""
    (length,) = struct.unpack("<Q", content[:8])
    start = 8 + length
    data = bytearray(content[start:])
    at = chance.randrange(len(data)) // 4 * 4
    for i in range(at, min(len(data), at + 4 * chance.choice((1, 16, 10**6))), 4):
        data[i : i + 4] = chance.choice((struct.pack("<f", float("nan")), struct.pack("<f", 3e38), chance.randbytes(4)))
    return content[:start] + bytes(data[: len(content) - start])
