"""Rows with more tokens than a run takes: cut, left out or refused, and always named."""

import json

import pytest

import train
from psysafe.data.documents import encode_rows
from psysafe.data.tokenizer import Tokenizer, load_tokenizer
from psysafe.training.config import TrainConfig
from psysafe.training.setup import load_data
from tests.mistakes import refused, refused_by
from tests.real_tokenizer import real_tokenizer_folder
from tests.test_data import ROW, rows_of


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(real_tokenizer_folder())


def test_long_rows_are_named_and_cut_left_out_or_refused(tokenizer):
    long = ROW | {"answer": "word " * 50, "reasoning": ""}
    rows = rows_of(ROW, long, ROW, long)
    names = "rows.json row 2, rows.json row 4"
    limit = len(encode_rows(rows[:1], tokenizer, 4096).documents[0])
    cut = encode_rows(rows, tokenizer, limit)
    assert cut.notes == [f"not trained to their end (--long-rows drop leaves them out): {names}"]
    assert cut.summary().endswith(f"2 cut at {limit} tokens, 2 without reasoning, {cut.notes[0]}")
    left = encode_rows(rows, tokenizer, limit, long_rows="drop")
    assert [document.source for document in left.documents] == ["rows.json row 1", "rows.json row 3"]
    assert [d.tokens.tolist() for d in left.documents] == [cut.documents[i].tokens.tolist() for i in (0, 2)]
    assert left.summary().endswith(f"0 cut at {limit} tokens, 2 longer left out: {names}")
    refused(f"^{names}: longer than max_tokens {limit}; raise", encode_rows, rows, tokenizer, limit, long_rows="error")
    refused("every row is longer", encode_rows, rows[1::2], tokenizer, limit, long_rows="drop")
    refused("row 11 and 3 more: longer", encode_rows, rows_of(ROW, *[long] * 13), tokenizer, limit, long_rows="error")
    for kind in ("cut", "drop", "error"):  # nothing to say where no row is too long
        assert encode_rows(rows[::2], tokenizer, limit, long_rows=kind).notes == []


def test_a_long_row_without_an_answer_within_the_limit_can_be_left_out(tokenizer):
    rows = rows_of(ROW, ROW | {"prompt": "word " * 100})
    refused("row 2: no trained token", encode_rows, rows, tokenizer, 60)
    assert len(encode_rows(rows, tokenizer, 60, long_rows="drop")) == 1


def test_a_run_says_what_it_did_with_long_rows(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [ROW, ROW | {"answer": "Please call somebody. " * 200}, ROW, ROW]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = f"{path} row 2 (line 2)"
    flags = ["--dry-run", "--data", str(path), "--val-data", str(path), "--max-tokens", "200"]
    for kind, note, n_rows in (
        ([], f"not trained to their end (--long-rows drop leaves them out): {where}", 4),
        (["--long-rows", "drop"], f"1 longer left out: {where}", 3),
    ):
        assert train.main([*flags, *kind]) == 0
        printed = capsys.readouterr().out
        assert printed.count(note) == 2, printed  # of the training rows, and of those that validate
        assert printed.count(f"  {n_rows} rows, ") == 2
    assert f"{where}: longer than max_tokens 200" in refused_by(train.main, [*flags, "--long-rows", "error"], capsys)


@pytest.mark.parametrize("part", ["data", "val_data"])
def test_training_and_validation_rows_are_treated_alike(part, tmp_path):
    good, long = (tmp_path / name for name in ("good.json", "long.json"))
    good.write_text(json.dumps([ROW]))
    long.write_text(json.dumps([ROW, ROW | {"answer": "a " * 999}]))
    files = {"data": [str(good)], "val_data": [str(good)]} | {part: [str(long)]}
    config = TrainConfig(**files, max_tokens=200, long_rows="drop")
    assert [len(rows) for rows in load_data(config, real_tokenizer_folder())[:2]] == [1, 1]
