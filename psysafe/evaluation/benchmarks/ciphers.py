"""The encodings among SORRY-Bench's mutations, decoded: ascii codes, Caesar (shift 3), Morse, atbash."""

import re
import string

SHIFT = 3
MORSE = {
    "A": ".-", "B": "-...", "C": "-.-.", "D": "-..", "E": ".", "F": "..-.", "G": "--.", "H": "....", "I": "..",
    "J": ".---", "K": "-.-", "L": ".-..", "M": "--", "N": "-.", "O": "---", "P": ".--.", "Q": "--.-", "R": ".-.",
    "S": "...", "T": "-", "U": "..-", "V": "...-", "W": ".--", "X": "-..-", "Y": "-.--", "Z": "--..",
    "0": "-----", "1": ".----", "2": "..---", "3": "...--", "4": "....-", "5": ".....", "6": "-....", "7": "--...",
    "8": "---..", "9": "----.", ".": ".-.-.-", ",": "--..--", "?": "..--..", "'": ".----.", "!": "-.-.--",
    "/": "-..-.", "(": "-.--.", ")": "-.--.-", "&": ".-...", ":": "---...", ";": "-.-.-.", "=": "-...-",
    "+": ".-.-.", "-": "-....-", "_": "..--.-", '"': ".-..-.", "$": "...-..-", "@": ".--.-.",
}  # fmt: skip
LETTERS = {code: letter for letter, code in MORSE.items()}
# How models also write the two marks of a code, and the same marks as a class of a regular expression.
TYPED = str.maketrans({"\u00b7": ".", "\u2022": ".", "\u2026": "...", "\u2212": "-", "\u2013": "-", "\u2014": "-"})
MARKS = r".\-\u00b7\u2022\u2026\u2212\u2013\u2014"
LOWER, UPPER = string.ascii_lowercase, string.ascii_uppercase


def decode_caesar(text: str) -> str:
    """Letters moved back by SHIFT in the alphabet."""
    shifted = LOWER[SHIFT:] + LOWER[:SHIFT] + UPPER[SHIFT:] + UPPER[:SHIFT]
    return text.translate(str.maketrans(shifted, LOWER + UPPER))


def decode_atbash(text: str) -> str:
    """The alphabet backwards, which is its own inverse."""
    return text.translate(str.maketrans(LOWER + UPPER, LOWER[::-1] + UPPER[::-1]))


def decode_ascii(text: str) -> str:
    """Runs of three codes or more become text, as does a text of codes alone; whatever else the model wrote stays."""

    def decoded(run: re.Match) -> str:
        codes = [int(code) for code in re.findall(r"\d+", run[0])]
        if any(code >= 0x110000 for code in codes):
            return run[0]
        # An emoji may be written as its two UTF-16 codes. A half alone no tokenizer takes: it is shown as unreadable.
        return "".join(map(chr, codes)).encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    code = r"\b\d{1,7}\b"
    return re.sub(rf"{code}(?:[ ,]+{code}){{2,}}|\A{code}(?:[ ,]+{code})?\Z", decoded, text.strip())


def decode_morse(text: str) -> str:
    """Runs of three codes or more become capitals, as does a text of codes alone; whatever else was written stays.

    Morse has no small letters. Within a run, words stand apart by a slash, a bar, two spaces or more, or a line.
    """

    def decoded(run: re.Match) -> str:
        words = map(str.split, re.split(r"[/|\n]|\s{2,}", run[0].translate(TYPED)))
        return " ".join("".join(LETTERS.get(code, code) for code in word) for word in words if word)

    # No code touches a word: the dots of "wait..." and the dash of "well-being" are punctuation. Nor are one or two
    # alone a message: a dash between words would be a T, three dots an S.
    code = rf"(?<![\w{MARKS}])[{MARKS}]+(?![\w{MARKS}])"
    text = text.strip()
    if not re.search(rf"[^{MARKS}\s/|]", text):
        return re.sub(r".+", decoded, text, flags=re.DOTALL)
    return re.sub(rf"{code}(?:[\s/|]+{code}){{2,}}", decoded, text)


DECODERS = {"caesar": decode_caesar, "atbash": decode_atbash, "ascii": decode_ascii, "morse": decode_morse}
