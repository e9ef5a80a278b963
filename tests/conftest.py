"""Shared by all tests. Triton's interpreter stands in for a GPU; it must be chosen before Triton is imported."""

import os
import shutil

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_xdist_auto_num_workers(config):
    """`-n auto`: a worker a core, but each imports torch (0.6 GB), and ranks of a test are processes of their own."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@pytest.fixture(scope="module")
def browser():
    """Chromium, as playwright drives it; without one these tests are skipped, in CI they fail."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no Chromium here")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()
