"""JSON Schema of the dataclasses of settings, for editors: types, choices, ranges, and docstrings as descriptions.

It is draft 07, the newest that editors know well. A faulty value fails where it stands: a group of settings has its
keys beside its type, not in branches of ``anyOf``, whose faults validators report for the whole group.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from alignment.config.rules import Rule, rule_of
from alignment.config.typed import field_types, kinds_of, to_plain

Schema = dict[str, Any]

DRAFT = "http://json-schema.org/draft-07/schema#"
INTERPOLATION = "interpolation"
_INTERPOLATED = r"^\?\?\?$|\$\{[^:{}]+\}"
"""A value that Hydra fills in: another one's, or one that is still missing."""
_DIGITS = r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$"
"""YAML 1.1 reads 1e-4 as text, which a setting takes as a number."""
_ONLY_FOR: dict[str, type] = {"minLength": str, "minItems": list, "minProperties": dict}
_NO_DEFAULT = object()
_SENTENCE = re.compile(r"(?<=[.:])\s+(?=[A-Z`])")


class ClassSchemas:
    """The ``definitions`` of a schema, one for each dataclass.

    With ``interpolations`` every value may also be a text that Hydra replaces, such as ``${stages.sft.optim}``.
    ``known`` are schemas of types that are described elsewhere."""

    def __init__(self, *, interpolations: bool, known: Mapping[Any, Schema] | None = None) -> None:
        self._interpolations = interpolations
        self._known: dict[Any, Schema] = dict(known or {})
        self._names: dict[type, str] = {}
        self.definitions: dict[str, Schema] = {}
        if interpolations:
            self.definitions[INTERPOLATION] = {
                "type": "string",
                "pattern": _INTERPOLATED,
                "description": "A reference to another setting, ${other.key}, or ???, if the command line must give "
                "the value.",
            }

    def of(self, cls: type) -> Schema:
        """A reference to the definition of a dataclass, which is made if there is none yet."""
        if cls not in self._names:
            taken = cls.__name__ in self.definitions
            self._names[cls] = name = f"{cls.__module__}.{cls.__name__}" if taken else cls.__name__
            self.definitions[name] = {}  # a class may contain itself
            self.definitions[name] = self.group(self.fields(cls), described(cls))
        return {"$ref": f"#/definitions/{self._names[cls]}"}

    def fields(self, cls: type) -> dict[str, Schema]:
        """The schema of each field of a dataclass."""
        return {field.name: self._field(cls, field) for field in dataclasses.fields(cls)}

    def group(self, properties: Mapping[str, Schema], description: str = "") -> Schema:
        """A group of settings with these keys and no others."""
        schema = self._or_text({"type": "object", "properties": dict(properties), "additionalProperties": False})
        return {"description": description, **schema} if description else schema

    def by_kind(self, classes: Mapping[str, type]) -> Schema:
        """A group that is one of several, by its ``kind``; a group without one may have the keys of any of them."""
        branches = [
            {"if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]}, "then": self.of(cls)}
            for kind, cls in classes.items()
        ]
        return self._or_text(
            {
                "type": "object",
                "if": {"type": "object", "required": ["kind"]},
                "then": {"properties": {"kind": {"enum": list(classes)}}, "allOf": branches},
                "else": self.group(self._any_of_fields(classes)),
            }
        )

    def _any_of_fields(self, classes: Mapping[str, type]) -> dict[str, Schema]:
        different: dict[str, dict[str, Schema]] = {}
        for cls in classes.values():
            for name, schema in self.fields(cls).items():
                bare = {key: value for key, value in schema.items() if key not in ("description", "default")}
                different.setdefault(name, {}).setdefault(json.dumps(bare, sort_keys=True), schema)
        merged = {name: _either(list(schemas.values())) for name, schemas in different.items()}
        return merged | {"kind": {"enum": list(classes)}}

    def _field(self, cls: type, field: dataclasses.Field[Any]) -> Schema:
        hint, rule = field_types(cls)[field.name], rule_of(cls, field.name)
        default = _default_of(field)
        if field.name == "kind" and hint is str:
            return {"const": default}
        schema = self._value(hint, rule)
        sentences = [*_sentences_on(field.name, cls), *([f"Allowed: {rule.allowed}."] if rule is not None else [])]
        sentences += [schema["description"]] if "description" in schema else []
        if sentences:
            described_schema = {"allOf": [schema]} if "$ref" in schema else schema
            schema = {**described_schema, "description": "\n\n".join(sentences)}
        return schema if default is _NO_DEFAULT else {**schema, "default": default}

    def _value(self, hint: Any, rule: Rule | None) -> Schema:
        is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
        options = [option for option in (typing.get_args(hint) if is_union else [hint]) if option is not types.NoneType]
        if kinds := kinds_of(hint):
            return self.by_kind(kinds)
        schemas = [self._single(option, rule) for option in options]
        schema = schemas[0] if len(schemas) == 1 else _either(schemas)
        return _or_null(schema) if types.NoneType in typing.get_args(hint) else schema

    def _single(self, hint: Any, rule: Rule | None) -> Schema:
        if hint in self._known:
            return self._known[hint]
        arguments, base = typing.get_args(hint), typing.get_origin(hint) or hint
        all_keywords = {} if rule is None else rule.keywords
        keywords = {key: value for key, value in all_keywords.items() if _ONLY_FOR.get(key, base) is base}
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            return self.of(hint)
        if hint is Any:
            return {}
        if base is list:
            return self._or_text({"type": "array", "items": self._value(arguments[0], None), **keywords})
        if base is dict:
            return self._or_text(
                {"type": "object", "additionalProperties": self._value(arguments[1], None), **keywords}
            )
        if issubclass(hint, Enum):
            description = described(hint)
            choices: Schema = {"enum": [member.value for member in hint]}
            return self._or_interpolation(choices | ({"description": description} if description else {}))
        return self._scalar(hint, keywords)

    def _scalar(self, hint: type, keywords: dict[str, Any]) -> Schema:
        if hint is float:
            sign = "[+]?" if keywords.get("minimum", keywords.get("exclusiveMinimum", -1)) >= 0 else "[-+]?"
            patterns = [f"^{sign}{_DIGITS}", *([_INTERPOLATED] if self._interpolations else [])]
            return {"type": ["number", "string"], **keywords, "pattern": "|".join(patterns)}
        if hint is not str:
            return self._or_text({"type": {int: "integer", bool: "boolean"}[hint], **keywords})
        if self._interpolations and "pattern" in keywords:
            keywords["pattern"] = f"{keywords['pattern']}|{_INTERPOLATED}"
        return {"type": "string", **keywords}

    def _or_text(self, schema: Schema) -> Schema:
        """A schema of values that are no text, or an interpolation in their place."""
        if not self._interpolations:
            return schema
        return {**schema, "type": [schema["type"], "string"], "pattern": _INTERPOLATED}

    def _or_interpolation(self, schema: Schema) -> Schema:
        return _either([schema, {"$ref": f"#/definitions/{INTERPOLATION}"}]) if self._interpolations else schema


def described(cls: type) -> str:
    """The docstring of a class, without the one that dataclasses write themselves."""
    text = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
    return "" if text.startswith(f"{cls.__name__}(") else text


def _sentences_on(name: str, cls: type) -> Iterator[str]:
    """The sentences of a dataclass's docstring, and of those that it extends, which name a field."""
    mentioned = re.compile(rf"``(?:\w+\.)*{re.escape(name)}\b")
    for owner in cls.__mro__:
        if dataclasses.is_dataclass(owner) and name in [field.name for field in dataclasses.fields(owner)]:
            text = " ".join(described(owner).split())
            yield from (sentence for sentence in _SENTENCE.split(text) if mentioned.search(sentence))


def _either(schemas: Sequence[Schema]) -> Schema:
    if len(schemas) == 1:
        return schemas[0]
    descriptions = [schema["description"] for schema in schemas if "description" in schema]
    bare = [{key: value for key, value in schema.items() if key != "description"} for schema in schemas]
    return {"anyOf": bare, **({"description": descriptions[0]} if descriptions else {})}


def _or_null(schema: Schema) -> Schema:
    if "type" in schema:
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        return {**schema, "type": [*kinds, "null"]}
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    if "enum" in schema:
        return {**schema, "enum": [*schema["enum"], None]}
    return {"if": {"not": {"type": "null"}}, "then": schema}


def _default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field that is no group of settings; ``_NO_DEFAULT`` if there is none."""
    if field.default is not dataclasses.MISSING:
        return to_plain(field.default)
    made = None if field.default_factory is dataclasses.MISSING else field.default_factory()
    return to_plain(made) if isinstance(made, list) and not any(map(dataclasses.is_dataclass, made)) else _NO_DEFAULT
