"""Which base model a run starts from."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

NEW_TOKENS = "new_tokens.json"
"""A file in a folder that `align add-tokens` wrote: the tokens whose rows are not trained yet."""


class Dtype(str, Enum):
    """Number format of matrix products and of frozen weights. Trained weights and optimiser states are float32, unless
    a stage sets ``adapter.master_weights`` to false."""

    bfloat16 = "bfloat16"
    float32 = "float32"


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The base model.

    ``source`` is ``bundled:smollm2-135m``, ``path:FOLDER`` or ``hub:ORG/NAME[@REVISION]``. Code in a model repository
    is never run. A fingerprint covers what the source holds, not its name. ``chat_template`` replaces the tokenizer's
    own, which base models often lack: ``chatml`` or ``path:FILE`` of a Jinja template
    (alignment/data/chat_template.py).
    """

    source: str = field(default="bundled:smollm2-135m", metadata={"identity": False})
    dtype: Dtype = Dtype.bfloat16
    chat_template: str | None = field(default=None, metadata={"identity": False})
