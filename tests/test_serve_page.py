"""The page: its policy lets only its own script and style run, the helplines are those of services/, and in a real
browser it asks, streams, stops, and shows markup as text."""

# ruff: noqa: F811  (a test's arguments are fixtures, which are imported)

import base64
import hashlib
import html
import re

import pytest

from psysafe.serve.page import Page
from psysafe.services import bundled
from tests.live_server import config, live_server, model, tokenizer  # noqa: F401

EVIL = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"


def test_the_policy_names_the_script_and_the_style_by_their_hashes():
    page = Page()
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page.html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(| on\w+=|style=", page.html)
    assert not re.findall(r'(?:src|action)\s*=\s*"', page.html)


def test_the_helplines_stand_on_top():
    text = html.unescape(Page().html)
    top = text[: text.index("<main>")]
    for service in bundled().of_cluster("suicide and selfharm"):
        assert service.contact in top and service.name in top
    assert all(f'href="tel:{number}"' in top for number in bundled().emergency.values())
    assert "not a substitute for professional care" in " ".join(top.split())


@pytest.mark.slow
def test_in_a_browser(browser, model, tokenizer):
    with live_server(model, tokenizer, served={"models": {"base": None, "twin": None}}) as live:
        live.says = tokenizer.encode(f"{EVIL}</think>\n\n{EVIL} twice {EVIL}")
        page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme="dark")
        faults = []
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(f"http://127.0.0.1:{live.port}/")
        page.get_by_label("twin").wait_for()
        # By keyboard alone: the prompt has the focus, Ctrl+Enter asks.
        page.keyboard.type(EVIL)
        page.keyboard.press("Control+Enter")
        page.get_by_text("done", exact=True).wait_for()
        answers = page.locator("article")
        assert answers.count() == 2 and page.title() == "psysafe: side by side"
        for answer in answers.all():
            assert answer.locator("> .text").text_content() == f"{EVIL} twice {EVIL}"
            assert answer.locator("details .text").text_content() == EVIL
            assert not answer.locator("details").evaluate("node => node.open") and answer.locator("img").count() == 0
        # Nothing is wider than a phone; in the dark the page is dark.
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 26, 32)"
        # Esc stops answers without an end, and the slots are free.
        live.says = None
        page.get_by_role("button", name="Ask").click()
        page.locator("article .text", has_text=re.compile(r"\w")).first.wait_for(state="attached")
        page.keyboard.press("Escape")
        page.locator("#status", has_text="stopped").wait_for()
        live.until(lambda: live.worker.reserved == live.engine.active == 0)
        assert not faults
        page.close()


@pytest.mark.slow
def test_a_key_is_asked_for(browser, model, tokenizer):
    with live_server(model, tokenizer, key="k") as live:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{live.port}/")
        page.get_by_label("The server's key").fill("k")
        page.keyboard.press("Tab")
        page.get_by_label("base").wait_for()
        live.says = tokenizer.encode("a</think>b")
        page.get_by_label("Your prompt").fill("Hello")
        page.get_by_role("button", name="Ask").click()
        page.locator("article > .text", has_text="b").wait_for()
        page.get_by_text("done", exact=True).wait_for()
        # A connection that ends before its answer is no answer.
        page.route("**/v1/chat/completions", lambda route: route.fulfill(body="", content_type="text/event-stream"))
        page.get_by_role("button", name="Ask").click()
        page.locator("article > .state", has_text="the answer was cut off").wait_for()
        page.close()
