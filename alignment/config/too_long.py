"""What becomes of rows that are longer than a stage's limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from alignment.config.rules import FRACTION


class TooLong(str, Enum):
    """``drop`` leaves the row out, ``cut`` takes tokens away."""

    drop = "drop"
    cut = "cut"


class Side(str, Enum):
    """Which end of a prompt loses tokens."""

    left = "left"
    right = "right"


@dataclass(kw_only=True, slots=True)
class TooLongConfig:
    """With ``do: cut`` an answer longer than ``max_answer_length`` loses its end, and with it the token that ends the
    turn; then the prompt loses what is still too much at its ``side``, but for BOS and what the template puts behind
    the last turn. A row of which nothing else would be left is dropped. No more than a share of ``max_share`` of a
    source's rows may be dropped or cut.
    """

    do: TooLong = TooLong.drop
    side: Side = Side.left
    max_share: Annotated[float, FRACTION] = field(default=0.1, metadata={"identity": False})
