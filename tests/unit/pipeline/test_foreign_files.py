"""No file of somebody else's hangs a plan, becomes a long one or has the environment read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from alignment.config import yaml_file
from alignment.core import deadline
from alignment.core.errors import ConfigError
from alignment.pipeline.plan.compose import compose
from alignment.pipeline.sweeps.sweep_file import read_sweep
from tests.unit.pipeline.conftest import write

SECRET = "canary-4711"
NINE = ", ".join(["*{}"] * 9)
ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{NINE.replace('{}', f'a{n - 1}')}]\n" for n in range(1, 10)
)
MERGED = "m0: &m0 {a: 1, b: 2}\n" + "".join(
    f"m{n}: &m{n} {{<<: [{NINE.replace('{}', f'm{n - 1}')}]}}\n" for n in range(1, 10)
)
MANY = "contains more than 10,000 values"


def write_bytes(path: Path, text: str) -> str:
    write(path, "")
    path.write_bytes(text.encode(errors="surrogatepass"))
    return str(path)


def included(folder: Path, text: str) -> str:
    write_bytes(folder / "model/foreign.yaml", text)
    return write_bytes(folder / "own.yaml", "defaults: [quickstart, {override model: foreign}, _self_]\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(ALIASES, MANY, id="aliases"),
        pytest.param(MERGED, MANY, id="merged groups"),
        pytest.param("a: &a [*a]\n", MANY, id="a list that holds itself"),
        pytest.param(f"# {'x' * (1 << 20)}\n", "is longer than 1 MiB", id="a megabyte"),
        pytest.param("a: \ud800\n", "not YAML", id="bytes"),
        pytest.param(f"a: {'[' * 1_000}{']' * 1_000}\n", "not YAML: groups and lists are nested too deeply", id="deep"),
        pytest.param("{a: 1, 'a': 2}", "occurs twice", id="a key that occurs twice"),
    ],
)
def test_a_file_that_is_no_yaml_or_too_long_is_refused_anywhere(text: str, message: str, tmp_path: Path) -> None:
    plain = write_bytes(tmp_path / "plain.yaml", "defaults: [quickstart, _self_]\n")
    write_bytes(tmp_path / "profile/foreign.yaml", text)
    for file, recipe, overrides in (
        ("bomb.yaml", write_bytes(tmp_path / "bomb.yaml", text), []),
        ("model/foreign.yaml", included(tmp_path, text), []),
        ("", plain, ["model=foreign"]),
        ("", plain, ["profile=foreign"]),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            compose(recipe, overrides)
        assert file in str(caught.value)
    with pytest.raises(ConfigError, match=message):
        read_sweep("quickstart", write_bytes(tmp_path / "sweep.yaml", text), [])


def test_a_pipe_is_refused_and_a_few_aliases_and_keys_that_look_alike_are_fine(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match=r"pipe\.yaml: is not a regular file"):
        yaml_file.read(tmp_path / "pipe.yaml")
    assert yaml_file.load("a: &a [1, 2]\nb: *a\nc: {<<: {d: *a}}\n") == {"a": [1, 2], "b": [1, 2], "c": {"d": [1, 2]}}
    assert yaml_file.load("{1: a, '1': b, 'true': c, false: d}") == {1: "a", "1": "b", "true": "c", False: "d"}
    for text in ("{1: a, 0x1: b}", "{<<: {a: 1}, <<: {b: 2}}"):
        with pytest.raises(yaml.YAMLError, match="occurs twice"):
            yaml_file.load(text)


def test_interpolations_that_double_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "SECONDS", 0.2)
    doubled = "".join(f"a{n}: ${{a{n + 1}}}${{a{n + 1}}}\n" for n in range(40))
    path = write_bytes(tmp_path / "own.yaml", f"defaults: [quickstart, _self_]\nsummary: ${{a0}}\n{doubled}a40: z\n")
    with pytest.raises(ConfigError, match="interpolations expand to more than can be written"):
        compose(path, [])


@pytest.mark.parametrize(
    "text",
    [
        "defaults: [{'/adapter@${oc.env:CANARY}': lora}]\n",
        "defaults: ['${${a}:CANARY}']\n",
        "defaults: [{/adapter: ['${oc.decode:${oc.env:CANARY}}']}]\n",
    ],
)
def test_included_defaults_never_read_the_environment(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hydra resolves them while it composes, and its errors name what they became."""
    monkeypatch.setenv("CANARY", SECRET)
    for recipe, words in (
        (included(tmp_path, text), "model/foreign.yaml: defaults"),
        (write_bytes(tmp_path / "whole.yaml", text), ""),
    ):
        with pytest.raises(ConfigError, match="is not allowed") as caught:
            compose(recipe, [])
        assert (SECRET in str(caught.value), words in str(caught.value)) == (False, True)
