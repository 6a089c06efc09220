"""What a worker looks at before it begins."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignment import worker
from alignment.config.model import ModelConfig
from alignment.config.scoring import GuardConfig
from alignment.core.artifacts import verify
from alignment.core.child_processes import SIGNALS
from alignment.core.errors import DataError, ModelError, NonFiniteError, StageError
from alignment.core.fingerprint import content_sha256, digest
from alignment.data.chat_template import template_text
from alignment.job import StageInput
from alignment.pipeline.sources.model_sources import identity_of_folder
from alignment.records.run import Attempts
from alignment.stages.base import Reported
from alignment.stages.distil.kind import DistilConfig
from alignment.stages.evaluate.kind import EvaluateConfig
from alignment.stages.ppo.config import PpoConfig
from alignment.stages.registry import kind_of
from alignment.stages.report.kind import ReportConfig
from alignment.stages.reward_card.kind import RewardCardConfig
from alignment.stages.sample.kind import SampleConfig
from alignment.stages.sft.kind import SftConfig
from alignment.stages.shared.result import StageResult
from alignment.training.context import StageContext
from alignment.training.session import Preempted
from alignment.worker import _refuse_changed_data
from tests.hub import weights_file
from tests.tiny import tiny_spec


def test_data_that_changed_since_the_plan_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("{}")
    spec = tiny_spec(tmp_path, SftConfig(), identity={"data": content_sha256(file)})
    _refuse_changed_data(spec)
    file.write_text("{} ")
    with pytest.raises(DataError, match=r"data\.jsonl: changed since the run was planned"):
        _refuse_changed_data(spec)


def test_a_full_disk_is_told_as_such_and_makes_room_to_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny_spec(tmp_path, SftConfig())

    def run(_: object, context: StageContext) -> None:
        (context.checkpoints / "checkpoint-4").mkdir(parents=True)
        (spec.work / worker.RESERVE).write_bytes(b"0")
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    status = ended(tmp_path, monkeypatch, run, code=12)
    assert "no space left on the device; " in status["error"]
    assert "free space and run again: nothing is lost" in status["error"]
    assert not list((spec.work / "checkpoints").iterdir()), "half a checkpoint only takes room"
    assert not (spec.work / worker.RESERVE).exists()


def test_a_stage_runs_without_cudnns_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enabled: list[bool] = []

    def run(_: object, context: StageContext) -> None:
        enabled.append(torch.backends.cuda.cudnn_sdp_enabled())
        raise InterruptedError

    monkeypatch.setattr(worker, "function_of", lambda _: run)
    spec = tiny_spec(tmp_path, SftConfig())
    with pytest.raises(InterruptedError):
        worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    assert enabled == [False]


def ended(
    folder: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., None], *, code: int, config: Any = None
) -> dict[str, Any]:
    """The status of a worker whose stage does only this; it ends with this code."""
    spec = tiny_spec(folder, config or SftConfig())
    monkeypatch.setattr(worker, "read_spec", lambda path: spec)
    monkeypatch.setattr(worker, "_run", run)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        assert worker.main(folder / "stage.yaml") == code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    status: dict[str, Any] = json.loads((spec.run_folder / "status.json").read_text())
    assert status["exit_code"] == code
    return status


def raises(error: BaseException) -> Callable[..., None]:
    def run(*_: object) -> None:
        raise error

    return run


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_outside_training_stops_the_stage_as_one_that_was_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    status = ended(tmp_path, monkeypatch, lambda *_: signal.raise_signal(number), code=75)
    assert status["state"] == "preempted"
    assert "it was not training" in status["error"]


def test_a_signal_while_trackers_close_does_not_replace_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tracker may take a minute to close, which looks like a hang."""
    context = StageContext(spec=tiny_spec(tmp_path, SftConfig()), rank=0, world_size=1)
    monkeypatch.setattr(context.trackers, "start", lambda spec: None)
    monkeypatch.setattr(context.trackers, "close", lambda *, done: signal.raise_signal(signal.SIGTERM))

    def fail(*_: object) -> None:
        with worker._tracked(context):
            raise StageError("no row is left")

    status = ended(tmp_path, monkeypatch, fail, code=StageError.exit_code)
    assert (status["state"], "no row is left" in status["error"]) == ("failed", True)


def test_a_signal_while_torch_is_imported_stops_the_stage_before_it_began(tmp_path: Path) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "path/torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGUSR1)\n")
    (tmp_path / "sft").mkdir()
    argv = [sys.executable, "-m", "alignment.worker", str(tmp_path / "sft/stage.yaml")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "path"), str(Path(__file__).parents[2])])}
    done = subprocess.run(argv, env=variables, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 75, done.stderr
    status = json.loads((tmp_path / "sft/status.json").read_text())
    assert (status["state"], status["where"]) == ("preempted", "stage sft")


@pytest.mark.parametrize(
    ("run", "state", "code", "words"),
    [
        (lambda *_: None, "done", 0, ""),
        (raises(Preempted()), "preempted", 75, ""),
        (raises(DataError("no row")), "failed", 3, "no row"),
        (raises(NonFiniteError("nan")), "failed", 6, "nan"),
        *((raises(error), "failed", 1, type(error).__name__) for error in (KeyError("x"), SystemExit(0))),
        (raises(KeyboardInterrupt()), "failed", 1, "KeyboardInterrupt"),
    ],
)
def test_how_a_stage_ended_stands_in_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., None], state: str, code: int, words: str
) -> None:
    status = ended(tmp_path, monkeypatch, run, code=code)
    assert (status["state"], words in status["error"]) == (state, True)


def test_the_first_process_that_fails_has_the_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the others say is that they lost their connection to it."""
    ended(tmp_path, monkeypatch, raises(NonFiniteError("nan")), code=6)
    monkeypatch.setattr(worker, "_run", raises(RuntimeError("connection closed by peer")))
    worker.main(tmp_path / "stage.yaml")
    (file,) = tmp_path.rglob("status.json")
    assert json.loads(file.read_text())["exit_code"] == 6


LESS_TOKENS, ANSWERS = "lower optim.micro_batch_tokens", "lower batch_size or max_new_tokens"
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize(
    ("config", "phase", "error", "remedy"),
    [
        (SftConfig(), "training", OUT_OF_MEMORY, LESS_TOKENS),
        (SftConfig(), "training", RuntimeError("can't allocate memory: 9 GB"), LESS_TOKENS),
        (SampleConfig(), "training", MemoryError(), "lower batch_size"),
        (ReportConfig(), "training", MemoryError(), "a machine with more memory"),
        (PpoConfig(), "sampling", MemoryError(), "lower optim.batch_size or max_new_tokens"),
        (PpoConfig(guard=GuardConfig(every=2)), "sampling", MemoryError(), "guard.prompts or max_new_tokens"),
        (PpoConfig(), "scoring", MemoryError(), LESS_TOKENS),
        (DistilConfig(), "answering", MemoryError(), ANSWERS),
        (DistilConfig(), "training", MemoryError(), LESS_TOKENS),
        (EvaluateConfig(), "answering", MemoryError(), ANSWERS),
        (RewardCardConfig(), "scoring", MemoryError("9 GB"), "lower micro_batch_tokens"),
    ],
)
@pytest.mark.parametrize("chosen", [False, True])
def test_advice_on_memory_is_about_the_phase_that_ran_out_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Any, phase: str, error: Any, remedy: str, chosen: bool
) -> None:
    """Where the stage has ``chosen`` the size of its micro-batches, it may choose again."""
    spec = tiny_spec(tmp_path, config)
    spec.work.mkdir(parents=True, exist_ok=True)
    if chosen:
        (spec.work / "micro_batch.json").write_text("{}")

    def run(_: object, context: StageContext) -> None:
        context.progress(phase)
        raise error

    words = ended(tmp_path, monkeypatch, run, code=5, config=config)["error"]
    assert f"out of memory while {phase}" in words
    chooses_again = chosen and phase not in ("sampling", "answering")
    assert ("to choose it again" if chooses_again else remedy) in words
    assert ("micro_batch_tokens" in words) == ("micro_batch_tokens" in remedy and not chooses_again)


def test_a_template_that_changed_since_the_plan_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages }}")
    source = f"path:{file}"
    identity = {"base": {"chat_template": digest(template_text(source))}}
    model = ModelConfig(source="path:tiny", chat_template=source)
    spec = tiny_spec(tmp_path, SftConfig(), identity=identity, model=model)
    _refuse_changed_data(spec)
    file.write_text("{{ tools }}")
    with pytest.raises(DataError, match=r"model\.chat_template: changed since the run was planned"):
        _refuse_changed_data(spec)


@pytest.mark.parametrize("changed", ["base", "scorer"])
def test_a_model_folder_that_changed_since_the_plan_is_refused(tmp_path: Path, changed: str) -> None:
    folders = [tmp_path / "base", tmp_path / "scorer"]
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(weights_file())
    base, scorer = map(identity_of_folder, folders)
    spec = tiny_spec(
        tmp_path,
        RewardCardConfig(),
        identity={"base": {"content": base}},
        inputs={"reward": StageInput(ref=f"path:{folders[1]}", path=folders[1])},
        input_fingerprints={"reward": scorer},
    )
    worker._refuse_changed_models(spec)
    (tmp_path / changed / "model.safetensors").write_bytes(weights_file(b"others!"))
    with pytest.raises(ModelError) as caught:
        worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    assert str(caught.value).startswith(f"{tmp_path / changed}: changed since the run was planned\n  → start the run")


RESULT = StageResult(metrics={"words": 3})


def returning(result: Any) -> Callable[..., Any]:
    def run(_: object, context: StageContext) -> Any:
        (context.content / "words.json").touch()
        return result

    return run


@pytest.mark.parametrize(
    ("result", "message", "remedy"),
    [
        (RESULT, "", ""),
        (None, "the function alignment.stages.sample.run:run returned None, not a StageResult", "return StageResult("),
        ({"words": 3.0}, "returned {'words': 3.0}, not a StageResult", "return StageResult("),
        (
            replace(RESULT, metrics={"words": "3"}),
            "the metric 'words' is '3', not a Python number",
            "such as float(value)",
        ),
        (
            replace(RESULT, metrics={"words": np.float32(3)}),
            "the metric 'words' is np.float32(3.0), not a",
            "float(value)",
        ),
    ],
    ids=repr,
)
def test_what_a_stage_returns_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: Any, message: str, remedy: str
) -> None:
    monkeypatch.setattr(worker, "function_of", lambda _: returning(result))
    spec = tiny_spec(tmp_path, SampleConfig())
    context = StageContext(spec=spec, rank=0, world_size=1)
    if message:
        with pytest.raises(StageError) as caught:
            worker._run(spec, context)
        assert message in caught.value.message
        assert remedy in caught.value.remedy
    else:
        worker._run(spec, context)
    assert spec.artifact.exists() == (not message)


@pytest.mark.parametrize(
    ("origin", "declared", "notes"),
    [
        ("alignment", ("rows", "words"), []),
        ("their-stage", ("words",), []),
        (
            "their-stage",
            ("rows", "words", "letters"),
            ["it did not report rows, letters, which metrics of its kind declares, so a sweep cannot use them"],
        ),
    ],
)
def test_a_metric_that_an_outside_kind_declares_and_never_reports_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, origin: str, declared: tuple[str, ...], notes: list[str]
) -> None:
    monkeypatch.setattr(
        worker, "kind_of", lambda config: replace(kind_of(config), metrics=lambda _: Reported(counts=declared))
    )
    monkeypatch.setattr(worker, "origin_of", lambda _: origin)
    monkeypatch.setattr(worker, "function_of", lambda _: returning(RESULT))
    spec = tiny_spec(tmp_path, SampleConfig())
    context = StageContext(spec=spec, rank=0, world_size=1)
    worker._run(spec, context)
    assert context.notes == notes


def test_a_result_took_the_time_of_all_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "function_of", lambda _: returning(RESULT))
    spec = tiny_spec(tmp_path, SampleConfig())
    Attempts(number=3, earlier_seconds=1000.0, started=1.0).write(spec.work)
    worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    assert 1000.0 < verify(spec.artifact, content=True).usage["seconds"] < 1100.0
