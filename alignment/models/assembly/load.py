"""Loads models from folders: a base, and the adapters on it, in order."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from alignment.config.model import AdapterConfig, AdapterKind, Dtype
from alignment.core.artifacts import Manifest, inside, read_manifest, verify
from alignment.core.errors import ModelError
from alignment.core.model_files import formats_of_weights, is_adapter, refuse_weights_elsewhere
from alignment.costs.recorder import WEIGHTS, Recorder, memory_for, on_shadows, recorder
from alignment.data.tokens.tokenizer import load_tokenizer, tokenizer_hashes
from alignment.job import StageInput, StageSpec
from alignment.models.assembly.adapters import merge_adapter
from alignment.models.assembly.modules import free_unused, freeze_beside_text, refuse_without_scores
from alignment.models.assembly.weight_file import convert, keep_mapped, same_file
from alignment.models.kernels.nf4 import round_trunk

DTYPES = {Dtype.bfloat16: torch.bfloat16, Dtype.float32: torch.float32}
_FORMATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""The dtypes of the formats in which weights may stay mapped, by their names in safetensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedAdapter:
    """A folder that PEFT wrote, and how the adapter was applied when it was trained. ``merged``: the adapters below it
    were merged into the weights; otherwise they were active beside them. ``nf4``: the linear weights were quantised to
    four bits."""

    path: Path
    merged: bool = True
    nf4: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """A policy as a base folder and the adapters on it, bottom first. ``source`` names the base as the user wrote it.
    Example: ``Lineage(source="bundled:smollm2-135m", base=Path("…/smollm2-135m"),
    adapters=(SavedAdapter(path=Path("…/sft-5f0e9b1c/adapters/0-sft")),))``."""

    source: str
    base: Path
    adapters: tuple[SavedAdapter, ...]

    @property
    def beside(self) -> tuple[SavedAdapter, ...]:
        """The topmost adapters, which were active together beside the same weights."""
        return self.adapters[self._own_weights :]

    @property
    def weights(self) -> Lineage:
        """The lineage of the weights that these adapters were trained on."""
        return replace(self, adapters=self.adapters[: self._own_weights])

    @property
    def _own_weights(self) -> int:
        return max((index for index, adapter in enumerate(self.adapters) if adapter.merged), default=0)


def lineage(spec: StageSpec, stage_input: StageInput) -> Lineage:
    """Resolves a reference to its base and adapters. The base of an adapter from outside is the run's. Raises
    ArtifactError: the artifact is missing or damaged. Raises ModelError: its base is another model than the run's."""
    if stage_input.path is None:
        return Lineage(source=spec.model.source, base=spec.base_path, adapters=())
    if read_manifest(stage_input.path) is None:  # a folder that PEFT or transformers saved
        if is_adapter(stage_input.path):
            adapter = SavedAdapter(path=stage_input.path)
            return Lineage(source=spec.model.source, base=spec.base_path, adapters=(adapter,))
        return Lineage(source=stage_input.ref, base=stage_input.path, adapters=())
    manifest = verify(stage_input.path, content=True)
    adapters = saved_adapters(stage_input.path, manifest)
    if manifest.base["source"] == "self":
        return Lineage(source="self", base=stage_input.path / "model", adapters=adapters)
    base = _base_of(manifest, spec, stage_input)
    return Lineage(source=manifest.base["source"], base=base, adapters=adapters)


def saved_adapters(artifact: Path, manifest: Manifest) -> tuple[SavedAdapter, ...]:
    """The adapters in an artifact's folder, bottom first. Raises ArtifactError: the manifest names an adapter outside
    the folder."""
    return tuple(
        SavedAdapter(path=inside(artifact, name), **manifest.adapters_stood.get(name, {})) for name in manifest.adapters
    )


def base_record(spec: StageSpec, lineage: Lineage) -> dict[str, Any]:
    """A manifest's record of the base below its adapters; ``content`` is set if it is the run's own base."""
    content = base_content(spec) if lineage.base == spec.base_path else None
    return {"source": lineage.source, "path": str(lineage.base), "content": content}


def base_content(spec: StageSpec) -> str | None:
    """The identity of the run's base model, by content."""
    return spec.identity.get("base", {}).get("content")


def _base_of(manifest: Manifest, spec: StageSpec, stage_input: StageInput) -> Path:
    recorded = manifest.base["content"]
    if recorded is not None and recorded == base_content(spec):
        return spec.base_path
    elsewhere = Path(manifest.base["path"])
    if recorded is None and (elsewhere / "config.json").is_file():
        return elsewhere
    raise ModelError(
        f"{stage_input.ref} was trained on {manifest.base['source']}, not on this run's base {spec.model.source}",
        where=f"stages.{spec.stage}",
        remedy=f"set model.source to the base from which the artifact was made (it was at {elsewhere})",
    )


def refuse_other_tokenizer(spec: StageSpec, stage_input: StageInput, tokenizer: Any) -> None:
    """Token ids are shared between the models of a stage, so their tokenizers must agree. Raises ModelError: the input
    was made with another vocabulary or chat template."""
    if stage_input.path is None:
        return
    manifest = read_manifest(stage_input.path)
    if manifest is None and is_adapter(stage_input.path):
        _refuse_other_tokenizer_of_adapter(spec, stage_input, tokenizer)
        return
    if manifest is None:
        hashes = tokenizer_hashes(load_tokenizer(stage_input.path))
    else:
        hashes = {"tokenizer_sha256": manifest.tokenizer_sha256, "chat_template_sha256": manifest.chat_template_sha256}
    if hashes != tokenizer_hashes(tokenizer):
        raise ModelError(
            f"{stage_input.ref} has a different tokenizer or chat template than {spec.model.source}",
            where=f"stages.{spec.stage}",
            remedy="use models of the same family in one stage; they must have the same token ids",
        )


def _refuse_other_tokenizer_of_adapter(spec: StageSpec, stage_input: StageInput, tokenizer: Any) -> None:
    """The same for an adapter from outside, if a tokenizer was saved with it; other padding does not matter. Raises
    ModelError: it was trained with another vocabulary or chat template."""
    folder = stage_input.path
    if folder is None or not (folder / "tokenizer_config.json").is_file():
        return
    own, where = load_tokenizer(folder, model=spec.base_path), f"stages.{spec.stage}"
    if own.get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            f"{stage_input.ref} was saved with another vocabulary than that of its base {spec.model.source}",
            where=where,
            remedy="merge the adapter into its base with PEFT (merge_and_unload), save both model and tokenizer, and "
            "name that folder",
        )
    if own.chat_template and own.chat_template != tokenizer.chat_template:
        raise ModelError(
            f"{stage_input.ref} was saved with another chat template than {spec.model.source} has in this run",
            where=where,
            remedy=f"set model.chat_template=path:FILE to its own (chat_template.jinja in {folder}), or remove the "
            "tokenizer from that folder",
        )


def load_policy(lineage: Lineage, dtype: torch.dtype, *, mapped: bool = False) -> PreTrainedModel:
    """A causal language model with all adapters merged, in evaluation mode; every weight is trainable, except in parts
    for images or sounds. An adapter that was trained on weights in four bits is merged into the dequantised weights.
    With ``mapped``, weights stay in their file until they are copied (weight_file.py), unless adapters are merged into
    them. Models that nothing uses any more are freed first."""
    if not lineage.adapters:
        free_unused()
        model = _mapped_from_folder(lineage.base, dtype) if mapped else _from_folder(lineage.base, dtype)
    else:
        model = load_policy(lineage.weights, dtype)
        if lineage.adapters[-1].nf4:
            round_trunk(model)
    for adapter in lineage.beside:
        model = merge_adapter(model, adapter.path)
    model.config.use_cache = False
    model.requires_grad_(True)  # PEFT leaves merged weights frozen
    freeze_beside_text(model)
    return model.eval()


def load_scalar(lineage: Lineage, dtype: torch.dtype, *, mapped: bool = False) -> PreTrainedModel:
    """The policy's trunk under a new scalar head, drawn with std 1/√(width + 1) and no bias (Huang et al. 2024). The
    head is float32; ``score_offset`` is subtracted from its output, and is zero until set. Adapters are merged while
    the trunk is still part of the language model that they were trained on. Raises ModelError: transformers has no
    scalar head for this architecture, or one of more than one layer."""
    policy = load_policy(lineage, dtype, mapped=mapped)
    refuse_without_scores(policy.config.model_type, where=lineage.source)
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    with torch.device("meta"):  # its randomly drawn weights are not used
        model = AutoModelForSequenceClassification.from_config(config)
    setattr(model, model.base_model_prefix, policy.base_model)
    model.score = torch.nn.Linear(policy.base_model.get_input_embeddings().embedding_dim, 1, bias=False)
    torch.nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    model.register_buffer("score_offset", torch.zeros(()), persistent=False)
    if more := [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]:
        raise ModelError(
            f"{type(model).__name__} makes its score with more than one layer, which is not supported: it also has "
            f"{', '.join(more)}",
            where=lineage.source,
            remedy="use a base of another family, such as Llama, Qwen, Mistral or Gemma",
        )
    return model.eval()


def load_scalar_head(model: PreTrainedModel, file: Path) -> None:
    """Loads a saved scalar head into the model, with the offset that centres its scores."""
    saved = load_file(file)
    with torch.no_grad():
        model.score.weight.copy_(saved["weight"])
        model.score_offset.copy_(saved["offset"])


def _from_folder(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    if not (folder / "config.json").exists():
        raise ModelError("no model here (config.json is missing)", where=str(folder))
    refuse_weights_elsewhere(folder)
    if (estimate := recorder()) is not None:
        return _from_shapes(folder, dtype, estimate)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"the model cannot be loaded: {error}", where=str(folder)) from error
    if model.generation_config is not None:
        model.generation_config = _writable(model.generation_config)
    return _with_plain_head(name_trunk(_without_router_logits(model)), folder)


def name_trunk(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its part without the head as ``base_model``. Text models of Llama 4 and Llama 3.2 Vision name an
    attribute for it that only their model for images has, and so ``base_model`` would be the whole model."""
    if model.base_model is model and isinstance(getattr(model, "model", None), PreTrainedModel):
        model.base_model_prefix = "model"
    return model


def _with_plain_head(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model, whose logits are made from its trunk's states by one layer, because stages apply only that layer's
    weight and bias. In ModernBERT decoders, and BERT with a head for language, another layer comes before it. Raises
    ModelError: the model has other weights outside its trunk."""
    head = model.get_output_embeddings()
    of_head = (getattr(head, "weight", None), getattr(head, "bias", None))
    known = {id(weight) for weight in (*model.base_model.parameters(), *of_head)}
    others = [name for name, weight in model.named_parameters() if id(weight) not in known]
    if head is None or not others:
        return model
    raise ModelError(
        f"{type(model).__name__} makes its logits with more than one layer, which is not supported: beside it there "
        f"are {', '.join(others)}",
        where=str(folder),
        remedy="use a base of another family, such as Llama, Qwen, Mistral or Gemma",
    )


def _without_router_logits(model: PreTrainedModel) -> PreTrainedModel:
    """The model, which computes no auxiliary loss of its experts (docs/design/0003) even if its configuration asks for
    it; that loss fails when one token per row is decoded."""
    config = model.config.get_text_config()
    if hasattr(config, _ROUTER_LOGITS):
        setattr(config, _ROUTER_LOGITS, False)
    return model


_ROUTER_LOGITS = "output_router_logits"
_OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def _writable(settings: GenerationConfig) -> GenerationConfig:
    """The settings in a form that transformers writes also after a token has changed, if there is one. Sampling
    settings without ``do_sample``, as in Llama 2 chat models, are meant for sampling. Settings that have no effect in
    transformers are removed: those of sampling if ``do_sample`` is false, of a beam search without beams, and a
    negative padding token."""
    corrected = copy.deepcopy(settings)
    if corrected.num_beams in (None, 1):
        corrected.early_stopping = corrected.length_penalty = None
    if corrected.pad_token_id is not None and corrected.pad_token_id < 0:
        corrected.pad_token_id = None
    if corrected.do_sample is None and not _is_valid(corrected):
        corrected.do_sample = True
    elif corrected.do_sample is False:
        for name in _OF_SAMPLING:
            setattr(corrected, name, None)
    return corrected if not _is_valid(settings) and _is_valid(corrected) else settings


def _is_valid(settings: GenerationConfig) -> bool:
    try:
        settings.validate(strict=True)
    except ValueError:
        return False
    return True


def _mapped_from_folder(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights mapped; as always if its file has several formats, or one that is not trained in."""
    formats = formats_of_weights(folder)
    stored = _FORMATS.get(formats.pop()) if len(formats) == 1 else None
    if stored is None:
        return _from_folder(folder, dtype)
    model = _from_folder(folder, stored)
    if stored is not dtype and any(buffer.dtype is stored for buffer in model.buffers()):
        return _from_folder(folder, dtype)  # these would have been made in the other dtype
    return keep_mapped(model, dtype)


def _from_shapes(folder: Path, dtype: torch.dtype, estimate: Recorder) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    stored = config.dtype  # which the next call replaces
    is_converted = stored is not None and stored is not dtype  # else the file's own pages are the weights
    with memory_for(WEIGHTS), no_init_weights(), nullcontext() if is_converted else estimate.memory.from_file():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # which is left out with the initial numbers
    estimate.has_model(model.get_input_embeddings().num_embeddings)
    if is_converted:
        estimate.memory.read_file(model.num_parameters() * stored.itemsize)
    return _with_plain_head(name_trunk(_without_router_logits(model)), folder)


def weights_dtype(compute: Dtype, adapter: AdapterConfig) -> torch.dtype:
    """The dtype of a model's weights when it is loaded for training; frozen weights use the compute dtype."""
    return trained_dtype(compute, adapter) if adapter.kind is AdapterKind.full else DTYPES[compute]


def trained_dtype(compute: Dtype, adapter: AdapterConfig) -> torch.dtype:
    """The dtype of weights that are trained themselves: float32 with products under autocast, unless configured
    bare."""
    bare = adapter.kind is AdapterKind.full and not adapter.master_weights
    return DTYPES[compute] if bare else torch.float32


def products_in(compute: Dtype, device: torch.device) -> torch.autocast:
    """Autocast of matrix products to the compute dtype, for models with float32 adapters on a frozen base."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=compute is Dtype.bfloat16)


def compute_in(model: nn.Module, compute: Dtype, device: torch.device) -> None:
    """Wraps the model's forward in ``products_in``, for a model that no trainer wraps in autocast."""
    forward = model.forward

    @functools.wraps(forward)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with products_in(compute, device):
            return forward(*args, **kwargs)

    model.forward = inside


def frozen_copy(model: PreTrainedModel, products: torch.dtype) -> PreTrainedModel:
    """A frozen copy of the model, whose linear weights have the dtype of the products. Autocast rounds the original's
    weights to the same numbers at each use, so both models give exactly the same output."""
    with memory_for(WEIGHTS):
        copied = copy.deepcopy(model, same_file(model)).requires_grad_(False)
        tied = copied.get_input_embeddings().weight
        for module in copied.modules():
            if type(module) is torch.nn.Linear and module.weight is not tied:
                convert(module, products)
    return copied


def weights_sha256(lineage: Lineage) -> str:
    """SHA-256 of the files of a policy's base and adapters, and of how each adapter is applied. On shadows, where
    different results have the same zeros for weights, it is that of the folders' paths."""
    folders = [lineage.base, *(saved.path for saved in lineage.adapters)]
    paths = list(map(str, folders)) if on_shadows() else []
    stood = [(saved.merged, saved.nf4) for saved in lineage.adapters]
    sha = hashlib.sha256(json.dumps([*stood, *paths]).encode())
    for folder in [] if paths else folders:
        for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]):
            sha.update(file.name.encode())
            with file.open("rb") as handle:
                sha.update(hashlib.file_digest(handle, "sha256").digest())
    return sha.hexdigest()
