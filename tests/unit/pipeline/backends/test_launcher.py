"""The command that runs a stage, and that nothing of it outlives the call."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from alignment.config.launch import LaunchConfig, LauncherKind, Sharding
from alignment.core.errors import ConfigError
from alignment.core.hardware import visible_devices
from alignment.core.locks import held, is_held
from alignment.core.resources import shipped
from alignment.pipeline.backends.launcher import Command, command, execute, idle_threads, with_processes

STAGE_FILE = Path("/runs/r/dpo/stage.yaml")


def argv(launch: LaunchConfig, *, num_devices: int) -> str:
    made = command(launch, STAGE_FILE, devices=[str(number) for number in range(num_devices)], num_cores=8)
    assert made.argv[0] == sys.executable
    return " ".join(made.argv[1:])


WORKER = "-m alignment.worker /runs/r/dpo/stage.yaml"
ACCELERATE = "-m accelerate.commands.launch --config_file {} --num_processes {}"
TORCHRUN = "-m torch.distributed.run --standalone --nnodes 1 --nproc_per_node {}"
LOCAL, DDP = (str(shipped("launch") / "accelerate" / name) for name in ("local.yaml", "ddp.yaml"))


@pytest.mark.parametrize(
    ("told", "devices", "expected"),
    [
        ({}, 0, f"{ACCELERATE.format(LOCAL, 1)} --cpu {WORKER}"),
        ({"num_processes": 2}, 0, f"{TORCHRUN.format(2)} {WORKER}"),
        ({}, 4, f"{ACCELERATE.format(LOCAL, 1)} {WORKER}"),
        ({"num_processes": 4}, 4, f"{ACCELERATE.format(DDP, 4)} --main_process_port 0 {WORKER}"),
        ({"kind": LauncherKind.torchrun}, 0, f"{TORCHRUN.format(1)} {WORKER}"),
        ({"kind": LauncherKind.torchrun, "num_processes": 4}, 4, f"{TORCHRUN.format(4)} {WORKER}"),
        ({"sharding": Sharding.zero2, "num_processes": 4}, 4, f"{TORCHRUN.format(4)} {WORKER}"),
        ({"sharding": Sharding.zero3}, 1, f"{TORCHRUN.format(1)} {WORKER}"),
        ({"sharding": Sharding.fsdp, "num_processes": 2}, 0, f"{TORCHRUN.format(2)} {WORKER}"),
        (
            {"num_processes": 8, "num_machines": 2, "machine_rank": 1, "main_address": "10.0.0.1", "main_port": 4000},
            8,
            "-m torch.distributed.run --nnodes 2 --node_rank 1 --master_addr 10.0.0.1 --master_port 4000 "
            f"--nproc_per_node 8 {WORKER}",
        ),
    ],
)
def test_the_launcher_suits_the_machine(told: dict[str, Any], devices: int, expected: str) -> None:
    assert argv(LaunchConfig(**told), num_devices=devices) == expected


@pytest.mark.parametrize(
    ("told", "devices", "why"),
    [
        ({"kind": "accelerate", "num_processes": 2}, 0, "accelerate starts one process"),
        ({"kind": "accelerate", "sharding": "zero2"}, 1, "zero2 needs a process group"),
        ({"kind": "accelerate", "num_machines": 2}, 1, "several machines are started by torchrun"),
    ],
)
def test_what_a_launcher_does_not_start_is_refused(told: dict[str, Any], devices: int, why: str) -> None:
    kinds = {"kind": LauncherKind, "sharding": Sharding}
    launch = LaunchConfig(**{name: kinds.get(name, int)(value) for name, value in told.items()})
    with pytest.raises(ConfigError, match=why) as caught:
        argv(launch, num_devices=devices)
    assert "launch.kind=torchrun" in caught.value.remedy


def test_one_process_for_each_gpu_is_counted_and_refused_without_any() -> None:
    launch = LaunchConfig(num_processes=0, num_machines=2)
    assert with_processes(launch, num_devices=4).num_processes == 4
    assert with_processes(launch, num_devices=4).world_size == 8
    assert with_processes(LaunchConfig(num_processes=3), num_devices=4).num_processes == 3
    with pytest.raises(ConfigError, match="this machine has none") as caught:
        with_processes(launch, num_devices=0)
    assert "launch.num_processes=2" in caught.value.remedy


def test_what_the_user_has_set_for_the_allocator_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    environment = command(LaunchConfig(), Path("stage.yaml"), devices=(), num_cores=2).environment
    assert "MALLOC_TOP_PAD_" not in environment
    assert {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"} <= set(environment)


WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@pytest.mark.parametrize("chosen", [None, *WAITING])
def test_idle_threads_of_a_worker_sleep_unless_the_user_chose_otherwise(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    for name in WAITING:
        monkeypatch.delenv(name, raising=False)
    if chosen is not None:
        monkeypatch.setenv(chosen, "1000")
    environment = command(LaunchConfig(), STAGE_FILE, devices=(), num_cores=2).environment
    policies = {name: environment[name] for name in WAITING if name in environment}
    assert policies == (idle_threads() if chosen is None else {})


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("vendor_id\t: GenuineIntel\n", {"OMP_WAIT_POLICY": "PASSIVE"}),
        ("vendor_id\t: AuthenticAMD\n", {"GOMP_SPINCOUNT": "1000"}),
        (None, {"OMP_WAIT_POLICY": "PASSIVE"}),  # no such file, as on a Mac
    ],
)
def test_how_soon_idle_threads_sleep_is_what_was_measured_for_the_processor(
    tmp_path: Path, cpuinfo: str | None, expected: dict[str, str]
) -> None:
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(f"processor\t: 0\n{cpuinfo}flags\t\t: fpu\n")
    assert idle_threads(file) == expected


def test_more_processes_than_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match="4 processes, but this machine has 2 GPUs"):
        argv(LaunchConfig(num_processes=4), num_devices=2)


@pytest.mark.parametrize(("processes", "threads", "expected"), [(1, 0, "8"), (2, 0, "4"), (16, 0, "1"), (2, 3, "3")])
def test_threads_are_shared_out_evenly_unless_told(processes: int, threads: int, expected: str) -> None:
    made = command(LaunchConfig(num_processes=processes, threads=threads), STAGE_FILE, devices=(), num_cores=8)
    assert made.environment["OMP_NUM_THREADS"] == expected


def test_the_worker_is_offline_and_finds_our_package_first() -> None:
    made = command(LaunchConfig(), STAGE_FILE, devices=(), num_cores=1, pythonpath="/theirs").environment
    assert made["HF_HUB_OFFLINE"] == made["TRANSFORMERS_OFFLINE"] == made["HF_DATASETS_OFFLINE"] == "1"
    assert made["PYTHONPATH"] == f"{Path(__file__).parents[4]}:/theirs"


def test_gpus_are_those_that_the_user_names_or_else_all(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    assert visible_devices({}, tmp_path) == ["0", "1"]
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "1"}, tmp_path) == ["1"]
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "3, GPU-a,-1,2"}, tmp_path) == ["3", "GPU-a"]
    assert visible_devices({"HIP_VISIBLE_DEVICES": "2,3"}, tmp_path) == ["2", "3"]
    assert visible_devices({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []


def test_gpus_of_amd_are_counted_without_the_processors_beside_them(tmp_path: Path) -> None:
    for number, simds in enumerate((0, 256, 1024)):
        node = tmp_path / f"sys/class/kfd/kfd/topology/nodes/{number}"
        node.mkdir(parents=True)
        (node / "properties").write_text(f"cpu_cores_count {8 * (not simds)}\nsimd_count {simds}\n")
    assert visible_devices({}, tmp_path) == []
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kfd").touch()
    assert visible_devices({}, tmp_path) == ["0", "1"]


def test_gpus_under_windows_are_those_that_nvidias_tool_lists(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/dxg").touch()
    assert visible_devices({}, tmp_path) == []  # a GPU of another make
    tool = tmp_path / "usr/lib/wsl/lib/nvidia-smi"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\n[ $1 = -L ] && printf 'GPU 0: A (UUID: GPU-1)\\nGPU 1: B (UUID: GPU-2)\\n'\n")
    tool.chmod(0o755)
    assert visible_devices({}, tmp_path) == ["0", "1"]


@pytest.mark.parametrize(
    ("chosen", "processes", "expected"),
    [
        ({}, 1, {"CUDA_VISIBLE_DEVICES": "0"}),
        ({}, 2, {"CUDA_VISIBLE_DEVICES": "0,1"}),
        ({"CUDA_VISIBLE_DEVICES": "5,2,7"}, 2, {"CUDA_VISIBLE_DEVICES": "5,2"}),
        ({"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, 1, {"CUDA_VISIBLE_DEVICES": "GPU-a"}),
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
    names = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    devices = visible_devices(root=tmp_path)
    made = command(LaunchConfig(num_processes=processes), STAGE_FILE, devices=devices, num_cores=8).environment
    assert {name: made[name] for name in names if name in made} == expected
    assert made["ALIGNMENT_DEVICE"] == ("cuda" if expected else "cpu")


def python(code: str) -> Command:
    return Command(argv=(sys.executable, "-c", code), environment={"PYTHONUNBUFFERED": "1"})


def never() -> None:
    """Polled; does nothing."""


def test_output_is_appended_to_the_log_and_the_exit_code_returned(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert execute(python("print('one')"), log=log, on_poll=never, grace_seconds=1) == 0
    assert execute(python("import sys; sys.exit('two')"), log=log, on_poll=never, grace_seconds=1) == 1
    assert log.read_text() == "one\ntwo\n"
    assert execute(python("import os; os.kill(os.getpid(), 9)"), log=log, on_poll=never, grace_seconds=1) == -9


# A launcher that dies at SIGTERM, and a worker in a session of its own that takes a moment to save.
LAUNCHER = """
import subprocess, sys
subprocess.run([sys.executable, "-c", {worker!r}], start_new_session=True)
"""
SAVES = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(0.3)
    pathlib.Path({saved!r}).write_text("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
pathlib.Path({ready!r}).touch()
time.sleep(60)
"""
STUBBORN = """
import os, pathlib, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path({ready!r} + ".new").write_text(str(os.getpid()))
os.replace({ready!r} + ".new", {ready!r})
time.sleep(60)
"""


def unheard(_: BaseException) -> None:
    """Called at an interruption where nobody asks."""


def interrupted(
    tmp_path: Path, worker: str, *, grace_seconds: float, on_stop: Callable[[BaseException], None] = unheard
) -> float:
    """Runs a launcher with ``worker`` under it, interrupts once it is ready, and returns the seconds that took."""
    ready = tmp_path / "ready"

    def on_poll() -> None:
        if ready.exists():
            raise KeyboardInterrupt

    code = LAUNCHER.format(worker=worker.format(saved=str(tmp_path / "saved"), ready=str(ready)))
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        execute(python(code), log=tmp_path / "log.txt", on_poll=on_poll, on_stop=on_stop, grace_seconds=grace_seconds)
    return time.monotonic() - started


def test_an_interrupted_worker_may_save_before_the_call_returns(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    stops = []

    def acknowledge(stop: BaseException) -> None:
        stops.append((type(stop), saved.exists()))
        raise BrokenPipeError("the terminal is gone")

    interrupted(tmp_path, SAVES, grace_seconds=20, on_stop=acknowledge)
    assert stops == [(KeyboardInterrupt, False)], "an interruption is acknowledged before the worker has saved"
    assert saved.read_text() == "saved"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGHUP, -signal.SIGHUP), (signal.SIGUSR1, 0)]
)
def test_a_signal_to_the_launcher_alone_lets_its_worker_save(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """Of SIGUSR1 the launcher hears nothing, and the worker, asked by hand, ends by itself."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, here and in every child
    ready = tmp_path / "ready"
    sent = []

    def on_poll() -> None:
        if ready.exists() and not sent:
            # Other tests of this process may have left helpers of their own.
            children = psutil.Process().children(recursive=True)
            launcher, worker = [child for child in children if str(ready) in " ".join(child.cmdline())]
            sent.append(launcher.send_signal(number))
            if number == signal.SIGUSR1:
                worker.terminate()

    code_of_launcher = LAUNCHER.format(worker=SAVES.format(saved=str(tmp_path / "saved"), ready=str(ready)))
    assert execute(python(code_of_launcher), log=tmp_path / "log.txt", on_poll=on_poll, grace_seconds=20) == code
    assert (tmp_path / "saved").read_text() == "saved"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_that_comes_while_the_command_starts_lets_its_worker_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Slurm sends its warning once."""
    started = psutil.Popen

    def warned(*arguments: Any, **named: Any) -> psutil.Popen:
        process = started(*arguments, **named)
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)
        return process

    def on_signal(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(psutil, "Popen", warned)
    saves = SAVES.replace("sleep(60)", "sleep(3)").format(saved=str(tmp_path / "saved"), ready=str(tmp_path / "ready"))
    before = signal.signal(number, on_signal)
    try:
        with pytest.raises(KeyboardInterrupt):
            execute(python(LAUNCHER.format(worker=saves)), log=tmp_path / "log.txt", on_poll=never, grace_seconds=20)
    finally:
        signal.signal(number, before)
    assert (tmp_path / "saved").read_text() == "saved"


def test_a_worker_hears_what_its_launcher_does_not(tmp_path: Path) -> None:
    stage = tmp_path / "sft"
    stage.mkdir()
    code = (
        "import os, pathlib, signal\nfrom alignment.core.stop_requests import stop_while_importing\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        f"stop_while_importing(pathlib.Path({str(stage / 'stage.yaml')!r}))\n"
    )
    told = Command(argv=(sys.executable, "-c", code), environment={"PYTHONPATH": str(Path(__file__).parents[4])})
    assert execute(told, log=tmp_path / "log.txt", on_poll=never, grace_seconds=1) == 75
    assert json.loads((stage / "status.json").read_text())["state"] == "preempted"


def test_a_worker_that_does_not_stop_is_killed_after_the_grace(tmp_path: Path) -> None:
    assert interrupted(tmp_path, STUBBORN, grace_seconds=0.5) < 10
    pid = int((tmp_path / "ready").read_text())
    with contextlib.suppress(psutil.NoSuchProcess):  # the signal was sent; the kernel may take a moment
        psutil.Process(pid).wait(timeout=10)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_command_can_keep_a_lock_after_the_one_who_took_it_let_go(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    seen = []
    with held(lock, wait=False) as descriptor:
        inherited = os.dup(descriptor)
    execute(
        python("import time; time.sleep(0.8)"),
        log=tmp_path / "log.txt",
        on_poll=lambda: seen.append(is_held(lock)),
        grace_seconds=1,
        keep_open=[inherited],
    )
    os.close(inherited)
    assert seen
    assert all(seen)
    assert not is_held(lock)
