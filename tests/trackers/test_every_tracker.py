"""All trackers, MLflow's server among them: the same curves, every step once, and nothing lost for good."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from alignment import worker
from alignment.commands.track.worker import send
from alignment.config.run import LABELS
from alignment.core.artifacts import Manifest, publish
from alignment.core.errors import StageError
from alignment.training.context import StageContext
from alignment.training.trackers.mlflow import MlflowTracker
from alignment.training.trackers.tracker import RESULT, Row
from tests.e2e.conftest import Align
from tests.living import in_child
from tests.tiny import save_tiny_model
from tests.trackers.conftest import Server
from tests.unit.training.read_back import Curves, curves_of, last_step
from tests.unit.training.tracked import SERVER, STEPS, context_in, run_twice, tracking, train_line

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow and trackio warn of their own imports
CANARY = "c4nary5ecret"
SECRETS = {"MLFLOW_TRACKING_USERNAME": f"user{CANARY}", "MLFLOW_TRACKING_PASSWORD": CANARY}
STEP_NUMBERS = set(range(1, STEPS + 1))


@pytest.fixture(autouse=True)
def _own_variables(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")  # to be put back afterwards, whatever becomes of it
        monkeypatch.delenv(name)
    monkeypatch.setenv(SERVER, server.url)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, server: Server) -> tuple[Path, dict[tuple[str, int], float]]:
    folder = tmp_path_factory.mktemp("twice")
    return folder, run_twice(folder, list(LABELS), **{SERVER: server.url})


@pytest.mark.parametrize("tracker", LABELS)
def test_every_tracker_has_every_key_and_step_once_after_two_kills(
    expected: tuple[Path, dict[tuple[str, int], float]], tracker: str
) -> None:
    stored = curves_of(tracker, context_in(expected[0] / "killed", tracking=tracking(list(LABELS))).spec)
    assert {point: len(values) for point, values in stored.items()} == dict.fromkeys(expected[1], 1)
    assert {step for _, step in stored} == STEP_NUMBERS
    for (key, step), (value,) in stored.items():
        if key != "seconds":  # no two runs take equally long
            assert value == pytest.approx(expected[1][key, step], rel=1e-6), (key, step)


def test_trackio_holds_curves_settings_samples_and_headline_figures_once(tmp_path: Path) -> None:
    def attempt() -> int:
        for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
            del sys.modules[name]  # TRL imports it, and then it writes to the user's folder
        context = context_in(tmp_path, tracking=tracking(["trackio"]))
        manifest = Manifest(stage="sft", kind="policy", fingerprint="a" * 64, identity={}, metrics={"loss": 0.5})
        with worker._tracked(context):
            context.trackers.catch_up([{"step": 1, "loss": 1.0, "time": 2.0}])
            context.trackers.table("samples", [{"answer": "yes", "scorers": {"reward": 0.5}}])
            context.trackers.result(manifest, tmp_path / "sft-aaaaaaaa")
        return len(context.trackers.faults)

    with (tmp_path / "printed").open("w+b") as sink:
        codes = [in_child(attempt, sink), in_child(attempt, sink)]  # the second has nothing new to write
        sink.seek(0)
        assert codes == [0, 0], sink.read().decode()
    connection = sqlite3.connect(tmp_path / "trackio" / "tests.db")
    rows = [(step, json.loads(text)) for step, text in connection.execute("SELECT step, metrics FROM metrics")]
    assert [(step, row) for step, row in rows if "samples" not in row] == [
        (1, {"loss": 1.0, "metric/time": 2.0}),
        (1, {"result/loss": 0.5}),
    ]
    (table,) = [row["samples"] for _, row in rows if "samples" in row]
    assert table["_value"] == [{"answer": "yes", "scorers/reward": 0.5}]
    ((config,),) = connection.execute("SELECT config FROM configs").fetchall()
    assert json.loads(config)["stage"] == "sft"
    connection.close()


def _published(context: StageContext) -> Manifest:
    (context.content / "model.safetensors").write_text("weights")
    spec = context.spec
    manifest = Manifest(
        stage=spec.stage,
        kind="policy",
        fingerprint=spec.fingerprint,
        identity={},
        inputs={"init": "5f" * 32},
        metrics={"loss": 0.25, "time": 3.0},
    )
    return publish(context.content, spec.artifact, manifest)


def test_mlflow_holds_settings_tags_samples_and_the_result_once(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    context = context_in(tmp_path, tracking=replace(tracking(["mlflow"]), project="whole", tags=["mine"]))
    with worker._tracked(context):
        context.trackers.log(1, {"loss": 1.0, "hit@1": 2.0})
        context.trackers.table("samples", [{"answer": "yes", "scorers": {"reward": 0.5}}])
        context.trackers.result(_published(context), context.spec.artifact)
    assert context.trackers.faults == []
    assert send(context.spec, "MLflow").startswith("sft: MLflow has 0 steps and the result"), "and nothing twice"
    client = MlflowClient(tracking_uri=server.url)
    experiment = client.get_experiment_by_name("whole")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("test/sft", "FINISHED")
    tags = {name: value for name, value in run.data.tags.items() if name.startswith("alignment.")}
    assert tags.pop("alignment.id")
    assert tags == {
        "alignment.group": "test",
        "alignment.stage": "sft",
        "alignment.kind": "sft",
        "alignment.fingerprint": "0123abcd" * 8,
        "alignment.tags": "tiny, lora, mine",
        "alignment.artifact": "sft-0123abcd",
        "alignment.input.init": "5f" * 32,
    }
    assert (run.data.params["stage"], run.data.params["adapter/rank"]) == ("sft", str(context.spec.config.adapter.rank))
    points = {
        name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics
    }
    assert points == {
        "loss": [(1, 1.0)],
        "hit_x40_1": [(1, 2.0)],
        f"{RESULT}loss": [(1, 0.25)],
        f"{RESULT}metric/time": [(1, 3.0)],
    }
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"samples.json", "manifest.json"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    table = client.load_table(experiment.experiment_id, "samples.json", run_ids=[run.info.run_id])
    assert table.to_dict("records") == [{"answer": "yes", "scorers/reward": 0.5}]


def test_a_request_whose_answer_was_lost_is_stored_once(tmp_path: Path) -> None:
    context = context_in(tmp_path, tracking=replace(tracking(["mlflow"]), project="again"))
    tracker = MlflowTracker(context.spec, context.spec.tracking.mlflow_url)
    rows = [Row(step=step, curves={"loss": 1 / step, "lr": 0.5}, time=1.8e9) for step in (1, 2)]
    for _ in range(2):
        tracker.log(rows)
        tracker._step = 0  # as if the server had answered nothing
    expected = {("loss", 1): [1.0], ("loss", 2): [0.5], ("lr", 1): [0.5], ("lr", 2): [0.5]}
    assert curves_of("mlflow", context.spec) == expected


class _At(TrainerCallback):
    def __init__(self, calls: dict[int, Callable[[], None]]) -> None:
        self._calls = calls
        self._begun = 0.0
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._calls.get(state.global_step, lambda: None)()
        self._begun = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(time.monotonic() - self._begun)


def _steps_of(curves: Curves) -> dict[int, int]:
    return {step: len(values) for (key, step), values in sorted(curves.items()) if key == "loss"}


def _killer(server: Server, context: StageContext) -> Callable[[], None]:
    def kill() -> None:
        deadline = time.monotonic() + 60
        while last_step("mlflow", context.spec) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        server.kill()

    return kill


def test_a_server_that_is_killed_and_comes_back_gets_all_steps_and_holds_up_none(
    tmp_path: Path, new_server: Callable[[], Server], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = new_server()
    server.start()
    monkeypatch.setenv(SERVER, server.url)
    context = context_in(tmp_path, tracking=tracking(["mlflow"]))
    at = _At({3: _killer(server, context), 6: server.start})
    with caplog.at_level(logging.WARNING, logger="alignment"), worker._tracked(context):
        train_line(context, at)
    assert max(at.seconds) < 1.0, "no step waited for the server"
    assert context.trackers.faults == []
    first, second = [record.getMessage() for record in caplog.records]
    assert f"MLflow at {server.url} cannot be reached" in first
    assert f"MLflow at {server.url} is answering again" in second
    assert _steps_of(curves_of("mlflow", context.spec)) == dict.fromkeys(STEP_NUMBERS, 1)
    server.kill()


def test_what_a_dead_server_did_not_get_is_named_and_sent_later_once(
    tmp_path: Path, new_server: Callable[[], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = new_server()
    server.start()
    monkeypatch.setenv(SERVER, server.url)
    context = context_in(tmp_path, tracking=tracking(["mlflow"]))
    begun = time.monotonic()
    with worker._tracked(context):
        train_line(context, _At({3: _killer(server, context)}))
    assert time.monotonic() - begun < 90
    (fault,) = context.trackers.faults
    assert f"MLflow at {server.url} is missing steps " in fault
    assert fault.endswith("; to send the rest later, run: align track test --to mlflow")
    with pytest.raises(StageError, match="MLflow failed"):
        send(context.spec, "MLflow")
    server.start()
    before = _steps_of(curves_of("mlflow", context.spec))
    assert 2 <= len(before) < STEPS
    for _ in range(2):
        assert send(context.spec, "MLflow") == f"sft: MLflow has {STEPS} steps"
        assert _steps_of(curves_of("mlflow", context.spec)) == dict.fromkeys(STEP_NUMBERS, 1)
    server.kill()


STAGES = ("sft", "reward", "ppo", "report")
FEW = (
    *(f"~stages.{stage}" for stage in STAGES),
    "stages.dpo.init=base",
    "stages.evaluate={arms: [base, 'stage:dpo'], reference: base, reward: null}",
)


def test_a_run_without_its_server_goes_on_tells_no_password_and_is_sent_afterwards(
    tmp_path: Path, new_server: Callable[[], Server]
) -> None:
    from mlflow.tracking import MlflowClient

    server = new_server()
    align = Align(
        output=tmp_path / "output",
        model=save_tiny_model(tmp_path / "model"),
        variables=SECRETS | {"MLFLOW_TRACKING_URI": server.url, "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
    )
    overrides = [*FEW, "tracking=[jsonl,mlflow,trackio]"]
    argv = [word for word in align.argv("run") if not word.startswith(tuple(f"stages.{stage}." for stage in STAGES))]
    done = subprocess.run(
        [*argv, *overrides], capture_output=True, text=True, env=align.environment, timeout=300, check=False
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed + align.logs()
    joined = " ".join(printed.split())
    assert f"MLflow at {server.url} is missing" in joined
    assert "align track quickstart --to mlflow" in joined

    server.start()
    track = ("track", "quickstart", "--to", "mlflow", "--output", str(align.output))
    later = [sys.executable, "-m", "alignment.cli", *track]
    for _ in range(2):
        sent = subprocess.run(later, capture_output=True, text=True, env=align.environment, timeout=300, check=False)
        assert sent.returncode == 0, sent.stdout + sent.stderr
        assert "evaluate: MLflow has 0 steps and the result" in sent.stdout
    client = MlflowClient(tracking_uri=server.url)
    experiment = client.get_experiment_by_name("alignment")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"quickstart/dpo", "quickstart/evaluate"}
    (file,) = align.output.glob("artifacts/dpo-*/metrics.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    history = client.get_metric_history(runs["quickstart/dpo"].info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(row["step"], row["loss"]) for row in rows]
    assert f"{RESULT}style_and_facts/dpo" in runs["quickstart/evaluate"].data.metrics
    tables = {file.path for file in client.list_artifacts(runs["quickstart/evaluate"].info.run_id)}
    assert tables == {"arms.json", "samples.json", "manifest.json"}

    written = [path for folder in (align.output, server.folder) for path in folder.rglob("*") if path.is_file()]
    assert [path for path in written if CANARY.encode() in path.read_bytes()] == []
    assert CANARY not in printed + sent.stdout + sent.stderr
    assert (align.output / "trackio" / "alignment.db").is_file()
