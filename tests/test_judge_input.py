"""What a judge is shown: instructions of a file for all three judges, and an answer that is cut where it is said."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import eval as script
from psysafe.evaluation import behaviour, criteria, judge_input, judge_models
from psysafe.evaluation.benchmarks import sorry_bench
from psysafe.evaluation.benchmarks.xstest import XSTest
from psysafe.evaluation.judge_input import CUT_MARK, Instructions, JudgeInput, read_instructions, read_tokenizer
from psysafe.files import ASSETS
from psysafe.program import UserError
from tests.mistakes import refused, refused_by
from tests.stub_endpoint import StubEndpoint, reply_by
from tests.test_eval_refusals import FIXTURES, arguments
from tests.test_eval_run import MODEL, run

OWN = Instructions("own system", "own {prompt} {answer}")
SYSTEM = 'You class answers.\n{{json}} is fine: {"a": 1}, \\boxed{}.'
USER = "[Question]\n{prompt}\n\n[Answer]\n{answer}\n\nReply {{x}} or {1}."


@pytest.fixture
def file(tmp_path):
    def write(content: str | bytes, name: str = "judge.toml") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def toml(user: str = USER, **more: str) -> str:
    return "".join(f"{key} = '''\n{text}'''\n" for key, text in {**more, "user": user}.items())


def test_a_file_with_a_system_part(file):
    read = read_instructions(file(toml(system=SYSTEM)), OWN)
    system, user = read.messages("What {answer}?", "It is {prompt}.")
    assert system == {"role": "system", "content": 'You class answers.\n{json} is fine: {"a": 1}, \\boxed{}.'}
    # What stands in the texts is never a placeholder.
    assert user == {"role": "user", "content": "[Question]\nWhat {answer}?\n\n[Answer]\nIt is {prompt}.\n\n"
                    "Reply {x} or {1}."}  # fmt: skip
    alone = read_instructions(file(USER, "judge.txt"), OWN)
    assert alone.messages("p", "") == [{"role": "user", "content": "[Question]\np\n\n[Answer]\n\n\nReply {x} or {1}."}]
    other = read_instructions(file(USER + "!", "judge.txt"), OWN)
    assert "judge.txt (sha256 " in alone.source and alone.source != other.source


def test_a_text_without_placeholders_is_the_four_criterias_rubric(file):
    path = file("Be fair, and write {{score}}.\n", "rubric.txt")
    read = read_instructions(path, OWN, may_be_rubric=True)
    assert (read.system, read.user) == ("Be fair, and write {score}.", OWN.user)
    refused(r"no \{prompt\} in it; expected \{prompt\} and \{answer\}", read_instructions, path, OWN)


@pytest.mark.parametrize(("content", "name", "message"), [
    (toml("{prompt} {anser}"), "a.toml", r"unknown placeholder \{anser\}; expected \{prompt\} and \{answer\}"),
    ("{question} {answer}", "a.txt", r"unknown placeholder \{question\}"),
    ("{prompt}", "a.txt", r"no \{answer\} in it"),
    (toml("{answer}"), "a.toml", r"no \{prompt\} in it"),
    (toml("{{prompt}} {answer}"), "a.toml", r"no \{prompt\} in it"),
    (toml(system="{prompt}"), "a.toml", r"\{prompt\} in the system part"),
    ("", "a.txt", r"no \{prompt\} in it"),
    ("", "a.toml", "no user in it"),
    ("system = 'x'", "a.toml", "no user in it"),
    ("user = 3", "a.toml", "user is 3; expected a text"),
    (toml() + "usr = 'x'", "a.toml", "key 'usr'; expected system, user, cut_mark"),
    ("user = 'x", "a.toml", "malformed TOML"),
    ("a = " + "[" * 9000, "a.toml", "malformed TOML"),
    (b"caf\xe9", "a.txt", "not UTF-8 at line 1"),
])  # fmt: skip
def test_a_broken_file_is_one_line(content, name, message, file):
    path = file(content, name)
    assert str(path) in refused(message, read_instructions, path, OWN)


PIECES = st.sampled_from([b"system = ", b"user = ", b"cut_mark = ", b"'''", b"{prompt}", b"{answer}", b"{{x}}",
                          b"{y}", b"\n", b"a", b"\xff", b"[", b"=", b'"', b"3"])  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(PIECES, max_size=12), st.sampled_from(["f.toml", "f.txt"]), st.booleans())
def test_any_file_is_read_or_refused_in_one_line(file, pieces, name, may_be_rubric):
    try:
        read = read_instructions(file(b"".join(pieces), name), OWN, may_be_rubric)
    except UserError as error:
        assert name in str(error) and "\n" not in str(error)
    else:
        assert {"\x01", "\x02"} <= set(read.messages("\x01", "\x02")[-1]["content"])


def test_a_file_that_cannot_be_read(file, tmp_path):
    refused("none.txt: cannot be read .No such file", read_instructions, tmp_path / "none.txt", OWN)
    refused("cannot be read .Is a directory", read_instructions, tmp_path, OWN)
    refused("more than 1,000,000 bytes", read_instructions, file("x" * 1_000_001, "long.txt"), OWN)
    refused("tokenizer.json: cannot be read", read_tokenizer, tmp_path)
    file("{}", "tokenizer.json")
    refused("tokenizer.json: no tokenizer", read_tokenizer, tmp_path)


def test_our_own_wording_is_what_it_was():
    """Replies are kept by what was asked: another spelling would ask every judge again."""
    assert sorry_bench.OWN_INSTRUCTIONS.messages("REQUEST", "ANSWER")[0]["content"].endswith(
        "Answer with the score only.\n\n[Request]\nREQUEST\n\n[Response]\nANSWER\n\n[Score]")  # fmt: skip
    system, user = behaviour.messages("P", "A")
    assert system["content"].startswith("You class how") and system["content"].endswith("the class alone.")
    assert user["content"] == "<prompt>\nP\n</prompt>\n\n<response>\nA\n</response>\n\nWhich class?"
    system, user = criteria.own_instructions().messages("P", "A")
    assert system["content"] == criteria.RUBRIC.read_text().strip()
    assert user["content"].startswith("<request>\nP\n</request>\n\n<response>\nA\n</response>\n\nEvaluate")


# The cut


@given(st.text(max_size=40), st.integers(1, 12))
def test_a_cut_at_characters(text, limit):
    shown = JudgeInput(OWN, limit).cut(text)
    assert shown == (text if len(text) <= limit else text[:limit] + CUT_MARK)


TOKENIZER = read_tokenizer(FIXTURES / "model")
ORACLE = AutoTokenizer.from_pretrained(FIXTURES / "model")


@given(st.text(alphabet="ab c.\né🙂我मി\u0301", max_size=40), st.integers(1, 12))
def test_a_cut_at_tokens(text, limit):
    """The longest beginning of which no character stands in a later token, as transformers tells their places."""
    encoded = ORACLE(text, add_special_tokens=False, return_offsets_mapping=True)
    later = [start for start, _ in encoded["offset_mapping"][limit:]]
    shown = JudgeInput(OWN, limit, TOKENIZER).cut(text)
    assert shown == (text[: min(later)] + CUT_MARK if later else text)


def test_the_three_judges_by_a_file_and_cut_answers(tmp_path, monkeypatch):
    """What each judge is asked is the file's wording; the first table says whose it is, and how many were cut."""
    seen = []
    reply_by(monkeypatch, lambda asked: seen.append(asked) or "0")
    wording = tmp_path / "w.toml"
    wording.write_text("system = 'S'\nuser = 'Q {prompt} A {answer} E'\n")
    rows = [json.loads(line) for line in (FIXTURES / "sorry" / "question.jsonl").read_text().splitlines()]
    answers = {"sorry-bench": [{"prompt": row["turns"][0], "answer": "x" * n} for n, row in enumerate(rows, 3)]}
    prompts = [line.split(",")[1] for line in (FIXTURES / "xstest.csv").read_text().splitlines()[1:]]
    answers["xstest"] = [{"prompt": prompt, "answer": "x" * n} for n, prompt in enumerate(prompts, 3)]
    answers["judge"] = [{"prompt": f"p{n}", "answer": "x" * n} for n in range(3, 9)]
    data = {"sorry-bench": ["--data", str(FIXTURES / "sorry")], "xstest": ["--data", str(FIXTURES / "xstest.csv")]}
    with StubEndpoint() as stub:
        for command, given_rows in answers.items():
            (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given_rows))
            out = tmp_path / command
            words = [command, *data.get(command, []), "--answers", str(tmp_path / "a.jsonl"), "--judge-url", stub.url,
                     "--judge-model", "j", "--rubric", str(wording), "--out", str(out)]  # fmt: skip
            seen.clear()
            run(*words, "--judge-answer-chars", "5")
            n = len(given_rows)
            texts = ["x" * i + (CUT_MARK if i < length else "") for length in range(3, n + 3) for i in [min(length, 5)]]
            pairs = zip(given_rows, texts, strict=True)
            assert sorted(seen) == sorted(f"Q {row['prompt']} A {text} E" for row, text in pairs)
            result = json.loads((out / "result.json").read_text())
            note = f"An answer is shown up to 5 characters: {n - 3} of {n} are cut."
            assert f"Judge's instructions: {result['settings']['rubric']}. {note}" in result["tables"][0]["note"]
            assert result["settings"]["rubric"].startswith(f"{wording} (sha256 ")
            page = (out / "transcript.md").read_text()
            assert page.count("\nj, shown the first 5 characters: **") == n - 3 and page.count("\nj: **") == 3
            assert not any("this project's wording" in text for text in result["notes"])
            # Another text is another question; the same one is not asked again.
            before = len(seen)
            run(*words, "--judge-answer-chars", "5")
            assert len(seen) == before
            wording.write_text(wording.read_text().replace("E'", "F'"))
            run(*words, "--judge-answer-chars", "5")
            assert len(seen) == 2 * before
            wording.write_text(wording.read_text().replace("F'", "E'"))


def test_without_a_flag_xstest_cuts_where_the_publication_does(tmp_path, monkeypatch):
    seen = []
    reply_by(monkeypatch, lambda asked: seen.append(asked) or "1_full_compliance")
    prompt = (FIXTURES / "xstest.csv").read_text().splitlines()[1].split(",")[1]
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": prompt, "answer": "x" * 7000}) + "\n")
    with StubEndpoint() as stub:
        words = ["xstest", "--data", str(FIXTURES / "xstest.csv"), "--answers", str(tmp_path / "a.jsonl"),
                 "--judge-url", stub.url, "--judge-model", "j", "--out", str(tmp_path / "out")]  # fmt: skip
        run(*words)
        run(*words, "--judge-answer-chars", "0")
        tokens = [*words, "--judge-answer-tokens", "6"]
        run(*tokens, "--judge-tokenizer", str(FIXTURES / "model"))
    in_six_tokens = len(ORACLE.decode(ORACLE("x" * 7000)["input_ids"][:6]))
    assert [asked.count("x") for asked in seen] == [6000, 7000, in_six_tokens]
    assert [CUT_MARK in asked for asked in seen] == [True, False, True]


def test_a_local_judge_counts_its_own_tokens():
    words = ["--judge-local", MODEL, "--judge-answer-tokens", "6", "--out", "x"]
    args = arguments(XSTest(), *words)
    (judge,) = judge_models.every_from_arguments(args, 0.0)
    shown = judge_input.from_arguments(args, judge, OWN, chars=6000)
    beginning = ORACLE.decode(ORACLE("x" * 7000)["input_ids"][:6])
    assert shown.cut("x" * 7000) == beginning + CUT_MARK
    assert shown.settings["answer shown to the judge"] == f"6 tokens of {MODEL}"
    assert shown.note(1, 2).endswith("An answer is shown up to 6 tokens of the judge: 1 of 2 are cut.")


def test_tokens_of_an_endpoint_need_a_tokenizer(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "answer": "a"}\n')
    words = ["judge", "--answers", tmp_path / "a.jsonl", "--judge-url", "http://localhost:1", "--judge-model", "j",
             "--judge-answer-tokens", "5", "--out", tmp_path / "out"]  # fmt: skip
    assert "give --judge-tokenizer DIR" in refused_by(script.main, words, capsys)
    shutil.copy(ASSETS / "rubric.txt", tmp_path / "tokenizer.json")
    assert "no tokenizer" in refused_by(script.main, [*words, "--judge-tokenizer", tmp_path], capsys)
