"""The short form of a recipe, without a list ``defaults``, in the form that Hydra reads.

``stages: {sft: {adapter: qlora}, best: {kind: sft}}`` becomes a list of choices and the rest of the settings. A stage's
kind is its name, or its ``kind``. ``adapter``, ``launch``, ``tracking``, ``model`` and stages may name a file of
``conf/``, by ``launch: zero3`` or, with further settings, by ``launch: {use: zero3, num_processes: 8}``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alignment.config import yaml_file
from alignment.config.faults import Fault
from alignment.config.run import SEVERAL, conf_folder
from alignment.stages import registry

USE = "use"
GROUPS = ("model", "launch", "tracking", "adapter")
_NAME = re.compile(r"\w[\w-]*")
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
_SCHEMES = ("hub:", "path:", "bundled:")
_STAGE_ADAPTER = re.compile(r"(stages\.[\w-]+\.adapter)=(\w[\w-]*)")
_ADAPTER = "/adapter@adapter"


def written_faults(content: Mapping[str, Any], folder: Path) -> Iterator[Fault]:
    """What cannot be the list ``defaults``, or the short form of one."""
    if "defaults" in content:
        if not isinstance(content["defaults"], list):
            yield Fault(where="defaults", message="it is a list, such as [quickstart, _self_]; or leave it out")
        return
    model, adapter = content.get("model"), content.get("adapter", {})
    if isinstance(model, str) and not model_source(model, folder) and _file("model", model, folder) is None:
        message = (
            f"{model!r} is no file of conf/model ({_files('model')}); write ORG/NAME, ORG/NAME@REVISION or ./FOLDER"
        )
        yield Fault(where="model", message=message)
    if not _is_name(adapter) and not isinstance(adapter, Mapping):
        message = f"{adapter!r} is neither a file of conf/adapter ({_files('adapter')}) nor a group of settings"
        yield Fault(where="adapter", message=message)
    stages = content.get("stages")
    named = stages if isinstance(stages, Mapping) else {}
    groups = {group: content.get(group) for group in GROUPS} | {f"stages.{name}": named[name] for name in named}
    groups |= {f"stages.{name}.adapter": _in(named[name], "adapter") for name in named}
    for where, group in groups.items():
        used = _in(group, USE)
        if used is not None and not _is_name(used):
            yield Fault(where=f"{where}.{USE}", message=f"{used!r} is not the name of a file of conf/")
    for name, stage in named.items():
        kind = _in(stage, "kind")
        if "." in str(name):
            yield Fault(where=f"stages.{name}", message=f"a name without a dot, such as {str(name).replace('.', '_')}")
        if kind is not None and _in(stage, USE) is not None:
            yield Fault(where=f"stages.{name}.kind", message=f"leave it out; the file that {USE!r} names has a kind")
        elif kind not in registry.kinds() and _file("stage", kind, folder) is not None:
            yield Fault(where=f"stages.{name}.kind", message=f"{kind!r} is a file of conf/stage; write {USE}: {kind}")


def names_model(content: Mapping[str, Any]) -> bool:
    """Whether a recipe names the base model, by a file or by its source."""
    chosen = "override /model" in str(content.get("defaults"))
    model = content.get("model")
    return chosen or isinstance(model, str) or bool(_in(model, "source") or _in(model, USE))


def long_form(content: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """The content of a recipe of ``folder`` with the list ``defaults``; unchanged if it has one. An adapter beside the
    stages counts for those that train, unless they or their files have their own."""
    if "defaults" in content:
        return content
    settings = {**content, "stages": content.get("stages", {})}
    model = settings.get("model")
    if isinstance(model, str) and (source := model_source(model, folder)):
        settings["model"] = {"source": source}
    chosen = {group: _take(settings, group) for group in ("model", "launch", "tracking")}
    added: list[Any] = []
    overrides: list[Any] = [{f"override /{group}": file} for group, file in chosen.items() if file]
    if isinstance(settings["stages"], Mapping):
        common = settings.get("adapter", {})
        stages = {name: {} if stage is None else stage for name, stage in settings["stages"].items()}
        settings["stages"] = stages
        for name, stage in stages.items():
            if not isinstance(stage, Mapping):
                continue
            stages[name] = body = dict(stage)
            file, has_choice = _take_file(name, body, folder, added)
            if has_choice or (file is None and registry.trains(str(body.get("kind", name)))):
                settings.pop("adapter", None)  # some stage takes it
                _add_common(body, common)
            if adapter := _take(body, "adapter"):
                entries, override = (overrides, "override ") if has_choice else (added, "")
                entries.append({f"{override}/adapter@stages.{name}.adapter": adapter})
    return {"defaults": ["base", *added, *overrides, "_self_"], **settings}


def _take_file(name: Any, body: dict[str, Any], folder: Path, added: list[Any]) -> tuple[Path | None, bool]:
    """Adds the choice of a stage's file, which leaves the settings of the stage; the file, and whether it chooses an
    adapter. A stage of a kind from elsewhere has none."""
    is_named = USE in body
    choice = body.pop(USE, body.get("kind", name))
    file = _file("stage", choice, folder)
    if file is not None or is_named:
        added.append({f"stage@stages.{name}": choice})
    return file, file is not None and _chooses_adapter(file, folder, set())


def _add_common(body: dict[str, Any], common: Any) -> None:
    """Puts the adapter that all stages have below that of one, unless this one names a file of its own."""
    own, shared = (group if isinstance(group, Mapping) else {USE: group} for group in (body.get("adapter", {}), common))
    if USE not in own and (merged := {**shared, **own}):
        body["adapter"] = merged


def _chooses_adapter(file: Path, folder: Path, seen: set[Path]) -> bool:
    """Whether a file of a stage chooses an adapter, itself or by a file of a stage that it includes."""
    content = yaml_file.read(file)
    entries = content.get("defaults") or [] if isinstance(content, Mapping) else []
    included = {path for entry in entries if (path := _file("stage", entry, folder)) is not None} - seen
    return _ADAPTER in str(entries) or any(_chooses_adapter(other, folder, seen | included) for other in included)


def _in(group: Any, key: str) -> Any:
    return group.get(key) if isinstance(group, Mapping) else None


def _take(settings: dict[str, Any], group: str) -> Any:
    """The file, or files, that a group names, which leaves the settings; None if it names none."""
    value = settings.get(group)
    if _is_name(value) or (isinstance(value, list) and value and all(map(_is_name, value)) and group in SEVERAL):
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


def _files(group: str) -> str:
    return ", ".join(sorted(path.stem for path in (conf_folder() / group).glob("*.yaml")))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None
