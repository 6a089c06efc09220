"""What happens to a stage: it runs, continues, or its result is reused, from this folder or from a store."""

from __future__ import annotations

import json
from collections.abc import Iterator, Set
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

from alignment.core.artifacts import MANIFEST, Manifest, read_manifest, verify
from alignment.core.errors import ArtifactError
from alignment.pipeline.remote.object_store import ObjectStore
from alignment.pipeline.remote.remote_checkpoints import RemoteCheckpoints, local_work, manifest_in
from alignment.records.run import RunRecord

_SHOWN = 3
_ABSENT = "unset"


def made(artifacts: Path) -> list[tuple[Path, Manifest]]:
    """Every complete artifact of a store, with its manifest. One with an unreadable manifest is left out: it may belong
    to another user or to a newer version, and only a plan that needs it has to refuse it."""
    complete = []
    for folder in sorted(path.parent for path in artifacts.glob(f"*/{MANIFEST}")):
        with suppress(ArtifactError):
            if (manifest := read_manifest(folder)) is not None:
                complete.append((folder, manifest))
    return complete


def _reason_to_run(
    stage: str, identity: dict[str, Any], refs: dict[str, str], store: list[tuple[Path, Manifest]], *, own: Set[str]
) -> str:
    """``beta 0.1 → 0.3 (nearest: dpo-91c0aa17)``, or that there is no result yet. ``refs`` maps each slot to its
    reference. ``own`` names the results of this run, which are preferred; one of another run has to differ in few
    settings."""
    candidates = [
        (folder, manifest)
        for folder, manifest in store
        if manifest.stage == stage and manifest.identity["kind"] == identity["kind"]
    ]
    if not candidates:
        return "no result yet"
    ours = [(folder, manifest) for folder, manifest in candidates if folder.name in own]
    newest_first = sorted(ours or candidates, key=lambda candidate: candidate[1].created, reverse=True)
    compared = [(list(_differences(manifest.identity, identity, refs)), folder) for folder, manifest in newest_first]
    differences, nearest = min(compared, key=lambda pair: len(pair[0]))
    if not ours and len(differences) > _SHOWN:
        return "no result yet with similar settings"
    shown = ", ".join(differences[:_SHOWN])
    more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
    return f"{shown}{more} (nearest: {nearest.name})"


def _differences(old: dict[str, Any], new: dict[str, Any], refs: dict[str, str]) -> Iterator[str]:
    before, after = dict(_leaves(old)), dict(_leaves(new))
    texts = set()
    for path in sorted(before.keys() | after.keys(), key=lambda path: (path[0] != "config", path)):
        if before.get(path) == after.get(path):
            continue
        text = _in_words(path, before.get(path, _ABSENT), after.get(path, _ABSENT), refs)
        if text not in texts:
            texts.add(text)
            yield text


_CHANGED = {
    "data": "data changed",
    "extra_data": "{} changed",
    "files": "{} changed",
    "code": "the scoring code changed",
    "rule": "the scoring rule changed",
    "revision": "the stage itself was revised",
}


def _in_words(path: tuple[str, ...], old: Any, new: Any, refs: dict[str, str]) -> str:
    head, rest = path[0], ".".join(path[1:])
    if head in _CHANGED:
        return _CHANGED[head].format(rest)
    if head == "arms" and _ABSENT in (old, new):
        return f"arm {rest.removeprefix('stage:')} {'added' if old == _ABSENT else 'removed'}"
    if head in ("inputs", "arms"):
        return f"input {refs.get(rest, rest).removeprefix('stage:')} changed"
    if path == ("base", "content"):
        return "base model changed"
    if path == ("base", "chat_template"):
        templates = ["the tokenizer's own" if digest == _ABSENT else digest[:8] for digest in (old, new)]
        return f"chat template {' → '.join(templates)}"
    return f"{rest if head in ('config', 'shown', 'base') else '.'.join(path)} {_written(old)} → {_written(new)}"


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for number, item in enumerate(value):
            yield from _leaves(item, (*path[:-1], f"{path[-1]}[{number}]"))
    else:
        yield path, value


class Action(str, Enum):
    """What happens to a stage."""

    run = "run"
    resume = "resume"
    fetch = "fetch"
    reuse = "reuse"


class Actions:
    """Decides for each stage of a run, by what is in the folder of artifacts and in the ``store``, if there is one."""

    def __init__(self, artifacts: Path, run_folder: Path, store: ObjectStore | None, *, verified: bool) -> None:
        """``verified`` results are read and compared with their hashes; of others, only sizes are compared."""
        self.verified = verified
        self._made = made(artifacts)
        self._own = {Path(stage.artifact).name for stage in RunRecord.read_if_any(run_folder).stages.values()}
        self._store = store

    def decide(
        self,
        name: str,
        fingerprint: str,
        *,
        artifact: Path,
        work: Path,
        described: dict[str, Any],
        refs: dict[str, str],
    ) -> tuple[Action, str]:
        """The action, and its reason in words. Raises ArtifactError: the manifest of a result cannot be read, or is
        that of another one whose fingerprint starts the same; StoreError: from the store."""
        stored = self._store is not None and manifest_in(self._store, artifact.name, fingerprint=fingerprint)
        manifest, damage = read_manifest(artifact), ""
        if manifest is not None:
            if manifest.fingerprint != fingerprint:
                message = "contains another result whose fingerprint starts with the same characters"
                raise ArtifactError(message, where=str(artifact), remedy=f"move {artifact} away")
            damage = damage_of(artifact, content=self.verified)
            if not damage:
                beside = ", here and in the store" if stored else ", here; a run will upload it"
                return Action.reuse, artifact.name + (beside if self._store is not None else "")
        if stored:
            return Action.fetch, damage or f"{artifact.name} from the store"
        if damage:
            return Action.run, damage
        local = local_work(work)
        remote = RemoteCheckpoints(self._store, fingerprint).complete() if self._store is not None else []
        if remote and remote[0].progress > local.progress:
            return Action.resume, f"from {remote[0].label} in the store"
        if local.newest is not None or local.parts:
            return Action.resume, f"from {local.newest.name if local.newest else f'{local.parts} stored parts'}"
        return Action.run, _reason_to_run(name, described, refs, self._made, own=self._own)


def damage_of(artifact: Path, *, content: bool) -> str:
    """Why a result cannot be reused, and what a run does about it; empty if its files are as its manifest lists them.
    Files are compared by their sizes, and by their hashes too if ``content``."""
    try:
        verify(artifact, content=content)
    except ArtifactError as error:
        file = error.where.removeprefix(f"{artifact}/")
        return f"{artifact.name} is damaged: {file}: {error.message}; a run moves it to {aside(artifact).name}"
    return ""


def aside(artifact: Path) -> Path:
    """Where a run moves a damaged result."""
    return artifact.with_name(f"{artifact.name}.damaged")
