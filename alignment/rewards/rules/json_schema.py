"""The rule ``json_schema``: whether an answer is JSON that a schema accepts (json-schema.org, by ``jsonschema``)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any, NoReturn

from alignment.core.errors import DataError
from alignment.core.files import parse_json
from alignment.data.records import HasRow
from alignment.rewards.rules.rule_kind import Package, Rule, lacking

PACKAGE = Package(modules=("jsonschema",), requirement="'jsonschema>=4.23,<5'")
SCHEMA = "schema"
_REFER = ("$ref", "$dynamicRef")
_REMEDY = f'give the metric a {SCHEMA}, or each row one: {{"{SCHEMA}": {{"type": "object", "required": ["name"]}}}}'


def json_schema(default: Mapping[str, Any] | None) -> Rule:
    """1 for an answer that is one JSON value which the schema accepts, else 0. White space around the value is allowed;
    a code fence, words before it, NaN and Infinity are not, and neither is a number that is too large for the schema's
    arithmetic. The schema is that of the row, or else the metric's ``default``; without ``$schema`` it is read as the
    newest draft. ``format`` is not checked, and a ``$ref`` to another document is never fetched."""
    own = None if default is None else _validator(default)
    return Rule(expected=partial(_validator_of, own), score=_accepts)


def _validator_of(default: Any, record: HasRow) -> Any:
    schema = record.row.get(SCHEMA)
    if isinstance(schema, str):
        try:
            schema = parse_json(schema)
        except ValueError:
            lacking(record, SCHEMA, _REMEDY)
    if schema is None and default is not None:
        return default
    if not isinstance(schema, Mapping):
        lacking(record, SCHEMA, _REMEDY)
    if problem := schema_problem(schema):
        raise DataError(f"'{SCHEMA}' {problem}", where=record.where, remedy=_REMEDY)
    return _validator(schema)


def _accepts(text: str, validator: Any) -> float:
    try:
        return float(validator.is_valid(json.loads(text, parse_constant=_refuse_constant)))
    except (ValueError, OverflowError, RecursionError):
        return 0.0


def schema_problem(schema: Mapping[str, Any]) -> str:
    """What is wrong with a schema, as the rest of a sentence; empty if nothing is."""
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for

    draft = schema.get("$schema", "")
    if not isinstance(draft, str) or (draft and validator_for(schema, default=None) is None):
        return f"has the $schema {draft!r:.80}, which is not a draft of JSON Schema; leave it out for the newest"
    cls: Any = validator_for(schema)
    try:
        cls.check_schema(schema)
    except SchemaError as error:
        return f"is not a JSON schema: {error.message:.200}"
    references = sorted(_references(schema, {**schema, "$schema": cls.META_SCHEMA["$schema"]}))
    outside = next((reference for reference, _ in references if not reference.startswith("#")), None)
    if outside is not None:
        return f"refers to {outside!r:.80}, but nothing is fetched from elsewhere; write it under $defs"
    missing = next((reference for reference, is_there in references if not is_there), None)
    return "" if missing is None else f"refers to {missing!r:.80}, which it does not contain"


def _validator(schema: Mapping[str, Any]) -> Any:
    from jsonschema.validators import validator_for
    from referencing import Registry

    return validator_for(schema)(schema, registry=Registry())  # an empty one, which fetches nothing


def _references(schema: Any, document: Mapping[str, Any]) -> set[tuple[str, bool]]:
    """All references anywhere in a schema, each with whether ``document`` holds what it refers to. The document is the
    whole schema, or the part around the reference that has an ``$id`` of its own."""
    if isinstance(schema, list):
        return set().union(*(_references(part, document) for part in schema))
    if not isinstance(schema, Mapping):
        return set()
    if isinstance(schema.get("$id"), str) and not schema["$id"].startswith("#"):
        document = {**schema, "$schema": document["$schema"]}
    named = [schema[keyword] for keyword in _REFER if isinstance(schema.get(keyword), str)]
    own = {(name, _holds(document, name)) for name in named}
    return own.union(*(_references(part, document) for part in schema.values()))


def _holds(document: Mapping[str, Any], reference: str) -> bool:
    from referencing import Registry, Resource
    from referencing.exceptions import Unresolvable

    resource: Any = Resource.from_contents(document)
    try:
        Registry().resolver_with_root(resource).lookup(reference)
    except Unresolvable:
        return False
    return True


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
