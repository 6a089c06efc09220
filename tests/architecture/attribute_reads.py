"""A plugin of mypy's that notes which attributes of which classes are read, and where."""

from __future__ import annotations

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import Instance, Type

READS: set[tuple[str, str, str]] = set()
"""Class, attribute and the file that reads it."""


class Noting(Plugin):
    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        """mypy asks at every access of an attribute, for each member of a union by itself."""
        owner, _, name = fullname.rpartition(".")
        if not owner.startswith("alignment."):
            return None

        def note(context: AttributeContext) -> Type:
            if not context.is_lvalue:
                # Of a union mypy tells the member's own class alone; of a field that is inherited, who declares it.
                reader = context.type.type.fullname if isinstance(context.type, Instance) else owner
                READS.add((reader, name, context.api.path))
            return context.default_attr_type

        return note


def plugin(version: str) -> type[Plugin]:
    return Noting
