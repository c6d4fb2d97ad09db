"""Models on the Hugging Face Hub: the files of a model's folder, there and back.

It takes the package huggingface_hub, which is imported when it is needed. What comes from the Hub is checked as any
model is (`mars.checkpoint.verify`): safetensors and JSON alone, of the sums that its manifest states.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mars.errors import CheckpointError, ConfigError, MarsError, needed

FILES = ("*.json", "*.safetensors", "README.md")  # that a model consists of; others in a repository are not fetched
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def download(name: str, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of the model "user/name" in the cache of huggingface_hub, fetched unless it is there.

    Raises:
        CheckpointError: that is no name of the Hub's, it has no such model, or it cannot be reached.
        MissingPackage: huggingface_hub is not installed.
    """
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"{name} is no folder, and no user/name of the Hugging Face Hub; check the path")
    with needed(f"{name} is not on this machine; a model of the Hugging Face Hub", "huggingface_hub"):
        from huggingface_hub import snapshot_download
    with _told(f"{name} is not on this machine, and from the Hugging Face Hub it cannot be had", CheckpointError):
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=list(FILES)))


def upload(folder: Path, name: str, *, private: bool | None, token: str | None, revision: str | None) -> str:
    """Make the files of the model "user/name" those of the folder, in one commit; the model's address.

    Files that were a model's and are not among them go; others in the repository stay.

    Raises:
        ConfigError: that is no name of the Hub's, or it cannot be reached, or refuses.
        MissingPackage: huggingface_hub is not installed.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"want user/name as the Hugging Face Hub has them, got {name!r:.80}")
    with needed("the Hugging Face Hub", "huggingface_hub"):
        from huggingface_hub import HfApi
    api = HfApi(token=token)
    with _told(f"{name} cannot be sent to the Hugging Face Hub", ConfigError):
        address = str(api.create_repo(name, private=private, exist_ok=True))
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=folder, revision=revision, delete_patterns=list(FILES),
            commit_message="Model of mars",
        )  # fmt: skip
        return address


@contextmanager
def _told(problem: str, error: type[MarsError]) -> Iterator[None]:
    """What huggingface_hub and its HTTP client raise, as one error of ours."""
    from huggingface_hub.errors import HFValidationError, HTTPError  # the latter of its client, whichever that is

    try:
        yield
    except (HTTPError, HFValidationError, OSError) as found:
        cause = found.__cause__ if isinstance(found.__cause__, HTTPError) else found
        lines = [line.strip() for line in str(cause).splitlines() if not line.startswith("For more information")]
        raise error(f"{problem}: {' '.join(filter(None, lines)) or type(cause).__name__}") from found
