"""What a worker is told: one frozen ``stage.yaml``, written by the driver (docs/design/0001)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignment.config.data import DataConfig, SourceConfig
from alignment.config.launch import Offload, Sharding
from alignment.config.model import AdapterConfig, ModelConfig
from alignment.config.run import TrackingConfig
from alignment.config.stage import StageConfig
from alignment.config.typed import to_plain
from alignment.core.files import parse_json
from alignment.core.fingerprint import digest
from alignment.core.hardware import versions


@dataclass(frozen=True, kw_only=True, slots=True)
class StageInput:
    """Where a reference leads: ``path`` is an artifact's folder, or None for the run's base model."""

    ref: str
    path: Path | None

    @property
    def is_of_run(self) -> bool:
        """Whether it is the run's base model, or the result of one of its stages."""
        return self.path is None or self.ref.startswith("stage:")


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSpec:
    """One stage, resolved. Paths are absolute. Of how it is launched it knows what its processes share out.
    ``produces`` is the kind of artifact that it makes. ``extra_data`` holds files beside the main one, by the field
    that names them: ``{"ptx.data": Path("…")}``."""

    run: str
    recipe: str
    stage: str
    config: StageConfig
    model: ModelConfig
    base_path: Path
    inputs: dict[str, StageInput]
    arms: dict[str, StageInput]
    data_path: Path
    fingerprint: str
    identity: dict[str, Any]
    input_fingerprints: dict[str, str]
    artifact: Path
    work: Path
    run_folder: Path
    seed: int
    tracking: TrackingConfig
    git_commit: str
    extra_data: dict[str, Path] = field(default_factory=dict)
    sharding: Sharding = Sharding.none
    offload: Offload = Offload.none
    produces: str = ""

    @property
    def adapter(self) -> AdapterConfig | None:
        """How the stage changes the weights; None for one that trains nothing."""
        adapter = getattr(self.config, "adapter", None)
        return adapter if isinstance(adapter, AdapterConfig) else None

    @property
    def made_rows(self) -> dict[str, StageInput]:
        """The results of other stages whose rows this stage reads, by the field of the reference."""
        named = [f"{field}.source" for field in ("data", *self.extra_data)]
        return {name: self.inputs[name] for name in named if name in self.inputs}

    def sources(self, data: DataConfig, field: str) -> list[tuple[SourceConfig, Path]]:
        """The source of ``data``, which the stage has as ``field``, and those that are mixed in, with their files."""
        own = self.data_path if field == "data" else self.extra_data[field]
        mixed = [(part, self.extra_data[f"{field}.mix[{number}]"]) for number, part in enumerate(data.mix)]
        return [(data, own), *mixed]


_NO_MEMORY = ("micro_batch_tokens", "max_steps", "updates", "log_every", "save_every")
"""Settings that say how long a stage goes on, or what is sought."""
_PATHS = ("_name_or_path", "base_model_name_or_path")


def memory_key(config: StageConfig, identity: Mapping[str, Any], inputs: Mapping[str, StageInput]) -> str:
    """A hash of all that decides how much memory a micro-batch of a stage takes, apart from machine and launch. A
    fractional setting, such as a rate or a weight, counts by whether it is 0. Those of data count whole, because they
    decide which rows there are. Of a stage that it starts from, the shapes of its models count and not their
    weights."""
    settings = to_plain(config)
    data = settings.pop("data", None)
    content = {name: identity.get(name) for name in ("base", "data", "extra_data")}
    shapes = {slot: _shapes(made.path) for slot, made in inputs.items() if made.path is not None}
    return digest([_without_rates(settings), data, content, shapes, versions()])


def _without_rates(value: Any) -> Any:
    if isinstance(value, dict):
        if "source" in value and "limit" in value:  # data: a share of it decides which rows there are
            return value
        return {name: _without_rates(item) for name, item in value.items() if name not in _NO_MEMORY}
    if isinstance(value, list):
        return [_without_rates(item) for item in value]
    return value != 0.0 if isinstance(value, float) else value


def _shapes(folder: Path) -> dict[str, str]:
    files = [file for name in ("config.json", "adapter_config.json") for file in folder.rglob(name)]
    return {str(file.relative_to(folder)): digest(_shape(file)) for file in sorted(files)}


def _shape(file: Path) -> Any:
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        content = parse_json(text)
    except ValueError:
        return text
    return {name: value for name, value in content.items() if name not in _PATHS} if isinstance(content, dict) else text
