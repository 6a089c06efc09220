"""Which base model a run starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

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
    such as ``enable_thinking: false`` (alignment/data/templates.py).
    """

    source: str = field(default="bundled:smollm2-135m", metadata={"identity": False})
    dtype: Dtype = Dtype.bfloat16
    chat_template: str | None = field(default=None, metadata={"identity": False})
    template_options: dict[str, Any] = field(default_factory=dict, metadata=IF_SET)

    @property
    def template(self) -> TemplateChoice:
        """The chat template with its options."""
        return TemplateChoice(source=self.chat_template, options=self.template_options)
