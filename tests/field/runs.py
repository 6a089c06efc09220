"""Runs a draw with the user's command, in a folder of its own, where its recipe and rows stay."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.forked import KILLED, Forked
from tests.field.draws import ANSWERS, REAL, Draw
from tests.field.models import save_model

PROPOSAL = re.compile(r"stages\.[\w.]+=[^\s,;)]+")
REFUSED = (2, 3)
"""Exit codes of settings and of rows that are refused (alignment/core/errors.py)."""

MODEL = 4
"""The exit code of a model that a stage cannot use."""


class Broken(AssertionError):
    """Something that must be true of any run is not."""


class Refused(Exception):
    """The settings or rows were refused with an error that names them."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run, with the overrides that the plan proposed."""

    draw: Draw
    folder: Path
    printed: str
    changes: list[str]

    @property
    def record(self) -> dict[str, Any]:
        """What ``run.json`` says."""
        record: dict[str, Any] = json.loads((self.folder / "runs/field/run.json").read_text())
        return record

    def artifact(self, stage: str) -> Path:
        """The folder of a stage's result."""
        return Path(self.record["stages"][stage]["artifact"])

    def lines(self, stage: str) -> list[dict[str, Any]]:
        """The stage's metrics, a line a step."""
        return [json.loads(line) for line in (self.artifact(stage) / "metrics.jsonl").read_text().splitlines()]

    def weights(self, stage: str) -> dict[str, bytes]:
        """The bytes of each file of weights of the stage's result."""
        artifact = self.artifact(stage)
        return {str(file.relative_to(artifact)): file.read_bytes() for file in sorted(artifact.rglob("*.safetensors"))}


class Field:
    """Runs draws in folders below ``folder``, forked from one process that has imported the libraries."""

    def __init__(self, folder: Path, forked: Forked) -> None:
        self.folder = folder
        self._forked = forked

    def run(
        self, draw: Draw, name: str = "run", *, killed: int | None = None, like: Run | None = None, **optim: Any
    ) -> Run:
        """Plans and runs it. With ``killed`` it is killed after so many checkpoints, and run again; ``optim`` changes
        the last stage's optimiser. With ``like`` it has the overrides and the earlier stages of that run. Raises
        Refused: it cannot be run, and the error says what to change; Broken: the command failed, or refused something
        without an error that says so."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        recipe = write_recipe(draw, folder, optim)
        if like is not None:
            last = shutil.ignore_patterns(f"{draw.last}-*", ".cost")
            shutil.copytree(like.folder / "artifacts", folder / "artifacts", ignore=last)
        changes = self._accepted(recipe, folder, like.changes if like else [])
        if draw.costs:
            self._answer(["plan", str(recipe), *changes, "--cost"], folder)
        command = ["run", str(recipe), *changes]
        if killed is not None:
            self._forked.run(command, folder=folder, variables={KILLED: f"{draw.last}:{killed}"})
        code, printed = self._forked.run(command, folder=folder)
        logs = "\n".join(file.read_text()[-2000:] for file in folder.glob("runs/*/*/log.txt"))
        before_training = code == MODEL and not any(folder.glob("artifacts/*/manifest.json"))
        diverged = "training diverged" in printed  # a few steps of a random model may do so
        if (code in REFUSED or before_training or diverged) and "Traceback" not in printed + logs:
            raise Refused(printed)
        if code != 0:
            raise Broken(f"`align run` ended with {code}\n{printed[-3000:]}\n{logs}")
        return Run(draw=draw, folder=folder, printed=printed, changes=changes)

    def _accepted(self, recipe: Path, folder: Path, changes: list[str]) -> list[str]:
        """The overrides with which the plan is accepted: these, and those that it proposes itself."""
        changes = list(changes)
        for _ in range(4):
            code, printed = self._forked.run(["plan", str(recipe), *changes], folder=folder)
            if code == 0:
                return changes
            if code not in REFUSED or "Traceback" in printed:
                raise Broken(f"`align plan` ended with {code}\n{printed[-3000:]}")
            proposed = [change.rstrip(".") for change in PROPOSAL.findall(printed)]
            changes += [change for change in proposed if change not in changes]
            if not proposed:
                break
        raise Refused(printed)

    def status(self, run: Run) -> None:
        """`align status` reads the run."""
        self._answer(["status", "field"], run.folder)

    def export(self, run: Run) -> Path:
        """The result as ``draw.export``, however much rounding costs. Raises Refused: a GGUF file has no such models;
        Broken: the command failed."""
        folder = run.folder / "exported"
        options = ["--to", str(folder), "--as", str(run.draw.export), "--max-gap", "100"]
        self._answer(["export", f"field/{run.draw.last}", *options], run.folder, refuses=run.draw.export == "gguf")
        return folder

    def _answer(self, argv: list[str], folder: Path, *, refuses: bool = False) -> None:
        code, printed = self._forked.run(argv, folder=folder)
        if refuses and code in (*REFUSED, MODEL) and "Traceback" not in printed:
            raise Refused(printed)
        if code != 0 or "Traceback" in printed:
            raise Broken(f"`align {argv[0]}` ended with {code}\n{printed[-3000:]}")


def write_recipe(draw: Draw, folder: Path, optim: dict[str, Any]) -> Path:
    """The recipe of a draw, beside its model and rows."""
    if not (folder / "model").exists():
        save_model(folder / "model", draw.architecture, biased=draw.biased, template=draw.template)
    stages = json.loads(json.dumps(draw.stages))
    for name, rows in draw.rows.items():
        skips = {"on_error": "skip", "max_skipped": 1.0} if rows.get("skips") else {}
        stages[name]["data"] = {"source": f"path:{write_rows(rows, folder / name)}", **skips}
    stages[draw.last]["optim"] |= optim
    kinds = {name: name for name in stages}
    if draw.evaluated and draw.last != "reward":
        kinds |= {"evaluate": "evaluate", "report": "report"}
        stages["evaluate"] = {
            "data": {"source": "bundled:quickstart/heldout", "limit": 3},
            "arms": ["base", f"stage:{draw.last}"],
            "reward": None,
            "metrics": [{"name": "length", "source": "length", "target": 20}],
            "max_new_tokens": 8,
            "bootstrap_samples": 100,
        }
    recipe = folder / "recipe.yaml"
    tree = {
        "defaults": [
            "base",
            *({f"stage@stages.{name}": kind} for name, kind in kinds.items()),
            *([{"override launch": "ddp"}] if draw.processes > 1 else []),
            "_self_",
        ],
        "summary": "drawn at random",
        "name": "field",
        "seed": draw.seed,
        "output": str(folder),
        "model": {
            "source": f"path:{folder / 'model'}",
            "dtype": draw.dtype,
            "template_options": dict(REAL[draw.template].options) if draw.template in REAL else {},
        },
        "launch": {"threads": 1, "num_processes": draw.processes},
        "stages": stages,
    }
    recipe.write_text(yaml.safe_dump(tree, sort_keys=False))
    return recipe


def write_rows(rows: dict[str, Any], path: Path) -> Path:
    """Some rows of a file in its own format, with answers cut to other lengths."""
    source = Path(rows["file"])
    whole = source.read_text()
    every = json.loads(whole) if source.suffix == ".json" else [json.loads(line) for line in whole.splitlines()]
    start = rows["start"] % len(every)
    some = (every[start:] + every[:start])[: rows["number"]]
    characters = rows["characters"]
    some = [
        {name: _cut(name, value, characters[i % len(characters)]) for name, value in row.items()}
        for i, row in enumerate(some)
    ]
    path = path.with_suffix(source.suffix)
    text = json.dumps(some) if source.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in some)
    path.write_text(text)
    return path


def _cut(name: str, value: Any, characters: int) -> Any:
    """The answer's first characters; transcripts and lists of messages stay whole."""
    is_answer = name in ANSWERS and isinstance(value, str) and not value.startswith("\n\nHuman:")
    return value[:characters].strip() or "a" if is_answer else value
