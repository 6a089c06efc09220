"""``left_out.jsonl`` in a stage's artifact: a line for each row of its data that was left out or cut.

The file is missing if every row was used as it is.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

FILE = "left_out.jsonl"
FAULT, SET_ASIDE, TOO_LONG, CUT, LOST = "fault", "set aside", "too long", "cut", "lost"


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """Why a row was left out, what was cut from it, or what the chat template left out of it.

    ``where`` is its file and line. ``kind`` is ``fault``, ``set aside`` (of no use for this stage), ``too long`` or
    ``cut``; what the template leaves out has a kind for each loss, ``lost: thoughts of earlier turns``. A prompt that
    is not asked because others ask it has none.
    """

    where: str
    kind: str = ""
    reason: str
    remedy: str = ""

    def as_row(self) -> dict[str, str]:
        """The note as a line of the file, without empty fields."""
        return {name: value for name, value in asdict(self).items() if value}
