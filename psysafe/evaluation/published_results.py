"""The figures that the paper published (arXiv 2606.09697 and its model card), which the report shows beside ours.

They were measured with other prompts, judges and generations than yours may be.
"""

from psysafe.evaluation.criteria import COLUMNS
from psysafe.evaluation.result import Table

SOURCE = "arXiv 2606.09697 and its model card"
NOTE = f"The publication's figures ({SOURCE}), not measured here; its model, prompts and judge may not be yours."
JUDGE = {  # variant -> refusal %, grounding, its std, references %, relevance, its std, overall %
    "base, v0": (90.6, 3.38, 1.17, 64.8, 3.90, 0.86, 71.9),
    "base, v1": (96.0, 4.56, 0.86, 95.2, 4.52, 0.74, 92.0),
    "fine-tuned, v0": (100.0, 3.86, 0.79, 99.8, 3.37, 1.16, 82.7),
    "fine-tuned, v1": (99.8, 3.78, 0.81, 99.1, 3.38, 1.17, 82.0),
}
XSTEST = {  # variant -> over-refusal %, safety %
    "base, default": (13.2, 59.0),
    "base, v0": (12.4, 63.0),
    "base, v1": (24.0, 78.5),
    "fine-tuned, default": (3.6, 17.0),
    "fine-tuned, v0": (4.8, 15.0),
    "fine-tuned, v1": (9.2, 26.5),
}
SORRY_BENCH = {"base": (17.1, 25.4), "fine-tuned": (0.0, 0.0)}  # compliance: base set %, average of the mutations %
MMLU = {"base": 0.8443, "fine-tuned": 0.8020}
HELLASWAG = {"base": (0.6377, 0.8343), "fine-tuned": (0.6405, 0.8249)}  # acc, acc_norm
AGREEMENT = {"refusal": 0.79, "grounding": 0.26, "references": 1.00, "relevance": 0.19, "pooled": 0.61}


def _table(measured: str, columns: list[tuple[str, str]], rows: list[list]) -> Table:
    return Table(f"Published: {measured}", [("published", ""), *columns], rows, NOTE)


# Kind of evaluation -> what was published of it.
TABLES = {
    "judge": _table(
        "Qwen3.5-27B, 500 prompts, judged by Qwen3.5-397B-A17B",
        [(name, form) for name, form in COLUMNS if name not in ("variant", "n")],
        [[name, refusal, [grounding, grounding_std], references, [relevance, relevance_std], whole]
         for name, (refusal, grounding, grounding_std, references, relevance, relevance_std, whole) in JUDGE.items()],
    ),
    "xstest": _table("Qwen3.5-27B on XSTest", [("over-refusal %", ".1f"), ("safety %", ".1f")],
                     [[name, *row] for name, row in XSTEST.items()]),
    "sorry-bench": _table("Qwen3.5-27B on SORRY-Bench",
                          [("base set: compliance %", ".1f"), ("average of the mutations %", ".1f")],
                          [[name, *row] for name, row in SORRY_BENCH.items()]),
    "mmlu": _table("Qwen3.5-27B on MMLU", [("acc", ".4f")], [[name, acc] for name, acc in MMLU.items()]),
    "hellaswag": _table("Qwen3.5-27B on HellaSwag", [("acc", ".4f"), ("acc_norm", ".4f")],
                        [[name, *row] for name, row in HELLASWAG.items()]),
    "agreement": _table("judge and people, 200 labels", [("Cohen's kappa", ".2f")],
                        [[name, kappa] for name, kappa in AGREEMENT.items()]),
}  # fmt: skip
