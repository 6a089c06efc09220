"""A stage with trackers that is killed twice, and one that is not. Each attempt is a process of its own, forked from
the caller's. In ``FOLDER/killed`` two are killed with all that they started: the first before W&B has written anything,
the second once every tracker has a step after the last checkpoint. In ``FOLDER/straight`` there is one attempt without
trackers, which nobody kills."""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from alignment.config.run import TrackingConfig
from alignment.stages.sft.kind import SftConfig
from alignment.training.context import StageContext
from alignment.training.optimizer import quiet_arguments
from alignment.training.session import train
from tests.living import in_child
from tests.tiny import tiny_spec
from tests.unit.training.read_back import last_step

STEPS = 8
TRACKING = TrackingConfig(wandb=True, tensorboard=True, project="tests", tags=["mine"])
SERVER = "TESTS_MLFLOW_URL"
"""The environment variable with the address of MLflow's server."""


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": ((x * self.weight).sum(-1) ** 2).mean()}


class _Killed(TrainerCallback):
    def __init__(self, context: StageContext, trackers: Sequence[str], step: int, *, written: int) -> None:
        self._context = context
        self._trackers = trackers
        self._step = step
        self._written = written

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            deadline = time.monotonic() + 60
            while not self._is_written() and time.monotonic() < deadline:
                time.sleep(0.01)
            os.killpg(0, signal.SIGKILL)

    def _is_written(self) -> bool:
        return not self._written or all(
            last_step(tracker, self._context.spec) >= self._written for tracker in self._trackers
        )


def tracking(trackers: Sequence[str]) -> TrackingConfig:
    return TrackingConfig(**dict.fromkeys(trackers, True), project="tests", mlflow_url=os.environ.get(SERVER, ""))


def context_in(folder: Path, **changes: Any) -> StageContext:
    return StageContext(spec=tiny_spec(folder, SftConfig(), **({"tracking": TRACKING} | changes)), rank=0, world_size=1)


def line_trainer(
    context: StageContext, *, steps: int = STEPS, save_every: int = 3, model: torch.nn.Module | None = None
) -> Trainer:
    arguments = TrainingArguments(
        **quiet_arguments(context),
        max_steps=steps,
        logging_steps=1,
        save_steps=save_every,
        learning_rate=0.01,
        per_device_train_batch_size=2,
    )
    rows = [{"x": torch.tensor([float(number), 1.0])} for number in range(8)]
    return Trainer(model=Line() if model is None else model, args=arguments, train_dataset=rows)


def train_line(context: StageContext, *callbacks: TrainerCallback) -> None:
    trainer = line_trainer(context)
    for callback in callbacks:
        trainer.add_callback(callback)
    train(trainer, context, headline="loss")


def _attempt(folder: Path, trackers: Sequence[str], *, killed_after: int | None = None, written: int = 0) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        os.setsid()
        context = context_in(folder, tracking=tracking(trackers))
        context.trackers.start(context.spec)
        killer = [] if killed_after is None else [_Killed(context, trackers, killed_after, written=written)]
        train_line(context, *killer)
        context.trackers.close(done=True)
        code = len(context.trackers.faults)
    except BaseException:  # noqa: BLE001  nothing may go on in the parent's code
        traceback.print_exc()
    os._exit(code)


def run(folder: Path, trackers: Sequence[str]) -> int:
    killed = folder / "killed"
    codes = [_attempt(folder / "straight", []), _attempt(killed, trackers, killed_after=4)]
    os.environ["WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL"] = "0.05"  # seconds; W&B's own default is 15
    codes += [_attempt(killed, trackers, killed_after=5, written=4), _attempt(killed, trackers)]
    print(f"exit codes: {codes}")
    return int(codes != [0, -signal.SIGKILL, -signal.SIGKILL, 0])


def run_twice(folder: Path, trackers: Sequence[str], **variables: str) -> dict[tuple[str, int], float]:
    def attempts() -> int:
        for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))]:
            del os.environ[name]
        os.environ.update({"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", **variables})
        return run(folder, trackers)

    with (folder / "printed").open("w+b") as sink:
        code = in_child(attempts, sink)
        sink.seek(0)
        assert code == 0, sink.read().decode()
    (file,) = (folder / "straight").glob("artifacts/*/content/metrics.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {(key, row["step"]): value for row in rows for key, value in row.items() if key != "step"}
