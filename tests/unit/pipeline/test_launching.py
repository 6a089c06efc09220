"""How a stage is launched here and on further machines, and what cannot be launched."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from rich.console import Console

from alignment.config.data import PtxConfig
from alignment.config.launch import LaunchConfig, LauncherKind, MachinesBackend, Offload, Sharding, SlurmBackend
from alignment.config.model import AdapterConfig, AdapterKind
from alignment.config.optim import Moments, OptimConfig
from alignment.config.run import RunConfig
from alignment.config.stage import StageConfig
from alignment.core.artifacts import Manifest, publish
from alignment.core.errors import ConfigError, StageError
from alignment.core.files import shipped
from alignment.core.hardware import visible_devices
from alignment.pipeline.backends import command, feasibility, machines, processes, slurm_jobs
from alignment.pipeline.backends.command import Command, idle_threads, with_processes
from alignment.pipeline.execute.signals import Terminated
from alignment.pipeline.plan.actions import Action
from alignment.pipeline.plan.settings import combination_faults
from alignment.stages.benchmark.kind import BenchmarkConfig
from alignment.stages.evaluate.kind import EvaluateConfig
from alignment.stages.forgetting.kind import ForgettingConfig
from alignment.stages.ppo.config import PpoConfig
from alignment.stages.report.kind import ReportConfig
from alignment.stages.reward_card.kind import RewardCardConfig
from alignment.stages.sample.kind import SampleConfig
from alignment.stages.sft.kind import SftConfig
from tests.living import wait_until

ROOT = Path(__file__).parents[3]
TWO_MACHINES = MachinesBackend()


STAGE_FILE = Path("/runs/r/dpo/stage.yaml")
WORKER = f"-m alignment.worker {STAGE_FILE}"
ACCELERATE = "-m accelerate.commands.launch --config_file {} --num_processes {}"
TORCHRUN = "-m torch.distributed.run --standalone --nnodes 1 --nproc_per_node {}"
LOCAL, DDP = (str(shipped("launch") / "accelerate" / name) for name in ("local.yaml", "ddp.yaml"))
MEETING = "-m torch.distributed.run --nnodes 2 --node_rank 1 --master_addr 10.0.0.1 --master_port 4000"
SECOND = MachinesBackend(machine_rank=1, main_address="10.0.0.1", main_port=4000)


def argv(launch: LaunchConfig, *, num_devices: int) -> str:
    made = command.of_stage(launch, STAGE_FILE, devices=[str(number) for number in range(num_devices)], num_cores=8)
    assert made.argv[0] == sys.executable
    return " ".join(made.argv[1:])


@pytest.mark.parametrize(
    ("settings", "devices", "expected"),
    [
        ({}, 0, WORKER),
        ({"kind": LauncherKind.accelerate}, 0, f"{ACCELERATE.format(LOCAL, 1)} --cpu {WORKER}"),
        ({"num_processes": 4}, 4, f"{ACCELERATE.format(DDP, 4)} --main_process_port 0 {WORKER}"),
        ({"num_processes": 2}, 0, f"{TORCHRUN.format(2)} {WORKER}"),
        ({"sharding": Sharding.zero3}, 1, f"{TORCHRUN.format(1)} {WORKER}"),
        ({"num_processes": 8, "backend": SECOND}, 8, f"{MEETING} --nproc_per_node 8 {WORKER}"),
    ],
)
def test_the_launcher_suits_the_machine(settings: dict[str, Any], devices: int, expected: str) -> None:
    assert argv(LaunchConfig(**settings), num_devices=devices) == expected


@pytest.mark.parametrize(
    ("kind", "settings", "devices", "why"),
    [
        ("accelerate", {"num_processes": 2}, 0, "accelerate starts only one process"),
        ("direct", {"num_processes": 2}, 2, "2 processes need a launcher"),
    ],
)
def test_what_a_launcher_does_not_start_is_refused(kind: str, settings: dict[str, Any], devices: int, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        argv(LaunchConfig(kind=LauncherKind(kind), **settings), num_devices=devices)
    assert "launch.kind=torchrun" in caught.value.remedy


def test_one_process_for_each_gpu_is_counted_and_refused_without_enough() -> None:
    launch = LaunchConfig(num_processes=0, backend=TWO_MACHINES)
    counted = with_processes(launch, num_devices=4)
    assert (counted.num_processes, counted.world_size) == (4, 8)
    assert with_processes(LaunchConfig(num_processes=3), num_devices=4).num_processes == 3
    with pytest.raises(ConfigError, match="this machine has no GPU") as caught:
        with_processes(launch, num_devices=0)
    assert "launch.num_processes=2" in caught.value.remedy
    with pytest.raises(ConfigError, match="4 processes, but this machine has 2 GPUs"):
        argv(LaunchConfig(num_processes=4), num_devices=2)


def test_threads_are_shared_out_evenly_unless_a_number_is_set() -> None:
    for number, threads, expected in ((1, 0, "8"), (2, 0, "4"), (16, 0, "1"), (2, 3, "3")):
        launch = LaunchConfig(num_processes=number, threads=threads)
        made = command.of_stage(launch, STAGE_FILE, devices=(), num_cores=8)
        assert made.environment["OMP_NUM_THREADS"] == expected


GPUS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


@pytest.mark.parametrize(
    ("chosen", "processes", "expected"),
    [
        ({}, 2, {"CUDA_VISIBLE_DEVICES": "0,1"}),
        ({"CUDA_VISIBLE_DEVICES": "5,2,7"}, 2, {"CUDA_VISIBLE_DEVICES": "5,2"}),
        ({"HIP_VISIBLE_DEVICES": "3,1"}, 1, {"HIP_VISIBLE_DEVICES": "3"}),
        ({"CUDA_VISIBLE_DEVICES": ""}, 1, {}),
    ],
)
def test_a_worker_sees_as_many_gpus_as_there_are_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str], processes: int, expected: dict[str, str]
) -> None:
    (tmp_path / "dev").mkdir()
    for number in range(4):
        (tmp_path / f"dev/nvidia{number}").touch()
    for name in GPUS:
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    devices = visible_devices(root=tmp_path)
    made = command.of_stage(LaunchConfig(num_processes=processes), STAGE_FILE, devices=devices, num_cores=8).environment
    assert {name: made[name] for name in GPUS if name in made} == expected
    assert made["ALIGNMENT_DEVICE"] == ("cuda" if expected else "cpu")


WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@pytest.mark.parametrize("chosen", [None, *WAITING])
def test_a_worker_s_defaults_leave_what_the_user_has_set(monkeypatch: pytest.MonkeyPatch, chosen: str | None) -> None:
    for name in WAITING:
        monkeypatch.delenv(name, raising=False)
    if chosen is not None:
        monkeypatch.setenv(chosen, "1000")
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    variables = command.of_worker(2, "/theirs")
    policies = {name: variables[name] for name in WAITING if name in variables}
    assert policies == (idle_threads() if chosen is None else {})
    assert "MALLOC_TOP_PAD_" not in variables
    memory = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
    assert {*memory, "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"} <= set(variables)
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    silent = ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "MALLOC_ARENA_MAX")
    assert {variables[name] for name in (*offline, *silent)} == {"1"}
    assert variables["PYTHONPATH"] == f"{ROOT}:/theirs"


def test_how_soon_idle_threads_sleep_is_what_was_measured_for_the_processor(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    assert idle_threads(file) == {"OMP_WAIT_POLICY": "PASSIVE"}, "no such file, as on a Mac"
    for vendor, expected in (
        ("GenuineIntel", {"OMP_WAIT_POLICY": "PASSIVE"}),
        ("AuthenticAMD", {"GOMP_SPINCOUNT": "1000"}),
    ):
        file.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu\n")
        assert idle_threads(file) == expected


def stage(config: Any, *, has_to_run: bool = True) -> Any:
    return SimpleNamespace(name="it", config=config, has_to_run=has_to_run, seen={})


def refuse(*stages: Any, num_devices: int = 0, **launch: Any) -> None:
    feasibility.refuse_what_cannot_start(LaunchConfig(**launch), stages, num_devices=num_devices)


SFT, JUDGED = SftConfig(), EvaluateConfig(arms=["base"])
PAGED = SftConfig(optim=OptimConfig(lr=1e-4, moments=Moments.paged_eight_bit))
EIGHT, SIX = (SftConfig(optim=OptimConfig(lr=1e-4, batch_size=size)) for size in (8, 6))


def test_what_this_machine_cannot_start_is_refused_unless_it_is_reused() -> None:
    with pytest.raises(ConfigError, match="paging needs a GPU") as caught:
        refuse(stage(PAGED))
    assert caught.value.where == "stages.it.optim.moments"
    refuse(stage(PAGED), num_devices=1)
    refuse(stage(PAGED, has_to_run=False))
    refuse(stage(EIGHT), num_processes=2, backend=TWO_MACHINES)
    with pytest.raises(ConfigError, match="6 is not divisible by 4 processes") as caught:
        refuse(stage(EIGHT), stage(SIX), num_processes=2, backend=TWO_MACHINES)
    assert caught.value.where == "stages.it.optim.batch_size"


def test_libraries_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"trl", "peft"}
    monkeypatch.setattr(feasibility.importlib.util, "find_spec", lambda name: None if name in absent else name)
    with pytest.raises(ConfigError, match=r"launch: stages need trl, peft"):
        refuse(stage(SFT))
    absent = {"deepspeed"}
    with pytest.raises(ConfigError, match="zero2 needs DeepSpeed") as caught:
        refuse(stage(SFT), sharding=Sharding.zero2)
    assert "pip install 'deepspeed" in caught.value.remedy
    refuse(stage(SFT), num_processes=2)
    refuse(stage(JUDGED), sharding=Sharding.zero2)


def test_a_stage_that_measures_runs_on_all_processes_without_sharding_and_others_on_one_or_none() -> None:
    sharded = {"sharding": Sharding.zero3, "offload": Offload.weights}
    launch = LaunchConfig(num_processes=0, backend=TWO_MACHINES, threads=3, **sharded)  # type: ignore[arg-type]
    expected = LaunchConfig(num_processes=4, backend=TWO_MACHINES, threads=3)
    for config in (JUDGED, RewardCardConfig(), ForgettingConfig(arms=["stage:sft"]), SampleConfig(policy="base")):
        assert feasibility.of_stage(launch, config, num_devices=4) == expected
    trained = feasibility.of_stage(launch, SFT, num_devices=4)
    assert (trained.num_processes, trained.sharding, trained.offload) == (4, Sharding.zero3, Offload.weights)
    for config in (JUDGED, SFT):
        with pytest.raises(ConfigError, match="2 processes, but this machine has 1 GPU"):
            refuse(stage(config), num_processes=2, num_devices=1)
        with pytest.raises(ConfigError, match="this machine has no GPU"):
            refuse(stage(config), num_processes=0)
    benchmark = BenchmarkConfig(arms=["base"])
    assert feasibility.of_stage(launch, benchmark, num_devices=1) == LaunchConfig(threads=3)
    refuse(stage(benchmark), num_processes=2, num_devices=1)
    refuse(stage(ReportConfig()), num_processes=0)


def compatibility(stage: StageConfig, **launch: Any) -> dict[str, str]:
    run = RunConfig(name="r", stages={"s": stage}, launch=LaunchConfig(**launch))
    return {fault.where: fault.message for fault in combination_faults(run)}


def adapter(kind: str, **more: Any) -> SftConfig:
    return SftConfig(adapter=AdapterConfig(kind=AdapterKind(kind), **more))


REPLAY = PpoConfig(ptx=PtxConfig(coefficient=0.1))


@pytest.mark.parametrize(
    ("stage", "launch", "where", "why"),
    [
        (adapter("full", master_weights=False), "zero1", "adapter.master_weights", "stochastic rounding"),
        (adapter("dora", modules_to_save=["embed_tokens"]), "fsdp", "adapter.modules_to_save", "stochastic rounding"),
        (SftConfig(optim=OptimConfig(lr=1e-4, moments=Moments.eight_bit)), "zero2", "optim.moments", "eight-bit"),
        (PpoConfig(critic_warmup=2), "zero2", "critic_warmup", "DeepSpeed"),
        (PpoConfig(drop_ties=True), "fsdp", "drop_ties", "sharded checkpoints"),
        (REPLAY, "zero3", "ptx.coefficient", "forward passes"),
    ],
)
def test_a_stage_that_cannot_be_launched_so_is_refused(stage: StageConfig, launch: str, where: str, why: str) -> None:
    ((fault_key, message),) = compatibility(stage, sharding=Sharding(launch)).items()
    assert fault_key == f"stages.s.{where}"
    assert f"launch={launch}: " in message
    assert (why in message, "; use " in message) == (True, True)
    assert compatibility(stage) == {}


def test_a_machine_that_is_not_among_them_is_refused() -> None:
    assert compatibility(SFT, backend=MachinesBackend(machine_rank=1)) == {}
    assert list(compatibility(SFT, backend=MachinesBackend(machine_rank=2))) == ["launch.backend.machine_rank"]


def test_a_job_finds_the_gpus_that_it_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feasibility.hardware, "count_devices", lambda: 1)
    backends = (SlurmBackend(gpus=8), SlurmBackend(gpus=8, submit=False), TWO_MACHINES)
    assert [feasibility.devices_for(LaunchConfig(backend=backend)) for backend in backends] == [8, 1, 1]


LAUNCH = LaunchConfig(backend=MachinesBackend(machine_rank=1), grace_seconds=7)


class Shared:
    """A folder that two machines share, with one stage to make."""

    def __init__(self, folder: Path) -> None:
        self.stage = SimpleNamespace(
            name="sft",
            config=SftConfig(),
            action=Action.run,
            artifact=folder / "artifacts" / "sft-01234567",
            fingerprint="0" * 64,
        )
        alone = SimpleNamespace(name="tasks", config=BenchmarkConfig(), action=Action.run, artifact=folder / "never")
        config = SimpleNamespace(launch=LAUNCH)
        self.plan: Any = SimpleNamespace(
            run_folder=folder / "runs" / "r", stages=(self.stage, alone), config=config, store=None
        )
        (self.plan.run_folder / "sft").mkdir(parents=True)
        self.started = folder / "started"
        self.content = folder / "content"
        self.content.mkdir()

    def says(self, state: str) -> None:
        (self.plan.run_folder / "run.json").write_text(json.dumps({"state": state}))

    def publish(self) -> None:
        (self.content / "metrics.jsonl").touch()
        publish(
            self.content, self.stage.artifact, Manifest(stage="sft", kind="policy", fingerprint="0" * 64, identity={})
        )

    def command(self, launch: LaunchConfig, stage_file: Path) -> Command:
        assert stage_file == self.plan.run_folder / "sft" / "stage.yaml"
        code = f"open({str(self.started)!r}, 'a').write('{launch.backend.machine_rank}\\n')"
        return Command(argv=(sys.executable, "-c", code), environment={})

    def follow(self) -> int:
        return machines.follow(self.plan, self.plan.stages, console=Console(quiet=True), command_for=self.command)

    def starts(self) -> int:
        return len(self.started.read_text().splitlines()) if self.started.exists() else 0


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shared:
    monkeypatch.setattr(slurm_jobs, "_SHOWN_LATE_SECONDS", 0.2)
    monkeypatch.setattr(slurm_jobs, "_POLL_SECONDS", 0.01)
    return Shared(tmp_path)


@pytest.fixture
def folder(shared: Shared) -> Path:
    return Path(shared.plan.run_folder / "sft")


@contextmanager
def following(shared: Shared) -> Iterator[threading.Thread]:
    codes: list[int] = []
    follower = machines._Follower(shared.plan, shared.stage, shared.command, Console())
    thread = threading.Thread(target=lambda: codes.append(follower.follow()))
    thread.start()
    yield thread
    shared.publish()
    thread.join(30)
    assert codes == [0]


def test_each_attempt_is_answered_once(shared: Shared, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execute = mock.Mock(side_effect=processes.execute)
    monkeypatch.setattr(processes, "execute", execute)
    with following(shared):
        for attempt in (1, 2):
            with machines.announced(folder, LAUNCH, "0" * 64):
                wait_until(lambda attempt=attempt: shared.starts() == attempt)
    assert shared.starts() == 2
    assert [call.kwargs["grace_seconds"] for call in execute.call_args_list] == [7, 7]
    begun = (folder / "log-1.txt").read_text().splitlines()
    assert [line.partition("  ")[2] for line in begun] == ["attempt at sft-01234567 ==="] * 2
    assert not (folder / machines.ATTEMPT).exists()


def test_an_attempt_of_a_first_machine_that_was_killed_is_not_answered(shared: Shared, folder: Path) -> None:
    """It had other settings, and the first machine does not live until it announces an attempt of its own."""
    with machines.showing_life(shared.plan.run_folder, LAUNCH):
        pass
    with machines.announced(folder, LAUNCH, "1" * 64):
        killed = (folder / machines.ATTEMPT).read_text()
    (folder / machines.ATTEMPT).write_text(killed)
    with following(shared) as follower:
        time.sleep(3 * machines._POLL_SECONDS)
        assert follower.is_alive()
        with machines.announced(folder, LAUNCH, "0" * 64):
            wait_until(lambda: shared.starts() == 1)


@pytest.mark.parametrize(("state", "code"), [("preempted", 75), ("interrupted", 130)])
def test_it_ends_as_the_first_does(shared: Shared, state: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    remaining = iter(("running", state))
    monkeypatch.setattr(machines, "_state", lambda _: next(remaining))
    assert shared.follow() == code


@pytest.mark.parametrize(("state", "code"), [("running", 75), ("interrupted", 75), ("failed", 5), ("", 5)])
def test_asked_to_stop_it_is_queued_again_only_with_a_run_at_work(
    shared: Shared, state: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: machines._Follower) -> int:
        raise Terminated

    shared.says(state)
    monkeypatch.setattr(machines._Follower, "follow", stopped)
    assert shared.follow() == code


def test_a_machine_with_another_plan_is_refused(shared: Shared, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lives, is_refused = machines.showing_life(shared.plan.run_folder, LAUNCH), "produces a different result"
    with machines.announced(folder, LAUNCH, "1" * 64), lives, pytest.raises(ConfigError, match=is_refused):
        shared.follow()
    assert shared.starts() == 0
    remaining = iter(("running", "done"))
    monkeypatch.setattr(machines, "_state", lambda _: next(remaining))
    with pytest.raises(ConfigError, match=is_refused):
        shared.follow()


def test_no_machine_waits_for_one_that_is_gone(shared: Shared) -> None:
    shared.says("running")
    shared.plan.config.launch = replace(LAUNCH, hang_seconds=1)
    with pytest.raises(StageError, match="the first machine has not responded for 1 seconds"):
        shared.follow()
    with machines.showing_life(shared.plan.run_folder.parent, LaunchConfig()):
        time.sleep(0.1)
    assert not (shared.plan.run_folder.parent / machines.LIFE).exists(), "there is no other machine"


def test_other_machines_wait_until_the_first_has_uploaded(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher may end the first one soon after another has ended."""
    shared.publish()
    shared.says("running")
    shared.plan.store = object()
    shared.plan.config.launch = replace(LAUNCH, hang_seconds=1)
    monkeypatch.setattr(machines, "_POLL_SECONDS", 0.05)
    codes: list[int] = []
    with machines.showing_life(shared.plan.run_folder, LAUNCH):
        follower = threading.Thread(target=lambda: codes.append(shared.follow()))
        follower.start()
        follower.join(1.5)
        assert follower.is_alive()
        shared.says("done")
        follower.join(30)
    shared.says("running")
    assert (codes, shared.follow()) == ([0], 0), "the first machine is gone"
