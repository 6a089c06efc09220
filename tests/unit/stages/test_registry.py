"""Kinds of stage that other packages bring: found by name, refused with a reason, never in the way of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from alignment.cli import main
from alignment.core.errors import ConfigError
from alignment.stages import registry

OUTSIDE = Path(__file__).parents[2] / "data" / "outside"
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a package with an entry point, and a module of that package."""

    def install_one(name: str, entry_point: str, code: str = "") -> None:
        folder = tmp_path / name
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[alignment.stages]\n{entry_point}\n")
        (folder / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(str(folder))
        registry.registered.cache_clear()

    yield install_one
    monkeypatch.undo()
    registry.registered.cache_clear()


TOY = """\
from dataclasses import dataclass, replace
from alignment.stages.cpt.kind import KIND as CPT
KIND = replace(CPT, name="{name}")
"""


def test_a_kind_of_another_package_has_its_origin(install: Install) -> None:
    install("brought", "mine = brought:KIND", TOY.format(name="mine"))
    row = registry.registered()["mine"]
    assert (row.origin, row.problem) == ("brought", "")
    assert list(registry.kinds())[-1] == "mine"


def test_one_that_raises_is_a_line_and_takes_no_other_down(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("broken", "mine = broken:KIND", "raise RuntimeError('no licence')")
    assert "sft" in registry.kinds()
    assert "mine" not in registry.kinds()
    line = "cannot be loaded from broken:KIND (broken): RuntimeError: no licence; fix or uninstall that package"
    assert registry.problems() == {"mine": line}
    assert main(["stages"]) == 0
    assert f"mine         {line}" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="the kind of stage 'mine' cannot be loaded from broken:KIND"):
        registry.kind_named("mine")


@pytest.mark.parametrize("name", ["sft", "mine"])
def test_a_name_that_two_packages_register_is_refused(install: Install, name: str) -> None:
    install("first", f"{name} = first:KIND", TOY.format(name=name))
    if name == "mine":
        install("second", f"{name} = second:KIND", TOY.format(name=name))
    both = "alignment and first" if name == "sft" else "first and second"
    with pytest.raises(ConfigError, match=f"'{name}' is registered twice, by {both}; uninstall one of them"):
        registry.kind_named(name)


def test_what_is_not_a_kind_of_that_name_is_refused(install: Install) -> None:
    install("other", "mine = other:KIND", TOY.format(name="yours"))
    with pytest.raises(ConfigError, match="is not a StageKind of that name"):
        registry.kind_named("mine")


def test_a_recipe_with_a_broken_kind_is_refused_where_it_stands(
    install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install("broken", "mine = broken:KIND", "raise RuntimeError('no licence')")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("defaults: [base, _self_]\nsummary: s\nstages: {a: {kind: mine}}\n")
    assert main(["plan", str(recipe), f"output={tmp_path}"]) == 2
    assert "stages.a.kind: 'mine' cannot be loaded from broken:KIND (broken): RuntimeError: no licence" in (
        capsys.readouterr().err
    )


def test_an_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'sfd' is not a kind of stage; did you mean 'sft'"):
        registry.kind_named("sfd")
