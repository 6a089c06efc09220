"""``align track`` sends what a tracker lacks, and refuses before it starts anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from alignment.commands.track import worker
from alignment.commands.track.verb import track
from alignment.commands.track.worker import send, send_run
from alignment.config.tracking import TrackingConfig
from alignment.core.errors import Busy, ConfigError
from alignment.core.locks import held
from alignment.records.run import RunRecord, StageEntry
from alignment.records.step_log import METRICS, MetricsLog
from alignment.stages.sft.config import SftConfig
from tests.tiny import tiny_spec
from tests.unit.training.read_back import curves_of


@pytest.mark.parametrize(
    ("run", "to", "url", "words"),
    [
        ("quickstrat", "tensorboard", "", r"there is no run 'quickstrat' under .*; did you mean 'quickstart'\?"),
        ("quickstart", "mlflow", "http://me:s3cret@x", r"--url: not an address of a server; allowed: http"),
        ("quickstart", "mlflow", "", r"tracking.mlflow_url: no server is named"),
    ],
)
def test_what_cannot_be_sent_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str, to: str, url: str, words: str
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "runs/quickstart").mkdir(parents=True)
    RunRecord(name="quickstart").write(tmp_path / "runs/quickstart")
    with pytest.raises(ConfigError, match=words) as caught:
        track(Console(), run, to=to, url=url, output=tmp_path)
    assert "s3cret" not in str(caught.value)


def test_a_result_of_another_run_is_not_sent_as_this_run_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, sent = tmp_path / "runs/mine", list[Path]()
    monkeypatch.setattr(worker, "send", lambda spec, label: (sent.append(spec.artifact), f"{spec.stage}: sent")[1])
    spec = tiny_spec(tmp_path, SftConfig())
    (folder / "sft").mkdir(parents=True)
    (folder / "sft/stage.yaml").touch()
    monkeypatch.setattr(worker, "read_spec", lambda file: spec)
    entries = {
        "sft": StageEntry(kind="sft", state="reused", artifact=str(spec.artifact)),
        "report": StageEntry(kind="report", state="done", artifact="report-1"),
    }
    RunRecord(name="mine", stages=entries).write(folder)
    send_run(folder, "tensorboard", "")
    assert capsys.readouterr().out.splitlines() == ["sft: sent", "TensorBoard already has everything from mine"]
    assert sent == [spec.artifact]
    entries |= {
        "sft": StageEntry(kind="sft", state="reused", artifact="artifacts/sft-another"),
        "dpo": StageEntry(kind="dpo", state="reused", artifact="artifacts/dpo-another"),
        "ppo": StageEntry(kind="ppo", state="waiting", artifact="artifacts/ppo-later"),
    }
    RunRecord(name="mine", stages=entries).write(folder)
    send_run(folder, "tensorboard", "")
    assert capsys.readouterr().out.splitlines() == [
        f"sft: not sent, because {folder / 'sft/stage.yaml'} has other settings than its result",
        "dpo: not sent, because another run made its result",
    ]
    assert sent == [spec.artifact]
    spec.artifact.mkdir(parents=True)
    moved = tmp_path / "moved"
    moved.mkdir()
    for part in ("runs", "artifacts"):
        (tmp_path / part).rename(moved / part)
    entries = {"sft": StageEntry(kind="sft", state="done", artifact=str(spec.artifact))}
    RunRecord(name="mine", stages=entries).write(moved / "runs/mine")
    send_run(moved / "runs/mine", "tensorboard", "")
    assert sent[1:] == [moved / "artifacts" / spec.artifact.name]


def test_a_stage_that_was_stopped_is_sent_and_one_that_is_running_is_not(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    spec = tiny_spec(tmp_path, SftConfig(), tracking=TrackingConfig(tensorboard=True))
    log = MetricsLog(spec.work / "content" / METRICS)
    for step in (1, 2):
        log.append(step, {"loss": 1 / step})
    with held(spec.work / "worker.lock", wait=False), pytest.raises(Busy):
        send(spec, "TensorBoard")
    for _ in range(2):
        assert send(spec, "TensorBoard") == "sft: TensorBoard has 2 steps"
        assert curves_of("tensorboard", spec) == {("loss", 1): [1.0], ("loss", 2): [0.5]}
