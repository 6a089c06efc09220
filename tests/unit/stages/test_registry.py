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
from alignment.stages.base import DataSlot, LaunchShape, Outcome, RunsOn, StageKind
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


IN_ONE_PROCESS = "launch=LaunchShape(runs_on=RunsOn.one_process)"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("", "", ""),
        ("@dataclass(kw_only=True, slots=True)", "", "has settings that are not a dataclass; put @dataclass(kw_only"),
        ("shortest: int = 1", "shortest: int", "required keyword-only argument: 'shortest'; give every setting a def"),
        (
            "int = 1",
            "'Int' = 1",
            "has settings whose types cannot be read: NameError: name 'Int' is not defined; import",
        ),
        ('kind: str = "count"', "", "has settings without a kind; write kind: str = 'count' in CountConfig"),
        ('"count"\n', '"words"\n', "has settings of the kind 'words'; write kind: str = 'count' in CountConfig"),
        (f"    {IN_ONE_PROCESS},\n", "", "trains a model, but CountConfig lacks init, adapter, optim; add these set"),
        (f"    {IN_ONE_PROCESS},\n", "", f"or, if it trains no model, set {IN_ONE_PROCESS}"),
        ("one_process", "driver", f"runs inside the driver, which only built-in kinds can; set {IN_ONE_PROCESS}"),
        ("counting:run", "counting.gone:run", "'counting.gone:run', but there is no module counting.gone; set run="),
        ("counting:run", "gone.run:run", "has run='gone.run:run', but there is no module gone.run; set run='PACKA"),
        ("counting:run", "counting", "has run='counting', but there is no function; set run='PACKAGE.MODULE:FUNCTION'"),
        (', run="counting:run"', "", "has run='', but there is no function; set run="),
        (
            IN_ONE_PROCESS,
            f"{IN_ONE_PROCESS}, rehearse='gone:check'",
            "has rehearse='gone:check', but there is no modul",
        ),
        ("record=PlainText", "record=str", "reads 'data' as <class 'str'>, which is not a record; use a class of ali"),
        ("=config.data", "=config.text", "has a data function that fails: data(CountConfig()) raises AttributeError:"),
        (
            IN_ONE_PROCESS,
            f"{IN_ONE_PROCESS}, outcome=Outcome(metrics=lambda _: ('words',))",
            "returns no Reported from",
        ),
        (IN_ONE_PROCESS, f"{IN_ONE_PROCESS}, outcome=Outcome(metrics=lambda c: c.x)", "raises AttributeError: 'CountC"),
        (
            IN_ONE_PROCESS,
            f"{IN_ONE_PROCESS}, curves=lambda s: s['x']",
            "curves(settings of CountConfig()) raises KeyErro",
        ),
        (
            IN_ONE_PROCESS,
            f"{IN_ONE_PROCESS}, curves=lambda s: ['loss']",
            "returns ['loss'] from curves(settings); return a",
        ),
        (
            IN_ONE_PROCESS,
            f"{IN_ONE_PROCESS}, tokens=lambda s, line: line['words']",
            "tokens(settings, {'step': 1}) raises",
        ),
        (
            IN_ONE_PROCESS,
            f"{IN_ONE_PROCESS}, tokens=lambda s, line: 'many'",
            "returns 'many' from tokens(settings, line)",
        ),
        (IN_ONE_PROCESS, f"{IN_ONE_PROCESS}, curves=lambda s: [], tokens=lambda s, line: int(s['shortest'] == 1)", ""),
        ("[DataSlot", "1 + [DataSlot", "has a data function that fails: data(CountConfig()) raises TypeError: unsup"),
    ],
)
def test_a_kind_that_would_fail_in_a_plan_or_a_worker_says_what_to_change(
    install: Install, old: str, new: str, problem: str
) -> None:
    install("counting", "count = counting:KIND", COUNT.replace(old, new))
    row = registry.registered()["count"]
    if problem:
        assert row.problem.startswith("cannot be used: counting:KIND (counting) ")
        assert problem in row.problem
    else:
        assert row.kind is not None


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
A_LIST = "field(default_factory=list)"
OTHERS = "bool, int, float, str or an Enum, list[TYPE] or dict[str, TYPE] of these, a dataclass, or a list of one"


def problem_of_setting(install: Install, declared: str) -> str:
    """What is wrong with a kind whose setting ``shortest`` has this type and default."""
    code = COUNT.replace("shortest: int = 1", f"shortest: {declared}").replace("@dataclass", f"{GROUPS}@dataclass", 1)
    install("counting", "count = counting:KIND", code)
    return registry.registered()["count"].problem.removeprefix("cannot be used: counting:KIND (counting) ")


@pytest.mark.parametrize(
    ("declared", "shown", "remedy"),
    [
        ("typing.Literal['a', 'b'] = 'a'", "shortest of the type Literal['a', 'b']", "an Enum"),
        ("int | typing.Literal['auto'] = 1", "shortest of the type Literal['auto']", "an Enum"),
        (f"list = {A_LIST}", "shortest of the type list", "list[TYPE]"),
        ("dict = field(default_factory=dict)", "shortest of the type dict", "dict[str, TYPE]"),
        ("dict[int, str] = field(default_factory=dict)", "shortest of the type dict[int, str]", "dict[str, TYPE]"),
        ("tuple[int, int] = (1, 2)", "shortest of the type tuple[int, int]", "list[TYPE]"),
        ("set[str] | None = None", "shortest of the type set[str]", "list[TYPE]"),
        (f"list[pathlib.Path] = {A_LIST}", "shortest of the type Path", "str"),
        ("bytes = b''", "shortest of the type bytes", OTHERS),
        ("Deep = field(default_factory=Deep)", "shortest.mode of the type Literal['x']", "an Enum"),
        ("Plain | str = ''", "shortest of the type counting.Plain | str", OTHERS),
        ("dict[str, Plain] = field(default_factory=dict)", "shortest of the type dict[str, counting.Plain]", OTHERS),
    ],
)
def test_a_setting_that_no_recipe_can_hold_is_named(install: Install, declared: str, shown: str, remedy: str) -> None:
    """A plan, a worker and ``align schema`` would end in a traceback."""
    problem = problem_of_setting(install, declared)
    assert problem == f"has a setting {shown}, which a recipe cannot hold; use {remedy}"


@pytest.mark.parametrize("declared", [f"list[Bare] = {A_LIST}", "Bare | None = None"])
def test_groups_that_a_recipe_begins_need_defaults(install: Install, declared: str) -> None:
    problem = problem_of_setting(install, declared)
    assert problem.startswith("has a setting shortest of groups without defaults: TypeError: Bare.__init__() missing")
    assert problem.endswith("; give every setting of Bare a default")


@pytest.mark.parametrize(
    "declared",
    [
        "Mode = Mode.short",
        "Plain = field(default_factory=Plain)",
        "Plain | None = None",
        "Bare = field(default_factory=lambda: Bare(size=1))",
        f"list[Plain] = {A_LIST}",
        "dict[str, list[float]] | None = None",
        "list[str] | str = ''",
        "typing.Any = None",
        "typing.Annotated[int | None, 'a rule'] = None",
    ],
)
def test_a_setting_that_a_recipe_can_hold_is_accepted(install: Install, declared: str) -> None:
    assert problem_of_setting(install, declared) == ""


SHOWS = COUNT.replace(IN_ONE_PROCESS, f"{IN_ONE_PROCESS}, outcome=Outcome(lines=show, tables=show, doubts=show)")
REMEDY = "correct the function and run the same command again; the results are complete and are kept"


def shows(body: str) -> str:
    """A package whose kind shows its results by a function in line 10, with this body."""
    head, kind = SHOWS.split("KIND = ")
    text = f"{head}def show(given):\n    {body}\nKIND = {kind}"
    assert text.splitlines()[9] == "def show(given):"
    return text


@pytest.mark.parametrize(
    ("body", "error", "line"),
    [
        ("return {}['words']", "KeyError: 'words'", 11),
        ("yield {}['words']", "KeyError: 'words'", 11),
        ("import json\n    return json.loads('{')", "JSONDecodeError: Expecting property name", 12),
        ("return None", "TypeError: 'NoneType' object is not iterable", 10),
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
        assert first.startswith(f"Outcome.{name} fails with {error}")
        assert second == f"  {tmp_path}/counting/counting.py, line {line}"
        assert (caught.value.remedy, caught.value.exit_code) == (REMEDY, 1)


def shows_table(table: str) -> str:
    """A package whose kind returns a list with this table."""
    return shows(f"from alignment.stages.base import Cell, ResultTable\n    return [{table}]")


def table_of(rows: str) -> str:
    """A table with one column and these rows."""
    return f"ResultTable(title='t', note='', columns={{'n': 'n'}}, rows={rows})"


@pytest.mark.parametrize(
    "table",
    ["'words'", "{}", *map(table_of, ("[('a', [])]", "[('a', ['3'])]", "['abc']", "3"))],
)
def test_a_table_of_another_form_is_refused(install: Install, tmp_path: Path, table: str) -> None:
    install("counting", "count = counting:KIND", shows_table(table))
    with pytest.raises(KindError, match="not a list of ResultTable with a Cell for each column"):
        registry.tables_of("count", tmp_path)


def test_a_table_of_the_right_form_is_shown(install: Install, tmp_path: Path) -> None:
    install("counting", "count = counting:KIND", shows_table(table_of("[('a', [Cell(text='3')])]")))
    (shown,) = registry.tables_of("count", tmp_path)
    assert shown.title == "t"


def test_a_missing_file_is_a_fault_of_the_function_only_if_the_result_is_complete(
    install: Install, tmp_path: Path
) -> None:
    install("counting", "count = counting:KIND", shows("return [(given / 'wrods.json').read_text()]"))
    artifact = tmp_path / "artifact"
    with pytest.raises(FileNotFoundError):
        registry.tables_of("count", artifact)
    (tmp_path / "content").mkdir()
    (tmp_path / "content/words.json").touch()
    publish(tmp_path / "content", artifact, Manifest(stage="count", kind="count", fingerprint="01", identity={}))
    with pytest.raises(KindError, match=r"Outcome\.tables fails with FileNotFoundError"):
        registry.tables_of("count", artifact)


def test_an_error_that_the_function_words_itself_is_passed_on(install: Install, tmp_path: Path) -> None:
    body = "from alignment.core.errors import ArtifactError\n    raise ArtifactError('is damaged')"
    install("counting", "count = counting:KIND", shows(body))
    for called in (registry.lines_of, registry.tables_of):
        with pytest.raises(ArtifactError, match="is damaged"):
            called("count", tmp_path)


@pytest.mark.parametrize("name", sorted(registry.kinds()))
def test_only_the_report_would_be_refused_from_another_package(name: str) -> None:
    problem = kind_problems.of_kind(registry.kinds()[name])
    assert problem.partition(",")[0] == ("runs inside the driver" if name == "report" else "")


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
