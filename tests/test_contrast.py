"""Contrast rows: which a step takes, that they count like any others, and that a run with them can be resumed."""

import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import kernels
import train
from kernels.proof.closeness import relative_error
from psysafe.checkpoint.adapter import LAYOUTS
from psysafe.data.documents import Dataset, pack_share, step_contrast_documents, step_documents
from psysafe.model.lora import disabled
from psysafe.training.config import TrainConfig, resolve
from psysafe.training.loss import batch_loss, count_targets
from psysafe.training.run_log import VALIDATION
from psysafe.training.run_state import State, saved_best
from psysafe.training.setup import DataSets
from psysafe.training.step import documents_of_step
from psysafe.training.validation import record_best, validate
from tests.mistakes import refused, refused_by
from tests.test_resume import assert_same_run, command, metrics, workspace  # noqa: F401
from tests.test_train import curve, dataset, setup


def contrast_set(count=5) -> Dataset:
    documents = dataset(count + 11, 50).documents[11:]
    return Dataset([replace(d, source=f"contrast {i}", is_contrast=True) for i, d in enumerate(documents)], 50, 0, 0)


def with_contrast(folder, ratio=0.7, **changes):
    """A run in fp64 with contrast rows; its adapters differ from zero, so that the base is another model."""
    run, _ = setup(folder, contrast_ratio=ratio, **changes)
    run.contrast_set = contrast_set()
    run.adapters.param.copy_(torch.randn(run.adapters.param.shape, generator=torch.Generator().manual_seed(0)) / 9)
    return run


# Which documents a step takes


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 0.29, 1.0, 2.5])
@pytest.mark.parametrize(("n", "batch_size"), [(11, 4), (8, 4), (3, 5), (1, 1)])
def test_the_stream_is_one_permutation_after_the_other_at_the_given_ratio(ratio, n, batch_size):
    n_contrast, stream, documents = 7, [], 0
    for step in range(60):
        documents += len(step_documents(n, step, batch_size, 3407))
        stream += step_contrast_documents(n_contrast, ratio, n, step, batch_size, 3407)
        assert len(stream) == round(ratio * documents)
    passes = [stream[i : i + n_contrast] for i in range(0, len(stream) - n_contrast + 1, n_contrast)]
    assert all(sorted(part) == list(range(n_contrast)) for part in passes)
    assert len(passes) < 4 or len({tuple(part) for part in passes}) > 1


def test_the_stream_has_a_key_of_its_own_and_follows_the_seed():
    def first_pass(seed):
        return step_contrast_documents(40, 1.0, 40, 0, 40, seed)

    assert first_pass(1) != first_pass(2)
    assert all(first_pass(1) != step_documents(40, step, 40, 1) for step in range(4))
    counts = Counter(tuple(step_contrast_documents(3, 1.0, 3, epoch, 3, seed=1)) for epoch in range(6000))
    assert len(counts) == 6 and max(abs(count - 1000) for count in counts.values()) < 150


# What they do in a step


def test_a_step_with_contrast_is_the_step_of_the_same_documents_put_together_by_hand(tmp_path):
    run = with_contrast(tmp_path / "a", ratio=1.0)
    documents = documents_of_step(run)
    assert [d.is_contrast for d in documents] == [False] * 3 + [True] * 3
    row = train.train_step(run)
    by_hand, _ = setup(tmp_path / "b", batch_size=6)
    by_hand.adapters.param.copy_(with_contrast(tmp_path / "c").adapters.param)
    order = step_documents(6, 0, 6, by_hand.config.seed)
    by_hand.train_set = Dataset([documents[order.index(i)] for i in range(6)], 60, 0, 0)
    assert {d.source for d in documents_of_step(by_hand)} == {d.source for d in documents}
    expected = train.train_step(by_hand)
    assert relative_error(run.adapters.grad, by_hand.adapters.grad) <= 1e-12
    assert row.read()["loss"] == pytest.approx(expected.read()["loss"], rel=1e-12)
    assert row.fields["trained_tokens"] == expected.fields["trained_tokens"] == count_targets(documents)
    assert row.fields["tokens"] == sum(map(len, documents))
    assert row.fields["documents"] == [d.source for d in documents]


KL_WEIGHTS = [0.0, 0.5]


@pytest.mark.parametrize("kl_weight", KL_WEIGHTS)
def test_micro_batches_change_nothing(kl_weight, tmp_path):
    limits = (1000, 70, 1)
    runs = [with_contrast(tmp_path / str(n), micro_batch_tokens=n, kl_weight=kl_weight) for n in limits]
    whole, *others = [torch.tensor(curve(run, 6), dtype=torch.float64) for run in runs]
    for losses, run in zip(others, runs[1:], strict=True):
        assert relative_error(losses, whole) <= 1e-9
        assert relative_error(run.adapters.param, runs[0].adapters.param) <= 1e-9


def shares(run, ranks: int, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, gradient) of a step as the sum of all ranks' shares."""
    documents, total = documents_of_step(run), torch.zeros((), dtype=torch.float64)
    run.optimizer.zero_grad()
    for rank in range(ranks):
        for batch in pack_share(documents, limit, rank, ranks):
            loss = batch_loss(run.model, batch, run.runtime.device, run.config.kl_weight) / count_targets(documents)
            loss.backward()
            total += loss.detach()
    return total, run.adapters.grad.clone()


@pytest.mark.parametrize("kl_weight", KL_WEIGHTS)
@pytest.mark.parametrize(("ranks", "limit"), [(2, 1000), (3, 60), (8, 1000)])
def test_the_number_of_ranks_changes_nothing(ranks, limit, kl_weight, tmp_path):
    run = with_contrast(tmp_path, kl_weight=kl_weight)
    loss, grad = shares(run, 1, 1000)
    again, again_grad = shares(run, ranks, limit)
    assert relative_error(again, loss) <= 1e-9 and relative_error(again_grad, grad) <= 1e-9


def test_every_rank_asks_the_base_as_often_as_the_others(tmp_path):
    """With --shard all ranks gather the weights together, for every pass of the base as well."""
    run = with_contrast(tmp_path, ratio=1.0)
    for ranks, limit in ((2, 1000), (4, 60), (8, 60)):
        shares = [pack_share(documents_of_step(run), limit, rank, ranks) for rank in range(ranks)]
        asked = [[batch.contrast is not None for batch in share] for share in shares]
        assert all(row == asked[0] for row in asked) and any(asked[0])
    parts = pack_share(documents_of_step(run), 1000, 0, 8)
    assert [(part.n_contrast, len(part.contrast.tokens)) for part in parts] == [(0, 1)]


# KL to the base


def token_losses(run, document) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross-entropies, KL(base || model)) of a document's trained tokens, in plain torch from all logits."""

    def logarithms(model):
        tokens = torch.from_numpy(document.tokens).long()
        return model.logits(model(tokens, torch.tensor([0, len(tokens)]))).log_softmax(1)[:-1]

    with disabled(run.model), torch.no_grad():
        log_q = logarithms(run.model)
    log_p, labels = logarithms(run.model), torch.from_numpy(document.tokens).long()[1:, None]
    trained = torch.from_numpy(document.trained[1:])
    kl = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)
    return -log_p.gather(1, labels)[trained, 0], kl[trained]


def assert_step_is_plain_torch(run) -> None:
    documents = documents_of_step(run)
    parts = [(document, *token_losses(run, document)) for document in documents]
    sums = [run.config.kl_weight * kl.sum() if d.is_contrast else ce.sum() for d, ce, kl in parts]
    expected = sum(sums) / sum(len(ce) for _, ce, _ in parts)
    grads = torch.autograd.grad(expected, [p for p in run.model.parameters() if p.requires_grad])
    loss = train.train_step(run).read()["loss"]
    assert loss == pytest.approx(expected.item(), rel=1e-9)
    own = [p.grad for p in run.model.parameters() if p.requires_grad]
    assert all(relative_error(a, b) <= 1e-9 for a, b in zip(own, grads, strict=True))


@pytest.mark.parametrize("limit", [1000, 60])
def test_a_step_with_kl_is_plain_torch(limit, tmp_path):
    """Loss and every gradient in fp64: cross-entropy of the training rows, 0.5 KL of the contrast rows, one mean."""
    assert_step_is_plain_torch(with_contrast(tmp_path, ratio=1.0, kl_weight=0.5, micro_batch_tokens=limit))


@pytest.mark.parametrize("mutant", ["own mean", "exchanged", "cross-entropy as well"])
def test_a_wrong_mix_is_caught(mutant, tmp_path, monkeypatch):
    right = kernels.linear_kl
    wrong = {
        "own mean": lambda x, base, head: right(x, base, head) / max(1, len(x)),
        "exchanged": lambda x, base, head: right(base.requires_grad_(), x.detach(), head),
        "cross-entropy as well": lambda x, base, head: (
            right(x, base, head) + kernels.linear_cross_entropy(x, head, torch.zeros(len(x), dtype=torch.int64))
        ),
    }
    monkeypatch.setattr(kernels, "linear_kl", wrong[mutant])
    with pytest.raises(AssertionError):
        assert_step_is_plain_torch(with_contrast(tmp_path, ratio=1.0, kl_weight=0.5))


def test_adapters_that_add_nothing_have_no_divergence_and_no_gradient(tmp_path):
    run = with_contrast(tmp_path, ratio=1.0, kl_weight=1.0)
    for name, x in run.adapters.tensors().items():
        if name.endswith("lora_B"):
            x.zero_()
    (batch,) = pack_share(run.contrast_set.documents, 1000)
    loss = batch_loss(run.model, batch, run.runtime.device, 1.0)
    loss.backward()
    assert loss.item() == 0 and not run.adapters.grad.any()


# Validation, and which adapter is the best


def test_a_validation_measures_both_losses_and_the_divergence(tmp_path):
    run = with_contrast(tmp_path, micro_batch_tokens=60)
    run.val_set, run.contrast_val_set = dataset(5), contrast_set(6)
    losses = validate(run)
    parts = zip(*(token_losses(run, document) for document in contrast_set(6).documents), strict=True)
    cross_entropy, kl = (torch.cat(part).mean().item() for part in parts)
    assert losses["contrast_loss"] == pytest.approx(cross_entropy, rel=1e-9)
    assert losses["contrast_kl"] == pytest.approx(kl, rel=1e-9) and kl > 0.01
    own = torch.cat([token_losses(run, d)[0] for d in dataset(5).documents]).mean()
    assert losses["val_loss"] == pytest.approx(own.item(), rel=1e-9) and list(losses) == list(VALIDATION)
    run.val_set = None
    assert validate(run).keys() == {"contrast_loss", "contrast_kl"}
    run.contrast_val_set = None
    assert validate(run) == {}


@pytest.mark.parametrize(
    ("keep_best", "expected"), [("last", None), ("val", (4, 0.2)), ("contrast", (1, 0.1)), ("both", (2, 0.5))]
)
def test_which_validation_is_the_best(keep_best, expected, tmp_path):
    """The first of equal ones, never the one before the first step, and never one that is not a number."""
    run = with_contrast(tmp_path, keep_best=keep_best)
    series = [(0.1, 0.0), (1.0, 0.1), (0.3, 0.2), (0.25, 0.25), (0.2, 0.4), (math.nan, math.nan), (0.3, 0.4)]
    for run.step, (val_loss, kl) in enumerate(series):
        run.adapters.param.fill_(run.step)
        record_best(run, {"val_loss": val_loss, "contrast_loss": 9.0, "contrast_kl": kl})
    assert (run.best and (run.best.step, pytest.approx(run.best.score))) == expected
    assert run.best_val == 0.1, "one that is not a number is no reason to forget the lowest"
    assert run.best is None or (run.best.adapter == run.best.step).all()


@pytest.mark.parametrize("best", [3, [], {"step": 1}, {"step": "1", "score": 0.5}, {"step": 1, "score": None}])
def test_a_state_with_another_kind_of_best_is_refused(best, tmp_path):
    state, like = State(1, {"best_adapter": torch.ones(3)}, {"best": best}, tmp_path), torch.zeros(3)
    refused("state.json: best is .*, expected an object with step and score", saved_best, state, like)
    assert saved_best(State(1, {}, {}, tmp_path), like) is None
    right = State(1, state.tensors, {"best": {"step": 4, "score": 0.5}}, tmp_path)
    assert saved_best(right, like)[:2] == (4, 0.5)


# Settings


def test_contrast_rows_without_a_ratio_and_a_ratio_without_rows_are_refused(tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text('data = ["a"]\ncontrast_data = ["c"]\n')
    refused("contrast_data names rows, and no contrast_ratio says how many", resolve, ["--config", str(file)])
    assert resolve(["--config", str(file), "--contrast-ratio", "0"])[0].contrast_ratio == 0
    refused("--contrast-data has no effect here", resolve, ["--contrast-data", "c", "--contrast-ratio", "0"])
    line = refused_by(train.main, ["--contrast-ratio", "0.5", "--out", tmp_path / "run"], capsys)
    assert "no contrast rows for contrast_ratio 0.5: give --contrast-data FILE" in line


def test_a_weight_or_a_choice_without_the_rows_that_it_needs_is_refused(tmp_path, capsys):
    for words, expected in (
        (["--kl-weight", "1"], "--kl-weight has no effect here: give --contrast-data and --contrast-ratio"),
        (["--keep-best", "contrast"], "no rows validate contrast_kl; give --contrast-val-data, or --keep-best last"),
        (["--keep-best", "both"], "keep_best both: no rows validate contrast_kl"),
        (["--keep-best", "val", "--val-fraction", "0"], "no rows validate val_loss; give --val-data"),
        (["--keep-best", "best"], "expected last or val or contrast or both"),
        (["--contrast-ratio", "-1"], "contrast_ratio is -1.0; expected a number, between 0 and 100"),
    ):
        assert expected in refused_by(train.main, [*words, "--out", tmp_path / "run"], capsys)


def test_own_contrast_rows_are_not_validated_on_the_files(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('data = ["a"]\ncontrast_data = ["c"]\ncontrast_val_data = ["v"]\ncontrast_ratio = 1\n')
    for flags, expected in (([], ["v"]), (["--contrast-data", "own"], []), (["--data", "own"], ["v"])):
        config, sources = resolve(["--config", str(file), *flags])
        assert config.contrast_val_data == expected
        assert ("are left out" in sources["contrast_val_data"]) == (not expected)


def test_the_digest_tells_contrast_rows_from_others():
    first, second = dataset(4), contrast_set(4)
    sets = [
        DataSets(first, None, None, None),
        DataSets(first, None, second, None),
        DataSets(first, None, None, second),
        DataSets(first, second, None, None),
    ]
    assert len({data.digest() for data in sets}) == 4


# A whole run


def flags(folder, *more: str) -> tuple[str, ...]:
    return ("--contrast-data", f"{folder}/contrast.jsonl", "--contrast-ratio", "0.75", *more)


@pytest.fixture(scope="module")
def rows(workspace):  # noqa: F811
    lines = (workspace / "train.jsonl").read_text().splitlines()
    (workspace / "contrast.jsonl").write_text("\n".join(lines[::-2]))
    return workspace


def run_with(rows, out, *more) -> int:
    return train.main(command(rows, out, *more, *flags(rows))[2:])


def dies_at(step: int, patch) -> None:
    """Lets the run die before it makes this step."""

    def dies(run, train_step=train.train_step):
        if run.step == step:
            raise SystemExit("killed")
        return train_step(run)

    patch.setattr(train, "train_step", dies)


def test_a_run_with_contrast_rows_killed_and_resumed_is_bit_identical(rows, capsys, monkeypatch):
    words = "--max-steps", "14"
    assert run_with(rows, "contrast-whole", *words) == 0
    text = capsys.readouterr().out
    assert re.search(r"contrast rows +10 rows, .*; 0.75 for each training row; a row is trained 2.1 times; \+\d", text)
    assert re.search(r"contrast validation +1 row, .*set apart from the contrast rows .val_fraction 0.1.", text)
    assert "2 training and 1.5 contrast documents" in text
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        dies_at(5, patch)
        run_with(rows, "contrast-killed", *words)
    assert run_with(rows, "contrast-killed", *words) == 0
    assert_same_run(rows / "contrast-whole", rows / "contrast-killed")


@pytest.mark.parametrize("keep_best", ["contrast", "val"])
def test_the_best_adapter_is_what_stays_also_after_a_kill(keep_best, rows, capsys, monkeypatch):
    """Killed in the last epoch, after the best validation by the base; with KL, so that its resuming is seen, too."""
    words = ("--keep-best", keep_best, "--kl-weight", "0.5", "--epochs", "3", "--batch-size", "6")
    adapters = {}

    def recorded(run, losses, record_best=train.record_best):
        record_best(run, losses)
        adapters[run.step] = {name: x.clone() for name, x in run.adapters.tensors().items()}, losses, run.best

    monkeypatch.setattr(train, "record_best", recorded)
    assert run_with(rows, f"best-{keep_best}", *words) == 0
    best = adapters[12][2]
    name = {"contrast": "contrast_kl", "val": "val_loss"}[keep_best]
    scores = {step: losses[name] for step, (_, losses, _) in adapters.items() if step}
    assert best.step == min(scores, key=scores.get) and best.score == scores[best.step]
    saved = load_file(rows / f"best-{keep_best}" / "adapter_model.safetensors")
    expected = adapters[best.step][0]
    assert all(torch.equal(saved[f"{LAYOUTS['text'][0]}{name}.weight"], expected[name]) for name in expected)
    assert f"it is that of step {best.step}, --keep-best {keep_best} {best.score:.4f}; try:" in capsys.readouterr().out
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        dies_at(10, patch)
        run_with(rows, f"best-{keep_best}-killed", *words)
    assert run_with(rows, f"best-{keep_best}-killed", *words) == 0
    assert_same_run(rows / f"best-{keep_best}", rows / f"best-{keep_best}-killed")


def test_a_run_is_not_resumed_with_other_contrast_rows_or_another_ratio(rows, capsys):
    words = command(rows, "contrast-other", "--max-steps", "2")[2:]
    assert train.main([*words, *flags(rows)]) == 0
    line = refused_by(train.main, [*words, *flags(rows, "--contrast-data", f"{rows}/val.jsonl")], capsys)
    assert "was saved with other rows" in line and "--contrast-data" in line
    line = refused_by(train.main, [*words, *flags(rows), "--contrast-ratio", "0.5"], capsys)
    assert "contrast_ratio (saved 0.75, now 0.5)" in line


def test_the_default_is_the_papers_recipe():
    config = TrainConfig()
    assert (config.contrast_data, config.contrast_ratio, config.contrast_val_data) == ([], 0.0, [])
    assert np.isclose(config.val_fraction, 0.1)
