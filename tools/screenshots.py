"""Makes docs/serve-page.png, the server's page with an answer of the bundled base and of the bundled run's adapter,
docs/rate-page.png, an item of the page on which people rate these two, docs/report-page.png, what the report of an
evaluation of these two shows, and docs/review-page.png, a bundled row on the page on which people review drafts.

    python train.py && python tools/screenshots.py          # or only one of them: tools/screenshots.py rate

Needs `pip install -r requirements-dev.txt -r requirements-serve.txt`, and Chromium.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
ADAPTER = ROOT / "runs" / "tiny"
PROMPT = "I feel like giving up."
MAX_BYTES = 200_000


def main(names: list[str]) -> int:
    if unknown := set(names) - PICTURES.keys():
        print(f"{', '.join(unknown)}: no such picture; expected {', '.join(PICTURES)}", file=sys.stderr)
        return 2
    if names != ["review"] and not (ADAPTER / "adapter_config.json").exists():
        print(f"{ADAPTER}: no adapter in it; run python train.py first", file=sys.stderr)
        return 2
    code = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name in names or PICTURES:
            picture = ROOT / "docs" / f"{name}-page.png"
            PICTURES[name](browser.new_page(viewport={"width": 1000, "height": 700}), picture)
            if picture.stat().st_size > MAX_BYTES:
                print(f"{picture}: {picture.stat().st_size:,} bytes, expected at most {MAX_BYTES:,}", file=sys.stderr)
                code = 1
        browser.close()
    return code


def picture_server(page: Page, picture: Path) -> None:
    command = [sys.executable, "-m", "psysafe.serve", "--adapter", f"tuned={ADAPTER}", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as server:
        try:
            ask(page, page_address(server))
            page.screenshot(path=picture, full_page=True)
        finally:
            server.terminate()


def page_address(server: subprocess.Popen) -> str:
    """Where the page is, once the server says so."""
    for line in server.stderr:
        if match := re.search(r"the page at (\S+)", line):
            return match[1]
        print(line, end="", file=sys.stderr)
    raise RuntimeError("the server did not start")


def ask(page: Page, url: str) -> None:
    """Asks on the page, waits for all answers, and unfolds the reasoning."""
    page.goto(url)
    page.get_by_label("Your prompt").fill(PROMPT)
    page.get_by_label("always the likeliest word").check()
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("done", exact=True).wait_for(timeout=120_000)
    for summary in page.locator("summary").all():
        summary.click()


def picture_rate(page: Page, picture: Path) -> None:
    """The first item, half rated."""
    with tempfile.TemporaryDirectory() as folder:
        answers = answers_in(folder, 4)
        run("eval.py", "rate", "--answers", answers, "--out", folder)
        page.goto(Path(folder, "rate.html").as_uri())
        page.get_by_label("Your name").fill("Anna")
        page.get_by_role("button", name="Begin").click()
        supportive = max(page.locator("article").all(), key=lambda article: len(article.inner_text()))
        for title, value in (("Refusal", "Yes"), ("Psychological Grounding", "4"), ("External References", "Yes")):
            supportive.get_by_role("group", name=title).get_by_label(value, exact=True).check()
        page.locator("#work").screenshot(path=picture)


def picture_report(page: Page, picture: Path) -> None:
    """The charts of all prompts, and the answers to the prompt on which the two differ most. Tables are left out."""
    with tempfile.TemporaryDirectory() as folder:
        answers = answers_in(folder, 50)
        run("eval.py", "judge", "--answers", answers, "--judge", "rules", "--out", f"{folder}/judged")
        run("eval.py", "report", f"{folder}/judged", "--out", f"{folder}/report")
        page.goto(Path(folder, "report", "report.html").as_uri())
        page.evaluate(LEAVE_OUT)
        page.screenshot(path=picture, full_page=True)


# Leaves of the page the heading, the charts of all prompts, the choices and the first prompt.
LEAVE_OUT = """() => {
  const shown = [...document.querySelectorAll("#part0 > .chart")].slice(0, 5);
  const answers = document.querySelector(".answers");
  for (const child of [...document.querySelector("#part0").children]) {
    const isHeading = child.tagName === "H2" || child === shown[0].previousElementSibling;
    if (!isHeading && !shown.includes(child) && child !== answers) child.remove();
  }
  [...answers.querySelectorAll(".item")].slice(1).forEach(item => item.remove());
}"""


def answers_in(folder: str, n: int) -> str:
    """The answers of the bundled base and the bundled run's adapter to the first n held-out prompts, as a file."""
    answers, prompts = f"{folder}/answers.jsonl", str(ROOT / "psysafe" / "assets" / "rows" / "val.jsonl")
    run("generate.py", "--prompts", prompts, "--limit", str(n), "--compare", f"base,{ADAPTER}", "--out", answers)
    return answers


def picture_review(page: Page, picture: Path) -> None:
    """A risky row with a warning, approved. No adapter is needed."""
    with tempfile.TemporaryDirectory() as folder:
        drafts, issues = Path(folder, "drafts.jsonl"), Path(folder, "issues.jsonl")
        row = (ROOT / "psysafe" / "assets" / "rows" / "val.jsonl").read_text().splitlines()[0]
        drafts.write_text(f"{row}\n")
        warning = {"part": "step", "text": "the step is short"}
        issues.write_text(json.dumps({"row": 1, "prompt": json.loads(row)["prompt"], "issues": [warning]}) + "\n")
        run("-m", "psysafe.corpus", "review", str(drafts), "--warnings", str(issues), "--out", folder)
        page.goto(Path(folder, "review.html").as_uri())
        page.get_by_label("Your name").fill("Anna")
        page.get_by_role("button", name="Begin").click()
        page.get_by_role("radio", name="Approve").check()
        page.locator("#work").screenshot(path=picture)


def run(*words: str) -> None:
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)


PICTURES = {"serve": picture_server, "rate": picture_rate, "report": picture_report, "review": picture_review}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
