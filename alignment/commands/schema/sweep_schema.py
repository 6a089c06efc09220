"""JSON Schema of a sweep's file."""

from __future__ import annotations

from alignment.config.class_schemas import DRAFT, ClassSchemas, Schema, described
from alignment.config.sweep import ObjectiveConfig, ParameterConfig, SweepConfig


def sweep_schema() -> Schema:
    """What ``align sweep`` reads. Hydra does not read the file, so nothing in it is interpolated."""
    schemas = ClassSchemas(interpolations=False)
    fields = schemas.fields(SweepConfig)
    several = fields["objective"]
    fields["objective"] = {
        "description": several["description"],
        "if": {"type": "array"},
        "then": {"items": several["items"]},
        "else": schemas.of(ObjectiveConfig),
    }
    parameter = schemas.definitions[ParameterConfig.__name__]
    parameter["required"] = ["key"]
    values = parameter["properties"]["values"]
    values["items"] = {}  # numbers and lists are written as they are in a recipe
    return {
        "$schema": DRAFT,
        "title": "a sweep of align",
        **schemas.group(fields, described(SweepConfig)),
        "required": ["parameters"],
        "definitions": schemas.definitions,
    }
