"""What a run directory says: its recipe, the course of its training, its adapter, and the base that this is for."""

import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from psysafe.checkpoint.adapter import LAYOUTS, is_same_base
from psysafe.checkpoint.peft_format import CONFIG, WEIGHTS, PeftAdapter, read_adapter
from psysafe.cli import say
from psysafe.files import BUNDLED_MODEL
from psysafe.hub import DATA_SET, REPOSITORY, is_repository
from psysafe.program import UserError
from psysafe.training.config import TrainConfig, resolve
from psysafe.training.run_log import METRICS, read_metrics

SETTINGS = "config.toml"


@dataclass(frozen=True)
class Run:
    """A finished run of train.py. rows: of its metrics.jsonl, none where there is no such file."""

    folder: Path
    config: TrainConfig
    adapter: PeftAdapter
    rows: list[dict]

    @property
    def name(self) -> str:
        """The name under which evaluations know the adapter."""
        return self.folder.resolve().name

    @property
    def layout(self) -> str:
        """Under which names the adapter's file holds its tensors: text, multimodal, or both."""
        (multimodal,) = LAYOUTS["multimodal"]
        with safe_open(self.folder / WEIGHTS, framework="pt") as file:
            has_multimodal = {key.startswith(multimodal) for key in file.keys()}  # noqa: SIM118  (no mapping)
        return "both" if len(has_multimodal) > 1 else "multimodal" if has_multimodal.pop() else "text"


@dataclass(frozen=True)
class Base:
    """The model that an adapter is for. is_bundled: it is the miniature, which is in no repository (hub_id "") unless
    somebody has put it into one."""

    hub_id: str
    revision: str = ""
    is_bundled: bool = False


def read_run(folder: str | Path) -> Run:
    """Raises UserError where the folder is no run directory, the adapter is damaged, or config.toml another run's."""
    folder = Path(folder)
    for name in (SETTINGS, CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name} in it; expected the run directory of a finished train.py")
    config, sources = resolve(["--config", str(folder / SETTINGS)])
    adapter, metrics = read_adapter(folder), folder / METRICS
    # The card states the recipe: a file of other settings, or of none, would make it state what was not done.
    base, rank = adapter.config.get("base_model_name_or_path"), adapter.config["r"]
    if sources["model"] == "default" or (base and not is_same_base(base, config.model)) or rank != config.lora_rank:
        what = "does not belong to the adapter beside it (another base or rank)"
        raise UserError(f"{folder / SETTINGS}: {what}; expected the file that the run wrote")
    return Run(folder, config, adapter, read_metrics(metrics) if metrics.is_file() else [])


def base_of(run: Run, base_model: str) -> Base:
    """The base by a name that others can load it under. base_model: that of --base-model, or "".

    Raises UserError for a base that nobody else could load: a folder of this machine, or random weights.
    """
    trained_on, is_bundled = run.config.model, run.config.model == BUNDLED_MODEL
    if trained_on.startswith("random:"):
        raise UserError(f"{run.folder}: trained on random weights, which lie in no file that others could load")
    if base_model:
        if not re.fullmatch(REPOSITORY, base_model):
            raise UserError(f"--base-model {base_model}: expected a repository of the hub, such as Qwen/Qwen3.5-27B")
        if not is_bundled and not is_same_base(trained_on, base_model):
            say(f"warning: the adapter was trained on {Path(trained_on).name}, and the card will name {base_model}")
        return Base(base_model, run.config.revision if base_model == trained_on else "", is_bundled)
    if is_bundled:
        return Base("", is_bundled=True)
    if not is_repository(trained_on):
        what = f"its base is the folder {Path(trained_on).name} of this machine"
        raise UserError(f"{run.folder}: {what}; give --base-model with its name on the hub")
    return Base(trained_on, run.config.revision)


def data_sets(names: list[str]) -> list[str]:
    """The repositories among the rows of a run, whose config.toml names each with its commit."""
    matches = [DATA_SET.fullmatch(name) for name in names]
    return sorted({match["repository"] for match in matches if match and match["revision"]})
