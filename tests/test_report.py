"""eval.py report: everything in it, on every kind of page; quoted answers; what fetches nothing."""

import json
import os
import re
import shutil
import socket
import subprocess
import threading
from pathlib import Path

import pytest

import eval as script
from psysafe.evaluation import charts, published_results
from psysafe.evaluation import result as results
from psysafe.evaluation.result import Result, Table
from psysafe.program import main_guard


def run(*argv: str) -> int:
    return main_guard(script.main, list(argv))


def everything(folder: Path) -> list[str]:
    """A result of every kind, with text that would like to be markup."""
    folders = []
    for kind in ("judge", "agreement", "xstest", "sorry-bench", "mmlu", "hellaswag", "miniature"):
        evil = "base, <script>fetch('http://example.com')</script>"
        rows = [[evil, 40, [3.5, 1.25], 71.9], ["tuned | v0", 40, None, 82.7]]
        columns = [("variant", ""), ("n", ","), ("grounding", ".2f"), ("overall %", ".1f")]
        bars = ["n", "overall %"] if kind == "xstest" else ["overall %"]
        short = Table(f"Table of {kind}", columns, rows, "a note", bars)
        long = Table("A long table", columns[:2], [[f"subject {i}", i] for i in range(57)])
        result = Result(kind, f"Evaluation: {kind}", [short, long], {"model": "tiny"}, ["a remark"])
        result.contamination = {"prompts": 40, "exact": 1, "normalised": 2} if kind == "judge" else None
        result.failed = {"base: item 7": "HTTP 500 <b>"} if kind == "judge" else {}
        result.save(folder / kind)
        folders.append(str(folder / kind))
    return folders


def test_the_report_holds_everything_and_fetches_nothing(tmp_path, capsys):
    folders = everything(tmp_path)
    assert run("report", *folders, "--out", str(tmp_path / "report")) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert page.count('<table class="result">') == 7 * 2 + len(published_results.TABLES)
    assert page.count("<svg") == 8 and "<script>fetch" not in page and "<b>" not in page
    assert not re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?(?!#|data:,)\w', page)
    assert "71.9" in page and "3.50 ± 1.25" in page and "HTTP 500" in page and "40 prompts 1 stand" in page
    for text in ("tuned \\| v0", "| 82.7 |", "not measured", "Published", "professional care"):
        assert text in markdown
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [part["kind"] for part in content["evaluations"]] == [Path(folder).name for folder in folders]
    assert content["evaluations"][0]["versions"]["torch"]
    result, _ = results.load(folders[0])
    assert charts.bars(result.tables[1]) == "" and charts.bars(result.tables[0]).count("<rect") == 2


def test_the_report_in_a_browser(tmp_path):
    """Headless Chromium draws it, and sends nothing anywhere: every connection would go through a proxy that counts."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no Chromium here")
    assert run("report", *everything(tmp_path), "--out", str(tmp_path / "report")) == 0
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def listen():
            while True:
                try:
                    connection, _ = proxy.accept()
                except OSError:
                    return
                asked.append(connection.recv(4096).split(b"\r\n")[0].decode(errors="replace"))
                connection.close()

        threading.Thread(target=listen, daemon=True).start()
        port = proxy.getsockname()[1]
        common = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                  "--no-first-run", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
                  f"--user-data-dir={tmp_path / 'profile'}", f"--proxy-server=http://127.0.0.1:{port}",
                  "--proxy-bypass-list=<-loopback>"]  # fmt: skip
        page = (tmp_path / "report" / "report.html").as_uri()
        environment = {**os.environ, "HOME": str(tmp_path)}
        picture = tmp_path / "report.png"
        shot = [*common, f"--screenshot={picture}", "--window-size=1100,3000", page]
        how = {"env": environment, "capture_output": True, "timeout": 120, "check": True}
        subprocess.run(shot, **how)
        done = subprocess.run([*common, "--dump-dom", page], **how)
        ours = list(asked)
        # The same page with an image from elsewhere and without its policy: that the proxy would have seen.
        text = re.sub("<meta http-equiv[^>]*>", "", (tmp_path / "report" / "report.html").read_text())
        (tmp_path / "leaky.html").write_text(text.replace("<nav ", '<img src="http://example.com/x.png"><nav '))
        subprocess.run([*common, "--dump-dom", (tmp_path / "leaky.html").as_uri()], **how)
    document = done.stdout.decode()
    assert document.count('<table class="result">') == 7 * 2 + len(published_results.TABLES)
    assert document.count("<svg") == 8 and document.count("<rect") == 16
    assert picture.stat().st_size > 20_000
    # The browser itself may ask for its own services; nothing of it is the page's.
    assert not [line for line in ours if "example" in line], ours
    assert [line for line in asked if "example" in line]
    if os.environ.get("KEEP_SCREENSHOT"):
        shutil.copy(picture, os.environ["KEEP_SCREENSHOT"])


def test_published_figures_are_marked_as_the_publications(tmp_path):
    """Every table of theirs, and no table of ours, stands in a block of its own with its source."""
    assert run("report", *everything(tmp_path), "--out", str(tmp_path / "report")) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    blocks = re.findall(r'<div class="published">(.*?)</table></div>(.*?)</div>', page, re.DOTALL)
    assert len(blocks) == len(published_results.TABLES)
    assert all("<h3>Published" in table and published_results.SOURCE in note for table, note in blocks)
    assert page.count("<h3>Published") == len(published_results.TABLES)
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert markdown.count(published_results.NOTE) == len(published_results.TABLES)
