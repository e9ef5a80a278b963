"""How tests state that a mistake is refused: by a call, by a program, in one line."""

from collections.abc import Callable

import pytest

from psysafe.program import main_guard


def refused(match: str, call: Callable, *args, **kwargs) -> str:
    """The call has to end in a ValueError of one line that matches -> that line."""
    with pytest.raises(ValueError, match=match) as error:
        call(*args, **kwargs)
    line = str(error.value)
    assert "\n" not in line
    return line


def refused_by(main: Callable, argv: list[str], capsys) -> str:
    """The program has to print nothing, say one line of error and give exit code 2 -> that line."""
    capsys.readouterr()
    assert main_guard(main, [str(word) for word in argv]) == 2
    return error_line(*capsys.readouterr())


def error_line(out: str, err: str) -> str:
    """What a program said that found a mistake: one line of error, and no output -> that line."""
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err
