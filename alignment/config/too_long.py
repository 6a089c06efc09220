"""What becomes of rows that are longer than a stage's limits."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


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
    """With ``do: cut`` an answer loses its end, and with it the token that ends the turn; then the prompt loses what is
    still too much at its ``side``. On the right, what the template puts behind the last turn stays. No more than a
    share of ``max_share`` of a source's rows may be dropped or cut.
    """

    do: TooLong = TooLong.drop
    side: Side = Side.left
    max_share: float = 0.1
