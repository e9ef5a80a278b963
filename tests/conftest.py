"""Shared by all tests. Triton's interpreter stands in for a GPU; it must be chosen before Triton is imported."""

import os
import shutil

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The same examples at every run, so that a failure is the change's and not the draw's; and no limits in seconds, which
# a busy machine reaches.
hypothesis.settings.register_profile(
    "the same everywhere", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("the same everywhere")


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
