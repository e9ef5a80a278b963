"""The report's answers in a real browser: order, groups, text, pages and links, by keyboard and mouse; with texts that
would break it, without scripts, on a phone, in the dark, printed; and what axe finds.
"""

import json
from pathlib import Path

import pytest

import eval as script
from psysafe.evaluation import report
from psysafe.evaluation.judged_answers import ASKED, DIFFERENCES, WORST, Answer, Item, Judgement
from psysafe.evaluation.result import Result, Table
from psysafe.printable import plain
from psysafe.program import main_guard
from tests.test_judged_answers import ALL, HALF, ROWS, folder_of, scored
from tests.test_rate_page import EVIL, opened, violations

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    """A report of two evaluations: five prompts, and thirty of two clusters that hold their number."""
    folder = tmp_path_factory.mktemp("report")
    rows = [scored("base", prompt, *base) for prompt, base, _ in ROWS]
    folder_of(folder / "five", rows + [scored("tuned", prompt, *tuned) for prompt, _, tuned in ROWS])
    rows = [scored(variant, f"question {i}", *scores, cluster=("weapon", "violence")[i % 2], reply=f"Reply {i}",
                   response=f"<think>thought {i}</think>answer {i}")
            for variant, scores in (("base", HALF), ("tuned", ALL)) for i in range(30)]  # fmt: skip
    folder_of(folder / "thirty", rows)
    words = ["report", str(folder / "five"), str(folder / "thirty"), "--out", str(folder / "out")]
    assert main_guard(script.main, words) == 0
    return (folder / "out" / "report.html").as_uri()


def prompts(answers) -> list[str]:
    return answers.locator(".item > .text").all_text_contents()  # inner text is only that of items on the screen


def test_orders_groups_and_text(browser, address):
    with opened(browser, address) as page:
        five, thirty = page.locator("#part0-answers"), page.locator("#part1-answers")
        assert prompts(five) == list("aedbc")
        for order, expected in ((WORST, "aebdc"), (ASKED, "abcde"), (DIFFERENCES, "aedbc")):
            five.get_by_label("Order").select_option(order)
            assert prompts(five) == list(expected)
        first = five.locator(".item").first
        assert first.locator("h5").all_text_contents() == ["base", "tuned"]  # side by side
        first.scroll_into_view_if_needed()
        left, right = first.locator("article").evaluate_all(
            "nodes => nodes.map(n => n.getBoundingClientRect().toJSON())"
        )
        assert left["y"] == right["y"] and left["right"] <= right["left"]
        assert "overall 0.0 %" in first.locator("article").first.text_content()
        assert "difference 100.0 %" in first.locator("h4").text_content()
        thirty.get_by_label("cluster").select_option("=violence")
        assert thirty.locator(".count").inner_text() == "15 of 30 prompts"
        assert all(int(prompt.split()[1]) % 2 for prompt in prompts(thirty))
        thirty.get_by_label("Text").press_sequentially("REPLY 2")  # in the judge's words, whatever the case
        thirty.get_by_text("5 of 30 prompts", exact=True).wait_for()
        assert prompts(thirty) == [f"question {i}" for i in (21, 23, 25, 27, 29)]
        thirty.get_by_role("button", name="All prompts").click()
        assert thirty.locator(".count").inner_text() == "30 of 30 prompts, 1 to 25 shown"


def test_by_keyboard_alone(browser, address):
    with opened(browser, address) as page:
        thirty = page.locator("#part1-answers")
        thirty.get_by_label("Order").focus()
        page.keyboard.press("Tab")
        page.keyboard.press("v")  # the group that begins with v
        assert thirty.locator(".count").inner_text() == "15 of 30 prompts"
        page.keyboard.press("Tab")
        page.keyboard.type("question 7")
        thirty.get_by_text("1 of 30 prompts", exact=True).wait_for()
        for _ in range(4):
            page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
        page.keyboard.press("Enter")
        thirty.get_by_text("thought 7", exact=True).first.wait_for()
        assert not thirty.get_by_text("Reply 7", exact=True).count()  # still folded


def test_pages_and_links(browser, address):
    with opened(browser, f"{address}#part1-29") as page:
        thirty = page.locator("#part1-answers")
        assert prompts(thirty)[-1] == "question 29" and len(prompts(thirty)) == 5  # the second page, of 25 each
        assert page.locator("#part1-29").evaluate("item => item === document.activeElement")
        assert page.locator("#part1-29").bounding_box()["y"] < 720
        thirty.get_by_role("button", name="Previous").first.click()
        assert thirty.locator(".count").inner_text() == "30 of 30 prompts, 1 to 25 shown"
        thirty.get_by_role("button", name="Next").last.click()
        assert prompts(thirty)[0] == "question 25"
        thirty.get_by_label("At once").select_option("10")
        thirty.get_by_label("cluster").select_option("=weapon")
        page.evaluate("location.hash = '#part1-2'")  # of the other cluster: the choice goes
        page.locator("#part1-2").wait_for()
        assert thirty.get_by_label("cluster").input_value() == ""
        thirty.get_by_label("At once").select_option("all")
        assert len(prompts(thirty)) == 30
        page.evaluate("location.hash = '#%E0%A4%A'")  # no item, and no error


def evil_report(folder: Path) -> str:
    """Every evil text as a variant, a judge, a cluster, a prompt, an answer, reasoning and a judge's words."""
    items = []
    for number, texts in enumerate(EVIL, 1):
        answers = [Answer(text[:80] or "v", text, text, True, "", [Judgement(text[:80], text[:80], 0.5, text)])
                   for text in texts]  # fmt: skip
        items.append(Item(number, texts[0], {"__proto__": texts[0][:60], "cluster": texts[1][:60]}, answers))
    long = "\U0001f642" * 1999 + "x" + "\U0001f642" * 24_000  # a pair of surrogates lies across the cut
    items.append(Item(len(items) + 1, "long", {}, [Answer("v", long, "", False, "", [])]))
    columns = [("figure", ""), ("variant", ""), ("n", ","), ("value", ".3g"), ("from", ".3g"), ("to", ".3g")]
    rows = [[EVIL[0][0][:80], EVIL[0][1][:80], 9, 50.0, 25.0, 75.0]]
    result = Result("judge", EVIL[0][0][:80], [Table(EVIL[0][1][:80], columns, rows)], {}, [EVIL[0][0]])
    text = report.page([report.Part("f", result, {"finished": "now", "versions": {}}, items)])
    (folder / "evil.html").write_text(text, encoding="utf-8")
    return (folder / "evil.html").as_uri()


@pytest.mark.parametrize(("scheme", "width", "background"), [("dark", 360, "rgb(20, 26, 32)"),
                                                             ("light", 1200, "rgb(255, 255, 255)")])  # fmt: skip
def test_evil_texts_a_phone_the_dark_and_what_axe_finds(browser, tmp_path, scheme, width, background):
    look = {"color_scheme": scheme, "viewport": {"width": width, "height": 740}}
    with opened(browser, evil_report(tmp_path), **look) as page:
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == background
        for summary in page.locator(".answers summary").all():
            summary.click()
        while page.get_by_role("button", name="Show all").count():
            page.get_by_role("button", name="Show all").first.click()
        texts = page.locator(".answers .text").evaluate_all(
            "nodes => nodes.map(node => JSON.stringify(node.textContent))"
        )
        shown = set(map(json.loads, texts))
        assert {plain(text) for texts in EVIL for text in texts if text} <= shown
        assert "\U0001f642" * 1999 + "x" + "\U0001f642" * 24_000 in shown
        assert all(page.locator(".answers .text").evaluate_all("nodes => nodes.map(node => node.dir === 'auto')"))
        assert page.locator("img, .answers script").count() == 0 and page.title() == "Evaluation report"
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert violations(page) == []


@pytest.mark.parametrize(("scheme", "width"), [("dark", 360), ("light", 1200)])
def test_a_usual_report_on_a_phone_and_in_the_dark(browser, address, scheme, width):
    with opened(browser, address, color_scheme=scheme, viewport={"width": width, "height": 740}) as page:
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_long_text_is_cut_between_characters(browser, tmp_path):
    with opened(browser, evil_report(tmp_path)) as page:
        item = page.locator(f"#part0-{len(EVIL) + 1}")
        cut = item.locator("article .text").text_content()
        assert cut == "\U0001f642" * 1999 + "x …"
        item.get_by_role("button", name="Show all 51,999 characters").click()
        assert item.locator("article .text").evaluate("node => node === document.activeElement")


def test_printed_and_without_scripts(browser, address):
    with opened(browser, address) as page:
        page.emulate_media(media="print")
        assert page.locator("#part1-answers .choices").is_hidden() and page.get_by_role("button").count() == 0
        last = page.locator("#part1-answers .item").last
        assert last.evaluate("node => getComputedStyle(node).contentVisibility") == "visible"
    with opened(browser, address, java_script_enabled=False) as page:
        assert "report.md" in page.locator("noscript").inner_text()
        assert page.locator("table.result").first.is_visible()
