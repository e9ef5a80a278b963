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
        return "".join(map(chr, codes)) if all(code < 0x110000 for code in codes) else run[0]

    code = r"\b\d{1,7}\b"
    return re.sub(rf"{code}(?:[ ,]+{code}){{2,}}|\A{code}(?:[ ,]+{code})?\Z", decoded, text.strip())


def decode_morse(text: str) -> str:
    """In capitals: Morse has no others. Words stand apart by a slash, two spaces or more, or a line."""
    words = re.split(r"\s*/\s*|\s{2,}|\n", text.strip())
    return " ".join("".join(LETTERS.get(code, code) for code in word.split()) for word in words)


DECODERS = {"caesar": decode_caesar, "atbash": decode_atbash, "ascii": decode_ascii, "morse": decode_morse}
