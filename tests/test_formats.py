"""Rows as people have them: every shape of a row, every type of file, and data sets of the hub."""

import gzip
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from psysafe.corpus.__main__ import main as corpus
from psysafe.corpus.texts import prompts_of
from psysafe.data import rows as rows_module
from psysafe.data.documents import encode_rows
from psysafe.data.formats import FORMATS, standard, user_texts
from psysafe.data.rows import pinned, prompt_messages, read_file, read_prompts, read_rows, row_messages
from psysafe.data.tokenizer import load_tokenizer
from psysafe.evaluation.overlap import training_prompts
from psysafe.files import ASSETS
from psysafe.hub import is_repository
from psysafe.program import UserError, main_guard
from psysafe.training.config import TrainConfig, resolve
from psysafe.training.setup import load_data, with_pinned_data
from tests.mistakes import refused

ROOT = Path(__file__).resolve().parents[1]
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
PAIR, TALK = {"prompt": "q", "answer": "a"}, {"messages": [USER, ANSWER]}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
DIALOGUE = "\n\nHuman: q\n\nAssistant: a\n\nHuman: more\n\nAssistant: no"

SHAPES = {  # name -> (a row of that shape, the same under our names)
    "ours": (PAIR | {"reasoning": None, "author": "x"}, PAIR | {"reasoning": None, "author": "x"}),
    "messages": (TALK | {"prompt": "q"}, TALK | {"prompt": "q"}),
    "messages null beside prompt and answer": (PAIR | {"messages": None}, PAIR),
    "messages empty beside prompt and answer": (PAIR | {"messages": []}, PAIR),
    "messages of a CSV's empty cell": (PAIR | {"messages": "", "system": ""}, PAIR | {"system": ""}),
    "a row of every column": (
        {"messages": None, "prompt": None, "answer": "", "instruction": "q", "input": None, "output": "a", "id": 3},
        PAIR | {"id": 3},
    ),
    "ShareGPT": ({"conversations": [HUMAN, GPT], "id": "x"}, TALK | {"id": "x"}),
    "ShareGPT with a system and null messages": (
        {"system": "s", "conversations": [HUMAN, GPT], "messages": None},
        {"messages": [SYSTEM, USER, ANSWER]},
    ),
    "ShareGPT with a system turn": (
        {"system": "other", "conversation": [{"from": "system", "value": "s"}, HUMAN, GPT | {"weight": 0}]},
        {"messages": [SYSTEM, USER, ANSWER | {"weight": 0}]},
    ),
    "ShareGPT with roles": ({"conversations": [USER, ANSWER | {"train": False}]},
                            {"messages": [USER, ANSWER | {"train": False}]}),
    "ShareGPT with a system prompt": ({"system_prompt": "s", "conversations": [HUMAN, GPT]},
                                      {"messages": [SYSTEM, USER, ANSWER]}),
    "messages with a system": (TALK | {"system": "s"}, {"messages": [SYSTEM, USER, ANSWER]}),
    "messages with two systems": ({"messages": [SYSTEM, USER, ANSWER], "system": "other"},
                                  {"messages": [SYSTEM, USER, ANSWER]}),
    "ShareGPT of texts": ({"conversations": ["q", "a"]}, TALK),
    "Alpaca": ({"instruction": "q", "input": "", "output": "a", "text": "t"}, PAIR | {"text": "t"}),
    "Alpaca with input": ({"instruction": "q", "input": "i", "output": "a"}, {"prompt": "q\ni", "answer": "a"}),
    "Alpaca with a system": ({"instruction": "q", "output": "a", "system": "s"}, PAIR | {"system": "s"}),
    "Alpaca with a system prompt": ({"instruction": "q", "output": "a", "system_prompt": "s"}, PAIR | {"system": "s"}),
    "Dolly": ({"instruction": "q", "context": "i", "response": "a", "category": "c"},
              {"prompt": "q\ni", "answer": "a", "category": "c"}),
    "a system prompt": (PAIR | {"system_prompt": "s"}, PAIR | {"system": "s"}),
    "no earlier turns": (PAIR | {"history": [], "images": None}, PAIR | {"images": None}),
    "a think block before the answer": (
        {"prompt": "q", "completion": "<think>\nr\n</think>\n\na"}, PAIR | {"reasoning": "r"}),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, PAIR),
    "prompt and response": ({"prompt": "q", "response": "a", "answer": None}, PAIR),
    "prompt and completion of messages": ({"prompt": [SYSTEM, USER], "completion": [ANSWER], "messages": None},
                                          {"messages": [SYSTEM, USER, ANSWER]}),
    "prompt and completion of messages with a system": ({"prompt": [USER], "completion": [ANSWER], "system": "s"},
                                                        {"messages": [SYSTEM, USER, ANSWER]}),
    "question": ({"question": "q", "answer": "a"}, PAIR),
    "OpenOrca": ({"system_prompt": "s", "question": "q", "response": "a"}, PAIR | {"system": "s"}),
    "turns": ({"question_id": 1, "turns": ["q"], "category": "2"}, {"prompt": "q", "question_id": 1, "category": "2"}),
    "turns and an answer": ({"turns": ["q", "more"], "answer": "a"}, PAIR),
    "hh-rlhf": ({"chosen": DIALOGUE, "rejected": "r"}, PAIR | {"rejected": "r"}),
    "hh-rlhf, red team": ({"transcript": DIALOGUE.lstrip(), "rating": 4.0}, PAIR | {"rating": 4.0}),
    "no shape": ({"text": "t"}, {"text": "t"}),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_becomes_ours(shape, tmp_path):
    row, expected = SHAPES[shape]
    untouched = json.dumps(row)
    assert standard(row).fields == expected
    assert json.dumps(row) == untouched
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    if shape == "no shape":
        refused("row 1 .line 1.: no prompt in it .found: text.; expected .*docs/recipe.md", read_rows, path)
        return
    (prompt,) = read_prompts(path)
    assert prompt.fields == expected
    asked = [SYSTEM, USER] if "s" in (row.get("system"), row.get("system_prompt")) or SYSTEM in (
        expected.get("messages") or []) else [USER]  # fmt: skip
    question = asked[-1]["content"] if "input" not in shape and shape != "Dolly" else "q\ni"
    assert [message["content"] for message in prompt_messages(prompt)] == [*("s" for _ in asked[1:]), question]
    assert user_texts(row) == training_prompts([path]) == [question]
    if shape != "turns":
        (trained,) = read_rows(path)
        roles = [(m["role"], m["content"].rpartition("</think>")[2].strip()) for m in row_messages(trained)]
        assert roles == [*(("system", "s") for _ in asked[1:]), ("user", question), ("assistant", "a")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": None}, "no prompt in it (found: messages)"),
        ({"prompt": "q", "response": 7}, "response is 7 (int), expected a text that is not empty"),
        ({"prompt": "q", "completion": " "}, 'completion is " " (str), expected a text'),
        ({"question": "q", "choices": ["a"], "answer": 2}, "answer is 2 (int)"),
        ({"question": "q"}, "no answer in it (found: question)"),
        ({"turns": [3], "answer": "a"}, "turns is 3 (int)"),
        ({"instruction": ["q"], "output": "a"}, "instruction is ['q'], expected a text"),
        ({"instruction": "q", "input": 3, "output": "a"}, "input is 3, expected a text"),
        ({"instruction": "q", "output": "a", "history": [["x", "y"]]}, "history: earlier turns"),
        ({"instruction": "q"}, "no answer in it (found: instruction)"),
        ({"prompt": "q", "answer": "a", "system": ["s"]}, 'system is ["s"] (list), expected a text'),
        ({"system_prompt": 3, "question": "q", "response": "a"}, "system_prompt is 3 (int), expected a text"),
        ({"conversations": "q"}, 'conversations is "q" (str), expected a list of messages'),
        ({"conversations": [HUMAN, {"from": "gpt"}]}, "turn 2 of conversations is {'from': 'gpt'}, expected an object"),
        ({"conversations": [HUMAN, 3]}, "turn 2 of conversations is 3, expected an object with from and value"),
        ({"prompt": [USER], "completion": "a"}, "completion is 'a', expected a list of messages"),
        ({"chosen": "Hello.", "rejected": "Hi."}, "no prompt in it (found: chosen, rejected)"),
        ({"chosen": "\n\nHuman: q", "rejected": ""}, "no answer in it (found: chosen, rejected)"),
        ({"chosen": "\n\nHuman: q\n\nAssistant:", "rejected": ""}, 'answer is "" (str)'),
        ([1], "[1] (list), expected an object"),
        ({"instruction": "q", "context": ["c"], "response": "a"}, "context is ['c'], expected a text"),
        (PAIR | {"history": [["x", "y"]]}, "history: earlier turns beside prompt are not read"),
        (TALK | {"images": ["a.png"]}, "images is ['a.png']; only text is read here"),
        ({"image": {"bytes": "x"}, "conversations": [HUMAN, GPT]}, "image is {'bytes': 'x'}; only text"),
    ],
)
def test_a_broken_row_is_named_in_its_own_words(row, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(PAIR) + "\n" + json.dumps(row))
    assert refused(re.escape(message), read_rows, path).startswith(f"{path} row 2 (line 2): ")


def trained_text(row: dict, tokenizer) -> str:
    ids, trained = tokenizer.encode_trained(row["messages"])
    return tokenizer.decode([i for i, is_trained in zip(ids, trained, strict=True) if is_trained])


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_counts_whatever_a_message_calls_it(name, tokenizer):
    """Under a name that is not read the model would learn an empty think block."""
    others = dict.fromkeys(["reasoning_content", "reasoning", "thinking"])
    message = ANSWER | others | {name: "r"}
    assert trained_text({"messages": [USER, message]}, tokenizer) == "\nr\n</think>\n\na<|im_end|>\n"
    message = {"role": "assistant", "content": "<think>r</think>a", name: None}
    assert trained_text({"messages": [USER, message]}, tokenizer) == "\nr\n</think>\n\na<|im_end|>\n"
    refused(f"message 2: {name} is 3, expected a text", tokenizer.encode_chat, [USER, ANSWER | {name: 3}])


def test_a_call_in_the_older_form_is_refused_and_not_left_out(tokenizer):
    old = ANSWER | {"function_call": {"name": "f", "arguments": "{}"}}
    refused("message 2: function_call is .*expected calls under tool_calls", tokenizer.encode_chat, [USER, old])
    assert tokenizer.encode_chat([USER, ANSWER | {"function_call": None}]) == tokenizer.encode_chat([USER, ANSWER])


def test_conversations_without_reasoning_are_counted(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(TALK, {"messages": [USER, ANSWER | {"reasoning": "r"}]}, PAIR, PAIR | {"reasoning": "r"}))
    assert encode_rows(read_rows(path), tokenizer, 4096).n_without_reasoning == 2


# Types of files

TABLE = [{"prompt": "a, b\t c", "answer": 'd "e"\nf'}, {"prompt": "g", "answer": "\u00e9"}]


def written(name: str) -> bytes:
    kind = Path(name.removesuffix(".gz")).suffix
    if kind == ".parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.Table.from_pylist(TABLE), sink)
        content = sink.getvalue().to_pybytes()
    else:
        content = {
            ".csv": 'prompt,answer\n"a, b\t c","d ""e""\nf"\ng,\u00e9\n',
            ".tsv": 'prompt\tanswer\n"a, b\t c"\t"d ""e""\nf"\ng\t\u00e9\n',
            ".json": json.dumps(TABLE),
            ".jsonl": "".join(json.dumps(row) + "\n" for row in TABLE),
            ".txt": json.dumps(TABLE),
        }[kind].encode()
    return gzip.compress(content) if name.endswith(".gz") else content


@pytest.mark.parametrize("compressed", ["", ".gz"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "txt"])
def test_every_type_of_file_gives_the_same_rows(kind, compressed, tmp_path):
    path = tmp_path / f"my.rows.{kind}{compressed}"
    path.write_bytes(written(path.name))
    assert [row.fields for row in read_rows(path)] == TABLE
    lines = {"csv": [2, 4], "tsv": [2, 4], "jsonl": [1, 2]}.get(kind, [None, None])
    assert [row.line for row in read_file(path)] == lines
    renamed = tmp_path / f"other.{kind}"  # gzip is known by its first bytes, whatever the name
    renamed.write_bytes(path.read_bytes())
    assert [row.fields for row in read_rows(renamed)] == TABLE


BAD_FILES = {
    "comma without quotation marks": ("r.csv", b"prompt,answer\nq,a\nHi,Hello, friend\n", "more cells at line 3 than"),
    "quotation mark never closed": ("r.csv", b'prompt,answer\n"Hi,Hello\nX,Y\n', "malformed CSV at line 2"),
    "text behind a quotation mark": ("r.csv", b'prompt,answer\n"Hi" there,Hello\n', "malformed CSV at line 2"),
    "more cells in a row of several lines": ("r.csv", b'prompt,answer\n"a\nb",c,d\n', "more cells at line 2"),
    "tabs in a CSV": ("r.csv", b"prompt\tanswer\nq\ta\n", "'\\t' between the names in line 1, expected ','"),
    "semicolons in a TSV": ("r.tsv", b"prompt;answer\nq;a\n", "';' between the names in line 1, expected '\\t'"),
    "semicolons without quotation marks": ("r.csv", b"prompt;answer\nq;a;b\n", "more cells at line 2"),
    "a name for two columns": ("r.csv", b"prompt,answer,prompt\nq,a,r\n", "'prompt' names more than one column"),
    "a text without prompts": ("r.txt", b"\n \n", "no prompts in it; expected one a line, as in every .txt"),
    "a text as training rows": ("r.txt", b"\nHelp me.\n", "row 1 (line 2): no answer in it (found: prompt)"),
    "damaged JSON in a text": ("r.txt", b'{"prompt": "q"\n', "malformed JSON at line 1"),
    "commas in a TSV": ("r.tsv", b"prompt,answer\nq,a\n", "',' between the names in line 1, expected '\\t'"),
    "a JSON text never closed": ("r.json", b'[{"prompt": "q', "string starting at column 13;"),
    "tab without quotation marks": ("r.tsv", b"prompt\tanswer\na\tb\tc\n", "more cells at line 2"),
    "gzip cut off": ("r.jsonl.gz", gzip.compress(b'{"prompt": "q", "answer": "a"}')[:-9], "damaged gzip"),
    "gzip with a wrong byte": ("r.csv.gz", gzip.compress(b"prompt,answer\nq,a")[:-6] + b"xxxxxx", "damaged gzip"),
    "gzip of another encoding": ("r.csv.gz", gzip.compress(b"prompt,answer\nq,\xe9"), "not UTF-8 at line 2"),
    "no Parquet": ("r.parquet", b"PAR1", "cannot be read"),
    "nothing in it": ("r.tsv", b"prompt\tanswer\n", "no rows in it"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_damaged_table_is_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert refused(re.escape(message), read_rows, tmp_path / name).startswith(str(tmp_path / name))


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_first_line_says_whether_a_csv_has_semicolons(mark, tmp_path):
    """As Excel writes it in Germany; a comma in the first line decides for commas, as before."""
    path = tmp_path / "r.csv"
    path.write_text(f'{mark}"prompt";answer\r\nq;Hello, friend\r\n"a;b";"c\n\nd"\r\n', encoding="utf-8", newline="")
    assert [row.fields for row in read_rows(path)] == [
        {"prompt": "q", "answer": "Hello, friend"}, {"prompt": "a;b", "answer": "c\n\nd"}
    ]  # fmt: skip
    path.write_text("\n\nprompt;answer\nq;a, b\n")
    assert [row.fields for row in read_rows(path)] == [{"prompt": "q", "answer": "a, b"}]
    path.write_text("prompt,a;b,answer\nq,x;y,z;\n")
    assert [row.fields for row in read_rows(path)] == [{"prompt": "q", "a;b": "x;y", "answer": "z;"}]


def test_a_text_holds_a_prompt_a_line_wherever_prompts_are_read(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff\n [so] I began \r\n\n{and} ended\u2028here\n", encoding="utf-8", newline="")
    rows = read_prompts(path)
    assert [(row.fields, row.number, row.line) for row in rows] == [
        ({"prompt": "[so] I began"}, 1, 2), ({"prompt": "{and} ended\u2028here"}, 2, 4)
    ]  # fmt: skip
    assert prompts_of(path) == ["[so] I began", "{and} ended\u2028here"]
    path.write_text('{"prompt": "q"}\n')  # rows of any name, as before
    assert read_prompts(path)[0].fields == {"prompt": "q"}


def test_no_hub_is_asked_for_a_text_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "runs/prompts.txt: cannot be read" in refused("cannot be read", read_prompts, "runs/prompts.txt")


def test_empty_cells_behind_the_last_column_and_long_cells_are_read(tmp_path):
    """Spreadsheets write the first; the csv module refuses more than 131,072 characters by itself."""
    long = "word " * 40_000
    (tmp_path / "r.csv").write_text(f"prompt,answer\nq,a,,\nq,{long}\n")
    assert [row.fields["answer"] for row in read_rows(tmp_path / "r.csv")] == ["a", long]


def test_the_line_of_a_row_is_the_one_that_it_begins_in(tmp_path):
    (tmp_path / "r.csv").write_text('prompt,answer\n\n"a\nb","c\n\nd"\n\n"",""\ne,f\ng\n')
    rows = read_file(tmp_path / "r.csv")
    assert [row.line for row in rows] == [3, 9, 10]  # a row of empty cells is none
    assert [row.fields for row in rows][1:] == [{"prompt": "e", "answer": "f"}, {"prompt": "g", "answer": None}]


def test_arguments_of_other_tools_are_none_of_a_call(tmp_path, tokenizer):
    """A Parquet column gives every object in it the keys of all: null where a call has no such argument."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    calls = [{"function": {"name": "f", "arguments": {"a": 1}}}, {"function": {"name": "g", "arguments": {"b": "x"}}}]
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": calls}]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages, "note": None}]), tmp_path / "rows.parquet")
    (row,) = read_rows(tmp_path / "rows.parquet")
    assert "note" in row.fields and "None" not in tokenizer.render(row.messages)
    assert tokenizer.render(row.messages) == tokenizer.render(messages)


def test_without_pyarrow_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "r.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused("Parquet needs pyarrow .pip install pyarrow.", read_rows, tmp_path / "r.parquet")


# Data sets of the hub

COMMIT = "a1" * 20


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """holds: repository -> {file: content}; asked: every request."""
    state = SimpleNamespace(holds={}, asked=[])

    def dataset_info(self, repository, revision=None):
        state.asked.append((repository, revision))
        if repository not in state.holds:
            raise ConnectionError("no connection")
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=f) for f in state.holds[repository]])

    def download(repository, file, repo_type, revision):
        state.asked.append((repository, file, repo_type, revision))
        if repository not in state.holds:
            raise ConnectionError("no connection")
        path = tmp_path / "hub" / repository / "snapshots" / COMMIT / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(state.holds[repository][file])
        return str(path)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return state


def lines(*rows: dict) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_a_data_set_of_the_hub_is_read_at_one_commit(hub):
    parts = {f"data/train-0000{i}-of-00002.jsonl": lines(PAIR | {"n": 2 * i}, PAIR | {"n": 2 * i + 1}) for i in (0, 1)}
    hub.holds["an/set"] = {"README.md": b"", ".gitattributes": b"", "data/test.jsonl": lines({})} | parts
    rows = read_rows("an/set")
    assert [row.fields["n"] for row in rows] == [0, 1, 2, 3]
    # A row's number is its place in the data set: files of prompts are answered by number. Of which of the files a line
    # would be nobody could tell.
    assert [row.where for row in rows] == [f"an/set@{COMMIT} row {i + 1}" for i in range(4)]
    assert [request[-1] for request in hub.asked] == [None, COMMIT, COMMIT]
    hub.asked.clear()
    assert [row.where for row in read_rows(pinned("an/set@main"))] == [row.where for row in rows]
    assert hub.asked[0] == ("an/set", "main") and ("an/set", COMMIT) in hub.asked


def test_the_parts_that_the_hub_makes_of_a_parquet_file_are_one_data_set(hub):
    hub.holds["an/set"] = {f"default/train/000{i}.parquet": written("x.parquet") for i in (0, 1)}
    first = read_file("hf://datasets/an/set/default/train/0000.parquet")
    assert len(read_file("an/set@refs/convert/parquet")) == 2 * len(first)


def test_a_file_of_a_data_set_can_be_named(hub):
    hub.holds["an/set"] = {"red/team.jsonl.gz": gzip.compress(lines({"chosen": DIALOGUE})), "x.csv": b"prompt\nq\n"}
    name = "hf://datasets/an/set/red/team.jsonl.gz"
    for path in (name, Path(name), f"hf://datasets/an/set@{COMMIT}/red/team.jsonl.gz"):
        assert [row.fields for row in read_rows(path)] == [PAIR]
    assert pinned(name) == f"hf://datasets/an/set@{COMMIT}/red/team.jsonl.gz"
    assert {request[-1] for request in hub.asked} == {None, COMMIT}
    hub.holds["an/set"]["default/train/0000.parquet"] = written("x.parquet")
    read_file("hf://datasets/an/set@refs/convert/parquet/default/train/0000.parquet")
    assert hub.asked[-1][-1] == "refs/convert/parquet"


def test_a_data_set_of_many_files_asks_which(hub):
    hub.holds["an/set"] = {"help/train.jsonl.gz": b"", "harm/train.jsonl.gz": b""}
    message = "an/set: which file. name one as hf://datasets/an/set/FILE .there are: harm/train.jsonl.gz, help/train"
    refused(message, read_rows, "an/set")
    for files in (("mmlu_2023/train.jsonl", "mmlu_2024/train.jsonl"), ("llama-7b.jsonl", "llama-70b.jsonl")):
        hub.holds["an/set"] = dict.fromkeys(files, lines(PAIR))
        refused("an/set: which file", read_rows, "an/set")  # their numbers are no numbers of parts
    hub.holds["an/set"] = {"README.md": b"", "code.py": b""}
    refused("which file.*README.md, code.py", read_rows, "an/set")


def test_without_the_hub_one_line_says_so(hub, tmp_path, monkeypatch):
    refused("an/set: no such file here, and the hub did not list .*no connection.*; give a file", read_rows, "an/set")
    refused("an/set: the hub did not give a.json .no connection.*", read_rows, "hf://datasets/an/set/a.json")
    hub.asked.clear()
    # A file that is there or has the ending of one is never asked for.
    monkeypatch.chdir(tmp_path)
    refused("^data/train.jsonl: cannot be read", read_rows, "data/train.jsonl")
    refused("^data/train.csv.gz: cannot be read", read_rows, "data/train.csv.gz")
    refused("^data/x/y: cannot be read", read_rows, "data/x/y")
    Path("data").mkdir()
    Path("data/rows").write_bytes(lines(PAIR))
    assert read_rows("data/rows")[0].fields == PAIR and pinned("data/rows") == "data/rows"
    assert pinned("assets:rows/val.jsonl") == "assets:rows/val.jsonl" and not hub.asked


def test_a_run_records_the_commit_of_its_data_sets(hub):
    hub.holds["an/set"] = {"train.jsonl": lines(PAIR)}
    config = with_pinned_data(TrainConfig(data=["an/set", "assets:rows/train.jsonl"], val_data=["an/set"]))
    assert config.data == [f"an/set@{COMMIT}", "assets:rows/train.jsonl"] and config.val_data == [f"an/set@{COMMIT}"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/name", True),
        ("Qwen/Qwen3.5-27B", True),
        ("here/folder", False),  # it lies here
        ("org/name/file", False),
        ("name", False),
        ("./name", False),
        ("../name", False),
        ("~/name", False),
        ("/name", False),
        ("assets:org/name", False),
        ("random:org/name", False),
        ("org/name\n", False),
    ],
)
def test_what_can_be_a_repository_of_the_hub(name, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here/folder").mkdir(parents=True)
    assert is_repository(name) == expected


# What the documentation promises


def test_the_documentation_has_every_shape_and_its_examples_are_read(tmp_path):
    text = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| ([^|]+) \| `(\{.*\})` \|$", text, re.MULTILINE)
    assert {name for name, _ in table} == set(FORMATS)
    for name, example in table:
        fields = json.loads(example)
        first = next(shape for shape, reader in FORMATS.items() if reader(fields) is not None)
        assert first == name
        (tmp_path / "rows.jsonl").write_text(example)
        assert read_prompts(tmp_path / "rows.jsonl")
        if name != "turns":
            assert read_rows(tmp_path / "rows.jsonl")
    for kind in rows_module.FILE_TYPES:
        assert f"`{kind}`" in text


# validate and training


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("assets:tiny")


LONG = {"prompt": "word " * 3000, "answer": "a"}  # nothing of the answer is left of it
FILES = {
    **{f"shape: {name}": lines(row, PAIR) for name, (row, _) in SHAPES.items()},
    "no cluster, no category": lines(PAIR, PAIR),
    "the same prompt twice": lines(PAIR, PAIR),
    "strategy of another cluster": lines(PAIR | {"risk cluster": "violence", "framework_name": "SOBER"}, PAIR),
    "unknown cluster": lines(PAIR | {"risk cluster": "piracy"}, PAIR),
    "reasoning of another type": lines(PAIR, PAIR | {"reasoning": 3}),
    "reasoning with a tag": lines(PAIR, PAIR | {"reasoning": "a</think>b"}),
    "answer with a tag": lines(PAIR, PAIR | {"answer": "a</think>b"}),
    "answer blank": lines(PAIR, PAIR | {"answer": " "}),
    "half a surrogate pair": lines(PAIR) + b'{"prompt": "\\ud800", "answer": "a"}\n',
    "nothing to train": lines(PAIR, {"messages": [USER]}),
    "the answer beyond the limit": lines(PAIR, LONG),
    "system not first": lines(PAIR, {"messages": [USER, SYSTEM, ANSWER]}),
    "unknown role": lines(PAIR, {"conversations": [HUMAN, {"from": "oracle", "value": "a"}]}),
    "no object": lines(PAIR) + b"3\n",
}


@pytest.mark.parametrize("name", FILES)
def test_validate_and_training_agree(name, tmp_path, capsys):
    """One reader, one set of rules: what one takes, the other takes; and both refuse in the same words."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(FILES[name])
    code = main_guard(corpus, ["validate", str(path)])
    printed = capsys.readouterr().out
    try:
        load_data(resolve(["--data", str(path), "--val-fraction", "0"])[0], ASSETS / "tiny")
        assert code == 0 and "\nno problems in 2 rows\n" in printed, printed
    except UserError as error:
        assert code == 1 and str(error) in printed.split("\n"), printed


def test_the_published_rows_have_no_problems(tmp_path, capsys, tokenizer):
    """Their framework_name is the benchmark that a prompt comes from, their reasoning is null, and prompts repeat."""
    published = {"risk cluster": "suicide and selfharm", "risk category": "self-harm", "author": "x", "reasoning": None}
    rows = [PAIR | published | {"framework_name": name} for name in ("ALERT", "SORRY-Bench") for _ in range(10)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    assert corpus(["validate", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "\nno problems in 20 rows\n" in printed and len(printed.splitlines()) < 20
    assert "  20 rows: framework_name is no known strategy: impute gives no hint\n" in printed
    assert "  19 rows: the same prompt as an earlier row\n" in printed and "    and 14 more\n" in printed
    assert encode_rows(read_rows(path), tokenizer, 4096).n_without_reasoning == 20
