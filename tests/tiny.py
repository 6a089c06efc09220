"""A tokenizer and models small enough for any test: nothing is downloaded, every weight comes from a fixed seed. The
tokenizer is a byte-level BPE with ChatML turns, a default system turn and pad == EOS, as SmolLM2-Instruct has them."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import TaskType
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from alignment.config.model import AdapterConfig, Dtype, ModelConfig
from alignment.config.run import TrackingConfig
from alignment.config.stage import StageConfig
from alignment.core.artifacts import Manifest, publish
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.job import StageInput, StageSpec
from alignment.models.assembly.load import Lineage
from alignment.models.assembly.roles import load_start
from alignment.models.forward.answers import unwrapped
from alignment.stages.registry import kind_of
from alignment.stages.reward.kind import RewardConfig
from alignment.stages.shared.result import save_model
from alignment.training.context import StageContext

BASE_SOURCE = "path:tiny"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are tiny.<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TEXT = (
    "The note says that the shop is closed on Monday and that the keys are with the caretaker in the hall. "
    "Please answer in one or two plain sentences, and say only what the text says. You are tiny. "
    "system user assistant"
)
_SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
_CONFIGS: Mapping[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "gemma": GemmaConfig,
    "gpt2": GPT2Config,
    "gpt_neox": GPTNeoXConfig,
    "mixtral": MixtralConfig,
    "olmoe": OlmoeConfig,
    "granitemoe": GraniteMoeConfig,
}
_EXTRAS: Mapping[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 128},
    "mistral": {"sliding_window": None, "tie_word_embeddings": False},
    "gemma": {"head_dim": 8},
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "gpt_neox": {"tie_word_embeddings": False},
    "mixtral": {"sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 2.0},
}
ARCHITECTURES = ("llama", "qwen2", "mistral", "gemma")
"""Rotary positions, grouped-query attention. ``gpt2`` has neither and learns its positions; ``gpt_neox`` turns a part
of each head, and its attention and feed-forward stand side by side. ``mixtral``, ``olmoe`` and ``granitemoe`` have
experts; the last scales its logits."""


def tiny_bpe(control: Sequence[str]) -> Tokenizer:
    """A byte-level BPE whose first ids are the control tokens; any text goes in and comes out unchanged."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=327 + len(control),
        special_tokens=list(control),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([_TEXT], trainer)
    return bpe


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """About 330 tokens, the first three being those of ChatML."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = tiny_bpe(specials)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=specials[1], eos_token=specials[2], pad_token=specials[2], unk_token=specials[0]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(architecture: str, **changes: Any) -> PreTrainedConfig:
    """Two layers of width 32 with grouped-query attention; ``architecture`` is one of ``ARCHITECTURES``."""
    special = {"pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    sizes = dict(_SIZES)
    if architecture in ("gpt2", "gpt_neox"):
        del sizes["num_key_value_heads"]
    if architecture == "gpt2":
        del sizes["intermediate_size"]
    return _CONFIGS[architecture](**{**sizes, **special, **_EXTRAS[architecture], **changes})


def tiny_model(architecture: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A causal language model in float32 with weights large enough that its distributions are far from uniform."""
    return _grown(AutoModelForCausalLM, tiny_config(architecture, **changes), seed)


def tiny_scorer(architecture: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The same with one scalar head whose scores are not shifted."""
    model = _grown(AutoModelForSequenceClassification, tiny_config(architecture, num_labels=1, **changes), seed)
    model.register_buffer("score_offset", torch.zeros(()), persistent=False)
    return model


def pythia_tokenizer() -> PreTrainedTokenizerFast:
    """As Pythia's: one control token for everything, nothing to pad with, no chat template."""
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tiny_bpe([end]), bos_token=end, eos_token=end, unk_token=end)


def save_tiny_model(
    folder: Path,
    *,
    architecture: str = "llama",
    tokenizer: PreTrainedTokenizerFast | None = None,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """A model folder with config, safetensors and tokenizer, as a user would have one; returns ``folder``. ``changes``
    replace settings of the model."""
    if tokenizer is not None:
        _save(folder, tokenizer, architecture, seed, changes)
    else:
        shutil.copytree(_made_once(architecture, seed, changes), folder, dirs_exist_ok=True)
    return folder


def _save(
    folder: Path, tokenizer: PreTrainedTokenizerFast, architecture: str, seed: int, changes: dict[str, Any]
) -> None:
    sizes = {"vocab_size": len(tokenizer), **changes}
    tiny_model(architecture, seed=seed, **sizes).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


_MADE: dict[str, Path] = {}


def _made_once(architecture: str, seed: int, changes: dict[str, Any]) -> Path:
    """A folder with such a model, which this process makes once: hundreds of tests ask for the same ones."""
    key = repr((architecture, seed, sorted(changes.items())))
    if key not in _MADE:
        folder = Path(tempfile.mkdtemp(prefix="tiny-model-"))
        atexit.register(_remove, folder, os.getpid())
        _save(folder, tiny_tokenizer(), architecture, seed, changes)
        _MADE[key] = folder
    return _MADE[key]


def _remove(folder: Path, maker: int) -> None:
    if os.getpid() == maker:  # a fork must leave it to the process that made it
        shutil.rmtree(folder, ignore_errors=True)


def tiny_spec(folder: Path, config: StageConfig, **changes: Any) -> StageSpec:
    """What a worker is told about a stage in ``folder``; the work folders exist already. ``changes`` replace fields.
    The base is expected in ``folder/base``."""
    work = folder / "artifacts" / f"{config.kind}-0123abcd.work"
    run_folder = folder / "runs" / "test" / config.kind
    for path in (work / "content", work / "checkpoints", run_folder):
        path.mkdir(parents=True, exist_ok=True)
    fields: dict[str, Any] = {
        "run": "test",
        "recipe": "tiny",
        "stage": config.kind,
        "config": config,
        "model": ModelConfig(source=BASE_SOURCE, dtype=Dtype.float32),
        "base_path": folder / "base",
        "inputs": {"init": StageInput(ref="base", path=None)},
        "arms": {},
        "data_path": folder / "data.jsonl",
        "fingerprint": "0123abcd" * 8,
        "identity": {},
        "input_fingerprints": {},
        "artifact": work.with_suffix(""),
        "work": work,
        "run_folder": run_folder,
        "seed": 0,
        "tracking": TrackingConfig(),
        "git_commit": "",
        "produces": kind_of(config).produces,
    }
    return StageSpec(**{**fields, **changes})


def publish_tiny(
    spec: StageSpec, model: Any, start: Lineage, *, head: dict[str, torch.Tensor] | None = None
) -> StageInput:
    """Publishes ``model`` as the artifact of ``spec``, as the worker does after a stage; returns a reference to it.
    ``head`` is what ``head.safetensors`` of a reward model holds."""
    context = StageContext(spec=spec, rank=0, world_size=1)
    result = save_model(model, load_tokenizer(start.base), context, start, {})
    if head is not None:
        save_file(head, context.content / "head.safetensors")
    manifest = Manifest(
        stage=spec.stage,
        kind=kind_of(spec.config).produces,
        fingerprint=spec.fingerprint,
        identity=spec.identity,
        base=result.base,
        adapters=result.adapters,
        adapters_stood=result.adapters_stood,
        **result.hashes,
    )
    publish(context.content, spec.artifact, manifest)
    return StageInput(ref=f"stage:{spec.stage}", path=spec.artifact)


def tiny_reward(
    folder: Path, adapter: AdapterConfig, *, start: Lineage, offset: float = 0.5, **changes: Any
) -> StageInput:
    """A published reward model on ``start`` whose adapter and head say something; its spec lies in ``folder``.
    ``changes`` replace fields of the spec."""
    spec = tiny_spec(folder, RewardConfig(adapter=adapter), **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = load_start(start, adapter, Dtype.float32, task=TaskType.SEQ_CLS, device=torch.device("cpu"))
        liven(model)
    base = unwrapped(model)
    score = base.score.modules_to_save["default"] if model is not base else base.score
    head = {"weight": score.weight.detach().clone(), "offset": torch.tensor(offset)}
    return publish_tiny(spec, model, start, head=head)


def liven(model: torch.nn.Module) -> None:
    """Gives a fresh adapter factors that do change the model (PEFT starts them at zero); frozen ones stay."""
    rng = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if ".lora_" in name and parameter.requires_grad:
            drawn = torch.empty(parameter.shape, dtype=parameter.dtype).normal_(std=0.1, generator=rng)
            parameter.data.copy_(drawn)  # the same numbers on any device


def _grown(factory: Any, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = factory.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.25)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()
