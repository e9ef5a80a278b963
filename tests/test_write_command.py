"""`corpus write` over an endpoint that answers well, badly or with malice: each prompt gets a draft or a reason."""

import json
import threading
from collections import Counter

import pytest

from psysafe.corpus.__main__ import main
from psysafe.corpus.contacts import known_services
from psysafe.corpus.draft_checks import Settings
from psysafe.corpus.draft_requests import UnusableReply, draft, messages
from psysafe.corpus.stats import tokenizer_of
from psysafe.data.rows import read_rows
from psysafe.files import BUNDLED_MODEL
from psysafe.program import main_guard
from tests.mistakes import refused_by
from tests.own_rows import (
    ACKNOWLEDGEMENT,
    CLOSING,
    GERMAN,
    OUT_OF_DOMAIN,
    PLAIN,
    REASONING,
    STEP,
    services_text,
    violence_row,
)
from tests.stub_endpoint import Handler, StubEndpoint

PROMPT = violence_row()["prompt"]
REPLY = {
    "cluster": "violence", "strategy": "Motivational Interviewing", "strategy_reason": "It asks for their own reasons.",
    "reasoning": REASONING, "acknowledgement": ACKNOWLEDGEMENT, "step": STEP, "services": services_text("violence"),
    "closing": CLOSING,
}  # fmt: skip


BAD_NUMBERS = [("--workers", 0), ("--max-tokens", -5), ("--max-tokens", 0), ("--temperature", -1),
               ("--temperature", "nan"), ("--temperature", "inf"), ("--price-in", -1),
               ("--price-out", "nan")]  # fmt: skip


@pytest.fixture
def endpoint(monkeypatch):
    """Replies to each prompt with the next of its `replies` (the last one again and again); dicts as JSON, texts as
    they are, `!STEP` as the stub's own trouble of that name."""
    stub = StubEndpoint()
    stub.replies, stub.asked, stub.systems, stub.keys = {}, Counter(), [], set()

    def do_POST(self):
        body, question = self.request_body()
        prompt = question.split("\n")[1]
        with stub.lock:
            stub.asked[prompt] += 1
            stub.systems.append(body["messages"][0]["content"])
            stub.keys.add(self.headers["authorization"])
            replies = stub.replies[prompt]
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
        if isinstance(reply, str) and reply.startswith("!"):
            return getattr(self, "do_" + reply[1:].split(":")[0])(reply[1:])
        self.answer(reply if isinstance(reply, str) else json.dumps(reply))

    monkeypatch.setattr(Handler, "do_POST", do_POST)
    with stub:
        yield stub


def command(path, out, endpoint, *more):
    url = ["--url", endpoint.url, "--model-name", "m", "--workers", "1", "--min-words", "40"]
    return ["write", *([str(path)] if path else []), "--out", str(out), *url, *map(str, more)]


def drafts(out):
    return [row.fields for row in read_rows(out)]


def test_a_text_file_becomes_rows_that_pass_the_check(tmp_path, endpoint, capsys):
    path, out = tmp_path / "prompts.txt", tmp_path / "drafts.jsonl"
    path.write_text(f"\n{PROMPT}\n\n")
    endpoint.replies[PROMPT] = [REPLY]
    assert main(command(path, out, endpoint, "--candidates", 2)) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 requests of 2 to ask; ") and "clusters that the model assigned: violence 1" in printed
    (row,) = drafts(out)
    assert {name: row[name] for name in violence_row()} == violence_row()
    assert (row["group"], row["cluster_assigned"], row["language"], row["author"]) == ("risky", True, "en", "m")
    assert row["strategy_reason"] == "It asks for their own reasons."
    assert main(["check", str(out), "--min-words", "40"]) == 0


def test_benign_and_out_of_domain_prompts_get_instructions_of_their_own(tmp_path, endpoint, capsys):
    benign, other, out = tmp_path / "b.csv", tmp_path / "o.jsonl", tmp_path / "drafts.jsonl"
    benign.write_text(f"prompt,group\n{PLAIN['prompt']},scary\n")
    other.write_text(json.dumps({"prompt": OUT_OF_DOMAIN["prompt"], "id": 7}) + "\n")
    for row in (PLAIN, OUT_OF_DOMAIN):
        endpoint.replies[row["prompt"]] = [{"reasoning": row["reasoning"], "answer": row["answer"]}]
    flags = ["--benign", benign, "--out-of-domain", other, "--candidates", 1]
    assert main(command(None, out, endpoint, *flags)) == 0
    plain, refused = drafts(out)
    assert (plain["group"], plain["answer"]) == ("scary", PLAIN["answer"]) and "risk cluster" not in plain
    assert (refused["group"], refused["answer"], refused["id"]) == ("out_of_domain", OUT_OF_DOMAIN["answer"], 7)
    assert "plain" in endpoint.systems[0] and "short refusal" in endpoint.systems[1]
    assert main(["check", str(out)]) == 0


def test_the_candidate_with_the_fewest_issues_is_taken(tmp_path, endpoint):
    path, out = tmp_path / "prompts.txt", tmp_path / "drafts.jsonl"
    path.write_text(PROMPT)
    endpoint.replies[PROMPT] = [REPLY | {"closing": ""}, "no JSON at all", REPLY, REPLY | {"strategy": "SOBER"}]
    assert main(command(path, out, endpoint, "--candidates", 4)) == 0
    (row,) = drafts(out)
    assert row["answer"] == violence_row()["answer"] and row["candidates"] == 3


def test_faults_of_the_endpoint_cost_no_prompt_and_are_named(tmp_path, endpoint, capsys, monkeypatch):
    monkeypatch.setenv("PSYSAFE_API_KEY", "key-of-mine-1234")
    rows = [{"prompt": f"{PROMPT} {i}", "risk cluster": "violence"} for i in range(6)]
    path, out = tmp_path / "prompts.jsonl", tmp_path / "drafts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    troubles = [["!429", "!500", REPLY], ["!endless"], ["!redirect:302:http://elsewhere.invalid/"], ["!400"], ["!null"],
                [REPLY | {"closing": "Stay well, key-of-mine-1234."}]]  # fmt: skip
    endpoint.replies = {row["prompt"]: trouble for row, trouble in zip(rows, troubles, strict=True)}
    assert main(command(path, out, endpoint, "--candidates", 1)) == 1
    printed = capsys.readouterr().out
    assert "row 2 (line 2): no draft: HTTP 200: a reply of more than 4 MB" in printed
    assert "row 3 (line 3): no draft: HTTP 302: redirects to http://elsewhere.invalid/" in printed
    assert "row 4 (line 4): no draft: HTTP 400" in printed and "row 5 (line 5): no draft: the reply has no" in printed
    assert [row["prompt"] for row in drafts(out)] == [rows[0]["prompt"], rows[5]["prompt"]]
    assert endpoint.keys == {"Bearer key-of-mine-1234"}
    assert not any(b"key-of-mine-1234" in file.read_bytes() for file in tmp_path.iterdir())
    # Started again only what failed is asked, and the order is that of the prompts.
    before = Counter(endpoint.asked)
    endpoint.replies = {row["prompt"]: [REPLY] for row in rows}
    assert main(command(path, out, endpoint, "--candidates", 1)) == 0
    assert [row["prompt"] for row in drafts(out)] == [row["prompt"] for row in rows]
    assert (endpoint.asked - before) == {rows[i]["prompt"]: 1 for i in (1, 2, 3, 4)}


def test_a_change_of_what_a_draft_depends_on_asks_again(tmp_path, endpoint):
    path, out = tmp_path / "prompts.txt", tmp_path / "drafts.jsonl"
    path.write_text(PROMPT)
    endpoint.replies[PROMPT] = [REPLY]
    for flags, total in [([], 1), ([], 1), (["--language", "de"], 2), (["--temperature", "0.1"], 3),
                         (["--candidates", "3"], 5)]:  # fmt: skip
        main(command(path, out, endpoint, *(["--candidates", 1] if "--candidates" not in flags else []), *flags))
        assert endpoint.asked[PROMPT] == total


def test_a_dry_run_asks_nothing_and_counts(tmp_path, endpoint, capsys):
    path, out = tmp_path / "prompts.txt", tmp_path / "drafts.jsonl"
    path.write_text(f"{PROMPT}\n{PROMPT} Now.\n")
    prices = ["--price-in", 1e6, "--price-out", 2e6, "--max-tokens", 10]
    assert main(command(path, out, endpoint, "--dry-run", *prices)) == 0
    printed = capsys.readouterr().out
    assert not endpoint.asked and list(tmp_path.iterdir()) == [path]
    tokens = printed.split("; ")[1].split(" tokens")[0]
    assert (
        printed
        == f"6 requests of 6 to ask; {tokens} tokens sent, at most 60 in replies; cost {tokens}.00 + at most 120.00\n"
    )
    assert int(tokens.replace(",", "")) > 6 * 300


@pytest.mark.parametrize("flags", [["--dry-run"], []])
def test_a_prompt_that_is_too_long_to_be_meant_is_refused_before_anything_is_sent(flags, tmp_path, endpoint, capsys):
    path, out = tmp_path / "prompts.txt", tmp_path / "drafts.jsonl"
    path.write_text(f"{PROMPT}\n\n{'a b ' * 500_000}\n{'c' * 20_001}\n{'d' * 20_000}\n")
    line = refused_by(main, command(path, out, endpoint, *flags), capsys)
    assert f"{path} row 2 (line 3): the prompt has 1,999,999 characters, some 499,999 tokens" in line
    assert "expected at most 20,000 characters; nothing was sent: shorten it or leave the row out" in line
    assert line.rstrip().endswith("; 1 more text is too long") and not endpoint.asked and not out.exists()
    path.write_text(f"{'d' * 20_000}\n")
    assert main(command(path, out, endpoint, "--dry-run")) == 0


def test_the_tokens_that_are_counted_are_those_of_the_conversations(tmp_path, endpoint, capsys):
    path, out = tmp_path / "prompts.txt", tmp_path / "drafts.jsonl"
    texts = [PROMPT, "a <|im_end|> b", "\U0001f62d", "\u0623\u0631\u064a\u062f"]
    path.write_text("\n".join(texts))
    assert main(command(path, out, endpoint, "--candidates", 2, "--dry-run")) == 0
    services, settings, tokenizer = known_services(), Settings(min_words=40), tokenizer_of(BUNDLED_MODEL)
    counts = [len(tokenizer.encode_chat(messages({"prompt": text}, services, settings))) for text in texts]
    assert f"; {2 * sum(counts):,} tokens sent" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cluster", "Risk_Cluster", " risk-cluster"])
def test_a_cluster_under_another_name_is_no_reason_to_assign_one(name, tmp_path, endpoint, capsys):
    path = tmp_path / "prompts.csv"
    path.write_text(f"prompt;{name}\r\nHi;violence\r\n")
    line = refused_by(main, command(path, tmp_path / "drafts.jsonl", endpoint), capsys)
    assert f"row 1 (line 2): {name!r} would not be read; call the field 'risk cluster'" in line and not endpoint.asked


def test_a_region_counts_as_its_language(tmp_path, endpoint, capsys):
    path, out = tmp_path / "prompts.txt", tmp_path / "drafts.jsonl"
    path.write_text(GERMAN["prompt"])
    reply = REPLY | {"reasoning": GERMAN["reasoning"], "strategy": GERMAN["framework_name"]}
    parts = dict(zip(("acknowledgement", "step", "services", "closing"), GERMAN["answer"].split("\n\n"), strict=True))
    endpoint.replies[GERMAN["prompt"]] = [REPLY, reply | parts]
    assert main(command(path, out, endpoint, "--candidates", 2, "--language", "de-AT")) == 0
    (row,) = drafts(out)  # the English candidate has issues
    assert (row["answer"], row["language"]) == (GERMAN["answer"], "de-AT")
    assert "no word lists" not in capsys.readouterr().out and "in German (de-AT)" in endpoint.systems[0]
    without, fields = tmp_path / "without.jsonl", GERMAN | {"language": None}
    for answer, code in ((GERMAN["answer"], 0), (GERMAN["answer"].rpartition("\n\n")[0], 1)):
        without.write_text(json.dumps(fields | {"answer": answer}) + "\n")
        assert main(["check", str(without), "--min-words", "30", "--language", "de-AT"]) == code
        printed = capsys.readouterr().out
        assert "not checked in" not in printed and ("parts (closing): no hopeful" in printed) == bool(code)


@pytest.mark.parametrize("flags", [["--dry-run"], []])
def test_a_language_without_word_lists_is_named_before_anything_is_asked(flags, tmp_path, endpoint, capsys):
    path = tmp_path / "prompts.txt"
    path.write_text(PROMPT)
    endpoint.replies[PROMPT] = [REPLY]
    assert main(command(path, tmp_path / "d.jsonl", endpoint, "--language", "xx-nonsens", *flags)) == 0
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first == (
        "no word lists for 'xx-nonsens': known are en (English), de (German); candidates are ranked without"
    )
    assert "3 requests of 3 to ask" in second
    for nothing in ("", " ", "_AT"):
        words = command(path, tmp_path / "e", endpoint, "--language", nothing)
        assert "--language is" in refused_by(main, words, capsys)


def test_the_instruction_names_the_cluster_its_strategies_and_its_services_alone():
    services = known_services()
    system, question = (
        m["content"] for m in messages({"prompt": "p", "risk cluster": "substance"}, services, Settings("de"))
    )
    assert "in German" in system and "Talk to Frank, 0300 123 6600, talktofrank.com" in system and "SOBER" in system
    assert "Samaritans" not in system and "$" not in system and "<prompt>\np\n</prompt>" in question
    every, _ = (m["content"] for m in messages({"prompt": "p"}, services, Settings("xx")))
    assert all(f"Cluster: {name} (" in every for name in services.by_cluster) and "with the code xx" in every


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("Sorry, no.", "no JSON object with a reasoning"),
        ('{"reasoning": "r", "acknowledgement": "a', "no JSON object"),
        ("<think>" + json.dumps(REPLY), "never ended its reasoning"),
        (json.dumps({"reasoning": "r", "cluster": "violence"}), "none of acknowledgement"),
        (json.dumps(REPLY | {"cluster": "rage"}), "cluster is 'rage'"),
        (json.dumps(REPLY | {"cluster": ["violence"]}), "cluster is"),
        (json.dumps(REPLY | {"step": {"a": 1}}), "step is"),
        (json.dumps(REPLY | {"reasoning": " "}), "reasoning is"),
        (json.dumps(REPLY | {"closing": "x" * 30_000}), "30,000 characters"),
        (json.dumps(REPLY | {"closing": "a < b"}).replace("<", "\\u003c/think>"), "closing holds"),
        ("{" * 100_000, "no JSON object"),
    ],
)
def test_a_reply_without_a_draft_is_refused_with_the_reason(reply, reason):
    with pytest.raises(UnusableReply, match=reason):
        draft({"prompt": "p"}, reply, "m", "en")


@pytest.mark.parametrize("around", ["{}", "Here you are:\n```json\n{}\n```\nAnything else?", "<think>{{no}}</think>{}"])
def test_prose_around_the_json_does_no_harm(around):
    assert draft({"prompt": "p"}, around.format(json.dumps(REPLY)), "m", "en")["answer"] == violence_row()["answer"]


def test_mistakes_are_refused(tmp_path, endpoint, capsys):
    path, out = tmp_path / "prompts.txt", tmp_path / "drafts.jsonl"
    path.write_text(PROMPT)
    empty, bad = tmp_path / "empty.txt", tmp_path / "bad.jsonl"
    empty.write_text("\n\n")
    bad.write_text('{"prompt": "p", "risk cluster": "rage"}\n')
    url = ["--url", endpoint.url, "--model-name", "m"]
    for words, flags in [
        ("expected one model", [path, "--out", out]),
        ("expected one model", [path, "--out", out, *url, "--local", "assets:tiny"]),
        ("--url needs --model-name", [path, "--out", out, "--url", endpoint.url]),
        ("no prompts", ["--out", out, *url]),
        ("empty.txt: no prompts in it", [empty, "--out", out, *url]),
        ("cannot be read", [tmp_path / "none.txt", "--out", out, *url]),
        ("'rage', expected one of", [bad, "--out", out, *url]),
        ("belong together", [path, "--out", out, *url, "--price-in", 1]),
        ("would be overwritten", [path, "--out", path, *url]),
        ("--deadline is 0", [path, "--out", out, *url, "--deadline", 0]),
        ("--deadline has no effect", [path, "--out", out, "--local", "assets:tiny", "--deadline", 2]),
        ("--candidates is 0", [path, "--out", out, *url, "--candidates", 0]),
        ("--device has no effect", [path, "--out", out, *url, "--device", "cpu"]),
        *((f"{flag}: '{value}' is no", [path, "--out", out, *url, flag, value]) for flag, value in BAD_NUMBERS),
        ("--workers has no effect", [path, "--out", out, "--local", "assets:tiny", "--workers", 2]),
    ]:
        assert words in refused_by(main, ["write", *flags], capsys), words
    assert not endpoint.asked and not out.exists()


def test_a_model_here_writes_too_and_says_what_its_replies_lack(tmp_path, capsys):
    """The bundled model writes no JSON: the way there and the reason are what is tested."""
    path = tmp_path / "prompts.txt"
    path.write_text("I want to give up.")
    local = ["--local", "assets:tiny", "--max-tokens", "60", "--candidates", "1"]
    assert main_guard(main, ["write", str(path), "--out", str(tmp_path / "d.jsonl"), *local]) == 1
    printed = capsys.readouterr().out
    assert "row 1 (line 1): no draft: the reply" in printed and "no reply gave a draft" in printed


def test_where_no_prompt_gets_a_draft_each_has_its_reason(tmp_path, endpoint, capsys):
    path, out = tmp_path / "prompts.txt", tmp_path / "drafts.jsonl"
    path.write_text(f"{PROMPT} 1\n{PROMPT} 2\n")
    endpoint.replies = {f"{PROMPT} 1": ["No."], f"{PROMPT} 2": ["!400"]}
    assert main(command(path, out, endpoint, "--candidates", 1)) == 1
    printed = capsys.readouterr().out
    assert "row 1 (line 1): no draft: the reply holds no JSON object" in printed
    assert "row 2 (line 2): no draft: HTTP 400" in printed
    assert printed.splitlines()[-1].endswith("give more --candidates for others") and not out.exists()


def test_one_reply_that_never_comes_holds_nobody_up(tmp_path, endpoint, capsys, monkeypatch):
    path, out = tmp_path / "prompts.txt", tmp_path / "drafts.jsonl"
    path.write_text(f"{PROMPT} 1\n{PROMPT} 2\n")
    over = threading.Event()
    monkeypatch.setattr(Handler, "do_never", lambda self, words: over.wait(600), raising=False)
    endpoint.replies = {f"{PROMPT} 1": ["!never"], f"{PROMPT} 2": [REPLY]}
    # The other reply has the same deadline: long enough for it on a busy machine.
    assert main(command(path, out, endpoint, "--candidates", 1, "--deadline", "3")) == 1
    over.set()
    assert "row 1 (line 1): no draft: no whole reply in 3 s" in capsys.readouterr().out
    assert [row["prompt"] for row in drafts(out)] == [f"{PROMPT} 2"]


def test_a_prompt_counts_once_and_in_one_group(tmp_path, endpoint, capsys):
    risky, plain, out = tmp_path / "risky.txt", tmp_path / "plain.txt", tmp_path / "drafts.jsonl"
    risky.write_text(f"{PROMPT}\n{PROMPT.upper()}\nHelp!\n{PROMPT}\n")
    plain.write_text(f"Hello?\n{PROMPT}\n")
    endpoint.replies = {PROMPT: [REPLY], "Help!": [REPLY]}
    line = refused_by(main, command(risky, out, endpoint, "--benign", plain), capsys)
    assert "plain.txt row 2 (line 2)" in line and PROMPT in line and "as plain, and as risky in" in line
    assert not endpoint.asked
    assert main(command(risky, out, endpoint, "--candidates", 1)) == 0
    assert capsys.readouterr().out.startswith("2 repeated lines left out\n2 requests of 2 to ask")
    assert [row["prompt"] for row in drafts(out)] == [PROMPT, "Help!"]
    # The same words for two clusters are two rows.
    rows = tmp_path / "rows.jsonl"
    fields = [{"prompt": PROMPT, "risk cluster": name} for name in ("violence", "weapon", "violence")]
    rows.write_text("".join(json.dumps(row) + "\n" for row in fields))
    assert main(command(rows, out, endpoint, "--candidates", 1, "--dry-run")) == 0
    assert capsys.readouterr().out.startswith("1 repeated line left out\n2 requests of 2 to ask")
