"""The rule ``exact_answer``: whether an answer's last number is the right one (GSM8K, Cobbe et al. 2021)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from alignment.core.errors import DataError
from alignment.data.records import HasRow

ANSWER = "answer"
_MARK = "####"
_EXAMPLE = '{"messages": […], "answer": "6 times 3 is 18. #### 18"}'
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]}%])[-−])?"  # a minus sign, but not the operator between two operands: 5-3
    r"(?:[$€£¥](?P<inner_sign>[-−])?)?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
)
_LATEX_COMMA = re.compile(r"(?<=\d)(?:\{,\}|,\\!)(?=\d)")
"""How LaTeX writes a thousands separator: ``1{,}080`` or ``1,\\!080``."""


class ExactAnswer:
    """1 for an answer whose last number is the one that its row's ``answer`` gives, else 0."""

    def expected(self, record: HasRow) -> Decimal:
        """The row's number; raises DataError if it has none."""
        return expected_answer(record.row, where=record.where)

    def score(self, text: str, expected: Decimal) -> float:
        """1 or 0."""
        return exact_answer(text, expected)


def exact_answer(completion: str, expected: Decimal) -> float:
    """1 if the last number of the completion is ``expected``, else 0 (Cobbe et al. 2021, GSM8K).

    Thousands separators, currency signs and trailing zeros are ignored: ``$1,080.00`` is 1080, and so is LaTeX's
    ``\\$1{,}080``.
    """
    numbers = list(_NUMBER.finditer(_without_latex(completion)))
    return float(bool(numbers) and _value(numbers[-1]) == expected)


def final_number(completion: str) -> str:
    """The last number of the completion in one spelling, such as ``1080``; empty if it has none."""
    numbers = list(_NUMBER.finditer(_without_latex(completion)))
    return f"{_value(numbers[-1]).normalize():f}" if numbers else ""


def expected_answer(row: Mapping[str, Any], *, where: str) -> Decimal:
    """The number after ``####`` in a row's ``answer``, or the field itself if it is a number.

    Raises:
        DataError: there is no such number, or more than one.
    """
    answer = row.get(ANSWER)
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    if isinstance(answer, str):
        _, mark, after = answer.rpartition(_MARK)
        whole = _without_latex(after if mark else answer.strip().rstrip(".%"))
        number = _NUMBER.search(whole) if mark else _NUMBER.fullmatch(whole)
        if number and exact_answer(number.string, _value(number)):
            return _value(number)
        if number:
            raise DataError(
                f"'{ANSWER}' has several numbers after {_MARK}, so it is not clear which one is meant: {after!r:.60}",
                where=where,
                remedy=f"write one number after {_MARK}: {_EXAMPLE}",
            )
    missing = "is missing" if ANSWER not in row else f"contains no number to check against; it is {answer!r:.60}"
    raise DataError(
        f"'{ANSWER}' {missing}", where=where, remedy=f"exact_answer uses the number after {_MARK}: {_EXAMPLE}"
    )


def _without_latex(text: str) -> str:
    """The text with separators and dollar signs as they stand outside LaTeX."""
    return _LATEX_COMMA.sub(",", text).replace("\\$", "$")


def _value(number: re.Match[str]) -> Decimal:
    size = Decimal(number["digits"].replace(",", ""))
    return -size if number["sign"] or number["inner_sign"] else size
