"""The figures that the paper published (assets/published.toml), which the report shows beside ours.

They were measured with other prompts, judges and generations than yours may be.
"""

import tomllib

from psysafe.evaluation.result import Table
from psysafe.files import ASSETS

SOURCE = "arXiv 2606.09697 and its model card"
NOTE = f"The publication's figures ({SOURCE}), not measured here; its model, prompts and judge may not be yours."

# Kind of evaluation -> what was published of it.
TABLES = {}
for kind, entry in tomllib.loads((ASSETS / "published.toml").read_text(encoding="utf-8")).items():
    columns = [("published", ""), *map(tuple, entry["columns"])]
    TABLES[kind] = Table(f"Published: {entry['measured']}", columns, entry["rows"], NOTE)
