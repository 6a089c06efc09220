"""The rule ``json_schema``: whether an answer is JSON that a schema accepts (json-schema.org, by ``jsonschema``)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from alignment.core.errors import DataError
from alignment.data.records import HasRow
from alignment.rewards.rules.rule_kind import Package, lacking

PACKAGE = Package(modules=("jsonschema",), requirement="'jsonschema>=4.23,<5'")
SCHEMA = "schema"
_REMEDY = f'give the metric a {SCHEMA}, or each row one: {{"{SCHEMA}": {{"type": "object", "required": ["name"]}}}}'


class JsonSchema:
    """1 for an answer that is one JSON value which the schema accepts, else 0.

    White space around the value is allowed; a code fence, words before it, NaN and Infinity are not. The schema is that
    of the row, or else the metric's; without ``$schema`` it is read as the newest draft. ``format`` is not checked, and
    a ``$ref`` to another document is never fetched.
    """

    def __init__(self, schema: Mapping[str, Any] | None) -> None:
        self._default = None if schema is None else _validator(schema)

    def expected(self, record: HasRow) -> Any:
        """The validator of the row's schema.

        Raises:
            DataError: neither row nor metric has a schema, or the row's is not valid.
        """
        schema = record.row.get(SCHEMA)
        if isinstance(schema, str):
            schema = _parsed(schema, record)
        if schema is None and self._default is not None:
            return self._default
        if not isinstance(schema, Mapping):
            lacking(record, SCHEMA, _REMEDY)
        if problem := schema_problem(schema):
            raise DataError(f"'{SCHEMA}' {problem}", where=record.where, remedy=_REMEDY)
        return _validator(schema)

    def score(self, text: str, expected: Any) -> float:
        """1 or 0."""
        try:
            value = json.loads(text, parse_constant=_refuse_constant)
            return float(expected.is_valid(value))
        except (ValueError, RecursionError):
            return 0.0


def schema_problem(schema: Mapping[str, Any]) -> str:
    """What is wrong with a schema, as the rest of a sentence; empty if nothing is."""
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for

    cls: Any = validator_for(schema)
    try:
        cls.check_schema(schema)
    except SchemaError as error:
        return f"is not a JSON schema: {error.message:.200}"
    outside = sorted(reference for reference in _references(schema) if not reference.startswith("#"))
    return f"refers to {outside[0]!r:.80}, and nothing is fetched; write it under $defs" if outside else ""


def _validator(schema: Mapping[str, Any]) -> Any:
    from jsonschema.validators import validator_for
    from referencing import Registry

    return validator_for(schema)(schema, registry=Registry())  # an empty one, which fetches nothing


def _references(schema: Any) -> set[str]:
    """All that ``$ref`` names anywhere in a schema."""
    if isinstance(schema, list):
        return set().union(*map(_references, schema))
    if not isinstance(schema, Mapping):
        return set()
    own = {schema["$ref"]} if isinstance(schema.get("$ref"), str) else set()
    return own.union(*map(_references, schema.values()))


def _parsed(schema: str, record: HasRow) -> Any:
    try:
        return json.loads(schema)
    except (ValueError, RecursionError):
        lacking(record, SCHEMA, _REMEDY)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
