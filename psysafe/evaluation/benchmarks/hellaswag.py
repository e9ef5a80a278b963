"""eval.py hellaswag: which of four endings fits, 0-shot, numerically equal to lm-eval 0.4.13.

    python eval.py hellaswag --data hellaswag_val.jsonl --adapter base --adapter runs/psysafe --out runs/hellaswag

acc_norm, the likeliest ending per character, is the usual figure: by acc a short ending has an advantage.
"""

import re
from collections.abc import Sequence

from psysafe.evaluation.benchmarks.multiple_choice import COLUMNS, Item, MultipleChoice, accuracy, listed, mean
from psysafe.evaluation.comparison import Figure
from psysafe.evaluation.datasets import Repository
from psysafe.evaluation.result import Table


class HellaSwag(MultipleChoice):
    name = "hellaswag"
    help = "accuracy on HellaSwag, as lm-eval"
    title = "HellaSwag"
    repository = Repository("Rowan/hellaswag", ("data/validation-00000-of-00001.parquet",))
    fields = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
    prompt_field = "ctx_a"

    def item(self, row: dict) -> Item:
        context = row["ctx_a"] + " " + row["ctx_b"].capitalize()  # lm-eval does not use the field ctx
        question = _clean(row["activity_label"] + ": " + context)
        return Item(question, [_clean(ending) for ending in listed(row["endings"])], int(row["label"]))

    def tables(self, items: Sequence[Item], scores: dict[str, list[dict[str, float]]]) -> list[Table]:
        lines = []
        for variant, by_item in scores.items():
            acc, acc_norm = (mean([score[name] for score in by_item]) for name in ("acc", "acc_norm"))
            lines.append([variant, *acc, acc_norm.value, acc_norm.stderr])
        columns = [*COLUMNS, ("acc_norm", ".4f"), ("stderr of it", ".4f")]
        return [Table("Accuracy", columns, lines, bars=["acc_norm"])]

    def figures(self, items: Sequence[Item], scores: dict[str, list[dict[str, float]]]) -> list[Figure]:
        return [accuracy(scores, "acc"), accuracy(scores, "acc_norm")]


def _clean(text: str) -> str:
    """Without what is left of WikiHow's marks. Two spaces become one, once, as in lm-eval: four become two."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
