"""What happens to rows that are longer than a stage's limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from alignment.config.rules import FRACTION


class TooLong(str, Enum):
    """``drop`` leaves the row out, ``cut`` removes tokens."""

    drop = "drop"
    cut = "cut"


class Side(str, Enum):
    """Which end of a prompt loses tokens."""

    left = "left"
    right = "right"


@dataclass(kw_only=True, slots=True)
class TooLongConfig:
    """With ``do: cut`` an answer longer than ``max_answer_length`` loses its end, including the token that ends the
    turn. If the row is still too long, the prompt loses tokens at its ``side``, except BOS and what the template adds
    after the last turn. A row with nothing left is dropped. At most the share ``max_share`` of a source's rows may be
    dropped or cut.
    """

    do: TooLong = TooLong.drop
    side: Side = Side.left
    max_share: Annotated[float, FRACTION] = field(default=0.1, metadata={"identity": False})
