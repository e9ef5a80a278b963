"""docs/recipe.md: every command of the page, in order, as it stands there."""

from pathlib import Path

import pytest

from tests.readme_commands import run_page
from tests.test_impute import endpoint  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_whole_road(tmp_path, endpoint):  # noqa: F811
    """Only the endpoint's address and the folder of the results are this machine's own."""
    here = {"http://localhost:8000/v1": endpoint.url, "runs/recipe": str(tmp_path)}
    run_page(ROOT / "docs" / "recipe.md", 13, here)
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert (tmp_path / "report").is_dir()
