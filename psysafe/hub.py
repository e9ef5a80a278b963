"""Files from the Hugging Face hub, or from its cache on this machine; the only place that asks for them.

    path = fetch_file("org/name", "config.json")
    folder = fetch_folder("org/name", "main", ["*.json", "*.safetensors"])

Whatever goes wrong is a HubError with the first line of what the hub said.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path


class HubError(Exception):
    """The hub did not give what was asked: no network, no such repository, file or revision, no right to it."""


class GatedError(HubError):
    """The repository's terms have to be accepted first, or the token is missing."""


class MissingFileError(HubError):
    """The repository is there and has no such file."""


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
        raise kind((str(error).strip() or type(error).__name__).splitlines()[0][:200]) from None
