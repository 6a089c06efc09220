"""A cluster that is this machine: slurmctld and slurmd on the loopback interface, without root or munge.

Several nodes are several daemons with ports of their own. Slurm is as Debian packs it, fetched by apt and unpacked into
the cache; nothing is installed.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from alignment.pipeline.sources.bundled_model import cache_root
from tests.e2e.conftest import Align
from tests.living import kill_each
from tests.tiny import save_tiny_model

_PATIENCE = 120.0
_CONFIG = """\
ClusterName=loopback
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
PluginDir={plugins}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ReturnToService=2
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2
"""


@dataclass(kw_only=True)
class Cluster:
    """``packages`` holds Slurm's files, ``folder`` the cluster's own. ``nodes`` are the names of its machines."""

    packages: Path
    folder: Path
    nodes: tuple[str, ...] = ("localhost",)
    _daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find Slurm's commands and this cluster."""
        libraries = self._plugins().parent
        return {
            "PATH": f"{self.packages / 'usr/bin'}:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": f"{libraries}:{self._plugins()}",
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }

    def start(self) -> None:
        self._write_configuration()
        self._named("slurmstepd")
        self._named("slurmctld")
        self._named("slurmd")
        self._daemons = {"": self._run("slurmctld", "slurmctld", "-D")}
        for node in self.nodes:
            self._start_node(node)
        idle = ("sinfo", "--noheader", "--partition=all", "--states=idle", "--format=%D")
        self.wait_for(lambda: self.call(*idle, check=False).strip() == str(len(self.nodes)), "idle nodes")

    def stop(self) -> None:
        self.call("scancel", f"--user={getpass.getuser()}", check=False)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def lose(self, node: str) -> None:
        """Kills all that runs on a node, as a power cut does, and lets the controller know."""
        daemon = psutil.Process(self._daemons[node].pid)
        kill_each([daemon, *daemon.children(recursive=True)])
        self._daemons[node].wait()
        self.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def bring_back(self, node: str) -> None:
        self._start_node(node)
        self.call("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def _start_node(self, node: str) -> None:
        arguments = ("-D", "-N", node, "-d", str(self.folder / "slurmstepd"))
        self._daemons[node] = self._run(f"slurmd-{node}", "slurmd", *arguments)

    def call(self, *argv: str, check: bool = True) -> str:
        done = subprocess.run(
            argv, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0 or not check, f"{argv}: {done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        return self.call("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}", check=False).strip()

    def start_soon(self, job: str) -> None:
        """Starts a job that is queued again in seconds: Slurm would wait for two minutes.

        Not at once: within the second in which a job was queued again its node refuses it, "credential revoked".
        """
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now+5")

    def wait_for(self, ready: Callable[[], object], awaited: str) -> None:
        """Returns when it is so; fails after two minutes, with the last words of the daemons."""
        deadline = time.monotonic() + _PATIENCE
        while not ready():
            assert time.monotonic() < deadline, f"no {awaited} in {_PATIENCE:.0f} s\n{self.logs()}"
            time.sleep(0.05)

    def logs(self) -> str:
        return "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))

    def _plugins(self) -> Path:
        (folder,) = self.packages.glob("usr/lib/*/slurm-wlm")
        return folder

    def _write_configuration(self) -> None:
        (self.folder / "state").mkdir()
        text = _CONFIG.format(
            controller_port=_free_port(),
            nodes="\n".join(
                f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={_free_port()} "
                f"CPUs={os.cpu_count()} State=UNKNOWN"
                for node in self.nodes
            ),
            user=getpass.getuser(),
            plugins=self._plugins(),
            folder=self.folder,
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")

    def _named(self, daemon: str) -> Path:
        """A link of the daemon's own name, by which it knows what it is; Debian's files end in ``-wlm``."""
        link = self.folder / daemon
        link.symlink_to(self.packages / "usr/sbin" / f"{daemon}-wlm")
        return link

    def _run(self, name: str, daemon: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [str(self.folder / daemon), *arguments],
                env={**os.environ, **self.environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(folder: Path, *nodes: str) -> Iterator[Cluster]:
    """A cluster in ``folder``. Where it cannot be had, the tests fail with the reason: they were asked for."""
    try:
        packages = unpacked()
    except Unavailable as reason:
        raise pytest.fail.Exception(f"no Slurm to test with: {reason}", pytrace=False) from None
    cluster = Cluster(packages=packages, folder=folder, nodes=nodes or ("localhost",))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def commands_of(cluster: Cluster, factory: pytest.TempPathFactory) -> Callable[[], Align]:
    """Makes commands with an empty output folder and one tiny model, which submit their stages to the cluster."""
    model, variables = save_tiny_model(factory.mktemp("model") / "tiny"), cluster.environment
    return lambda: Align(output=factory.mktemp("output"), model=model, recipe="sft_dpo", variables=variables)


PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins")


class Unavailable(Exception):
    """Slurm cannot be had on this machine; says why."""


def unpacked() -> Path:
    """The folder that holds ``usr/bin/sbatch`` and the rest, fetched first if it is not there.

    Raises:
        Unavailable: this is no Debian, or its packages cannot be fetched.
    """
    target = cache_root() / "slurm"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".slurm-") as scratch:
            _fetch(Path(scratch))
            os.replace(Path(scratch) / "root", target)
    return target


def _fetch(scratch: Path) -> None:
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise Unavailable(f"it is fetched as Debian's packages, and there is no {tool} here")
    needed = _call(["apt-get", "--simulate", "--no-install-recommends", "install", *PACKAGES], scratch)
    names = {*PACKAGES, *re.findall(r"^Inst (\S+)", needed, re.MULTILINE)}
    _call(["apt-get", "download", *sorted(names)], scratch)
    for archive in sorted(scratch.glob("*.deb")):
        _call(["dpkg", "-x", str(archive), "root"], scratch)


def _call(argv: list[str], folder: Path) -> str:
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        raise Unavailable(f"{' '.join(argv)} failed:\n{done.stderr.strip()}")
    return done.stdout
