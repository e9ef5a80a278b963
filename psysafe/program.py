"""How a program ends: the user's mistakes, signals, exit codes.

    sys.exit(main_guard(main))

    0 done · 1 a bug of ours (with its traceback), or output or a last save that failed · 2 a mistake of the user
    129, 130, 143 stopped by SIGHUP, Ctrl-C, SIGTERM · 141 nobody reads the output any more
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from psysafe.printable import one_line

MAX_ERROR = 1500  # characters of an error line: a name in it can be of any length


class UserError(ValueError):
    """A mistake of the user: what was found, where, what was expected, what to do. Shown as one line, exit code 2.

    Only what is raised as a UserError counts as one. A plain ValueError, also out of torch, numpy or the standard
    library, is a case that we did not foresee: shown as the user's mistake it would hide a bug of ours.
    """


class OutputError(OSError):
    """Standard output takes no more, as on a full disk. One that nobody reads any more is a BrokenPipeError instead."""


@contextlib.contextmanager
def named_errors(path: str | os.PathLike) -> Iterator[None]:
    """Inside, an OSError that names no one file is about `path`: a full disk names none, a copy both of its files."""
    try:
        yield
    except OSError as error:
        if error.filename is None or error.filename2 is not None:
            error.filename, error.filename2 = str(path), None
        raise


class _Output:
    """Standard output whose errors are told from those of other files: the system's error names none."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        with self._own_errors():
            return self.stream.write(text)

    def flush(self) -> None:
        with self._own_errors():
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    @staticmethod
    @contextlib.contextmanager
    def _own_errors() -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(error.errno, error.strerror) from None


class StopRequest:
    """Turns the first SIGTERM, SIGINT or SIGHUP into a flag, so that the loop can finish its step, save, and end.

        with StopRequest() as stop:
            for step in ...:
                ...
                if runtime.largest(stop.received): save, return 128 + stop.received

    The second SIGINT ends the process at once, even inside a long call into C. A SIGHUP that is ignored (nohup) stays
    so. Handlers are put back on leaving.
    """

    received: int = 0

    def __enter__(self) -> "StopRequest":
        numbers = signal.SIGINT, *_ending_signals()
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        self.received = self.received or number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            print_error("\nfinishing this step, then saving; Ctrl-C again leaves at once")


def _ending_signals() -> list[signal.Signals]:
    """SIGTERM, and SIGHUP (the terminal is gone) unless it is ignored, as nohup asks."""
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM] if is_ignored else [signal.SIGTERM, signal.SIGHUP]


def print_error(text: str) -> None:
    """A line on stderr, if anything can be written there: an error about an error would hide the first one."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def discard_stdout() -> None:
    """From here on all output is lost, also what still waits in Python's buffer and what its end would write."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise SystemExit, so that what is half-written is removed: code 143 or 129.

    A SIGHUP that is ignored (nohup) stays so. Handlers are put back on leaving.
    """

    def end(number: int, frame) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not interrupt the cleaning up
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in _ending_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main_guard(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a script's main and return its exit code. One of several ranks never returns: its process ends in here.

    A UserError, and an OSError that names a file, end as `error: one line` on stderr and code 2; output that fails as
    one line and code 1, output that nobody reads any more as 141; Ctrl-C as 130. Anything else is a bug of ours and
    keeps its traceback.
    """
    for name in "stdout", "stderr":
        if getattr(sys, name) is None:  # closed from the start (`>&-`): the work is done, and its lines go nowhere
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):  # else a character that this terminal cannot show would end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as psysafe/interrupt.py left it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.redirect_stdout(_Output(sys.stdout)):
        code = _guarded(main, sys.argv[1:] if argv is None else argv)
    dist = sys.modules.get("torch.distributed")  # never imported for this alone
    if dist and dist.is_available() and dist.is_initialized():
        # Not by returning: where ranks end one after the other, gloo's threads sometimes abort at exit.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _guarded(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    try:
        code = main(argv) or 0
        sys.stdout.flush()  # here it can still be said that the last lines found no room
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as with `| head`
        print_error("stopped: nobody reads this output any more")
        discard_stdout()
        return 128 + signal.SIGPIPE
    except OutputError as error:
        print_error(f"error: standard output: {error.strerror}")
        discard_stdout()
        return 1
    except UserError as error:
        return _report(str(error))
    except OSError as error:
        if error.filename is None:  # not about a file that the user named: a bug of ours keeps its traceback
            raise
        return _report(f"{os.fsdecode(error.filename)}: {error.strerror}")


def _report(text: str) -> int:
    """Prints a user's mistake as one line and returns its exit code."""
    rank = f" (rank {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    line = one_line(text)
    line = line if len(line) <= MAX_ERROR else f"{line[: MAX_ERROR - 300]} ... {line[-300:]}"
    print_error(f"error{rank}: {line}")
    return 2
