"""Data sets of a hub in a plan and a run: nothing is downloaded before a run starts, and a commit is what counts."""

from __future__ import annotations

import errno
import json
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from rich.console import Console

from alignment import cli
from alignment.core.errors import ConfigError, DataError, DiskError, ModelError
from alignment.pipeline.execute.run import run
from alignment.pipeline.sources import data_sources, model_sources
from alignment.pipeline.sources.data_sources import DataSource
from tests.hub import COMMIT, NAME, answer, leave_data_set, refusal, use_cache
from tests.unit.pipeline.conftest import ROWS, MakePlan, screened, stage_of
from tests.unit.pipeline.test_run import fake

SOURCE = "stages.sft.data.source=hub:org/name@v1"
LINE = json.dumps(ROWS["conversations"]) + "\n"
FILES = {"data/train.jsonl": LINE * 2, "data/test.jsonl": LINE}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder below which a hub's cache lies."""
    use_cache(monkeypatch, tmp_path)
    return tmp_path


@pytest.fixture
def sft(plan: MakePlan) -> Any:
    """Plans the stage with more overrides."""
    return lambda *overrides: stage_of(plan(*overrides), "sft")


def test_what_is_not_here_is_planned_by_its_revision_and_nothing_is_downloaded(
    plan: MakePlan, sft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answer(monkeypatch, AssertionError("a plan downloads nothing"))
    planned = plan(SOURCE)
    stage = stage_of(planned, "sft")
    assert (stage.data, stage.identity["data"]) == (None, "hub:org/name@v1")
    assert "sft reads hub:org/name@v1, which the run will download" in screened(planned, width=60)
    calls = [(call["repository"], call["repo_type"], call["revision"]) for call in asked]
    assert calls == [("org/name", "dataset", "v1")]
    assert sft("stages.sft.data.source=hub:org/name").identity["data"] == "hub:org/name@main"
    mixed = sft("stages.sft.data.mix=[{source: 'hub:org/name', count: 1}]")
    assert (mixed.extra_data, mixed.identity["extra_data"]) == ({}, {"data.mix[0]": "hub:org/name@main"})


def test_what_is_here_is_planned_by_its_commit_and_its_rows_are_checked(plan: MakePlan, cache: Path) -> None:
    folder = leave_data_set(cache, FILES, revision="v1")
    planned = plan(SOURCE)
    stage = stage_of(planned, "sft")
    assert (stage.data, stage.identity["data"]) == (folder, NAME)
    assert f"sft reads {NAME}" in screened(planned)
    others = [stage_of(plan(SOURCE, f"stages.sft.data.{more}"), "sft") for more in ("split=test", "subset=default")]
    assert len({each.fingerprint for each in (stage, *others)}) == 3
    (folder / "data/train.jsonl").write_text(LINE + '{"messages": []}\n')
    with pytest.raises(DataError, match=r"hub:org/a--b@main: is not a valid name of a repository: "):
        plan("stages.sft.data.source=hub:org/a--b")
    with pytest.raises(DataError, match=rf"{NAME} train: row 2: 'messages' must be a list"):
        plan(SOURCE)
    plan(SOURCE, "stages.sft.data.split=test")
    with pytest.raises(DataError, match=r"has no split 'dev'; it has (train, test|test, train)\n  → choose one with"):
        plan(SOURCE, "stages.sft.data.split=dev")


@pytest.mark.parametrize(("listed", "is_here"), [(("data/train-2.jsonl",), False), (("weights.bin", "name.py"), True)])
def test_a_snapshot_that_lacks_files_of_data_is_fetched_before_it_is_read(
    sft: Any, cache: Path, listed: tuple[str, ...], is_here: bool
) -> None:
    folder = leave_data_set(cache, FILES, revision="v1", listed=listed)
    assert sft(SOURCE).data == (folder if is_here else None)


# ---- downloads ------------------------------------------------------------------------------------------------------


@pytest.fixture
def downloads(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs while the hub answers with the data set; returns what was printed."""

    def downloaded(overrides: list[str], *more: str, only: str | None = None) -> str:
        with monkeypatch.context() as patched:

            def download() -> Path:
                patched.undo()  # asked again, the client itself finds what the download has left
                return leave_data_set(cache, FILES, revision="v1")

            answer(patched, download)
            screen = StringIO()
            console = Console(file=screen, width=200)
            assert run("quickstart", [*overrides, *more], console=console, only=only, command_for=fake) == 0
        return screen.getvalue()

    return downloaded


DOWNLOADING = "downloading the data set org/name@v1 from its hub"


def test_a_run_says_that_it_downloads_and_tells_the_worker_where_the_snapshot_is(
    overrides: list[str], cache: Path, downloads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = "stages.sft.data.split=test"
    assert DOWNLOADING in downloads(overrides, SOURCE, split, only="sft")
    stage = yaml.safe_load((cache / "out/runs/quickstart/sft/stage.yaml").read_text())
    assert stage["data_path"].endswith(f"datasets--org--name/snapshots/{COMMIT}")
    assert stage["identity"]["data"] == NAME
    assert (stage["config"]["data"]["split"], stage["config"]["data"]["subset"]) == ("test", None)
    again = StringIO()
    console = Console(file=again, width=200)
    assert run("quickstart", [*overrides, SOURCE, split], console=console, only="sft", command_for=fake) == 0
    assert "downloading" not in again.getvalue()


def test_an_input_made_from_a_branch_that_is_no_longer_here_does_not_count_as_missing(
    overrides: list[str], cache: Path, downloads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name has the branch's commit, which the plan does not know."""
    console = Console(file=StringIO())
    with monkeypatch.context() as patched:
        answer(patched, AssertionError("nothing has to be downloaded for a stage whose inputs cannot be here"))
        with pytest.raises(ConfigError, match="dpo needs the result of sft, which does not exist"):
            run("quickstart", [*overrides, SOURCE], console=console, only="dpo", command_for=fake)
    downloads(overrides, SOURCE, only="sft")
    shutil.rmtree(cache / "hub")
    assert DOWNLOADING in downloads(overrides, SOURCE, only="dpo")
    with pytest.raises(ConfigError, match="ppo needs the result of reward, which does not exist"):
        run("quickstart", [*overrides, SOURCE], console=console, only="ppo", command_for=fake)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (refusal(GatedRepoError), "is gated: 403 Client Error.\n  → ask for access on its page, then log in"),
        (refusal(RepositoryNotFoundError), "does not exist, or is private: 403 Client Error.\n  → check ORG/NAME;"),
        (refusal(RevisionNotFoundError), "has no revision 'v1': 403 Client Error.\n  → name a branch"),
        (LocalEntryNotFoundError("Got: ConnectError\nmore"), "is not on this machine, and its hub cannot be reached"),
        (TimeoutError("timed out"), "cannot be downloaded: timed out\n  → try again"),
        (OSError(errno.ENOSPC, "No space left on device"), ""),
    ],
    ids=["gated", "missing", "revision", "away", "slow", "full"],
)
def test_what_cannot_be_had_is_an_error_that_says_why_and_what_to_do(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is no fault of the hub."""
    answer(monkeypatch, error)
    for sources, kind in ((data_sources, DataError), (model_sources, ModelError)):
        with pytest.raises(kind if words else DiskError) as caught:
            sources.fetch(sources.resolve("hub:org/name@v1", where="x"), announce=lambda _: None)
        if words:
            assert str(caught.value).startswith(f"hub:org/name@v1: {words}")
            assert str(caught.value).endswith("or give path:FOLDER")


def test_a_snapshot_of_which_nobody_knows_whether_it_is_complete_is_completed_or_told(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = leave_data_set(cache, FILES, listed=None)
    source = data_sources.resolve("hub:org/name", where="x")
    assert source == DataSource(source="hub:org/name", identity=NAME, path=folder, complete=False)
    announcements: list[str] = []
    answer(monkeypatch, lambda: folder)
    assert data_sources.fetch(source, announce=announcements.append) == source
    assert announcements[0] == "downloading the data set org/name from its hub"
    assert announcements[1] == f"{NAME}: its hub cannot be reached, so some of its files may be missing here"
    answer(monkeypatch, lambda: leave_data_set(cache, FILES))
    assert data_sources.fetch(source, announce=announcements.append).complete
    assert len(announcements) == 3


# ---- the doctor -----------------------------------------------------------------------------------------------------


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Any:
    """The exit code of ``align doctor``, and what it printed."""

    def asked(*words: str) -> tuple[int, str]:
        code, output = cli.main(["doctor", *words]), capsys.readouterr()
        return code, output.out + output.err

    return asked


def test_the_doctor_explains_a_split_of_a_data_set(cache: Path, doctor: Any) -> None:
    leave_data_set(cache, FILES)
    code, printed = doctor("hub:org/name", "--split", "test")
    assert (code, printed.partition("\n")[0]) == (0, f"{NAME}: 1 row")
    assert f"to use it    stages.sft.data.source={NAME} stages.sft.data.split=test\n" in printed
    for words, refused, message in (
        (("hub:org/name", "--subset", "x"), 3, "has no subset 'x'; it has default"),
        (("bundled:quickstart/heldout", "--split", "test"), 2, "DATA.split: 'test' has no effect"),
    ):
        code, printed = doctor(*words)
        assert (code, message in printed) == (refused, True)
