"""Every YAML file that somebody else may have written is read here, and Hydra's own reading is preceded by this one.

No key stands twice in it: the second would replace the first without a word. And no alias makes a short file long: of
seven lines, each with ten references to the one before, ten million values would come.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from alignment.core.errors import ConfigError, DataError
from alignment.core.small_files import small_text

MOST_NODES = 10_000
"""Values and keys, those of an alias at each of its places; the longest recipe has some hundreds."""
_MERGE = "tag:yaml.org,2002:merge"
"""Of ``<<``, which stands for no value."""


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            # As they are read: 1 and "1" are two keys, 1 and 0x1 are not.
            value = key.value if key.tag == _MERGE else self.construct_object(key)
            if value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add(value)
        return super().construct_mapping(node, deep=deep)

    def get_single_node(self) -> yaml.Node | None:
        """Refuses what would be too much before anything is made of it."""
        node = super().get_single_node()
        if node is not None and _count(node, {}) > MOST_NODES:
            raise yaml.constructor.ConstructorError(
                None, None, f"holds more than {MOST_NODES:,} values, its aliases counted at each of their places"
            )
        return node


def load(text: str) -> Any:
    """Plain values.

    Raises:
        yaml.YAMLError: not YAML, a group has a key twice, or it holds too many values; says in which line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("groups and lists lie too deep in one another") from None


def read(path: Path) -> Any:
    """The plain values in a file.

    Raises:
        ConfigError: it cannot be read, is no regular file, is larger than a person writes, or is no YAML.
    """
    try:
        return load(small_text(path))
    except DataError as error:
        raise ConfigError(error.message, where=error.where, remedy=error.remedy) from error
    except OSError as error:
        raise ConfigError(f"cannot be read: {error}", where=str(path)) from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"not YAML: {error}", where=str(path)) from error


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """How many nodes come of it; more than any limit of one that holds itself."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = MOST_NODES + 1  # of an alias to a node that is not yet at its end
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    known[id(node)] = 1 + sum(_count(part, known) for part in parts)
    return known[id(node)]
