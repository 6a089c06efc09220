"""Sweeps without trainings: a stand-in for the runs of their trials, and how a test starts and reads one."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignment.core.artifacts import MANIFEST, Manifest
from alignment.core.errors import GateNotMet
from alignment.pipeline.execute.summary import REPORT
from alignment.pipeline.sweeps import run as module
from alignment.pipeline.sweeps.run import sweep
from tests.hub import weights_file


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Path) -> Runs:
    fake = Runs(tmp_path, lambda settings: 0.9 - abs(float(settings["stages.dpo.beta"]) - 0.3))
    monkeypatch.setattr(module, "run_trial", fake)
    return fake


@pytest.fixture
def tiny_base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights_file())
    return folder


METRIC = "style_and_facts"
"""The quickstart's primary metric."""
BETAS = ["0.05", "0.1", "0.3", "0.5"]
"""What the shipped sweep dpo_beta tries."""


class Runs:
    """In place of runs: an evaluation whose figure is a function of the overrides; notes what was asked for."""

    def __init__(self, output: Path, figure: Callable[[dict[str, str]], float | None]) -> None:
        self.output = output
        self.figure = figure
        self.words: Callable[[dict[str, str]], float] = lambda settings: 21.5
        self.asked: list[dict[str, str]] = []
        self.lost: dict[str, Any] = {}
        """More of ``evaluation.json``, where there is no figure."""
        self.other_arms: Callable[[dict[str, str]], list[dict[str, Any]]] = lambda settings: []
        """Arms of ``evaluation.json`` beside DPO's, as a function of the overrides."""
        self.has_prompt: Callable[[dict[str, str], int], bool] = lambda settings, index: True
        """Which of the twelve prompts have a score."""
        self.score: Callable[[dict[str, str], float], float] = lambda settings, mean: mean
        """The mean of these scores, if it is not the figure."""
        self.more_of_arm: dict[str, Any] = {}
        self.codes: dict[int, int] = {}
        self.faults: dict[int, Exception] = {}
        self.unmet: dict[str, GateNotMet] = {}
        """By beta: what a run says that is done and does not meet a gate."""

    def __call__(self, recipe: str, overrides: Sequence[str], *, console: Console, wait: bool) -> int:
        assert wait, "another process may be at work on what the trial needs"
        settings = dict(override.split("=", 1) for override in overrides)
        number = len(self.asked)
        self.asked.append(settings)
        if number in self.faults:
            raise self.faults[number]
        if number in self.codes:
            return self.codes[number]
        run = self.output / "runs" / settings["name"]
        run.mkdir(parents=True, exist_ok=True)
        identity = repr([override for override in overrides if override.startswith(("stages.", "seed="))])
        artifact = self.output / "results" / f"evaluate-{zlib.crc32(identity.encode()):08x}"
        artifact.mkdir(parents=True, exist_ok=True)
        mean = self.figure(settings)
        figure = None if mean is None else {"mean": mean, "low": mean - 0.05, "high": mean + 0.05}
        arm = {
            "name": "stage:dpo",
            "metrics": {} if figure is None else {METRIC: figure},
            "words": {"mean": 21.5},
            **self.more_of_arm,
        }
        evaluation = {"metrics": [{"name": METRIC}], "primary": METRIC, "arms": [*self.other_arms(settings), arm]}
        evaluation |= self.lost if mean is None else {}
        (artifact / "evaluation.json").write_text(json.dumps(evaluation))
        scores = [] if mean is None else [self.score(settings, mean) + noise for noise in (-0.02, 0.0, 0.02) * 4]
        lines = [
            {"id": str(index), "answers": {"stage:dpo": {"text": "", "scores": {METRIC: score}}}}
            for index, score in enumerate(scores)
            if self.has_prompt(settings, index)
        ]
        (artifact / "samples.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        names = ("loss/dpo", f"{METRIC}/dpo", "rewards/margins", "rewards/accuracies")
        metrics = dict.fromkeys(names, self.words(settings))
        manifest = Manifest(stage="evaluate", kind="evaluation", fingerprint="", identity={}, metrics=metrics)
        (artifact / MANIFEST).write_text(json.dumps(asdict(manifest)))
        stages = {name: {"kind": name, "artifact": str(artifact)} for name in ("evaluate", "dpo")}
        (run / "run.json").write_text(json.dumps({"stages": stages}))
        (run / REPORT).touch()
        if (unmet := self.unmet.get(settings.get("stages.dpo.beta", ""))) is not None:
            raise unmet
        return 0


def given(runs: Runs) -> list[str]:
    limits = [f"stages.{stage}.data.limit=48" for stage in ("sft", "reward", "dpo", "ppo", "evaluate")]
    return [f"output={runs.output}", f"model.source=path:{runs.output / 'base'}", *limits]


def go(runs: Runs, name: str = "dpo_beta", *more: str, at_once: int = 1, retry_failed: bool = False) -> tuple[int, str]:
    console = Console(width=200, record=True, quiet=False)
    overrides = [*given(runs), *more]
    with console.capture() as captured:
        code = sweep("quickstart", name, overrides, console=console, at_once=at_once, retry_failed=retry_failed)
    return code, captured.get()


def record(runs: Runs, name: str = "dpo_beta") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((runs.output / f"sweeps/quickstart.{name}/sweep.json").read_text())
    return content


def trials(runs: Runs, name: str = "dpo_beta") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = record(runs, name)["trials"]
    return rows


def arm(name: str, mean: float) -> dict[str, Any]:
    return {"name": name, "metrics": {METRIC: {"mean": mean, "low": mean - 0.02, "high": mean + 0.02}}}


def own(runs: Runs, tmp_path: Path, **changes: Any) -> str:
    defaults = {
        "search": "tpe",
        "trials": None if changes.get("search") == "grid" else 8,
        "objective": {"arm": "stage:dpo"},
        "parameters": [
            {"key": "stages.dpo.beta", "low": 0.01, "high": 1.0, "log": True},
            {"key": "stages.dpo.optim.batch_size", "values": [4, 8]},
        ],
    }
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps({**defaults, **changes}))
    return str(file)
