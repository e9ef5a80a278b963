"""A finished run without training, and results of evaluations of it, for the tests of publishing."""

import json
from pathlib import Path

import torch

from psysafe import load_model
from psysafe.checkpoint.adapter import save_adapter
from psysafe.evaluation import comparison
from psysafe.evaluation.benchmarks.multiple_choice import COLUMNS, accuracy
from psysafe.evaluation.comparison import share
from psysafe.evaluation.result import Result, Table
from psysafe.model.lora import attach
from psysafe.training.config import TrainConfig, to_toml

QWEN = "Qwen/Qwen3.5-0.8B"


def write_run(folder: Path, model: str = "assets:tiny", multimodal: bool = False, **settings) -> Path:
    """A run directory as train.py leaves it, with a rank-1 adapter on the bundled model's layers that changes it."""
    torch.manual_seed(0)
    adapters = attach(load_model("assets:tiny"), 1, 32.0, ["q_proj", "v_proj"])
    with torch.no_grad():
        for x in adapters.tensors().values():
            x.copy_(torch.randn_like(x) * 0.2)
    settings |= {"data": ["assets:rows/train.jsonl"], "lora_targets": ["q_proj", "v_proj"], "dtype": "float32"}
    config = TrainConfig(model=model, out=str(folder), device="cpu", **settings)
    save_adapter(adapters, folder, model, multimodal, revision=config.revision)
    (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    rows = [{"step": 0, "val_loss": 0.9}, {"step": 1, "loss": 1.5, "tokens": 100}]
    rows += [{"step": 2, "loss": 0.25, "tokens": 60}, {"step": 2, "val_loss": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "state").mkdir()
    (folder / "state" / "secret.pt").write_bytes(b"state")
    return folder


def multiple_choice(kind: str, n: int, run: str, base_acc: float, acc: float, **settings) -> Result:
    """A result of mmlu or hellaswag, as eval.py has it."""
    columns = COLUMNS + ([("acc_norm", ".4f"), ("stderr of it", ".4f")] if kind == "hellaswag" else [])
    accuracies = {"base, none": base_acc, f"{run}, none": acc}
    rows = [[name, n, value, 0.01] for name, value in accuracies.items()]
    rows = [row + ([row[2] + 0.2, 0.01] if kind == "hellaswag" else []) for row in rows]
    scores = {name: [{"acc": float(i < value * 40)} for i in range(40)] for name, value in accuracies.items()}
    tables = [Table("Accuracy", columns, rows), *comparison.tables([accuracy(scores, "acc")])]
    return Result(kind, f"{kind}, 0-shot", tables, {"data": "hub", **settings})


def xstest(run: str, judge: str, base: int, tuned: int) -> Result:
    """base, tuned: of 20 unsafe prompts, how many each refuses."""
    values = {f"{name}, none": {i: i < n for i in range(20)} for name, n in (("base", base), (run, tuned))}
    columns = [("variant", ""), ("judged by", ""), ("n unsafe", ","), ("safety %", ".1f")]
    rows = [[name, judge, 20, 5.0 * sum(of.values())] for name, of in values.items()]
    tables = [Table("Refused", columns, rows), *comparison.tables([share("safety %", values, judge)])]
    return Result("xstest", f"XSTest, judged by {judge}", tables, {"judge": judge},
                  contamination={"prompts": 450, "exact": 3, "normalised": 5})  # fmt: skip
