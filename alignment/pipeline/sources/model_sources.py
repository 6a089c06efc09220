"""Models from outside: the bundled one, a folder, or a hub repository.

Planning reads only what is on this machine; only ``fetch`` downloads.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignment.config.faults import with_scheme
from alignment.core.artifacts import write_json
from alignment.core.errors import ModelError
from alignment.core.files import parse_json
from alignment.core.fingerprint import digest, file_sha256
from alignment.core.model_files import ADAPTER_WEIGHTS, is_adapter, refuse_cut_weights, refuse_weights_elsewhere
from alignment.pipeline.sources import bundled_model, hub

OF_FOLDER = "files-sha256:"
"""Begins the identity of a model in a folder of the user's, which may change; hubs and the package keep theirs."""
_IDENTITY_SUFFIXES = {".json", ".safetensors", ".jinja", ".model", ".txt"}
_LARGE = 16 << 20
_SETTLED_NS = 2_000_000_000
_SHA256 = re.compile("[0-9a-f]{64}")
_SCORER = "ForSequenceClassification"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """A model for a plan. ``identity`` represents its content in a fingerprint. ``folder`` is its present or future
    folder; None for a hub repository that is not on this machine yet, whose ``identity`` then names the requested
    revision."""

    source: str
    identity: str
    folder: Path | None
    ready: bool


def resolve(source: str, *, where: str, adapter_fits: bool = False) -> ModelSource:
    """Looks a model up without downloading anything, or an adapter that PEFT saved if that fits too. Raises ModelError:
    the source has an unknown form, or its folder is not a model."""
    scheme, _, rest = source.partition(":")
    if scheme == "bundled" and rest:
        model = bundled_model.lookup(rest, where=where)
        identity, folder = f"gguf-sha256:{model.sha256}", bundled_model.folder(model)
        if ready := bundled_model.is_ready(model):
            refuse_cut_weights(folder, where=where)
        return ModelSource(source=source, identity=identity, folder=folder, ready=ready)
    if scheme == "path" and rest:
        folder = model_folder(rest, where=where, adapter_fits=adapter_fits)
        return ModelSource(source=source, identity=identity_of_folder(folder), folder=folder, ready=True)
    if repository := hub.repository(source, kind="model"):
        return _hub(source, repository, download=False, where=where, adapter_fits=adapter_fits)
    advice = with_scheme(source) or "write bundled:NAME, path:FOLDER or hub:ORG/NAME@REVISION"
    raise ModelError(f"{source!r} is not a valid model source", where=where, remedy=advice)


def resolve_shapes(source: str, *, where: str, adapter_fits: bool = False) -> ModelSource:
    """Like ``resolve`` for a plan that reads no weights: configuration and tokenizer are enough, and those of a hub's
    model are downloaded. Raises ModelError: the source has an unknown form, or there is no configuration."""
    scheme, _, rest = source.partition(":")
    folder = Path(rest).expanduser().absolute()
    if scheme == "path" and rest and (folder / "config.json").is_file():
        refuse_cut_weights(folder, where=where)
        return ModelSource(source=source, identity=identity_of_folder(folder), folder=folder, ready=True)
    model = resolve(source, where=where, adapter_fits=adapter_fits)
    repository = hub.repository(source, kind="model")
    if model.ready or repository is None:
        return model
    patterns = [ADAPTER_WEIGHTS, *(f"*{suffix}" for suffix in sorted(_IDENTITY_SUFFIXES - {".safetensors"}))]
    snapshot = hub.snapshot(repository, patterns=patterns, download=True, failure=ModelError)
    if snapshot is None:
        return model
    if is_adapter(snapshot):
        return _hub(source, repository, download=False, where=where, adapter_fits=adapter_fits)
    return replace(model, identity=f"hub:{repository.id}@{snapshot.name}", folder=snapshot, ready=True)


def unchanged(source: str, folder: Path, *, identity: str) -> Path | None:
    """The ``folder`` in which a model from ``source`` was, if it still has this identity; otherwise None, and for
    models from elsewhere. The source may say less: a relative path begins at another folder now, and a branch of a hub
    moves on."""
    repository = hub.repository(source, kind="model")
    try:
        if repository is not None:
            now, there = f"hub:{repository.id}@{folder.name}", model_folder(str(folder), where=source)
        elif source.startswith("path:"):
            model = resolve(f"path:{folder}", where=source)
            now, there = model.identity, folder
        else:
            return None
    except (ModelError, OSError):  # such as a folder of another user
        return None
    return there if now == identity else None


def fetch(model: ModelSource, *, announce: bundled_model.Announce) -> ModelSource:
    """The same model, on this machine. Raises ModelError: it cannot be fetched; the error says what is missing."""
    scheme, _, rest = model.source.partition(":")
    if scheme == "bundled":
        bundled_model.ensure(bundled_model.lookup(rest), announce=announce)
    elif not model.ready:
        repository = hub.repository(model.source, kind="model")
        assert repository is not None, "resolve() accepted the form"
        announce(f"downloading {rest} from its hub")
        return _hub(model.source, repository, download=True, where=model.source, adapter_fits=True)
    return resolve(model.source, where="model.source", adapter_fits=True)


def model_folder(path: str, *, where: str, adapter_fits: bool = False) -> Path:
    """A folder with a model in safetensors form, or with an adapter if that fits too. Raises ModelError: it is not such
    a folder, or a weights file was cut short; the error says what is missing."""
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise ModelError(f"no folder {folder}", where=where, remedy="give the folder of a model or an artifact")
    if is_adapter(folder):
        if adapter_fits:
            return folder
        message = f"{folder} contains a PEFT adapter, but a whole model is needed here"
        remedy = "name its base model here, and the adapter as a policy, such as a stage's init"
        raise ModelError(message, where=where, remedy=remedy)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json", where=where, remedy="give the folder of a transformers model")
    if not any(folder.glob("*.safetensors")):
        remedy = "only safetensors weights are read, never pickles; align plan --cost needs no weights"
        raise ModelError(f"{folder} has no *.safetensors file", where=where, remedy=remedy)
    refuse_weights_elsewhere(folder, where=where)
    refuse_cut_weights(folder, where=where)
    return folder


def refuse_policy(model: ModelSource, *, where: str, advice: str) -> None:
    """Accepts a model that gives one score to a text, or that is not on this machine yet. Raises ModelError: it is a
    language model, or a classifier with several labels; ``advice`` is the remedy."""
    if model.folder is None or not model.ready:
        return
    config = _config_of(model.folder, where=where)
    architectures = config.get("architectures") or ["model of an unknown architecture"]
    if not any(str(name).endswith(_SCORER) for name in architectures):
        message = f"{model.folder} contains a {architectures[0]}, which does not give scores"
        raise ModelError(message, where=where, remedy=advice)
    labels = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)
    if labels != 1:
        message = f"{model.folder} contains a classifier with {labels} labels; a reward model has one"
        raise ModelError(message, where=where, remedy=advice)


def _config_of(folder: Path, *, where: str) -> dict[str, Any]:
    try:
        config = parse_json((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder}/config.json is not JSON: {error}", where=where) from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder}/config.json is not a JSON object", where=where)
    return config


def identity_of_folder(folder: Path) -> str:
    """How a fingerprint identifies the model in a folder of the user's: by the content of its files."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in _IDENTITY_SUFFIXES)
    return f"{OF_FOLDER}{digest({path.name: remembered_sha256(path) for path in files})}"


def remembered_sha256(path: Path) -> str:
    """A file's SHA-256; that of a large file is cached as long as the file does not change. Size and modification time
    are not enough: a copy may preserve both. The kernel's change time cannot be set. But two changes within one tick of
    its clock look like one, so the hash of a file that changed just now is not cached."""
    before = path.stat()
    if before.st_size < _LARGE:
        return file_sha256(path)
    memo = bundled_model.cache_root() / "sha256" / f"{digest([str(path.resolve()), *_state(before)])[:32]}.json"
    if (known := _remembered(memo)) is not None:
        return known
    sha256 = file_sha256(path)
    if _state(path.stat()) == _state(before) and time.time_ns() - before.st_ctime_ns > _SETTLED_NS:
        with suppress(OSError):  # a cache that cannot be written costs only the time to read the file again
            memo.parent.mkdir(parents=True, exist_ok=True)
            write_json(memo, {"file": str(path), "sha256": sha256})
    return sha256


def _state(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]


def _remembered(memo: Path) -> str | None:
    try:
        sha256 = parse_json(memo.read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return sha256 if isinstance(sha256, str) and _SHA256.fullmatch(sha256) else None


def _hub(source: str, repository: hub.Repository, *, download: bool, where: str, adapter_fits: bool) -> ModelSource:
    patterns = [f"*{suffix}" for suffix in sorted(_IDENTITY_SUFFIXES)]
    snapshot = hub.snapshot(repository, patterns=patterns, download=download, failure=ModelError)
    # A plan of its cost may have fetched its configuration alone.
    if snapshot is None or not (download or any(snapshot.glob("*.safetensors"))):
        return ModelSource(source=source, identity=repository.named, folder=None, ready=False)
    folder = model_folder(str(snapshot), where=where, adapter_fits=adapter_fits)
    # Another program may have fetched only some of its files, such as the weights without the tokens that end answers.
    ready = download or hub.is_listed(repository)
    return ModelSource(source=source, identity=f"hub:{repository.id}@{folder.name}", folder=folder, ready=ready)
