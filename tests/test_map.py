"""The maps are the disk: README's tree of folders, docs/map.md's tree of files, its table and its reading path.

A file or folder that is added, moved or deleted without its line here fails the test, and so does a line that names
what no longer exists.
"""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# These are shown as folders: what lies in them is named by their own tests or by what reads them.
AS_FOLDERS = ("tests/", "benchmarks/results/", "psysafe/assets/")
MAX_WORDS = 8  # of a caption
MAX_FILES = 25  # of the reading path


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.splitlines() if (ROOT / name).exists() and not name.startswith(".")]


def folders() -> set[str]:
    """Every folder with tracked files, as `a/b/`."""
    parents = {parent for name in tracked() for parent in Path(name).parents if parent != Path(".")}
    return {f"{parent.as_posix()}/" for parent in parents}


def section(path: str, heading: str) -> str:
    """The text below a heading, up to the next one of its rank."""
    text = (ROOT / path).read_text(encoding="utf-8")
    below = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^\1 |\Z)", text, re.DOTALL | re.MULTILINE)
    assert below, f"{path} has no heading {heading!r}"
    return below[2]


def tree(text: str) -> dict[str, str]:
    """path -> caption of the first fenced tree: two spaces deeper is one folder deeper, a folder ends in a slash."""
    captions, parents = {}, []
    for line in re.search(r"```text\n(.*?)```", text, re.DOTALL)[1].splitlines():
        indent, name, caption = re.fullmatch(r"( *)(\S+)  +(\S.*)", line).groups()
        parents = parents[: len(indent) // 2]
        captions["".join(parents) + name] = caption
        if name.endswith("/"):
            parents.append(name)
    return captions


def faults(captions: dict[str, str], expected: set[str]) -> list[str]:
    """What a tree lacks, what it has too much, and captions that are no captions."""
    wrong = [f"missing {name}" for name in expected - captions.keys()]
    wrong += [f"not on disk: {name}" for name in captions.keys() - expected]
    wrong += [f"too long: {name}" for name, caption in captions.items() if len(caption.split()) > MAX_WORDS]
    return sorted(wrong)


def expected_folders() -> set[str]:
    """README: every folder except those inside tests and assets, and the files at the root that people run."""
    inside = {name for name in folders() if name.startswith(AS_FOLDERS) and name not in AS_FOLDERS}
    return (folders() - inside) | {"train.py", "generate.py", "eval.py"}


def expected_files() -> set[str]:
    """docs/map.md: every file and folder, except what lies in the folders that are shown as one."""
    return {name for name in tracked() if not name.startswith(AS_FOLDERS)} | (expected_folders())


def test_the_readmes_tree_is_the_tree_on_disk():
    captions = tree(section("README.md", "Where things are"))
    assert not faults(captions, expected_folders())


def test_the_maps_tree_is_the_tree_on_disk():
    captions = tree(section("docs/map.md", "Every file"))
    assert not faults(captions, expected_files())


@pytest.mark.parametrize("change", ["forgotten", "gone", "wordy"])
def test_a_wrong_tree_is_seen(change):
    captions, expected = {"train.py": "the whole run"}, {"train.py"}
    assert not faults(captions, expected)
    expected |= {"new.py"} if change == "forgotten" else set()
    captions |= {"old.py": "moved away"} if change == "gone" else {}
    captions |= {"train.py": "one two three four five six seven eight nine"} if change == "wordy" else {}
    assert faults(captions, expected)


def test_where_is_points_at_code():
    """Each row of the table ends in `file`: `name`, and the file defines the name."""
    rows = re.findall(r"^\|[^|]+\|(.+)\|$", section("docs/map.md", "Where is ...?"), re.MULTILINE)[2:]
    assert len(rows) >= 7
    for row in rows:
        places = re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", row)
        assert places, f"no place in {row}"
        for path, names in places:
            source = (ROOT / path).read_text(encoding="utf-8")
            for name in re.findall(r"`(\w+)`", names):
                assert re.search(rf"^ *((def|class) {name}\b|{name}\b.* = )", source, re.MULTILINE), f"{path}: {name}"


def reading_path(path: str) -> list[tuple[str, int]]:
    steps = section(path, "One row, from file to adapter")
    rows = re.findall(r"^\d+\. `([\w/.]+)` \((\d+) lines\)", steps, re.MULTILINE)
    return [(name, int(lines)) for name, lines in rows]


def test_the_reading_path_exists_and_is_short():
    """Line counts may drift by a sixth before somebody has to write them anew."""
    steps = reading_path("docs/map.md")
    assert 10 <= len(steps) <= MAX_FILES and len({name for name, _ in steps}) == len(steps)
    for name, lines in steps:
        actual = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(actual - lines) <= actual / 6, f"{name} has {actual} lines, the map says {lines}"
    listed = re.findall(r"`([\w/]+\.py)`", section("README.md", "One row, from file to adapter"))
    assert listed == [name for name, _ in steps], "README's reading path is not the map's"
