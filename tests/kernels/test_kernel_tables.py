"""The tables in docs/ say what the kernel files say (bytes exactly, compiled kernels by name, warps and stages) and
what the committed soak showed.
"""

import json

import pytest

import kernels
from kernels.proof.registry import OPERATIONS
from tools import kernel_tables
from tools.kernel_tables import DOCS, SOAK, between, block_table, odd_sizes_table, traffic_table


def written(page: str, name: str) -> str:
    text = (DOCS / page).read_text()
    begin, end = f"<!-- {name}: written by tools/kernel_tables.py -->", f"<!-- end of {name} -->"
    return text[text.index(begin) + len(begin) : text.index(end)].strip()


@pytest.mark.parametrize(("name", "table"), [("bytes of a block", block_table), ("bytes of an adapter", traffic_table)])
def test_bytes_are_those_of_work(name, table):
    assert written("rank1-lora-for-free.md", name) == table(), "run: python tools/kernel_tables.py --bytes"


def test_errors_are_those_of_the_soak():
    table = written("kernels.md", "errors at odd sizes")
    assert table == odd_sizes_table(), "run: python tools/kernel_tables.py --bytes"
    rows = json.loads(SOAK.read_text())["rows"]
    assert {row["op"] for row in rows} == set(kernels.OPS) and all(row["result"] == "ok" for row in rows)


@pytest.mark.skipif(not kernels.HAS_TRITON, reason="needs Triton")
def test_compiled_kernels_are_those_of_the_files():
    lines = written("kernels.md", "compiled resources").splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    written_rows = [(name, int(warps), int(stages)) for _, name, warps, stages, *_ in rows[2:]]
    specs = [spec for op in OPERATIONS for spec in op.compile_specs()]
    assert written_rows == [(s.name, s.num_warps, s.num_stages) for s in specs], "run: python tools/kernel_tables.py"
    assert not any("FAILS" in cell for row in rows for cell in row)


def test_every_op_of_a_block_has_a_shape_in_the_docs():
    text = (DOCS / "kernels.md").read_text()
    for launch in kernel_tables.ATTENTION_BLOCK + kernel_tables.DELTA_BLOCK:
        assert launch.op in kernels.OPS
        assert f"`{launch.op}`" in text, f"docs/kernels.md does not say how {launch.op} is cut into blocks"


def test_missing_markers_are_an_error():
    text = "<!-- a: written by tools/kernel_tables.py -->\nold\n<!-- end of a -->\n"
    assert between(text, "a", "new").splitlines()[2] == "new"
    with pytest.raises(AssertionError, match="no markers for b"):
        between(text, "b", "new")
