"""Files from the Hugging Face hub, or from its cache on this machine; what it refuses is told in one line.

    path = fetch_file("org/name", "config.json")
    folder = fetch_folder("org/name", "main", ["*.json", "*.safetensors"])
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path


class HubError(Exception):
    """The hub did not give what was asked: no network, no such repository, file or revision, no right to it."""


class GatedError(HubError):
    """Its terms have to be accepted first, or the token is missing."""


def fetch_file(repository: str, file: str, revision: str = "", repo_type: str = "model") -> Path:
    """A file's path in the hub's cache: .../snapshots/COMMIT/FILE. Raises HubError."""
    import huggingface_hub

    with _one_line():
        return Path(huggingface_hub.hf_hub_download(repository, file, repo_type=repo_type, revision=revision or None))


def fetch_folder(repository: str, revision: str, patterns: Sequence[str]) -> Path:
    """The folder of a model's files of these names in the hub's cache: .../snapshots/COMMIT. Raises HubError."""
    import huggingface_hub

    with _one_line():
        folder = huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns))
        return Path(folder)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise (GatedError if isinstance(error, GatedRepoError) else HubError)(reason) from None
