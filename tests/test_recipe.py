"""docs/recipe.md: every command of the page, in order, as it stands there."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.readme_commands import commands
from tests.test_impute import endpoint  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_whole_road(tmp_path, endpoint):  # noqa: F811
    """Only the endpoint's address and the folder of the results are this machine's own."""
    page = commands((ROOT / "docs" / "recipe.md").read_text(encoding="utf-8"))
    assert len(page) == 11
    for command in page:
        here = command.replace("http://localhost:8000/v1", endpoint.url).replace("runs/recipe", str(tmp_path))
        shell = ["bash", "-euo", "pipefail", "-c", here]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(shell, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"$ {command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert (tmp_path / "report").is_dir()
