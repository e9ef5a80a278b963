"""The summary of a run: a dry run without weights, rows or GPU. The memory plan in a step, and out of memory."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
from psysafe import load_model
from psysafe.checkpoint.adapter import save_adapter
from psysafe.model.lora import attach
from psysafe.model.recompute import recomputed_stages
from psysafe.program import main_guard
from psysafe.training.memory_plan import Plan
from tests.oracles import reference_model, write_checkpoint
from tests.test_train import setup

RECIPE = ["--config", "configs/qwen3.5-27b.toml", "--dry-run"]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def printed(capsys, *argv) -> str:
    assert main_guard(train.main, list(argv)) == 0
    return capsys.readouterr().out


def test_the_27b_without_weights_rows_or_gpu(capsys):
    text = printed(capsys, *RECIPE)
    for expected in (
        "26,895,998,464 frozen parameters, 53.79 GB",
        "4,980,736 parameters in 512 tensors",
        "assumed: 7,019 rows of 640 tokens",
        "8,775 in all, 22,460,800 tokens",
        "at 4,096 tokens: predicted peak 83.84 GB of 84.00 GB",
        "one row of 4,096 tokens: simulated peak 83.81 GB, at sum, forward",
        "of them Triton's",
        "recomputed: conv, delta_rule",
        "computed from the roofline, not measured",
    ):
        assert expected in text, expected
    assert "on one H100" in text and "on one H200" in text and "hours in all" in text


def test_the_costs_in_our_recipe_s_comments_are_those_of_the_dry_run(capsys, monkeypatch):
    """Seconds a step, hours and tokens, beside the paper's; with KL and at the other ratio."""
    monkeypatch.setattr("psysafe.training.dry_run._paper_summary", lambda *_: {})  # most of a dry run's time
    recipe = ["--config", "configs/qwen3.5-27b-selective.toml", "--dry-run"]

    def costs(*argv) -> tuple[str, ...]:
        text = printed(capsys, *argv)
        speed = re.search(r"on one H100 +at best ([\d.]+) s a step, ([\d.]+) hours in all", text)
        tokens, more = re.search(r"in all, ([\d,]+) tokens", text)[1], re.search(r"\+([\d.]+)% tokens", text)
        return *speed.groups(), f"{int(tokens.replace(',', '')) / 1e6:.1f}", more and more[1]

    (step, hours, tokens, more), (paper_step, paper_hours, paper_tokens, _) = costs(*recipe), costs(*RECIPE)
    kl, three_quarters = costs(*recipe, "--kl-weight", "1"), costs(*recipe, "--contrast-ratio", "0.75")
    comments = Path("configs/qwen3.5-27b-selective.toml").read_text().replace("\n# ", " ")
    for expected in (
        f"+{more} % tokens a step, {step} instead of {paper_step} s",
        f"({tokens} of {paper_tokens} million) and {hours} instead of {paper_hours} hours",
        f"({kl[0]} s a step)",
        f"(+{three_quarters[3]} % tokens)",
    ):
        assert expected in comments, expected


def test_the_architecture_can_be_named(capsys):
    text = printed(capsys, *RECIPE, "--model", "random:configs/qwen3.5-27b-architecture.json", "--embedding", "cpu")
    assert "weights, adapter, optimiser 51.30" in text


def test_the_bundled_model_is_planned_for_the_machine_it_is_on(capsys, tmp_path):
    text = printed(capsys, "--dry-run", "--out", str(tmp_path / "run"))
    assert "CPU" in text and "predicted peak" not in text and not (tmp_path / "run").exists()


def test_own_rows_alone_are_validated_on_a_share_of_themselves(capsys, tmp_path):
    """And the run says so; the demo's rows are never mixed with own ones."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "Question {i}?", "answer": "Answer {i}."}}\n' for i in range(20)))
    flags = ["--dry-run", "--out", str(tmp_path / "run"), "--data", str(rows)]
    for more, trained, validated in (
        ([], "18 rows", "2 rows, .*; set apart from the training rows .val_fraction 0.1."),
        (["--val-fraction", "0.25"], "15 rows", "5 rows, .*; set apart from the training rows .val_fraction 0.25."),
        (["--val-fraction", "0"], "20 rows", "none .val_fraction is 0."),
        (["--val-data", str(rows)], "20 rows", "20 rows, [^;]*"),
    ):
        text = printed(capsys, *flags, *more)
        assert re.search(rf"^  training rows  +{trained}", text, re.MULTILINE), text
        assert re.search(rf"^  validation rows  +{validated}$", text, re.MULTILINE), text
        left_out = re.search(r"^  val_data  +-  .* the rows of .*tiny.toml are left out$", text, re.MULTILINE)
        assert bool(left_out) == ("--val-data" not in more)


def test_an_adapter_to_start_from_is_printed_in_its_own_shape(capsys, tmp_path):
    model = load_model("assets:tiny")
    adapters = attach(model, 4, 8, ["q_proj", "down_proj"])
    save_adapter(adapters, tmp_path / "adapter", "assets:tiny", multimodal=False)
    text = printed(capsys, "--dry-run", "--out", str(tmp_path / "run"), "--adapter-init", str(tmp_path / "adapter"))
    assert f"{adapters.count:,} parameters in {len(adapters.segments)} tensors" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*RECIPE, "--memory-limit", "60"], "--embedding cpu"),
        ([*RECIPE, "--memory-limit", "-1"], "memory_limit is -1"),
        (["--dry-run", "--memory-limit", "60"], "this run is on cpu"),
        (["--dry-run", "--model", "nobody/nothing-at-all"], "no architecture of that name"),
        (["--embedding", "cpu"], "uses its embedding as the output matrix"),
        (["--dry-run", "--embedding", "cpu"], "uses its embedding as the output matrix"),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys, monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise OSError("no network here")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    out = [] if "--config" in argv else ["--out", str(tmp_path / "run")]
    assert main_guard(train.main, [*argv, *out]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_the_plan_is_applied_to_every_micro_batch_and_changes_no_bit(tmp_path):
    run, _ = setup(tmp_path, torch.float32, micro_batch_tokens=40)
    free = train.train_step(run).read()["loss"], run.adapters.grad.clone()
    run, _ = setup(tmp_path, torch.float32, micro_batch_tokens=40)
    plan = Plan(run.model.config, run.adapters.targets, 1, 10**9, 0, element=4)
    seen = []

    class Tight(Plan):
        def apply(self, model, sizes):
            seen.append(sizes.tokens)
            fullest = plan.choose(sizes)
            tight = replace(plan, limit=fullest.peak - fullest.saved // 2)
            return tight.apply(model, sizes)

    run.plan = Tight(**vars(plan))
    assert train.train_step(run).read()["loss"] == free[0]
    assert torch.equal(run.adapters.grad, free[1]) and len(seen) > 1
    assert any(recomputed_stages(block) for block in run.model.layers)


def test_an_embedding_in_host_memory_gives_the_same_model(tmp_path):
    """With the rest of the model on tensors without memory: the rows are looked up on the host, then moved."""
    folder = write_checkpoint(reference_model(), tmp_path)
    model = load_model(folder, embedding="cpu")
    assert torch.equal(model.embed_tokens, load_model(folder).embed_tokens)
    tokens = torch.arange(5)
    expected = model.embed(tokens)
    assert torch.equal(expected, model.embed_tokens[tokens])
    for name, p in list(model.named_parameters()):
        if name != "embed_tokens":
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(p.to("meta"), requires_grad=False))
    assert model.embed(tokens).device.type == "meta"


@pytest.mark.parametrize(
    ("steps", "warmup", "expected"),
    [
        (1, 10, "a run of 1 step is not longer than --warmup-steps 10: the learning rate never reaches --lr 0.001, at"),
        (10, 10, "a run of 10 steps is not longer than --warmup-steps 10: the learning rate never reaches --lr 0.001"),
        (11, 10, ""),
        (1, 0, ""),
    ],
)
def test_a_run_that_ends_in_its_warm_up_is_said_to_never_see_its_rate(steps, warmup, expected, capsys, tmp_path):
    flags = f"--max-steps {steps} --warmup-steps {warmup} --lr 1e-3 --out {tmp_path}/run"
    text = printed(capsys, "--dry-run", *flags.split())
    assert expected in text and ("never reaches" in text) == bool(expected)
    assert ("the run learns nothing" in text) == (steps == 1 and warmup > 0)
    if steps == warmup:
        assert "at most 0.0009\n" in text
