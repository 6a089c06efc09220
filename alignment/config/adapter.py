"""How a stage changes the weights: all of them, or an adapter beside them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from alignment.config.rules import BELOW_ONE, FILLED, POSITIVE


class AdapterKind(str, Enum):
    """``full`` trains every weight, all others train something small beside frozen weights.

    ``lora``: low-rank factors (Hu et al. 2021). ``dora``: the factors turn a weight, and a magnitude for each of its
    outputs is trained too (Liu et al. 2024). ``qlora``: LoRA, the frozen linear weights being held in four bits, NF4
    with double quantisation (Dettmers et al. 2023). ``prefix``: keys and values of ``virtual_tokens`` in front of every
    row, in every layer (Li and Liang 2021).
    """

    full = "full"
    lora = "lora"
    dora = "dora"
    qlora = "qlora"
    prefix = "prefix"


Chain = Enum("Chain", {"merge": "merge", "stack": "stack", "continue": "continue"}, type=str)
"""What becomes of the adapters that a stage starts from. ``merge``: they are added into the frozen weights, below a
fresh adapter. ``stack``: they stay beside the weights, frozen, and a fresh one learns on top. ``continue``: the topmost
one is trained on, and no other is added."""

CONTINUE = Chain("continue")  # a word that Python keeps for itself

SHAPE = ("rank", "alpha", "rslora", "target_modules")
"""Settings of a low-rank adapter that a stage which continues it cannot change."""
PREFIX_SHAPE = ("virtual_tokens",)
"""Those of a prefix."""


LOW_RANK = (AdapterKind.lora, AdapterKind.dora, AdapterKind.qlora)
READ_BY = {
    **dict.fromkeys(("rank", "alpha", "dropout", "rslora", "target_modules", "modules_to_save"), LOW_RANK),
    "virtual_tokens": (AdapterKind.prefix,),
    "chain": (*LOW_RANK, AdapterKind.prefix),
}
"""The kinds that read a setting, of those that not all of them read; ``master_weights`` is looked at beside others."""


@dataclass(kw_only=True, slots=True)
class AdapterConfig:
    """What an adapter is made of, and how it stands on those of earlier stages.

    ``rank``, ``alpha``, ``dropout``, ``rslora`` (scale by alpha/√rank instead of alpha/rank, Kalajdzievski 2023),
    ``target_modules`` and ``modules_to_save`` (trained whole, beside the factors) apply to low-rank adapters,
    ``virtual_tokens`` to prefixes, ``chain`` to both, ``master_weights`` to full training. ``dropout`` is for CPT and
    SFT: the other stages compare passes of one model, of which none may drop anything, and refuse it.

    ``target_modules`` is a list of module names, or the single word ``all-linear``. With ``master_weights`` the trained
    weights, their gradients and Adam's moments are float32; without, they have ``model.dtype``, half the bytes of each,
    and steps too small for it are rounded at random (docs/design/0005).
    """

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
