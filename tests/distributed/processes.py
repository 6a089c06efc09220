"""A stage on several processes, as a launcher starts them, without the seconds that each would take to import torch.

A server that has imported everything, and computed nothing, is forked for every process.
"""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from dataclasses import dataclass
from typing import Any

from alignment.core.hardware import visible_devices
from alignment.job import StageSpec
from tests.distributed.own_memory import watch

PRELOADED = (
    "alignment.worker",
    "alignment.stages.ppo.run",
    "alignment.stages.dpo.run",
    "alignment.stages.kto.run",
    "alignment.stages.reward.run",
    "alignment.stages.sample.run",
    "alignment.stages.distil.run",
    "alignment.stages.evaluate.run",
    "alignment.stages.forgetting.run",
    "alignment.stages.reward_card.run",
    "tests.chained",
    "tests.distributed.frozen",
)
SECONDS = 120
PARTS = {
    "sampling": ("alignment.stages.shared.answer_sampling", "generate"),
    "answering": ("alignment.stages.evaluate.answering", "answer_and_score"),
}
"""The functions that make a part of answers."""


@dataclass(frozen=True, kw_only=True)
class Disturbance:
    """What happens to the processes of a stage.

    Process 1 gets SIGTERM after the step ``stop_after``, or a loss that is no number in the step ``nan_at``. All get
    SIGKILL at the step ``kill_after``, when it is ``logged``, before a checkpoint of it, or when that is ``sealed``; or
    where they begin with their part of that number, when ``sampling``, or ``answering`` in an evaluation.
    ``tries_longest``: the largest micro-batch is tried first, however short the training is. ``watches_memory``: they
    end before the first step and leave ``memory-RANK.json`` (own_memory.py).
    """

    stop_after: int | None = None
    nan_at: int | None = None
    kill_after: int | None = None
    killed_when: str = "logged"
    tries_longest: bool = False
    watches_memory: bool = False


def on_processes(spec: StageSpec, *, world_size: int = 2, **disturbances: Any) -> list[int]:
    """Runs a stage on processes of its own; returns their exit codes, those of ``alignment.worker``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    arguments = (world_size, _free_port(), Disturbance(**disturbances))
    group = [context.Process(target=_process, args=(spec, rank, *arguments)) for rank in range(world_size)]
    for process in group:
        process.start()
    late = []
    for rank, process in enumerate(group):
        process.join(SECONDS)
        if process.exitcode is None:
            late.append(rank)
            process.kill()
            process.join()
    assert not late, f"processes {late} did not end within {SECONDS} s"  # their code would be that of a wanted SIGKILL
    return [int(process.exitcode or 0) for process in group]


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _process(spec: StageSpec, rank: int, world_size: int, port: int, how: Disturbance) -> None:
    if how.tries_longest:
        _try_longest()
    if how.watches_memory:
        watch(spec.run_folder, rank, spec.base_path)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    devices = visible_devices()[:world_size]
    if devices:  # as the launcher has it: a GPU for each process, or none
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(devices) if len(devices) == world_size else ""
    os.environ.update({name: str(value) for name, value in variables.items()})
    with (spec.run_folder / f"log-{rank}.txt").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            sys.exit(_run(spec, rank, how))
        except Exception:
            traceback.print_exc()
            raise


def _run(spec: StageSpec, rank: int, how: Disturbance) -> int:
    from alignment import worker

    if rank == 1 and how.stop_after is not None:
        _stop_after(how.stop_after)
    if rank == 1 and how.nan_at is not None:
        _nan_at(how.nan_at)
    if how.kill_after is not None:
        if how.killed_when in PARTS:
            _kill_at_part(how.kill_after, *PARTS[how.killed_when])
        else:
            _kill_after(how.kill_after, how.killed_when)
    worker.read_spec = lambda _: spec
    return worker.main(spec.run_folder / "stage.yaml")


def _try_longest() -> None:
    from alignment.training import longest_batch
    from alignment.training.micro_batches import MicroBatches

    longest_batch.SHARE = float("inf")
    otherwise = MicroBatches.try_rows

    def try_rows(self: Any, rows: Any) -> None:
        print("tried", len(rows), "rows", flush=True)
        otherwise(self, rows)

    MicroBatches.try_rows = try_rows


def _stop_after(steps: int) -> None:
    from alignment.training.callbacks import StopOnSignal

    otherwise = StopOnSignal.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        otherwise(self, args, state, control, **kwargs)

    StopOnSignal.on_step_end = on_step_end


def _kill_after(step: int, when: str) -> None:
    from alignment.training.callbacks import Checkpoints, StepLog

    cls, name = {"logged": (StepLog, "on_log"), "sealed": (Checkpoints, "on_save")}[when]
    otherwise = getattr(cls, name)

    def callback(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        otherwise(self, args, state, control, **kwargs)
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(cls, name, callback)


def _kill_at_part(part: int, module: str, name: str) -> None:
    makes = importlib.import_module(module)
    otherwise, parts = getattr(makes, name), itertools.count(1)

    def make(*args: Any, **kwargs: Any) -> Any:
        if next(parts) == part:
            os.kill(os.getpid(), signal.SIGKILL)
        return otherwise(*args, **kwargs)

    setattr(makes, name, make)


def _nan_at(step: int) -> None:
    from alignment.training.micro_batches import MicroBatches

    otherwise = MicroBatches.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = otherwise(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == step - 1 else loss

    MicroBatches.compute_loss = compute_loss
