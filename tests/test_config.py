"""Settings: where each value comes from, the way back through TOML, and one clear line for every mistake."""

import dataclasses
import re
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psysafe.files import ASSETS, expand
from psysafe.training import config as config_module
from psysafe.training.config import DEFAULT_FILE, KEYS, TrainConfig, resolve, sentences, to_toml
from tests.mistakes import refused

RECIPE = {  # the paper's numbers, written down a second time on purpose
    **{"model": "Qwen/Qwen3.5-27B", "lora_rank": 1, "lora_alpha": 32.0, "max_tokens": 4096, "batch_size": 4},
    **{"optimizer": "adamw8bit", "lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01},
    **{"warmup_steps": 100, "max_grad_norm": 1.0, "seed": 3407, "system": "none", "epochs": 5},
    "val_fraction": 0.1,
    "lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes) -> str:
        path = tmp_path / "run.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def message(argv) -> str:
    with pytest.raises(ValueError) as caught:
        resolve(argv)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_the_defaults_are_the_recipe():
    config = TrainConfig()
    assert {key: getattr(config, key) for key in RECIPE} == RECIPE


def test_defaults_give_way_to_the_file_and_the_file_to_flags(write):
    path = write("lr = 3e-4\nepochs = 2\nval_fraction = 0\n")
    flags = ["--epochs", "7", "--micro_batch_tokens=77", "--data", "a b", "c", "--plot"]
    config, sources = resolve(["--config", path, *flags])
    assert (config.lr, config.epochs, config.micro_batch_tokens, config.plot) == (3e-4, 7, 77, True)
    assert config.data == ["a b", "c"] and config.val_fraction == 0.0 and type(config.val_fraction) is float
    expected = {"lr": path, "val_fraction": path, "epochs": "--epochs", "data": "--data", "plot": "--plot"}
    assert sources == dict.fromkeys(KEYS, "default") | expected | {"micro_batch_tokens": "--micro-batch-tokens"}
    assert resolve(["--config", write("plot = true"), "--no-plot"])[0].plot is False
    twice = resolve(["--config", write('data = ["file"]'), "--data", "a", "b", "--data=c"])[0]
    assert twice.data == ["a", "b", "c"]  # given twice, nothing is dropped; the file's list gives way as a whole


FILES_ROWS = 'data = ["toy"]\nval_data = ["toy val"]\n'


@pytest.mark.parametrize(
    ("file", "argv", "data", "val_data", "fraction"),
    [
        (FILES_ROWS, [], ["toy"], ["toy val"], 0.1),
        (FILES_ROWS, ["--data", "mine"], ["mine"], [], 0.1),
        (FILES_ROWS, ["--data", "mine", "--val-data", "own"], ["mine"], ["own"], 0.1),
        (FILES_ROWS, ["--data", "mine", "--val-fraction", "0.3"], ["mine"], [], 0.3),
        (FILES_ROWS, ["--val-fraction", "0.3"], ["toy"], [], 0.3),
        (FILES_ROWS, ["--val-fraction", "0"], ["toy"], [], 0.0),
        (FILES_ROWS, ["--val-data"], ["toy"], [], 0.1),  # names no rows: only empties the file's
        (FILES_ROWS, ["--val-data", "--val-fraction", "0.3"], ["toy"], [], 0.3),
        (FILES_ROWS + "val_fraction = 0.2", [], ["toy"], ["toy val"], 0.2),
        (FILES_ROWS + "val_fraction = 0.2", ["--data", "mine"], ["mine"], [], 0.2),
        ("", ["--val-data", "own", "--data", "mine"], ["mine"], ["own"], 0.1),
    ],
)
def test_a_flag_that_names_rows_takes_the_files_other_rows_away(write, file, argv, data, val_data, fraction):
    config, sources = resolve(["--config", write(file), *argv])
    assert (config.data, config.val_data, config.val_fraction) == (data, val_data, fraction)
    left_out = file and not val_data and "--val-data" not in argv
    assert ("are left out" in sources["val_data"]) == bool(left_out), sources["val_data"]


def test_rows_of_flags_that_contradict_each_other_are_refused(write):
    path = write(FILES_ROWS)
    flags = ["--data", "mine", "--val-data", "own", "--val-fraction", "0.2"]
    assert re.search("^--val-fraction .* --val-data .* drop one", message(["--config", path, *flags]))
    assert re.search("^--val-data names rows, so those of .*run.toml.*--data", message(["--config", path, *flags[2:4]]))


def test_the_committed_files_resolve_and_the_default_one_works_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, sources = resolve([])
    assert config.model == "assets:tiny" and expand(config.model) == str(ASSETS / "tiny")
    assert config.min_8bit_size == 1 and config.out == "runs/tiny" and sources["out"].endswith("configs/tiny.toml")
    big, sources = resolve(["--config", str(DEFAULT_FILE.with_name("qwen3.5-27b.toml"))])
    assert {key: getattr(big, key) for key in RECIPE} == RECIPE
    assert {key for key, source in sources.items() if source != "default"} == {"model", "data", "val_data", "out"}
    ours, sources = resolve(["--config", str(DEFAULT_FILE.with_name("qwen3.5-27b-selective.toml"))])
    changed = {"contrast_data", "contrast_ratio", "kl_weight", "epochs", "keep_best"}
    assert {key for key in KEYS if getattr(ours, key) != getattr(big, key)} == (changed | {"out"}) - {"kl_weight"}
    assert {key for key, x in sources.items() if x != "default"} == changed | {"model", "data", "val_data", "out"}
    assert (ours.contrast_ratio, ours.kl_weight, ours.keep_best) == (0.25, 0.0, "both")
    assert expand("runs/x") == "runs/x"


def test_every_key_has_its_sentence_and_help_shows_it(capsys):
    assert sentences().keys() == KEYS.keys()
    assert all(sentence.endswith(".") and "\n" not in sentence for sentence in sentences().values())
    with pytest.raises(SystemExit) as left:
        resolve(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0
    assert sentences()["max_grad_norm"] in shown and "--no-plot" in shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epochs = 1\nlearning_rate = 1e-4", r"run.toml line 2: unknown key 'learning_rate'; did you mean lr\?"),
        ("\n\nlora_rnak = 1", r"run.toml line 3: unknown key 'lora_rnak'; did you mean lora_rank\?"),
        ("[optim]\nlr = 1", r"run.toml line 1: unknown key 'optim'; did you mean optimizer\?; keys are flat"),
        ("packing = true", r"unknown key 'packing'; there is nothing to set: rows are always packed"),
        ("xyzzy = 1", r"unknown key 'xyzzy'$"),
        ("epochs = 2.5", r"line 1: epochs is 2.5; expected a whole number, 1 or more, such as 5"),
        ("epochs = true", r"epochs is True; expected a whole number"),
        ('lr = "fast"', r"lr is 'fast'; expected a number, 0 or more, such as 0.0001"),
        ("lr = nan", r"lr is nan; expected a number"),
        ("eps = inf", r"eps is inf; expected a number"),
        ("plot = 1", r"plot is 1; expected true or false"),
        ("beta2 = 1", r"beta2 is 1.0; expected a number, 0 or more and below 1"),
        ("data = [1]", r"data is \[1\]; expected a list of texts"),
        ('data = ["a", ""]', r"data is \['a', ''\]; expected a list of texts, none of them empty"),
        ("lora_targets = []", r"lora_targets is \[\]; expected a list of texts, at least one"),
        ('model = "a\\u0000b"', r"model is 'a\\x00b'; expected text"),
        ('dtype = "fp16"', r"dtype is 'fp16'; expected auto or float32 or bfloat16 or float64"),
        ("lr = \n", r"run.toml: not a TOML file: .*line 1"),
        ("lr = 1\nlr = 2\n", r"run.toml: not a TOML file: .*line 2"),
        (b"lr = \xff", r"run.toml: not UTF-8 at line 1 .byte 5.; save the file as UTF-8"),
        ("a = " + "[" * 5000, r"run.toml: not a TOML file"),
        ("seed = " + "9" * 5000, r"run.toml: not a TOML file|seed is 9+\.\.\.9+;"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_that_says_where_and_what_instead(write, text, expected):
    assert re.search(expected, message(["--config", write(text)]))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--lrr", "1"], r"unknown flag '--lrr'; did you mean --lr\?"),
        (["--lora_rnak=2"], r"did you mean --lora-rank\?"),
        (["--confg", "x"], r"did you mean --config\?"),
        (["--save-steps", "5"], r"unknown flag '--save-steps'; did you mean --save-every\?$"),
        (["--per_device_train_batch_size=2"], r"did you mean --batch-size\?$"),
        (["--packing"], r"unknown flag '--packing'; there is nothing to set: rows are always packed"),
        (["--gradient_checkpointing", "true"], r"nothing to set: what does not fit in memory is recomputed$"),
        (["--xyzzy", "1"], r"^unknown flag '--xyzzy'; see --help$"),
        (["--config", "/dev/zero"], r"^/dev/zero: more than 1,000,000 bytes in it"),
        (["train"], r"unexpected argument 'train'; settings are given as --key value"),
        (["--lr"], r"--lr: expected one argument"),
        (["--lr", "x"], r"^--lr: lr is 'x'; expected a number"),
        (["--batch-size", "0"], r"^--batch-size: batch_size is 0; expected a whole number, 1 or more, such as 4"),
        (["--batch-size", "4.5"], r"batch_size is '4.5'"),
        (["--optimizer", "sgd"], r"optimizer is 'sgd'; expected adamw8bit or adamw"),
        (["--model", "x\udcff"], r"model is 'x\\udcff'; expected text"),
        (["--data", "x\ny", ""], r"data is \['x\\ny', ''\]"),
        (["--plot=maybe"], r"--plot"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(argv, expected):
    assert re.search(expected, message(argv))


def test_a_config_built_in_python_is_checked_as_well():
    refused("lora_rank is 0; expected a whole number, 1 or more", TrainConfig, lora_rank=0)
    refused(r"lr is -1\.0", dataclasses.replace, TrainConfig(), lr=-1)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)


def values_of(key: str):
    """Any legal value of a key."""
    kind = KEYS[key]
    test = config_module._RANGE_OF.get(key, ("", lambda value: True))[1]
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(typing.get_args(kind))
    whole = st.integers(0, 2**63 - 1)
    number = st.floats(0, 1) | st.floats(0, 1e18)
    kinds = {int: whole, float: number, bool: st.booleans(), str: TEXT, list[str]: st.lists(TEXT, min_size=1)}
    return kinds[kind].filter(test)


def assert_round_trip(values: dict, source: str, folder):
    config = TrainConfig(**values)
    path = folder / "config.toml"
    path.write_bytes(to_toml(config, dict.fromkeys(KEYS, source)).encode())
    again, sources = resolve(["--config", str(path)])
    assert again == config
    assert set(sources.values()) == {str(path), "default"}  # default: dry_run, which is no part of a recipe


@settings(max_examples=60)
@given(st.fixed_dictionaries({key: values_of(key) for key in KEYS if key != "dry_run"}), TEXT)
def test_any_config_comes_back_from_its_toml(tmp_path_factory, values, source):
    assert_round_trip(values, source, tmp_path_factory.getbasetemp())


def test_the_round_trip_rejects_a_writer_that_does_not_escape(tmp_path, monkeypatch):
    values = {"model": "a\\tb"}  # backslash, t: read as a tab when it is not escaped
    assert_round_trip(values, "--model", tmp_path)
    right = config_module._toml_value
    monkeypatch.setattr(config_module, "_toml_value", lambda v: f'"{v}"' if isinstance(v, str) else right(v))
    with pytest.raises(AssertionError):
        assert_round_trip(values, "--model", tmp_path)


@pytest.mark.parametrize("seconds", ["0.001", "9", "1e9", "inf"])
def test_an_absurd_timeout_is_refused(seconds):
    refused("timeout is .*; expected a number, between 10 seconds and a week", resolve, ["--timeout", seconds])
