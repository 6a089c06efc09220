"""Rules that compare an answer with a field of its row, which has one value for all turns of the row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alignment.core.errors import DataError
from alignment.data.records import HasRow
from alignment.rewards.rules.rule_kind import Rule


@dataclass(frozen=True, kw_only=True, slots=True)
class OfOneTurn:
    """A ``rule`` that reads a row's ``field``, and refuses rows of which an evaluation asks several turns."""

    rule: Rule
    source: str
    field: str

    def expected(self, record: HasRow) -> Any:
        """What the rule reads in a row.

        Raises:
            DataError: the row lacks it, or asks several turns.
        """
        if getattr(record, "later_turns", ()) and record.row.get(self.field) is not None:
            raise DataError(
                f"'{self.source}' compares every answer with the row's '{self.field}', but the row asks several turns",
                where=record.where,
                remedy="score such rows with a function, FILE.py:FUNCTION, which gets the conversation so far",
            )
        return self.rule.expected(record)

    def score(self, text: str, expected: Any) -> float:
        """The rule's score."""
        return self.rule.score(text, expected)
