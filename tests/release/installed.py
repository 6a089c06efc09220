"""A distribution in an environment of its own, used as a user would from a folder that holds nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
OURS = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
"""Variables by which the environment would find this clone."""
COMMANDS = {
    ("--help",): "exit codes: 0 success",
    ("--version",): "align ",
    ("recipes",): "quickstart",
    ("stages",): "reward_card",
    ("plan", "quickstart"): "evaluate",
}
"""What a user may try first, and what it prints."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Installed:
    """An environment in ``folder``, and the empty folder in which commands are called."""

    folder: Path
    work: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def call(self, *argv: str | Path, timeout: float = 1200.0) -> subprocess.CompletedProcess[str]:
        """Runs a program in the empty folder, and gives both streams as one."""
        environment = {name: value for name, value in os.environ.items() if name not in OURS}
        return subprocess.run(
            argv,
            cwd=self.work,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )

    def pip(self, *words: str) -> subprocess.CompletedProcess[str]:
        options = ("--quiet", "--disable-pip-version-check", "--constraint", str(ROOT / "constraints.txt"))
        return self.call(self.python, "-m", "pip", "install", *options, *words)

    def align(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.call(self.folder / "bin" / "align", *words)

    def wrong_commands(self) -> list[str]:
        """Each command of ``COMMANDS`` that fails, with what it printed."""
        wrong = []
        for words, expected in COMMANDS.items():
            done = self.align(*words)
            if done.returncode != 0 or expected not in done.stdout:
                wrong.append(f"align {' '.join(words)}: exit code {done.returncode}\n{done.stdout}")
        return wrong

    def where(self) -> Path:
        return Path(self.call(self.python, "-c", "import alignment; print(alignment.__path__[0])").stdout.strip())


def new_environment(folder: Path, python: str = sys.executable) -> Installed:
    work = folder / "work"
    work.mkdir(parents=True)
    subprocess.run([python, "-m", "venv", str(folder / "environment")], check=True)
    return Installed(folder=folder / "environment", work=work)
