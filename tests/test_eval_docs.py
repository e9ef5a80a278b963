"""docs/evaluation.md: every command of the page, in order, as it stands there."""

import json
from pathlib import Path

import pytest

from tests.readme_commands import run_page
from tests.stub_endpoint import StubEndpoint, reply_by
from tests.test_eval_judge import VALUES, reply

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_whole_page(tmp_path, monkeypatch):
    """Only the endpoint's address and the folder of the results are this machine's own. The judge behind the endpoint
    says the same of everything."""

    reply_by(monkeypatch, lambda asked: "1" if asked.endswith("[Score]") else reply(VALUES))
    with StubEndpoint() as stub:
        here = {"http://localhost:8000/v1": stub.url, "runs/evaluation": str(tmp_path)}
        run_page(ROOT / "docs" / "evaluation.md", 12, here)
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    by_folder = {Path(part["folder"]).name: part for part in content["evaluations"]}
    # Even one epoch shows: by the words that it looks for, the tuned model supports where the base did not.
    base, tuned = by_folder["judged"]["tables"][0]["rows"]
    assert base[-2] < 40 < tuned[-2]  # overall
    # After one epoch a few benign answers end within their reasoning; no benign prompt is judged.
    assert base[-1] == 0.0 and tuned[-1] <= 10  # unfinished
    assert [row[1:3] for row in by_folder["judged-by-model"]["tables"][0]["rows"]] == [[40, 100.0]] * 2
    assert by_folder["agreement"]["tables"][0]["rows"][0][1] == 8
    # The judge says 1 of all. Prompts on which the tuned model never finished its reasoning are left out of the six.
    (n, compliance), of_tuned = (row[1:3] for row in by_folder["sorry-bench"]["tables"][0]["rows"])
    assert 3 <= n <= 6 and compliance == 100.0 and of_tuned == [n, compliance]
