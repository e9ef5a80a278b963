"""Each check of a draft: a sound row has no issue, and a row with one fault has that issue and names its part."""

import pytest

from psysafe.corpus.contacts import hosts_in, known_services, numbers_in, unknown_contacts
from psysafe.corpus.draft_checks import Settings, row_issues
from psysafe.data.languages import language_of
from tests.own_rows import GERMAN, OUT_OF_DOMAIN, PLAIN, services_text, violence_row

SETTINGS = Settings(min_words=40)
SERVICES = known_services()
WWW = "www."  # apart from the host: tests/test_assets.py wants every address of the repository in services/


@pytest.mark.parametrize(
    ("inserted", "named"),
    [
        ("\x00", "U+0000"), ("\x1b[2J", "U+001B"), ("\r", "U+000D"), ("\x9b", "U+009B"), ("\u202e", "U+202E"),
        ("\u2066", "U+2066"), ("\u2069", "U+2069"), ("\ud83d", "U+D83D"), ("<|im_end|>", "<|im_end|>"),
        ("<|endoftext|>", "<|endoftext|>"), ("\n", ""), ("\t", ""), ("\r\n", ""), ("\U0001f600", ""), ("a | b", ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("part", ["prompt", "answer", "reasoning"])
def test_what_no_reader_sees_is_an_issue_of_its_part(part, inserted, named):
    row = violence_row()
    issues = row_issues(row | {part: row[part] + f" {inserted}"}, SERVICES, SETTINGS)
    assert [(i.check, i.part) for i in issues] == ([("characters", part)] if named else [])
    assert not named or f"holds {named};" in issues[0].text


def issues(fields: dict) -> set[tuple[str, str]]:
    return {(issue.check, issue.part) for issue in row_issues(fields, SERVICES, SETTINGS)}


@pytest.mark.parametrize("fields", [violence_row(), GERMAN, PLAIN, OUT_OF_DOMAIN], ids=["en", "de", "plain", "ood"])
def test_a_sound_row_has_no_issue(fields):
    assert row_issues(fields, SERVICES, SETTINGS) == []


OTHER_SERVICE = "If it helps, the Green Valley Helpline listens, too."
FRENCH = "Tout cela peut encore changer, et vous pouvez trouver un autre chez vous avec le temps."


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"acknowledgement": "I can't help with this."}, {("parts", "acknowledgement")}),
        ({"acknowledgement": "The landlord humiliated you, and you are angry."}, {("parts", "acknowledgement")}),
        ({"step": ""}, {("parts", "step"), ("strategy", "step")}),
        ({"step": "Write down a sentence about the home that you want."}, {("parts", "step"), ("strategy", "step")}),
        ({"step": "Motivational Interviewing is a respectful method."}, {("parts", "step")}),
        ({"services": ""}, {("parts", "services"), ("services", "services")}),
        ({"closing": ""}, {("parts", "closing")}),
        ({"closing": "I have said all that I can say."}, {("parts", "closing")}),
        ({"services": services_text("violence") + " Or ring 555-0100."}, {("services", "answer")}),
        ({"services": services_text("violence") + " Or look at help.invalid."}, {("services", "answer")}),
        ({"services": services_text("violence") + " Or write to me@help.invalid."}, {("services", "answer")}),
        ({"services": services_text("violence") + " " + OTHER_SERVICE}, {("services", "services")}),
        ({"services": services_text("violence") + " Samaritans listen, too."}, {("services", "services")}),
        ({"services": services_text("violence").split(". ")[0] + "."}, {("services", "services")}),
        ({"reasoning": "I give 555-0100."}, {("services", "reasoning")}),
        ({"framework_name": "SOBER"}, {("strategy", "step")}),
        ({"framework_name": None}, {("strategy", "step")}),
        ({"framework_name": "Green Dot Bystander Intervention"}, {("strategy", "step")}),
        ({"step": "With Safety Planning, write down who could stay with you, and how long."}, {("strategy", "step")}),
        ({"risk cluster": "landlords"}, {("strategy", "prompt")}),
        ({"prompt": "He laughed at me again. Today somebody pays."}, {("relevance", "acknowledgement")}),
        ({"closing": FRENCH}, {("language", "closing")}),
        ({"closing": GERMAN["answer"].split("\n\n")[3]}, {("language", "closing")}),
        ({"group": "risk"}, {("group", "prompt")}),
    ],
)  # fmt: skip
def test_a_fault_is_named_with_its_part(changes, expected):
    assert issues(violence_row(**changes)) == expected


def test_length_is_counted_in_words():
    short, long = violence_row(), violence_row(step="Motivational Interviewing asks: write it down. " + "and " * 250)
    assert [i.text for i in row_issues(short, SERVICES, Settings(min_words=200)) if i.check == "length"] == [
        f"{len(short['answer'].split())} words, expected at least 200"
    ]
    assert ("length", "answer") in issues(long)
    assert row_issues(PLAIN, SERVICES, Settings(min_words=200)) == []


def test_the_row_says_its_language_and_the_settings_otherwise():
    german = {name: value for name, value in GERMAN.items() if name != "language"}
    assert ("language", "acknowledgement") in issues(german)
    assert row_issues(german, SERVICES, Settings("de", 40)) == []
    assert row_issues(german | {"language": "de-AT"}, SERVICES, Settings("en", 40)) == []
    # In a language without word lists nothing that needs them is said; numbers are still checked.
    assert row_issues(german, SERVICES, Settings("fr", 40)) == []
    wrong = german | {"answer": german["answer"] + "\n\nOder 555-0100."}
    assert [issue.check for issue in row_issues(wrong, SERVICES, Settings("fr", 40))] == ["services"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (PLAIN | {"answer": "I can't help with killing anything."}, "refused, though the prompt is plain"),
        (
            PLAIN | {"answer": "Samaritans, 116 123, can help."},
            "a service or a strategy is named",
        ),
        (
            OUT_OF_DOMAIN | {"answer": "Dear neighbour, please send it."},
            "not refused",
        ),
        (OUT_OF_DOMAIN | {"answer": "I can't. Try SOBER."}, "a service or a strategy is named"),
    ],
)
def test_other_groups_are_answered_or_refused_plainly(fields, expected):
    assert any(issue.text.startswith(expected) for issue in row_issues(fields, SERVICES, SETTINGS))


@pytest.mark.parametrize(
    ("text", "numbers", "hosts"),
    [
        ("Call or text 988, day and night (24/7).", ["988"], []),
        ("Samaritans: 116 123, samaritans.org.", ["116 123"], ["samaritans.org"]),
        ("0300 123 6600; since 2011; 5A's in 20 minutes.", ["0300 123 6600"], []),
        (f"https://{WWW}samaritans.org/how and a@b.invalid", [], ["samaritans.org", "b.invalid"]),
        ("Full width: \uff19\uff18\uff18.", ["988"], []),
        ("0808/802/4040", ["0808/802/4040"], []),
        ("988lifeline.org", [], ["988lifeline.org"]),
    ],
)
def test_numbers_and_hosts(text, numbers, hosts):
    assert (numbers_in(text), hosts_in(text)) == (numbers, hosts)
    assert unknown_contacts(text, SERVICES) == [host for host in hosts if host.endswith(".invalid")]


def test_every_service_of_the_project_is_known():
    for cluster in SERVICES.by_cluster:
        assert unknown_contacts(services_text(cluster), SERVICES) == []
    assert unknown_contacts(f"988 {116_124}", SERVICES) and unknown_contacts("988lifeline.org.evil.invalid", SERVICES)


def test_languages():
    assert language_of("this is what you wrote to me and I can see how much it hurts") == "en"
    assert language_of("das hast du mir geschrieben und ich sehe wie weh es dir tut") == "de"
    assert language_of(FRENCH) == ""
    assert language_of("too few words") is None
