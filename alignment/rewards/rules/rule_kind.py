"""What a rule is: it scores an answer's text, with what the answer's row says about it. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NoReturn

from alignment.config.scoring import ScoreSourceConfig
from alignment.core.errors import DataError
from alignment.data.records import HasRow


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """Scores texts. ``score`` takes an answer, and what the rule ``expected`` of it according to its row. ``expected``
    raises DataError if the row lacks what the rule reads; the error names file and line."""

    score: Callable[[str, Any], float]
    expected: Callable[[HasRow], Any] = lambda _: None


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """A library that a rule needs: the ``modules`` that it imports, and what pip calls it."""

    modules: tuple[str, ...]
    requirement: str

    def missing(self) -> str:
        """What to say if it is not installed; empty if it is."""
        absent = [module for module in self.modules if find_spec(module) is None]
        return f"needs {', '.join(absent)}, not installed here; pip install {self.requirement}" if absent else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleKind:
    """A rule as the plan and the docs see it. ``build`` makes the rule from its settings, of which it ``needs`` one, or
    ``takes`` one that may be missing. ``fault`` says what is wrong with that setting, beyond its type; empty if nothing
    is. Answers are compared with the field of their row that ``reads`` names, if any."""

    build: Callable[[ScoreSourceConfig], Rule]
    needs: str | None = None
    takes: str | None = None
    reads: str | None = None
    package: Package | None = None
    fault: Callable[[ScoreSourceConfig], str] = lambda _: ""

    @property
    def setting(self) -> str | None:
        return self.needs or self.takes


def lacking(record: HasRow, field: str, remedy: str) -> NoReturn:
    """Raises DataError for a field that is missing in a row, or has another form."""
    value = record.row.get(field)
    problem = "is missing" if value is None else f"has the wrong form; it is {value!r:.60}"
    raise DataError(f"'{field}' {problem}", where=record.where, remedy=remedy)


def texts_in(row: Mapping[str, Any], field: str) -> list[str] | None:
    """The texts of a field that holds one text, or a list of them; None if it holds anything else, or blank text."""
    value = row.get(field)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts:
        return None
    return texts if all(isinstance(text, str) and text.strip() for text in texts) else None
