"""The files that Hydra reads, each looked at before Hydra acts on it.

A file that a recipe includes has a defaults list of its own, whose interpolations Hydra resolves while it composes: a
composed tree shows nothing of them any more, and an error names what they became.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult

from alignment.config import yaml_file
from alignment.config.faults import Fault, refuse
from alignment.pipeline.plan.hostile import hostile


class _CheckedFiles(FileConfigSource):
    def load_config(self, config_path: str) -> ConfigResult:
        path = (Path(self.path) / self._normalize_file_name(config_path)).resolve()
        if path.is_file():
            refuse_hostile_defaults(path, yaml_file.read(path))
        return super().load_config(config_path)


def check_files() -> None:
    """From here on Hydra reads files by the class above."""
    Plugins.instance()  # which registers Hydra's own class first
    SourcesRegistry.instance().types[FileConfigSource.scheme()] = _CheckedFiles


def refuse_hostile_defaults(path: Path, content: Any) -> None:
    """Returns unless the file's defaults list would have something read from outside the configuration.

    Raises:
        ConfigError: it would; names the entries.
    """
    defaults = content.get("defaults") if isinstance(content, dict) else None
    faults = hostile(defaults, where="defaults")
    refuse([Fault(where=f"{path}: {fault.where}", message=fault.message) for fault in faults])
