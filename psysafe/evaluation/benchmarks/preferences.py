"""Which of two answers people prefer: shares, a sign test over prompts, and whether the side decides.

Votes of several people on one prompt are not independent. So the interval draws prompts, and the sign test counts each
prompt once, for the answer that more people preferred.
"""

from collections.abc import Sequence

from psysafe.evaluation.labels import SIDES, TIE, Preference
from psysafe.evaluation.result import Table, percent
from psysafe.evaluation.statistics import percentile_interval, resampled_sums, sign_test, wilson

ALL = "all raters"
LEFT, RIGHT = SIDES


def tables(preferences: Sequence[Preference]) -> list[Table]:
    """None without preferences."""
    return [table_of_preferences(preferences), table_of_sides(preferences)] if preferences else []


def by_rater(preferences: Sequence[Preference]) -> dict[str, list[Preference]]:
    """All preferences, and those of each rater where there are several."""
    raters = dict.fromkeys(preference.rater for preference in preferences)
    of_each = {rater: [p for p in preferences if p.rater == rater] for rater in raters}
    return {ALL: list(preferences), **of_each} if len(raters) > 1 else of_each


def table_of_preferences(preferences: Sequence[Preference]) -> Table:
    columns = [("raters", ""), ("A", ""), ("B", ""), ("votes", ","), ("A %", ".1f"), ("B %", ".1f"), ("tie %", ".1f"),
               ("A of A and B %", ".1f"), ("from", ".1f"), ("to", ".1f"), ("prompts for A", ","),
               ("prompts for B", ","), ("p", ".2g")]  # fmt: skip
    rows = []
    for rater, of_rater in by_rater(preferences).items():
        for pair in dict.fromkeys(tuple(sorted((p.left, p.right))) for p in of_rater):
            votes = [p for p in of_rater if {p.left, p.right} == set(pair)]
            rows.append([rater, *pair, len(votes), *_preferred(votes, *pair)])
    note = "from, to: 95 %, bootstrap over prompts. p: sign test over prompts, each for what more raters preferred."
    return Table("Preference", columns, rows, note, bars=["A of A and B %"])


def _preferred(votes: Sequence[Preference], a: str, b: str) -> list:
    """The cells from `A %` on."""
    choices = [(vote.prompt, _chosen(vote)) for vote in votes]
    shares = [percent(chosen == name for _, chosen in choices) for name in (a, b, TIE)]
    wins = {prompt: [0, 0] for prompt, _ in choices}  # for a, for b
    for prompt, chosen in choices:
        if chosen != TIE:
            wins[prompt][chosen == b] += 1
    for_a, for_b = (sum(pair[i] for pair in wins.values()) for i in (0, 1))
    if not for_a + for_b:
        return [*shares, None, None, None, 0, 0, 1.0]
    sums = resampled_sums(list(wins.values()))
    decided = sums[sums.sum(1) > 0]
    interval = percentile_interval(100 * decided[:, 0] / decided.sum(1))
    prompts = [sum(x > y for x, y in wins.values()), sum(x < y for x, y in wins.values())]
    return [*shares, 100 * for_a / (for_a + for_b), *interval, *prompts, sign_test(*prompts)]


def _chosen(vote: Preference) -> str:
    return {LEFT: vote.left, RIGHT: vote.right, TIE: TIE}[vote.choice]


def table_of_sides(preferences: Sequence[Preference]) -> Table:
    """Whether the answer on the left is preferred for being there."""
    rows = []
    for rater, of_rater in by_rater(preferences).items():
        left, right = (sum(p.choice == side for p in of_rater) for side in SIDES)
        ends = [100 * end for end in wilson(left, left + right)]
        share = 100 * left / (left + right) if left + right else None
        rows.append([rater, left, right, share, *ends, sign_test(left, right)])
    columns = [("raters", ""), ("left", ","), ("right", ","), ("left %", ".1f"), ("from", ".1f"), ("to", ".1f"),
               ("p", ".2g")]  # fmt: skip
    note = "Half is expected where sides are drawn. from, to: 95 %, Wilson; p: sign test. Votes count one by one."
    return Table("Position: answers preferred by their side", columns, rows, note)
