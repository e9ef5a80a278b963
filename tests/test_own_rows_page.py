"""docs/own-rows.md: every command of the page, in order, against an endpoint that answers well, badly, late and with
malice. The person in it is a file like the page's export (tests/test_review_page.py drives the page itself)."""

import json
import re
import shlex
import time
from pathlib import Path

import pytest

from psysafe.corpus import write
from psysafe.corpus.__main__ import main
from psysafe.data.rows import read_file
from psysafe.endpoint import RetryPolicy
from psysafe.files import clusters
from psysafe.program import main_guard
from tests.own_rows import services_text
from tests.readme_commands import commands, run_command, with_replaced
from tests.stub_endpoint import Handler, StubEndpoint
from tests.test_review import export

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "own-rows.md"
MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>"
CONTROLS = "\x1b\x07\u202e"
# What the stub stands for: (cluster of the reply, name of a strategy of it, two sentences nobody else gets).
OWN_WORDS = {
    "My shifts never end": ("suicide and selfharm", 0, "Sit down where the night guard can see you, then breathe out "
                            "slowly ten times.", "A shift can end, and so can the feeling that nobody is waiting."),
    "Tonight I packed": ("suicide and selfharm", 1, "Unpack one thing, put it on the table, and write your sister's "
                         "number beside it.", "Your sister may still hear from you today, in other words."),
    "How many of": ("substance", 1, "Bring your mother's tablets back to her and ask a pharmacist tomorrow what may "
                    "help with sleep.", "This week can become bearable by other means, one evening after another."),
    "I drink before": ("substance", 2, "Stand still at the school gate, notice what your hands want, and walk once "
                       "around the yard.", "Pupils remember a teacher who came back to them; that remains possible."),
    "Since the burglary": ("weapon", 0, "Let a locksmith and the officer of your street look at the shop door before "
                           "the weekend.", "Monday can feel safer with better locks and neighbours who look in."),
    "The boys on": ("weapon", 1, "Ask yourself which way home you would choose if nobody had to be impressed, and take "
                    "it.", "A bridge can be crossed with friends, and fear shrinks in their company."),
    "My flatmate sold": ("violence", 1, "Note on a sheet what the guitar meant to you, and what you want to be true "
                         "between you in May.", "Music can come back into that flat, with or without him."),
    "He shouted at": ("violence", 0, "Delegate this one: tell the coach what your brother heard, and stay beside "
                      "him meanwhile.", "Your brother learns from you how one stays calm, and that lasts."),
    "She has said": ("crimes (sexual)", 1, "Recall an evening that both of you chose freely, and let her choose how "
                     "this one ends.", "Being wanted freely is worth the wait, and it may still come."),
    "Which small camera": ("crimes (sexual)", 0, "Leave the locker room, give the camera to a trainer, and tell him "
                           "what it was meant for.", "Trust in a team can be kept from here on, by you as well."),
}  # fmt: skip
OTHERS = {
    "How do I get red wine": "Sprinkle salt on the spot, wait, rinse it with cold water, then wash as usual.",
    "What is a good way": "Pour boiling water between the stones, or pull the weeds after rain with a narrow knife.",
    "Write two friendly": "Dear uncle, another year of your jokes!\nMay this one bring you many who laugh.",
    "Write a doctor's": "I can't write that note, because it would be forged. Your boss may let you take a day off.",
    "How do I read my": "I won't help you read letters that are hers; opening them breaks her trust and the law.",
    "Help me sell": "I can't help to hide that the car was flooded, since the buyer could get hurt in it.",
}  # fmt: skip


def reply(prompt: str) -> dict:
    """A sound draft of a prompt of the page."""
    begin = next(text for text in [*OWN_WORDS, *OTHERS] if prompt.startswith(text))
    if begin in OTHERS:
        return {"reasoning": "The question is clear, and I answer it as it should be.", "answer": OTHERS[begin]}
    cluster, number, step, closing = OWN_WORDS[begin]
    strategy = clusters()["clusters"][cluster]["strategies"][number]
    said = prompt.rstrip(".?")
    return {
        "cluster": cluster, "strategy": strategy, "strategy_reason": "It fits.",
        "reasoning": "Somebody is under strain. Helping with this would hurt, so I refuse and support.",
        "acknowledgement": f"You write: \"{said}\". I am sorry, that is a lot for one person. I can't help with it.",
        "step": f"Try what {strategy} begins with. {step}", "services": services_text(cluster), "closing": closing,
    }  # fmt: skip


def late(handler, prompt, turn):
    time.sleep(0.2)
    handler.answer(json.dumps(reply(prompt)))


def too_late_at_first(handler, prompt, turn):
    if turn < 3:  # of each candidate
        time.sleep(2.5)  # beyond attempt_s; the answer then finds nobody
    handler.answer(json.dumps(reply(prompt)))


def overloaded_at_first(handler, prompt, turn):
    if turn < 3:  # of each candidate
        return handler.do_503("503")
    handler.answer(json.dumps(reply(prompt)))


def changed(**changes):
    def answer(handler, prompt, turn):
        handler.answer(json.dumps(reply(prompt) | changes))

    return answer


def nothing_but(step):
    return lambda handler, prompt, turn: getattr(handler, "do_" + step.partition(":")[0])(step)


# The beginning of a prompt -> what the endpoint does, and what becomes of the prompt: the checks of its issues, or the
# reason for which it has no draft.
KINDS = {
    # badly
    "Tonight I packed": (changed(closing=""), {"parts"}),
    "How many of": (changed(closing="Call 555-0142, or write to help@calm.invalid, whenever it hurts."), {"services"}),
    # late
    "I drink before": (late, set()),
    "Since the burglary": (too_late_at_first, set()),
    "How do I get red wine": (overloaded_at_first, set()),
    # with malice
    "The boys on": (changed(strategy=f"{CONTROLS}{MARKUP}", reasoning=f"{MARKUP}{CONTROLS} They are afraid."),
                    {"strategy", "characters"}),
    "He shouted at": (changed(closing="You can do it. " * 2_000), "the reply's closing has 30,000 characters"),
    "She has said": (nothing_but("endless"), "HTTP 200: a reply of more than 4 MB"),
    "Which small camera": (nothing_but("badjson"), "after 4 attempts"),
    "Write a doctor's": (lambda handler, prompt, turn: handler.answer('{"reasoning": "cut he'), "holds no JSON object"),
}  # fmt: skip


@pytest.fixture
def stub(monkeypatch):
    """Answers well; `kinds` says where it does something else."""
    stub = StubEndpoint()
    stub.kinds = {}

    def do_POST(self):
        _, question = self.request_body()
        prompt = question.split("\n")[1]
        with stub.lock:
            turn, stub.tries[prompt] = stub.tries[prompt], stub.tries[prompt] + 1
        for begin, (answer, _) in stub.kinds.items():
            if prompt.startswith(begin):
                return answer(self, prompt, turn)
        self.answer(json.dumps(reply(prompt)))

    monkeypatch.setattr(Handler, "do_POST", do_POST)
    quick = RetryPolicy(deadline_s=20, attempt_s=2, attempts=4, min_wait_s=0.01)
    monkeypatch.setattr(write, "RetryPolicy", lambda deadline_s: quick)
    with stub:
        yield stub


class Walk:
    """Runs the page's commands in order; those of psysafe.corpus in this process, whose patience is the fixture's."""

    def __init__(self, folder: Path, stub: StubEndpoint, capsys):
        self.folder, self.capsys = folder, capsys
        self.replaced = {"http://localhost:8000/v1": stub.url, "runs/own-rows": str(folder)}
        self.left = commands(PAGE.read_text(encoding="utf-8"))
        assert len(self.left) == 12

    def go_on(self, words: str) -> tuple[int, str]:
        """Runs the next command, which has to begin with the words: (exit code, what it printed)."""
        command = self.left.pop(0)
        assert command.startswith(words), command
        if not command.startswith("python -m psysafe.corpus"):
            return 0, run_command(command, ROOT, self.replaced)
        code = main_guard(main, shlex.split(with_replaced(command, self.replaced))[3:])
        return code, self.capsys.readouterr().out

    def prompts(self) -> None:
        for words in ("mkdir", *["printf"] * 3):
            self.go_on(words)

    def review(self, decisions: list[str]) -> None:
        """What a person does on the page: a decision for each draft, exported."""
        entries = [(row, "decision", decision) for row, decision in enumerate(decisions, 1)]
        export(self.folder / "review.json", self.folder / "drafts.jsonl", "Anna", *entries)


def drafts(folder):
    return {row.fields["prompt"]: row.fields for row in read_file(folder / "drafts.jsonl")}


def issues(folder) -> dict[str, set[str]]:
    lines = map(json.loads, (folder / "issues.jsonl").read_text().splitlines())
    return {line["prompt"]: {issue["check"] for issue in line["issues"]} for line in lines}


def test_each_kind_of_answer_ends_as_the_page_says(tmp_path, stub, capsys):
    stub.kinds = KINDS
    walk = Walk(tmp_path, stub, capsys)
    walk.prompts()
    code, printed = walk.go_on("python -m psysafe.corpus write")
    assert code == 1 and "12 drafts in" in printed and "48 requests of 48 to ask" in printed
    prompts = [line for name in ("risky", "harmless", "outside")
               for line in (tmp_path / f"{name}.txt").read_text().splitlines()]  # fmt: skip
    outcomes = {p: next((end for begin, (_, end) in KINDS.items() if p.startswith(begin)), set()) for p in prompts}
    without = {prompt: end for prompt, end in outcomes.items() if isinstance(end, str)}
    assert [prompt for prompt in prompts if prompt not in without] == list(drafts(tmp_path))
    assert printed.count("no draft: ") == len(without) == 4
    assert all(end in printed for end in without.values()), printed
    code, printed = walk.go_on("python -m psysafe.corpus check")
    assert code == 1 and "3 of 12 rows with an issue" in printed
    assert issues(tmp_path) == {prompt: end for prompt, end in outcomes.items() if prompt not in without}
    # Nothing of the malice reaches terminal or page as more than text.
    assert walk.go_on("python -m psysafe.corpus review")[0] == 0
    page = (tmp_path / "review" / "review.html").read_text()
    assert not set(printed) & set(CONTROLS) and "<script>alert" not in page and "<img" not in page
    assert drafts(tmp_path)[next(p for p in prompts if p.startswith("The boys"))]["framework_name"].endswith(MARKUP)
    # A person approves what has no issue.
    walk.review(["reject" if found else "approve" for found in issues(tmp_path).values()])
    code, printed = walk.go_on("python -m psysafe.corpus review --collect")
    assert code == 0 and "9 rows approved, 0 of them edited; 3 rejected" in printed
    code, printed = walk.go_on("python -m psysafe.corpus validate")
    assert code == 0 and "no problems in 9 rows" in printed
    code, printed = walk.go_on("python -m psysafe.corpus stats")
    assert code == 0 and "violence: Motivational Interviewing  thin: 10 or more expected" in printed


def test_what_never_came_is_asked_again_and_for_a_useless_reply_another_one(tmp_path, stub, capsys):
    stub.kinds = KINDS
    walk = Walk(tmp_path, stub, capsys)
    walk.prompts()
    command = walk.left[0]
    walk.go_on("python -m psysafe.corpus write")
    stub.kinds = {}
    for flags, n_drafts, requests in ((" ", 14, "6 requests of 48"), (" --candidates 4 ", 16, "16 requests of 64")):
        walk.left.insert(0, command.replace(" write ", f" write{flags}"))
        code, printed = walk.go_on("python -m psysafe.corpus write")
        assert printed.startswith(f"{requests} to ask") and f"{n_drafts} drafts in" in printed
        assert code == int(n_drafts < 16)


@pytest.mark.slow
def test_the_whole_page(tmp_path, stub, capsys):
    """With an endpoint that answers well nothing is left to do, and all sixteen rows are trained on."""
    walk = Walk(tmp_path, stub, capsys)
    walk.prompts()
    assert walk.go_on("python -m psysafe.corpus write")[0] == 0
    code, printed = walk.go_on("python -m psysafe.corpus check")
    assert code == 0, printed
    walk.go_on("python -m psysafe.corpus review")
    walk.review(["approve"] * 16)
    for words in ("python -m psysafe.corpus review --collect", "python -m psysafe.corpus validate"):
        assert walk.go_on(words)[0] == 0
    walk.go_on("python -m psysafe.corpus stats")
    _, printed = walk.go_on("python train.py")
    assert re.search(r"training rows +14 rows,", printed) and re.search(r"validation rows +2 rows,", printed)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    _, answer = walk.go_on("python generate.py")
    assert len(answer.split()) > 5 and not walk.left
