"""Whole runs through the user's command, on a tiny random model and a few rows of the shipped data."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from alignment.pipeline.plan.compose import compose
from tests.e2e.forked import Forked
from tests.tiny import save_tiny_model

SMALL = (
    "model.dtype=float32",
    "launch.threads=1",
    "stages.cpt.data.limit=12",
    "stages.cpt.max_length=64",
    "stages.cpt.optim={batch_size: 4, micro_batch_tokens: 60, lr: 1e-3}",
    "stages.sft.data.limit=12",
    "stages.sft.optim={batch_size: 4, micro_batch_tokens: 60, epochs: 2, lr: 1e-3}",
    "stages.sft.save_every=2",
    "stages.reward.data.limit=12",
    "stages.reward.eval_fraction=0.34",
    "stages.reward.optim={batch_size: 4, micro_batch_tokens: 60, lr: 1e-3}",
    "stages.reward.save_every=2",
    "stages.dpo.data.limit=8",
    "stages.dpo.optim={batch_size: 4, micro_batch_tokens: 60, lr: 1e-3}",
    "stages.dpo.save_every=1",
    "stages.ppo.critic=separate",
    "stages.ppo.data.limit=6",
    "stages.ppo.updates=3",
    "stages.ppo.ppo_epochs=2",
    "stages.ppo.num_minibatches=2",
    "stages.ppo.max_new_tokens=8",
    "stages.ppo.max_prompt_length=4096",
    "stages.ppo.optim={batch_size: 12, micro_batch_tokens: 1, lr: 1e-3}",
    "stages.ppo.completions_per_prompt=2",  # 3 prompts a minibatch: 2 + 1 on two processes
    "stages.evaluate.data.limit=5",
    "stages.evaluate.max_new_tokens=12",
    "stages.evaluate.bootstrap_samples=200",
    "stages.report.num_samples=4",
    *(f"stages.{stage}.max_length=4096" for stage in ("sft", "reward", "dpo")),
)


@cache
def _small(recipe: str) -> list[str]:
    """The settings that are about no stage, and for each stage of the recipe those of its kind."""
    settings = [setting for setting in SMALL if not setting.startswith("stages.")]
    for name, stage in compose(recipe, []).tree["stages"].items():
        own = f"stages.{stage['kind']}."
        settings += [f"stages.{name}.{setting.removeprefix(own)}" for setting in SMALL if setting.startswith(own)]
    return settings


@dataclass(frozen=True, kw_only=True)
class Align:
    """The command with a tiny model; ``output`` holds its runs and artifacts, ``variables`` are laid over ours.

    With ``forked`` no launcher starts and nothing is imported anew, which saves seconds a stage.
    """

    output: Path
    model: Path
    recipe: str = "quickstart"
    variables: Mapping[str, str] = field(default_factory=dict)
    forked: Forked | None = None

    def argv(self, verb: str, *overrides: str) -> list[str]:
        own = (f"output={self.output}", f"model.source=path:{self.model}")
        return [sys.executable, "-m", "alignment.cli", verb, self.recipe, *own, *_small(self.recipe), *overrides]

    @property
    def environment(self) -> dict[str, str]:
        return environment() | self.variables

    def __call__(self, verb: str, *overrides: str, code: int = 0) -> str:
        """Runs the command to its end, checks its exit code and returns all that it printed."""
        ended, printed = self._run(self.argv(verb, *overrides))
        assert ended == code, f"exit code {ended}, expected {code}\n{printed}{self.logs()}"
        return printed

    def _run(self, argv: list[str]) -> tuple[int, str]:
        if self.forked is not None:
            return self.forked.run(argv[argv.index("alignment.cli") + 1 :])
        done = subprocess.run(argv, capture_output=True, text=True, timeout=600, env=self.environment, check=False)
        return done.returncode, done.stdout + done.stderr

    def logs(self) -> str:
        """The ends of all stage logs, for a failing test's message."""
        return "\n".join(f"{p}:\n{p.read_text()[-3000:]}" for p in sorted(self.output.glob("runs/*/*/log.txt")))

    def on(self, verb: str, *words: str, code: int = 0) -> str:
        assert self.forked is not None
        ended, printed = self.forked.run([verb, *words, "--output", str(self.output)])
        assert ended == code, printed
        return printed

    def stages(self, run: str | None = None) -> dict[str, dict[str, Any]]:
        """What ``run.json`` says of each stage; ``run`` is that of the recipe's name if it is not given."""
        file = self.output / f"runs/{run or Path(self.recipe).stem}/run.json"
        recorded: dict[str, dict[str, Any]] = json.loads(file.read_text())["stages"]
        return recorded

    def states(self, run: str | None = None) -> dict[str, str]:
        return {name: stage["state"] for name, stage in self.stages(run).items()}

    def rows(self, stage: str, name: str = "metrics.jsonl", *, run: str | None = None) -> list[dict[str, Any]]:
        file = Path(self.stages(run)[stage]["artifact"]) / name
        return [json.loads(line) for line in file.read_text().splitlines()]

    def artifact(self, stage: str) -> Path:
        return Path(self.stages()[stage]["artifact"])

    def weights(self) -> dict[str, str]:
        """SHA-256 of every safetensors file, by stage and file name."""
        return {
            f"{re.sub(r'-[0-9a-f]{8}', '', path.relative_to(self.output / 'artifacts').as_posix())}": hashlib.sha256(
                path.read_bytes()
            ).hexdigest()
            for path in sorted(self.output.glob("artifacts/*/**/*.safetensors"))
        }


def environment() -> dict[str, str]:
    """Ours, without anything of the caller's that would change a run, such as vLLM, which refuses the tiny model."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "ACCELERATE_"))}
    return {**variables, "NETRC": os.devnull, "ALIGNMENT_ENGINE_PYTHON": "/nowhere/bin/python"}


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny model for all runs, so that its fingerprint is the same in each."""
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def new_align(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Align]:
    return lambda: Align(output=tmp_path_factory.mktemp("output"), model=tiny_model_folder)


@pytest.fixture(scope="session")
def forked() -> Iterator[Forked]:
    """The process from which drivers and stages are forked."""
    parent = Forked(environment())
    yield parent
    parent.close()


@pytest.fixture(scope="session")
def new_forked(new_align: Callable[[], Align], forked: Forked) -> Callable[[], Align]:
    """Makes a command with an empty output folder whose stages are forked."""
    return lambda: replace(new_align(), forked=forked)


@pytest.fixture(scope="session")
def finished(new_forked: Callable[[], Align]) -> Align:
    """A chain that ran once, undisturbed. Tests may run more in it but never remove a result."""
    align = new_forked()
    align("run")
    return align
