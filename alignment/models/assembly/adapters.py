"""Adds adapters to a model, switches between them, and merges them into its weights. The adapter that a stage trains is
PEFT's ``default``. Other adapters are frozen: those of earlier stages below it, or a copy of it as it was when the
stage began."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    TaskType,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import nn
from transformers import PreTrainedModel

from alignment.config.faults import suggestion
from alignment.config.model import AdapterConfig, AdapterKind
from alignment.core.errors import ConfigError, ModelError
from alignment.core.files import write_text
from alignment.core.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from alignment.models.assembly.modules import pattern_beside_text
from alignment.models.assembly.prefix import prefix_of, put_prefix
from alignment.models.kernels.nf4 import start_at_norms
from alignment.models.kernels.products import fuse_adapters

OWN = "default"
START = "start"
_BELOW = "below"
_PREFIX_WEIGHTS = "prompt_embeddings"
_ALL_LINEAR = "all-linear"
_HEADS = ("lm_head", "embed_out", "output_projection")
"""Names of language models' heads, which a model with a scalar head lacks."""


def add_adapter(model: PreTrainedModel, config: AdapterConfig, task: TaskType) -> PreTrainedModel | PeftModel:
    """The model with a new adapter that does not change its outputs yet, or the model itself for full training. A new
    prefix does change them: its keys and values are zero, but take a share of the attention. Raises ModelError: the
    target modules or the modules to save do not exist in this model, or the target modules are its head or its
    embeddings."""
    if config.kind is AdapterKind.full:
        return model
    if config.kind is AdapterKind.prefix:
        prefix = PrefixTuningConfig(num_virtual_tokens=config.virtual_tokens, init_weights="zero", task_type=task)
        return put_prefix(get_peft_model(model, prefix))
    targets: str | list[str] = list(config.target_modules)
    if name := on_embeddings(model, targets):
        raise ModelError(
            f"factors on {name} are not supported",
            where="adapter.target_modules",
            remedy=f"leave it out, or train it whole: adapter.modules_to_save=[{name}]",
        )
    if config.target_modules == [_ALL_LINEAR]:
        targets = _ALL_LINEAR
    is_head_gone = task is not TaskType.CAUSAL_LM
    _refuse_unknown(
        model, [name for name in config.modules_to_save if not (is_head_gone and name.rpartition(".")[2] in _HEADS)]
    )
    is_tied = _are_tied(model, config.modules_to_save)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        use_dora=config.kind is AdapterKind.dora,
        target_modules=targets,
        exclude_modules=pattern_beside_text(model),
        modules_to_save=_recognised(config.modules_to_save) if is_tied else list(config.modules_to_save) or None,
        ensure_weight_tying=is_tied,
        task_type=task,
    )
    try:
        adapted = compute_in_base_dtype(get_peft_model(model, lora))
    except ValueError as error:
        raise ModelError(
            f"the adapter does not fit: {error}",
            where="adapter.target_modules",
            remedy="this model has experts, which DoRA does not support: use adapter=lora"
            if "use_dora" in str(error)
            else "name linear modules of this model, or use ['all-linear']",
        ) from error
    if is_tied:  # PEFT has taken out the head's name, but may need it again when the adapter is loaded
        lora.modules_to_save = _recognised(lora.modules_to_save)
    if model.device.type != "meta":  # weights without numbers have no norms
        start_at_norms(adapted)
    return adapted


def _refuse_unknown(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Refuses modules that the model lacks, which PEFT would leave out. Raises ModelError: no module of the model has
    such a name."""
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    known = dict.fromkeys(own for path in paths if (own := path.rpartition(".")[2]) and not own.isdigit())
    for name in names:
        if not any(path.endswith(name) for path in paths):
            raise ModelError(
                f"no module of this model is called {name!r}",
                where="adapter.modules_to_save",
                remedy=suggestion(name.rpartition(".")[2], known),
            )


def _are_tied(model: PreTrainedModel, names: Iterable[str]) -> bool:
    head = model.get_output_embeddings()
    if head is None or not model.config.tie_word_embeddings:
        return False
    paths = [_path_of(module, model) for module in (model.get_input_embeddings(), head)]
    return any(path.endswith(name) for name in names for path in paths)


def _recognised(names: Iterable[str]) -> list[str]:
    """The names of modules with tied weights, which PEFT ties only if one of them is ``embed_tokens`` or ``lm_head``.
    Other models may lack that module; PEFT finds the head by its weights."""
    names = list(names)
    return names if any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in names) else [*names, "lm_head"]


def _path_of(module: nn.Module | None, model: PreTrainedModel) -> str:
    return next((path for path, other in model.named_modules() if other is module), "")


def on_embeddings(model: PreTrainedModel, targets: Iterable[str]) -> str:
    """The target that is the model's head or its embeddings; empty without one. The fast forward leaves out factors on
    the head. Embeddings with factors lack attributes that stages read, and change a tied head too when they are
    merged."""
    targets = list(targets)
    for module in (model.get_output_embeddings(), model.get_input_embeddings()):
        path = _path_of(module, model)
        if any(f".{path}".endswith(f".{target}") for target in targets):
            return path.rpartition(".")[2]
    return ""


def train_on(model: PreTrainedModel, folder: Path, config: AdapterConfig, task: TaskType) -> PeftModel:
    """The model with a saved adapter that will be trained further, and an inactive frozen copy of that adapter. Raises
    ConfigError: the adapter has another kind or shape than ``config``. Raises ModelError: it was made for another
    architecture."""
    saved = saved_config(folder)
    _refuse_other_shape(saved, config, folder)
    saved.task_type, saved.inference_mode = task, False
    if not saved.is_prompt_learning:
        saved.lora_dropout = config.dropout  # how it is trained, which this stage decides; not part of its shape
    wrapped = get_peft_model(model, saved)
    _load(wrapped, folder, OWN)
    if is_prefix(folder):
        return put_prefix(wrapped)
    return _with_frozen(wrapped, folder, START)


def add_frozen(model: PeftModel, folders: Sequence[Path]) -> PeftModel:
    """Adds saved, frozen adapters below the model's own. Raises ModelError: an adapter was made for another
    architecture."""
    for number, folder in enumerate(folders):
        _with_frozen(model, folder, f"{_BELOW}{number}")
    return with_own(model)


def with_own(model: PeftModel) -> PeftModel:
    """Activates the adapters below the model's own, and its own last, as it is trained and used."""
    for layer in _layers(model):  # PEFT's own method would also change which adapters are trained
        layer._active_adapter = [*(name for name in model.peft_config if name.startswith(_BELOW)), OWN]
    return model


def put_in_order(folder: Path, *, base: Path | None = None) -> None:
    """Sorts the lists of names in a saved adapter's configuration, because PEFT writes sets in random order. ``base``
    is where the model will be that the adapter belongs to, if not where it was loaded from."""
    file = folder / ADAPTER_CONFIG
    settings = json.loads(file.read_text(encoding="utf-8"))
    if base is not None:
        settings["base_model_name_or_path"] = str(base)
    lists = {key: value for key, value in settings.items() if isinstance(value, list)}
    names = {key: sorted(value) for key, value in lists.items() if all(isinstance(item, str) for item in value)}
    write_text(file, json.dumps(settings | names, indent=2, sort_keys=True))


def put_back(model: PreTrainedModel, folders: Sequence[Path], *, trainable: bool) -> PeftModel:
    """The model with saved adapters on the weights that they were trained on, bottom first; the last is its own. Raises
    ModelError: an adapter was made for another architecture."""
    if is_prefix(folders[-1]):
        return _put_back_prefix(model, folders[-1], trainable=trainable)
    try:
        wrapped = _with_saved(model, folders[-1], trainable=trainable)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"this adapter does not fit the model: {error}", where=str(folders[-1])) from error
    return add_frozen(wrapped, folders[:-1]).eval() if folders[1:] else compute_in_base_dtype(wrapped).eval()


def _put_back_prefix(model: PreTrainedModel, folder: Path, *, trainable: bool) -> PeftModel:
    """PEFT refuses to train a prefix that was loaded."""
    saved = saved_config(folder)
    saved.inference_mode = False
    saved.base_model_name_or_path = None  # where the base was; PEFT would warn if it is elsewhere now
    wrapped = get_peft_model(model, saved)
    _load(wrapped, folder, OWN)
    if not trainable:
        wrapped.requires_grad_(False)
    return put_prefix(wrapped).eval()


@contextmanager
def at_start(model: PeftModel) -> Iterator[PreTrainedModel]:
    """The model as it was when the stage began, for the duration of a ``with`` block."""
    base = model.get_base_model()
    if (prefix := prefix_of(base.base_model)) is not None:
        with prefix.at_start():
            yield base
        return
    changes: list[tuple[Any, str, Any]]
    if START in model.peft_config:  # the frozen copy of the own adapter in its place
        named = [
            (layer, [START if name == OWN else name for name in layer.active_adapters]) for layer in _layers(model)
        ]
        changes = [(layer, "_active_adapter", names) for layer, names in named]
    elif any(name.startswith(_BELOW) for name in model.peft_config):
        # Scaled by zero instead of switched off, so that at first both outputs are bitwise equal.
        own = [layer for layer in _layers(model) if OWN in layer.scaling]
        changes = [(layer, "scaling", {**layer.scaling, OWN: 0.0}) for layer in own]
    else:  # PEFT's own context would set again which weights are trained, which costs time at every step
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        changes = [(layer, "_disable_adapters", True) for layer in model.modules() if isinstance(layer, kinds)]
    before = [(layer, name, getattr(layer, name)) for layer, name, _ in changes]
    try:
        for layer, name, value in changes:
            setattr(layer, name, value)
        yield base
    finally:
        for layer, name, value in before:
            setattr(layer, name, value)


def compute_in_base_dtype(model: PeftModel) -> PeftModel:
    """Lets autocast choose the dtype of the products; the factors stay float32 for the optimiser. PEFT would convert
    every activation to float32 and back around each adapter, which costs a third of a step on CPU. Plain low-rank
    layers become one function each (alignment/models/kernels/products.py)."""
    for module in _layers(model):
        module.cast_input_dtype_enabled = False
    fuse_adapters(model)
    return model


def _with_saved(model: PreTrainedModel, folder: Path, *, trainable: bool) -> PeftModel:
    """Loads on the model's device; PEFT would load the weights through a GPU if there is one."""
    return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, torch_device=str(model.device))


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with a saved adapter merged into its weights; a prefix cannot be merged and stays. Raises ModelError:
    the adapter was made for another architecture."""
    if is_prefix(folder):
        return put_back(model, [folder], trainable=False).get_base_model()
    try:
        return _with_saved(model, folder, trainable=False).merge_and_unload()
    except (ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"this adapter does not fit the model: {error}", where=str(folder)) from error


def saved_config(folder: Path) -> Any:
    """PEFT's configuration of a saved adapter. Raises ModelError: there is no adapter in safetensors."""
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"no {ADAPTER_WEIGHTS} here", where=str(folder), remedy="pickled adapters are not read")
    return PeftConfig.from_pretrained(str(folder))


def is_prefix(folder: Path) -> bool:
    """Whether a saved adapter is a prefix. Raises ModelError: there is no adapter in safetensors."""
    return bool(saved_config(folder).is_prompt_learning)


def _refuse_other_shape(saved: Any, config: AdapterConfig, folder: Path) -> None:
    low_rank = AdapterKind.dora if getattr(saved, "use_dora", False) else AdapterKind.lora
    saved_kind = AdapterKind.prefix if saved.is_prompt_learning else low_rank
    kind = AdapterKind.lora if config.kind is AdapterKind.qlora else config.kind  # LoRA on quantised weights
    wanted_and_saved: dict[str, tuple[Any, Any]] = {"kind": (kind.value, saved_kind.value)}
    if saved_kind is AdapterKind.prefix:
        wanted_and_saved["virtual_tokens"] = (config.virtual_tokens, saved.num_virtual_tokens)
    else:
        wanted_and_saved["rank"] = (config.rank, saved.r)
        wanted_and_saved["alpha"] = (config.alpha, saved.lora_alpha)
        wanted_and_saved["rslora"] = (config.rslora, saved.use_rslora)
        # In models with experts PEFT replaces the names of their projections by those of their parameters.
        has_names = not isinstance(saved.target_modules, str) and not saved.target_parameters
        if config.target_modules != [_ALL_LINEAR] and has_names:
            wanted_and_saved["target_modules"] = (_last_parts(config.target_modules), _last_parts(saved.target_modules))
    for name, (wanted, saved_value) in wanted_and_saved.items():
        if wanted != saved_value:
            raise ConfigError(
                f"the adapter to continue has {saved_value}, but the stage asks for {wanted}",
                where=f"adapter.{name}",
                remedy=f"use the values of the earlier stage ({folder.name}), or do not continue its adapter",
            )


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _with_frozen(model: PeftModel, folder: Path, name: str) -> PeftModel:
    """The model with another saved adapter, inactive, frozen and without dropout, so that its output is deterministic.
    ``PeftModel.add_adapter`` is called directly, because a sequence classifier's own method would copy its head too."""
    saved = saved_config(folder)
    saved.lora_dropout = 0.0
    PeftModel.add_adapter(model, name, saved)
    _load(model, folder, name)
    for parameter_name, parameter in model.named_parameters():
        if f".{name}." in parameter_name:
            parameter.requires_grad_(False)
    return compute_in_base_dtype(model)


def _load(model: PeftModel, folder: Path, name: str) -> None:
    """Loads an adapter's saved weights; weights that were not saved, such as a new head, stay as they are."""
    weights = {**_whole_modules(model, name), **load_peft_weights(str(folder), device="cpu")}
    try:
        loaded = set_peft_model_state_dict(model, weights, adapter_name=name)
    except (RuntimeError, KeyError) as error:
        raise ModelError(f"this adapter does not fit the model: {error}", where=str(folder)) from error
    unknown = [key for key in loaded.unexpected_keys if key != _PREFIX_WEIGHTS]  # PEFT loads these itself
    if unknown:
        raise ModelError(f"this adapter does not fit the model, which lacks {unknown[0]}", where=str(folder))


def _whole_modules(model: PeftModel, adapter: str) -> dict[str, Any]:
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            state = module.state_dict()
            for saved, held in module.adapter_state_dict_load_map(adapter).items():
                weights[f"{name}.{saved}"] = state[held]
    return weights


def _layers(model: PeftModel) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
