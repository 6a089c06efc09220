"""Initialises Hydra for one composition, in which each file is checked before Hydra acts on it.

A file that a recipe includes has its own defaults list, whose interpolations Hydra resolves while it composes. The
composed tree no longer shows them, and an error would print the values that they resolved to.

Hydra has one state for the whole process. A caller from Python may use Hydra for a program of its own, so that state is
restored, and threads compose one after another.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.version import VersionBase

from alignment.config import yaml_file
from alignment.config.faults import Fault, refuse
from alignment.pipeline.plan.hostile import hostile

_HYDRA = "1.3"
_IN_USE = threading.RLock()
_READ: dict[tuple[object, ...], ConfigResult] = {}
"""Files as they were read, by name and state: a sweep composes the same ones for every trial."""


class _CheckedFiles(FileConfigSource):
    def load_config(self, config_path: str) -> ConfigResult:
        path = (Path(self.path) / self._normalize_file_name(config_path)).resolve()
        if not path.is_file():
            return super().load_config(config_path)
        state = path.stat()
        key = (self.provider, self.path, config_path, state.st_ino, state.st_size, state.st_mtime_ns)
        if key not in _READ:
            refuse_hostile_defaults(path, yaml_file.read(path))
            _READ[key] = super().load_config(config_path)
        return copy.deepcopy(_READ[key])  # Hydra changes what it gets


@contextmanager
def composing(folder: Path) -> Iterator[None]:
    """Initialises Hydra with the configuration in ``folder``; its files are read through the class above."""
    with _IN_USE:
        Plugins.instance()  # registers Hydra's own class first
        instance, version = GlobalHydra.instance(), VersionBase.instance()
        sources, scheme = SourcesRegistry.instance().types, FileConfigSource.scheme()
        hydra, version_base, source = instance.hydra, version.getbase(), sources[scheme]
        instance.clear()
        sources[scheme] = _CheckedFiles
        try:
            with initialize_config_dir(config_dir=str(folder), version_base=_HYDRA):
                yield
        finally:
            sources[scheme] = source
            version.version_base = version_base
            instance.hydra = hydra
            GlobalHydra.set_instance(instance)  # Hydra put a copy in its place


def refuse_hostile_defaults(path: Path, content: Any) -> None:
    """Refuses a defaults list that would read anything from outside the configuration.

    Raises:
        ConfigError: it would; the error names the entries.
    """
    defaults = content.get("defaults") if isinstance(content, dict) else None
    faults = hostile(defaults, where="defaults")
    refuse([Fault(where=f"{path}: {fault.where}", message=fault.message) for fault in faults])
