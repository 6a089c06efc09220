"""Adapters from outside, as PEFT saves them: whether stages can start from them, and which base model they need.

A plan reads ``adapter_config.json`` and the headers of weights, but no weights.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.config.model import AdapterConfig, AdapterKind
from alignment.core.errors import ModelError
from alignment.core.files import parse_json
from alignment.core.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, shapes_of_weights
from alignment.pipeline.sources import hub
from alignment.pipeline.sources.model_sources import ModelSource, identity_of_folder

_LORA, _PREFIX = "LORA", "PREFIX_TUNING"
_UNSUPPORTED = (
    *("trainable_token_indices", "layer_replication", "rank_pattern", "alpha_pattern", "lora_bias", "loftq_config"),
    *("alora_invocation_tokens", "arrow_config", "corda_config", "use_qalora", "use_bdlora", "kasa_config"),
    *("lora_ga_config", "monteclora_config", "velora_config", "prefix_projection"),
)
"""Settings of PEFT that change what an adapter's weights mean, so that our products and merges would be wrong."""
_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the base model's weights as they are."""
_FACTOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector(\.weight)?)")
_HEADS = ("lm_head", "embed_out", "output_projection")
_PREFIX_WEIGHTS = "prompt_embeddings"
_BELOW_MODEL = "base_model.model."
_MERGED = "merge it into its base with PEFT (merge_and_unload), save model and tokenizer, and name that folder"

Shapes = dict[str, set[tuple[int, ...]]]
"""The shapes that fit, by the name of a weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftAdapter:
    """An adapter that can be used here. ``needed`` are the base's weights that it changes, with shapes that fit."""

    folder: Path
    settings: Mapping[str, Any]
    needed: Shapes

    @property
    def base(self) -> str:
        """The base model as a source; empty if the adapter names none, or a folder that is not on this machine."""
        name = str(self.settings.get("base_model_name_or_path") or "")
        if name and (Path(name).expanduser() / "config.json").is_file():
            return f"path:{name}"
        revision = self.settings.get("revision")
        source = f"hub:{name}@{revision}" if revision else f"hub:{name}"
        return source if hub.repository(source, kind="model") else ""

    @property
    def shape(self) -> AdapterConfig:
        """Its kind and the settings that a stage cannot change."""
        settings = self.settings
        whole = list(settings.get("modules_to_save") or [])
        if settings["peft_type"] == _PREFIX:
            return AdapterConfig(kind=AdapterKind.prefix, virtual_tokens=settings["num_virtual_tokens"])
        kind = AdapterKind.dora if settings.get("use_dora") else AdapterKind.lora
        rank, alpha, rslora = settings["r"], settings["lora_alpha"], bool(settings.get("use_rslora"))
        return AdapterConfig(kind=kind, rank=rank, alpha=alpha, rslora=rslora, modules_to_save=whole)


def read_adapter(folder: Path, *, where: str) -> PeftAdapter:
    """The adapter in a folder. Raises ModelError: it is damaged, its weights are missing, or it is of a kind that is
    not supported."""
    file = folder / ADAPTER_CONFIG
    try:
        settings = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}", where=where) from error
    if not isinstance(settings, dict):
        raise ModelError(f"{file} is not a JSON object", where=where)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        advice = "only safetensors weights are read, never pickles; save the adapter again with save_pretrained"
        raise ModelError(f"{folder} has no {ADAPTER_WEIGHTS}", where=where, remedy=advice)
    if problem := _unsupported(settings):
        raise ModelError(f"the adapter in {folder} is not supported: {problem}", where=where, remedy=_MERGED)
    shapes = shapes_of_weights(folder)
    whole = tuple(settings.get("modules_to_save") or ())
    if settings["peft_type"] == _LORA and (unknown := [name for name in shapes if not _is_known(name, whole)]):
        message = f"the adapter in {folder} is not supported: it holds {unknown[0]}"
        raise ModelError(message, where=where, remedy=_MERGED)
    return PeftAdapter(folder=folder, settings=settings, needed=_needed(settings, shapes))


def _unsupported(settings: Mapping[str, Any]) -> str:
    kind, task = settings.get("peft_type"), settings.get("task_type")
    if kind not in (_LORA, _PREFIX):
        return f"peft_type is {kind}; LORA (with or without DoRA) and PREFIX_TUNING are"
    if task not in (None, "CAUSAL_LM"):
        return f"task_type is {task}; CAUSAL_LM is"
    # PEFT itself writes these for experts.
    of_experts = ("rank_pattern", "alpha_pattern") if settings.get("target_parameters") else ()
    if names := [name for name in _UNSUPPORTED if settings.get(name) and name not in of_experts]:
        return f"{names[0]} is {settings[names[0]]!r:.80}"
    if settings.get("bias", "none") != "none":
        return f"bias is {settings['bias']!r}; 'none' is"
    if settings.get("init_lora_weights", True) not in _STARTS:
        return f"init_lora_weights is {settings['init_lora_weights']!r}, which changes the base model's weights"
    sizes = ("num_virtual_tokens",) if kind == _PREFIX else ("r", "lora_alpha")
    if missing := [name for name in sizes if not isinstance(settings.get(name), (int, float))]:
        return f"{missing[0]} is {settings.get(missing[0])!r}, which is not a number"
    return ""


def _is_known(name: str, whole: tuple[str, ...]) -> bool:
    if match := _FACTOR.fullmatch(name):
        return match["module"].rpartition(".")[2] not in _HEADS
    return name.rpartition(".")[0].removesuffix(".modules_to_save").endswith(whole) if whole else False


def _needed(settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    """A layer's weight is [outputs, inputs], or the other way round in GPT-2. Factors on experts say too little."""
    needed: Shapes = {}
    for name, shape in shapes.items():
        module, _, part = name.removeprefix(_BELOW_MODEL).rpartition(".lora_")
        if not module and name != _PREFIX_WEIGHTS:
            needed[name.removeprefix(_BELOW_MODEL)] = {shape}
        if part == "A.weight" and not settings.get("target_parameters"):
            outputs, inputs = shapes.get(name.replace("lora_A", "lora_B"), (0,))[0], shape[-1]
            needed[f"{module}.weight"] = {(outputs, inputs), (inputs, outputs)}
    return needed


def refuse_other_base(adapter: PeftAdapter, base: ModelSource, *, where: str) -> None:
    """Checks that an adapter belongs to the run's base model, as far as files on this machine show it. Raises
    ModelError: it names another model, or its shapes do not fit."""
    if (named := adapter.base) and not _may_be(named, base):
        raise ModelError(
            f"the adapter in {adapter.folder} was trained on {named}, not on this run's base model {base.source}",
            where=where,
            remedy=f"set model.source={named}; if {base.source} is a copy of that model, write it into "
            f"base_model_name_or_path of {ADAPTER_CONFIG}",
        )
    if base.folder is None or not base.ready:
        return
    if problem := next(_misfits(adapter.needed, shapes_of_weights(base.folder)), ""):
        message = f"the adapter in {adapter.folder} does not fit this run's base model {base.source}: {problem}"
        remedy = f"set model.source to its base model: {adapter.base or _name_of_base(adapter)}"
        raise ModelError(message, where=where, remedy=remedy)


def doubt(adapter: PeftAdapter, base: ModelSource) -> str:
    """What a plan says about an adapter whose base model was recognised by its shapes alone; empty if by its name."""
    if adapter.base and not (adapter.base.startswith("hub:") and base.source.startswith("path:")):
        return ""
    return f"it names {_name_of_base(adapter)}; only the shapes of the weights were compared"


def _name_of_base(adapter: PeftAdapter) -> str:
    return str(adapter.settings.get("base_model_name_or_path") or "no base model")


def _may_be(named: str, base: ModelSource) -> bool:
    """Whether a base may be the model that an adapter names. A folder of the user's may be a copy of a hub's model."""
    if (wanted := hub.repository(named, kind="model")) is not None:
        given = hub.repository(base.source, kind="model")
        if given is None:
            return base.source.startswith("path:")
        commit = base.identity.rpartition("@")[2]
        is_any = "@" not in named or not base.ready
        return wanted.id == given.id and (is_any or wanted.revision in (commit, given.revision))
    folder = Path(named.removeprefix("path:")).expanduser()
    if base.folder is None or not base.ready:
        return True  # which is looked at again once it is on this machine
    return folder.samefile(base.folder) or identity_of_folder(folder) == identity_of_folder(base.folder)


def _misfits(needed: Shapes, weights: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """What does not fit. Weights are compared by their names within a layer: those of a trunk may lack its prefix."""
    shapes: Shapes = defaultdict(set)
    for name, shape in weights.items():
        shapes[_in_layer(name)].add(shape)
    of_any_layer = {re.sub(r"\d+", "N", name) for name in shapes}
    names = {name: _in_layer(name) for name in needed}
    if names and not any(re.sub(r"\d+", "N", own) in of_any_layer for own in names.values()):
        yield f"that has no {next(iter(names))}"
    for name, own in names.items():
        if own not in shapes:
            if re.sub(r"\d+", "N", own) in of_any_layer:
                yield f"that has no {name}"
        elif not shapes[own] & needed[name]:
            wanted, has = next(iter(sorted(needed[name], reverse=True))), next(iter(shapes[own]))
            yield f"{name} would be {list(wanted)}, but is {list(has)}"


def _in_layer(name: str) -> str:
    """``layers.0.mlp.up_proj.weight`` of ``model.layers.0.mlp.up_proj.weight``; the end of a name without a number."""
    parts = name.split(".")
    numbered = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[max(numbered - 1, 0) :])
