"""Mixture-of-experts models learn without the auxiliary loss that spreads tokens over experts (docs/design/0003).

That loss is no sum over tokens, so the size of micro-batches and the number of processes would change what is learned.
TRL's trainers of language models add it wherever a model's configuration has a coefficient for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from transformers import PreTrainedModel

WITHOUT_ROUTER_LOSS = {"router_aux_loss_coef": 0.0}
"""Arguments of TRL's configurations."""
_SETTINGS = ("output_router_logits", "router_aux_loss_coef")


@contextmanager
def own_router_settings(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Puts the settings of the model's routers back after a ``with`` block.

    TRL's SFT trainer writes its coefficient into the configuration, with which the model would be saved.
    """
    config = model.config.get_text_config()
    before = {name: getattr(config, name) for name in _SETTINGS if hasattr(config, name)}
    yield
    for name, value in before.items():
        setattr(config, name, value)
