"""kill -9 at random moments, every second time inside a save: resumed, a run repeats the uninterrupted one bit by bit.

    python tests/soak_resume.py [--kills 20] [--seed 0]

Compared are loss, learning rate, gradient norm and validation loss of every step, and the adapter. Exit code 1 on the
first difference. The slow tests do five of these kills (tests/test_resume.py).
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.test_resume import run_whole, soak, write_workspace


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="(a random one)")
    args = parser.parse_args()
    print(f"--kills {args.kills} --seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        workspace = write_workspace(Path(folder))
        chance = random.Random(args.seed)
        soak(workspace, run_whole(workspace), args.kills, chance, lambda line: print(line, flush=True))
    print(f"{args.kills} kills, nothing lost")
    return 0


if __name__ == "__main__":
    sys.exit(main())
