"""The tokens that all prompts of a call begin with: read once, and held once for all rows of a decoding batch.

The rows of a batch then hold only what is their own. At each step, one product of all rows' queries with the common
keys takes the place of as many readings of them as there are rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from alignment.costs.recorder import is_on_cpu
from alignment.data.tokens.common_beginning import in_common
from alignment.models.forward.flat import has_window
from alignment.models.forward.shared_prompts import Beginning, can_read, read_beginning

FEWEST_TOKENS = 64
"""Tokens below which a common beginning is read and held with each prompt, because attending elsewhere costs more than
it saves (docs/LOG.md, 2026-11-28)."""

FEWEST_ROWS = 8
"""Rows of a batch below which it is."""


def shared_beginning(model: PreTrainedModel, prompts: Sequence[Sequence[int]], rows: int) -> Beginning | None:
    """What all of the prompts begin with, or None if it is short, if there are few ``rows``, or if the model's decoding
    attention cannot attend to it; ``model`` has no wrapper.

    Every prompt has at least one more token.
    """
    if rows < FEWEST_ROWS or not _can_share(model):
        return None
    # What the first and the last in lexical order begin with, all do.
    tokens = min(in_common(min(prompts, key=tuple), max(prompts, key=tuple)), min(map(len, prompts)) - 1)
    return read_beginning(model, prompts[0][:tokens]) if tokens >= FEWEST_TOKENS else None


def _can_share(model: PreTrainedModel) -> bool:
    """Whether attention sees all earlier columns, without a cap, in products on a CPU."""
    config = model.config.get_text_config()
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    on_cpu = is_on_cpu(model.get_input_embeddings().weight)
    return on_cpu and can_read(model) and not capped and not has_window(model)
