"""A run with a store: plans, results and refusals, with the worker of the tests of the driver."""

from __future__ import annotations

import shutil
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from alignment.commands.status import show_status
from alignment.core.errors import ArtifactError, Busy, ConfigError, DiskError
from alignment.core.locks import held
from alignment.pipeline.execute import exchange
from alignment.pipeline.execute.run import run
from alignment.pipeline.plan.actions import Action
from alignment.pipeline.plan.plan import Plan, make_plan
from alignment.pipeline.remote import checkpoint_uploads, lease
from alignment.pipeline.remote.object_store import connected
from tests.patience import wait_until
from tests.unit.pipeline.conftest import leave_artifact
from tests.unit.pipeline.remote.conftest import sealed
from tests.unit.pipeline.test_run import STAGES, fake


class Machine:
    """``align`` in a folder of its own, on a store."""

    def __init__(self, overrides: list[str], output: Path, url: str) -> None:
        self.output = output
        self.overrides = [*overrides[1:], f"output={output}", f"artifacts={url}"]

    def plan(self, *more: str) -> Plan:
        return make_plan("quickstart", [*self.overrides, *more])

    def actions(self, *more: str) -> dict[str, str]:
        return {stage.name: stage.action.value for stage in self.plan(*more).stages}

    def run(self, *more: str, only: str | None = None) -> str:
        screen = StringIO()
        console = Console(file=screen, width=200)
        assert run("quickstart", [*self.overrides, *more], console=console, only=only, command_for=fake) == 0
        return screen.getvalue()

    def status(self) -> str:
        screen = StringIO()
        show_status(Console(file=screen, width=200), self.output, "quickstart")
        return screen.getvalue()


@pytest.fixture
def machines(overrides: list[str], tmp_path: Path, url: str) -> tuple[Machine, Machine]:
    return Machine(overrides, tmp_path / "first", url), Machine(overrides, tmp_path / "second", url)


def test_a_second_machine_takes_what_the_first_has_made(machines: tuple[Machine, Machine], url: str) -> None:
    first, second = machines
    first.run()
    assert sorted(key.split("/")[0] for key in connected(url).sizes("") if not key.startswith("artifacts/")) == []
    assert first.actions() == dict.fromkeys(STAGES, "reuse")
    assert second.actions() == dict.fromkeys(STAGES, "fetch")
    assert all(stage.reason.endswith("from the store") for stage in second.plan().stages)
    assert not second.output.exists()
    printed = second.run()
    assert "sft: downloading sft-" in printed
    status = second.status()
    assert status.count("reused") == len(STAGES)
    assert f"store: {url}" in status
    manifests = [sorted(machine.output.glob("artifacts/*/manifest.json")) for machine in machines]
    for ours, copied in zip(*manifests, strict=True):
        assert ours.read_bytes() == copied.read_bytes()
    assert (second.output / "runs/quickstart/report.html").stat().st_size > 1000


def test_one_stage_takes_its_inputs_from_the_store(machines: tuple[Machine, Machine]) -> None:
    first, second = machines
    first.run(only="sft")
    second.run(only="dpo")
    assert [folder.name.partition("-")[0] for folder in sorted((second.output / "artifacts").glob("*-*"))] == [
        "dpo",
        "sft",
    ]
    assert first.actions()["dpo"] == "fetch"


def test_checkpoints_stay_if_the_result_has_gone_from_the_store_since_the_plan(
    machines: tuple[Machine, Machine], url: str
) -> None:
    """A run may wait for hours between its plan and its first stage."""
    first, second = machines
    first.run(only="sft")
    plan, store = second.plan(), connected(url)
    sft = plan.stages[0]
    assert sft.action is Action.fetch
    checkpoint = sealed(sft.work, 20)
    for key in store.sizes(f"artifacts/{sft.artifact.name}"):
        store.delete(key)
    again = exchange.with_results(plan, lambda _: None, stages=[sft], wait=False)
    assert (checkpoint / "weights").read_text() == "weights 20"
    assert (again.stages[0].action, again.stages[0].reason) == (Action.resume, "from checkpoint-20")


def test_a_result_of_the_store_that_another_process_makes_here_is_not_waited_for(
    machines: tuple[Machine, Machine],
) -> None:
    """Only with ``--wait``; the other process may train for hours without the store."""
    first, second = machines
    first.run(only="sft")
    sft = second.plan().stages[0]
    with held(sft.work / "lock", wait=False), pytest.raises(Busy) as caught:
        second.run(only="sft")
    assert caught.value.where == str(sft.work)
    assert caught.value.remedy is not None
    assert caught.value.remedy.startswith("wait for it with --wait, or stop it")


def test_what_was_made_without_the_store_is_uploaded_later(machines: tuple[Machine, Machine], url: str) -> None:
    first, second = machines
    first.overrides.remove(f"artifacts={url}")
    first.run()
    first.overrides.append(f"artifacts={url}")
    assert "here; a run will upload it" in first.plan().stages[0].reason
    assert set(second.actions().values()) == {"run"}
    first.run()
    assert set(second.actions().values()) == {"fetch"}
    assert "here and in the store" in first.plan().stages[0].reason


def test_checkpoints_of_a_call_that_was_cut_off_are_removed_with_the_late_upload(
    machines: tuple[Machine, Machine], url: str
) -> None:
    """It had made the result here, and the store was away when it was to be uploaded."""
    first, _ = machines
    first.overrides.remove(f"artifacts={url}")
    first.run()
    first.overrides.append(f"artifacts={url}")
    store, (sft, *_) = connected(url), first.plan().stages
    store.write(f"checkpoints/{sft.fingerprint}/00000020-000000.json", b"{}")
    first.run()
    assert [key for key in store.sizes("") if not key.startswith("artifacts/")] == []


def test_a_machine_that_has_lost_its_lease_leaves_what_the_other_machine_has(
    machines: tuple[Machine, Machine], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.02)
    monkeypatch.setattr(checkpoint_uploads, "_LOOK_SECONDS", 0.02)
    plan = machines[0].plan()
    store, sft, announcements = connected(url), plan.stages[0], list[str]()
    leave_artifact(sft)
    sft.work.mkdir()  # as by the caller, who holds the lock in it
    folder = f"checkpoints/{sft.fingerprint}"
    of_the_other = {
        f"{folder}/lease.json": b'{"owner": "another", "host": "b", "process": 7}',
        f"{folder}/00000020-000000.json": b"{}",
    }
    with exchange.of_stage(plan, sft, announcements.append, wait=False) as makes_it:
        assert makes_it
        for key, content in of_the_other.items():
            store.write(key, content)
        wait_until(lambda: announcements)
    assert announcements[0].startswith("sft: another machine has taken over the stage")
    assert {key: store.read(key) for key in of_the_other} == of_the_other


def test_checkpoints_beside_a_result_of_another_machine_are_removed_with_its_download(
    machines: tuple[Machine, Machine], url: str
) -> None:
    """That machine was cut off between the upload of its result and the end of its checkpoints."""
    first, second = machines
    plan = second.plan()
    first.run()
    store, sft = connected(url), plan.stages[0]
    sft.work.mkdir(parents=True)  # as by the caller, who holds the lock in it
    store.write(f"checkpoints/{sft.fingerprint}/00000020-000000.json", b"{}")
    with exchange.of_stage(plan, sft, lambda text: None, wait=False) as makes_it:
        assert not makes_it
    assert [key for key in store.sizes("") if not key.startswith("artifacts/")] == []


def test_without_its_manifest_a_result_does_not_count(machines: tuple[Machine, Machine], url: str) -> None:
    first, second = machines
    first.run()
    store = connected(url)
    (manifest,) = (key for key in store.sizes("artifacts") if "sft-" in key and key.endswith("manifest.json"))
    store.delete(manifest)
    assert second.actions()["sft"] == "run"
    assert second.actions()["dpo"] == "fetch"


def test_a_damaged_result_is_refused_and_never_counts(machines: tuple[Machine, Machine], url: str) -> None:
    first, second = machines
    first.run()
    store = connected(url)
    file = next(key for key in store.sizes("artifacts") if "sft-" in key and "metrics.jsonl" in key)
    content = store.read(file)
    assert content is not None
    store.write(file, content.replace(b"1.5", b"1.6"))
    with pytest.raises(ArtifactError, match="its content differs from its list") as refused:
        second.run()
    assert file in str(refused.value)
    assert not list(second.output.glob("artifacts/sft-????????"))
    store.delete(file)
    with pytest.raises(ArtifactError, match="missing in the store"):
        second.run()
    store.write(file, content)
    (work,) = second.output.glob("artifacts/sft-*.work")
    (work / "download" / ".metrics.jsonl.0123.tmp").write_text("half")
    second.run()
    (artifact,) = second.output.glob("artifacts/sft-????????")
    assert {path.name for path in artifact.iterdir()} == {"manifest.json", "metrics.jsonl"}


def test_a_result_that_does_not_fit_on_the_disk_is_refused_before_the_download(
    machines: tuple[Machine, Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = machines
    first.run()
    usage = shutil.disk_usage(first.output)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskError, match="must be downloaded, but only 10 bytes are free") as refused:
        second.run()
    assert refused.value.exit_code == 12
    assert not list(second.output.glob("artifacts/*/manifest.json"))


@pytest.mark.parametrize("url", ["s3://KEY:hunter2@bucket/x", "'s3://bucket/x?key=hunter2'", "bucket/hunter2", "s3://"])
def test_an_address_with_credentials_or_without_a_scheme_is_refused(overrides: list[str], url: str) -> None:
    with pytest.raises(ConfigError, match="s3://BUCKET/PREFIX, without a key or a password in it") as refused:
        make_plan("quickstart", [*overrides, f"artifacts={url}"])
    assert "hunter2" not in str(refused.value)


def test_the_store_is_no_part_of_what_was_asked_for(machines: tuple[Machine, Machine], url: str) -> None:
    with_store = machines[0].plan()
    machines[0].overrides.remove(f"artifacts={url}")
    assert [stage.fingerprint for stage in with_store.stages] == [
        stage.fingerprint for stage in machines[0].plan().stages
    ]
