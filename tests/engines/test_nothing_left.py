"""A run whose PPO stage samples with vLLM leaves no process, port or temporary folder, however it ends.
``REPETITIONS=10`` tries each end ten times, half of them while vLLM starts and half while it samples."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import Align, environment
from tests.engines.leftovers import Watched, watched
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.engines
HEAD_DIM = 32  # the smallest that vLLM's attention takes on a CPU
UPDATES = 40
PATIENCE = 300.0
CLEANING = 30.0
REPETITIONS = int(os.environ.get("REPETITIONS", "1"))
RECIPE = """
defaults:
  - base
  - stage@stages.ppo: ppo
  - _self_
summary: one stage that samples with vLLM
stages:
  ppo:
    init: base
    reward: null
    scorers: [{{source: "{scorer}:score"}}]
    data: {{source: "bundled:quickstart/preferences", limit: 8}}
    updates: {updates}
    max_new_tokens: 8
    max_prompt_length: 2048
    optim: {{batch_size: 8, micro_batch_tokens: 2000}}
    sampling: {{engine: vllm, python: "{python}", cache_gb: 0.2}}
"""
SCORER = """
import time
from pathlib import Path
CALLS = [0]
def score(prompts, completions, rows):
    CALLS[0] += 1
    if CALLS[0] == {fails_at}:
        raise RuntimeError("this scorer fails")
    time.sleep(0.5)
    return [float(len(answer)) for answer in completions]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that vLLM takes."""
    folder, tokenizer = tmp_path_factory.mktemp("model") / "tiny", tiny_tokenizer()
    tiny_model(vocab_size=len(tokenizer), head_dim=HEAD_DIM).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def argv_of(folder: Path, model: Path, python: Path, *, updates: int, fails_at: int = 0) -> list[str]:
    """The command of a run in ``folder``."""
    scorer, recipe = folder / "scorer.py", folder / "served.yaml"
    scorer.write_text(SCORER.format(fails_at=fails_at))
    recipe.write_text(RECIPE.format(scorer=scorer, python=python, updates=updates))
    align = Align(output=folder / "output", model=model, recipe=str(recipe))
    argv = align.argv("run")
    return [word for word in argv if not word.startswith("stages.")]


def logged(folder: Path) -> int:
    """Updates that the stage has logged."""
    files = list(folder.glob("output/artifacts/ppo-*.work/content/metrics.jsonl"))
    return files[0].read_text().count("\n") if files else 0


def until(condition: Callable[[], object], watch: Watched, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert watch.command.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)


def worker_of(watch: Watched) -> psutil.Process:
    """The process of the stage, which is forked where there is no GPU."""
    return next(process for process in watch.processes.values() if process.is_running() and _is_worker(process))


def _is_worker(process: psutil.Process) -> bool:
    parent = process.parent()
    is_forked = parent is not None and all("alignment.fork_server" in each.cmdline() for each in (parent, process))
    return is_forked or "alignment.worker" in process.cmdline()


def interrupted(watch: Watched) -> None:
    watch.command.send_signal(signal.SIGINT)


def worker_killed(watch: Watched) -> None:
    worker_of(watch).kill()


def driver_killed(watch: Watched) -> None:
    watch.command.kill()


ENDS: dict[str, tuple[Callable[[Watched], None], int]] = {
    "Ctrl-C": (interrupted, 130),
    "kill -9 of the worker": (worker_killed, 5),
    "kill -9 of the driver": (driver_killed, -9),
}


@pytest.mark.parametrize("repetition", range(REPETITIONS))
@pytest.mark.parametrize(("fails_at", "code"), [(0, 0), (3, 9)], ids=["success", "failure"])
def test_nothing_is_left_of_a_run_that_ends_by_itself(
    tmp_path: Path, model: Path, vllm_python: Path, fails_at: int, code: int, repetition: int
) -> None:
    log = tmp_path / "printed"
    argv = argv_of(tmp_path, model, vllm_python, updates=3, fails_at=fails_at)
    with watched(argv, environment(), log) as watch:
        until(watch.servers, watch, log)
        ended = watch.command.wait(PATIENCE)
        assert ended == code, log.read_text()[-3000:]
        assert watch.left_after(CLEANING) == []
    assert len(watch.ports) >= 1
    assert any("alignment-server-" in path for path in watch.files)


@pytest.mark.parametrize("repetition", range(REPETITIONS))
@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_left_of_a_run_that_is_ended(
    tmp_path: Path, model: Path, vllm_python: Path, end: str, repetition: int
) -> None:
    log, rng = tmp_path / "printed", random.Random(f"{end} {repetition}")
    act, code = ENDS[end]
    with watched(argv_of(tmp_path, model, vllm_python, updates=UPDATES), environment(), log) as watch:
        until(watch.servers, watch, log)
        if repetition % 2 == 0:
            until(lambda: logged(tmp_path) >= 1, watch, log)
        time.sleep(rng.uniform(0.0, 3.0))
        worker = worker_of(watch)
        act(watch)
        ended = watch.command.wait(PATIENCE)
        psutil.wait_procs([worker], timeout=PATIENCE)  # a stage goes on to its end without its driver
        assert watch.left_after(CLEANING) == []
        assert ended == code, log.read_text()[-3000:]
