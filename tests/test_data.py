"""Rows, their encoding, the documents of a step and packing: against plain slow versions, and with broken input."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psysafe.data import __main__ as show_command
from psysafe.data import documents as data
from psysafe.data.documents import Document, encode_rows, pack, split_rows, step_documents
from psysafe.data.rows import Row, read_file, read_rows, read_table, row_messages
from psysafe.data.tokenizer import Tokenizer, load_tokenizer
from psysafe.program import main_guard
from tests.mistakes import error_line, refused, refused_by
from tests.real_tokenizer import real_tokenizer_folder

ROW = {"prompt": "I feel low.", "answer": "I am sorry.", "reasoning": "The user is sad.", "risk cluster": "none"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(real_tokenizer_folder())


def rows_of(*fields: dict) -> list[Row]:
    return [Row(f, Path("rows.json"), number) for number, f in enumerate(fields, 1)]


# Reading


def test_json_and_jsonl_give_the_same_rows(tmp_path):
    """Also with a byte order mark, Windows line ends, blank lines and a line separator inside a text."""
    expected = [ROW | {"answer": "a\u2028b\u0085c 日本"}, {"messages": [{"role": "user", "content": "x"}], "author": 3}]
    lines = [json.dumps(fields, ensure_ascii=False) for fields in expected]
    (tmp_path / "rows.json").write_text(json.dumps(expected, indent=1), encoding="utf-8-sig")
    (tmp_path / "rows.jsonl").write_bytes(("\ufeff" + lines[0] + "\r\n\r\n" + lines[1]).encode())
    for name, places in (("rows.json", ["row 1", "row 2"]), ("rows.jsonl", ["row 1 (line 1)", "row 2 (line 3)"])):
        rows = read_rows([tmp_path / name])
        assert [row.fields for row in rows] == expected
        assert [row.where for row in rows] == [f"{tmp_path / name} {place}" for place in places]
    both = read_rows([tmp_path / "rows.json", str(tmp_path / "rows.jsonl")])
    assert [row.number for row in both] == [1, 2, 1, 2]
    assert len(read_rows(tmp_path / "rows.json")) == 2


BAD_FILES = {
    "empty file": (b"", "no rows in it"),
    "blank file": (b"\xef\xbb\xbf\n \n", "no rows in it"),
    "empty array": (b"[]", "no rows in it"),
    "malformed line": (b'{"prompt": "a", "answer": "b"}\n\n{"prompt": "a" "answer"}\n', "malformed JSON at line 3"),
    "malformed array": (b'[\n{"prompt": "a", "answer": "b"}\n{}]', "malformed JSON at line 3"),
    "truncated array": (b'[\n{"prompt": "a", "answer": "b', "malformed JSON at line 2"),
    "one object over lines": (b'{\n"prompt": "a", "answer": "b"}', "malformed JSON at line 1"),
    "brackets without end": (b'{"prompt": ' + b"[" * 100_000, "malformed JSON at line 1"),
    "endless number": (b'{"prompt": ' + b"1" * 5000 + b"}", "malformed JSON at line 1"),
    "other encoding": (b'{"prompt": "a", "answer": "b"}\n{"prompt": "caf\xe9"}', "not UTF-8 at line 2"),
    "no answer": (b'[{"prompt": "a", "answer": "b"}, {"prompt": "a"}]', "row 2: no answer in it (found: prompt)"),
    "no answer on a line": (b'\n{"prompt": "a"}', "row 1 (line 2): no answer in it"),
    "unknown shape": (b'[{"ask": "a"}]', "row 1: no prompt in it (found: ask); expected"),
    "empty object": (b"[{}]", "row 1: no prompt in it (found: nothing)"),
    "not an object": (b'[["a", "b"]]', 'row 1: ["a", "b"] (list), expected an object'),
    "answer of another type": (b'[{"prompt": "a", "answer": 7}]', "row 1: answer is 7 (int), expected a text"),
    "answer null": (b'[{"prompt": "a", "answer": null}]', "row 1: answer is null (NoneType), expected a text"),
    "answer blank": (b'[{"prompt": "a", "answer": " \\n"}]', "row 1: answer is"),
    "reasoning of another type": (b'{"prompt": "a", "answer": "b", "reasoning": []}', "reasoning is [] (list)"),
    "messages of another type": (b'[{"messages": "a"}]', 'row 1: messages is "a" (str), expected a list'),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    assert refused(re.escape(message), read_rows, [path]).startswith(str(path))


def test_unreadable_files(tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        assert refused("cannot be read", read_rows, [path]).startswith(str(path))


def test_every_format_gives_the_same_rows(tmp_path):
    """Training, prompts and benchmarks read through one table of formats; CSV has no other values than texts."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"prompt": "a, b", "answer": "c\nd"}, {"prompt": "e", "answer": "é"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.csv").write_text('prompt,answer\n"a, b","c\nd"\ne,é\n')
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    lines = {"rows.json": [None, None], "rows.jsonl": [1, 2], "rows.csv": [2, 4], "rows.parquet": [None, None]}
    for name, expected in lines.items():
        assert [row.line for row in read_file(tmp_path / name)] == expected
        assert [row.fields for row in read_rows(tmp_path / name)] == rows == read_table(tmp_path / name, ["answer"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", b"prompt,note\na,b\n", "row 1 (line 2): no answer in it (found: prompt, note)"),
        ("rows.csv", b"prompt,answer\na\n", "row 1 (line 2): answer is null (NoneType)"),
        ("rows.csv", b"prompt,answer\n", "no rows in it"),
        ("rows.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_bad_files_of_other_formats(tmp_path, name, content, message):
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    assert refused(re.escape(message), read_rows, tmp_path / name).startswith(str(tmp_path / name))


def test_what_a_spreadsheet_leaves_behind(tmp_path):
    """Rows of separators alone, as Excel exports them; its own files; line ends of an old Macintosh."""
    path = tmp_path / "rows.csv"
    path.write_text("\ufeffprompt;answer\r\nA;B\r\n;\r\n ; \r\n\"C\nc\";D\r\n;;\r\n", newline="")
    rows = read_rows(path)
    assert [(row.fields["prompt"], row.number, row.line) for row in rows] == [("A", 1, 2), ("C\nc", 2, 5)]
    for name in ("rows.xlsx", "rows.csv", "prompts.docx", "prompts.txt"):
        (tmp_path / name).write_bytes(b"PK\x03\x04\x14\x00\x06\x00" + bytes(range(256)))
        refused(f"{name}: a spreadsheet, a document or another ZIP file; save it as CSV", read_file, tmp_path / name)
    (tmp_path / "old.txt").write_bytes(b"One\rTwo\r\rThree\r")
    assert [row.fields["prompt"] for row in read_file(tmp_path / "old.txt")] == ["One", "Two", "Three"]
    (tmp_path / "prompts.md").write_text("One\nTwo\n")
    refused("line 1: .*; prompts, one a line, are read from a .txt", read_file, tmp_path / "prompts.md")


def test_a_table_has_the_fields_that_were_asked_for(tmp_path):
    path = tmp_path / "table.jsonl"
    for content, message in (
        ('{"prompt": "a"}\n{"id": 1}\n', "row 2 (line 2): no prompt in it (found: id)"),
        ('\n{"prompt": null}\n', "row 1 (line 2): no prompt in it"),
        ('{"prompt": ["a"]}\n', "row 1 (line 1): {'prompt': ['a']}; expected an object"),
        ('{"prompt": "a", "n": "\\ud800"}\n', "row 1 (line 1): half of a surrogate pair"),
        ("7\n", "row 1 (line 1): 7; expected an object"),
        ('{"prompt": "a"\n', "malformed JSON at line 1"),
    ):
        path.write_text(content)
        refused(re.escape(message), read_table, path, ["prompt"])


def test_a_table_joined_with_another_has_null_where_a_row_has_no_prompt(tmp_path):
    path = tmp_path / "table.jsonl"
    path.write_text('{"prompt": null, "question": "a"}\n{"prompt": "b", "question": "c"}\n')
    assert [row["question"] for row in read_table(path, ["question"])] == ["a", "c"]


# Encoding


def test_row_messages():
    row, old, bare, own = rows_of(
        ROW,
        {"prompt": "p", "answer": "a", "reasoning_language": "r"},
        {"prompt": "p", "answer": "a", "reasoning": None},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
    )
    expected = [
        {"role": "user", "content": "I feel low."},
        {"role": "assistant", "content": "<think>\nThe user is sad.\n</think>\nI am sorry."},
    ]
    assert row_messages(row) == expected
    assert row_messages(row, system="Be kind.") == [{"role": "system", "content": "Be kind."}, *expected]
    assert row_messages(old)[1]["content"] == "<think>\nr\n</think>\na"
    assert row_messages(bare)[1]["content"] == "<think>\n\n</think>\na"
    assert row_messages(own, system="Be kind.") == own.fields["messages"]


@pytest.mark.parametrize(("key", "tag"), [("reasoning", "</think>"), ("reasoning", "<think>"), ("answer", "</think>")])
def test_text_that_the_template_would_lose_is_refused(key, tag):
    (row,) = rows_of(ROW | {key: f"a{tag}b"})
    refused(f"rows.json row 1: {key} holds {tag}", row_messages, row)


def check_trained_text(tokenizer: Tokenizer, document: Document) -> None:
    """For the document of ROW."""
    text = tokenizer.decode(document.tokens[document.trained])
    assert text == "\nThe user is sad.\n</think>\n\nI am sorry.<|im_end|>\n"


def test_encode_rows(tokenizer):
    messages = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    dataset = encode_rows(rows_of(ROW, messages, {"prompt": "p", "answer": "a"}), tokenizer, max_tokens=4096)
    document = dataset.documents[0]
    ids, trained = tokenizer.encode_trained(row_messages(*rows_of(ROW)))
    assert document.tokens.tolist() == ids and document.trained.tolist() == trained
    assert (document.tokens.dtype, document.trained.dtype, document.source) == (np.int32, bool, "rows.json row 1")
    check_trained_text(tokenizer, document)
    assert (len(dataset), dataset.n_cut, dataset.n_without_reasoning) == (3, 0, 2)
    assert dataset.n_targets == sum(document.trained.sum() for document in dataset.documents)
    assert dataset.summary().endswith("trained), 0 cut at 4,096 tokens, 2 without reasoning")


def test_long_rows_are_cut_at_the_end_and_counted(tokenizer):
    rows = rows_of(ROW, ROW | {"answer": "word " * 50})
    whole = encode_rows(rows, tokenizer, max_tokens=4096)
    lengths = list(map(len, whole.documents))
    exact = encode_rows(rows, tokenizer, max_tokens=lengths[1])
    cut = encode_rows(rows, tokenizer, max_tokens=lengths[1] - 1)
    assert (whole.n_cut, exact.n_cut, cut.n_cut) == (0, 0, 1)
    assert cut.documents[1].tokens.tolist() == whole.documents[1].tokens.tolist()[:-1]
    assert list(map(len, cut.documents)) == [lengths[0], lengths[1] - 1]
    assert "1 cut at" in cut.summary()


def test_rows_with_nothing_to_train_are_refused(tokenizer):
    question = {"messages": [{"role": "user", "content": "u"}]}
    turns = [*question["messages"], {"role": "assistant", "content": "a"}, *question["messages"]]
    untrained = rows_of(ROW, question, {"messages": turns})
    refused("rows.json row 2, rows.json row 3: no trained token", encode_rows, untrained, tokenizer, max_tokens=4096)
    with pytest.raises(ValueError, match=r"rows.json row 10 and 2 more: .* within max_tokens 8"):
        encode_rows(rows_of(*[ROW] * 12), tokenizer, max_tokens=8)
    refused("max_tokens is 0", encode_rows, rows_of(ROW), tokenizer, max_tokens=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "No messages"),
        ({"messages": ["u"]}, "message 1 is 'u'"),
        ({"messages": [{"role": "judge", "content": "u"}]}, "Unexpected message role 'judge'"),
        ({"messages": [{"role": "user", "content": "u"}], "tools": ["now"]}, "tools is \\['now'\\], expected a list"),
        ({"prompt": "a\ud800", "answer": "a"}, "surrogate"),
    ],
)
def test_refused_conversations_name_their_row(tokenizer, fields, message):
    refused(f"rows.json row 2: .*{message}", encode_rows, rows_of(ROW, fields), tokenizer, max_tokens=4096)


def chat(*turns: dict, **fields) -> dict:
    return {"messages": list(turns), **fields}


Q = {"role": "user", "content": "q"}
A = {"role": "assistant", "content": "a"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "now", "arguments": "{}"}}]}
TOOL = {"role": "tool", "content": "noon"}


def test_null_messages_beside_prompt_and_answer_are_an_ordinary_row(tokenizer, tmp_path):
    """What joined data sets have: every row has every column."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([ROW | {"messages": None, "tools": None}]))
    rows = read_rows(path)
    assert row_messages(rows[0]) == row_messages(*rows_of(ROW))
    check_trained_text(tokenizer, encode_rows(rows, tokenizer, 4096).documents[0])
    path.write_text('[{"messages": null}]')
    refused("row 1: no prompt in it", read_rows, path)


def test_a_conversation_with_tools_is_trained_as_the_template_writes_it(tokenizer):
    tools = [{"type": "function", "function": {"name": "now"}}]
    row = chat(Q, CALL, TOOL, A, tools=tools)
    dataset = encode_rows(rows_of(row), tokenizer, 4096, system="Be kind.")
    messages = [{"role": "system", "content": "Be kind."}, *row["messages"]]
    assert dataset.documents[0].tokens.tolist() == tokenizer.encode_chat(messages, tools=tools)
    text = tokenizer.decode(dataset.documents[0].tokens[dataset.documents[0].trained])
    call = "<tool_call>\n<function=now>\n</function>\n</tool_call>"
    assert text == f"\n\n</think>\n\n{call}<|im_end|>\n\n\n</think>\n\na<|im_end|>\n"
    assert dataset.notes == ["2 of 2 assistant turns trained"]


def test_turns_that_are_not_trained_are_counted(tokenizer):
    off, empty = A | {"weight": 0}, A | {"content": " "}
    rows = rows_of(ROW, chat(Q, A, Q, A), chat(Q, off, A), chat(Q, A, empty), chat(Q, empty, Q, A))
    last, all_turns = (encode_rows(rows, tokenizer, 4096, train_turns=kind) for kind in ("last", "all"))
    empty_turns = "2 without text: rows.json row 4, rows.json row 5"
    off_turns = "1 switched off by weight, train or loss"
    earlier = "1 before the last user query; --train-turns all trains them"
    assert last.notes == [f"5 of 9 assistant turns trained ({earlier}, {off_turns}, {empty_turns})"]
    assert all_turns.notes == [f"6 of 9 assistant turns trained ({off_turns}, {empty_turns})"]
    assert last.summary().endswith(f"cut at 4,096 tokens, 4 without reasoning, {last.notes[0]}")
    assert all_turns.n_targets - last.n_targets == len(tokenizer.encode("a<|im_end|>\n"))
    assert encode_rows(rows[:1], tokenizer, 4096).notes == []


def test_turns_that_the_cut_removes_are_not_counted_as_trained(tokenizer):
    rows = rows_of(chat(Q, A, Q, A | {"content": "a " * 50}, Q, A))
    whole = encode_rows(rows, tokenizer, 4096, train_turns="all")
    begins = np.flatnonzero(np.diff(whole.documents[0].trained.astype(int)) == 1) + 1
    assert len(begins) == 3 and whole.notes == ["3 of 3 assistant turns trained"]
    for limit, note in (
        (begins[2] + 1, "3 of 3 assistant turns trained"),
        (begins[2], "2 of 3 assistant turns trained (1 cut off)"),
        (begins[1], "1 of 3 assistant turns trained (2 cut off)"),
    ):
        assert encode_rows(rows, tokenizer, limit, train_turns="all").notes[1:] == [note]


def test_a_row_whose_turns_are_all_switched_off_is_refused(tokenizer):
    rows = rows_of(ROW, chat(Q, A | {"train": False}), chat(Q, A, Q, A | {"content": None}))
    refused("row 2, rows.json row 3: no trained token .* not switched off", encode_rows, rows, tokenizer, 4096)
    assert encode_rows(rows[::2], tokenizer, 4096, train_turns="all").notes


def test_rows_with_typed_control_tokens_are_counted(tokenizer):
    rows = rows_of(ROW, ROW | {"prompt": "a<|im_end|>\n<|im_start|>system\nb"}, chat(Q, A | {"content": "<|im_end|>"}))
    dataset = encode_rows(rows, tokenizer, 4096)
    note = "2 with typed control tokens such as <|im_end|>, taken for text: rows.json row 2, rows.json row 3"
    assert dataset.notes == [note] and dataset.summary().endswith(note)
    (end,) = tokenizer.encode("<|im_end|>")
    assert [(document.tokens == end).sum() for document in dataset.documents] == [2, 2, 2]


# Split and order


def test_split():
    rows = rows_of(*[{"prompt": str(i), "answer": "a"} for i in range(50)])
    train, validation = split_rows(rows, seed=3407, fraction=0.1)
    assert (len(train), len(validation)) == (45, 5)
    assert sorted(train + validation, key=lambda row: row.number) == rows
    assert train == sorted(train, key=lambda row: row.number)
    assert split_rows(rows, seed=3407, fraction=0.1) == (train, validation) != split_rows(rows, seed=3408, fraction=0.1)
    assert [len(part) for part in split_rows(rows[:2], seed=0, fraction=0.1)] == [1, 1]
    refused(r"row 1.*: 1 row cannot be split .* or --val-fraction 0$", split_rows, rows[:1], seed=0, fraction=0.1)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**40), st.integers(0, 3))
@settings(max_examples=60)
def test_an_epoch_visits_every_document_once(n, batch_size, seed, epoch):
    steps = data.steps_per_epoch(n, batch_size)
    batches = [step_documents(n, epoch * steps + i, batch_size, seed) for i in range(steps)]
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (steps - 1)
    assert sorted(i for batch in batches for i in batch) == list(range(n))


def test_order_is_written_in_stone():
    """Recorded once: a run resumed under another NumPy or Python must see the same documents."""
    assert [step_documents(10, step, 4, 3407) for step in range(4)] == [
        [9, 7, 2, 5],
        [0, 1, 6, 8],
        [3, 4],
        [6, 3, 9, 7],
    ]
    epochs = {tuple(i for s in range(3) for i in step_documents(10, 3 * epoch + s, 4, 3407)) for epoch in range(20)}
    assert len(epochs) == 20


def test_every_order_is_as_likely():
    counts = Counter(tuple(step_documents(3, epoch, 3, seed=1)) for epoch in range(6000))
    assert len(counts) == 6 and all(850 < count < 1150 for count in counts.values())  # 1000 expected, sigma 29


# Packing


@st.composite
def document_lists(draw):
    masks = draw(st.lists(st.lists(st.booleans(), min_size=1, max_size=12), max_size=8))
    ids = iter(range(10_000))
    return [Document(np.array([next(ids) for _ in m], np.int32), np.array(m), str(i)) for i, m in enumerate(masks)]


def check_packing(documents: list[Document], micro_batch_tokens: int) -> None:
    batches = pack(documents, micro_batch_tokens)
    split = [part.tolist() for b in batches for part in torch.tensor_split(b.tokens, b.cu_seqlens[1:-1].long())]
    assert split == [document.tokens.tolist() for document in documents]
    for before, batch in zip([None, *batches], batches, strict=False):
        n_documents = len(batch.cu_seqlens) - 1
        assert len(batch.tokens) <= micro_batch_tokens or n_documents == 1
        assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == len(batch.tokens)
        assert before is None or len(before.tokens) + batch.cu_seqlens[1] > micro_batch_tokens, "room was left"
        dtypes = [t.dtype for t in (batch.tokens, batch.cu_seqlens, batch.rows, batch.labels)]
        assert dtypes == [torch.int64, torch.int32, torch.int64, torch.int64]
    # Token by token: (the token that predicts, the token that is predicted), ids being unique.
    pairs = [p for b in batches for p in zip(b.tokens[b.rows].tolist(), b.labels.tolist(), strict=True)]
    assert pairs == [
        (int(document.tokens[t - 1]), int(document.tokens[t]))
        for document in documents
        for t in range(1, len(document))
        if document.trained[t]
    ]
    assert len(pairs) == sum(document.n_targets for document in documents)


@given(document_lists(), st.integers(1, 30))
@settings(max_examples=150)
def test_packing(documents, micro_batch_tokens):
    check_packing(documents, micro_batch_tokens)


def masked(*masks: str) -> list[Document]:
    ids = iter(range(100))
    return [Document(np.array([next(ids) for _ in m], np.int32), np.array([c == "1" for c in m]), m) for m in masks]


def test_packing_does_not_change_the_documents():
    documents = masked("111", "011")
    pack(documents, 100)
    assert [document.trained.tolist() for document in documents] == [[True] * 3, [False, True, True]]


@pytest.mark.parametrize("mutant", ["rows not shifted", "labels shifted", "targets across documents", "greedy by one"])
def test_packing_mutants_are_noticed(monkeypatch, mutant):
    def broken(documents, micro_batch_tokens):
        if mutant == "greedy by one":
            return original(documents, micro_batch_tokens + 1)
        batches = []
        for b in original(documents, micro_batch_tokens):
            rows, labels = b.rows, b.labels
            if mutant == "rows not shifted":
                rows = rows + 1
            elif mutant == "labels shifted":
                labels = b.tokens[(rows + 2).clamp(max=len(b.tokens) - 1)]
            else:
                flags = np.concatenate([document.trained for document in documents])
                labels = b.tokens[1:][torch.from_numpy(flags[1:])]
                rows = torch.from_numpy(np.flatnonzero(flags[1:]))
            batches.append(data.MicroBatch(b.tokens, b.cu_seqlens, rows, labels))
        return batches

    original = pack
    documents, size = (masked("0011", "1011"), 100) if mutant != "greedy by one" else (masked("0011", "10110"), 8)
    check_packing(documents, size)
    monkeypatch.setitem(globals(), "pack", broken)
    with pytest.raises(AssertionError):
        check_packing(documents, size)


def test_a_shifted_mask_is_noticed(tokenizer, monkeypatch):
    encode = Tokenizer.encode_trained
    monkeypatch.setattr(Tokenizer, "encode_trained", lambda *a: (encode(*a)[0], [False, *encode(*a)[1][:-1]]))
    document = encode_rows(rows_of(ROW), tokenizer, 4096).documents[0]
    with pytest.raises(AssertionError):
        check_trained_text(tokenizer, document)


# python -m psysafe.data


def show(capsys, *args) -> tuple[int, str, str]:
    return main_guard(show_command.main, list(map(str, args))), *capsys.readouterr()


@pytest.fixture
def rows_file(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [ROW, ROW | {"prompt": "日本 \x1b[2J", "reasoning": ""}])))
    return path


def test_show(capsys, rows_file, monkeypatch, tokenizer):
    monkeypatch.setattr(show_command, "load_tokenizer", lambda source: tokenizer)
    code, out, _ = show(capsys, "--show", rows_file)
    trained = "\nThe user is sad.\n</think>\n\nI am sorry.<|im_end|>\n"
    assert code == 0 and f"<|im_start|>assistant\n<think>[[{trained}]]" in out
    assert out.startswith(f"{rows_file} row 1 (line 1) of 2\n") and "28 tokens; 15 trained" in out
    _, out, _ = show(capsys, "--show", rows_file, "--row", 2, "--color", "always")
    assert "日本 \\x1b[2J<|im_end|>" in out and "<think>\x1b[32m\n\n</think>" in out and out.count("\x1b") == 2
    _, out, _ = show(capsys, "--show", rows_file, "--max-tokens", 15)
    assert "[[\nThe]]" in out and "15 tokens, cut from 28; 2 trained" in out
    _, out, _ = show(capsys, "--show", rows_file, "--system", "v0")
    assert "\n<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\nI feel low." in out
    for no_color, colored in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        assert ("\x1b[32m" in show(capsys, "--show", rows_file)[1]) == colored
    for args, message in ((["--row", 3], "--row 3, expected 1 to 2"), (["--max-tokens", 0], "max_tokens is 0")):
        assert message in refused_by(show_command.main, ["--show", rows_file, *args], capsys)


def test_show_checks_the_row_that_it_shows(capsys, tmp_path):
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "First."}]
    path.write_text("\n".join(map(json.dumps, [{"prompt": 3}, {"messages": [*turns, turns[0]]}])))
    assert "prompt is 3 (int)" in refused_by(show_command.main, ["--show", path, "--row", 1], capsys)
    code, out, _ = show(capsys, "--show", path, "--row", 2, "--train-turns", "all")
    assert code == 0 and "[[First.<|im_end|>\n]]" in out
    assert "; 0 trained" in show(capsys, "--show", path, "--row", 2)[1]


def test_command_line_errors(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"prompt": "a"}]')
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "psysafe.data", "--show", path]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"})
    assert done.returncode == 2
    assert error_line(done.stdout, done.stderr).startswith(f"error: {path} row 1: no answer in it")
