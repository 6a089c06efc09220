"""A run with a store: plans, results and refusals, with the worker of the tests of the driver; and a store's errors."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from alignment.core.errors import AlignmentError, ArtifactError, ConfigError, DiskError, StoreError
from alignment.pipeline.execute import exchange
from alignment.pipeline.plan.actions import Action
from alignment.pipeline.plan.plan import Plan, make_plan
from alignment.pipeline.remote import lease, remote_checkpoints
from alignment.pipeline.remote.object_store import ObjectStore, connected, explained, refuse_secret_endpoint
from tests.living import wait_until
from tests.unit.pipeline.conftest import changed, leave_all, leave_artifact, printed_by_run, status_of
from tests.unit.pipeline.remote.conftest import sealed
from tests.unit.pipeline.test_run import STAGES, fake


class Machine:
    """``align`` in a folder of its own, on a store."""

    def __init__(self, overrides: list[str], output: Path, url: str) -> None:
        self.output = output
        self.url = url
        self.overrides = [*overrides[1:], f"output={output}"]

    def plan(self, *, stored: bool = True) -> Plan:
        return make_plan("quickstart", [*self.overrides, *[f"artifacts={self.url}"] * stored])

    def actions(self) -> dict[str, str]:
        return {stage.name: stage.action.value for stage in self.plan().stages}

    def run(self, *, only: str | None = None) -> str:
        return printed_by_run([*self.overrides, f"artifacts={self.url}"], only=only, command_for=fake)

    def leave_all(self) -> None:
        leave_all(self.plan(stored=False))


@pytest.fixture
def machines(overrides: list[str], tmp_path: Path, url: str) -> tuple[Machine, Machine]:
    return Machine(overrides, tmp_path / "first", url), Machine(overrides, tmp_path / "second", url)


@pytest.fixture
def without_report(machines: tuple[Machine, Machine]) -> tuple[Machine, Machine]:
    for machine in machines:
        machine.overrides += ["~stages.report", "~stages.evaluate_sft"]
    return machines


def beside_artifacts(url: str) -> list[str]:
    return [key for key in connected(url).sizes("") if not key.startswith("artifacts/")]


def test_a_second_machine_takes_what_the_first_has_made(machines: tuple[Machine, Machine], url: str) -> None:
    first, second = machines
    first.run()
    assert beside_artifacts(url) == []
    assert first.actions() == dict.fromkeys(STAGES, "reuse")
    assert second.actions() == dict.fromkeys(STAGES, "fetch")
    assert all(stage.reason.endswith("from the store") for stage in second.plan().stages)
    assert not second.output.exists()
    assert "sft: downloading sft-" in second.run()
    status = status_of(second.output)
    assert (status.count("reused"), f"store: {url}" in status) == (len(STAGES), True)
    manifests = [sorted(machine.output.glob("artifacts/*/manifest.json")) for machine in machines]
    for ours, copied in zip(*manifests, strict=True):
        assert ours.read_bytes() == copied.read_bytes()
    assert (second.output / "runs/quickstart/report.html").stat().st_size > 1000
    assert changed(second.plan(), second.plan(stored=False)) == [], "the store is no part of what was asked for"


def test_checkpoints_stay_if_the_store_has_lost_the_result(machines: tuple[Machine, Machine], url: str) -> None:
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


def test_what_was_made_without_the_store_is_uploaded_later(without_report: tuple[Machine, Machine], url: str) -> None:
    """Also of a call that was cut off: the store was away when its result was to be uploaded."""
    first, second = without_report
    first.leave_all()
    sft = first.plan().stages[0]
    connected(url).write(f"checkpoints/{sft.fingerprint}/00000020-000000.json", b"{}")
    assert "here; a run will upload it" in sft.reason
    assert set(second.actions().values()) == {"run"}
    first.run()
    assert beside_artifacts(url) == []
    assert set(second.actions().values()) == {"fetch"}
    assert "here and in the store" in first.plan().stages[0].reason


def test_a_machine_that_has_lost_its_lease_leaves_what_the_other_machine_has(
    machines: tuple[Machine, Machine], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.02)
    monkeypatch.setattr(remote_checkpoints, "_LOOK_SECONDS", 0.02)
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


def test_checkpoints_beside_another_machine_s_result_are_removed(machines: tuple[Machine, Machine], url: str) -> None:
    """That machine was cut off between the upload of its result and the end of its checkpoints."""
    first, second = machines
    plan = second.plan()
    first.run(only="sft")
    store, sft = connected(url), plan.stages[0]
    sft.work.mkdir(parents=True)  # as by the caller, who holds the lock in it
    store.write(f"checkpoints/{sft.fingerprint}/00000020-000000.json", b"{}")
    with exchange.of_stage(plan, sft, lambda text: None, wait=False) as makes_it:
        assert not makes_it
    assert beside_artifacts(url) == []


def test_a_damaged_result_is_refused_and_never_counts(
    without_report: tuple[Machine, Machine], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = without_report
    first.leave_all()
    first.run()
    with monkeypatch.context() as full:
        usage = shutil.disk_usage(first.output)._replace(free=10)
        full.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(DiskError, match="must be downloaded, but only 10 bytes are free"):
            second.run()
    store = connected(url)
    file = next(key for key in store.sizes("artifacts") if "sft-" in key and "metrics.jsonl" in key)
    content = store.read(file)
    assert content is not None
    store.write(file, content.replace(b"1}", b"2}"))
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
    second.run(only="sft")
    (artifact,) = second.output.glob("artifacts/sft-????????")
    assert {path.name for path in artifact.iterdir()} == {"manifest.json", "metrics.jsonl"}
    (manifest,) = (key for key in store.sizes("artifacts") if "dpo-" in key and key.endswith("manifest.json"))
    store.delete(manifest)
    assert (second.actions()["dpo"], second.actions()["ppo"]) == ("run", "fetch"), "without a manifest it is none"


class EndpointConnectionError(ConnectionError):
    """As botocore names it."""


class NoCredentialsError(Exception):
    """As botocore names it."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PermissionError("denied"), "it refused these credentials: denied"),
        (NoCredentialsError("none"), "no credentials for this store: none"),
        (FileNotFoundError("x"), "there is no such bucket"),
        (EndpointConnectionError("http://a"), "cannot be reached: http://a"),
        (OSError(errno.EBUSY, "slow down"), "it answered: [Errno 16] slow down"),
    ],
)
def test_each_kind_has_its_words(error: Exception, expected: str) -> None:
    with pytest.raises(StoreError, match="s3://b/p") as refused, explained("s3://b/p"):
        raise error
    assert (expected in str(refused.value), refused.value.exit_code) == (True, 11)
    assert refused.value.labelled.startswith("store: ")


def test_credentials_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
    with pytest.raises(StoreError) as refused, explained("s3://b/p"):
        raise OSError("http://user:pass@host/x" + " hunter2hunter2" * 100)
    assert "hun" not in str(refused.value), "not even its beginning, where the text is cut"
    assert "user" not in str(refused.value)
    assert refused.value.__cause__ is None
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:pass@host")
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL: the address contains a user name or a password"):
        refuse_secret_endpoint()


def test_an_unknown_kind_of_store_is_refused_and_a_bug_stays_what_it_is() -> None:
    with pytest.raises(AlignmentError, match="stores of the kind ftpx:// are not supported"):
        ObjectStore("ftpx://bucket/prefix")
    with pytest.raises(KeyError), explained("s3://b/p"):
        raise KeyError("x")
