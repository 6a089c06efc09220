"""Reads every YAML file that a user may have written; a file that Hydra reads is read here first.

A key must not occur twice, because the second would silently replace the first. Aliases must not make a short file
long: seven lines, each with ten references to the line before, would expand to ten million values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from alignment.core.errors import ConfigError, DataError
from alignment.core.files import small_text

MOST_NODES = 10_000
"""Values and keys, counting an alias each time it is used; the longest recipe has a few hundred."""
_MERGE = "tag:yaml.org,2002:merge"
"""The tag of ``<<``, which is not a value."""


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            # Compare keys as they are read: 1 and "1" are different, 1 and 0x1 are the same.
            value = key.value if key.tag == _MERGE else self.construct_object(key)
            if value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} occurs twice", key.start_mark)
            seen.add(value)
        return super().construct_mapping(node, deep=deep)

    def get_single_node(self) -> yaml.Node | None:
        """Refuses a tree that is too large before any value is built from it."""
        node = super().get_single_node()
        if node is not None and _count(node, {}) > MOST_NODES:
            raise yaml.constructor.ConstructorError(
                None, None, f"contains more than {MOST_NODES:,} values, where each use of an alias counts"
            )
        return node


def load(text: str) -> Any:
    """The plain values of a text. Raises yaml.YAMLError: it is not YAML, a group has a key twice, or it holds too many
    values; the error names the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("groups and lists are nested too deeply") from None


def read(path: Path) -> Any:
    """The plain values in a file. Raises ConfigError: it cannot be read, is not a regular file, is larger than a person
    writes, or is not YAML."""
    try:
        return load(small_text(path))
    except DataError as error:
        raise ConfigError(error.message, where=error.where, remedy=error.remedy) from error
    except OSError as error:
        raise ConfigError(f"cannot be read: {error}", where=str(path)) from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"not YAML: {error}", where=str(path)) from error


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """The number of nodes after aliases are expanded; above any limit for a node that contains itself."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = MOST_NODES + 1  # for an alias to a node that is not counted yet
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    known[id(node)] = 1 + sum(_count(part, known) for part in parts)
    return known[id(node)]
