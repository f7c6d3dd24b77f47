"""Models of the Hugging Face hub by name; needs the network, or what it has left in the cache."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from seqeff.checks import UserError

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
# some repositories hold the same weights once more under other names
_FILES = ("*.json", "merges.txt", "*.jinja", "model*.safetensors")
_TORCH_FILES = ("pytorch_model*.bin",)


def is_name(source: str) -> bool:
    """Whether `OWNER/NAME` or `OWNER/NAME@REVISION` is meant, and not a directory that exists."""
    return not Path(source).exists() and _NAME.fullmatch(source) is not None


def check_new_name(name: str) -> None:
    """Raises a UserError if nothing can be uploaded under a name, whatever the network says."""
    _hub()
    if _NAME.fullmatch(name) is None or "@" in name:
        raise UserError(f"--push {name} is no name of the hub: give OWNER/NAME")


def pull(name: str) -> Path:
    """Downloads a model, or finds it in the hub's cache.

    Args:
      name: `OWNER/NAME`, with `@REVISION` for a commit, a branch or a tag.

    Returns:
      Its directory, which is called as its commit.

    Raises:
      UserError: there is no such model or no network, or the model needs an agreement.
    """
    repository, _, revision = name.partition("@")
    with _told(
        f"get {name} from the Hugging Face hub",
        "there is no such directory either; see to the network and the name, or download the model "
        "elsewhere and give its directory",
    ):
        hub = _hub()

        def download(files: tuple[str, ...]) -> Path:
            # folders inside a repository hold the model in other formats
            return Path(
                hub.snapshot_download(
                    repository,
                    revision=revision or None,
                    allow_patterns=list(files),
                    ignore_patterns=["*/*"],
                )
            )

        directory = download(_FILES)
        if not any(directory.glob("*.safetensors")):
            directory = download(_TORCH_FILES)
        return directory


def push(directory: Path, name: str) -> str:
    """Uploads a directory as a model, private where the name is new.

    Returns:
      Its address.

    Raises:
      UserError: there is no network, or no right to write there.
    """
    with _told(
        f"upload {directory} to the Hugging Face hub as {name}",
        "see to the network and to `hf auth login`, and give the same command again",
    ):
        api = _hub().HfApi()
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=directory)
        return str(address)


def _hub() -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise UserError("the hub needs a package: pip install huggingface_hub") from error
    return huggingface_hub


@contextlib.contextmanager
def _told(what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    # beside its own errors the library raises those of its HTTP client
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"cannot {what}: {reason.rstrip('.')}; {remedy}") from error
