"""The page of `corpus review` in a real browser: by keyboard and by mouse, reloaded, with a second reviewer, with texts
that would break it, on a phone; and the rows that --collect makes are what was clicked and typed.
"""

import json

import pytest

from psysafe.corpus import __main__ as corpus
from psysafe.corpus import review
from psysafe.data.rows import read_file
from psysafe.files import ASSETS
from psysafe.program import main_guard
from tests.test_rate_page import MARKUP, RIGHT_TO_LEFT, export, opened, start_as, violations

pytestmark = pytest.mark.slow
N_ROWS = 4
WINDOWS_LINES = "First.\r\n\r\nSecond\u00a0line, \u00e4."  # a text field has no \r


@pytest.fixture
def drafts(tmp_path):
    rows = [json.loads(line) for line in (ASSETS / "rows" / "val.jsonl").read_text().splitlines()[:N_ROWS]]
    rows = [row | {"extra": {"kept": [1.5, None]}, "reasoning": WINDOWS_LINES} for row in rows]
    path = tmp_path / "drafts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def page_of(drafts, *words) -> str:
    folder = drafts.parent / "pages"
    assert main_guard(corpus.main, ["review", str(drafts), "--out", str(folder), *map(str, words)]) == 0
    return (folder / "review.html").as_uri()


def collected(drafts, *words) -> dict[str, dict]:
    out = drafts.parent / "rows.jsonl"
    main_guard(corpus.main, ["review", "--collect", *map(str, words), "--drafts", str(drafts), "--out", str(out)])
    return {row["prompt"]: row for row in map(json.loads, out.read_text().splitlines())}


def prompt(page) -> str:
    return page.locator("#content > .text").first.text_content()


def answer(page):
    return page.get_by_label("Edit the answer")


def press(page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def test_by_keyboard_alone_from_the_page_to_the_rows(browser, drafts, tmp_path):
    by_prompt = {row.fields["prompt"]: row.fields for row in read_file(drafts)}
    with opened(browser, page_of(drafts)) as page:
        while page.evaluate("document.activeElement.id") != "name":
            press(page, "Tab")
        page.keyboard.type("Änna")
        press(page, "Enter")
        # The first is approved as it is, the second edited, the third rejected, the fourth has a note only.
        approved = prompt(page)
        press(page, "a", "Control+Enter")
        edited = prompt(page)
        press(page, "e", "Control+End")
        page.keyboard.type(" area, typed \u00e4.")  # with the letters that are keys elsewhere
        press(page, "Tab", "Tab")
        page.keyboard.type("crimes")
        press(page, "Tab")
        page.keyboard.type("Green")
        press(page, "Tab", "a", "Control+Enter")
        rejected = prompt(page)
        press(page, "r")
        page.keyboard.type("too cold")
        press(page, "Control+Enter")
        noted = prompt(page)
        while page.evaluate("document.activeElement.parentElement.textContent") != "Note (optional)":
            press(page, "Tab")
        page.keyboard.type("a r e")
        press(page, "Control+Enter")
        assert page.evaluate("document.activeElement.id") == "export"
        assert page.locator("#count").text_content() == "3 of 4 items complete"
        file = tmp_path / "anna.json"
        export(page, file)
    assert {approved, edited, rejected, noted} == by_prompt.keys()
    rows = collected(drafts, file, "--unreviewed")
    whole = by_prompt[edited]
    changes = {"answer": whole["answer"] + " area, typed \u00e4.", "risk cluster": "crimes (sexual)"}
    changes["framework_name"] = "Green Dot Bystander Intervention"
    changes = {name: text for name, text in changes.items() if whole[name] != text}
    assert rows == {
        approved: by_prompt[approved] | {"reviewed_by": ["Änna"], "edited": []},
        edited: whole | changes | {"reviewed_by": ["Änna"], "edited": list(changes)},
        noted: by_prompt[noted],
    }
    report = (tmp_path / "rows.review.md").read_text()
    assert "Änna: reject, because too cold" in report


def test_a_strategy_of_another_cluster_is_named_at_once_and_left_out(browser, drafts, tmp_path):
    with opened(browser, page_of(drafts)) as page:
        start_as(page, "Anna")
        alert = page.get_by_role("alert").filter(has_text="is a strategy of another cluster")
        assert alert.count() == 0
        page.get_by_label("Risk cluster").select_option("substance")
        page.get_by_label("Strategy").select_option("Safety Planning")
        assert alert.text_content().startswith("Safety Planning is") and alert.is_visible()
        page.get_by_label("Strategy").select_option("SOBER")
        assert alert.count() == 0
        page.get_by_label("Risk cluster").select_option("violence")
        assert alert.is_visible()
        page.get_by_role("radio", name="Approve").check()
        left_out = prompt(page)
        page.get_by_role("button", name="Next").click()
        page.get_by_role("radio", name="Approve").check()
        file = tmp_path / "anna.json"
        export(page, file)
    rows = collected(drafts, file)
    assert len(rows) == 1 and left_out not in rows


def test_a_reload_an_edit_taken_back_an_empty_text_and_a_second_reviewer(browser, drafts, tmp_path):
    by_prompt = {row.fields["prompt"]: row.fields for row in read_file(drafts)}
    with opened(browser, page_of(drafts)) as page:
        start_as(page, "Anna")
        first = prompt(page)
        draft = by_prompt[first]["answer"]
        answer(page).fill("Another text.")
        assert page.locator(".part").all_inner_texts() == ["Part not recognised\nAnother text."]
        page.reload()
        assert answer(page).input_value() == "Another text."
        # An empty text, also one taken away letter by letter, or a tag that would cut it, is refused.
        refused = page.get_by_role("alert").filter(has_text="not kept")
        for text in ("", " \n ", "a</think>b"):
            answer(page).focus()
            answer(page).press("Control+a")
            answer(page).press("Backspace")
            answer(page).press_sequentially(text)
            assert refused.count() == 1
            answer(page).blur()
            assert answer(page).input_value() == "Another text."
        answer(page).fill(draft)  # taken back: the row counts as untouched
        page.get_by_label("Reasoning").press("x")
        page.get_by_label("Reasoning").press("Backspace")
        page.get_by_role("radio", name="Approve").check()
        exports = [tmp_path / "anna.json", tmp_path / "ben.json"]
        export(page, exports[0])
        # The second reviewer sees nothing of it, and decides otherwise.
        page.get_by_role("button", name="Change rater").click()
        start_as(page, "Ben")
        assert page.locator("#count").text_content() == "0 of 4 items complete"
        for _ in range(N_ROWS):
            assert page.locator("#content input:checked").count() == 0
            page.get_by_role("radio", name="Reject" if prompt(page) == first else "Approve").check()
            if prompt(page) == first:
                page.get_by_label("Why is it rejected?").fill("no")
            page.get_by_role("button", name="Next").click()
        export(page, exports[1])
        # A file of Anna's in a browser that goes on as Ben is refused; as nobody, it is hers.
        page.get_by_label("Load an exported file").set_input_files(exports[0])
        page.get_by_text("it is Anna's, and you rate as Ben").wait_for()
    with opened(browser, page_of(drafts)) as page:
        content = json.loads(exports[0].read_text())
        content["reviews"][0]["field"] = "prompt"
        bad = {"name": "bad.json", "mimeType": "application/json", "buffer": json.dumps(content).encode()}
        page.get_by_label("Load an exported file").set_input_files(bad)
        page.get_by_text("a review in it is none of this page").wait_for()
        page.get_by_label("Load an exported file").set_input_files(exports[0])
        page.get_by_text("anna.json is loaded").wait_for()
        assert page.locator("#count").text_content() == "1 of 4 items complete"
    rows = collected(drafts, exports[0])
    assert rows == {first: by_prompt[first] | {"reviewed_by": ["Anna"], "edited": []}}
    rows = collected(drafts, *exports)
    assert first not in rows and len(rows) == N_ROWS - 1
    assert all(row == by_prompt[name] | {"reviewed_by": ["Ben"], "edited": []} for name, row in rows.items())


@pytest.mark.parametrize(("scheme", "width"), [("dark", 360), ("light", 1200)])
def test_evil_texts_a_phone_the_dark_and_what_axe_finds(browser, tmp_path, scheme, width):
    bundled = json.loads((ASSETS / "rows" / "val.jsonl").read_text().splitlines()[0])
    evil = bundled | {"prompt": MARKUP, "answer": MARKUP, "reasoning": RIGHT_TO_LEFT, "framework_name": MARKUP}
    evil["language"] = "de"
    drafts, issues = tmp_path / "drafts.jsonl", tmp_path / "issues.jsonl"
    drafts.write_text("".join(json.dumps(row) + "\n" for row in (evil, bundled)))
    parts = ("step", "closing", "answer", "prompt", "reasoning")
    warnings = [{"check": "any", "part": part, "text": f"{part} {MARKUP}"} for part in parts]
    lines = [{"row": n, "prompt": row["prompt"], "issues": warnings} for n, row in enumerate((evil, bundled), 1)]
    issues.write_text("".join(json.dumps(line) + "\n" for line in lines))
    look = {"color_scheme": scheme, "viewport": {"width": width, "height": 740}}
    with opened(browser, page_of(drafts, "--warnings", issues), **look) as page:
        assert page.locator("#notice a[href^='tel:']").count() > 0 and violations(page) == []
        start_as(page, MARKUP[:80])
        labels, read_aloud = {}, {}
        for _ in range(2):
            labels[prompt(page)] = page.locator(".part .label").all_text_contents()
            nodes = page.locator("#content [lang]")
            read_aloud[prompt(page)] = nodes.evaluate_all("nodes => Array.from(new Set(nodes.map(one => one.lang)))")
            shown = page.locator("#content .note").all_text_contents()
            assert sorted(text.partition("): ")[2] for text in shown) == sorted(one["text"] for one in warnings)
            page.get_by_role("radio", name="Reject").check()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert violations(page) == []
            page.get_by_role("button", name="Next").click()
        assert labels[bundled["prompt"]] == ["Acknowledgement and refusal", "Self-help step", "Professional services",
                                             "Hopeful closing"]  # fmt: skip
        page.get_by_label("Go to").select_option(index=list(labels).index(bundled["prompt"]))
        following = page.locator(".part.step + .note, .part.closing + .note").all_text_contents()
        assert following == [f"Warning (Self-help step): step {MARKUP}", f"Warning (Hopeful closing): closing {MARKUP}"]
        assert read_aloud == {MARKUP: ["de"], bundled["prompt"]: ["en"]}
        # The row is German, where any address is enough: `document.title` looks like one.
        assert set(labels[MARKUP]) == {"Professional services"}
        assert page.title() == review.TITLE and page.locator("img").count() == 0
