"""Repositories of a hub, with models or data: finds their files on this machine, or fetches them.

The hub's client is imported only here, and only for runs that name a repository.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignment.core.errors import DataError, ModelError
from alignment.core.files import disk_error

_FORM = re.compile(r"hub:(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_LOG_IN = "log in (hf auth login, or HF_TOKEN)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Repository:
    """``hub:ORG/NAME@REVISION`` with a branch, a tag or a commit; ``kind`` is model or dataset."""

    id: str
    revision: str
    kind: str

    @property
    def named(self) -> str:
        """The form that users write, with the revision."""
        return f"hub:{self.id}@{self.revision}"


def repository(source: str, *, kind: str) -> Repository | None:
    """The repository that ``source`` names, by default at the revision main; None if it has another form."""
    match = _FORM.fullmatch(source)
    if match is None:
        return None
    return Repository(id=match["id"], revision=match["revision"] or "main", kind=kind)


def snapshot(
    asked: Repository, *, patterns: Sequence[str], download: bool, failure: type[ModelError | DataError]
) -> Path | None:
    """The folder, named by its commit, with the files that match ``patterns``. It is None if they are not on this
    machine and ``download`` is false. If the hub cannot be reached, a snapshot on this machine is used as it is. Raises
    ModelError or DataError: the type in ``failure``; it cannot be fetched, with the reason and a remedy; DiskError: the
    hub's cache cannot be written to."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            asked.id,
            repo_type=asked.kind,
            revision=asked.revision,
            allow_patterns=list(patterns),
            local_files_only=not download,
        )
    except LocalEntryNotFoundError as error:
        if not download:
            return None
        raise _failed(asked, error, failure) from error
    except Exception as error:  # the client lets through whatever its transport raises
        raise disk_error(error, folder=Path(HF_HUB_CACHE)) or _failed(asked, error, failure) from error
    return Path(folder)


def is_listed(asked: Repository) -> bool:
    """Whether the list of the repository's files is known, so that a snapshot on this machine is complete."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        get_cached_repo_tree(asked.id, repo_type=asked.kind, revision=asked.revision)
    except CachedRepoTreeNotFoundError:
        return False
    return True


def _failed(asked: Repository, error: Exception, failure: type[ModelError | DataError]) -> ModelError | DataError:
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    messages: dict[type[Exception], tuple[str, str]] = {
        GatedRepoError: ("is gated", f"ask for access on its page, then {_LOG_IN}"),
        RepositoryNotFoundError: (
            "does not exist, or is private",
            f"check ORG/NAME; for a private repository, {_LOG_IN}",
        ),
        RevisionNotFoundError: (f"has no revision '{asked.revision}'", "name a branch, a tag or a commit"),
        HFValidationError: ("is not a valid name of a repository", "write hub:ORG/NAME@REVISION"),
        LocalEntryNotFoundError: ("is not on this machine, and its hub cannot be reached", "check the connection"),
    }
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    fitting = (text for kind, text in messages.items() if isinstance(error, kind))
    problem, remedy = next(fitting, ("cannot be downloaded", "try again"))
    return failure(f"{problem}: {reason}", where=asked.named, remedy=f"{remedy}; or give path:FOLDER")
