"""Which base model a run starts from."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

NEW_TOKENS = "new_tokens.json"
"""In a folder that `align add-tokens` wrote: the tokens whose rows nobody has trained yet."""


class Dtype(str, Enum):
    """Number format of matrix products and of frozen weights. Trained weights and optimiser states are float32."""

    bfloat16 = "bfloat16"
    float32 = "float32"


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The base model.

    ``source`` is ``bundled:smollm2-135m``, ``path:FOLDER`` or ``hub:ORG/NAME[@REVISION]``. Code that a model
    repository brings along is never run. A fingerprint covers what the source holds, not how it is named.
    ``chat_template`` stands in for the tokenizer's own, which base models often lack: ``chatml`` or ``path:FILE`` of a
    Jinja template (alignment/data/chat_template.py).
    """

    source: str = field(default="bundled:smollm2-135m", metadata={"identity": False})
    dtype: Dtype = Dtype.bfloat16
    chat_template: str | None = field(default=None, metadata={"identity": False})
