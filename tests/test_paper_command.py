"""The command of the step on paper: what it prints, its mistakes, its pictures."""

import json
from xml.etree import ElementTree

import pytest

import kernels
from psysafe import load_model, paper
from psysafe.checkpoint.adapter import save_adapter
from psysafe.model.lora import attach
from psysafe.program import main_guard
from psysafe.training.paper import timeline
from psysafe.training.paper.rates import PaperGPU
from psysafe.training.paper.run import parse_lengths, trace_step
from tests.test_paper import CONFIGS, run_of

pytestmark = [
    pytest.mark.skipif(not kernels.HAS_TRITON, reason="needs Triton"),
    pytest.mark.filterwarnings("ignore:Anomaly Detection"),
]


def test_the_command_prints_what_it_says(capsys):
    assert main_guard(paper.main, ["--config", "configs/qwen3.5-27b.toml", "--lengths", "640x4"]) == 0
    text = capsys.readouterr().out
    for expected in ("Qwen3.5-27B, a step of 2,560 tokens in 4 documents", "on paper, on one H100", "simulated peak"):
        assert expected in text, expected
    assert "measured" not in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lengths", "0"], "--lengths 0: expected a length"),
        (["--lengths", "640y4"], "--lengths 640y4"),
        (["--gpu", "H300"], "--gpu"),
        (["--lenghts", "4"], "unknown flag"),
        (["--shard"], "--shard spreads the base over ranks"),
        (["--ranks", "0"], "argument --ranks: '0' is no whole number above 0"),
        (["--top", "0"], "argument --top: '0' is no whole number above 0"),
        (["--untrained", "-1"], "argument --untrained: '-1' is no whole number above 0"),
        (["--generate", "8", "--context", "0"], "argument --context: '0' is no whole number above 0"),
        (["--host-us", "nan"], "--host-us nan: expected a number of microseconds"),
        (["--model", "assets:tiny", "--embedding", "cpu"], "assets:tiny uses its embedding as the output matrix"),
        (["--config", "configs/tiny.toml", "--dtype", "float64"], "float64"),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    assert main_guard(paper.main, ["--config", "configs/qwen3.5-27b.toml", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_adapter_to_start_from_is_traced_in_its_own_rank(tmp_path, capsys):
    """Rank 2 is not fused: plain products come on top."""
    adapters = attach(load_model("assets:tiny"), 2, 8, ["q_proj", "down_proj"])
    save_adapter(adapters, tmp_path, "assets:tiny", multimodal=False)
    texts = []
    for flags in (["--adapter-init", str(tmp_path)], ["--lora-rank", "2", "--lora-targets", "q_proj", "down_proj"]):
        assert main_guard(paper.main, ["--model", "assets:tiny", "--lengths", "64", *flags]) == 0
        texts.append([line for line in capsys.readouterr().out.splitlines() if "Python took" not in line])
    assert texts[0] == texts[1]


def test_without_triton_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "HAS_TRITON", False)
    assert main_guard(paper.main, ["--config", "configs/qwen3.5-27b.toml"]) == 2
    assert "pip install triton" in capsys.readouterr().err


def test_lengths():
    assert parse_lengths("--lengths", ["4096", "640x3"]) == [4096, 640, 640, 640]


# Pictures


def test_the_pictures_show_every_operation(tmp_path, monkeypatch):
    run, gpu = run_of([64] * 2), PaperGPU("H100", 64)
    trace = trace_step(run)
    seconds = gpu.total(trace.ops)[""].seconds
    rows = json.loads(timeline.chrome_trace("a step", trace, gpu))["traceEvents"]
    spans = [row for row in rows if row["ph"] == "X"]
    assert len(spans) == len(trace.ops) and sum(row["dur"] for row in spans) == pytest.approx(1e6 * seconds)
    page = timeline.page("a <step>", trace, gpu)
    assert page.count("<title>") == len(trace.ops) + 1 and "a <step>" not in page
    picture = ElementTree.fromstring(timeline.svg("a <step>", trace, gpu))
    texts = [x.text for x in picture.iter() if x.tag.endswith("}text")]
    assert {"GEMM", "delta rule", "forward", "backward"} <= set(texts)
    assert any("computed, not measured" in text for text in texts)


@pytest.mark.slow
def test_the_committed_picture_and_table_are_what_the_command_gives(tmp_path, capsys):
    file = tmp_path / "step.svg"
    assert main_guard(paper.main, ["--config", "configs/qwen3.5-27b.toml", "--svg", str(file)]) == 0
    committed = CONFIGS.parent / "docs" / "step-on-paper.svg"
    command = "python -m psysafe.paper --config configs/qwen3.5-27b.toml --svg docs/step-on-paper.svg"
    assert file.read_text() == committed.read_text(), f"run: {command}"
    printed = capsys.readouterr().out
    table = printed[printed.index("kind of work") : printed.index("heaviest lines")].strip()
    assert table in committed.with_suffix(".md").read_text(), "docs/step-on-paper.md shows another table"
