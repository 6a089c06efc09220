"""A hub's cache on this machine, as its client leaves it, and what its client raises: nothing here needs a network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = f"hub:org/name@{COMMIT}"


def use_cache(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Has the hub's client and ``datasets`` keep everything below ``cache``."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache / "datasets")


def leave_data_set(
    cache: Path, files: Mapping[str, str | bytes], *, revision: str = "main", listed: tuple[str, ...] | None = ()
) -> Path:
    """A snapshot of the data set org/name with these files, which are links; returns its folder. ``listed`` are more
    files that the hub has; None leaves no list, as some programs do."""
    repository = cache / "hub" / "datasets--org--name"
    folder = repository / "snapshots" / COMMIT
    for part in ("blobs", "refs"):
        (repository / part).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        blob, path = repository / "blobs" / name.replace("/", "-"), folder / name
        blob.write_bytes(content.encode() if isinstance(content, str) else content)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(blob)
    (repository / "refs" / revision).write_text(COMMIT)
    if listed is not None:
        (repository / "trees").mkdir(exist_ok=True)
        tree = {name: {"size": 1, "blob_id": "0"} for name in (*files, *listed)}
        (repository / "trees" / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": tree}))
    return folder


def refusal(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    """What the client raises where the hub refuses."""
    response = SimpleNamespace(headers={}, request=None)
    return kind("403 Client Error.\n\nmore about it", response=response)  # type: ignore[arg-type]


def answer(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> list[dict[str, Any]]:
    """Has the client's download do ``outcome``, or raise it; what it was asked for is listed."""
    asked: list[dict[str, Any]] = []

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.append({"repository": repository, **options})
        if options["local_files_only"]:
            raise LocalEntryNotFoundError("not here")
        if isinstance(outcome, Exception):
            raise outcome
        return str(outcome())

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


def weights_file(content: bytes = b"weights") -> bytes:
    """A file with one tensor, whose bytes are ``content``."""
    tensor = {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}
    header = json.dumps({"weight": tensor}).encode()
    return len(header).to_bytes(8, "little") + header + content


WRITTEN = Path(__file__).parent / "data/written"
PUBLIC = Path(__file__).parents[2] / "shared/data"
needs_public_data = pytest.mark.skipif(not PUBLIC.is_dir(), reason="no public data in ../shared/data")
