"""The page of eval.py rate in a real browser: by keyboard and by mouse, reloaded, in two tabs, without storage, with
texts that would break it, on a phone and in the dark; and what raters export is what eval.py agreement counts.
"""

import base64
import contextlib
import json
import random
from pathlib import Path

import pytest
from sklearn.metrics import cohen_kappa_score

import eval as script
from psysafe.evaluation import rating
from psysafe.evaluation.criteria import CRITERIA, RUBRIC
from psysafe.program import main_guard

TITLES = ["Refusal", "Psychological Grounding", "External References", "Relevance"]
PREFERENCES = {"left": "Answer A", "right": "Answer B", "tie": "No preference"}
LETTERS = {"left": "A", "right": "B"}
N_ITEMS = 4
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """The folder of a page with four prompts; what `first` answers begins with an apple, what `second` with a pear."""
    folder = tmp_path_factory.mktemp("study")
    words = []
    for name, fruit in (("first", "apple"), ("second", "pear")):
        rows = [{"prompt": f"prompt {i}", "answer": f"{fruit} {i}"} for i in range(N_ITEMS)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        words += ["--answers", f"{name}={folder / f'{name}.jsonl'}"]
    assert main_guard(script.main, ["rate", *words, "--seed", "3", "--out", str(folder)]) == 0
    return folder


@contextlib.contextmanager
def opened(browser, url: str, **context):
    """A page in a browser without a history. In the end nothing may have failed, or have been asked of a network."""
    session = browser.new_context(accept_downloads=True, **context)
    session.set_default_timeout(120_000)
    page = open_tab(session, url)
    yield page
    assert page.faults == []
    session.close()


def open_tab(session, url: str):
    page = session.new_page()
    page.faults = []
    page.on("console", lambda message: page.faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("request", lambda request: page.faults.append(request.url) if request.url.startswith("http") else None)
    page.goto(url)
    return page


def start_as(page, name: str) -> None:
    page.get_by_label("Your name").fill(name)
    page.get_by_role("button", name="Begin", exact=True).click()


def question(page, side: str, number: int):
    return page.get_by_role("group", name=f"{TITLES[number]} of answer {LETTERS[side]}", exact=True)


def answer(page, side: str, number: int, value: object) -> None:
    question(page, side, number).get_by_label(str(value), exact=True).check()


def chosen(page, side: str, number: int) -> list[str]:
    return [radio.get_attribute("value") for radio in question(page, side, number).locator("input:checked").all()]


def whose(page) -> tuple[str, dict[str, str]]:
    """(the prompt, side -> variant) as the page shows them: read from its text, not from the key."""
    variants = {"apple": "first", "pear": "second"}
    texts = {side: page.locator("article").nth(i).locator(".text").text_content() for i, side in enumerate(LETTERS)}
    return page.locator("#content > .text").text_content(), {s: variants[t.split()[0]] for s, t in texts.items()}


def export(page, path: Path) -> dict:
    with page.expect_download() as download:
        page.get_by_role("button", name="Export", exact=True).click()
    download.value.save_as(path)
    return json.loads(path.read_text())


def drawn_ratings(seed: int) -> list[dict]:
    """For each item what a rater is to choose: (side, number of the criterion) -> value, and a preference."""
    generator = random.Random(seed)
    plan = []
    for _ in range(N_ITEMS):
        labels = {(side, number): generator.choice([1, 2, 3, 4, 5] if number % 2 else ["Yes", "No"])
                  for side in LETTERS for number in range(4)}  # fmt: skip
        plan.append({"labels": labels, "preference": generator.choice(list(PREFERENCES))})
    return plan


class Clicked:
    """What a rater chose, by the variants whose text stood there."""

    def __init__(self):
        self.labels, self.preferences, self.sides = {}, {}, []

    def note(self, page, labels: dict, preference: str) -> None:
        prompt, variants = whose(page)
        for (side, number), value in labels.items():
            word = value if isinstance(value, int) else int(value == "Yes")
            self.labels[variants[side], prompt, CRITERIA[number]] = word
        self.preferences[prompt] = variants.get(preference, "tie")
        self.sides.append(preference)


def rate_by_keyboard(page, plan: list[dict]) -> Clicked:
    clicked = Clicked()
    for number, item in enumerate(plan, 1):
        assert page.evaluate("document.activeElement.textContent") == f"Item {number} of {N_ITEMS}"
        clicked.note(page, item["labels"], item["preference"])
        for value in item["labels"].values():
            page.keyboard.press("Tab")
            page.keyboard.press(str(value)[0].lower())
        page.keyboard.press("Tab")
        page.keyboard.press(PREFERENCES[item["preference"]].removeprefix("Answer ")[0].lower())
        page.keyboard.press("Tab")
        page.keyboard.type(f"ny5 note {number}")  # letters that would answer a question
        page.keyboard.press("Control+Enter")
    return clicked


def rate_by_mouse(page, plan: list[dict]) -> Clicked:
    clicked = Clicked()
    for item in plan:
        clicked.note(page, item["labels"], item["preference"])
        for (side, number), value in item["labels"].items():
            answer(page, side, number, value)
        page.get_by_role("radio", name=PREFERENCES[item["preference"]], exact=True).check()
        page.get_by_role("button", name="Next").click()
    return clicked


def draw_as_documented(page_digest: str, rater: str, ids: list[str]) -> tuple[list[str], list[str]]:
    """(order of the items, those with exchanged sides): FNV-1a seeds mulberry32, and Fisher and Yates shuffle."""
    state, mask = 0x811C9DC5, 0xFFFFFFFF
    for byte in f"{page_digest}\n{rater}".encode():
        state = (state ^ byte) * 0x01000193 & mask

    def draw() -> float:
        nonlocal state
        state = state + 0x6D2B79F5 & mask
        bits = (state ^ state >> 15) * (state | 1) & mask
        bits ^= bits + ((bits ^ bits >> 7) * (bits | 61) & mask) & mask
        return (bits ^ bits >> 14) / 2**32

    order = list(ids)
    for i in range(len(order) - 1, 0, -1):
        j = int(draw() * (i + 1))
        order[i], order[j] = order[j], order[i]
    return order, [item for item in ids if draw() < 0.5]


def test_from_the_keyboard_and_the_mouse_to_the_tables_of_agreement(browser, study, tmp_path):
    key = json.loads((study / "key.json").read_text())
    clicked, exports = {}, {}
    with opened(browser, (study / "rate.html").as_uri()) as page:
        # By keyboard alone. Enter in the name begins, and does nothing else.
        while page.evaluate("document.activeElement.id") != "name":
            page.keyboard.press("Tab")
        page.keyboard.type("Änna  Müller ")
        page.keyboard.press("Enter")
        clicked["Änna Müller"] = rate_by_keyboard(page, drawn_ratings(1))
        assert page.locator("#message").text_content().startswith("That was the last item. 4 of 4 items complete.")
        assert page.evaluate("document.activeElement.id") == "export"
        with page.expect_download() as download:
            page.keyboard.press("Enter")
        assert download.value.suggested_filename == f"rate-{key['page']}-Änna-Müller.json"
        download.value.save_as(tmp_path / "anna.json")
        exports["Änna Müller"] = json.loads((tmp_path / "anna.json").read_text())
        # A second rater on the same page, by mouse; of the last item nothing.
        page.get_by_role("button", name="Change rater").click()
        start_as(page, "Ben")
        assert page.locator("#count").text_content() == "0 of 4 items complete"
        clicked["Ben"] = rate_by_mouse(page, drawn_ratings(2)[:-1])
        exports["Ben"] = export(page, tmp_path / "ben.json")
    prompts = {item: whose["prompt"] for item, whose in key["items"].items()}
    for rater, content in exports.items():
        order, swapped = draw_as_documented(key["page"], rater, list(key["items"]))
        assert list(clicked[rater].preferences) == [prompts[item] for item in order][: len(clicked[rater].sides)]
        assert content["swapped"] == swapped and content["rater"] == rater
    assert exports["Ben"]["swapped"] != exports["Änna Müller"]["swapped"]
    assert [note["value"] for note in exports["Änna Müller"]["notes"]] != [] == exports["Ben"]["notes"]
    ratings = ["--ratings", str(tmp_path / "anna.json"), str(tmp_path / "ben.json"), "--key", str(study / "key.json")]
    assert main_guard(script.main, ["agreement", *ratings, "--out", str(tmp_path / "out")]) == 0
    tables = {
        table["title"]: table["rows"] for table in json.loads((tmp_path / "out/result.json").read_text())["tables"]
    }
    check_kappas(tables["Rater against rater"], *(of.labels for of in clicked.values()))
    check_preferences(tables, clicked)


def check_kappas(rows: list, anna: dict, ben: dict) -> None:
    by_criterion = {row[1]: row for row in rows}
    for name in CRITERIA:
        both = [(anna[answer], ben[answer]) for answer in anna if answer in ben and answer[2] == name]
        assert len(both) == 2 * (N_ITEMS - 1) and by_criterion[name][2] == len(both)
        assert by_criterion[name][3] == pytest.approx(100 * sum(a == b for a, b in both) / len(both))
        assert by_criterion[name][4] == pytest.approx(cohen_kappa_score(*zip(*both, strict=True)))


def check_preferences(tables: dict, clicked: dict[str, Clicked]) -> None:
    of_all, *by_rater = tables["Preference"]
    votes = [vote for of in clicked.values() for vote in of.preferences.values()]
    assert of_all[1:4] == ["first", "second", len(votes)] and len(votes) == 2 * N_ITEMS - 1
    assert of_all[4:7] == pytest.approx([100 * votes.count(name) / len(votes) for name in ("first", "second", "tie")])
    for row, (rater, of) in zip(by_rater, clicked.items(), strict=True):
        of_rater = list(of.preferences.values())
        assert (row[0], row[3]) == (rater, len(of_rater))
        assert row[4:6] == pytest.approx([100 * of_rater.count(name) / len(of_rater) for name in ("first", "second")])
    sides = [side for of in clicked.values() for side in of.sides]
    position = tables["Position: answers preferred by their side"][0]
    assert position[1:3] == [sides.count("left"), sides.count("right")] and position[1] + position[2] > 0


STORE = """name => {
  const [key] = Object.keys(localStorage).filter(key => key.endsWith(" Anna"));
  localStorage[key] = JSON.stringify({ ...JSON.parse(localStorage[key]), [name]: { value: 2, time: Date.now() } });
}"""


def test_nothing_is_lost_by_a_reload_a_second_tab_or_a_second_rater(browser, study, tmp_path):
    url = (study / "rate.html").as_uri()
    with opened(browser, url) as page:
        start_as(page, "Anna")
        answer(page, "left", 0, "Yes")
        half = r"node => { node.value = 'half a \ud83d pair'; node.dispatchEvent(new Event('input')); }"
        page.get_by_label("Note").evaluate(half)  # fill() would send a whole character
        page.reload()
        assert chosen(page, "left", 0) == ["Yes"] and page.locator("#rater").text_content() == "Rater: Anna"
        assert page.get_by_label("Note").evaluate("node => node.value.length") == len("half a _ pair")
        # A second tab: what one rates the other shows, and neither takes back what the other has stored.
        second = open_tab(page.context, url)
        second.get_by_role("button", name="Anna").click()
        assert chosen(second, "left", 0) == ["Yes"]
        answer(second, "left", 1, 4)
        question(page, "left", 1).locator("input[value='4']:checked").wait_for()
        answer(second, "right", 3, 5)
        question(page, "right", 3).locator("input[value='5']:checked").wait_for()
        # Stored by a tab of which this one has not heard yet (no event comes to the tab that writes).
        page.evaluate(STORE, question(page, "right", 1).locator("input").first.get_attribute("name"))
        answer(page, "left", 0, "No")
        assert second.faults == []
        second.close()
        page.reload()
        values = [chosen(page, *where) for where in (("left", 0), ("left", 1), ("right", 1), ("right", 3))]
        assert values == [["No"], ["4"], ["2"], ["5"]]
        # What is cleared stays cleared, by key and by button.
        question(page, "right", 3).locator("input:checked").press("Delete")
        question(page, "right", 1).get_by_role("button", name="clear").click()
        page.reload()
        assert chosen(page, "right", 3) == chosen(page, "right", 1) == []
        # Another rater sees nothing of it, has an order of his own, and does not disturb it.
        page.get_by_role("button", name="Change rater").click()
        start_as(page, "Ben")
        assert page.locator("#content input:checked").count() == 0 and page.get_by_label("Note").input_value() == ""
        answer(page, "left", 1, 1)
        page.get_by_role("button", name="Change rater").click()
        page.get_by_role("button", name="Anna").click()
        assert chosen(page, "left", 1) == ["4"]
        exported = export(page, tmp_path / "anna.json")
        assert [note["value"] for note in exported["notes"]] == ["half a \ud83d pair"]
        # In Chromium all pages from files share one storage: another page knows of nobody.
        page.goto(evil_page(tmp_path))
        assert page.locator("#who").is_visible() and page.locator("#known").is_hidden()
        page.goto(url)
        assert page.locator("#rater").text_content() == "Rater: Anna"
    check_loading(browser, url, tmp_path, exported)


def check_loading(browser, url: str, folder: Path, exported: dict) -> None:
    with opened(browser, url) as page:
        # A browser that knows nothing: the file says who rates.
        load = page.get_by_label("Load an exported file").set_input_files
        message = page.locator("#message")
        load(folder / "anna.json")
        message.get_by_text("anna.json is loaded: 3 of its answers were new.").wait_for()
        assert (chosen(page, "left", 0), chosen(page, "left", 1)) == (["No"], ["4"])
        # What was rated since is later than the file.
        answer(page, "left", 0, "Yes")
        load(folder / "anna.json")
        message.get_by_text("0 of its answers were new").wait_for()
        assert chosen(page, "left", 0) == ["Yes"]
        rows = exported["ratings"]
        for change, reason in [
            ({"page": "other"}, "it belongs to another page"),
            ({"rater": "Ben"}, "it is Ben's, and you rate as Anna"),
            ({"rater": ""}, "it names no rater"),
            ({"ratings": [rows[0] | {"value": 6}]}, "an answer in it is none of this page"),
            ({"ratings": [rows[0] | {"item": "99"}]}, "an answer in it is none of this page"),
            ({"ratings": [rows[0] | {"side": "toString"}]}, "an answer in it is none of this page"),
            ({"ratings": [None]}, "an answer in it is none of this page"),
            ({"swapped": ["1", "2", "3", "4", "5"]}, "its sides are not this rater's"),
            (None, "it is not JSON"),
        ]:
            text = "no" if change is None else json.dumps(exported | change)
            message.evaluate("node => { node.textContent = '' }")  # some reasons come several times in a row
            load({"name": "bad.json", "mimeType": "application/json", "buffer": text.encode()})
            message.get_by_text(f"bad.json was not loaded: {reason}.").wait_for()
        assert (chosen(page, "left", 0), chosen(page, "left", 1)) == (["Yes"], ["4"])


def test_where_storage_is_refused_the_page_says_so_and_exports(browser, study, tmp_path):
    """As in some private windows. The address of this page is its own text, and such a page may store nothing."""
    text = base64.b64encode((study / "rate.html").read_bytes()).decode()
    with opened(browser, f"data:text/html;base64,{text}") as page:
        refused = "() => { try { localStorage; return false } catch { return true } }"
        assert page.evaluate(refused)
        start_as(page, "Anna")
        warning = page.get_by_role("alert")
        assert warning.text_content() == "This browser stores nothing. Export before you close the page."
        answer(page, "left", 1, 3)
        page.get_by_role("button", name="Next").click()
        page.get_by_role("button", name="Back").click()
        assert chosen(page, "left", 1) == ["3"]
        assert [entry["value"] for entry in export(page, tmp_path / "anna.json")["ratings"]] == [3]


MARKUP = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\"><!-- data -->"
RIGHT_TO_LEFT = "\u202etxet neddih\u202c مرحبا \ud83d"
EVIL = [(MARKUP, MARKUP, RIGHT_TO_LEFT), (RIGHT_TO_LEFT, "", "x" * 20_000)]


def evil_page(folder: Path) -> str:
    items = [{"id": str(n), "prompt": prompt, "answers": answers} for n, (prompt, *answers) in enumerate(EVIL, 1)]
    content = {"page": "d", "kind": "rate", "criteria": rating.criteria_of(RUBRIC.read_text()), "items": items}
    (folder / "evil.html").write_text(rating.page(content))
    return (folder / "evil.html").as_uri()


def violations(page) -> list[str]:
    api = pytest.importorskip("axe_playwright_python.sync_playwright")
    return [f"{one['id']}: {one['nodes'][0]['html']}" for one in api.Axe().run(page).response["violations"]]


@pytest.mark.parametrize(("scheme", "width", "background"), [("dark", 360, "rgb(20, 26, 32)"),
                                                             ("light", 1200, "rgb(255, 255, 255)")])  # fmt: skip
def test_evil_texts_a_phone_the_dark_and_what_axe_finds(browser, tmp_path, scheme, width, background):
    look = {"color_scheme": scheme, "viewport": {"width": width, "height": 740}}
    with opened(browser, evil_page(tmp_path), **look) as page:
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == background
        assert violations(page) == []
        start_as(page, MARKUP[:80])
        seen = set()
        for _ in EVIL:
            answer(page, "left", 1, 4)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            texts = page.locator("#content .text").evaluate_all(
                "nodes => nodes.map(node => JSON.stringify(node.textContent))"
            )
            seen.update(map(json.loads, texts))
            assert all(page.locator("#content .text").evaluate_all("nodes => nodes.map(node => node.dir === 'auto')"))
            assert violations(page) == []
            page.get_by_role("button", name="Next").click()
        assert seen == {text for texts in EVIL for text in texts if text}
        assert page.get_by_text("(The answer is empty.)").count() + page.locator("article .text").count() == 2
        page.keyboard.press("Escape")
        assert page.locator("#content").is_hidden() and violations(page) == []
        page.keyboard.press("Escape")
        assert page.locator("#content").is_visible() and page.title() == rating.TITLE
        assert page.locator("img").count() == 0
        page.get_by_role("button", name="Change rater").click()
        assert page.get_by_role("button", name=MARKUP[:80]).count() == 1 and violations(page) == []
