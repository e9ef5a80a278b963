"""Serves a model and adapters of it to OpenAI's clients, together in one batch, with a page to compare them.

python -m psysafe.serve                                       # the bundled base
python -m psysafe.serve --adapter tuned=runs/tiny             # base and adapter, as "base" and "tuned"
PSYSAFE_API_KEY=... python -m psysafe.serve --host 0.0.0.0    # for other machines, too: only with a key
"""

import psysafe.interrupt  # noqa: F401  # isort: skip  (first: Ctrl-C during the imports ends quietly)
import importlib.util
import os
import sys
from collections.abc import Sequence

from psysafe.cli import refuse_ranks
from psysafe.program import UserError, exit_on_signals, main_guard
from psysafe.serve.settings import KEY_VARIABLE, bind, parse
from psysafe.serve.setup import set_up


def main(argv: Sequence[str]) -> int:
    settings = parse(argv, __doc__)
    refuse_ranks("a server")
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed; pip install -r requirements-serve.txt")
    from psysafe.serve.server import serve

    key = os.environ.get(KEY_VARIABLE, "").strip()
    # Bound before the weights are read, which may take minutes.
    with bind(settings.host, settings.port, key) as listener, exit_on_signals():
        serve(*set_up(settings), settings, listener, key)
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
