"""Stages that ask servers: an engine that samples, killed in an update and resumed; a judge and a grader.

The engine is that of tests/engine_server.py: at a URL, or started by the stage as if it were vLLM.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from alignment.config.launch import Engine, RolloutSamplingConfig
from alignment.config.model import Critic
from alignment.config.scoring import ScorerConfig
from alignment.job import StageSpec
from alignment.records.worker import Heartbeat
from alignment.stages.ppo.config import Advantage, PpoConfig
from alignment.training.checkpoints import MANIFEST
from tests.chained import LORA, Chained, config_of
from tests.distributed.processes import on_processes
from tests.distributed.test_critic_free import scorer_in
from tests.distributed.test_sharding import logs
from tests.e2e.conftest import Align
from tests.engine_server import COMPLETIONS, SCRATCH, Failure, Planted, engine_server, interpreter_of
from tests.living import wait_until

UPDATES = 3

METHODS: dict[str, dict[str, Any]] = {
    "PPO": {},
    "RLOO": {"advantage": Advantage.rloo, "critic": Critic.none, "completions_per_prompt": 2},
}

DIFFER = "may differ from those of an uninterrupted run"


def spec_of(folder: Path, method: str, **sampling: Any) -> StageSpec:
    """Three updates of four answers; the same folder and settings give the same stage."""
    chained = Chained(folder)
    config = config_of(
        "ppo",
        LORA,
        reward=None,
        scorers=[ScorerConfig(source=f"{scorer_in(folder, 'len(answer)')}:score")],
        updates=UPDATES,
        sampling=RolloutSamplingConfig(engine=Engine.vllm, retries=0, **sampling),
        **METHODS[method],
    )
    assert isinstance(config, PpoConfig)
    return chained.spec("ppo", LORA, config=config)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def kill(spec: StageSpec) -> None:
    for heartbeat in Heartbeat.read_all(spec.work).values():
        with suppress(ProcessLookupError):
            os.kill(heartbeat.pid, signal.SIGKILL)


def left_of(programs: Path) -> list[str]:
    """Processes and temporary folders of servers that a program in this folder started."""
    scratch = programs / SCRATCH
    assert scratch.exists(), "a server was started"
    folders = set(scratch.read_text().split())
    left = [folder for folder in sorted(folders) if Path(folder).exists()]
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or ()
        if process.info["status"] != psutil.STATUS_ZOMBIE:
            left += [str(process.pid)] * (any(str(programs) in word for word in words) or bool(folders & set(words)))
    return left


def nothing_is_left_of(programs: Path) -> None:
    wait_until(lambda: not left_of(programs), error=lambda: f"left: {left_of(programs)}")


def test_a_stage_that_is_killed_while_an_engine_at_a_url_answers_goes_on(tmp_path: Path) -> None:
    base = Chained(tmp_path).base
    with engine_server(base) as engine:
        spec, per_update = spec_of(tmp_path, "RLOO", url=engine.url), 2

        def kill_in_the_middle(path: str, number: int) -> Failure | None:
            if path != COMPLETIONS or number < per_update + 1:
                return None
            if number == per_update + 1:
                kill(spec)
            return Failure(hangs=True)

        engine.failing = kill_in_the_middle
        assert on_processes(spec, world_size=1) == [-9]
        assert len(lines_of(spec.work / "content")) == 1, "it was killed in the second update"
        left_behind = [name for name in engine.names if name != "base"]
        engine.failing = lambda path, number: None
        assert on_processes(spec, world_size=1) == [0], logs(spec)
        assert engine.names == ["base", *left_behind], "nobody could tell the server that the first attempt was over"
    lines = lines_of(spec.artifact)
    assert [line["engine/staleness"] for line in lines] == [0.0] * UPDATES
    assert max(line["engine/gap"] for line in lines) < 1e-4
    assert max(line["policy/approxkl_first"] for line in lines) < 1e-10
    assert (spec.run_folder / "log-0.txt").read_text().count(DIFFER) == 1


def test_a_stage_that_is_killed_takes_its_own_engine_with_it_and_goes_on_with_another(tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    spec = spec_of(tmp_path, "PPO", python=str(interpreter_of(programs, Planted(pause=0.5))))
    codes: list[int] = []
    stage = threading.Thread(target=lambda: codes.extend(on_processes(spec, world_size=1)))
    stage.start()
    wait_until(lambda: any(spec.work.glob(f"checkpoints/*/{MANIFEST}")), error=lambda: logs(spec))
    assert len(lines_of(spec.work / "content")) == 1
    assert left_of(programs), "it samples for the second update"
    kill(spec)
    stage.join()
    assert codes == [-9]
    nothing_is_left_of(programs)
    assert on_processes(spec, world_size=1) == [0], logs(spec)
    nothing_is_left_of(programs)
    assert len(lines_of(spec.artifact)) == UPDATES
    assert max(line["engine/gap"] for line in lines_of(spec.artifact)) < 1e-4
    log = (spec.run_folder / "log-0.txt").read_text()
    assert log.count(DIFFER) == 1


def test_an_engine_that_dies_in_an_update_is_started_again_and_the_stage_ends_alike(tmp_path: Path) -> None:
    """The fake server samples by seed alone, so a call that is made again gives the same answers."""
    weights = []
    for name in ("undisturbed", "died"):
        folder = tmp_path / name
        once = str(folder / "once") if name == "died" else ""
        planted = Planted(dies_at=6 if once else 0, once=once)
        spec = spec_of(folder, "PPO", python=str(interpreter_of(folder / "programs", planted)))
        assert on_processes(spec, world_size=1) == [0], logs(spec)
        nothing_is_left_of(folder / "programs")
        log = (spec.run_folder / "log-0.txt").read_text()
        assert ("vLLM ended with exit code 3; it will be started again." in log) is bool(once)
        weights.append({p.name: p.read_bytes() for p in sorted(spec.artifact.rglob("*.safetensors"))})
    assert weights[0] == weights[1]


def test_an_engine_that_always_dies_ends_the_stage_with_its_reason(tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    spec = spec_of(tmp_path, "PPO", python=str(interpreter_of(programs, Planted(dies_at=2))))
    assert on_processes(spec, world_size=1) == [5]
    assert "vLLM ended with exit code 3" in (spec.run_folder / "log-0.txt").read_text()
    assert (spec.work / "engine.log").exists(), "the log stays"
    nothing_is_left_of(programs)


def test_the_command_runs_a_chain_with_an_engine(new_forked: Callable[[], Align], tmp_path: Path) -> None:
    """The plan checks the environment, and the result says the gap."""
    align = new_forked()
    programs = tmp_path / "programs"
    settings = (
        "~stages.dpo",
        "~stages.evaluate_sft",
        "~stages.evaluate",
        "~stages.report",
        "stages.ppo.sampling.engine=vllm",
    )
    nowhere = "stages.ppo.sampling.python=/nowhere/python"
    for printed in (align("plan", *settings, nowhere), align("run", *settings, nowhere, code=2)):
        assert "stages.ppo.sampling.python: /nowhere/python" in printed
    settings += ("stages.ppo.sampling.importance_cap=2.0", f"stages.ppo.sampling.python={interpreter_of(programs)}")
    assert "vLLM has its own copy of the frozen weights" in align("plan", *settings)
    align("run", *settings)
    nothing_is_left_of(programs)
    manifest = json.loads((align.artifact("ppo") / "manifest.json").read_text())
    metrics = manifest["metrics"]
    assert metrics["engine/gap"] < 1e-4
    assert metrics["engine/importance"] == pytest.approx(1.0, abs=1e-4)
    of_engine = {"gap", "gap_max", "beyond", "importance", "capped"}
    assert {name for name in metrics if name.startswith("engine/")} == {f"engine/{name}" for name in of_engine}
    assert 20e6 < manifest["usage"]["peak_engine_bytes"] < 1e9
    align("run", *settings)
    assert align.states()["ppo"] == "reused"
