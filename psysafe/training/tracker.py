"""wandb or trackio beside metrics.jsonl. Nothing that a tracker does ends the run.

    check_login(config)                                   # before the weights are read
    tracker = Tracker(config, run_id, say)
    tracker.log({"step": 1, "loss": 0.5})
    tracker.finish()

The first failure is printed, then the tracker is no longer called: metrics.jsonl has every row.
"""

import importlib
import os
from collections.abc import Callable
from pathlib import Path

from psysafe.printable import one_line
from psysafe.program import UserError
from psysafe.training.config import KEYS, TrainConfig

NOT_LOGGED_IN = ("UsageError", "AuthenticationError")  # wandb's; by name, because wandb is optional


def check_login(config: TrainConfig) -> None:
    """Raise UserError when wandb has no valid login; trackio needs none. On a terminal wandb asks for a key."""
    if config.report != "wandb":
        return
    try:
        importlib.import_module("wandb").login()  # does nothing where WANDB_MODE is offline or disabled
    except Exception as error:
        if type(error).__name__ in NOT_LOGGED_IN:
            remedy = "run `wandb login`, or set WANDB_MODE=offline, or leave the flag out"
            raise UserError(f"--report wandb: {error}; {remedy}") from None
        # Anything else, such as no network, is no reason to refuse the run: `Tracker` will try again.


class Tracker:
    """One run of a tracker. run_id: the run's name for it; a resumed run gives the same one and so continues there."""

    def __init__(self, config: TrainConfig, run_id: str, say: Callable[[str], None]):
        self.name, self.say, self.works = config.report, say, True
        self._try(self._start, config, run_id)

    def log(self, row: dict) -> None:
        self._try(lambda: self.module.log({k: v for k, v in row.items() if k != "step"}, step=row["step"]))

    def finish(self) -> None:
        self._try(lambda: self.module.finish())

    def _start(self, config: TrainConfig, run_id: str) -> None:
        os.environ.setdefault("WANDB_DIR", config.out)
        self.module = importlib.import_module(config.report)
        name = Path(config.out).resolve().name
        # trackio knows a run by its name alone.
        names = {"name": name, "id": run_id} if config.report == "wandb" else {"name": f"{name}-{run_id}"}
        settings = {key: getattr(config, key) for key in KEYS}
        self.module.init(project=config.project, config=settings, resume="allow", **names)

    def _try(self, call: Callable, *args) -> None:
        if not self.works:
            return
        try:
            call(*args)
        except (Exception, SystemExit) as error:
            self.works = False
            text = one_line(f"{type(error).__name__}: {error}")[:300]
            self.say(f"warning: --report {self.name}: {text}; training goes on without it, metrics.jsonl has every row")
