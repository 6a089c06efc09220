"""The short form of a recipe, without a list ``defaults``, in the form that Hydra reads.

``stages: {sft: {adapter: qlora}, best: {kind: sft}}`` becomes a list of choices and the rest of the settings. A stage's
kind is its name, or its ``kind``. ``adapter``, ``launch``, ``tracking``, ``model`` and stages may name a file of
``conf/``, by ``launch: zero3`` or, with further settings, by ``launch: {use: zero3, num_processes: 8}``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment.config import yaml_file
from alignment.config.run import conf_folder

USE = "use"
_NAME = re.compile(r"\w[\w.-]*")
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
_SCHEMES = ("hub:", "path:", "bundled:")
_STAGE_ADAPTER = re.compile(r"(stages\.[\w-]+\.adapter)=(\w+)")


def long_form(content: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """The content of a recipe of ``folder`` with the list ``defaults``; unchanged if it has one."""
    if "defaults" in content:
        return content
    settings = dict(content)
    model = settings.get("model")
    if isinstance(model, str) and (source := model_source(model, folder)):
        settings["model"] = {"source": source}
    overrides = [
        {f"override /{group}": chosen}
        for group in ("model", "launch", "tracking")
        if (chosen := _take(settings, group))
    ]
    added: list[Any] = []
    for_all = _take(settings, "adapter")
    stages = settings.get("stages")
    if isinstance(stages, Mapping):
        settings["stages"] = rest = dict(stages)
        for name, stage in stages.items():
            if stage is not None and not isinstance(stage, Mapping):
                continue
            rest[name] = body = dict(stage or {})
            is_named = USE in body
            chosen = body.pop(USE, body.get("kind", name))
            file = _file("stage", chosen, folder)
            if file is not None or is_named:
                added.append({f"stage@stages.{name}": chosen})
            takes_adapter = file is not None and "/adapter@adapter" in str(yaml_file.read(file))
            adapter = _take(body, "adapter") or (for_all if takes_adapter else None)
            if adapter is not None and takes_adapter:
                overrides.append({f"override /adapter@stages.{name}.adapter": adapter})
            elif adapter is not None:
                added.append({f"/adapter@stages.{name}.adapter": adapter})
    return {"defaults": ["base", *added, *overrides, "_self_"], **settings}


def _take(settings: dict[str, Any], group: str) -> Any:
    """The file, or files, that a group names, which leaves the settings; None if it names none."""
    value = settings.get(group)
    is_list = isinstance(value, list) and value and all(map(_is_name, value))
    if _is_name(value) or (is_list and group == "tracking"):
        return settings.pop(group)
    if isinstance(value, Mapping) and _is_name(value.get(USE)):
        settings[group] = {key: item for key, item in value.items() if key != USE}
        return value[USE]
    return None


def model_source(model: str, folder: Path) -> str:
    """The source that a model is named by: ``hub:Qwen/Qwen2.5-0.5B`` for ``Qwen/Qwen2.5-0.5B``; empty for the name of a
    file of ``conf/model``."""
    if model.startswith(_SCHEMES):
        return model
    if model.startswith((".", "/", "~")):
        return f"path:{model}"
    return f"hub:{model}" if _REPOSITORY.fullmatch(model) and _file("model", model, folder) is None else ""


def long_override(text: str, folder: Path) -> str:
    """``stages.sft.adapter=qlora`` and ``model=Qwen/Qwen2.5-0.5B`` as the choice and the setting that Hydra reads."""
    if match := _STAGE_ADAPTER.fullmatch(text):
        return f"adapter@{match[1]}={match[2]}"
    key, _, value = text.partition("=")
    source = model_source(value, folder) if key == "model" else ""
    return f"model.source={source}" if source else text


def _file(group: str, name: Any, folder: Path) -> Path | None:
    """The shipped choice of this name, or that of the recipe's folder."""
    paths = (of / group / f"{name}.yaml" for of in (conf_folder(), folder) if isinstance(name, str))
    return next((path for path in paths if path.is_file()), None)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None
