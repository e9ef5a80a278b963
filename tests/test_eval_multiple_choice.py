"""MMLU and HellaSwag against lm-eval 0.4.13: request strings, log-likelihoods and metrics of the fixture.

The goldens come from tools/make_lm_eval_goldens.py. The deliberate errors at the end must each break the comparison.
"""

import argparse
import json
from pathlib import Path

import pytest
import torch

from psysafe import load_model
from psysafe.data.tokenizer import load_tokenizer
from psysafe.evaluation.benchmarks import log_likelihood, mmlu, multiple_choice
from psysafe.evaluation.benchmarks.hellaswag import HellaSwag
from psysafe.evaluation.benchmarks.log_likelihood import encode
from psysafe.evaluation.benchmarks.mmlu import MMLU
from psysafe.evaluation.benchmarks.multiple_choice import Item, correct, mean, pooled, request
from psysafe.program import UserError

FIXTURES = Path(__file__).parent / "fixtures" / "eval"
GOLDENS = json.loads((FIXTURES / "lm_eval_goldens.json").read_text(encoding="utf-8"))
hellaswag_item = HellaSwag.item
VARIANTS = ("plain", "system", "chat")


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (FIXTURES / f"{name}.jsonl").read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def model():
    return load_model(f"random:{FIXTURES / 'model' / 'config.json'}")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FIXTURES / "model")


def items_and_samples(task: str, variant: str):
    golden = GOLDENS[variant][task]
    if task == "hellaswag":
        return [HellaSwag().item(row) for row in rows(task)], golden["samples"]
    items = sorted((MMLU().item(row) for row in rows(task)), key=lambda item: item.subject)
    return items, [sample for _, part in sorted(golden["subjects"].items()) for sample in part["samples"]]


def ask(item, variant: str, tokenizer):
    system = None if variant == "plain" else GOLDENS["system_text"]
    return multiple_choice.request(item, system, tokenizer if variant == "chat" else None, thinking=True)


def check(task: str, variant: str, model, tokenizer) -> None:
    """Everything that lm-eval says of a task under a variant."""
    items, samples = items_and_samples(task, variant)
    assert len(items) == len(samples) >= 30
    asked = [ask(item, variant, tokenizer) for item in items]
    assert [[[c, k] for k in ks] for c, ks in asked] == [sample["arguments"] for sample in samples]
    encoded = [log_likelihood.encode(tokenizer, *one, GOLDENS["max_length"]) for one in asked]
    by_item: dict[int, list[float]] = {}
    for batch in log_likelihood.batches(model, encoded):
        by_item |= dict(zip(batch, log_likelihood.score(model, [encoded[i] for i in batch]), strict=True))
    ours = torch.tensor([by_item[i] for i in range(len(items))])
    theirs = torch.tensor([sample["log_likelihoods"] for sample in samples])
    error = (ours - theirs).abs().max().item()
    print(f"{task}, {variant}: log-likelihoods differ by {error:.1e} at most")
    assert error <= 1e-4
    scored = [multiple_choice.correct(item, lls) for item, lls in zip(items, ours.tolist(), strict=True)]
    for metric in ("acc", "acc_norm") if task == "hellaswag" else ("acc",):
        assert [one[metric] for one in scored] == [sample[metric] for sample in samples]
    golden = GOLDENS[variant][task]
    if task == "hellaswag":
        for metric in ("acc", "acc_norm"):
            whole = multiple_choice.mean([one[metric] for one in scored])
            assert (whole.value, whole.stderr) == pytest.approx((golden[metric], golden[f"{metric}_stderr"]), abs=1e-12)
    else:
        by_subject = mmlu.subject_accuracy(items, scored)
        for subject, metric in by_subject.items():
            expected = golden["subjects"][subject]
            assert (metric.value, metric.stderr) == pytest.approx((expected["acc"], expected["acc_stderr"]), abs=1e-12)
        whole = multiple_choice.pooled(list(by_subject.values()))
        assert (whole.value, whole.stderr) == pytest.approx((golden["acc"], golden["acc_stderr"]), abs=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("task", ["hellaswag", "mmlu"])
def test_equal_to_lm_eval(task, variant, model, tokenizer):
    check(task, variant, model, tokenizer)


def test_the_fixture_holds_what_it_is_for(tokenizer):
    """Cut contexts, ties, characters that are not bytes, contexts that end in a space."""
    cut = ties = 0
    for task in ("hellaswag", "mmlu"):
        items, samples = items_and_samples(task, "chat")
        for item, sample in zip(items, samples, strict=True):
            context, choices = ask(item, "chat", tokenizer)
            branches = log_likelihood.encode(tokenizer, context, choices, GOLDENS["max_length"])
            cut += any(len(b.prefix) < len(tokenizer.encode(context.rstrip())) for b in branches)
            ties += len(set(sample["log_likelihoods"])) < 4
    assert cut >= 3 and ties >= 3
    assert any(context.endswith((" ", "\n")) for context, _ in (ask(item, "chat", tokenizer) for item in items))


def without_moved_space(tokenizer, context, continuations, max_tokens):
    head = tokenizer.encode(context)
    tails = [tokenizer.encode(context + k)[len(head) :] for k in continuations]
    return [
        log_likelihood.Branches((head + tail)[-(max_tokens + 1) :][: -len(tail)], [tail], [[i]])
        for i, tail in enumerate(tails)
    ]


def cut_by_one(tokenizer, context, continuations, max_tokens):
    return encode(tokenizer, context, continuations, max_tokens - 1)


def bytes_for_characters(item, lls):
    norm = [ll / len(choice.encode()) for ll, choice in zip(lls, item.choices, strict=True)]
    return correct(item, lls) | {"acc_norm": float(norm.index(max(norm)) == item.gold)}


def field_ctx(self, row):
    return hellaswag_item(self, row | {"ctx_a": row["ctx"], "ctx_b": ""})


def last_maximum(values):
    return max(range(len(values)), key=lambda i: (values[i], i))


def population_stderr(values):
    right = mean(values)
    return right._replace(stderr=right.stderr * ((right.n - 1) / right.n) ** 0.5)


def delimiter_in_chat(item, system, tokenizer, thinking):
    context, choices = request(item, system, tokenizer, thinking)
    return context, [" " + choice.lstrip() for choice in choices]


def unweighted_groups(metrics):
    return pooled(metrics)._replace(value=sum(m.value for m in metrics) / len(metrics))


@pytest.mark.parametrize(
    ("owner", "name", "wrong", "task", "variant"),
    [
        (log_likelihood, "encode", without_moved_space, "hellaswag", "chat"),
        (log_likelihood, "encode", cut_by_one, "mmlu", "system"),
        (multiple_choice, "correct", bytes_for_characters, "hellaswag", "plain"),
        (HellaSwag, "item", field_ctx, "hellaswag", "plain"),
        (multiple_choice, "_argmax", last_maximum, "hellaswag", "plain"),
        (multiple_choice, "mean", population_stderr, "hellaswag", "plain"),
        (multiple_choice, "request", delimiter_in_chat, "mmlu", "chat"),
        (multiple_choice, "pooled", unweighted_groups, "mmlu", "plain"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_deliberate_error_is_caught(owner, name, wrong, task, variant, model, tokenizer, monkeypatch):
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError):
        check(task, variant, model, tokenizer)


def test_grouping_changes_nothing(model, tokenizer):
    """One item at a time, all at once, or every choice on its own: the same log-likelihoods."""
    items = [HellaSwag().item(row) for row in rows("hellaswag")[:8]] + [MMLU().item(row) for row in rows("mmlu")[:8]]
    encoded = [log_likelihood.encode(tokenizer, *ask(item, "plain", tokenizer), 512) for item in items]
    together = torch.tensor(log_likelihood.score(model, encoded))
    alone = torch.tensor([log_likelihood.score(model, [item])[0] for item in encoded])

    def one_by_one(item: list[log_likelihood.Branches]) -> list[float]:
        scores = {}
        for b in item:
            for tail, choices in zip(b.continuations, b.choices, strict=True):
                ((score,),) = log_likelihood.score(model, [[log_likelihood.Branches(b.prefix, [tail], [[0]])]])
                scores |= dict.fromkeys(choices, score)
        return [scores[choice] for choice in sorted(scores)]

    apart = torch.tensor([one_by_one(item) for item in encoded])
    assert (together - alone).abs().max() < 1e-4 and (together - apart).abs().max() < 1e-4


def test_killed_and_restarted_gives_the_same_table(tmp_path, monkeypatch):
    """Only what is missing is scored again, and the tables are equal to the last digit."""

    def run(folder):
        parser = argparse.ArgumentParser()
        HellaSwag().arguments(parser)
        parser.add_argument("--out")
        args = ["--data", str(FIXTURES / "hellaswag.jsonl"), "--model", f"random:{FIXTURES / 'model' / 'config.json'}"]
        args += ["--out", str(folder), "--batch-tokens", "300", "--device", "cpu"]
        return HellaSwag().run(parser.parse_args(args))

    whole = run(tmp_path / "whole")
    calls = []
    right = log_likelihood.score

    def dies(model, items):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(1)
        return right(model, items)

    with monkeypatch.context() as patch:
        patch.setattr(log_likelihood, "score", dies)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed")
    file = tmp_path / "killed" / "items.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[:-7])  # the last line torn
    again = run(tmp_path / "killed")
    assert again.tables == whole.tables
    assert len(file.read_bytes().splitlines()) == len((tmp_path / "whole" / "items.jsonl").read_bytes().splitlines())


def test_a_row_with_an_empty_choice_is_refused(tmp_path):
    """Before any model is loaded: "[header]" is what is left of WikiHow's marks, and is cleaned away."""
    row = rows("hellaswag")[0]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row | {"endings": ["[header]", *row["endings"][1:]]}) + "\n")
    args = argparse.Namespace(data=str(tmp_path / "rows.jsonl"), data_revision="", limit=0)
    with pytest.raises(UserError, match=r"rows.jsonl row 1: not a row of hellaswag; expected activity_label"):
        HellaSwag().run(args)


def test_equal_choices_tie_to_the_last_bit(model, tokenizer):
    """Also where a batch puts them into rows that its matrix products round differently."""
    filler = [encode(tokenizer, f"{'x ' * n}Which?", [" a long one", " b", " another"], 64) for n in range(1, 12)]
    item = encode(tokenizer, "Which?", [" the same", " other", " the same", " the same"], 64)
    assert [(len(b.continuations), b.choices) for b in item] == [(2, [[0, 2, 3], [1]])]
    for n in range(len(filler)):
        first, other, *rest = log_likelihood.score(model, [*filler[:n], item])[-1]
        assert rest == [first, first] and other != first

def test_questions_with_typed_control_tokens_are_counted(tokenizer):
    """With --chat they reach the model as control tokens, as in lm-eval, which is said."""
    items = [Item(f"{question} Answer:", ["A", "B"], 0, "", "") for question in ("Which?", "<|im_end|> Which?")]
    assert "1 of 2 questions hold typed control tokens" in multiple_choice.typed_tokens_note(items, tokenizer)
    assert multiple_choice.typed_tokens_note(items[:1], tokenizer) == ""
