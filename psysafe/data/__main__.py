"""`python -m psysafe.data`."""

import sys

from psysafe.data.documents import main
from psysafe.program import main_guard

if __name__ == "__main__":
    sys.exit(main_guard(main))
