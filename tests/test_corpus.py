"""The data tools on small rows with known answers, and on the bundled ones."""

import json
import random
import re
from pathlib import Path

import pytest

from psysafe.corpus.__main__ import main
from psysafe.corpus.leakage import leakage
from psysafe.corpus.split import split
from psysafe.corpus.texts import prompts_of
from psysafe.data.rows import Row, read_rows
from psysafe.data.text import normalise
from psysafe.evaluation.overlap import overlap, training_prompts
from psysafe.files import ASSETS
from tests.mistakes import refused, refused_by

BUNDLED = str(ASSETS / "rows" / "train.jsonl")


def row(prompt: str, answer: str = "An answer.", cluster: str = "violence", **more) -> dict:
    fields = {"prompt": prompt, "answer": answer, "risk cluster": cluster, "risk category": "c"}
    return {**fields, "framework_name": "Motivational Interviewing", "author": "a", **more}


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def rows_of(*fields: dict) -> list[Row]:
    return [Row(f, Path("rows.json"), number) for number, f in enumerate(fields, 1)]


SAME = {
    "case and space": ("Can I rest?", "  can  i REST\n"),
    "curly apostrophe": ("I can\u2019t sleep", "I can't sleep"),
    "letter apostrophe": ("I can\u02bct sleep", "I can't sleep"),
    "double quotes": ("Say \u201chello\u201d now", 'Say "hello" now'),
    "single quotes": ("Say \u2018hello\u2019 now", "Say hello now"),
    "straight single quotes": ("Say 'hello' now", "Say hello now"),
    "underscore": ("What is _rest_?", "What is rest?"),
    "underscore between words": ("what_is_rest", "What is rest"),
    "punctuation": ("Stop, please \u2013 now!", "stop please now"),
    "composed": ("cafe\u0301", "caf\u00e9"),
    "full width": ("\uff32\uff25\uff33\uff34", "rest"),
    "sharp s": ("Stra\u00dfe", "STRASSE"),
}
DIFFERENT = {
    "apostrophe inside": ("we're here", "were here"),
    "one word more": ("I rest", "I rest now"),
    "joined words": ("can not", "cannot"),
    "accent": ("caf\u00e9", "cafe"),
    "no word in either": ("???", "!!!"),
    "no word in one": ("\U0001f642", "rest"),
    "part of a word": ("cat", "location"),
}


@pytest.mark.parametrize("pair", [*SAME, *DIFFERENT])
def test_both_leak_checks_agree_on_what_is_the_same_text(pair, tmp_path):
    """The search for leaks (against rows, benchmarks and system prompts) and the benchmarks' overlap, on every pair."""
    same = pair in SAME
    prompt, other = (SAME | DIFFERENT)[pair]
    training, held_out = write(tmp_path / "t.jsonl", [row(other, "A.")]), write(tmp_path / "h.jsonl", [row(prompt)])
    assert bool(leakage(read_rows(held_out), read_rows(training))) == same
    assert bool(leakage(read_rows(held_out), benchmarks=[training])) == same
    assert bool(leakage(read_rows(held_out), system_prompts={"S": f"(({other}))"})) == (same or pair == "one word more")
    counts = overlap([prompt], training_prompts([training]))
    assert (counts["exact"], counts["normalised"]) == (0, int(same))


def test_normalise():
    assert normalise("I can\u2019t \u2013 REALLY,  can\u2019t!") == "i can't really can't"
    assert normalise("\u2018It\u2019s _so_\u2019") == "it's so"
    assert normalise("\u1fb3") == normalise("\u1fbc")  # one Greek letter: casefold() takes it apart


def test_stats_counts(tmp_path, capsys):
    rows = [row("One?"), row("one"), row("Two", "Other.", "weapon", reasoning="why"), row("Three", cluster="weapon")]
    path = write(tmp_path / "rows.jsonl", rows)
    assert main(["stats", path, "--max-tokens", "10", "--json", str(tmp_path / "s.json"), "--plot", str(tmp_path)]) == 0
    numbers = json.loads((tmp_path / "s.json").read_text())
    assert numbers["rows"] == 4 and numbers["clusters"] == {"violence": 2, "weapon": 2}
    assert numbers["duplicate prompts"] == 2 and numbers["answers with more than half of their text in other rows"] == 3
    assert numbers["without reasoning"] == 3 and numbers["rows over the limit"] == 4
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "percentiles" in printed and numbers["tokenizer"] == "assets:tiny"
    assert "tokens, counted by the tokenizer of assets:tiny\n" in printed and "--model names the model that" in printed
    own = str(ASSETS / "tiny")
    assert main(["stats", path, "--model", own]) == 0
    printed = capsys.readouterr().out
    assert f"tokens, counted by the tokenizer of {own}\n" in printed and "--model" not in printed


def test_stats_of_clusters_that_are_no_texts(tmp_path, capsys):
    """Training takes such rows, so they are counted, not refused."""
    path = write(tmp_path / "rows.jsonl", [row("One?", cluster=["weapon"]), row("Two?", cluster=None), row("Three?")])
    assert main(["stats", path, "--json", str(tmp_path / "s.json")]) == 0
    numbers = json.loads((tmp_path / "s.json").read_text())
    assert numbers["clusters"] == {"-": 2, "violence": 1}
    names = [count["name"] for count in numbers["balance"]["clusters of risky rows"]]
    assert {'["weapon"]', "none", "violence"} <= {*names}


def test_split_is_stratified_and_reproducible(tmp_path, capsys):
    rows = [row(f"{cluster} {i}", cluster=cluster) for cluster in ("weapon", "substance") for i in range(250)]
    random.Random(9).shuffle(rows)
    rows.append(row("A quoted prompt?", cluster="weapon"))
    path = write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "system.txt").write_text("For example: a QUOTED prompt. And so on.")
    for out in ("a", "b"):
        flags = ["--out", str(tmp_path / out), "--quoted-in", str(tmp_path / "system.txt")]
        assert main(["split", path, *flags]) == 0
    names = ("train", "val", "test")
    parts = {name: read_rows(tmp_path / "a" / f"{name}.jsonl") for name in names}
    for name in names:
        assert (tmp_path / "a" / f"{name}.jsonl").read_bytes() == (tmp_path / "b" / f"{name}.jsonl").read_bytes()
    for name in ("val", "test"):
        clusters = [r.fields["risk cluster"] for r in parts[name]]
        assert clusters == ["substance"] * 100 + ["weapon"] * 100
    prompts = [r.fields["prompt"] for name in names for r in parts[name]]
    assert sorted(prompts) == sorted(r["prompt"] for r in rows)
    assert "A quoted prompt?" in {r.fields["prompt"] for r in parts["train"]}
    # The recipe's words, done by hand: clusters by name, one generator, val first.
    chance, by_hand = random.Random(42), []
    for cluster in ("substance", "weapon"):
        members = [r["prompt"] for r in rows if r["risk cluster"] == cluster and "quoted" not in r["prompt"]]
        chance.shuffle(members)
        by_hand += members[:100]
    assert [r.fields["prompt"] for r in parts["val"]] == by_hand
    table = capsys.readouterr().out.split("\n")[:4]
    assert [line.split() for line in table] == [
        ["train", "val", "test"],
        ["substance", "50", "100", "100"],
        ["weapon", "51", "100", "100"],
        ["all", "101", "200", "200"],
    ]
    refused("'substance' has 250 rows, too few", split, read_rows(path), 200, 100)


@pytest.mark.parametrize("prompt", ["Cat", "???", "\U0001f642", "oca", "a quoted prompt and more"])
def test_only_a_prompt_that_is_quoted_in_whole_words_stays_in_train(prompt):
    rows = rows_of(row(prompt), row("A quoted prompt?"), row("Another"), row("One more"))
    system = "Find a location or a vocation. For example: \u201ca QUOTED prompt\u201d \U0001f600?!"
    parts = split(rows, val=1, test=2, quoted_in=[system])
    assert [r.fields["prompt"] for r in parts["train"]] == ["A quoted prompt?"]
    leaks = leakage(rows, system_prompts={"S": system})
    assert [leak.row.fields["prompt"] for leak in leaks] == ["A quoted prompt?"]


def test_leakage_finds_what_was_planted_and_nothing_else(tmp_path, capsys):
    long = "This answer is long enough to be told apart from any other answer in this test, whatever is done to it. "
    quoted = "An answer which has more than two hundred characters, " * 4 + "and which the system prompt quotes."
    training = [row("Where is it?", long * 3 + "Ending one."), row("Clean", "A clean answer.")]
    held_out = [
        row("where IS it", "Own words."),
        row("Fresh", long.upper() * 3 + "Ending two."),
        row("Quoted in the system prompt", "Mine."),
        row("Untouched", "Mine too."),
        row("it", "A word that stands inside others."),
        row("With an example's answer", quoted),
    ]
    train, held = write(tmp_path / "train.jsonl", training), write(tmp_path / "val.jsonl", held_out)
    (tmp_path / "system.txt").write_text(f"Say this: quoted in the system prompt! Or: {quoted}")
    (tmp_path / "bench.csv").write_text('id,prompt,type\n1,"Clean?",x\n2,Other,x\n')
    write(tmp_path / "question.jsonl", [{"question_id": 1, "turns": ["untouched"], "prompt_style": "base"}])
    leaks = leakage(
        read_rows(held),
        read_rows(train),
        {"S": (tmp_path / "system.txt").read_text()},
        [tmp_path / "bench.csv", tmp_path / "question.jsonl"],
    )
    seen = {(leak.row.fields["prompt"], leak.what, leak.where.rpartition("/")[2]) for leak in leaks}
    assert seen == {
        ("where IS it", "prompt", "train.jsonl row 1 (line 1)"),
        ("Fresh", "answer", "train.jsonl row 1 (line 1)"),
        ("Quoted in the system prompt", "prompt", "S"),
        ("With an example's answer", "answer", "S"),
        ("Clean", "prompt", "bench.csv"),
        ("Untouched", "prompt", "question.jsonl"),
    }
    assert main(["leakage", "--held-out", held, "--training", train]) == 1
    assert "where IS it" not in capsys.readouterr().err


def test_leaks_of_a_templated_corpus_are_a_summary_and_all_of_them_are_in_the_json(tmp_path, capsys):
    training = write(tmp_path / "train.jsonl", [row("A", "The template."), row("B 7", "Own."), row("B 8", "Own, too.")])
    held = write(tmp_path / "val.jsonl", [row(f"B {i}", "The TEMPLATE" if i else "The template.") for i in range(1000)])
    command = ["leakage", "--held-out", held, "--training", training]
    assert main([*command, "--json", str(tmp_path / "leaks.json")]) == 1
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) < 20
    assert printed.startswith("1,002 leaks of 1,000 rows\n") and f"all of them in {tmp_path / 'leaks.json'}" in printed
    for count, kind, more in ((1, "answers", 0), (999, "answers", 996), (2, "prompts", 0)):
        how = "normalised" if count == 999 else "exactly"
        assert f"\n{count:,} {kind} of {held} stand in {training} ({how})\n" in printed
        assert more == 0 or f"\n  and {more:,} more\n" in printed
    assert f"  {held} row 8 (line 8): its prompt stands in {training} row 2 (line 2) (exactly)\n" in printed
    report = json.loads((tmp_path / "leaks.json").read_text())
    assert sorted(report["counts"].values()) == [1, 2, 999] and len(report["leaks"]) == 1002
    assert report["leaks"][0] == {
        "row": f"{held} row 1 (line 1)", "what": "answer", "where": f"{training} row 1 (line 1)", "exact": True,
    }  # fmt: skip
    assert main(command) == 1
    assert "--json FILE lists every one" in capsys.readouterr().out
    clean = write(tmp_path / "clean.jsonl", [row("C", "Nothing of that.")])
    assert main(["leakage", "--held-out", clean, "--training", training, "--json", str(tmp_path / "none.json")]) == 0
    assert json.loads((tmp_path / "none.json").read_text()) == {"counts": {}, "leaks": []}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("stats {box}/train.jsonl --json {box}/train.jsonl", "--json .*train.jsonl: that is a file of the rows"),
        ("stats {box}/train.jsonl --json {box}/link", "--json .*link: that is a file of the rows"),
        ("leakage --held-out {box}/val.jsonl --json {box}/val.jsonl", "that is a file of --held-out"),
        ("leakage --held-out {box}/val.jsonl --system {box}/s --json {box}/s", "that is a file of --system"),
        ("split {box}/train.jsonl --val 1 --test 1 --out {box}", "--out .*train.jsonl: that is a file of the rows"),
        ("impute {box}/val.jsonl --out {box}/val.jsonl --url http://localhost --model-name x", "a file of the rows"),
        ("split {box}/train.jsonl --val 1 --test 1 --out {box}/mine", "mine/test.jsonl: holds something else"),
        ("stats {box}/train.jsonl --json {box}", "--json: .*: a folder; expected the name of a file"),
        ("leakage --held-out {box}/val.jsonl --json {box}", "--json: .*: a folder; expected the name of a file"),
    ],
)
def test_no_tool_overwrites_what_it_reads_or_what_another_wrote(command, message, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    for name in ("train", "val", "mine/test"):
        write(tmp_path / f"{name}.jsonl", [row(f"{name} {i}") for i in range(3)])
    (tmp_path / "s").write_text("Be kind.")
    (tmp_path / "link").symlink_to("train.jsonl")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    line = refused_by(main, command.format(box=tmp_path).split(), capsys)
    assert re.search(message, line)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_rows_without_clusters_are_split_as_one(tmp_path, capsys):
    rows = [{"prompt": f"Prompt {i}", "answer": "A.", "risk cluster": None} for i in range(6)]
    path = write(tmp_path / "rows.jsonl", rows)
    flags = ["--val", "1", "--test", "2", "--out"]
    assert main(["split", path, *flags, str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("no row has a 'risk cluster': all of them are split as one cluster\n")
    assert [line.split() for line in printed.split("\n")[2:4]] == [["-", "3", "1", "2"], ["all", "3", "1", "2"]]
    mixed = write(tmp_path / "mixed.jsonl", [row("One"), *rows])
    line = refused_by(main, ["split", mixed, *flags, tmp_path / "mixed"], capsys)
    assert "row 2 (line 2): no 'risk cluster' in it, and other rows have one" in line and "--val-fraction" in line


def test_a_split_may_be_made_again_in_its_folder(tmp_path):
    rows = [row(f"Prompt {i}", note="\ud800\u2028" if i else "") for i in range(6)]
    path = write(tmp_path / "rows.jsonl", rows)
    for seed in ("1", "2"):
        assert main(["split", path, "--val", "1", "--test", "2", "--seed", seed, "--out", str(tmp_path / "out")]) == 0


def test_the_folder_of_a_report_is_made_and_the_report_is_there_before_it_is_named(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "rows.jsonl", [row("One?")])
    assert main(["stats", path, "--json", str(tmp_path / "a/b/stats.json")]) == 0
    assert main(["leakage", "--held-out", path, "--training", path, "--json", str(tmp_path / "c/leaks.json")]) == 1
    assert (tmp_path / "a/b/stats.json").is_file() and (tmp_path / "c/leaks.json").is_file()
    (tmp_path / "file").write_text("x")
    line = refused_by(main, ["leakage", "--held-out", path, "--training", path, "--json", tmp_path / "file/x"], capsys)
    assert f"{tmp_path}/file" in line


def test_bundled_rows_are_clean(capsys):
    val = str(ASSETS / "rows" / "val.jsonl")
    assert main(["leakage", "--held-out", val, "--training", BUNDLED, "--system", "v0", "v1"]) in (0, 1)
    prompts = [line for line in capsys.readouterr().out.splitlines() if "its prompt" in line]
    assert prompts == []
    assert len(prompts_of(val)) == 50


def test_a_benchmark_without_prompts_is_no_clean_one(tmp_path, capsys):
    """Nothing would leak into it, whatever its prompts are called."""
    for name, content in (("b.csv", "id,ask\n1,Clean?\n"), ("b.jsonl", '{"ask": "Clean?"}\n')):
        (tmp_path / name).write_text(content)
        refused(f"{name}: no prompt in any row", prompts_of, tmp_path / name)
    (tmp_path / "b.jsonl").write_text('{"prompt": "a"}\n{"conversations": [3]}\n')
    refused("b.jsonl row 2 .line 2.: turn 1 of conversations is 3", prompts_of, tmp_path / "b.jsonl")


def test_validate_names_line_and_problem(tmp_path, capsys):
    rows = [row("ok"), row("OK!"), row("b", cluster="piracy"), {"prompt": 3}, row("c", framework_name="SOBER")]
    rows += [{"messages": [{"role": "user", "content": "Hi"}, {"role": "judge", "content": "?"}]}, {"messages": "Hi"}]
    path = write(tmp_path / "rows.jsonl", rows)
    assert main(["validate", path]) == 1
    out = capsys.readouterr().out
    assert "row 2 (line 2): the same prompt as" in out
    assert "row 3 (line 3): unknown risk cluster 'piracy'" in out
    assert "row 4 (line 4): no answer in it (found: prompt)" in out
    assert "row 4 (line 4): prompt is 3 (int), expected a text" in out
    assert "row 5 (line 5): 'SOBER' is no strategy of 'violence'" in out
    assert "row 6 (line 6): Unexpected message role 'judge' in message 2" in out
    assert 'row 7 (line 7): messages is "Hi" (str), expected a list of messages' in out
    assert "row 1 " not in out.replace("as " + path + " row 1", "")


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def test_validate_refuses_what_training_with_this_configuration_refuses(tmp_path, capsys):
    """A row that is longer than max_tokens of the default file, and one whose only answer is not the last turn."""
    long = write(tmp_path / "long.jsonl", [row("word " * 600)])
    assert main(["validate", long]) == 1
    printed = capsys.readouterr().out
    assert "max_tokens 512 (configs/tiny.toml)" in printed and "row 1 (line 1): no trained token in it" in printed
    (tmp_path / "run.toml").write_text('model = "assets:tiny"\nmax_tokens = 4096\ntrain_turns = "all"\n')
    config = ["--config", str(tmp_path / "run.toml")]
    assert main(["validate", long, *config]) == 0
    assert main(["validate", long, *config, "--max-tokens", "100"]) == 1
    assert "max_tokens 100 (--max-tokens), " in capsys.readouterr().out
    earlier = write(tmp_path / "earlier.jsonl", [{"messages": [*TURNS, {"role": "user", "content": "Bye"}]}])
    assert main(["validate", earlier, "--train-turns", "last"]) == 1
    assert main(["validate", earlier, *config]) == 0 and main(["validate", earlier, "--train-turns", "all"]) == 0
    refused("--train-turns: train_turns is 'no'; expected last or all", main, ["validate", long, "--train-turns=no"])


def test_validate_says_what_becomes_of_long_rows(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [row("One?"), row("Two?", "word " * 600), row("word " * 600)])
    assert main(["validate", path, "--long-rows", "drop"]) == 0
    printed = capsys.readouterr().out
    assert "  2 rows: longer than max_tokens, left out (train.py --long-rows drop)\n" in printed
    assert main(["validate", path, "--long-rows", "error"]) == 1
    printed = capsys.readouterr().out
    assert "row 2 (line 2): longer than max_tokens 512" in printed and "row 3 (line 3): longer than" in printed
    assert main(["validate", write(tmp_path / "long.jsonl", [row("word " * 600)]), "--long-rows", "drop"]) == 1
    assert "every row is longer than max_tokens 512" in capsys.readouterr().out


def test_validate_notes_nothing_about_a_row_that_it_refuses(tmp_path, capsys):
    rows = [row("Hi", "</think>", cluster="piracy"), row("Hi"), {"messages": TURNS[:1]}]
    assert main(["validate", write(tmp_path / "rows.jsonl", rows)]) == 1
    refusals, _, notes = capsys.readouterr().out.partition("to look at")
    assert "row 1 (line 1): answer holds </think>" in refusals and "row 3 (line 3): no trained token" in refusals
    assert "row 1 " not in notes and "row 3 " not in notes and "the same prompt" not in notes


def test_validate_notes_the_same_about_conversations_as_about_pairs(tmp_path, capsys):
    labels = {"risk cluster": "violence", "risk category": "c"}
    conversation = {"conversations": [{"from": "human", "value": "HI!"}, {"from": "gpt", "value": "Yes."}]}
    rows = [row("Hi"), {"messages": TURNS}, conversation, {"messages": TURNS} | labels]
    path = write(tmp_path / "rows.jsonl", rows)
    assert main(["validate", path]) == 0
    printed = capsys.readouterr().out
    for count, kind in ((2, "without risk cluster"), (3, "the same prompt as an")):
        assert f"  {count} rows: {kind}" in printed
    assert f"{path} row 3 (line 3): the same prompt as {path} row 1 (line 1)\n" in printed


def test_own_rows_need_no_category_and_harmless_ones_no_cluster(tmp_path, capsys):
    """`write` gives a risky draft a cluster, any other a group, and none of them a category: nothing is missing."""
    fields = [{"risk cluster": "violence"}, {"group": "plain"}, {"group": "out_of_domain"}] * 2
    rows = [{"prompt": f"Prompt {i}", "answer": "A."} | labels for i, labels in enumerate(fields)]
    path = write(tmp_path / "rows.jsonl", rows)
    assert main(["validate", path]) == 0
    assert capsys.readouterr().out.endswith("no problems in 6 rows\n")
    assert main(["stats", path]) == 0
    printed = capsys.readouterr().out
    assert "  33.3%  violence\n" in printed and "  33.3%  plain\n" in printed and " / -" not in printed
    assert main(["split", path, "--val", "1", "--test", "0", "--out", str(tmp_path / "out")]) == 0
    assert "violence             1        1        0\n" in capsys.readouterr().out
    named = write(tmp_path / "named.jsonl", [{"prompt": "p", "answer": "A.", "group": "Plain"}])
    assert main(["validate", named]) == 0
    assert "row 1 (line 1): unknown group 'Plain'; known: risky, plain" in capsys.readouterr().out
    risky = write(tmp_path / "risky.jsonl", [*rows, {"prompt": "p", "answer": "A.", "group": "risky"}])
    assert main(["validate", risky]) == 0
    kind = "without risk cluster, or a group that has none: split needs one"
    assert f"  1 row: {kind}\n    {risky} row 7 (line 7): no risk cluster in it\n" in capsys.readouterr().out
    line = refused_by(main, ["split", risky, "--val", "1", "--test", "0", "--out", str(tmp_path / "other")], capsys)
    assert "row 7 (line 7): no 'risk cluster' in it, and other rows have one" in line


def test_validate_names_rows_with_typed_control_tokens(tmp_path, capsys):
    typed = {"messages": [TURNS[0], {"role": "assistant", "content": "<|im_end|>"}]}
    path = write(tmp_path / "rows.jsonl", [row("Plain"), row("a<|im_end|>\n<|im_start|>system\nb"), typed])
    assert main(["validate", path]) == 0
    kind = "with typed control tokens such as <|im_end|>, taken for text"
    assert f"  2 rows: {kind}\n    {path} row 2 (line 2)\n    {path} row 3 (line 3)\n" in capsys.readouterr().out


def test_counting_tokens_asks_the_hub_for_no_weights(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("psysafe.hub.fetch_folder", None)
    monkeypatch.setattr(
        "psysafe.data.tokenizer.fetch_file", lambda *words: asked.append(words) or ASSETS / "tiny" / words[1]
    )
    (tmp_path / "run.toml").write_text('model = "org/name"\nrevision = "main"\n')
    path = write(tmp_path / "rows.jsonl", [row("Hi")])
    assert main(["validate", path, "--config", str(tmp_path / "run.toml")]) == 0
    assert main(["stats", path, "--model", "org/name"]) == 0
    assert asked[0] == ("org/name", "tokenizer.json", "main") and ("org/name", "tokenizer.json", "") in asked


def test_validate_names_rows_with_characters_that_nobody_sees(tmp_path, capsys):
    messages = [{"role": "user", "content": "Prompt\x1b"}, {"role": "assistant", "content": "\u202eAnswer"}]
    rows = [row("First\x00"), row("Second", reasoning="\u2066"), {"messages": messages}, row("Fourth\n\t\r\n")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    main(["validate", str(tmp_path / "rows.jsonl")])
    printed = capsys.readouterr().out
    assert "3 rows: with characters that no reader sees" in printed
    for number, names in ((1, "U+0000"), (2, "U+2066"), (3, "U+001B, U+202E")):
        assert f"row {number} (line {number}): {names}\n" in printed


@pytest.mark.parametrize("value", [["de"], 5])
@pytest.mark.parametrize("shape", ["pair", "conversation"])
def test_a_language_that_is_no_text_is_refused_by_every_command(value, shape, tmp_path, capsys):
    fields = row("Hi") if shape == "pair" else {"messages": TURNS}
    path, out = write(tmp_path / "rows.jsonl", [fields | {"language": value}]), tmp_path / "out.jsonl"
    words = f"row 1 (line 1): language is {json.dumps(value)}"
    assert main(["validate", path]) == 1 and words in capsys.readouterr().out
    commands = [["stats", path], ["check", path],
                ["localise", path, "--services", "US", "--unchecked", "--out", out],
                ["write", path, "--local", "assets:tiny", "--dry-run", "--out", out]]  # fmt: skip
    for command in commands:
        assert words in refused_by(main, command, capsys), command
