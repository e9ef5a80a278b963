"""The tables of eval.py judge: what the scores of several variants on the four criteria come to.

scores: variant -> prompt -> scores.
"""

from collections.abc import Mapping

from psysafe.evaluation import comparison
from psysafe.evaluation.comparison import Figure
from psysafe.evaluation.criteria import COLUMNS, Scores, relative_change, summarise
from psysafe.evaluation.models_under_test import VariantAnswers
from psysafe.evaluation.result import Table


def tables(
    answers: Mapping[str, VariantAnswers], scores: Mapping[str, Mapping[str, Scores]], baseline: str, judged_by: str
) -> list[Table]:
    """judged_by: stands in the titles of the tables of scores."""
    summaries = {name: summarise(by_prompt.values()) for name, by_prompt in scores.items()}
    complete = all(count == summary.n for summary in summaries.values() for count in summary.counts.values())
    note = "" if complete else "a criterion was missing in some replies: see the next table"
    rows = [[name, *summary.cells()] for name, summary in summaries.items()]
    shown = [Table(f"All prompts, judged by {judged_by}", COLUMNS, rows, note, bars=["overall %"])]
    if not complete:
        columns = [("variant", ""), *((name, ",") for name in summaries[baseline].counts)]
        rows = [[name, *summary.counts.values()] for name, summary in summaries.items()]
        shown.append(Table("Answers that each figure is over", columns, rows))
    if len(summaries) > 1:
        changes = {n: relative_change(s, summaries[baseline]) for n, s in summaries.items() if n != baseline}
        columns = [("variant", ""), *((f"{name} %", "+.1f") for name in next(iter(changes.values())))]
        rows = [[name, *change.values()] for name, change in changes.items()]
        note = "–: nothing to divide by" if any(None in row for row in rows) else ""
        shown.append(Table(f"Relative change to {baseline}", columns, rows, note))
    if rows := rows_by_cluster(answers, scores, baseline):
        shown.append(Table(f"Per cluster, judged by {judged_by}", [("cluster", ""), *COLUMNS], rows))
    shown += comparison.tables(comparison.of_criteria(scores), f"judged by {judged_by}")
    by_cluster = figures_by_cluster(answers, scores, baseline)
    return shown + comparison.tables(by_cluster, f"per cluster, judged by {judged_by}")


def figures_by_cluster(answers, scores, baseline: str) -> list[Figure]:
    cluster_of = {prompt: row["cluster"] for prompt, row in answers[baseline].rows.items()}
    clusters = dict.fromkeys(cluster for cluster in cluster_of.values() if cluster)
    figures = []
    for cluster in clusters:
        of_cluster = {name: {p: s for p, s in by_prompt.items() if cluster_of[p] == cluster}
                      for name, by_prompt in scores.items()}  # fmt: skip
        figures += comparison.of_criteria(of_cluster, cluster) if any(of_cluster.values()) else []
    return figures


def rows_by_cluster(answers, scores, baseline: str) -> list[list]:
    """A row for each cluster and variant in which something was judged; none where the rows name no cluster."""
    rows = []
    for cluster in dict.fromkeys(row["cluster"] for row in answers[baseline].rows.values() if row["cluster"]):
        for name, by_prompt in scores.items():
            of_cluster = [s for prompt, s in by_prompt.items() if answers[name].rows[prompt]["cluster"] == cluster]
            if of_cluster:
                rows.append([cluster, name, *summarise(of_cluster).cells()])
    return rows
