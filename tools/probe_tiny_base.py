"""What the tiny base does with prompts that it has not read: answered, refused, and can risky refusals be told apart?

    python tools/probe_tiny_base.py                     tiny_corpus/heldout.jsonl, about a minute
    python tools/probe_tiny_base.py --model DIR --prompts FILE.jsonl --show

Prompts are JSON lines with `prompt` and `group` (risky, out_of_domain, scary, plain). Two scores separate the risky
prompts from the others that the base refuses: its own topic words (how much likelier a risk category follows "This is
about" than a class of other requests), and a logistic probe on the hidden state of that place, fitted on what the base
has read. AUC is the share of pairs (risky, other) in which the risky one scores higher.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tiny_corpus
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from psysafe import load_model, load_tokenizer  # noqa: E402
from psysafe.cli import Parser  # noqa: E402
from psysafe.data.rows import read_prompts  # noqa: E402
from psysafe.data.tokenizer import THINK_END  # noqa: E402
from psysafe.evaluation import word_list_judge  # noqa: E402
from psysafe.evaluation.rules_accuracy import accuracy_note  # noqa: E402
from psysafe.generation.engine import Options  # noqa: E402
from psysafe.generation.generator import Generator  # noqa: E402
from psysafe.program import UserError, main_guard  # noqa: E402

HELD_OUT = ROOT / "tools" / "tiny_corpus" / "heldout.jsonl"
GROUPS = ("risky", "out_of_domain", "scary", "plain")
FIT_PROMPTS = 600  # of each kind, for the logistic probe
WEIGHT_DECAY = 1e-3


@dataclass
class Base:
    model: torch.nn.Module
    tokenizer: object

    def before_the_topic(self, prompt: str) -> list[int]:
        """Ids of the prompt and of the beginning of a refusal's reasoning."""
        prompt_ids = self.tokenizer.encode_chat([{"role": "user", "content": prompt}], True)
        return [*prompt_ids, *self.tokenizer.encode("This is about")]

    @torch.no_grad()
    def hidden(self, sequences: list[list[int]]) -> list[torch.Tensor]:
        """The final hidden states (T, D) of each sequence of ids, sixty-four packed together."""
        states = []
        for start in range(0, len(sequences), 64):
            part = sequences[start : start + 64]
            lengths = [len(ids) for ids in part]
            ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            states += self.model(torch.tensor([i for ids in part for i in ids]), ends).split(lengths)
        return states

    def answers(self, prompts: list[str]) -> list[tuple[str, str]]:
        """(reasoning, answer) of each prompt, greedy."""
        conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
        answers = Generator(self.model, self.tokenizer, Options(max_new_tokens=96)).answers(conversations)
        return [(a.reasoning, a.answer) for a in sorted(answers, key=lambda a: a.row)]

    def topic_scores(self, prompts: list[str]) -> torch.Tensor:
        """(prompts,) log p(a risk category) - log p(another class), after "This is about" in the reasoning."""
        risky = [category.name for categories in tiny_corpus.CATEGORIES.values() for category in categories]
        others = list(tiny_corpus.wide.REFUSED["out_of_domain"])
        scores = torch.stack([self._topic_log_probs(prompt, [*risky, *others]) for prompt in prompts])
        return scores[:, : len(risky)].logsumexp(1) - scores[:, len(risky) :].logsumexp(1)

    def _topic_log_probs(self, prompt: str, topics: list[str]) -> torch.Tensor:
        start = self.before_the_topic(prompt)
        ids = [self.tokenizer.encode(f" {topic}.") for topic in topics]
        log_probs = []
        for topic_ids, states in zip(ids, self.hidden([start + topic_ids for topic_ids in ids]), strict=True):
            rows = self.model.logits(states[len(start) - 1 : -1]).log_softmax(1)
            log_probs.append(rows[range(len(topic_ids)), topic_ids].sum())
        return torch.stack(log_probs)

    def last_states(self, prompts: list[str]) -> torch.Tensor:
        """(prompts, D) the hidden state that predicts the topic."""
        return torch.stack([states[-1] for states in self.hidden([self.before_the_topic(p) for p in prompts])])


def auc(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """Share of pairs in which the positive one scores higher; equal scores count half."""
    difference = positive[:, None] - negative[None, :]
    return ((difference > 0).double() + (difference == 0).double() / 2).mean().item()


def fit_logistic(x: torch.Tensor, is_positive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights (D,), bias) of a logistic regression with weight decay, by L-BFGS."""
    parameters = torch.zeros(x.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = x @ parameters[:-1] + parameters[-1]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, is_positive)
        loss = loss + WEIGHT_DECAY * parameters[:-1].square().sum()  # of all of it: the line search compares values
        loss.backward()
        return loss

    optimizer.step(closure)
    return parameters[:-1].detach(), parameters[-1].detach()


def prompts_of_the_base() -> tuple[list[str], list[str]]:
    """Prompts that the base has read, evenly over their kinds: risky ones, and others that it refuses."""
    rng = random.Random(tiny_corpus.SEED)
    prompts = tiny_corpus.base_prompts()
    sides = []
    for stream in ("risky", "out of domain"):
        kinds = list(prompts[stream].values())
        each = FIT_PROMPTS // len(kinds)
        sides.append([prompt for kind in kinds for prompt, _, _ in rng.sample(kind, min(each, len(kind)))])
    return sides[0], sides[1]


def report(base: Base, rows: list[dict], show: bool) -> None:
    answers = base.answers([row["prompt"] for row in rows])
    refused = [word_list_judge.refuses(answer) for _, answer in answers]
    for row, (reasoning, answer) in zip(rows, answers, strict=True):
        if show:
            print(f"{row['group']:<14} {row['prompt']}\n    {reasoning.strip()} {THINK_END} {answer.strip()}")
    for group in GROUPS:
        of_group = [refuses for row, refuses in zip(rows, refused, strict=True) if row["group"] == group]
        if of_group:
            n, n_refused = len(of_group), sum(of_group)
            print(f"{group:<14} {n:4d} prompts: {n - n_refused:4d} answered, {n_refused:4d} refused")
    print(accuracy_note())
    risky = [row["prompt"] for row in rows if row["group"] == "risky"]
    others = [row["prompt"] for row, r in zip(rows, refused, strict=True) if r and row["group"] != "risky"]
    if risky and others:
        print(f"{len(risky)} risky against {len(others)} other refused prompts:")
        print(f"  AUC of the topic words    {auc(base.topic_scores(risky), base.topic_scores(others)):.3f}")
        print(f"  AUC of a logistic probe   {probe_auc(base, risky, others):.3f}")


def probe_auc(base: Base, risky: list[str], others: list[str]) -> float:
    fit_risky, fit_others = (base.last_states(prompts) for prompts in prompts_of_the_base())
    x = torch.cat([fit_risky, fit_others])
    mean, std = x.mean(0), x.std(0)
    is_risky = torch.cat([torch.ones(len(fit_risky)), torch.zeros(len(fit_others))])
    weights, bias = fit_logistic((x - mean) / std, is_risky)
    scores = [((base.last_states(p) - mean) / std) @ weights + bias for p in (risky, others)]
    return auc(*scores)


def main(argv: Sequence[str]) -> int:
    parser = Parser("tools/probe_tiny_base.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="assets:tiny", help="the base (default assets:tiny)")
    parser.add_argument("--prompts", default=str(HELD_OUT), help="JSON lines with prompt and group")
    parser.add_argument("--show", action="store_true", help="print every prompt with reasoning and answer")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [row.fields for row in read_prompts(args.prompts)]
    if unknown := [row for row in rows if row.get("group") not in GROUPS]:
        raise UserError(f"{args.prompts}: group is {unknown[0].get('group')!r}, expected one of {', '.join(GROUPS)}")
    report(Base(load_model(args.model), load_tokenizer(args.model)), rows, args.show)
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))
