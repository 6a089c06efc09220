"""A Python value comes out of a configuration as it went in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignment.api.calls import words
from alignment.core.errors import ConfigError
from alignment.pipeline.plan.overrides import parse_override

TEXTS = ["full", "true", "1e5", "", " a b ", "it's", "C:\\", "a\\'b", "\\\\", "k=v, [x]", "hub:a/b@c", "müller"]


@pytest.mark.parametrize(
    "value",
    [None, True, False, 0, -3, 2e-5, 1e300, [1, "a b", None], {"a": [True, 0.5], "b": {"d": "it's"}}, [], {}, *TEXTS],
    ids=repr,
)
def test_a_value_is_read_as_it_was_given(value: Any) -> None:
    (word,) = words({"stages.dpo.key": value})
    override = parse_override(word)
    assert override.key_or_group == "stages.dpo.key"
    read = override.value()
    assert read == value
    assert type(read) is type(value)


def test_numbers_of_other_libraries_and_paths_are_written_as_python_s() -> None:
    given = {"a": np.float64(0.5), "b": np.int64(3), "c": Path("/runs/a b"), "d": ("x",)}
    assert words(given) == ["a=0.5", "b=3", "c='/runs/a b'", "d=[x]"]
    assert words(["a=1", "~b"]) == ["a=1", "~b"]


@pytest.mark.parametrize("given", [3, [{"a": 1}]], ids=repr)
def test_overrides_of_another_type_are_refused(given: Any) -> None:
    with pytest.raises(TypeError, match=r"is not an override; give texts"):
        words(given)


def test_a_value_without_a_form_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^stages\.sft: set cannot be written in a configuration"):
        words({"stages.sft": {1}})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"^stages\.sft: 'a b' cannot name a setting"):
        words({"stages.sft": {"a b": 1}})
