"""How many layers the model has that a stage starts from, as far as a plan can know it from files on this machine."""

from __future__ import annotations

from pathlib import Path

from alignment.config.faults import refuse
from alignment.config.stage import StageConfig
from alignment.core.files import parse_json
from alignment.core.model_files import is_adapter
from alignment.pipeline.sources.model_sources import ModelSource
from alignment.stages.registry import kind_of

_STAGE = "stage:"


class Depths:
    """Numbers of layers of a run's policies, by stage; stages are added in the order of a plan."""

    def __init__(self, base: ModelSource) -> None:
        self._base = base
        self._layers: dict[str, int] = {}

    def add(self, name: str, config: StageConfig, ref: str, folder: Path | None) -> None:
        """Adds a stage that trains; ``ref`` is its ``init``, which leads to ``folder``, or to the base if that is None.

        Raises:
            ConfigError: the stage needs another number of layers.
        """
        layers = self._behind(ref, folder)
        if layers is None:
            return
        learning = kind_of(config).learning
        refuse(list(learning.layer_faults(config, layers, f"stages.{name}")))
        self._layers[name] = learning.layers_left(config, layers)

    def _behind(self, ref: str, folder: Path | None) -> int | None:
        if ref.startswith(_STAGE):
            return self._layers.get(ref.removeprefix(_STAGE))
        folder = self._base.folder if folder is None or is_adapter(folder) else folder
        if folder is None:
            return None
        own = folder / "model"  # of an artifact that holds a whole model
        return _number_in(own if own.is_dir() else folder)


def _number_in(folder: Path) -> int | None:
    """The number of layers in a model's configuration; None if there is none to read, as in a model of another kind."""
    try:
        config = parse_json((folder / "config.json").read_text(encoding="utf-8"))
        layers = config.get("text_config", config).get("num_hidden_layers")
    except (OSError, ValueError, AttributeError):
        return None
    return layers if isinstance(layers, int) else None
