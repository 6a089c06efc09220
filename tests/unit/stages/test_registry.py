"""Kinds of stage that other packages bring: found by name, refused with a reason, never in the way of the others."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from alignment.cli import main
from alignment.core.artifacts import Manifest, publish
from alignment.core.errors import ArtifactError, ConfigError
from alignment.stages import kind_problems, registry
from alignment.stages.kind_problems import KindError

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    def install_one(name: str, entry_point: str, code: str = "") -> None:
        folder = tmp_path / name
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[alignment.stages]\n{entry_point}\n")
        (folder / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setitem(sys.modules, name, None)  # so that no other test finds it imported
        del sys.modules[name]
        registry.registered.cache_clear()

    yield install_one
    monkeypatch.undo()
    registry.registered.cache_clear()


TOY = """\
from dataclasses import dataclass, replace
from alignment.stages.cpt.kind import KIND as CPT
@dataclass(kw_only=True, slots=True)
class ToyConfig(CPT.config):
    kind: str = "{name}"
KIND = replace(CPT, name="{name}", config=ToyConfig)
"""
COUNT = """\
from dataclasses import dataclass, field
from alignment.config.data import DataConfig
from alignment.data.records import PlainText
from alignment.stages.base import DataSlot, Display, LaunchShape, RunsOn, StageKind
@dataclass(kw_only=True, slots=True)
class CountConfig:
    kind: str = "count"
    data: DataConfig = field(default_factory=DataConfig)
    shortest: int = 1
KIND = StageKind(
    name="count", summary="words", config=CountConfig, revision=1, produces="count", run="counting:run",
    data=lambda config: [DataSlot(field="data", data=config.data, record=PlainText)],
    launch=LaunchShape(runs_on=RunsOn.one_process),
)
"""


def test_a_kind_of_another_package_has_its_origin(install: Install) -> None:
    install("brought", "mine = brought:KIND", TOY.format(name="mine"))
    row = registry.registered()["mine"]
    assert (row.origin, row.problem) == ("brought", "")
    assert [registry.origin_of(kind) for kind in ("mine", "sft", "unknown")] == ["brought", "alignment", "alignment"]
    assert list(registry.kinds())[-1] == "mine"


def test_one_that_raises_is_a_line_and_takes_no_other_down(
    install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install("broken", "mine = broken:KIND", "raise RuntimeError('no licence')")
    assert "sft" in registry.kinds()
    assert "mine" not in registry.kinds()
    (line,) = registry.problems().values()
    assert line.startswith("cannot be loaded from broken:KIND (broken): RuntimeError: no licence")
    assert main(["stages"]) == 0
    assert f"mine         {line}" in capsys.readouterr().out
    recipe = tmp_path / "r.yaml"
    recipe.write_text("defaults: [base, _self_]\nsummary: s\nstages: {a: {kind: mine}}\n")
    assert main(["plan", str(recipe), f"output={tmp_path}"]) == 2
    assert "stages.a.kind: 'mine' cannot be loaded from broken:KIND (broken)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("packages", "name", "problem"),
    [
        ({"first": "sft"}, "sft", "registered twice, by alignment and first"),
        ({"other": "yours"}, "mine", "not a StageKind of that name"),
        ({}, "sfd", "did you mean 'sft'"),
    ],
)
def test_a_name_without_its_one_kind_is_refused(
    install: Install, packages: dict[str, str], name: str, problem: str
) -> None:
    for package, own_name in packages.items():
        install(package, f"{name} = {package}:KIND", TOY.format(name=own_name))
    with pytest.raises(ConfigError, match=problem):
        registry.kind_named(name)


ALONE = "launch=LaunchShape(runs_on=RunsOn.one_process)"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("", "", ""),
        ("@dataclass(kw_only=True, slots=True)", "", "that are not a dataclass; put @dataclass"),
        ("shortest: int = 1", "shortest: int", "argument: 'shortest'; give every setting a default"),
        ("int = 1", "'Int' = 1", "types cannot be read: NameError: name 'Int'"),
        ('kind: str = "count"', "", "settings without a kind; write kind: str = 'count' in CountConfig"),
        ('"count"\n', '"words"\n', "settings of the kind 'words'; write kind: str = 'count' in CountConfig"),
        (
            f"    {ALONE},\n",
            "",
            f"lacks init, adapter, optim; add these settings or, if it trains no model, set {ALONE}",
        ),
        ("one_process", "driver", f"inside the driver, which only built-in kinds can; set {ALONE}"),
        ("counting:run", "counting", "run='counting', but there is no function"),
        (ALONE, f"{ALONE}, rehearse='gone:check'", "rehearse='gone:check', but there is no module"),
        ("record=PlainText", "record=str", "reads 'data' as <class 'str'>, which is not a record"),
        (ALONE, f"{ALONE}, metrics=lambda _: ('words',)", "returns no Reported from"),
        (
            ALONE,
            f"{ALONE}, display=Display(curves=lambda s: s['x'])",
            "curves(settings of CountConfig()) raises KeyErro",
        ),
    ],
)
def test_a_kind_that_would_fail_in_a_plan_or_a_worker_says_what_to_change(
    install: Install, old: str, new: str, problem: str
) -> None:
    install("counting", "count = counting:KIND", COUNT.replace(old, new))
    row = registry.registered()["count"]
    assert (row.kind is None) == bool(problem)
    assert row.problem.startswith("cannot be used: counting:KIND (counting) " if problem else "")
    assert problem in row.problem


GROUPS = """\
import enum
import pathlib
import typing
class Mode(enum.Enum):
    short = "short"
@dataclass(kw_only=True)
class Plain:
    size: int = 1
@dataclass(kw_only=True)
class Deep:
    mode: typing.Literal["x"] = "x"
@dataclass(kw_only=True)
class Bare:
    size: int
"""
LIST = "field(default_factory=list)"
NO_RECIPE = "which a recipe cannot hold; use "


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ("typing.Literal['a', 'b'] = 'a'", ["shortest of the type Literal['a', 'b']", f"{NO_RECIPE}an Enum"]),
        ("int | typing.Literal['auto'] = 1", ["shortest of the type Literal['auto']", f"{NO_RECIPE}an Enum"]),
        (f"list = {LIST}", ["shortest of the type list", f"{NO_RECIPE}list[TYPE]"]),
        ("dict[int, str] = field(default_factory=dict)", ["dict[int, str]", f"{NO_RECIPE}dict[str, TYPE]"]),
        ("tuple[int, int] = (1, 2)", ["shortest of the type tuple[int, int]", f"{NO_RECIPE}list[TYPE]"]),
        (f"list[pathlib.Path] = {LIST}", ["shortest of the type Path", f"{NO_RECIPE}str"]),
        ("bytes = b''", ["shortest of the type bytes", f"{NO_RECIPE}bool, int, float, str or an Enum"]),
        ("Plain | str = ''", ["shortest of the type counting.Plain | str", f"{NO_RECIPE}bool"]),
        (f"list[Bare] = {LIST}", ["shortest of groups without defaults", "give every setting of Bare a default"]),
        ("Mode = Mode.short", []),
        ("Plain | None = None", []),
        ("Bare = field(default_factory=lambda: Bare(size=1))", []),
        (f"list[Plain] = {LIST}", []),
        ("typing.Any = None", []),
        ("typing.Annotated[int | None, 'a rule'] = None", []),
    ],
)
def test_a_setting_that_no_recipe_can_hold_is_named(install: Install, declared: str, words: list[str]) -> None:
    """A plan, a worker and ``align schema`` would end in a traceback."""
    code = COUNT.replace("shortest: int = 1", f"shortest: {declared}").replace("@dataclass", f"{GROUPS}@dataclass", 1)
    install("counting", "count = counting:KIND", code)
    problem = registry.registered()["count"].problem
    assert bool(problem) == bool(words)
    assert all(word in problem for word in words)


SHOWS = COUNT.replace(ALONE, f"{ALONE}, display=Display(lines=show, tables=show, doubts=show)")


def shows(body: str) -> str:
    head, kind = SHOWS.split("KIND = ")
    text = f"{head}def show(given):\n    {body}\nKIND = {kind}"
    assert text.splitlines()[9] == "def show(given):"
    return text


TABLE = """from alignment.stages.base import Cell, ResultTable
    return [ResultTable(title='t', note='', columns={{'n': 'n'}}, rows={rows})]"""
NO_TABLE = "not a list of ResultTable with a Cell for each column"


@pytest.mark.parametrize(
    ("body", "error", "line"),
    [
        ("return {}['words']", "KeyError: 'words'", 11),
        ("import json\n    return json.loads('{')", "JSONDecodeError: Expecting property name", 12),
        ("return 'words'", "TypeError: it returned 'words', not a list of ", 10),
        ("return [3]", "TypeError: it returned [3], not a list of ", 10),
    ],
)
def test_a_function_that_fails_to_show_a_result_is_named_with_its_line(
    install: Install, tmp_path: Path, body: str, error: str, line: int
) -> None:
    install("counting", "count = counting:KIND", shows(body))
    assert registry.registered()["count"].problem == ""
    for name, called in (("lines", registry.lines_of), ("tables", registry.tables_of), ("doubts", registry.doubts)):
        with pytest.raises(KindError) as caught:
            called("count", tmp_path)  # type: ignore[arg-type]
        assert caught.value.where == "kind of stage 'count' (counting)"
        first, second = caught.value.message.splitlines()
        assert first.startswith(f"Display.{name} fails with {error}")
        assert second == f"  {tmp_path}/counting/counting.py, line {line}"
        assert "the results are complete" in caught.value.remedy
        assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    "body",
    [
        "return ['words']",
        "return [{}]",
        *(
            TABLE.format(rows=rows)
            for rows in ("[('a', [])]", "[('a', ['3'])]", "['abc']", "3", "[('a', [Cell(text='3')])]")
        ),
    ],
)
def test_a_table_has_a_cell_for_each_column(install: Install, tmp_path: Path, body: str) -> None:
    install("counting", "count = counting:KIND", shows(body))
    if "Cell(" in body:
        assert [table.title for table in registry.tables_of("count", tmp_path)] == ["t"]
    else:
        with pytest.raises(KindError, match=NO_TABLE):
            registry.tables_of("count", tmp_path)


def test_an_error_or_a_missing_file_of_a_package_is_passed_on_unless_the_result_is_complete(
    install: Install, tmp_path: Path
) -> None:
    body = """from alignment.core.errors import ArtifactError
    if given.name == 'damaged':
        raise ArtifactError('is damaged')
    return [(given / 'wrods.json').read_text()]"""
    install("counting", "count = counting:KIND", shows(body))
    for called in (registry.lines_of, registry.tables_of):
        with pytest.raises(ArtifactError, match="is damaged"):
            called("count", tmp_path / "damaged")
    artifact = tmp_path / "artifact"
    with pytest.raises(FileNotFoundError):
        registry.tables_of("count", artifact)
    (tmp_path / "content").mkdir()
    (tmp_path / "content/words.json").touch()
    publish(tmp_path / "content", artifact, Manifest(stage="count", kind="count", fingerprint="01", identity={}))
    with pytest.raises(KindError, match=r"Display\.tables fails with FileNotFoundError"):
        registry.tables_of("count", artifact)


@pytest.mark.parametrize("name", sorted(registry.kinds()))
def test_only_the_report_would_be_refused_from_another_package(name: str) -> None:
    problem = kind_problems.of_kind(registry.kinds()[name])
    assert problem.partition(",")[0] == ("runs inside the driver" if name == "report" else "")
