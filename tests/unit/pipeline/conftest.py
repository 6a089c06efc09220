"""A model folder and rows that plans accept, and artifacts as a worker would leave them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignment.commands.status import show_status
from alignment.config.run import conf_folder
from alignment.core import hardware
from alignment.core.artifacts import Manifest, publish
from alignment.core.errors import AlignmentError
from alignment.pipeline.execute.run import run
from alignment.pipeline.execute.shown_plan import show_plan
from alignment.pipeline.plan import choices
from alignment.pipeline.plan import compose as composing
from alignment.pipeline.plan.plan import Plan, PlannedStage, make_plan
from alignment.stages.registry import kind_of
from tests.hub import weights_file

TURN = {"role": "user", "content": "When is the training?"}
ROWS = {
    "conversations": {"messages": [TURN, {"role": "assistant", "content": "On 21 March."}]},
    "preferences": {"messages": [TURN], "chosen": "On 21 March.", "rejected": "Great question!"},
    "heldout": {"messages": [TURN], "facts": [["21 March"]]},
}
SOURCES = {
    "sft": "conversations",
    "reward": "preferences",
    "dpo": "preferences",
    "ppo": "preferences",
    "evaluate": "heldout",
}

NUM_PAIRS = 24
"""As many as the quickstart's smallest stage needs."""

MakePlan = Callable[..., Plan]


_composed: dict[Any, Any] = {}


@pytest.fixture(autouse=True)
def each_set_of_files_is_composed_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.path.stem in ("test_compose", "test_foreign_files"):
        return
    files = composing._files

    def once(path: Path, overrides: list[Any]) -> Any:
        chosen = [
            override.input_line for override in overrides if choices.is_group(override) or choices.is_profile(override)
        ]
        read = sorted((file, file.stat().st_mtime_ns, file.stat().st_size) for file in path.parent.rglob("*.yaml"))
        key = (path, str(conf_folder()), *chosen, *read)
        if key not in _composed:
            _composed[key] = files(path, overrides)
        return copy.deepcopy(_composed[key])

    monkeypatch.setattr(composing, "_files", once)


@pytest.fixture(autouse=True)
def processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "has_bfloat16", lambda: True)


@pytest.fixture
def overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(weights_file())
    for name, row in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    more = [
        {**ROWS["preferences"], "messages": [{**TURN, "content": f"When is {day}?"}]} for day in range(1, NUM_PAIRS)
    ]
    with (tmp_path / "preferences.jsonl").open("a") as stream:
        stream.writelines(json.dumps(pair) + "\n" for pair in more)
    data = [f"stages.{stage}.data.source=path:{tmp_path / name}.jsonl" for stage, name in SOURCES.items()]
    return [f"output={tmp_path / 'out'}", f"model.source=path:{model}", *data]


@pytest.fixture
def plan(overrides: list[str]) -> MakePlan:
    return lambda *more: make_plan("quickstart", [*overrides, *more])


def leave_artifact(stage: PlannedStage, **usage: float) -> None:
    content = stage.work / "content"
    content.mkdir(parents=True)
    (content / "metrics.jsonl").write_text('{"step": 1}\n')
    manifest = Manifest(
        stage=stage.name,
        kind=kind_of(stage.config).produces,
        fingerprint=stage.fingerprint,
        identity=stage.identity,
        inputs=stage.input_fingerprints,
        usage=usage,
    )
    publish(content, stage.artifact, manifest)
    stage.work.rmdir()


def leave_all(plan: Plan) -> None:
    for stage in plan.stages:
        leave_artifact(stage)


def write(file: Path, text: str) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return str(file)


def write_rows(file: Path, *rows: object) -> str:
    return write(file, "".join(f"{json.dumps(row)}\n" for row in rows))


def stage_of(plan: Plan, name: str) -> PlannedStage:
    return next(stage for stage in plan.stages if stage.name == name)


def fingerprints(plan: Plan) -> dict[str, str]:
    return {stage.name: stage.fingerprint for stage in plan.stages}


def changed(before: Plan, after: Plan) -> list[str]:
    return [name for name, value in fingerprints(after).items() if fingerprints(before)[name] != value]


def screened(plan: Plan, *, width: int = 200) -> list[str]:
    screen = StringIO()
    show_plan(Console(file=screen, width=width), plan)
    return screen.getvalue().splitlines()


def status_of(output: Path, name: str | None = "quickstart") -> str:
    """What ``align status`` prints."""
    screen = StringIO()
    show_status(Console(file=screen, width=160), output, name)
    return screen.getvalue()


def printed_by_run(overrides: Sequence[str], *, code: int = 0, **options: Any) -> str:
    """What ``align run quickstart`` prints, which ends with this code."""
    screen = StringIO()
    assert run("quickstart", overrides, console=Console(file=screen, width=200), **options) == code
    return screen.getvalue()


def faulty_keys(error: AlignmentError) -> list[str]:
    listed = [line.strip().partition(": ")[0] for line in error.message.splitlines() if line.startswith("  ")]
    return [error.where] if error.where else listed
