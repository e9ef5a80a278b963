"""The generated tables say what the code says: bytes exactly, compiled kernels by name, warps and stages, predicted
times by kernel; the roofline's constants and the table of a step follow from the predicted times. Errors at odd sizes
are those of the committed soak.
"""

import json
import re

import pytest

import kernels
from kernels.proof.registry import OPERATIONS
from kernels.proof.sass.programs import launches
from psysafe.model.config import ForwardBackward
from psysafe.training import roofline
from psysafe.training.dry_run import read_architecture
from tools import kernel_tables
from tools.kernel_tables import (
    DOCS,
    ROOT,
    SOAK,
    between,
    block_table,
    odd_sizes_table,
    step_table,
    traffic_table,
    with_speeds,
)


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


@pytest.mark.skipif(not kernels.HAS_TRITON, reason="needs Triton")
def test_predicted_kernels_are_those_of_a_step():
    text = written("kernels.md", "predicted times")
    rows = re.findall(r"^\| (\w[^|*]*?) +\|", text, re.MULTILINE)
    names = [launch.kernel.partition(",")[0] for launch in launches()]
    assert rows[1:] == names, "run: python tools/kernel_tables.py --speed"
    assert "not measured" in text and "Expected error" in text


@pytest.mark.parametrize(
    ("constant", "core", "op"),
    [("ATTENTION", "attention core", "causal_attention"), ("DELTA_RULE", "delta rule", "gated_delta_rule")],
)
def test_the_roofline_s_speeds_follow_from_the_predicted_times(constant, core, op):
    text = written("kernels.md", "predicted times")
    flops = read_architecture(kernel_tables.MODEL)[0].useful_flops(context=kernel_tables.T)[core]
    for direction, part, speed in zip(("forward", "backward"), flops, getattr(roofline, constant), strict=True):
        (ms,) = re.findall(rf"\*\*{op} {direction}\*\*.*?\*\*([\d.]+)\*\*", text)
        # The table rounds to 0.1 ms, the constant to 1 TFLOP/s.
        expected = part * kernel_tables.STEP / float(ms) * 1e3
        assert speed == pytest.approx(expected, abs=0.6e12 + expected * 0.05 / float(ms))


def test_constants_are_written_where_they_stand():
    source = "A = 1\nATTENTION = ForwardBackward(1e12, 2e12)\nB = ATTENTION\n"
    changed = with_speeds(source, {"ATTENTION": ForwardBackward(3.4e14, 2.1e14)})
    assert changed == "A = 1\nATTENTION = ForwardBackward(340e12, 210e12)\nB = ATTENTION\n"
    with pytest.raises(AssertionError, match="no line for DELTA_RULE"):
        with_speeds(source, {"DELTA_RULE": ForwardBackward(1.0, 1.0)})


def test_the_table_of_a_step_is_the_roofline_s():
    text = written("../benchmarks/README.md", "roofline of a step")
    assert text == step_table(), "run: python tools/kernel_tables.py --speed"
    hours = re.search(r"\*\*step\*\* \|.*", text)[0].split(" | ")[5].replace(",", "")
    # README: 8,775 steps of the recipe on an H100.
    assert f"and {float(hours) * 8775 / 3.6e6:.1f} hours on an H100" in (ROOT / "README.md").read_text()


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
