"""Files from the Hugging Face hub, or from its cache on this machine; the only place that asks for them.

    path = fetch_file("org/name", "config.json")
    folder = fetch_folder("org/name", "main", ["*.json", "*.safetensors"])

Whatever goes wrong is a HubError of one line; for a data set, which a user names, a UserError that says what to do.
"""

import contextlib
import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from psysafe.printable import one_line
from psysafe.program import UserError

REPOSITORY = r"[\w-][\w.-]*/[\w-][\w.-]*"  # owner/name


class HubError(Exception):
    """The hub did not give what was asked: no network, no such repository, file or revision, no right to it."""


class GatedError(HubError):
    """The repository's terms have to be accepted first, or the token is missing."""


class MissingFileError(HubError):
    """The repository is there and has no such file."""


def is_repository(name: str) -> bool:
    """Whether a name is a repository's, such as org/name: of that form, and nothing of that name lies here."""
    return re.fullmatch(REPOSITORY, name) is not None and not os.path.exists(name)


def did_you_mean(name: str | Path, error: HubError | None = None) -> str:
    """What to add to an error about a folder that is missing: the nearest that lies here, else why the hub did not help
    (runs/tinny has the form of a repository's name, and what the hub says of it is long)."""
    path = Path(name).expanduser()
    folders = [] if path.exists() else [other.name for other in path.parent.glob("*") if other.is_dir()]
    nearest = difflib.get_close_matches(path.name, folders, n=1)
    if nearest and not isinstance(error, GatedError):
        return f"; did you mean {path.parent / nearest[0]}?"
    return f": {error}" if error else ""


def fetch_file(repository: str, file: str, revision: str = "", repo_type: str = "model") -> Path:
    """A file's path in the hub's cache: .../snapshots/COMMIT/FILE. Raises HubError."""
    import huggingface_hub

    with _hub_errors():
        return Path(huggingface_hub.hf_hub_download(repository, file, repo_type=repo_type, revision=revision or None))


def fetch_folder(repository: str, revision: str, patterns: Sequence[str]) -> Path:
    """The folder of a model's files of these names in the hub's cache: .../snapshots/COMMIT. Raises HubError."""
    import huggingface_hub

    with _hub_errors():
        folder = huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns))
        return Path(folder)


class DataSet(NamedTuple):
    """Files of a data set, in the hub's cache. name: as `find_data_set` takes it, with the commit they belong to."""

    name: str
    files: list[Path]


# How the hub numbers the parts of one file: train-00000-of-00002.jsonl; train/0000.parquet on refs/convert/parquet.
PART = re.compile(r"-\d{5}-of-\d{5}(?=\.)|(?<=/)\d{4}(?=\.parquet$)")

# owner/name, owner/name@REVISION, hf://datasets/owner/name/FILE or hf://datasets/owner/name@REVISION/FILE. A Path made
# of the last two has one slash less. The branch refs/convert/parquet holds most data sets as Parquet.
DATA_SET = re.compile(
    r"(?P<scheme>hf:/{1,2}datasets/)?(?P<repository>" + REPOSITORY + r")"
    r"(?:@(?P<revision>(?:refs/(?:convert|pr)/)?[\w.-]+))?(?:/(?P<file>.+))?"
)


def find_data_set(name: str, types: Sequence[str]) -> DataSet | None:
    """The training rows of a data set, or its named file; None where the name can only be that of a file here.

    types: the endings that files of rows have. All files are of one commit. UserError where the hub does not give them.
    """
    match = DATA_SET.fullmatch(name)
    if match is None or Path(name).exists():
        return None
    scheme, repository, revision, file = match.groups()
    if not scheme and (file or name.lower().removesuffix(".gz").endswith(tuple(types))):
        return None  # a file that is missing: the hub is not asked for data/train.jsonl
    if file:
        path = fetch_data(repository, file, revision or "", "or name a file that is here")
        return DataSet(f"hf://datasets/{repository}@{commit_of(path, file)}/{file}", [path])
    commit, files = _list_data_set(repository, revision)
    chosen = _training_files(repository, files, types)
    paths = [fetch_data(repository, file, commit, "or name a file that is here") for file in chosen]
    return DataSet(f"{repository}@{commit}", paths)


def _training_files(repository: str, files: Sequence[str], types: Sequence[str]) -> list[str]:
    """The files of the training split: one, or all parts of one."""
    rows = [file for file in sorted(files) if file.lower().removesuffix(".gz").endswith(tuple(types))]
    rows = [file for file in rows if not Path(file).name.startswith((".", "dataset_info"))]
    chosen = [file for file in rows if re.search(r"(?:^|[/_.-])train(?:[/_.-]|$)", file.lower())] or rows
    # Other numbers are part of a name: mmlu_2023/train.jsonl and mmlu_2024/train.jsonl are two files.
    if len({PART.sub("", file) for file in chosen}) != 1:
        names = ", ".join((chosen or list(files))[:10])
        raise UserError(f"{repository}: which file? name one as hf://datasets/{repository}/FILE (there are: {names})")
    return chosen


def _list_data_set(repository: str, revision: str | None) -> tuple[str, list[str]]:
    """(commit, names of all files)."""
    import huggingface_hub

    try:
        with _hub_errors():
            info = huggingface_hub.HfApi().dataset_info(repository, revision=revision)
    except HubError as error:
        raise UserError(
            f"{repository}: no such file here, and the hub did not list such a data set ({error}); give a file, or "
            f"hf://datasets/{repository}/FILE for one that is in the hub's cache"
        ) from None
    return info.sha, [sibling.rfilename for sibling in info.siblings]


def fetch_data(repository: str, file: str, revision: str, remedy: str) -> Path:
    """`fetch_file` of a data set. UserError ends with the remedy where the hub does not give it."""
    try:
        return fetch_file(repository, file, revision, "dataset")
    except GatedError:
        terms = f"accept its terms on https://huggingface.co/datasets/{repository} and set HF_TOKEN"
        raise UserError(f"{repository}: gated; {terms}, {remedy}") from None
    except HubError as error:
        raise UserError(f"{repository}: the hub did not give {file} ({error}); {remedy}") from None


def commit_of(path: Path, file: str) -> str:
    """The commit in the path of a file in the hub's cache: .../snapshots/COMMIT/FILE."""
    return path.parents[len(Path(file).parts) - 1].name


@contextlib.contextmanager
def _hub_errors() -> Iterator[None]:
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError

    try:
        yield
    # OSError is the base of the hub's HTTP errors too; ValueError is a name that no repository can have.
    except (OSError, ValueError, EntryNotFoundError) as error:
        if isinstance(error, GatedRepoError):
            kind = GatedError
        elif isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            kind = MissingFileError
        else:  # LocalEntryNotFoundError, which is an EntryNotFoundError: not in the cache, and no network to ask
            kind = HubError
        # The hub's first line is often a status and a request's number; what is wrong follows in the next.
        raise kind(one_line(str(error))[:200] or type(error).__name__) from None
