"""`python -m psysafe.checkpoint`."""

import sys

from psysafe.checkpoint.base import main
from psysafe.program import main_guard

if __name__ == "__main__":
    sys.exit(main_guard(main))
