"""Makes docs/serve-page.png: the server's page with an answer of the bundled base and of the bundled run's adapter.

    python train.py && python tools/screenshots.py

Needs `pip install -r requirements-dev.txt -r requirements-serve.txt`, and Chromium.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "serve-page.png"
PROMPT = "I feel like giving up."
MAX_BYTES = 200_000


def main() -> int:
    adapter = ROOT / "runs" / "tiny"
    if not (adapter / "adapter_config.json").exists():
        print(f"{adapter}: no adapter in it; run python train.py first", file=sys.stderr)
        return 2
    command = [sys.executable, "-m", "psysafe.serve", "--adapter", f"tuned={adapter}", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as server:
        try:
            take(page_address(server), PICTURE)
        finally:
            server.terminate()
    if PICTURE.stat().st_size > MAX_BYTES:
        print(f"{PICTURE}: {PICTURE.stat().st_size:,} bytes, expected at most {MAX_BYTES:,}", file=sys.stderr)
        return 1
    return 0


def page_address(server: subprocess.Popen) -> str:
    """Where the page is, once the server says so."""
    for line in server.stderr:
        if match := re.search(r"the page at (\S+)", line):
            return match[1]
        print(line, end="", file=sys.stderr)
    raise RuntimeError("the server did not start")


def take(url: str, picture: Path) -> None:
    """Asks on the page, waits for all answers, unfolds the reasoning, and takes the picture."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 700})
        page.goto(url)
        page.get_by_label("Your prompt").fill(PROMPT)
        page.get_by_label("always the likeliest word").check()
        page.get_by_role("button", name="Ask").click()
        page.get_by_text("done", exact=True).wait_for(timeout=120_000)
        for summary in page.locator("summary").all():
            summary.click()
        page.screenshot(path=picture, full_page=True)
        browser.close()


if __name__ == "__main__":
    sys.exit(main())
