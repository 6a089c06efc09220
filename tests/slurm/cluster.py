"""A cluster of one machine, this one: slurmctld and slurmd on the loopback interface, without root or munge."""

from __future__ import annotations

import getpass
import os
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

_PATIENCE = 60.0
_CONFIG = """\
ClusterName=loopback
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
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
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ReturnToService=2
NodeName=localhost NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2
"""


@dataclass(kw_only=True)
class Cluster:
    """``packages`` holds Slurm's files, ``folder`` the cluster's own."""

    packages: Path
    folder: Path
    _daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

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
        """Returns when the machine takes jobs."""
        self._write_configuration()
        stepd = self._named("slurmstepd")
        self._daemons = [self._run("slurmctld", "-D"), self._run("slurmd", "-D", "-N", "localhost", "-d", str(stepd))]
        self.wait_for(lambda: "idle" in self.call("sinfo", "--noheader", "--format=%T", check=False), "an idle node")

    def stop(self) -> None:
        """Ends all jobs and both daemons."""
        self.call("scancel", f"--user={getpass.getuser()}", check=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def call(self, *argv: str, check: bool = True) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(
            argv, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0 or not check, f"{argv}: {done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        """``PENDING``, ``RUNNING``, …"""
        return self.call("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}", check=False).strip()

    def start_soon(self, job: str) -> None:
        """Starts a job that is queued again in seconds: Slurm would wait for two minutes.

        Not at once: within the second in which a job was queued again its node refuses it, "credential revoked".
        """
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now+5")

    def wait_for(self, ready: Callable[[], object], what: str) -> None:
        """Returns when it is so; fails after a minute, with the last words of the daemons."""
        deadline = time.monotonic() + _PATIENCE
        while not ready():
            assert time.monotonic() < deadline, f"no {what} in {_PATIENCE:.0f} s\n{self.logs()}"
            time.sleep(0.05)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))

    def _plugins(self) -> Path:
        (folder,) = self.packages.glob("usr/lib/*/slurm-wlm")
        return folder

    def _write_configuration(self) -> None:
        (self.folder / "state").mkdir()
        (self.folder / "spool").mkdir()
        text = _CONFIG.format(
            controller_port=_free_port(),
            node_port=_free_port(),
            user=getpass.getuser(),
            plugins=self._plugins(),
            folder=self.folder,
            cores=os.cpu_count(),
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")

    def _named(self, daemon: str) -> Path:
        """A link of the daemon's own name, by which it knows what it is; Debian's files end in ``-wlm``."""
        link = self.folder / daemon
        link.symlink_to(self.packages / "usr/sbin" / f"{daemon}-wlm")
        return link

    def _run(self, daemon: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{daemon}.log").open("wb") as log:
            return subprocess.Popen(
                [str(self._named(daemon)), *arguments],
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
