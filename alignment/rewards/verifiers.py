"""Rules that score an answer's text: functions of text and numbers, each from 0 to 1."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from alignment.core.errors import DataError

ANSWER = "answer"
_MARK = "####"
_EXAMPLE = '{"messages": […], "answer": "6 times 3 is 18. #### 18"}'
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]%])[-−])?"  # a minus sign, but not the operator between two operands: 5-3
    r"(?:[$€£¥](?P<inner_sign>[-−])?)?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
)


def exact_answer(completion: str, expected: Decimal) -> float:
    """1 if the last number of the completion is ``expected``, else 0 (Cobbe et al. 2021, GSM8K).

    Thousands separators, currency signs and trailing zeros are ignored: ``$1,080.00`` is 1080.
    """
    numbers = list(_NUMBER.finditer(completion))
    return float(bool(numbers) and _value(numbers[-1]) == expected)


def final_number(completion: str) -> str:
    """The last number of the completion in one spelling, such as ``1080``; empty if it has none."""
    numbers = list(_NUMBER.finditer(completion))
    return f"{_value(numbers[-1]).normalize():f}" if numbers else ""


def expected_answer(row: Mapping[str, Any], *, where: str) -> Decimal:
    """The number after ``####`` in a row's ``answer``, or the field itself if it is a number.

    Raises:
        DataError: there is no such number.
    """
    answer = row.get(ANSWER)
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    if isinstance(answer, str):
        _, mark, after = answer.rpartition(_MARK)
        number = _NUMBER.search(after) if mark else _NUMBER.fullmatch(answer.strip().rstrip(".%"))
        if number:
            return _value(number)
    missing = "is missing" if ANSWER not in row else f"holds no number to check against; it is {answer!r:.60}"
    raise DataError(
        f"'{ANSWER}' {missing}", where=where, remedy=f"exact_answer takes the number after {_MARK}: {_EXAMPLE}"
    )


def regex(completion: str, pattern: re.Pattern[str]) -> float:
    """1 if the pattern is found anywhere in the completion, else 0."""
    return float(pattern.search(completion) is not None)


def length(completion: str, target: int) -> float:
    """1 at ``target`` words, falling linearly to 0 at zero words and at twice as many."""
    return max(0.0, 1.0 - abs(len(completion.split()) - target) / target)


def _value(number: re.Match[str]) -> Decimal:
    size = Decimal(number["digits"].replace(",", ""))
    return -size if number["sign"] or number["inner_sign"] else size
