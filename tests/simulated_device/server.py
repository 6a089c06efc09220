"""Stages on the simulated device: ``python -m tests.simulated_device -m tests.simulated_device.server``. Reads requests
from stdin, each a line of JSON, and answers each with the line of an ``Outcome``. Each has a process of its own, forked
from this one, which has imported everything and computed nothing."""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import os
import socket
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers.trainer
from transformers import TrainerCallback

from alignment import worker
from alignment.job import StageSpec
from alignment.models.forward.decoding import DecodingRows
from alignment.stages.registry import kinds
from tests.simulated_device.client import Outcome, outcome_of
from tests.simulated_device.events import Event, events
from tests.simulated_device.stages import KINDS, Cell, run_spec, run_stage, spec_of


class Steps(TrainerCallback):
    after: ClassVar[list[Counter[Event]]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.after.append(events.copy())


class Decoding:
    tokens: ClassVar[int] = 0

    @classmethod
    def begin(cls) -> None:
        next_tokens = DecodingRows.next_tokens

        def counted(rows: DecodingRows, temperature: float) -> torch.Tensor:
            cls.tokens += 1
            return next_tokens(rows, temperature)

        DecodingRows.next_tokens = counted  # type: ignore[method-assign]


def _serve() -> None:
    for kind in KINDS:
        importlib.import_module(kinds()[kind].run.partition(":")[0])
    transformers.trainer.DEFAULT_CALLBACKS.append(Steps)
    Decoding.begin()
    worker._silence_libraries()
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "outcome.json"
            _in_child(lambda request=request, folder=folder: _outcome(request, Path(folder)), answer)
            print(_read(answer).to_json(), flush=True)


def _read(answer: Path) -> Outcome:
    return outcome_of(answer.read_text()) if answer.exists() else Outcome(error="the process ended without a word")


def _outcome(request: dict[str, Any], folder: Path) -> Outcome:
    error, names = "", {"torch": torch}
    world_size = request.get("processes", 1)
    try:
        if "code" in request:
            exec(request["code"], names)  # the code of a test
        elif world_size > 1:
            return _of_several(spec_of(Cell(**request["cell"]), folder), folder, world_size)
        else:
            run_stage(Cell(**request["cell"]), folder)
    except BaseException:  # noqa: BLE001  the test fails with it
        error = traceback.format_exc()
    after = Steps.after
    steps = [second - first for first, second in itertools.pairwise(after)]
    return Outcome(error=error, events=events.copy(), steps=steps, decoded=Decoding.tokens, result=names.get("result"))


def _of_several(spec: StageSpec, folder: Path, world_size: int) -> Outcome:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = [folder / f"outcome-{rank}.json" for rank in range(world_size)]
    children = []
    for rank, answer in enumerate(answers):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        children.append(
            _begun(lambda rank=rank, variables=variables: _of_rank(spec, rank, world_size, variables), answer)
        )
    for child in children:
        os.waitpid(child, 0)
    outcomes = [_read(answer) for answer in answers]
    return Outcome(
        error="\n".join(f"process {rank}: {outcome.error}" for rank, outcome in enumerate(outcomes) if outcome.error),
        events=sum((Counter(outcome.events) for outcome in outcomes), Counter()),
    )


def _of_rank(spec: StageSpec, rank: int, world_size: int, variables: dict[str, Any]) -> Outcome:
    os.environ.update({name: str(value) for name, value in variables.items()})
    error = ""
    try:
        run_spec(spec, rank=rank, world_size=world_size)
    except BaseException:  # noqa: BLE001  the test fails with it
        error = traceback.format_exc()
    return Outcome(error=error, events=events.copy())


def _in_child(work: Callable[[], Outcome], answer: Path) -> None:
    os.waitpid(_begun(work, answer), 0)


def _begun(work: Callable[[], Outcome], answer: Path) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a stage prints is no answer
    try:
        answer.write_text(work().to_json())
    finally:
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    _serve()
