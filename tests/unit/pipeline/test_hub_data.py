"""Data sets of a hub in a plan and a run: nothing is downloaded before a run starts, and a commit is what counts."""

from __future__ import annotations

import errno
import json
import shutil
from io import StringIO
from pathlib import Path

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
from alignment.pipeline.execute.summary import show_plan
from alignment.pipeline.plan.plan import Plan, PlannedStage
from alignment.pipeline.sources import data_sources, model_sources
from alignment.pipeline.sources.data_sources import DataSource
from tests.hub import COMMIT, NAME, answer, leave_data_set, refusal, use_cache
from tests.unit.pipeline.conftest import ROWS, MakePlan
from tests.unit.pipeline.test_run import fake

SOURCE = "stages.sft.data.source=hub:org/name@v1"
LINE = json.dumps(ROWS["conversations"]) + "\n"
FILES = {"data/train.jsonl": LINE * 2, "data/test.jsonl": LINE}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder below which a hub's cache lies."""
    use_cache(monkeypatch, tmp_path)
    return tmp_path


def sft(plan: Plan) -> PlannedStage:
    return next(stage for stage in plan.stages if stage.name == "sft")


def shown(plan: Plan) -> str:
    screen = StringIO()
    show_plan(Console(file=screen, width=60), plan)
    return screen.getvalue()


def test_what_is_not_here_is_planned_by_its_revision_and_nothing_is_downloaded(
    plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answer(monkeypatch, AssertionError("a plan downloads nothing"))
    planned = plan(SOURCE)
    assert (sft(planned).data, sft(planned).identity["data"]) == (None, "hub:org/name@v1")
    assert "sft reads hub:org/name@v1, which the run will download\n" in shown(planned)
    assert [(call["repository"], call["repo_type"], call["revision"]) for call in asked] == [
        ("org/name", "dataset", "v1")
    ]
    assert sft(plan("stages.sft.data.source=hub:org/name")).identity["data"] == "hub:org/name@main"
    mixed = plan("stages.sft.data.mix=[{source: 'hub:org/name', count: 1}]")
    assert sft(mixed).extra_data == {}
    assert sft(mixed).identity["extra_data"] == {"data.mix[0]": "hub:org/name@main"}


def test_what_is_here_is_planned_by_its_commit_and_its_rows_are_checked(plan: MakePlan, cache: Path) -> None:
    folder = leave_data_set(cache, FILES, revision="v1")
    planned = plan(SOURCE)
    assert (sft(planned).data, sft(planned).identity["data"]) == (folder, NAME)
    assert f"sft reads {NAME}\n" in shown(planned)
    (folder / "data/train.jsonl").write_text(LINE + '{"messages": []}\n')
    with pytest.raises(DataError, match=rf"{NAME} train: row 2: 'messages' must be a list"):
        plan(SOURCE)
    plan(SOURCE, "stages.sft.data.split=test")
    with pytest.raises(DataError, match=r"has no split 'dev'; it has (train, test|test, train)\n  → choose one with"):
        plan(SOURCE, "stages.sft.data.split=dev")


def test_split_and_subset_count_and_are_refused_where_nothing_reads_them(plan: MakePlan, cache: Path) -> None:
    leave_data_set(cache, FILES, revision="v1")
    fingerprints = [sft(plan(SOURCE, *more)).fingerprint for more in ((), ("stages.sft.data.split=test",))]
    assert fingerprints[0] != fingerprints[1]
    assert sft(plan(SOURCE, "stages.sft.data.subset=default")).fingerprint not in fingerprints
    for more, setting in (("split=test", "split: 'test'"), ("subset=a", "subset: 'a'")):
        with pytest.raises(ConfigError, match=rf"stages\.sft\.data\.{setting} has no effect; only a hub's data set"):
            plan(f"stages.sft.data.{more}")
    with pytest.raises(ConfigError, match=r"stages\.sft\.data\.split: '' is not allowed"):
        plan(SOURCE, "stages.sft.data.split=''")
    with pytest.raises(DataError, match=r"stages\.sft\.data\.source: 'hub:name' does not name a data set"):
        plan("stages.sft.data.source=hub:name")


def test_a_run_says_that_it_downloads_and_tells_the_worker_where_the_snapshot_is(
    overrides: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:

        def download() -> Path:
            patched.undo()  # asked again, the client itself finds what the download has left
            return leave_data_set(cache, FILES, revision="v1")

        answer(patched, download)
        screen = StringIO()
        arguments = [*overrides, SOURCE, "stages.sft.data.split=test"]
        assert run("quickstart", arguments, console=Console(file=screen, width=200), command_for=fake) == 0
    assert "downloading the data set org/name@v1 from its hub" in screen.getvalue()
    stage = yaml.safe_load((cache / "out/runs/quickstart/sft/stage.yaml").read_text())
    assert stage["data_path"].endswith(f"datasets--org--name/snapshots/{COMMIT}")
    assert stage["identity"]["data"] == NAME
    assert (stage["config"]["data"]["split"], stage["config"]["data"]["subset"]) == ("test", None)

    again = StringIO()
    assert run("quickstart", arguments, console=Console(file=again, width=200), command_for=fake) == 0
    assert "downloading" not in again.getvalue()


def test_an_input_made_from_a_branch_that_is_no_longer_here_does_not_count_as_missing(
    overrides: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name has the branch's commit, which the plan does not know."""
    leave_data_set(cache, FILES, revision="v1")
    arguments = [*overrides, SOURCE]
    assert run("quickstart", arguments, console=Console(file=StringIO()), only="sft", command_for=fake) == 0
    shutil.rmtree(cache / "hub")
    with monkeypatch.context() as patched:

        def download() -> Path:
            patched.undo()
            return leave_data_set(cache, FILES, revision="v1")

        answer(patched, download)
        screen = StringIO()
        console = Console(file=screen, width=200)
        assert run("quickstart", arguments, console=console, only="dpo", command_for=fake) == 0
    assert "downloading the data set org/name@v1 from its hub" in screen.getvalue()
    with pytest.raises(ConfigError, match="ppo needs the result of reward, which does not exist"):
        run("quickstart", arguments, console=Console(file=StringIO()), only="ppo", command_for=fake)


def test_nothing_is_downloaded_for_a_stage_whose_inputs_cannot_be_here(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, AssertionError("nothing has to be downloaded"))
    with pytest.raises(ConfigError, match="dpo needs the result of sft, which does not exist"):
        run("quickstart", [*overrides, SOURCE], console=Console(file=StringIO()), only="dpo", command_for=fake)


REFUSED = [
    (
        refusal(GatedRepoError),
        "is gated: 403 Client Error.\n  → ask for access on its page, then log in (hf auth login",
    ),
    (
        refusal(RepositoryNotFoundError),
        "does not exist, or is private: 403 Client Error.\n  → check ORG/NAME; for a private",
    ),
    (refusal(RevisionNotFoundError), "has no revision 'v1': 403 Client Error.\n  → name a branch, a tag or a commit"),
    (
        LocalEntryNotFoundError("Got: ConnectError\nmore"),
        "is not on this machine, and its hub cannot be reached: Got: ",
    ),
    (TimeoutError("timed out"), "cannot be downloaded: timed out\n  → try again; or give path:FOLDER"),
]


def test_a_full_disk_is_no_fault_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    for sources in (data_sources, model_sources):
        with pytest.raises(DiskError, match="full"):
            sources.fetch(sources.resolve("hub:org/name@v1", where="x"), announce=lambda _: None)


@pytest.mark.parametrize(("error", "message"), REFUSED, ids=[message[:20] for _, message in REFUSED])
def test_what_cannot_be_had_is_an_error_that_says_why_and_what_to_do(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, error)
    with pytest.raises(DataError) as caught:
        data_sources.fetch(data_sources.resolve("hub:org/name@v1", where="x"), announce=lambda _: None)
    assert str(caught.value).startswith(f"hub:org/name@v1: {message}")
    assert str(caught.value).endswith("or give path:FOLDER")
    with pytest.raises(ModelError) as of_model:
        model_sources.fetch(model_sources.resolve("hub:org/name@v1", where="x"), announce=lambda _: None)
    assert str(of_model.value) == str(caught.value)


def test_a_name_that_no_repository_can_have_is_refused_while_planning(plan: MakePlan) -> None:
    with pytest.raises(DataError, match=r"hub:org/a--b@main: is not a valid name of a repository: "):
        plan("stages.sft.data.source=hub:org/a--b")


def test_a_snapshot_that_lacks_files_is_fetched_before_it_is_read(plan: MakePlan, cache: Path) -> None:
    leave_data_set(cache, FILES, revision="v1", listed=("data/train-2.jsonl",))
    assert sft(plan(SOURCE)).data is None


def test_files_that_are_no_data_may_be_absent(plan: MakePlan, cache: Path) -> None:
    folder = leave_data_set(cache, FILES, revision="v1", listed=("weights.bin", "name.py"))
    assert sft(plan(SOURCE)).data == folder


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


def test_the_doctor_explains_a_split_of_a_data_set(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave_data_set(cache, FILES)
    assert cli.main(["doctor", "hub:org/name", "--split", "test"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{NAME}: 1 row\n")
    assert f"to use it    stages.sft.data.source={NAME} stages.sft.data.split=test\n" in printed
    assert cli.main(["doctor", "hub:org/name", "--subset", "x"]) == 3
    assert "has no subset 'x'; it has default" in capsys.readouterr().err
    assert cli.main(["doctor", "bundled:quickstart/heldout", "--split", "test"]) == 2
    assert "DATA.split: 'test' has no effect" in capsys.readouterr().err


def test_the_doctor_compares_with_the_split_that_is_named(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = "Who has the keys of the library when it is closed on a Monday in winter?"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": asked}) + "\n")
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "The caretaker."}]
    leave_data_set(cache, {"data/train.jsonl": LINE, "data/test.jsonl": json.dumps({"messages": turns}) + "\n"})
    doctor = ["doctor", str(tmp_path / "rows.jsonl"), "--against", "hub:org/name"]
    assert cli.main(doctor) == 0
    assert "overlap      no row resembles a prompt of hub:org/name, split train\n" in capsys.readouterr().out
    assert cli.main([*doctor, "--against-split", "test"]) == 0
    printed = capsys.readouterr().out
    assert "overlap      1 row resembles a prompt of hub:org/name, split test\n" in printed
    assert "rows.jsonl:1 has 100% of " in printed
    assert cli.main(["doctor", str(tmp_path / "rows.jsonl"), "--against-split", "test"]) == 2
    assert "--against-split: has no effect without --against" in capsys.readouterr().err
    bundled = [*doctor[:-1], "bundled:quickstart/heldout", "--against-split", "test"]
    assert cli.main(bundled) == 2
    assert "--against.split: 'test' has no effect; only a hub's data set has a split" in capsys.readouterr().err
