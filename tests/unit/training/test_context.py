"""What a process of a stage knows, and its signs of life: seeds, progress, arguments, device, layout, heartbeats."""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment import worker
from alignment.config.launch import Offload, Sharding
from alignment.config.model import Dtype, ModelConfig
from alignment.config.optim import OptimConfig, Schedule
from alignment.core.errors import ConfigError
from alignment.records.worker import Heartbeat, Progress
from alignment.stages.sft.kind import SftConfig
from alignment.training import context as context_module
from alignment.training import heartbeat
from alignment.training.context import StageContext, own_device
from alignment.training.heartbeat import HeartbeatWriter, ProcessorTime, activity
from alignment.training.optimizer import common_arguments, optimizer_arguments, quiet_arguments, share_of
from alignment.training.sharding import layout, sharding_arguments
from tests.tiny import tiny_spec


def _context(folder: Path, *, rank: int = 0, world_size: int = 1, **changes: object) -> StageContext:
    return StageContext(spec=tiny_spec(folder, SftConfig(), **changes), rank=rank, world_size=world_size)


def test_seeds_depend_on_the_seed_the_stage_the_name_and_the_numbers(tmp_path: Path) -> None:
    context = _context(tmp_path)
    others = [
        context.seed("sampling"),
        context.seed("sampling", 0),
        context.seed("sampling", 1),
        context.seed("sampling", 1, 1),
        context.seed("sampling", 11),
        context.seed("prompts", 0),
        _context(tmp_path, seed=1).seed("sampling", 0),
        _context(tmp_path, stage="other").seed("sampling", 0),
    ]
    assert len(set(others)) == len(others)
    assert context.seed("sampling", 1) == _context(tmp_path / "elsewhere", rank=1, world_size=2).seed("sampling", 1)
    assert context.generator("sampling", 1).initial_seed() == context.seed("sampling", 1)
    first, second, again = (quiet_arguments(_context(tmp_path, seed=seed))["seed"] for seed in (0, 1, 0))
    assert first == again != second


def test_progress_is_one_whole_file_that_the_main_process_writes(tmp_path: Path) -> None:
    context = _context(tmp_path)
    context.progress("training", 12, 57, loss=1.83)
    path = context.spec.work / "progress.json"
    whole = {"phase": "training", "step": 12, "total": 57, "figures": {"loss": 1.83}, "version": 1}
    assert json.loads(path.read_text()) == whole
    dataclasses.replace(context, rank=1, world_size=2).progress("saving")
    assert json.loads(path.read_text())["phase"] == "training"
    context.progress("saving")
    assert Progress.read(context.spec.work) == Progress(phase="saving")
    assert [p.name for p in context.spec.work.glob("*progress*")] == ["progress.json"]


def test_a_batch_that_does_not_divide_by_the_processes_is_an_error() -> None:
    assert share_of(12, 4) == 3
    with pytest.raises(ConfigError, match=r"10 .* 4 processes") as caught:
        share_of(10, 4)
    assert caught.value.where == "optim.batch_size"


@pytest.mark.parametrize("schedule", Schedule)
def test_every_setting_of_the_optimiser_reaches_the_trainer(tmp_path: Path, schedule: Schedule) -> None:
    context = _context(tmp_path, model=ModelConfig(source="path:tiny", dtype=Dtype.bfloat16))
    settings: dict[str, Any] = {"weight_decay": 0.125, "max_grad_norm": 0.5, "activation_checkpointing": True}
    optim = OptimConfig(
        lr=3e-4, batch_size=12, epochs=2.5, max_steps=7, schedule=schedule, warmup_ratio=0.25, adam_eps=1e-6, **settings
    )
    arguments = common_arguments(optim, context, log_every=3, save_every=9)
    names = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}  # as transformers knows them
    expected = settings | {
        "per_device_train_batch_size": 12,
        "num_train_epochs": 2.5,
        "max_steps": 7,
        "learning_rate": 3e-4,
        "lr_scheduler_type": names[schedule.value],
        "logging_steps": 3,
        "save_steps": 9,
        "bf16": True,
        "warmup_steps": 0.25,
    }
    assert {name: arguments[name] for name in expected} == expected
    of_optimiser = optimizer_arguments(optim, context, torch.nn.Linear(2, 2))[1]
    assert (of_optimiser["lr"], of_optimiser["eps"]) == (3e-4, 1e-6)
    plain = common_arguments(OptimConfig(lr=1e-4), _context(tmp_path), log_every=1, save_every=1)
    assert (plain["max_steps"], plain["bf16"]) == (-1, False)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def set_up(launcher: str | None, gpus: int, *, rank: int = 0) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.delenv("ALIGNMENT_DEVICE", raising=False)
        if launcher is not None:
            monkeypatch.setenv("ALIGNMENT_DEVICE", launcher)

    return set_up


@pytest.mark.parametrize(
    ("launcher", "gpus", "rank", "expected"),
    [("cpu", 0, 1, "cpu"), ("cuda", 4, 3, "cuda:3"), (None, 0, 0, "cpu"), (None, 2, 1, "cuda:1")],
)
def test_each_process_has_a_gpu_of_its_own_or_the_cpu(
    machine: Callable[..., None], launcher: str | None, gpus: int, rank: int, expected: str
) -> None:
    machine(launcher, gpus, rank=rank)
    assert str(own_device()) == expected


@pytest.mark.parametrize(
    ("launcher", "gpus", "rank", "message", "remedies"),
    [
        ("cpu", 2, 0, "2 GPUs", ["VISIBLE_DEVICES=0", "VISIBLE_DEVICES= ("]),
        ("cuda", 0, 0, "process 0 .* finds none", ["VISIBLE_DEVICES= ("]),
        ("cuda", 1, 1, "process 1 .* finds 1 GPU$", ["VISIBLE_DEVICES= ("]),
    ],
)
def test_a_device_that_the_launcher_did_not_find_is_refused(
    machine: Callable[..., None], launcher: str, gpus: int, rank: int, message: str, remedies: list[str]
) -> None:
    machine(launcher, gpus, rank=rank)
    with pytest.raises(ConfigError, match="(?m)" + message) as caught:
        own_device()
    assert all(remedy in caught.value.remedy for remedy in remedies)


def test_a_worker_ends_on_a_mismatch_before_anything_is_loaded(
    machine: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny_spec(tmp_path, SftConfig())
    monkeypatch.setattr(worker, "read_spec", lambda path: spec)
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    monkeypatch.setattr(worker, "function_of", lambda kind: pytest.fail("a stage began"))
    machine("cpu", 1)
    assert worker.main(tmp_path / "stage.yaml") == 2
    assert "PyTorch finds 1 GPU" in json.loads((spec.run_folder / "status.json").read_text())["error"]


def _shared(context: StageContext, sharding: Sharding, offload: Offload = Offload.none) -> StageContext:
    spec = dataclasses.replace(context.spec, sharding=sharding, offload=offload)
    return dataclasses.replace(context, spec=spec, world_size=2)


def test_a_layout_names_the_processes_and_how_they_share(context: StageContext) -> None:
    assert layout(_shared(context, Sharding.none)) == "whole weights"
    assert layout(_shared(context, Sharding.zero2)) == "shares of 2 processes (zero2)"
    assert layout(_shared(context, Sharding.fsdp)) == "shares of 2 processes (fsdp)"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("offload", [Offload.none, Offload.weights])
def test_fsdp_moves_weights_to_the_host_where_they_are_elsewhere(
    context: StageContext, monkeypatch: pytest.MonkeyPatch, offload: Offload, device: str
) -> None:
    monkeypatch.setattr(context_module, "own_device", lambda: torch.device(device))
    arguments = sharding_arguments(_shared(context, Sharding.fsdp, offload))
    assert arguments["fsdp"] is True
    assert arguments["fsdp_config"]["cpu_offload"] is (offload is Offload.weights and device == "cuda")


@pytest.fixture
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "PERIOD", 0.1)
    monkeypatch.setattr(heartbeat, "IDLE", 0.5)  # looking so often takes some of the processor itself


@pytest.fixture
def watched(
    tmp_path: Path, _often: None
) -> Iterator[Callable[[Callable[[HeartbeatWriter, threading.Event], None]], Any]]:
    over = threading.Event()
    threads = []

    def watch(work: Callable[[HeartbeatWriter, threading.Event], None]) -> Any:
        writer = HeartbeatWriter(phase="training")

        def run() -> None:
            writer.start(tmp_path, 3)
            work(writer, over)

        threads.append(threading.Thread(target=run))
        threads[0].start()
        time.sleep(1.2)
        return Heartbeat.read_all(tmp_path)[3]

    yield watch
    over.set()
    threads[0].join()


def test_a_thread_that_waits_has_done_nothing_since(watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "processor_seconds", lambda process: ProcessorTime())  # else that of pytest, too
    sign = watched(lambda _, over: over.wait())
    assert sign.time - sign.since > 0.5
    assert sign.phase == "training"
    assert "threading.py" in sign.location
    assert not sign.waits


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_processor_that_is_busy_is_work_unless_a_gpu_may_be_waited_for(
    watched: Any, monkeypatch: pytest.MonkeyPatch, on_gpu: bool
) -> None:
    """A host that waits for a GPU spins, inside one call."""
    looks = itertools.count(1)
    monkeypatch.setattr(heartbeat, "call_stack", lambda frame: [("run.py", 7, "step")])
    monkeypatch.setattr(heartbeat, "processor_seconds", lambda process: ProcessorTime(own=0.2 * next(looks)))

    def compute(writer: HeartbeatWriter, over: threading.Event) -> None:
        writer.on_gpu = on_gpu
        over.wait()

    sign = watched(compute)
    assert (sign.time > sign.since) is on_gpu
    assert sign.waits is on_gpu


def test_what_a_function_held_is_free_when_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame that the watching thread kept would keep its variables too, such as the activations of a pass."""
    heartbeats = heartbeat.heartbeat_file(tmp_path, 3)
    monkeypatch.setattr(heartbeat, "PERIOD", 30.0)
    held: list[weakref.ref[set[int]]] = []

    def hold() -> None:
        activations = {1}
        held.append(weakref.ref(activations))
        while not heartbeats.exists():
            time.sleep(0.01)

    HeartbeatWriter().start(tmp_path, 3)
    hold()
    assert held[0]() is None


SOMEWHERE, COLLECTIVE = [("run.py", 7, "step")], [("/site-packages/torch/distributed/c10d.py", 1, "all_reduce")]


@pytest.mark.parametrize(
    ("stack", "used", "on_gpu", "works", "waits"),
    [
        (SOMEWHERE, ProcessorTime(own=0.25), False, True, False),
        (SOMEWHERE, ProcessorTime(own=0.25), True, False, True),
        (SOMEWHERE, ProcessorTime(started=0.25), True, True, False),  # rows made by processes of its own
        (COLLECTIVE, ProcessorTime(own=0.25), False, False, True),
    ],
)
def test_the_processor_says_nothing_of_who_may_spin(
    stack: Any, used: ProcessorTime, on_gpu: bool, works: bool, waits: bool
) -> None:
    assert activity(stack, used, on_gpu=on_gpu) == (works, waits)
