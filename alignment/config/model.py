"""The base model, the adapters on it, and where a critic starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, ClassVar

from alignment.config.rules import BELOW_ONE, FILLED, POSITIVE
from alignment.core.fingerprint import IF_SET

NEW_TOKENS = "new_tokens.json"
"""A file in a folder that `align add-tokens` wrote: the tokens whose rows are not trained yet."""


class Dtype(str, Enum):
    """Number format of matrix products and of frozen weights. Trained weights and optimiser states are float32, except
    ``adapter.modules_to_save``, and unless a stage sets ``adapter.master_weights`` to false."""

    bfloat16 = "bfloat16"
    float32 = "float32"


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateChoice:
    """A chat template: ``source`` as in ``ModelConfig.chat_template``, None for the tokenizer's own, and its
    ``options``."""

    source: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The base model.

    ``source`` is ``bundled:smollm2-135m``, ``path:FOLDER`` or ``hub:ORG/NAME[@REVISION]``. Code in a model repository
    is never run. A fingerprint depends on the content of the source, not on its name. ``chat_template`` replaces the
    tokenizer's own, which base models often lack: ``chatml``, ``path:FILE`` of a Jinja template, or ``trl:NAME`` of one
    that TRL ships (alignment/data/chat_template.py). ``template_options`` are values for names that the template reads,
    such as ``enable_thinking: false`` (alignment/data/templates.py)."""

    source: str = field(default="bundled:smollm2-135m", metadata={"identity": False})
    dtype: Dtype = Dtype.bfloat16
    chat_template: str | None = field(default=None, metadata={"identity": False})
    template_options: dict[str, Any] = field(default_factory=dict, metadata=IF_SET)

    @property
    def template(self) -> TemplateChoice:
        """The chat template with its options."""
        return TemplateChoice(source=self.chat_template, options=self.template_options)


class AdapterKind(str, Enum):
    """``full`` trains every weight; the others train a small adapter and freeze the weights.

    ``lora``: low-rank factors (Hu et al. 2021). ``dora``: the factors change a weight's direction, and a magnitude for
    each of its outputs is trained too (Liu et al. 2024). ``qlora``: LoRA with the frozen linear weights in four bits,
    NF4 with double quantisation (Dettmers et al. 2023). ``prefix``: keys and values of ``virtual_tokens`` in front of
    every row, in every layer (Li and Liang 2021)."""

    full = "full"
    lora = "lora"
    dora = "dora"
    qlora = "qlora"
    prefix = "prefix"


Chain = Enum("Chain", {"merge": "merge", "stack": "stack", "continue": "continue"}, type=str)
"""What happens to the adapters that a stage starts from. ``merge``: they are added into the frozen weights, below a
new adapter. ``stack``: they stay separate and frozen, and a new one is trained on top. ``continue``: the topmost one is
trained further, and no new one is added."""

CONTINUE = Chain("continue")  # a reserved word of Python

SHAPE = ("rank", "alpha", "rslora", "target_modules")
"""Settings of a low-rank adapter that a stage which continues it cannot change."""
PREFIX_SHAPE = ("virtual_tokens",)
"""The same for a prefix."""


LOW_RANK = (AdapterKind.lora, AdapterKind.dora, AdapterKind.qlora)
READ_BY = {
    **dict.fromkeys(("rank", "alpha", "dropout", "rslora", "target_modules", "modules_to_save"), LOW_RANK),
    "virtual_tokens": (AdapterKind.prefix,),
    "chain": (*LOW_RANK, AdapterKind.prefix),
}
"""For each setting that only some kinds use: those kinds. ``master_weights`` is checked with other settings."""


@dataclass(kw_only=True, slots=True)
class AdapterConfig:
    """What an adapter consists of, and how it is combined with the adapters of earlier stages.

    ``rank``, ``alpha``, ``dropout``, ``rslora`` (scale by alpha/√rank instead of alpha/rank, Kalajdzievski 2023),
    ``target_modules`` and ``modules_to_save`` (trained in full, next to the factors) apply to low-rank adapters,
    ``virtual_tokens`` to prefixes, ``chain`` to both, and ``master_weights`` to full training. ``dropout`` is only for
    CPT and SFT. The other stages compare forward passes of one model, which dropout would change, so they refuse it.

    ``target_modules`` is a list of module names, or the single word ``all-linear``. With ``master_weights`` the trained
    weights, their gradients and Adam's moments are float32. Without it they have ``model.dtype``, which halves their
    memory; steps that are too small for that format are rounded stochastically (docs/design/0005). So they are in
    ``modules_to_save``, which always have ``model.dtype``. The default of ``chain`` is stack for ``qlora``, because
    merging adapters into four bits would round the weights again."""

    DEFAULTS_OF_KIND: ClassVar[dict[str, dict[str, Any]]] = {AdapterKind.qlora.value: {"chain": Chain.stack}}

    kind: AdapterKind = AdapterKind.lora
    rank: Annotated[int, POSITIVE] = 16
    alpha: Annotated[float, POSITIVE] = 32.0
    dropout: Annotated[float, BELOW_ONE] = 0.0
    rslora: bool = False
    target_modules: Annotated[list[str], FILLED] = field(default_factory=lambda: ["all-linear"])
    modules_to_save: list[str] = field(default_factory=list)
    virtual_tokens: Annotated[int, POSITIVE] = 16
    chain: Chain = Chain.merge
    master_weights: bool = True

    @property
    def trains_modules(self) -> bool:
        """Whether modules are trained in full next to the factors, in the format of the frozen weights."""
        return self.kind in LOW_RANK and bool(self.modules_to_save)


class Critic(str, Enum):
    """``separate`` is a model of its own that starts from the reward model, ``shared`` a head on the policy's trunk.

    ``none``: there is no value model."""

    separate = "separate"
    shared = "shared"
    none = "none"
