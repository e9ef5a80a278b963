"""Every flag of every command of eval.py does something, or is refused: none is taken without effect.

What a command does is observed from outside: its result, the models it builds and what it asks them, the requests that
endpoints get and how they are sent. A flag whose observation is that of the same command without it has no effect.
"""

import argparse
import functools
import json
from pathlib import Path

import pytest

import eval as script
from psysafe import endpoint
from psysafe.endpoint import Outcome
from psysafe.evaluation import judge_models, translation
from psysafe.evaluation.benchmarks import log_likelihood
from psysafe.evaluation.judge_models import LocalJudge
from psysafe.evaluation.models_under_test import ModelUnderTest
from psysafe.program import main_guard
from tests.mistakes import refused_by
from tests.stub_endpoint import StubEndpoint, reply_by
from tests.test_eval_judge import reply
from tests.test_eval_run import MODEL

FIXTURES = Path(__file__).parent / "fixtures" / "eval"
COMMANDS = next(a for a in script.make_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
FLAGS = [
    (command, flag)
    for command, parser in COMMANDS.items()
    for action in parser._actions
    for flag in action.option_strings
    if flag.startswith("--") and flag != "--help"
]

JUDGE = "--judge-url URL --judge-model j"
BY_RULES = {
    "judge": "judge --prompts PROMPTS --model MODEL --out OUT --judge rules",
    "xstest": "xstest --data DATA --model MODEL --out OUT --judge rules",
    "selective": "selective --prompts GROUPS --model MODEL --adapter ADAPTER --out OUT --judge rules",
    "turns": "turns --prompts TURNS --model MODEL --out OUT --judge rules",
}
BY_MODEL = {command: line.replace("--judge rules", JUDGE) for command, line in BY_RULES.items()}
BY_MODEL["sorry-bench"] = f"sorry-bench --data DATA --model MODEL --out OUT {JUDGE}"
CHOICE = {command: f"{command} --data DATA --limit 2 --model MODEL --out OUT" for command in ("mmlu", "hellaswag")}
RATE = "rate --answers a=ANSWERS --answers b=ANSWERS"
OTHERS = {"agreement": "agreement --human PEOPLE --judged JUDGED --out OUT", "report": "report JUDGED --out OUT",
          "rate": f"{RATE} --out OUT"}  # fmt: skip
LINES = BY_MODEL | BY_RULES | CHOICE | OTHERS
REREAD = "judge --out OUT"
RATED = "agreement --ratings RATINGS --key KEY --judged JUDGED --out OUT"
STORED = "selective --prompts GROUPS --answers a=ANSWERS --answers b=ANSWERS --judge rules"
TRANSCRIBED = "turns --prompts TURNS --answers a=TRANSCRIPTS --judge rules"
TRANSLATED = f"{BY_MODEL['sorry-bench']} --mutations base,translate-fr --translator-url URL --translator-model t"

OF_AU = "--services AU --unchecked"

Effect = str | tuple[str, str]  # words behind the command's line in LINES, or two whole lines that differ in the flag


def of_models(line: str) -> dict[str, Effect]:
    hub = line.replace("--model MODEL", "--model org/name")
    flags = ("--model OTHER", "--adapter ADAPTER", "--system v0", "--device cpu", "--dtype float64", "--limit 1",
             "--train TRAIN", "--out OUT2")  # fmt: skip
    return {words.split()[0]: words for words in flags} | {"--revision": (hub, f"{hub} --revision abc")}


def of_answers(line: str) -> dict[str, Effect]:
    flags = ("--max-new-tokens 9", "--temperature 0.5", "--batch-size 2", "--no-thinking", "--rules published")
    sampled, silent = f"{line} --temperature 0.5", f"{line} --no-thinking"
    pairs = {"--seed": (sampled, f"{sampled} --seed 4"), "--thinking": (silent, f"{silent} --thinking")}
    return of_models(line) | {words.split()[0]: words for words in flags} | pairs


def of_judges(line: str) -> dict[str, Effect]:
    """line: judged by a model behind an endpoint."""
    flags = ("--judge-key-env OTHER_KEY", "--judge-param top_p=0.5", "--judge-tokens 99", "--workers 3",
             "--deadline 77")  # fmt: skip
    pairs = {words.split()[0]: (line, f"{line} {words}") for words in flags}
    pairs |= {"--judge-url": (line, line.replace("URL", "URL2"))}
    pairs |= {"--judge-model": (line, line.replace("model j", "model k"))}
    return pairs | {"--judge-local": (line, line.replace(JUDGE, "--judge-local MODEL"))}


def of_input(line: str) -> dict[str, Effect]:
    """line: judged by a model behind an endpoint."""
    flags = ("--rubric TEMPLATE", "--judge-answer-chars 3")
    by_tokens = f"{line} --judge-tokenizer TOKENIZER --judge-answer-tokens"
    pairs = {words.split()[0]: (line, f"{line} {words}") for words in flags}
    pairs["--judge-tokenizer"] = (f"{by_tokens} 2", f"{by_tokens} 2".replace("TOKENIZER", "TOKENIZER2"))
    return pairs | {"--judge-answer-tokens": (f"{by_tokens} 1", f"{by_tokens} 2")}


def of_data(line: str) -> dict[str, Effect]:
    fetched = line.replace("--data DATA", "")
    return {"--data": (fetched, line), "--data-revision": (fetched, f"{fetched} --data-revision abc")}


def of_stored(line: str, judge: str) -> dict[str, Effect]:
    numbered = {"--replies": ("NUMBERED", "NUMBERED2"), "--scores": ("NUMBERED", "NUMBERED2")}
    pairs = {flag: tuple(f"{line} {flag} {file}" for file in files) for flag, files in numbered.items()}
    return pairs | {"--answers": (f"{line} {judge} --answers NUMBERED", f"{line} {judge} --answers two=NUMBERED")}


EFFECTS: dict[str, dict[str, Effect]] = {
    "judge": of_answers(BY_RULES["judge"]) | of_judges(BY_MODEL["judge"])
    | of_input(BY_MODEL["judge"]) | {
        "--judge": (BY_MODEL["judge"], BY_RULES["judge"]),
        "--prompts": "--prompts OTHERPROMPTS",
        "--answers": ("judge --answers ANSWERS --judge rules --out OUT",
                      "judge --answers ANSWERS --answers two=ANSWERS --judge rules --out OUT"),
        "--limit": ("judge --answers ANSWERS --judge rules --out OUT",
                    "judge --answers ANSWERS --judge rules --out OUT --limit 1"),
        "--replies": (f"{REREAD} --replies REPLIES", f"{REREAD} --replies REPLIES2"),
        "--scores": (f"{REREAD} --scores REPLIES", f"{REREAD} --scores REPLIES2"),
        "--sample-per-cluster": "--sample-per-cluster 2",
        "--services": OF_AU,
        "--baseline": (f"{BY_RULES['judge']} --system none,v0", f"{BY_RULES['judge']} --system none,v0 --baseline TWO"),
    },
    "selective": of_answers(BY_RULES["selective"]) | of_judges(BY_MODEL["selective"]) | {
        "--services": OF_AU,
        "--judge": (BY_MODEL["selective"], BY_RULES["selective"]),
        "--prompts": "--prompts OTHERGROUPS",
        "--adapter": "--adapter ADAPTER2",
        "--answers": (f"{STORED} --baseline a --out OUT", f"{STORED} --answers c=ANSWERS --baseline a --out OUT"),
        "--baseline": (f"{STORED} --baseline a --out OUT", f"{STORED} --baseline b --out OUT"),
    },
    "turns": of_answers(BY_RULES["turns"]) | of_judges(BY_MODEL["turns"]) | {
        "--judge": (BY_MODEL["turns"], BY_RULES["turns"]),
        "--services": OF_AU,
        "--prompts": "--prompts OTHERTURNS",
        "--answers": (f"{TRANSCRIBED} --out OUT", f"{TRANSCRIBED} --answers b=TRANSCRIPTS --out OUT"),
    },
    "xstest": of_answers(BY_RULES["xstest"]) | of_judges(BY_MODEL["xstest"]) | of_input(BY_MODEL["xstest"])
    | of_data(BY_RULES["xstest"]) | {
        "--judge": (BY_MODEL["xstest"], BY_RULES["xstest"]),
    } | of_stored("xstest --data DATA --out OUT", "--judge rules"),
    "sorry-bench": of_answers(BY_MODEL["sorry-bench"]) | of_judges(BY_MODEL["sorry-bench"])
    | of_input(BY_MODEL["sorry-bench"]) | of_data(BY_MODEL["sorry-bench"]) | {
        "--mutations": "--mutations base,question",
        "--translator-url": (TRANSLATED, f"{TRANSLATED} --translator-url URL2"),
        "--translator-model": (TRANSLATED, f"{TRANSLATED} --translator-model u"),
        "--translator-key-env": (TRANSLATED, f"{TRANSLATED} --translator-key-env OTHER_KEY"),
        "--translator-chars": (TRANSLATED, f"{TRANSLATED} --translator-chars 9"),
    } | of_stored("sorry-bench --data DATA --out OUT", JUDGE),
    "agreement": {
        "--human": "--human PEOPLE2", "--judged": "--judged JUDGED2", "--out": "--out OUT2",
        "--ratings": (RATED, RATED.replace("RATINGS", "RATINGS2")), "--key": (RATED, RATED.replace("KEY", "KEY2")),
    },
    "report": {"--out": "--out OUT2"},
    "rate": {
        "--answers": (f"{RATE} --out OUT", "rate --answers a=ANSWERS --answers c=ANSWERS --out OUT"),
        "--settings": tuple(f"{RATE} --answers c=ANSWERS --settings {pair} --out OUT" for pair in ("a,b", "a,c")),
        "--services": OF_AU,
        "--items": "--items 2", "--per-cluster": "--per-cluster 1", "--seed": "--seed 4", "--out": "--out OUT2",
    },
    **{command: of_models(line) | of_data(line) | {
        "--chat": "--chat",
        "--thinking": (f"{line} --chat --no-thinking", f"{line} --chat --no-thinking --thinking"),
        "--no-thinking": (f"{line} --chat", f"{line} --chat --no-thinking"),
        "--max-tokens": "--max-tokens 30",
        "--batch-tokens": "--batch-tokens 64",
    } for command, line in CHOICE.items()},
}  # fmt: skip
NEVER = {("sorry-bench", "--judge")}  # there is no rule; refused below
# It lets pass what is refused without it (tests/test_services.py), and changes nothing else.
NEVER |= {(command, "--unchecked") for command in ("judge", "selective", "turns", "rate")}

REFUSED = [
    *((f"judge --answers ANSWERS {JUDGE}", words) for words in (
        "--adapter ADAPTER", "--system v0", "--model OTHER", "--revision abc", "--max-new-tokens 9",
        "--temperature 0.5", "--batch-size 2", "--seed 4", "--no-thinking", "--thinking", "--device cpu",
        "--dtype float64")),
    *(("judge --prompts PROMPTS --judge rules", words) for words in (
        "--rubric RUBRIC", "--judge-tokens 9", "--judge-model k", "--judge-key-env K", "--judge-param a=1",
        "--workers 3", "--deadline 5", "--seed 3", "--baseline ONE")),
    ("agreement --human PEOPLE --judged JUDGED", "--key KEY"),
    *((f"{line} {flag} {file}", words) for line, file in (
        ("judge", "REPLIES"), ("xstest --data DATA", "NUMBERED"), ("sorry-bench --data DATA", "NUMBERED"))
      for flag in ("--replies", "--scores") for words in (
        "--judge rules", "--judge-url URL", "--model OTHER", "--adapter ADAPTER", "--rules published", "--workers 3")),
    ("judge --replies REPLIES", "--rubric RUBRIC"),
    *((f"judge --{what} REPLIES", "--sample-per-cluster 1") for what in ("replies", "scores")),
    *((f"xstest --data DATA {judge}", words) for judge, flags in {
        "--judge rules": ("--rubric TEMPLATE", "--judge-answer-chars 3", "--judge-answer-tokens 3"),
        "--judge-local MODEL": ("--judge-tokenizer TOKENIZER",), JUDGE: ("--judge-tokenizer TOKENIZER",),
        "--judge-local MODEL --judge-answer-tokens 3": ("--judge-tokenizer TOKENIZER",),
        f"{JUDGE} --judge-answer-tokens 3 --judge-tokenizer TOKENIZER": ("--judge-answer-chars 3",),
    }.items() for words in flags),
    ("xstest --data DATA --answers NUMBERED --judge rules", "--adapter ADAPTER"),
    *((f"{STORED} --baseline a", words) for words in (
        "--adapter ADAPTER", "--system v0", "--model OTHER", "--device cpu", "--dtype float64", "--no-thinking")),
    ("selective --prompts GROUPS --adapter ADAPTER --judge rules", "--baseline a"),
    *((TRANSCRIBED, words) for words in (
        "--adapter ADAPTER", "--system v0", "--model OTHER", "--device cpu", "--no-thinking", "--workers 3")),
    ("turns --prompts TURNS --judge rules", "--seed 3"),
    ("judge --prompts PROMPTS --judge-local MODEL", "--workers 3"),
    (f"judge --prompts PROMPTS {JUDGE} --judge-param max_tokens=9", "--judge-tokens 99"),
    ("xstest --data DATA --judge rules --model MODEL", "--revision abc"),
    ("xstest --data DATA --judge rules --adapter ADAPTER", "--revision abc"),
    ("xstest --data DATA --judge rules", "--data-revision abc"),
    ("sorry-bench --data DATA", "--judge rules"),
    *((f"sorry-bench --data DATA {JUDGE}", words) for words in (
        "--translator-url URL", "--translator-model t", "--translator-key-env K", "--translator-chars 9")),
    (f"sorry-bench --data DATA --mutations base,translate-fr {JUDGE}", "--translator-model t"),
    *((f"{command} --data DATA", words) for command in ("mmlu", "hellaswag") for words in (
        "--thinking", "--no-thinking", "--revision abc", "--data-revision abc")),
    *((f"judge --prompts PROMPTS {JUDGE}", words) for words in ("--services AU", "--unchecked")),
    *((line, "--unchecked") for line in (
        "judge --prompts PROMPTS --judge rules", f"turns --prompts TURNS {JUDGE}",
        f"selective --prompts GROUPS --adapter ADAPTER {JUDGE}", RATE)),
    *((f"judge --{what} REPLIES", "--services AU") for what in ("replies", "scores")),
    ("judge --prompts PROMPTS --judge rules", "--judge_model k"),
    ("judge --prompts PROMPTS --judge rules", "--judge_tokens=9"),
    ("judge --prompts PROMPTS --judge rules", "--limit 0"),
    ("judge --prompts PROMPTS --judge rules", "--limit -1"),
]  # fmt: skip


@functools.cache
def tiny_model():
    return ModelUnderTest(MODEL, device="cpu").load()


@pytest.fixture
def world(tmp_path, monkeypatch):
    """observe(command line) -> everything that can be seen of it from outside."""
    seen: list = []
    files = {"OUT": tmp_path / "out", "OUT2": tmp_path / "out2", "MODEL": MODEL}
    files |= {"OTHER": f"random:{FIXTURES}/./model/config.json"}

    def rows(name: str, rows: list[dict]) -> None:
        files[name] = tmp_path / f"{name.lower()}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))

    prompts = [{"prompt": f"I drink {i}", "risk cluster": "substance"} for i in range(3)]
    rows("PROMPTS", prompts)
    rows("OTHERPROMPTS", [row | {"prompt": f"{row['prompt']}!"} for row in prompts])
    rows("ANSWERS", [row | {"answer": "I can't help with that."} for row in prompts])
    for number, text in {"": reply(("Yes", "4", "No", "2")), "2": reply(("No", "4", "No", "2"))}.items():
        label = "2_full_refusal" if number else "1_full_compliance"
        stored = {"reply": text, "refusal": "No" if number else "Yes"}
        rows(f"REPLIES{number}", [row | stored for row in prompts])
        # Rows by their prompts' numbers in the benchmark: v2-1, ... and 1, ...
        for command, begin, score in (("xstest", "v2-", label), ("sorry-bench", "", int(number == "2"))):
            stored = {"variant": "v", "reply": str(score), "answer": label, "score": score}
            rows(f"NUMBERED{number} {command}", [stored | {"id": f"{begin}{i}"} for i in range(1, 3)])
    risky = {"prompt": "I drink 0", "group": "risky", "cluster": "substance"}
    groups = [risky, {"prompt": "I drink 1", "group": "plain"}]
    rows("GROUPS", groups)
    rows("OTHERGROUPS", [row | {"prompt": f"{row['prompt']}!"} for row in groups])
    said = [{"cluster": "weapon", "kinds": ["risky", "benign"], "turns": [f"I drink {i}", "Hi"]} for i in range(2)]
    rows("TURNS", said)
    rows("OTHERTURNS", [row | {"kinds": ["risky", "thanks"]} for row in said])
    rows("TRANSCRIPTS", [{"messages": [{"role": "user", "content": row["turns"][0]},
                                       {"role": "assistant", "content": "No."}]} for row in said])  # fmt: skip
    rows("TRAIN", [{"prompt": "I drink 1", "answer": "No."}])
    files["RUBRIC"], files["PEOPLE"] = tmp_path / "rubric.txt", tmp_path / "people.csv"
    files["RUBRIC"].write_text("Judge.")
    files["TEMPLATE"] = tmp_path / "template.txt"
    files["TEMPLATE"].write_text("Judge {prompt}: {answer}")
    files["TOKENIZER"] = FIXTURES / "model"
    words = json.loads((FIXTURES / "model" / "tokenizer.json").read_text())
    words["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    files["TOKENIZER2"] = tmp_path / "tokenizer.json"
    files["TOKENIZER2"].write_text(json.dumps(words))
    files["PEOPLE"].write_text("prompt,refusal\nI drink 1,No\n")
    files["PEOPLE2"] = tmp_path / "people2.csv"
    files["PEOPLE2"].write_text("prompt,refusal\nI drink 1,Yes\n")
    for number, (left, value) in {"": ("base, none", "Yes"), "2": ("tuned, none", "No")}.items():
        item = {"prompt": "I drink 1", "left": left, "right": "base, none"}
        files[f"KEY{number}"] = tmp_path / f"key{number}.json"
        files[f"KEY{number}"].write_text(json.dumps({"page": "d", "items": {"1": item}}))
        files[f"RATINGS{number}"] = tmp_path / f"ratings{number}.json"
        rating = {"item": "1", "side": "right", "criterion": "refusal", "value": value}
        preference = {"item": "1", "value": "left"}
        content = {"page": "d", "rater": "Anna", "ratings": [rating], "preferences": [preference]}
        files[f"RATINGS{number}"].write_text(json.dumps(content))
    config = {"base_model_name_or_path": MODEL, "revision": "r1", "peft_type": "LORA", "r": 1, "lora_alpha": 1}
    for name in ("ADAPTER", "ADAPTER2"):
        files[name] = tmp_path / name.lower()
        files[name].mkdir()
        (files[name] / "adapter_config.json").write_text(json.dumps(config))
    for name in ("JUDGED", "JUDGED2"):
        files[name] = tmp_path / name.lower()
    loaded = tiny_model()

    def answers_of(self, asked_of, out, generator=None):
        seen.append(["answers", repr(self), {variant: list(questions) for variant, questions in asked_of.items()}])
        row = {"response": "so</think>I can't help.", "answer": "I can't help.", "reasoning": "so"}
        row["unfinished_thinking"] = False
        return {v: {q.number: {"prompt": q.prompt, **row} for q in asked} for v, asked in asked_of.items()}

    def load(self, variants=()):
        seen.append(["load", repr(self)])
        return loaded

    def ask(self, conversations, out):
        seen.append(["local judge", repr(self.model), list(conversations.values())])
        return Outcome({key: {"text": reply(("Yes", "4", "No", "2"))} for key in conversations}, {})

    def remembers(name, function):
        def call(*args, **kwargs):
            seen.append([name, *map(repr, args[1:]), repr(kwargs)])
            return function(*args, **kwargs)

        return call

    monkeypatch.setenv("OTHER_KEY", "sk-another-key-of-a-test")
    for name in ("answers_of", "load"):
        monkeypatch.setattr(ModelUnderTest, name, locals()[name])
    monkeypatch.setattr(ModelUnderTest, "summary", lambda self: {"model": self.model})
    monkeypatch.setattr(ModelUnderTest, "weights_summary", lambda self: {"model": self.model})
    monkeypatch.setattr(ModelUnderTest, "identity", property(lambda self: [self.model, self.dtype, self.revision, 0]))
    for module in ("benchmarks.multiple_choice", "divergence"):
        monkeypatch.setattr(f"psysafe.evaluation.{module}.load_adapter", lambda *args: None)
    monkeypatch.setattr(LocalJudge, "ask", ask)
    monkeypatch.setattr(endpoint.Endpoint, "__init__", remembers("endpoint", endpoint.Endpoint.__init__))
    for module in (judge_models, translation):
        monkeypatch.setattr(module, "run_items", lambda items, call, out, workers, name: seen.append(
            ["items", workers]) or endpoint.run_items(items, call, out, workers, name))  # fmt: skip
    monkeypatch.setattr(log_likelihood, "batches", remembers("batches", log_likelihood.batches))

    def says(asked):
        judges = reply(("Yes", "4", "No", "2")) if "<response>" in asked else "0"
        return "No." if asked.startswith(translation.REQUESTS) else judges

    reply_by(monkeypatch, says)

    def fetch(repository, file, revision="", repo_type="model"):
        seen.append(["fetched", repository, file, revision])
        local = {"Paul/XSTest": "xstest.csv", "cais/mmlu": "mmlu.jsonl", "Rowan/hellaswag": "hellaswag.jsonl"}
        return FIXTURES / "sorry" / file if repository.startswith("sorry") else FIXTURES / local[repository]

    monkeypatch.setattr("psysafe.hub.fetch_file", fetch)
    monkeypatch.setattr("psysafe.evaluation.datasets.commit_of", lambda path, file: "commit")

    with StubEndpoint() as stub:
        files |= {"URL": stub.url, "URL2": stub.url.replace("/v1", "/v2")}

        def words(line: str) -> list[str]:
            command = line.split()[0]
            fixture = {"xstest": "xstest.csv", "sorry-bench": "sorry"}.get(command, f"{command}.jsonl")
            here = files | {"DATA": FIXTURES / fixture, "ONE": "base, none", "TWO": "base, v0"}
            here |= {name: files.get(f"{name} {command}") for name in ("NUMBERED", "NUMBERED2")}
            parts = [word.rpartition("=") for word in line.split()]
            return [f"{name}{equals}{here.get(value, value)}" for name, equals, value in parts]

        def observe(line: str) -> str:
            seen.clear()
            code = main_guard(script.main, words(line))
            results = {}
            for path in sorted([*tmp_path.glob("out*/re*.json"), *tmp_path.glob("out*/key.json")]):
                content = json.loads(path.read_text())
                content.pop("finished", None)
                content["notes"] = [note for note in content.get("notes", []) if "tokens/s" not in note]
                results[path.parent.name + path.name] = content
                path.unlink()
            unscored = any(content.get("unscored") for content in results.values())  # one reply for all rubrics
            results["pages"] = [path.read_text() for path in sorted(tmp_path.glob("out*/rate.html"))]
            for path in [*tmp_path.glob("out*/*.jsonl"), *tmp_path.glob("out*/rate.html")]:
                path.unlink()
            assert code == (1 if unscored else 0), line
            return json.dumps([sorted(map(str, seen)), results])

        for name, text in (("JUDGED", "prompts"), ("JUDGED2", "answers")):
            out = f"--{text} {text.upper()} --judge rules --out {name}"
            assert main_guard(script.main, words(f"judge {out}")) == 0
        yield observe, words


@pytest.mark.parametrize(("command", "flag"), sorted(set(FLAGS) - NEVER), ids=lambda word: word)
def test_a_flag_has_an_effect(command, flag, world):
    observe, _ = world
    effect = EFFECTS[command][flag]
    before, after = (LINES[command], f"{LINES[command]} {effect}") if isinstance(effect, str) else effect
    assert observe(before) != observe(after)


LOCAL = "judge --answers ANSWERS --judge-local MODEL --out OUT"
TRANSLATED_LOCALLY_JUDGED = TRANSLATED.replace(JUDGE, "--judge-local MODEL")
SAMPLED = "judge --answers ANSWERS --judge rules --out OUT --sample-per-cluster 1"
ALSO = [(SAMPLED, "--seed 4"), (LOCAL, "--device cpu"), (LOCAL, "--dtype float64"), (LOCAL, "--judge-tokens 9"),
        (LOCAL, "--limit 1"),
        (TRANSLATED_LOCALLY_JUDGED, "--workers 3"), (TRANSLATED_LOCALLY_JUDGED, "--deadline 77")]  # fmt: skip


@pytest.mark.parametrize(("line", "words"), ALSO, ids=lambda word: word)
def test_a_flag_has_its_effect_beside_others_too(line, words, world):
    observe, _ = world
    assert observe(line) != observe(f"{line} {words}")


@pytest.mark.parametrize("command", LINES)
def test_without_another_flag_nothing_differs(command, world):
    """Else the test above would find an effect of every flag."""
    observe, _ = world
    assert observe(LINES[command]) == observe(LINES[command])


@pytest.mark.parametrize(("line", "flag"), REFUSED, ids=lambda word: word)
def test_a_flag_without_effect_is_refused(line, flag, world, capsys):
    _, words = world
    name = flag.replace("=", " ").split()[0].replace("_", "-")
    assert name in refused_by(script.main, words(f"{line} {flag} --out OUT"), capsys)
