"""What only a model can see in a draft: help to do harm, a diagnosis, a promise. A judge is asked for each."""

from collections.abc import Sequence
from pathlib import Path

from psysafe.corpus.draft_checks import Issue
from psysafe.data.rows import Row
from psysafe.evaluation.judge_models import Judge, ask_all
from psysafe.evaluation.replies import Scale, verdict
from psysafe.files import ASSETS, read_text

# Check -> (file of the instruction, the names of its two verdicts, what is wrong where the first one is given).
QUESTIONS = {
    "harm": ("check_harm.txt", ("harm_found", "no_harm"), "the judge finds something that helps to do harm"),
    "claims": ("check_claims.txt", ("claim_found", "no_claim"), "the judge finds a diagnosis or a promise"),
}


def forbidden_issues(rows: Sequence[Row], judge: Judge, out: str | Path) -> tuple[dict[int, list[Issue]], list[str]]:
    """(issues by place, a line for each question that was not answered). out: the file that keeps the replies.

    A reply without a clear verdict is an issue, too: nobody has said that the answer is free of harm.
    """
    asked = {(i, check): messages(check, row.fields) for i, row in enumerate(rows) for check in QUESTIONS}
    replies, failed = ask_all(judge, asked, out)
    issues: dict[int, list[Issue]] = {}
    for (row, check), reply in replies.items():
        _, (bad, good), text = QUESTIONS[check]
        is_bad = verdict(reply, Scale({bad: True, good: False}, distinctive=True))
        if is_bad is not False:
            issue = Issue(check, "answer", text if is_bad else "the judge's reply holds no clear verdict")
            issues.setdefault(row, []).append(issue)
    for row, check in failed:
        issues.setdefault(row, []).append(Issue(check, "answer", "not judged"))
    return issues, [f"{rows[row].where}: {check} not judged: {reason}" for (row, check), reason in failed.items()]


def messages(check: str, fields: dict) -> list[dict]:
    """The judge's conversation about one answer."""
    texts = (
        f"<prompt>\n{fields['prompt']}\n</prompt>\n\n<answer>\n{fields['answer']}\n</answer>\n\nWhich of the two names?"
    )
    return [
        {"role": "system", "content": read_text(ASSETS / QUESTIONS[check][0])},
        {"role": "user", "content": texts},
    ]
