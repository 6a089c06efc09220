"""An adapter from outside as an artifact, for commands that take results: chat, serve and export."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from rich.console import Console

from alignment.config.model import ModelConfig
from alignment.core.artifacts import FROM_OUTSIDE, POLICY, TOKENIZER, Manifest, folder_name, publish, read_manifest
from alignment.core.errors import ModelError
from alignment.core.fingerprint import digest
from alignment.core.locks import held
from alignment.core.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from alignment.pipeline.execute.display import announcer
from alignment.pipeline.sources import bundled_model, model_sources
from alignment.pipeline.sources.model_sources import ModelSource
from alignment.pipeline.sources.peft_adapters import read_adapter, refuse_other_base

_OF_TOKENIZER = ("*.json", "*.jinja", "*.model", "*.txt")


def artifact_of_adapter(source: str, console: Console) -> Path:
    """The folder of an artifact in the cache with the adapter of a source, and the tokenizer that belongs to it.

    It is made at the first call; the adapter and its base model are downloaded if they are a hub's.

    Raises:
        ModelError: the adapter is not supported, names no base model that is here or on a hub, or does not fit it.
    """
    folder = _here(source, where="RESULT", console=console).folder
    assert folder is not None, "it is on this machine"
    adapter = read_adapter(folder, where=source)
    if not adapter.base:
        raise ModelError(
            "names no base model that is on this machine or on a hub",
            where=str(folder / ADAPTER_CONFIG),
            remedy="set base_model_name_or_path to the folder or the name of its base model",
        )
    base = _here(adapter.base, where=source, console=console)
    refuse_other_base(adapter, base, where=source)
    fingerprint = digest([model_sources.identity_of_folder(folder), base.identity])
    artifact = bundled_model.cache_root() / "adapters" / folder_name(FROM_OUTSIDE, fingerprint)
    artifact.parent.mkdir(parents=True, exist_ok=True)
    with held(artifact.with_suffix(".lock"), wait=True):
        if read_manifest(artifact) is None:
            _publish(folder, base, artifact, fingerprint)
    return artifact


def _here(source: str, *, where: str, console: Console) -> ModelSource:
    model = model_sources.resolve(source, where=where, adapter_fits=True)
    return model if model.ready else model_sources.fetch(model, announce=announcer(console))


def _publish(folder: Path, base: ModelSource, artifact: Path, fingerprint: str) -> None:
    assert base.folder is not None, "it is on this machine"
    own = f"adapters/0-{folder.name}"
    with tempfile.TemporaryDirectory(dir=artifact.parent) as scratch:
        content = Path(scratch) / "content"
        for part in (own, TOKENIZER):
            (content / part).mkdir(parents=True)
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copyfile(folder / name, content / own / name)
        has_tokenizer = (folder / "tokenizer_config.json").is_file()
        for file in (file for form in _OF_TOKENIZER for file in (folder if has_tokenizer else base.folder).glob(form)):
            shutil.copyfile(file, content / TOKENIZER / file.name)
        manifest = Manifest(
            stage=FROM_OUTSIDE,
            kind=POLICY,
            fingerprint=fingerprint,
            identity={"kind": FROM_OUTSIDE, "base": {"content": base.identity, "dtype": ModelConfig().dtype.value}},
            base={"source": base.source, "path": str(base.folder), "content": base.identity},
            adapters=[own],
        )
        publish(content, artifact, manifest)
