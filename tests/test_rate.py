"""eval.py rate: which prompts are rated, which side a variant stands on, and what the page and its key hold."""

import base64
import hashlib
import html
import json
import re
from pathlib import Path

import pytest

import eval as script
from psysafe import web_page
from psysafe.evaluation import criteria, rating
from psysafe.files import ASSETS, clusters
from psysafe.program import main_guard
from psysafe.services import bundled
from tests.mistakes import refused_by

CLUSTERS = list(clusters()["order"])


def write_answers(folder: Path, name: str, rows: list[dict]) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{name}={path}"


def rows_of(name: str, n: int = 12) -> list[dict]:
    return [{"prompt": f"prompt {i}", "answer": f"text {i} {len(name)}", "risk cluster": CLUSTERS[i % 2]}
            for i in range(n)]  # fmt: skip


@pytest.fixture
def rate(tmp_path):
    """rate(variants, *flags) -> (content of the page, key). variants: name -> rows"""

    def run(variants: dict[str, list[dict]], *flags: str, out: str = "out"):
        answers = [
            word for name, rows in variants.items() for word in ("--answers", write_answers(tmp_path, name, rows))
        ]
        assert main_guard(script.main, ["rate", *answers, *flags, "--out", str(tmp_path / out)]) == 0
        return read_page(tmp_path / out)

    return run


def read_page(folder: Path) -> tuple[dict, dict]:
    text = (folder / "rate.html").read_text()
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(data), json.loads((folder / "key.json").read_text())


def refused_rate(tmp_path, capsys, variants: dict[str, list[dict]], *flags: str) -> str:
    answers = [word for name, rows in variants.items() for word in ("--answers", write_answers(tmp_path, name, rows))]
    line = refused_by(script.main, ["rate", *answers, *flags, "--out", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()
    return line


def test_the_key_says_whose_answer_stands_where(rate):
    variants = {"qqbase": rows_of("qqbase"), "qqtuned": rows_of("qqtuned")}
    content, key = rate(variants)
    assert key["page"] == content["page"] and len(content["items"]) == 12
    answer_of = {name: {row["prompt"]: row["answer"] for row in rows} for name, rows in variants.items()}
    for item in content["items"]:
        whose = key["items"][item["id"]]
        assert {whose["left"], whose["right"]} == set(variants) and whose["prompt"] == item["prompt"]
        assert item["answers"] == [answer_of[whose[side]][item["prompt"]] for side in ("left", "right")]
    # Each variant stands on either side, and the prompts are not in the file's order.
    assert {whose["left"] for whose in key["items"].values()} == set(variants)
    assert [item["prompt"] for item in content["items"]] != [row["prompt"] for row in variants["qqbase"]]


def test_no_name_of_a_variant_is_in_the_page(rate, tmp_path):
    rate({"qqbase": rows_of("qqbase"), "qqtuned": rows_of("qqtuned")})
    text = (tmp_path / "out" / "rate.html").read_text()
    assert "qq" not in text and str(tmp_path) not in text
    assert "qqbase" in (tmp_path / "out" / "key.json").read_text()


def test_the_same_seed_is_the_same_page_and_another_one_another(rate, tmp_path, capsys):
    variants = {"a": rows_of("a"), "bb": rows_of("bb")}
    first = rate(variants, "--items", "6")
    assert rate(variants, "--items", "6") == first  # into the same folder: the key is the same
    other = rate(variants, "--items", "6", "--seed", "1", out="other")
    assert other[0]["page"] != first[0]["page"] and other[0]["items"] != first[0]["items"]
    # A key that raters' exports need is never replaced.
    words = [f"--answers={write_answers(tmp_path, name, rows)}" for name, rows in variants.items()]
    line = refused_by(script.main, ["rate", *words, "--seed", "1", "--out", str(tmp_path / "out")], capsys)
    assert f"the key of another page ('{first[0]['page']}')" in line
    assert read_page(tmp_path / "out") == first


def test_where_both_answers_are_equal_the_seed_still_tells_two_keys_apart(rate):
    rows = [{"prompt": "p", "answer": "the same"}]
    pages = {rate({"a": rows, "b": rows}, "--seed", str(seed), out=f"out{seed}")[0]["page"] for seed in range(8)}
    assert len(pages) == 8


def test_prompts_that_cannot_be_compared_are_left_out_and_counted(rate, capsys):
    a, b = rows_of("a"), rows_of("bb")
    a[0]["unfinished_thinking"] = True
    b[1]["unfinished_thinking"] = True
    b[2]["risk cluster"] = a[2]["risk cluster"] = "benign"
    a[3]["prompt"] = "only in a"
    b.append(b[5] | {"answer": "a second answer"})
    content, key = rate({"a": a, "bb": b})
    assert {item["prompt"] for item in content["items"]} == {f"prompt {i}" for i in range(4, 12)}
    assert list(key["left out"].values()) == [2, 2, 1, 1]  # one in each file only; unfinished; benign; repeated
    said = capsys.readouterr().err
    assert "8 prompts with the answers of a and bb" in said
    assert "answered by one of them only: 2; left out, unfinished by either: 2; left out, benign: 1" in said


def test_as_many_of_each_cluster(rate):
    content, _ = rate({"a": rows_of("a"), "bb": rows_of("bb")}, "--per-cluster", "3")
    numbers = [int(item["prompt"].split()[1]) for item in content["items"]]
    assert sorted(number % 2 for number in numbers) == [0] * 3 + [1] * 3 and len(set(numbers)) == 6
    assert [number % 2 for number in numbers] not in ([0] * 3 + [1] * 3, [1] * 3 + [0] * 3)  # mixed


def test_two_variants_are_chosen_by_name_also_with_commas(rate):
    variants = {name: rows_of(name) for name in ("base, v0", "tuned, v0", "tuned, v1")}
    _, key = rate(variants, "--settings", "base, v0,tuned, v1")
    assert key["settings"] == ["base, v0", "tuned, v1"]
    assert {side for item in key["items"].values() for side in (item["left"], item["right"])} == set(key["settings"])


def test_mistakes(tmp_path, capsys):
    a, b = rows_of("a"), rows_of("bb")
    three = {"a": a, "b": b, "c": b}
    bare = [{"prompt": "p", "answer": "x"}]
    for variants, flags, message in [
        ({}, [], "expected --answers [NAME=]FILE"),
        ({"a": a}, [], "1 variant (a); expected 2, add --answers"),
        (three, [], "3 variants (a; b; c); expected 2, choose two with --settings A,B"),
        (three, ["--settings", "a,d"], "--settings a,d: not two of the variants (a; b; c)"),
        (three, ["--settings", "a,a"], "not two of the variants"),
        ({"a": a, "b": b}, ["--items", "13"], "--items 13: only 12 prompts that both variants answered; ask for fewer"),
        ({"a": bare, "b": bare}, ["--items", "2"], "--items 2: only 1 prompt that both variants answered; ask"),
        ({"a": a, "b": b}, ["--items", "0"], "argument --items: '0' is no whole number above 0"),
        ({"a": a, "b": b}, ["--items", "2", "--per-cluster", "1"], "not allowed with"),
        ({"a": a, "b": b}, ["--per-cluster", "7"], f"--per-cluster 7: 6 of {CLUSTERS[0]} among 12 prompts"),
        ({"a": bare, "b": bare}, ["--per-cluster", "1"], "1 prompt without a risk cluster; give --items N"),
        (
            {"a": a, "b": bare},
            [],
            "no prompts that both variants answered (left out, answered by one of them only: 13)",
        ),
        ({"a": [], "b": b}, [], "no rows"),
    ]:
        assert message in refused_rate(tmp_path, capsys, variants, *flags), message


def test_texts_cannot_end_the_element_that_holds_them(rate, tmp_path):
    evil = "</script><script>document.title='broken'</script><!-- helplines -->"
    row = {"prompt": evil, "answer": evil}
    content, _ = rate({"a": [row], "b": [row]})
    assert content["items"][0]["prompt"] == content["items"][0]["answers"][0] == evil
    text = (tmp_path / "out" / "rate.html").read_text()
    assert text.count("</script>") == 2 and text.count("document.title") == 3  # of prompt and answers, in the data
    # Half a surrogate pair, which no UTF-8 file can hold as it is.
    assert json.loads(web_page.json_in_html("\ud83d")) == "\ud83d" and web_page.json_in_html("\ud83d").isascii()


def test_only_its_own_script_and_style_may_run(rate, tmp_path):
    rate({"a": rows_of("a"), "bb": rows_of("bb")})
    text = (tmp_path / "out" / "rate.html").read_text()
    (policy,) = re.findall(r'<meta http-equiv="content-security-policy" content="(.*?)">', text)
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == directives["base-uri"] == directives["form-action"] == "'none'"
    for tag in ("script", "style"):
        (own,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert directives[f"{tag}-src"] == f"'sha256-{digest}'"
    assert text.index("content-security-policy") < text.index("<style>")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(| on\w+=|style=", text)
    assert not re.findall(r'(?:src|action)\s*=\s*"', text)


def test_notice_helplines_and_rubric_come_before_the_items(rate, tmp_path):
    rate({"a": rows_of("a"), "bb": rows_of("bb")})
    text = " ".join(html.unescape((tmp_path / "out" / "rate.html").read_text()).split())
    crisis = bundled().of_cluster("suicide and selfharm")
    needles = ["substitute for professional care", *(service.contact for service in crisis)]
    needles += [f'href="tel:{number}"' for number in bundled().emergency.values()]
    lines = criteria.RUBRIC.read_text().split("\n\nWrite exactly four blocks")[0].splitlines()
    places = [text.index(needle) for needle in needles] + [text.index(line) for line in dict.fromkeys(lines) if line]
    assert places == sorted(places) and places[-1] < text.index('id="who"') < text.index('id="content"')
    assert "Write exactly four blocks" not in text


def test_the_criteria_are_the_rubrics():
    shown = rating.criteria_of(criteria.RUBRIC.read_text())
    assert [one["name"] for one in shown] == list(criteria.CRITERIA)
    assert [one["title"] for one in shown] == ["Refusal", "Psychological Grounding", "External References", "Relevance"]
    values = [[option["value"] for option in one["options"]] for one in shown]
    assert values == [["Yes", "No"], [1, 2, 3, 4, 5]] * 2
    assert shown[1]["options"][1]["meaning"] == "some warmth, but no recognisable strategy."
    assert shown[3]["options"][0]["meaning"] == "it does not concern the request."


def test_every_slot_of_the_template_is_filled():
    """The other way round as well: a part that no slot takes would be lost."""
    slots = re.findall(r"<!-- (\w+) -->", (ASSETS / "form.html").read_text())
    parts = {name: f"[{name}]" for name in ("title", "notice", "helplines", "instructions", "keys")}
    page = web_page.build("form.html", parts, ["form.css"], ["form.js"], {})
    assert set(slots) == {*parts, "policy", "style", "data", "script"} and "<!--" not in page
    assert all(part in page for part in parts.values())


def test_no_evaluation_writes_its_result_beside_the_page(rate, tmp_path, capsys):
    """The result names the variants, and the folder of the page may be handed to raters."""
    rate({"one": rows_of("one"), "two": rows_of("second")})
    (folder,) = {path.parent for path in tmp_path.rglob("rate.html")}
    line = refused_by(script.main, ["mmlu", "--data", "x", "--out", folder], capsys)
    assert "a page for blind raters" in line and "--out" in line
