"""The user's command, many times over: drivers and stages are forked from one process that has imported the libraries.

``python -m tests.e2e.forked`` reads command lines from stdin, each a line of JSON with the folder to run it in, and
answers each with one: exit code and all that was printed. A stage has one process, which nobody polls or interrupts.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.living import in_child

KILLED = "ALIGNMENT_TEST_KILLED"


class Forked:
    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.forked"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(
        self,
        argv: Sequence[str],
        *,
        installed: Path | None = None,
        folder: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> tuple[int, str]:
        """Exit code of ``align`` with these arguments, and all that it printed.

        It runs in ``folder``, and finds the packages in ``installed`` as if they were installed. ``variables`` are
        added to its environment; with ``KILLED`` set to ``STAGE:NUMBER``, that stage is killed after so many
        checkpoints.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {
            "argv": list(argv),
            "installed": installed and str(installed),
            "folder": folder and str(folder),
            "variables": dict(variables or {}),
        }
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        return answer["code"], answer["printed"]

    def close(self) -> None:
        with self._process:
            pass


def _serve() -> None:

    import alignment.cli
    import alignment.commands.export.worker
    import alignment.pipeline.execute.run
    import alignment.rehearse
    import alignment.report.run_page.render
    import alignment.stages.distil.run
    import alignment.stages.dpo.run
    import alignment.stages.evaluate.run
    import alignment.stages.forgetting.run
    import alignment.stages.kto.run
    import alignment.stages.ppo.run
    import alignment.stages.reward.run
    import alignment.stages.reward_card.run
    import alignment.stages.sample.run
    import alignment.stages.shared.language_model
    import alignment.worker  # noqa: F401  each command and each stage would import these anew
    from alignment.pipeline.backends import forking, processes

    processes.execute = _execute
    processes.call = _call
    forking._can_fork = lambda: False  # or each driver starts a server that imports everything once more, for nobody
    gc.freeze()  # or each stage's trainer would look through all that is imported, which takes 0.4 s
    for line in sys.stdin:
        with tempfile.TemporaryFile() as sink:
            code = in_child(functools.partial(_command, **json.loads(line)), sink)
            sink.seek(0)
            answer = {"code": code, "printed": sink.read().decode(errors="replace")}
        print(json.dumps(answer), flush=True)


def _command(argv: list[str], installed: str | None, folder: str | None, variables: dict[str, str]) -> int:
    from alignment import cli
    from alignment.stages import registry

    os.environ.update(variables)
    if folder is not None:
        os.chdir(folder)
    if installed is not None:
        sys.path.insert(0, installed)
        importlib.invalidate_caches()
        registry.registered.cache_clear()
    return cli.main(argv)


def _call(argv: Sequence[str]) -> int:
    """In place of a program of the worker's side: this process is one of its own already. Nobody types into it."""
    sys.stdin = open(os.devnull)  # noqa: SIM115  our own holds further command lines
    code: int = importlib.import_module(argv[2]).main(argv[3:])
    return code


def _execute(command: Any, *, log: Path, **_: Any) -> int:
    """In place of the launcher's: the command's last word is the stage file, unless it tries what comes later."""
    from alignment import rehearse, worker

    def stage() -> int:
        os.environ.update(command.environment)
        _fork_other_ranks(command.argv)
        stage, _, checkpoints = os.environ.get(KILLED, "").partition(":")
        if stage and stage == Path(command.argv[-1]).parent.name:
            _kill_after(int(checkpoints))
        if "alignment.estimate" in command.argv:
            from alignment import estimate

            sys.argv = list(command.argv[command.argv.index("alignment.estimate") :])
            return estimate.main()
        if "alignment.rehearse" in command.argv:
            return rehearse.main(command.argv[command.argv.index("alignment.rehearse") + 1 :])
        return worker.main(Path(command.argv[-1]))

    with log.open("ab") as sink:
        return in_child(stage, sink)


def _fork_other_ranks(argv: Sequence[str]) -> None:
    """In place of torchrun: this process becomes rank 0, and its children the others."""
    if "--nproc_per_node" not in argv:
        return
    world = int(argv[argv.index("--nproc_per_node") + 1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rank = next((rank for rank in range(1, world) if os.fork() == 0), 0)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()}, MASTER_ADDR="127.0.0.1")


def _kill_after(checkpoints: int) -> None:
    from alignment.training.callbacks import Checkpoints

    on_save, saved = Checkpoints.on_save, []

    def then_killed(*args: Any, **kwargs: Any) -> Any:
        result = on_save(*args, **kwargs)
        saved.append(result)
        if len(saved) == checkpoints:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Checkpoints.on_save = then_killed  # type: ignore[method-assign]


if __name__ == "__main__":
    _serve()
