"""The first import of every program: Ctrl-C during the seconds in which the others are imported ends it quietly.

Python would print the traceback of wherever torch's import stood. Once `main_guard` runs, Ctrl-C is a KeyboardInterrupt
again. Programs outside this repository keep Python's own handling.
"""

import signal
import sys
from pathlib import Path

_PROGRAM = getattr(sys.modules["__main__"], "__file__", None)  # None for `python -c` and an interactive Python
_IS_OURS = _PROGRAM is not None and Path(_PROGRAM).resolve().is_relative_to(Path(__file__).resolve().parents[1])

# One that is ignored, as of a job in the background, stays ignored.
if _IS_OURS and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
