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

SECRET = "canary-4711"
NINE = ", ".join(["*{}"] * 9)
ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{NINE.replace('{}', f'a{n - 1}')}]\n" for n in range(1, 10)
)
MERGED = "m0: &m0 {a: 1, b: 2}\n" + "".join(
    f"m{n}: &m{n} {{<<: [{NINE.replace('{}', f'm{n - 1}')}]}}\n" for n in range(1, 10)
)
BOMBS = {
    "aliases": (ALIASES, "contains more than 10,000 values"),
    "merged groups": (MERGED, "contains more than 10,000 values"),
    "a list that holds itself": ("a: &a [*a]\n", "contains more than 10,000 values"),
    "a megabyte": (f"# {'x' * (1 << 20)}\n", "is longer than 1 MiB"),
    "bytes": ("a: \ud800\n", "not YAML"),
}


def _write(path: Path, text: str) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode(errors="surrogatepass"))
    return str(path)


def _included(tmp_path: Path, text: str) -> str:
    """A recipe of the user's that takes a file of somebody's."""
    _write(tmp_path / "model/theirs.yaml", text)
    return _write(tmp_path / "mine.yaml", "defaults: [quickstart, {override model: theirs}, _self_]\n")


@pytest.mark.parametrize("name", BOMBS)
def test_a_short_file_that_becomes_a_long_one_is_refused_wherever_it_is_read(name: str, tmp_path: Path) -> None:
    text, message = BOMBS[name]
    assert len(text) < 1_000 or name == "a megabyte"
    with pytest.raises(ConfigError, match=message) as caught:
        compose(_write(tmp_path / "bomb.yaml", f"defaults: [quickstart, _self_]\n{text}"), [])
    assert "bomb.yaml" in str(caught.value)
    with pytest.raises(ConfigError, match=message) as caught:
        compose(_included(tmp_path, text), [])
    assert "model/theirs.yaml" in str(caught.value)
    with pytest.raises(ConfigError, match=message):
        compose(_write(tmp_path / "plain.yaml", "defaults: [quickstart, _self_]\n"), ["model=theirs"])
    _write(tmp_path / "profile/theirs.yaml", text)
    with pytest.raises(ConfigError, match=message):
        compose(str(tmp_path / "plain.yaml"), ["profile=theirs"])
    with pytest.raises(ConfigError, match=message):
        read_sweep("quickstart", _write(tmp_path / "sweep.yaml", text), [])


def test_a_long_file_is_refused_by_what_it_holds_too(tmp_path: Path) -> None:
    brackets = tmp_path / "brackets.yaml"
    brackets.write_text(f"a: {'[' * 1_000}{']' * 1_000}\n")
    with pytest.raises(ConfigError, match=r"brackets\.yaml: not YAML: groups and lists are nested too deeply"):
        yaml_file.read(brackets)
    with pytest.raises(yaml.YAMLError, match="contains more than 10,000 values"):
        yaml_file.load(f"[{', '.join('x' * 10_001)}]")


def test_a_few_aliases_are_fine() -> None:
    assert yaml_file.load("a: &a [1, 2]\nb: *a\nc: {<<: {d: *a}}\n") == {"a": [1, 2], "b": [1, 2], "c": {"d": [1, 2]}}


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match=r"pipe\.yaml: is not a regular file"):
        yaml_file.read(tmp_path / "pipe.yaml")


def test_a_number_and_its_text_are_two_keys() -> None:
    assert yaml_file.load("{1: a, '1': b, 'true': c, false: d}") == {1: "a", "1": "b", "true": "c", False: "d"}
    for text in ("{1: a, 0x1: b}", "{a: 1, 'a': 2}", "{<<: {a: 1}, <<: {b: 2}}"):
        with pytest.raises(yaml.YAMLError, match="occurs twice"):
            yaml_file.load(text)


def test_interpolations_that_double_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "SECONDS", 0.2)
    doubled = "".join(f"a{n}: ${{a{n + 1}}}${{a{n + 1}}}\n" for n in range(40))
    path = _write(tmp_path / "mine.yaml", f"defaults: [quickstart, _self_]\nsummary: ${{a0}}\n{doubled}a40: z\n")
    with pytest.raises(ConfigError, match="interpolations expand to more than can be written"):
        compose(path, [])


DEFAULTS = [
    "defaults: ['${oc.env:CANARY}']\n",
    "defaults: [{/adapter: '${oc.env:CANARY}'}]\n",
    "defaults: [{'/adapter@${oc.env:CANARY}': lora}]\n",
    "defaults: [{optional /adapter: '${oc.env:CANARY}'}]\n",
    "defaults: ['${${a}:CANARY}']\n",
    "defaults: [{/adapter: ['${oc.decode:${oc.env:CANARY}}']}]\n",
]


@pytest.mark.parametrize("text", DEFAULTS)
def test_the_defaults_of_an_included_file_never_read_the_environment(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hydra resolves them while it composes, and its errors name what they became."""
    monkeypatch.setenv("CANARY", SECRET)
    with pytest.raises(ConfigError, match="is not allowed") as caught:
        compose(_included(tmp_path, text), [])
    assert SECRET not in str(caught.value)
    assert "model/theirs.yaml: defaults" in str(caught.value)
    with pytest.raises(ConfigError, match="is not allowed") as caught:
        compose(_write(tmp_path / "whole.yaml", text), [])
    assert SECRET not in str(caught.value)


def test_a_setting_behind_what_would_read_the_environment_does_not_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An override copies a group that is referred to, but not what an interpolation makes."""
    monkeypatch.setenv("CANARY", SECRET)
    text = "source: path:/m\nchat_template: '${oc.create:\"{x: ${oc.env:CANARY}}\"}'\n"
    assert SECRET not in str(compose(_included(tmp_path, text), ["model.chat_template.y=1"]))


def test_the_defaults_of_an_included_file_may_name_the_configuration_s_own_choices(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/lora.yaml").write_text("told: yes\n")
    recipe = _included(tmp_path, "defaults: [{/parts: '${adapter@stages.sft.adapter}'}]\nsource: path:/m\n")
    with pytest.raises(ConfigError) as caught:
        compose(recipe, [])
    assert "is not allowed" not in str(caught.value), "Hydra says what it thinks of it"
