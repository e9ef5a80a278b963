"""The comparison of compilers: what it shows, and that it never takes one compiler's results for another's."""

import json
import sys
from pathlib import Path

import pytest

from kernels.proof.registry import OPERATIONS
from tools import both_compilers
from tools.both_compilers import COMPILERS, document, main, side_by_side

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "compile-sm_90.json"


def row(**changes) -> dict:
    numbers = {"registers": 200, "shared": 196_896, "spills": 0, "stack": 0, "serialised": False, "error": ""}
    return {"kernel": "dq", "warps": 8, "stages": 3, **numbers, "complaints": [], **changes}


@pytest.fixture
def compilers(monkeypatch, tmp_path):
    """Instead of compiling: `rows` under each version, reported by the version in `answers`."""
    rows, answers = {version: [row()] for version in COMPILERS}, {version: version for version in COMPILERS}

    def run(command, env, **_):
        (version,) = (v for v in COMPILERS if env["PYTHONPATH"].endswith(f"triton-{v}"))
        assert env["TRITON_CACHE_DIR"].endswith(version), "the compilers must not share a cache"
        if version in answers:
            report = Path(command[command.index("--json") + 1])
            report.write_text(json.dumps({"triton": answers[version], "kernels": rows[version]}))
        return type("Done", (), {"returncode": 1, "stdout": "no ", "stderr": "ptxas"})

    monkeypatch.setattr(both_compilers, "install", lambda version, folder: folder / f"triton-{version}")
    monkeypatch.setattr(both_compilers.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["both_compilers", "--out", str(tmp_path / "out.json")])
    return rows, answers


def test_both_stand_side_by_side(compilers, tmp_path, capsys):
    rows, _ = compilers
    rows["3.6.0"][0] |= {"registers": 194}
    assert main() == 0
    assert "1 kernels for sm_90 with triton 3.7.1 and 3.6.0, 0 failed" in capsys.readouterr().out
    (kernel,) = json.loads((tmp_path / "out.json").read_text())["kernels"]
    assert [kernel[f"triton {version}"]["registers"] for version in COMPILERS] == [200, 194]


def test_a_fault_under_one_compiler_fails(compilers, capsys):
    rows, _ = compilers
    rows["3.6.0"][0] |= {"spills": 8, "complaints": ["spills 8 B, budget 0 B"]}
    assert main() == 1
    assert "3.6.0: spills 8 B, budget 0 B" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "message"),
    [("3.7.1", "triton 3.7.1 compiled, not 3.6.0"), (None, "triton 3.6.0: kernels.compile_check wrote no report")],
)
def test_another_compiler_s_results_are_refused(compilers, capsys, answer, message):
    _, answers = compilers
    answers.pop("3.6.0")
    if answer:
        answers["3.6.0"] = answer
    with pytest.raises(SystemExit, match="2"):
        main()
    assert message in capsys.readouterr().err


def test_the_committed_comparison_is_of_the_kernels_as_they_are():
    """Every kernel, with its warps and stages, compiled by both without a complaint."""
    committed = json.loads(COMMITTED.read_text())
    launches = [(kernel["kernel"], kernel["warps"], kernel["stages"]) for kernel in committed["kernels"]]
    specs = [spec for op in OPERATIONS for spec in op.compile_specs()]
    assert launches == [(s.name, s.num_warps, s.num_stages) for s in specs], "run: python tools/both_compilers.py --out"
    assert committed["compilers"] == list(COMPILERS)
    for kernel in committed["kernels"]:
        for version in COMPILERS:
            used = kernel[f"triton {version}"]
            assert used["complaints"] == [] and not used["serialised"], (kernel["kernel"], version, used)


def test_a_document_and_its_table_name_every_kernel():
    results = {version: [row(), row(kernel="dk")] for version in COMPILERS}
    assert [kernel["kernel"] for kernel in document(results)["kernels"]] == ["dq", "dk"]
    assert side_by_side(results).count("196,896") == 4
