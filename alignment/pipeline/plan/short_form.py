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
from alignment.config.run import conf_folder
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
    model = content.get("model")
    if isinstance(model, str) and not model_source(model, folder) and _file("model", model, folder) is None:
        files = ", ".join(sorted(path.stem for path in (conf_folder() / "model").glob("*.yaml")))
        message = f"{model!r} is no file of conf/model ({files}); write ORG/NAME, ORG/NAME@REVISION or ./FOLDER"
        yield Fault(where="model", message=message)
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
    overrides = [{f"override /{group}": file} for group, file in chosen.items() if file]
    added: list[Any] = []
    common = {key: settings[key] for key in ("adapter",) if key in settings}
    common_file = _take(common, "adapter")
    if isinstance(settings["stages"], Mapping):
        settings["stages"] = rest = dict(settings["stages"])
        for name, stage in rest.items():
            if stage is not None and not isinstance(stage, Mapping):
                continue
            rest[name] = body = dict(stage or {})
            is_named = USE in body
            kind = body.pop(USE, body.get("kind", name))
            file = _file("stage", kind, folder)
            if file is not None or is_named:
                added.append({f"stage@stages.{name}": kind})
            has_choice = file is not None and _chooses_adapter(file, folder)
            adapter = _take(body, "adapter")
            if adapter is None and (has_choice or (file is None and registry.trains(str(kind)))):
                settings.pop("adapter", None)
                adapter = common_file
                if own := {**common.get("adapter", {}), **body.get("adapter", {})}:
                    body["adapter"] = own
            if adapter is not None:
                entries, override = (overrides, "override ") if has_choice else (added, "")
                entries.append({f"{override}/adapter@stages.{name}.adapter": adapter})
    return {"defaults": ["base", *added, *overrides, "_self_"], **settings}


def _chooses_adapter(file: Path, folder: Path) -> bool:
    """Whether a file of a stage chooses an adapter, itself or by a file of a stage that it includes."""
    content = yaml_file.read(file)
    entries = content.get("defaults") or [] if isinstance(content, Mapping) else []
    included = [_file("stage", entry, folder) for entry in entries if isinstance(entry, str)]
    return _ADAPTER in str(entries) or any(_chooses_adapter(of, folder) for of in included if of not in (None, file))


def _in(group: Any, key: str) -> Any:
    return group.get(key) if isinstance(group, Mapping) else None


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
