"""``align push``: uploads an exported folder to a Hugging Face hub."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from alignment.core.errors import AlignmentError, ConfigError, StoreError
from alignment.pipeline.remote.object_store import scrubbed

if TYPE_CHECKING:  # it takes a tenth of a second
    from huggingface_hub import HfApi


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """An exported folder, and the repository that gets it."""
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="a folder that align export wrote")
    add("--to", required=True, metavar="OWNER/NAME", help="a model repository of a Hugging Face hub")
    add("--public", action="store_true", help="make the repository public (default: private)")
    add("--replace", action="store_true", help="if the repository has files, replace them all in one commit")


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Uploads the folder; returns the exit code."""
    push(console, arguments.folder, to=arguments.to, public=arguments.public, replace=arguments.replace)
    return 0


EXPORTED_FILES = ("README.md", "lineage.json")
"""Files that every export has: its model card, and the settings of all stages on the way."""
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_OF_EVERY_REPOSITORY = frozenset({".gitattributes"})
"""What the hub itself puts into a new repository."""


def push(console: Console, folder: str, *, to: str, public: bool, replace: bool) -> None:
    """Uploads all files of an exported folder; a reader sees all of them or none. The token is that of the environment
    (``HF_TOKEN``) or of ``hf auth login``. Raises ConfigError, StoreError."""
    exported = _exported(folder)
    if _REPOSITORY.fullmatch(to) is None:
        raise ConfigError(f"{to!r} is not a repository", where="--to", remedy="OWNER/NAME")
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if token is None:
        raise ConfigError("no token for the hub", where="HF_TOKEN", remedy="set it, or log in: hf auth login")
    api = HfApi(token=token)
    with _explained(api.endpoint, token):
        has_files = _prepared(api, to, public=public, replace=replace)
        commit = api.upload_folder(
            repo_id=to,
            folder_path=exported,
            commit_message=f"Upload {exported.name}",
            delete_patterns="*" if has_files else None,
        )
    console.print(f"pushed: {commit.commit_url}", markup=False, highlight=False, soft_wrap=True)


def _exported(folder: str) -> Path:
    path = Path(folder).expanduser().absolute()
    missing = [name for name in EXPORTED_FILES if not (path / name).is_file()]
    if missing:
        message = f"was not written by align export, because {missing[0]} is missing"
        raise ConfigError(message, where=folder, remedy="first: align export RUN/STAGE --to FOLDER")
    return path


def _prepared(api: HfApi, repository: str, *, public: bool, replace: bool) -> bool:
    """Makes the repository if there is none; returns whether it has files."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repository)
    except RepositoryNotFoundError:
        api.create_repo(repository, private=not public)
        return False
    files = {file.rfilename for file in info.siblings or []} - _OF_EVERY_REPOSITORY
    if files and not replace:
        remedy = "--replace replaces them; or name another repository"
        raise ConfigError(f"{repository} has {len(files)} files", where="--to", remedy=remedy)
    if info.private and public:
        remedy = "make it public in its settings on the hub, or leave out --public"
        raise ConfigError(f"{repository} is private", where="--public", remedy=remedy)
    if not info.private and not public:
        remedy = "add --public if everybody may read it, or name another repository"
        raise ConfigError(f"{repository} is public", where="--to", remedy=remedy)
    return bool(files)


@contextmanager
def _explained(endpoint: str, token: str) -> Iterator[None]:
    from httpx2 import HTTPError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    def words(error: BaseException | None) -> str:
        return scrubbed(str(error).replace(token, "…"))

    try:
        yield
    except AlignmentError:
        raise
    except HFValidationError as error:
        raise ConfigError(str(error), where="--to", remedy="OWNER/NAME, as the hub allows it") from None
    except (HfHubHTTPError, PermissionError, RuntimeError, ValueError, HTTPError, OSError) as error:
        fault, remedy = "the hub cannot be reached", "check the network and try again"
        if isinstance(error, HfHubHTTPError):
            fault, remedy = "the hub refused", "check that the token may write to this repository"
        elif isinstance(error, PermissionError):  # also the upload's own, where a token expires
            fault = "the upload was refused"
            remedy = "check that the token may write to this repository, and that the folder can be read"
        elif isinstance(error, (RuntimeError, ValueError)):  # the client's form for a file that could not be uploaded
            fault = "the upload failed"
            remedy = "try again; if it fails again, check the storage that the account has left"
        cause = error.__cause__ if fault == "the upload failed" else None
        reason = f": {words(cause)}" if isinstance(cause, Exception) else ""
        raise StoreError(f"{fault}: {words(error)}{reason}", where=endpoint, remedy=remedy) from None
