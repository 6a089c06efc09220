"""Trackers: what they receive, one id a stage, nothing twice, and never the reason a training stops."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from alignment import worker
from alignment.config.model import AdapterConfig
from alignment.config.run import TrackingConfig
from alignment.config.typed import to_plain
from alignment.core.artifacts import Manifest, publish
from alignment.job import StageInput
from alignment.stages.dpo.kind import DpoConfig
from alignment.stages.evaluate.kind import EvaluateConfig
from alignment.stages.registry import config_classes
from alignment.stages.sft.kind import SftConfig
from alignment.training.context import StageContext
from alignment.training.trackers import mlflow
from alignment.training.trackers import wandb as wandb_tracker
from alignment.training.trackers.all_trackers import Trackers
from alignment.training.trackers.mlflow import NotSentError, Sender
from alignment.training.trackers.tracker import TOKEN, Row, Tracker, columns_and_rows, curves, settings, stable_id
from alignment.training.trackers.wandb import records
from tests.living import wait_until
from tests.tiny import tiny_spec
from tests.unit.training.read_back import curves_of
from tests.unit.training.tracked import STEPS, TRACKING, context_in, run_twice, tracking, train_line

AGENT = {"WANDB_SWEEP_ID": "5weep", "WANDB_RUN_ID": "tr1al", "WANDB_PROJECT": "tests", "WANDB_ENTITY": "us"}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ERROR_REPORTING", "WANDB_SILENT", "WANDB_DIR", *AGENT):
        monkeypatch.setenv(name, "")  # to be put back afterwards, whatever becomes of it
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    yield
    wandb.teardown()


def unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def history(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.rglob("*.wandb"))
    lines = [record.history for file in files for record in records(file) if record.HasField("history")]
    return [{"/".join(entry.nested_key): json.loads(entry.value_json) for entry in line.item} for line in lines]


def recorded(folder: Path, kind: str) -> list[Any]:
    (file,) = folder.rglob("*.wandb")
    return [getattr(record, kind) for record in records(file) if record.HasField(kind)]


def summary_of(folder: Path) -> dict[str, Any]:
    lines = recorded(folder, "summary")
    return {entry.key: json.loads(entry.value_json) for line in lines for entry in line.update}


class _Server(Tracker):
    def __init__(self, *faults: Exception) -> None:
        self.stored: list[Any] = []
        self.faults = list(faults)
        self.open = threading.Event()
        self.open.set()

    def _store(self, *values: Any) -> None:
        self.open.wait()
        if self.faults:
            raise self.faults.pop(0)
        self.stored += values

    def log(self, rows: Sequence[Row]) -> None:
        self._store(*(row.step for row in rows))

    def table(self, name: str, columns: Any, rows: Any) -> None:
        self._store(name)

    def result(self, manifest: Any, folder: Path) -> None:
        self._store("result")

    def close(self, *, done: bool) -> None:
        self._store(f"done={done}")


def test_a_tracker_that_fails_is_named_once_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    trackers, broken, sound = Trackers(), _Server(ConnectionError("no route to host")), _Server()
    trackers._open = {"Broken": broken, "Sound": sound}
    with caplog.at_level(logging.WARNING):
        trackers.catch_up([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}])
        trackers.log(3, {"loss": 1.0})
        trackers.table("nothing", [])
        trackers.close(done=True)
    assert broken.stored == [], "it was called once"
    assert sound.stored == [1, 2, 3, "done=True"]
    assert [record.getMessage() for record in caplog.records] == trackers.faults
    (fault,) = trackers.faults
    assert fault.startswith("Broken failed")
    assert "no route to host" in fault


@pytest.mark.parametrize("raised", [None, KeyboardInterrupt])
def test_trackers_receive_whether_the_stage_came_to_its_end(
    context: StageContext, raised: type[BaseException] | None
) -> None:
    tracker = context.trackers._open["Server"] = _Server()
    with contextlib.suppress(KeyboardInterrupt), worker._tracked(context):
        if raised is not None:
            raise raised
    assert tracker.stored == [f"done={raised is None}"]


def test_what_lies_in_groups_becomes_columns() -> None:
    rows = [
        {"arm": "sft", "brevity": {"mean": 0.5, "low": 0.4}, "kl": None},
        {"arm": "dpo", "kl": {"mean": 2.0}, "n": [1]},
    ]
    assert columns_and_rows(rows) == (
        ["arm", "brevity/mean", "brevity/low", "kl", "kl/mean", "n"],
        [["sft", 0.5, 0.4, None, None, None], ["dpo", None, None, None, 2.0, "[1]"]],
    )


@pytest.mark.parametrize("kind", sorted(set(config_classes()) - {"report"}))
def test_settings_are_the_stage_s_and_what_stands_beside_hides_none(tmp_path: Path, kind: str) -> None:
    config = config_classes()[kind]()
    logged = settings(tiny_spec(tmp_path, config))
    assert logged == logged | to_plain(config)
    assert logged["fingerprint"] == "0123abcd" * 8


def test_a_curve_has_one_name_in_all_trackers_whatever_one_of_them_reserves_or_refuses() -> None:
    metrics = {
        "loss": 0.12345678,
        "step_time": 1,
        "time": 2.0,
        "run": 3.5,
        "_runtime": 3.0,
        "hit@1": 4.0,
        "note": "text",
    }
    assert curves({**metrics, "kl": {"mean": 5.0, "of": {"policy": 6}}, "none": None}) == {
        "loss": 0.123457,
        "step_time": 1.0,
        "metric/time": 2.0,
        "metric/run": 3.5,
        "metric/_runtime": 3.0,
        "hit_x40_1": 4.0,
        "kl/mean": 5.0,
        "kl/of/policy": 6.0,
    }


@pytest.mark.usefixtures("offline")
def test_with_folders_that_cannot_be_written_training_goes_on_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context = context_in(tmp_path)
    for name in ("wandb", "tensorboard"):
        (context.spec.run_folder / name).touch()
    with caplog.at_level(logging.WARNING, logger="alignment"), worker._tracked(context):
        train_line(context)
    lines = (context.content / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
    messages = [record.getMessage() for record in caplog.records]
    assert messages == context.trackers.faults
    assert [line.partition(" failed")[0] for line in messages] == ["Weights & Biases", "TensorBoard"]
    for name, line in zip(("wandb", "tensorboard"), messages, strict=True):
        assert str(context.spec.run_folder / name) in line


def test_a_stage_killed_twice_has_the_curves_of_one_that_was_not_in_every_tracker(tmp_path: Path) -> None:
    """Trackers on this machine; tests/trackers does the same with MLflow's server."""
    trackers = [name for name in ("wandb", "tensorboard", "trackio") if find_spec(name) is not None]
    expected, steps_of = run_twice(tmp_path, trackers), list(range(1, STEPS + 1))
    spec = context_in(tmp_path / "killed", tracking=tracking(trackers)).spec
    for name in trackers:
        stored = curves_of(name, spec)
        assert {point: len(values) for point, values in stored.items()} == dict.fromkeys(expected, 1), name
        assert {step for _, step in stored} == set(steps_of)
        for (key, step), (value,) in stored.items():
            if key != "seconds":  # no two runs take equally long
                assert value == pytest.approx(expected[key, step], rel=1e-6), (name, key, step)
    assert {file.stem for file in (spec.run_folder / "wandb").rglob("*.wandb")} == {f"run-{stable_id(spec)}"}
    assert len(list((spec.run_folder / "wandb").rglob("*.wandb"))) == 3


def test_the_id_is_the_same_for_a_stage_that_goes_on_in_its_folder_and_no_other(tmp_path: Path) -> None:
    """Two people may run the same recipe and track it in the same project."""
    spec, other = (tiny_spec(tmp_path / name, DpoConfig()) for name in ("mine", "theirs"))
    first = stable_id(spec)
    assert first == stable_id(replace(spec)), "a resume finds it"
    assert len(first) == 16
    assert len({first, stable_id(other), stable_id(replace(spec, fingerprint="b" * 64))}) == 3
    assert all(spec.work not in file.parents for file in tmp_path.rglob(TOKEN)), "no artifact takes it along"


def _published(folder: Path, manifest: Manifest) -> StageInput:
    content, target = folder / "content", folder / "artifacts" / f"{manifest.stage}-{manifest.fingerprint[:8]}"
    content.mkdir(exist_ok=True)
    (content / "model.safetensors").write_text("weights")
    publish(content, target, manifest)
    return StageInput(ref=f"stage:{manifest.stage}", path=target)


def _tracked_dpo(folder: Path) -> StageContext:
    sft = Manifest(stage="sft", kind="policy", fingerprint="5f" * 32, identity={})
    config = DpoConfig(beta=0.3, adapter=AdapterConfig(rank=4))
    spec = tiny_spec(folder, config, tracking=TRACKING, inputs={"init": _published(folder, sft)})
    context = StageContext(spec=spec, rank=0, world_size=1)
    dpo = Manifest(
        stage="dpo",
        kind="policy",
        fingerprint=spec.fingerprint,
        identity={},
        inputs={"init": sft.fingerprint},
        metrics={"loss": 0.25},
    )
    with worker._tracked(context):
        for step in (1, 2):
            context.trackers.log(step, {"loss": 1 / step, "rewards/margin": 0.5})
        context.trackers.table("samples", [{"answer": "yes", "scorers": {"reward": 0.5}}])
        result = _published(folder, dpo)
        assert result.path is not None
        context.trackers.result(dpo, result.path)
    assert not context.trackers.faults
    return context


@pytest.mark.usefixtures("offline")
def test_an_offline_run_holds_metrics_settings_samples_and_the_lineage_but_no_weights(tmp_path: Path) -> None:
    folder = _tracked_dpo(tmp_path).spec.run_folder
    (run,) = recorded(folder, "run")
    assert (run.project, run.run_group, run.job_type, run.display_name) == ("tests", "test", "dpo", "test/dpo")
    assert list(run.tags) == ["tiny", "lora", "mine"]
    logged = {entry.key: json.loads(entry.value_json) for entry in run.config.update}
    assert (logged["beta"], logged["adapter"]["rank"], logged["seed"], logged["stage"]) == (0.3, 4, 0, "dpo")
    assert logged["launch"] == {"sharding": "none", "offload": "none"}
    assert logged["fingerprint"] == "0123abcd" * 8
    assert {"python", "torch"} <= set(logged["versions"])
    steps = history(folder)
    assert [(line["step"], line["loss"], line["rewards/margin"]) for line in steps[:2]] == [(1, 1, 0.5), (2, 0.5, 0.5)]
    assert [entry.step_metric for entry in recorded(folder, "metric")] == ["step"]
    (table,) = folder.rglob("*.table.json")
    assert json.loads(table.read_text()) == {"columns": ["answer", "scorers/reward"], "data": [["yes", 0.5]]}
    assert steps[2]["samples/nrows"] == 1
    assert "loss" not in steps[2]
    assert summary_of(folder)["loss"] == 0.25

    artifacts = recorded(folder, "artifact")
    used, made = [artifact for artifact in artifacts if artifact.user_created or artifact.type == "policy"]
    assert (used.name, used.type, used.use_after_commit) == ("sft-5f5f5f5f", "policy", True)
    assert (made.name, made.type, made.use_after_commit) == ("dpo-0123abcd", "policy", False)
    for artifact in (used, made):
        (file,) = artifact.manifest.contents
        assert file.path == "manifest.json"
        assert file.local_path == str(tmp_path / "artifacts" / artifact.name / "manifest.json")
    assert json.loads(made.metadata)["inputs"] == {"init": json.loads(used.metadata)["fingerprint"]}


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("config", [SftConfig(), EvaluateConfig()], ids=lambda config: config.kind)
def test_under_a_sweep_s_agent_the_evaluation_is_the_agent_s_run_and_no_other_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: SftConfig | EvaluateConfig
) -> None:
    for name, value in AGENT.items():
        monkeypatch.setenv(name, value)
    tracking = TrackingConfig(wandb=True, project="tests", group="5weep")
    context = StageContext(spec=tiny_spec(tmp_path, config, tracking=tracking), rank=0, world_size=1)
    metrics = {"brevity/dpo": 0.5}
    manifest = Manifest(stage=config.kind, kind="evaluation", fingerprint="e" * 64, identity={}, metrics=metrics)
    with worker._tracked(context):
        result = _published(tmp_path, manifest)
        assert result.path is not None
        context.trackers.result(manifest, result.path)
    assert not context.trackers.faults
    (run,) = recorded(context.spec.run_folder, "run")
    expected = ("tr1al", "5weep") if isinstance(config, EvaluateConfig) else (stable_id(context.spec), "")
    assert (run.run_id, run.sweep_id) == expected
    assert run.run_group == "5weep"
    assert summary_of(context.spec.run_folder)["brevity/dpo"] == 0.5


@pytest.mark.usefixtures("offline")
def test_a_server_that_does_not_answer_makes_a_stage_offline_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{unused_port()}")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setitem(wandb_tracker._PATIENCE, "init_timeout", 1.0)
    context = context_in(tmp_path, tracking=tracking(["wandb"]))
    begun = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="alignment"), worker._tracked(context):
        context.trackers.log(1, {"loss": 0.5})
    assert time.monotonic() - begun < 60
    (warning,) = context.trackers.faults
    assert f"wandb sync {context.spec.run_folder}/wandb/offline-run-*" in warning
    assert "kkk" not in warning
    assert curves_of("wandb", context.spec) == {("loss", 1): [0.5]}


def test_tensorboard_holds_curves_settings_samples_and_headline_figures(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    spec = tiny_spec(tmp_path, SftConfig(), tracking=TrackingConfig(tensorboard=True))
    context = StageContext(spec=spec, rank=0, world_size=1)
    manifest = Manifest(stage="sft", kind="policy", fingerprint="a" * 64, identity={}, metrics={"loss": 0.5})
    with worker._tracked(context):
        context.trackers.log(1, {"loss": 1.0, "note": "no number"})
        context.trackers.table("samples", [{"answer": "a|b\nc"}])
        context.trackers.result(manifest, tmp_path / "sft-aaaaaaaa")
    assert not context.trackers.faults
    events = accumulator.EventAccumulator(str(spec.run_folder / "tensorboard")).Reload()
    for tag, value in (("loss", 1.0), ("result/loss", 0.5)):
        assert [(event.step, event.value) for event in events.Scalars(tag)] == [(1, value)]
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "a\\|b<br>c" in texts["samples/text_summary"]
    assert "kind: sft" in texts["settings/text_summary"]
    assert "sft-aaaaaaaa" in texts["lineage/text_summary"]


def _rows(*steps: int) -> list[Row]:
    return [Row(step=step, curves={"loss": 1.0}, time=0.0) for step in steps]


@pytest.fixture
def new_sender(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sender]:
    monkeypatch.setattr(mlflow, "_FIRST_DELAY", 0.01)
    passing: dict[str, Any] = {"may_pass": lambda error: isinstance(error, ConnectionError)}
    return lambda server, **changes: Sender("MLflow at http://x", lambda: server, **passing, **changes)


def test_what_failed_is_sent_again_in_order_and_an_outage_is_logged_once(
    new_sender: Callable[..., Sender], caplog: pytest.LogCaptureFixture
) -> None:
    server = _Server(ConnectionError("no route"), ConnectionError("no route"))
    with caplog.at_level(logging.WARNING):
        sent = new_sender(server)
        sent.log(_rows(1, 2))
        sent.log(_rows(3))
        sent.table("samples", ["a"], [["b"]])
        wait_until(lambda: "samples" in server.stored, seconds=10)
        sent.close(done=True)
    assert server.stored == [1, 2, 3, "samples", "done=True"]
    outage, back = [record.getMessage() for record in caplog.records]
    assert "no route" in outage
    assert "metrics.jsonl" in outage
    assert back == "MLflow at http://x is answering again"


def test_the_end_of_a_stage_waits_for_no_server_that_does_not_answer(new_sender: Callable[..., Sender]) -> None:
    server = _Server(*(ConnectionError("no route") for _ in range(1000)))
    sent = new_sender(server, end_seconds=10)
    sent.log(_rows(4, 5, 6))
    begun = time.monotonic()
    with pytest.raises(NotSentError, match=r"steps 4 to 6 .*: no route$"):
        sent.close(done=True)
    assert time.monotonic() - begun < 5


def test_the_end_of_a_stage_waits_no_longer_than_its_time_for_a_server_that_hangs(
    new_sender: Callable[..., Sender],
) -> None:
    server = _Server()
    server.open.clear()
    sent = new_sender(server, end_seconds=0.2)
    begun = time.monotonic()
    sent.log(_rows(1))
    assert time.monotonic() - begun < 0.15, "a training does not wait at all"
    with pytest.raises(NotSentError, match="steps 1 to 1"):
        sent.close(done=True)
    assert time.monotonic() - begun < 5
    server.open.set()


def test_a_fault_that_stays_ends_the_sending(new_sender: Callable[..., Sender]) -> None:
    server = _Server(PermissionError("wrong password"))
    sent = new_sender(server)
    sent.log(_rows(1))
    sent._thread.join(5)
    with pytest.raises(NotSentError, match=r"refused: wrong password$"):
        sent.log(_rows(2))
    assert server.stored == []
