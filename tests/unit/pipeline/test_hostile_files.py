"""Recipes and sweeps of anybody's: none hangs a plan, and none has the environment read."""

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
from tests.unit.pipeline.conftest import write as write_text

SECRET = "canary-4711"
NINE = ", ".join(["*{}"] * 9)
ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{NINE.replace('{}', f'a{n - 1}')}]\n" for n in range(1, 10)
)
MERGED = "m0: &m0 {a: 1, b: 2}\n" + "".join(
    f"m{n}: &m{n} {{<<: [{NINE.replace('{}', f'm{n - 1}')}]}}\n" for n in range(1, 10)
)
MANY = "contains more than 10,000 values"


def write(path: Path, text: str) -> str:
    write_text(path, "")
    path.write_bytes(text.encode(errors="surrogatepass"))
    return str(path)


def included(folder: Path, text: str) -> str:
    """A recipe of the user's that takes a file of somebody's."""
    write(folder / "model/foreign.yaml", text)
    return write(folder / "own.yaml", "defaults: [quickstart, {override model: foreign}, _self_]\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(ALIASES, MANY, id="aliases"),
        pytest.param(MERGED, MANY, id="merged groups"),
        pytest.param("a: &a [*a]\n", MANY, id="a list that holds itself"),
        pytest.param(f"# {'x' * (1 << 20)}\n", "is longer than 1 MiB", id="a megabyte"),
        pytest.param("a: \ud800\n", "not YAML", id="bytes"),
    ],
)
def test_a_short_file_that_becomes_a_long_one_is_refused_wherever_it_is_read(
    text: str, message: str, tmp_path: Path
) -> None:
    plain = write(tmp_path / "plain.yaml", "defaults: [quickstart, _self_]\n")
    write(tmp_path / "profile/foreign.yaml", text)
    for file, recipe, overrides in (
        ("bomb.yaml", write(tmp_path / "bomb.yaml", f"defaults: [quickstart, _self_]\n{text}"), []),
        ("model/foreign.yaml", included(tmp_path, text), []),
        ("", plain, ["model=foreign"]),
        ("", plain, ["profile=foreign"]),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            compose(recipe, overrides)
        assert file in str(caught.value)
    with pytest.raises(ConfigError, match=message):
        read_sweep("quickstart", write(tmp_path / "sweep.yaml", text), [])


def test_a_long_file_and_a_pipe_are_refused_and_a_few_aliases_are_fine(tmp_path: Path) -> None:
    brackets = write(tmp_path / "brackets.yaml", f"a: {'[' * 1_000}{']' * 1_000}\n")
    with pytest.raises(ConfigError, match=r"brackets\.yaml: not YAML: groups and lists are nested too deeply"):
        yaml_file.read(Path(brackets))
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match=r"pipe\.yaml: is not a regular file"):
        yaml_file.read(tmp_path / "pipe.yaml")
    with pytest.raises(yaml.YAMLError, match=MANY):
        yaml_file.load(f"[{', '.join('x' * 10_001)}]")
    assert yaml_file.load("a: &a [1, 2]\nb: *a\nc: {<<: {d: *a}}\n") == {"a": [1, 2], "b": [1, 2], "c": {"d": [1, 2]}}


def test_a_number_and_its_text_are_two_keys() -> None:
    assert yaml_file.load("{1: a, '1': b, 'true': c, false: d}") == {1: "a", "1": "b", "true": "c", False: "d"}
    for text in ("{1: a, 0x1: b}", "{a: 1, 'a': 2}", "{<<: {a: 1}, <<: {b: 2}}"):
        with pytest.raises(yaml.YAMLError, match="occurs twice"):
            yaml_file.load(text)


def test_interpolations_that_double_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "SECONDS", 0.2)
    doubled = "".join(f"a{n}: ${{a{n + 1}}}${{a{n + 1}}}\n" for n in range(40))
    path = write(tmp_path / "own.yaml", f"defaults: [quickstart, _self_]\nsummary: ${{a0}}\n{doubled}a40: z\n")
    with pytest.raises(ConfigError, match="interpolations expand to more than can be written"):
        compose(path, [])


@pytest.mark.parametrize(
    "text",
    [
        "defaults: ['${oc.env:CANARY}']\n",
        "defaults: [{/adapter: '${oc.env:CANARY}'}]\n",
        "defaults: [{'/adapter@${oc.env:CANARY}': lora}]\n",
        "defaults: [{optional /adapter: '${oc.env:CANARY}'}]\n",
        "defaults: ['${${a}:CANARY}']\n",
        "defaults: [{/adapter: ['${oc.decode:${oc.env:CANARY}}']}]\n",
    ],
)
def test_the_defaults_of_an_included_file_never_read_the_environment(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hydra resolves them while it composes, and its errors name what they became."""
    monkeypatch.setenv("CANARY", SECRET)
    for recipe, words in (
        (included(tmp_path, text), "model/foreign.yaml: defaults"),
        (write(tmp_path / "whole.yaml", text), ""),
    ):
        with pytest.raises(ConfigError, match="is not allowed") as caught:
            compose(recipe, [])
        assert (SECRET in str(caught.value), words in str(caught.value)) == (False, True)


def test_a_setting_behind_what_would_read_the_environment_does_not_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An override copies a group that is referred to, but not what an interpolation makes."""
    monkeypatch.setenv("CANARY", SECRET)
    text = "source: path:/m\nchat_template: '${oc.create:\"{x: ${oc.env:CANARY}}\"}'\n"
    assert SECRET not in str(compose(included(tmp_path, text), ["model.chat_template.y=1"]))


def test_the_defaults_of_an_included_file_may_name_the_configuration_s_own_choices(tmp_path: Path) -> None:
    write(tmp_path / "parts/lora.yaml", "told: yes\n")
    recipe = included(tmp_path, "defaults: [{/parts: '${adapter@stages.sft.adapter}'}]\nsource: path:/m\n")
    with pytest.raises(ConfigError) as caught:
        compose(recipe, [])
    assert "is not allowed" not in str(caught.value), "Hydra says what it thinks of it"
