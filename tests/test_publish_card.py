"""The card: what it says, what it never says, and its metadata, read back by huggingface_hub.ModelCard."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from psysafe import services
from psysafe.evaluation import word_list_judge
from psysafe.evaluation.published_results import TABLES
from psysafe.evaluation.result import Result, Table
from psysafe.publish.__main__ import arguments, main, prepare
from psysafe.publish.card import is_as_written, signed
from psysafe.publish.run import data_sets, read_run
from psysafe.publish.training import described, languages_of
from tests.mistakes import refused, refused_by
from tests.own_rows import ACKNOWLEDGEMENT, GERMAN
from tests.published_run import QWEN, multiple_choice, write_run, xstest

REPOSITORY = "someone/psysafe-small"
COMMIT = "a" * 40
JUDGE = "/models/big-judge"


@pytest.fixture(scope="module")
def bundled(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A run on a model of the hub, with rows of the hub and of this machine."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "small", QWEN, multimodal=True, revision=COMMIT)
    text = (folder / "config.toml").read_text()
    rows = f'data = ["org/rows@{COMMIT}", "hf://datasets/org/more@{COMMIT}/a.jsonl", "/home/me/private/mine.jsonl"]'
    (folder / "config.toml").write_text(re.sub("^data = .*$", rows, text, flags=re.MULTILINE))
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, str]:
    """name -> folder of a result."""
    folder = tmp_path_factory.mktemp("results")
    whole = {"data revision": COMMIT, "chat template": False}
    made = {
        "mmlu": multiple_choice("mmlu", 14_042, "small", 0.85, 0.8, **whole),
        "hellaswag": multiple_choice("hellaswag", 10_042, "small", 0.6, 0.5, **whole),
        "some": multiple_choice("mmlu", 14_041, "small", 0.85, 0.8, **whole),
        "other": multiple_choice("mmlu", 14_042, "another-run", 0.85, 0.8, **whole),
        "xstest": xstest("small", JUDGE, 14, 4),
        "rules": xstest("small", word_list_judge.NAME, 14, 4),
    }
    for name, result in made.items():
        result.save(folder / name)
    return {name: str(folder / name) for name in made}


def uploads(run: Path, *words: str) -> dict[str, bytes]:
    """path in the repository -> content, of what the command would send."""
    args = arguments().parse_args([str(run), "--repo", REPOSITORY, *words])
    made = prepare(args, read_run(run))
    return {one.path: one.content if isinstance(one.content, bytes) else one.content.read_bytes() for one in made}


def card_of(run: Path, *words: str) -> ModelCard:
    return ModelCard(uploads(run, *words)["README.md"].decode())


def section(card: ModelCard, heading: str) -> str:
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", card.text, re.DOTALL | re.MULTILINE)[1]


def test_the_metadata_field_by_field(small, results):
    card = card_of(small, "--results", results["mmlu"], results["hellaswag"], results["xstest"], results["rules"])
    data = card.data.to_dict()
    index = data.pop("model-index")
    assert data.pop("tags") == ["psysafe", "lora", "safety", "refusal", "mental-health", "arxiv:2606.09697"]
    assert data == {
        "base_model": QWEN, "base_model_relation": "adapter", "library_name": "peft",
        "pipeline_tag": "text-generation", "license": "apache-2.0", "datasets": ["org/more", "org/rows"],
    }  # fmt: skip
    assert [one["name"] for one in index] == ["psysafe-small"]
    mmlu, hellaswag = card.data.eval_results
    assert len(card.data.eval_results) == len(index[0]["results"]) == 2  # no figure of any judge
    assert (mmlu.dataset_type, mmlu.dataset_config, mmlu.dataset_split) == ("cais/mmlu", "all", "test")
    assert (mmlu.dataset_revision, mmlu.metric_type, mmlu.metric_value) == (COMMIT, "accuracy", 80.0)
    assert (hellaswag.dataset_type, hellaswag.dataset_split) == ("Rowan/hellaswag", "validation")
    assert hellaswag.metric_value == 70.0 and "acc_norm" in hellaswag.metric_name


def test_the_card_names_the_languages_of_the_rows(tmp_path):
    """Of rows that can be read here, by their field or else their text; nothing is claimed for those of the hub."""

    def row(answer, **fields):
        return json.dumps({"prompt": "p", "answer": answer} | fields) + "\n"

    english, german, short = row(ACKNOWLEDGEMENT), row(GERMAN["answer"]), row("short")
    nothing = "Languages of the training rows: not read, or none that is known here.\n"
    for content, language, limit in [
        (english * 10 + german * 10, ["en", "de"], "The training rows are in English and German."),
        (english * 30 + german, "en", "evaluations are for English.\n"),
        (short * 30 + german, "de", "The training rows are in German."),
        (row("kurz", language="de-AT") + english, ["de", "en"], "The training rows are in German and English."),
        (row("court", language="fr") * 3 + german, "de", "The training rows are in German."),  # no table of French
        (row("court", language="fr") * 30 + german, None, nothing),
        (short, None, nothing),
    ]:
        (tmp_path / "rows.jsonl").write_text(content)
        run = write_run(tmp_path / "run", QWEN)
        settings = (run / "config.toml").read_text().replace("assets:rows/train.jsonl", str(tmp_path / "rows.jsonl"))
        (run / "config.toml").write_text(settings)
        card = card_of(run)
        assert card.data.to_dict().get("language") == language and limit in section(card, "Limits")
        shutil.rmtree(run)
    (tmp_path / "rows.jsonl").write_text(german)
    assert languages_of([str(tmp_path / "rows.jsonl")]) == ["de"]
    for unread in (f"somebody/rows@{COMMIT}:rows.jsonl", str(tmp_path / "none.jsonl")):
        assert languages_of([str(tmp_path / "rows.jsonl"), unread]) == []


def test_the_hubs_own_result_files(small, results):
    files = uploads(small, "--results", *results.values())
    names = sorted(name for name in files if name.startswith(".eval_results/"))
    assert names == [".eval_results/hellaswag.yaml", ".eval_results/mmlu.yaml"]
    entries = [parse_eval_result_entries(yaml.safe_load(files[name]))[0] for name in names]
    assert [(one.dataset_id, one.value, one.dataset_revision) for one in entries] == [
        ("Rowan/hellaswag", 70.0, COMMIT),
        ("cais/mmlu", 80.0, COMMIT),
    ]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", one.date) and "0-shot" in one.notes for one in entries)


@pytest.mark.parametrize("name", ["some", "other", "xstest", "rules"])
def test_other_figures_never_enter_the_metadata(name, small, results):
    """One question less than MMLU has, another run's, and what somebody judged."""
    files = uploads(small, "--results", results[name])
    data = ModelCard(files["README.md"].decode()).data.to_dict()
    assert "model-index" not in data and "model_name" not in data
    assert not any(path.startswith(".eval_results") for path in files)


@pytest.mark.parametrize(
    ("flags", "relation", "library"),
    [([], "adapter", "peft"), (["--gguf"], "quantized", "gguf"), (["--merged"], "finetune", "transformers"),
     (["--merged", "--gguf"], "finetune", "transformers")],
)  # fmt: skip
def test_what_the_repository_is_to_its_base(flags, relation, library, small, tmp_path):
    """With whole weights at the root the adapter lies beside them: no loader may add it a second time."""
    values = {"--gguf": tmp_path / "model.gguf", "--merged": tmp_path / "merged"}
    values["--gguf"].write_bytes(b"GGUF....")
    values["--merged"].mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "notes.bak", ".hidden"):
        (values["--merged"] / name).write_bytes(b"{}" if name != "model.safetensors" else b"\2\0\0\0\0\0\0\0{}")
    files = uploads(small, *(str(word) for flag in flags for word in (flag, values[flag])))
    data = ModelCard(files["README.md"].decode()).data
    assert (data.base_model_relation, data.library_name) == (relation, library)
    prefix = "adapter/" if flags else ""
    expected = {"README.md", f"{prefix}adapter_config.json", f"{prefix}adapter_model.safetensors"}
    expected |= {"model.gguf"} if "--gguf" in flags else set()
    expected |= {"config.json", "model.safetensors", "tokenizer.json"} if "--merged" in flags else set()
    assert files.keys() == expected
    text = files["README.md"].decode()
    assert all(f"- `{name}`" in text for name in expected)
    assert ("llama-server --hf-repo someone/psysafe-small --hf-file model.gguf" in text) == ("--gguf" in flags)
    assert (f'AutoModelForCausalLM.from_pretrained("{REPOSITORY}"' in text) == ("--merged" in flags)
    assert ('subfolder="adapter"' in text) == bool(flags)
    for part in text.split("\n### ")[1:]:  # each is read alone
        assert ("ADAPTER is the folder" in part) == bool(re.search(r"[ =,]ADAPTER ", part.replace("\n", " "))), part


def test_an_adapter_for_llama_cpp_is_not_taken_for_a_model(small, tmp_path):
    """The repository stays one of an adapter, at its root, and the command gives llama.cpp the base apart."""
    (tmp_path / "a.gguf").write_bytes(b"GGUF....general.type....adapter.type....lora")
    files = uploads(small, "--gguf", str(tmp_path / "a.gguf"))
    data, text = ModelCard(files["README.md"].decode()).data, files["README.md"].decode()
    assert (data.base_model_relation, data.library_name) == ("adapter", "peft")
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors", "a.gguf"}
    assert "llama-server -m BASE.gguf --lora a.gguf" in text and "--hf-file" not in text


def test_a_run_on_the_bundled_model(bundled):
    files = uploads(bundled)
    card = ModelCard(files["README.md"].decode())
    assert "base_model" not in card.data.to_dict() and "assets:" not in card.content
    assert "**The base is a miniature.**" in card.text and "Nobody should ask it for help." in card.text
    assert b'"base_model_name_or_path": null' in files["adapter_config.json"]
    elsewhere = card_of(bundled, "--base-model", "someone/tiny-base")
    assert elsewhere.data.base_model == "someone/tiny-base" and "**The base is a miniature.**" in elsewhere.text
    assert 'AutoModelForCausalLM.from_pretrained("someone/tiny-base"' in elsewhere.text


def test_the_adapters_config_names_the_base_as_others_know_it(small):
    config = uploads(small)["adapter_config.json"].decode()
    assert f'"base_model_name_or_path": "{QWEN}"' in config and f'"revision": "{COMMIT}"' in config
    config = uploads(small, "--base-model", "mirror/Qwen3.5-0.8B")["adapter_config.json"].decode()
    assert '"base_model_name_or_path": "mirror/Qwen3.5-0.8B"' in config and '"revision": null' in config


def test_every_service_and_emergency_number_stands_on_the_card(bundled):
    text = card_of(bundled).text
    for service in services.bundled().services:
        assert service.url in text and service.contact in text
    assert all(number in text for number in services.bundled().emergency.values())
    assert text.index("Not a substitute for professional care") < text.index("## ")


def test_a_contact_ends_no_cell_of_the_table(bundled, tmp_path):
    """A bar in it moved what follows under the next country."""
    given = (Path(__file__).parent / "fixtures" / "services_zz.toml").read_text()
    path = tmp_path / "zz.toml"
    path.write_text(given.replace("call or text 555-0134", "call 555-0134 | text *free*"))
    text = card_of(bundled, "--services", str(path)).text
    assert r", call 555-0134 \| text \*free\* |" in text


def test_the_card_names_the_services_that_are_given(bundled):
    given = Path(__file__).parent / "fixtures" / "services_zz.toml"  # invented
    text = card_of(bundled, "--services", str(given)).text
    assert "| what it is about | ZZ |" in text and "call 000 (ZZ)." in text
    # Nobody has looked whether the rows name these: the card must not say that the model's answers do.
    assert "come from its training rows, which were not compared with those above (ZZ)" in section(
        card_of(bundled, "--services", str(given)), "Limits"
    )
    assert "[Quiet Line](https://quietline.invalid), call or text 555-0134" in text
    assert not any(service.name in text for service in services.bundled().services)
    refused("not checked on the live page", card_of, bundled, "--services", "AU")
    assert "Lifeline" in card_of(bundled, "--services", "AU", "--unchecked").text
    refused("no effect without --services", main, [str(bundled), "--repo", REPOSITORY, "--unchecked", "--dry-run"])


def test_costs_are_the_publications_and_the_measured_ones(small, results):
    measured = [results[name] for name in ("hellaswag", "xstest", "mmlu")]  # HellaSwag's acc is not MMLU's
    costs = section(card_of(small, "--results", *measured), "Known costs")
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:4]] for cells in
            (line.split("|") for line in costs.splitlines() if line.startswith("| ")) }  # fmt: skip
    published, own = rows["XSTest: unsafe prompts refused, %"]
    assert published == "59.0 → 17.0" and own.startswith(
        "70 → 20 (system prompt none, n 20; difference -50, 95 % from -"
    )
    published, own = rows["MMLU: accuracy"]
    assert published == "0.8443 → 0.8020" and own.startswith(
        "0.85 → 0.8 (system prompt none, n 40; difference -0.05, 95 %"
    )
    assert ";" not in own.partition(")")[2]  # one figure
    assert rows["relevance of answers, 1 to 5"] == ["3.90 → 3.37 (−13.5 %)", "not measured"]
    judged_by_rules = section(card_of(small, "--results", results["rules"]), "Known costs")
    assert "70 → 20 (by word lists, system prompt none, n 20" in judged_by_rules
    of_another = section(card_of(small, "--results", results["other"]), "Known costs")
    assert of_another.count("not measured") == 3


def test_the_evaluation_says_who_judged_and_what_nobody_measured(small, results):
    card = card_of(small, "--results", results["xstest"], results["mmlu"])
    evaluation = section(card, "Evaluation")
    assert "Judge: big-judge." in evaluation and JUDGE not in card.content
    assert "#### Intervals" in evaluation and "#### Published: Qwen3.5-27B on XSTest" in evaluation
    missing = re.search(r"^Not evaluated: (.*)$", evaluation, re.MULTILINE)[1]
    assert "SORRY-Bench" in missing and "HellaSwag" in missing and "XSTest" not in missing and "MMLU" not in missing
    overlap = section(card, "Overlap with training rows")
    assert "of 450 prompts, 3 stand in the training rows word by word, 5 apart from case" in overlap
    assert "mmlu, 0-shot: not measured." in overlap
    assert "**Judged by word lists,**" in section(card_of(small, "--results", results["rules"]), "Evaluation")
    nothing = card_of(small)
    assert section(nothing, "Evaluation").strip().startswith("Not evaluated: there are no figures")
    assert "Not measured" in section(nothing, "Overlap with training rows")
    kappas = ", ".join(f"{name} {kappa:.2f}" for name, kappa in TABLES["agreement"].rows)
    assert kappas in section(nothing, "Limits")


def test_figures_of_another_model_are_told_from_this_ones(small, results, capsys):
    """An evaluation knows models by name alone: whose name is not the run's is not taken for it in silence."""
    of_other = section(card_of(small, "--results", results["other"], results["xstest"]), "Evaluation")
    assert of_other.count("**No variant here is called small:**") == 1
    assert of_other.index("mmlu") < of_other.index("**No variant here") < of_other.index("XSTest")
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "none of its variants" in line]
    assert warning.startswith("warning: mmlu") and warning.endswith("is called small; is it of another model?")


@pytest.mark.parametrize("kind", ["agreement", "miniature"])
def test_an_evaluation_that_names_no_adapter_is_not_taken_for_anothers(kind, small, tmp_path, capsys):
    Result(kind, kind, [Table("t", [("variant", "")], [["fine-tuned"]])]).save(tmp_path)
    assert "No variant here" not in section(card_of(small, "--results", str(tmp_path)), "Evaluation")
    assert "none of its variants" not in capsys.readouterr().err


def test_the_training_table_is_the_runs(small):
    table = section(card_of(small), "Training")
    cells = dict(re.findall(r"^\| (.*?) \| (.*) \|$", table, re.MULTILINE))
    assert cells["base"] == f"{QWEN} at commit {COMMIT}, frozen"
    assert cells["steps"] == "5 epochs of 4 rows a step; 2 taken, 160 tokens"
    assert cells["training loss"] == "1.5000 at first, 0.2500 at last"
    assert cells["validation loss"] == "0.9000 after step 0, 0.5000 after step 2"
    assert cells["training rows"] == "org/more; org/rows; 1 file not published here" and "mine" not in table
    assert cells["adapter"].startswith("LoRA, rank 1, alpha 32, ") and cells["seed"] == "3407"


def test_rows_are_named_only_where_others_find_them():
    names = [f"a/b@{COMMIT}", "rows.jsonl", "assets:rows/train.jsonl", "owner/name"]
    assert data_sets(names) == ["a/b"]
    assert described(names) == "a/b; bundled with the psysafe project; 2 files not published here"


def test_extras_only_where_they_are_asked_for(small, results):
    words = ["--results", results["xstest"]]
    assert not {"metrics.jsonl", "results/1-xstest.json"} & uploads(small, *words).keys()
    files = uploads(small, *words, "--include", "results", "metrics")
    assert files["metrics.jsonl"] == (small / "metrics.jsonl").read_bytes()
    assert b'"settings"' not in files["results/1-xstest.json"] and b"/models/" not in files["results/1-xstest.json"]
    assert not {"config.toml", "state/secret.pt"} & files.keys()


def test_an_edited_card_is_known_from_one_of_ours(bundled):
    card = uploads(bundled)["README.md"].decode()
    assert is_as_written(card) and is_as_written(card.replace("\n", "\r\n"))
    for edited in (card.replace("research", "Research", 1), card.replace("license: apache-2.0", "license: mit"),
                   card + "More.\n", card.rpartition("<!--")[0], "", signed("x")[:-10]):  # fmt: skip
        assert not is_as_written(edited)


def test_the_dry_run_shows_files_and_card_and_writes_nothing(bundled, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    before = sorted(bundled.rglob("*"))
    assert main([str(bundled), "--repo", REPOSITORY, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{REPOSITORY}, private:\n  README.md ") and "adapter_model.safetensors" in out
    assert "\n---\nlanguage: en\n" in out and str(bundled.parent) not in out + err
    assert "nothing was sent" in err and sorted(bundled.rglob("*")) == before


def test_mistakes_are_one_line(bundled, small, results, tmp_path, capsys):
    def line(*words) -> str:
        return refused_by(main, [*words, *(() if "--repo" in words else ("--repo", REPOSITORY)), "--dry-run"], capsys)

    assert "no config.toml in it; expected the run directory" in line(tmp_path)
    for name in ("psysafe", "a/b/c", "a/b--c", "../x", "a/b c"):
        assert "no name of a repository" in line(bundled, "--repo", name)
    assert "expected a repository of the hub" in line(bundled, "--base-model", "/home/me/model")
    assert "--license" in line(bundled, "--license", "Apache 2.0")
    assert "no result.json in it" in line(bundled, "--results", tmp_path)
    assert "no effect without --results" in line(bundled, "--include", "results")
    for name in ("model.bin", "my model.gguf", "x;y.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
        assert "ends in .gguf; rename it" in line(bundled, "--gguf", tmp_path / name)
    (tmp_path / "not.gguf").write_bytes(b"")
    assert "not a GGUF file" in line(bundled, "--gguf", tmp_path / "not.gguf")
    assert "no config.json in it" in line(bundled, "--merged", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "model.safetensors is missing" in line(bundled, "--merged", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "shard-2.safetensors"}}')
    assert "shard-2.safetensors is missing" in line(bundled, "--merged", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "in a folder without an adapter" in line(bundled, "--merged", tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [("^.*$", ""), ('"assets:tiny"', '"Qwen/Qwen3.5-0.8B"'), ("lora_rank = 1", "lora_rank = 8")],
    ids=["empty", "another base", "another rank"],
)
def test_settings_of_another_run_are_refused(old, new, bundled, tmp_path):
    folder = shutil.copytree(bundled, tmp_path / "run")
    path = folder / "config.toml"
    path.write_text(re.sub(old, new, path.read_text(), flags=re.MULTILINE))
    refused("does not belong to the adapter beside it", uploads, folder)


@pytest.mark.parametrize(
    ("model", "expected"),
    [("random:configs/micro.json", "random weights"), ("/home/me/models/base", "the folder base of this machine")],
)
def test_a_base_that_nobody_else_has_is_refused(model, expected, bundled, tmp_path):
    folder = shutil.copytree(bundled, tmp_path / "run")
    text = (folder / "config.toml").read_text().replace('model = "assets:tiny"', f'model = "{model}"')
    (folder / "config.toml").write_text(text)
    adapter = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(
        re.sub('("base_model_name_or_path": )"[^"]*"', rf'\1"{model}"', adapter)
    )
    line = refused(expected, uploads, folder)
    assert "/home" not in line
    if "random" not in model:
        assert b"/home" not in uploads(folder, "--base-model", "org/base")["README.md"]


@pytest.mark.parametrize("kind", ["mmlu", "xstest"])
def test_a_result_without_tables_has_no_figures(kind, bundled, tmp_path):
    Result(kind, "Nothing", []).save(tmp_path)
    card = card_of(bundled, "--results", str(tmp_path))
    assert "### Nothing" in card.text and "model-index" not in card.data.to_dict()
