"""Mixture-of-experts models learn without the auxiliary loss that spreads tokens over experts (docs/design/0003).

That loss is no sum over tokens, so the size of micro-batches and the number of processes would change what is learned.
TRL's trainers of language models add it wherever a model's configuration has a coefficient for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from transformers import PreTrainedModel

_COEFFICIENT = "router_aux_loss_coef"
WITHOUT_ROUTER_LOSS = {_COEFFICIENT: 0.0}
"""Arguments of TRL's configurations."""


@contextmanager
def own_coefficient(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Puts the coefficient in the model's configuration back after a ``with`` block.

    TRL's SFT trainer writes its own there, with which the model would be saved.
    """
    config = model.config.get_text_config()
    before = getattr(config, _COEFFICIENT, None)
    yield
    if before is not None:
        setattr(config, _COEFFICIENT, before)
