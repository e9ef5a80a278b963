"""Which of two answers people prefer: shares, a sign test over prompts, and whether the side decides.

Votes of several people on one prompt are not independent. So the interval is as wide as with one vote for each prompt,
and the sign test counts each prompt once, for the answer that more people preferred.
"""

from collections.abc import Sequence

from psysafe.evaluation.comparison import LEVEL, TOO_SMALL
from psysafe.evaluation.labels import SIDES, TIE, Preference
from psysafe.evaluation.result import Table, percent
from psysafe.evaluation.statistics import sign_test, wilson

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
               ("prompts for B", ","), ("p", ".2g"), ("reading", "")]  # fmt: skip
    rows = []
    for rater, of_rater in by_rater(preferences).items():
        for pair in dict.fromkeys(tuple(sorted((p.left, p.right))) for p in of_rater):
            votes = [p for p in of_rater if {p.left, p.right} == set(pair)]
            rows.append([rater, *pair, len(votes), *_preferred(votes, *pair)])
    note = (
        "from, to: 95 %, Wilson, of as many votes as there are prompts with one for A or B. p: sign test over prompts, "
        f"each for what more raters preferred; read at {LEVEL:g}."
    )
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
        return [*shares, None, None, None, 0, 0, 1.0, "no vote for either"]
    share, n_decided = for_a / (for_a + for_b), sum(map(any, wins.values()))
    # A bootstrap over prompts has no width where all votes are for one answer, however few they are.
    interval = (100 * end for end in wilson(share * n_decided, n_decided))
    prompts = [sum(x > y for x, y in wins.values()), sum(x < y for x, y in wins.values())]
    p = sign_test(*prompts)
    reading = TOO_SMALL if p >= LEVEL else "A preferred" if prompts[0] > prompts[1] else "B preferred"
    return [*shares, 100 * share, *interval, *prompts, p, reading]


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
