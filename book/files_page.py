"""The page of file formats: rows of data that are read, and the files that runs leave behind."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import get_type_hints

from alignment import job, records
from alignment.config.typed import to_plain
from alignment.core import artifacts
from alignment.data.formats import COLUMNS, FORMATS
from book.markdown import anchor, code, own_docstring, prose, table, type_words
from book.settings_table import default_of

_INTRO = """\
# File formats

The first part lists the rows of data that a stage can read. The second part describes the files that a run writes.
Programs may read these files. Later versions add fields; if older programs would misread a file, its `version` or
`schema` is higher.

Weights are in safetensors, settings in YAML, and the records below in JSON or JSON Lines."""


def page() -> str:
    """The page."""
    formats = (f"### {name}\n\n{_sentence(form.summary)}\n\n```json\n{form.row}\n```" for name, form in FORMATS.items())
    columns = ", ".join(f"`{name}`" for name in COLUMNS)
    modules = list(_modules())
    classes = {cls: _heading(module, cls) for module in modules for cls in _dataclasses(module)}
    parts = [
        _INTRO,
        "## Rows of data",
        "The columns of a row decide its format, or `data.format` names it. [Data](../data.md) says what each kind of "
        f"stage makes of it. If a file has more columns, only these are read: {columns}.",
        *formats,
        "## Files of a run",
        "A run is recorded in `runs/<run>/`. Each stage leaves one artifact, `artifacts/<stage>-<8 hex>/`.",
    ]
    for module in modules:
        parts += [f"### {_title(module)}", prose(module.__doc__)]
        parts += [_section(cls, classes[cls], classes.get) for cls in _dataclasses(module)]
    return "\n\n".join(parts)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _modules() -> Iterator[ModuleType]:
    """The modules that describe files, those of the chain itself first."""
    yield from (artifacts, job)
    for module_info in pkgutil.iter_modules(records.__path__, f"{records.__name__}."):
        module = importlib.import_module(module_info.name)
        if list(_dataclasses(module)) or (module.__doc__ or "").startswith("``"):
            yield module


def _dataclasses(module: ModuleType) -> Iterator[type]:
    for name, cls in vars(module).items():
        if isinstance(cls, type) and cls.__module__ == module.__name__ and not name.startswith("_"):
            yield from [cls] if dataclasses.is_dataclass(cls) else []


def _title(module: ModuleType) -> str:
    words = module.__name__.rpartition(".")[2].replace("_", " ")
    return f"{words[0].upper()}{words[1:]}"


def _heading(module: ModuleType, cls: type) -> str:
    return f"{_title(module)}: {re.sub(r'(?<=[a-z])(?=[A-Z])', ' ', cls.__name__).lower()}"


def _section(cls: type, heading: str, heading_of: Callable[[type], str | None]) -> str:
    def named(other: type) -> str:
        title = heading_of(other)
        return f"[{title}](#{anchor(title)})" if title else f"`{other.__name__}`"

    hints = get_type_hints(cls)
    rows = (
        (f"`{field.name}`", type_words(hints[field.name], named), _default(field)) for field in dataclasses.fields(cls)
    )
    return "\n\n".join((f"#### {heading}", own_docstring(cls), table(["field", "type", "default"], rows)))


def _default(field: dataclasses.Field[object]) -> str:
    value = default_of(field)
    return "required" if value is dataclasses.MISSING else code(to_plain(value))
