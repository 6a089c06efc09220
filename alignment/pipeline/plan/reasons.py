"""Why a stage has to run: how it differs from the nearest existing result."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.core.artifacts import MANIFEST, Manifest, read_manifest
from alignment.core.errors import ArtifactError

_SHOWN = 3
_ABSENT = "unset"


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """A complete artifact in the store."""

    folder: Path
    manifest: Manifest


def made(artifacts: Path) -> list[Made]:
    """Every complete artifact of a store.

    One whose manifest cannot be read is left out: it may belong to another user or to a newer version, and only a plan
    that needs it has to refuse it.
    """
    complete = []
    for folder in sorted(path.parent for path in artifacts.glob(f"*/{MANIFEST}")):
        with suppress(ArtifactError):
            if (manifest := read_manifest(folder)) is not None:
                complete.append(Made(folder=folder, manifest=manifest))
    return complete


def reason_to_run(
    stage: str, identity: dict[str, Any], refs: dict[str, str], store: list[Made], *, own: Set[str]
) -> str:
    """``beta 0.1 → 0.3 (nearest: dpo-91c0aa17)``, or that there is no result yet.

    ``refs`` maps each slot to its reference, so that a changed input is named by its stage. ``own`` names the results
    of this run, which are preferred; a result of another run is named only if it differs in few settings.
    """
    candidates = [
        candidate
        for candidate in store
        if candidate.manifest.stage == stage and candidate.manifest.identity["kind"] == identity["kind"]
    ]
    if not candidates:
        return "no result yet"
    ours = [candidate for candidate in candidates if candidate.folder.name in own]
    candidates = ours or candidates
    compared = [
        (list(_differences(candidate.manifest.identity, identity, refs)), candidate) for candidate in candidates
    ]
    newest_first = sorted(compared, key=lambda pair: pair[1].manifest.created, reverse=True)
    differences, nearest = min(newest_first, key=lambda pair: len(pair[0]))
    if not ours and len(differences) > _SHOWN:
        return "no result yet with similar settings"
    shown = ", ".join(differences[:_SHOWN])
    more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
    return f"{shown}{more} (nearest: {nearest.folder.name})"


def _differences(old: dict[str, Any], new: dict[str, Any], refs: dict[str, str]) -> Iterator[str]:
    before, after = dict(_leaves(old)), dict(_leaves(new))
    texts = set()
    for path in sorted(before.keys() | after.keys(), key=_own_settings_first):
        if before.get(path) == after.get(path):
            continue
        text = _in_words(path, before.get(path, _ABSENT), after.get(path, _ABSENT), refs)
        if text not in texts:
            texts.add(text)
            yield text


def _in_words(path: tuple[str, ...], old: Any, new: Any, refs: dict[str, str]) -> str:
    head, rest = path[0], ".".join(path[1:])
    if head == "config":
        return f"{rest} {_value(old)} → {_value(new)}"
    if head == "inputs":
        return f"input {refs.get(rest, rest).removeprefix('stage:')} changed"
    if head == "arms":
        if _ABSENT in (old, new):
            return f"arm {rest.removeprefix('stage:')} {'added' if old == _ABSENT else 'removed'}"
        return f"input {rest.removeprefix('stage:')} changed"
    if head == "base":
        return _of_base(rest, old, new)
    if head == "data":
        return "data changed"
    if head in ("extra_data", "files"):
        return f"{rest} changed"
    if head == "shown":
        return f"{rest} {_value(old)} → {_value(new)}"
    if head == "code":
        return "the scoring code changed"
    if head == "rule":
        return "the scoring rule changed"
    if head == "revision":
        return "the stage itself was revised"
    return f"{'.'.join(path)} {_value(old)} → {_value(new)}"


def _of_base(part: str, old: Any, new: Any) -> str:
    if part == "chat_template":
        return f"chat template {_template(old)} → {_template(new)}"
    return "base model changed" if part == "content" else f"{part} {old} → {new}"


def _template(digest: str) -> str:
    return "the tokenizer's own" if digest == _ABSENT else digest[:8]


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for number, item in enumerate(value):
            yield from _leaves(item, (*path[:-1], f"{path[-1]}[{number}]"))
    else:
        yield path, value


def _own_settings_first(path: tuple[str, ...]) -> tuple[bool, tuple[str, ...]]:
    return path[0] != "config", path


def _value(value: Any) -> str:
    """A setting's value as a recipe has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
