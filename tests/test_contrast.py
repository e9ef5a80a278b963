"""Contrast rows: which a step takes, that they count like any others, and that a run with them can be resumed."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

import train
from kernels.proof.closeness import relative_error
from psysafe.data.documents import Dataset, pack_share, step_contrast_documents, step_documents
from psysafe.training.config import TrainConfig, resolve
from psysafe.training.loss import batch_loss, count_targets
from psysafe.training.run_state import digest_rows
from psysafe.training.setup import DataSets
from psysafe.training.step import documents_of_step
from tests.mistakes import refused, refused_by
from tests.test_resume import assert_same_run, command, metrics, workspace  # noqa: F401
from tests.test_train import curve, dataset, setup


def contrast_set(count=5) -> Dataset:
    documents = dataset(count + 11, 50).documents[11:]
    return Dataset([replace(d, source=f"contrast {i}", is_contrast=True) for i, d in enumerate(documents)], 50, 0, 0)


def with_contrast(folder, ratio=0.7, **changes):
    run, _ = setup(folder, contrast_ratio=ratio, **changes)
    run.contrast_set = contrast_set()
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
    order = step_documents(6, 0, 6, by_hand.config.seed)
    by_hand.train_set = Dataset([documents[order.index(i)] for i in range(6)], 60, 0, 0)
    assert {d.source for d in documents_of_step(by_hand)} == {d.source for d in documents}
    expected = train.train_step(by_hand)
    assert relative_error(run.adapters.grad, by_hand.adapters.grad) <= 1e-12
    assert row.read()["loss"] == pytest.approx(expected.read()["loss"], rel=1e-12)
    assert row.fields["trained_tokens"] == expected.fields["trained_tokens"] == count_targets(documents)
    assert row.fields["tokens"] == sum(map(len, documents))
    assert row.fields["documents"] == [d.source for d in documents]


def test_micro_batches_change_nothing(tmp_path):
    runs = [with_contrast(tmp_path / str(limit), micro_batch_tokens=limit) for limit in (1000, 70, 1)]
    whole, *others = [torch.tensor(curve(run, 8), dtype=torch.float64) for run in runs]
    for losses, run in zip(others, runs[1:], strict=True):
        assert relative_error(losses, whole) <= 1e-9
        assert relative_error(run.adapters.param, runs[0].adapters.param) <= 1e-9


def shares(run, ranks: int, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, gradient) of a step as the sum of all ranks' shares."""
    documents, total = documents_of_step(run), torch.zeros((), dtype=torch.float64)
    run.optimizer.zero_grad()
    for rank in range(ranks):
        for batch in pack_share(documents, limit, rank, ranks):
            loss = batch_loss(run.model, batch, run.runtime.device) / count_targets(documents)
            loss.backward()
            total += loss.detach()
    return total, run.adapters.grad.clone()


@pytest.mark.parametrize(("ranks", "limit"), [(2, 1000), (3, 60), (8, 1000)])
def test_the_number_of_ranks_changes_nothing(ranks, limit, tmp_path):
    run = with_contrast(tmp_path)
    loss, grad = shares(run, 1, 1000)
    again, again_grad = shares(run, ranks, limit)
    assert relative_error(again, loss) <= 1e-9 and relative_error(again_grad, grad) <= 1e-9


# Settings


def test_contrast_rows_without_a_ratio_and_a_ratio_without_rows_are_refused(tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text('data = ["a"]\ncontrast_data = ["c"]\n')
    refused("contrast_data names rows, and no contrast_ratio says how many", resolve, ["--config", str(file)])
    assert resolve(["--config", str(file), "--contrast-ratio", "0"])[0].contrast_ratio == 0
    refused("--contrast-data has no effect here", resolve, ["--contrast-data", "c", "--contrast-ratio", "0"])
    line = refused_by(train.main, ["--contrast-ratio", "0.5", "--out", tmp_path / "run"], capsys)
    assert "no contrast rows for contrast_ratio 0.5: give --contrast-data FILE" in line


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
    assert len({digest_rows(data) for data in sets}) == 4


# A whole run


def flags(folder, *more: str) -> tuple[str, ...]:
    return ("--contrast-data", f"{folder}/contrast.jsonl", "--contrast-ratio", "0.75", *more)


@pytest.fixture(scope="module")
def rows(workspace):  # noqa: F811
    lines = (workspace / "train.jsonl").read_text().splitlines()
    (workspace / "contrast.jsonl").write_text("\n".join(lines[::-2]))
    return workspace


def test_a_run_with_contrast_rows_stopped_and_resumed_is_bit_identical(rows, capsys, monkeypatch):
    def run(out, *more):
        return train.main(command(rows, out, "--max-steps", "14", *flags(rows, *more))[2:])

    assert run("contrast-whole") == 0
    text = capsys.readouterr().out
    assert re.search(r"contrast rows +10 rows, .*; 0.75 for each training row; a row is trained 2.1 times; \+\d", text)
    assert re.search(r"contrast validation +1 row, .*set apart from the contrast rows .val_fraction 0.1.", text)
    assert "2 training and 1.5 contrast documents" in text
    row = metrics(rows / "contrast-whole")[0]
    assert row["contrast_loss"] > 0 and row["val_loss"] > 0

    def dies(run, step=train.train_step):
        if run.step == 5:
            raise SystemExit("killed")
        return step(run)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "train_step", dies)
        run("contrast-killed")
    assert run("contrast-killed") == 0
    assert_same_run(rows / "contrast-whole", rows / "contrast-killed")


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
