"""python -m psysafe.publish in a process of its own, whose huggingface_hub reads the stub's address at its import.

The imports take seconds. So this process imports once, and each command that it reads (a line of JSON: arguments,
variables of the environment, a file for the output) runs in a fork. It answers with the exit code.
"""

import json
import os
import sys

from huggingface_hub.utils import _http

from psysafe.program import main_guard
from psysafe.publish.__main__ import main

_sleep = _http.time.sleep
_http.time.sleep = lambda seconds: _sleep(min(seconds, 0.01))  # between the tries of a failed request


def run(command: dict) -> int:
    os.environ.update(command["environment"])
    for stream, number in (("out", 1), ("err", 2)):
        file = os.open(f"{command['output']}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    code = main_guard(main, command["argv"])
    sys.stdout.flush()
    return code


for line in sys.stdin:
    if not (pid := os.fork()):
        code = 1  # of an exception, whose traceback is in the file
        try:
            code = run(json.loads(line))
        except SystemExit as end:
            code = end.code
        except BaseException:
            sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
