"""The tables of eval.py judge: what the scores of several variants on the four criteria come to.

scores: variant -> prompt -> scores.
"""

from collections.abc import Mapping

from psysafe.evaluation import comparison
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
    # As the baseline's rows name them: another variant's file may name none.
    cluster_of = {prompt: row["cluster"] for prompt, row in answers[baseline].rows.items()}
    by_cluster = scores_by_cluster(cluster_of, scores)
    if by_cluster:
        rows = rows_by_cluster(by_cluster)
        shown.append(Table(f"Per cluster, judged by {judged_by}", [("cluster", ""), *COLUMNS], rows))
    shown += comparison.tables(comparison.of_criteria(scores), f"judged by {judged_by}")
    figures = [f for cluster, of_cluster in by_cluster.items() for f in comparison.of_criteria(of_cluster, cluster)]
    return shown + comparison.tables(figures, f"per cluster, judged by {judged_by}")


ByCluster = Mapping[str, Mapping[str, Mapping[str, Scores]]]  # cluster -> variant -> prompt -> scores


def scores_by_cluster(cluster_of: Mapping[str, str], scores: Mapping[str, Mapping[str, Scores]]) -> ByCluster:
    """Every cluster in which something was judged. cluster_of: prompt -> cluster, "" for none."""

    def of_cluster(cluster: str) -> dict[str, dict[str, Scores]]:
        return {v: {p: one for p, one in of.items() if cluster_of[p] == cluster} for v, of in scores.items()}

    by_cluster = {cluster: of_cluster(cluster) for cluster in dict.fromkeys(filter(None, cluster_of.values()))}
    return {cluster: by_variant for cluster, by_variant in by_cluster.items() if any(by_variant.values())}


def rows_by_cluster(by_cluster: ByCluster) -> list[list]:
    """A row for each cluster and variant in which something was judged."""
    return [
        [cluster, variant, *summarise(by_prompt.values()).cells()]
        for cluster, by_variant in by_cluster.items()
        for variant, by_prompt in by_variant.items()
        if by_prompt
    ]
