"""A user's function that raises on one of two processes: both end, and the one it raised on is named."""

from __future__ import annotations

from pathlib import Path

from alignment.config.scoring import ScorerConfig
from alignment.records.worker import Status
from tests.chained import LORA, Chained, config_of
from tests.distributed.processes import on_processes
from tests.distributed.test_sharding import logs

SCORER = """\
import os, time
from alignment import worker

def score(prompts, completions, rows):
    if os.environ["RANK"] == "0":
        return [0.5 for _ in completions]
    report = worker._finish
    worker._finish = lambda *values, **named: (time.sleep(3), report(*values, **named))
    raise ValueError("not today")
"""


def test_the_process_that_raised_is_named_by_the_other_one_too(tmp_path: Path) -> None:
    """The other process reports first, because the one that raises sleeps before it reports."""
    file = tmp_path / "scorer.py"
    file.write_text(SCORER)
    config = config_of("ppo", LORA, reward=None, scorers=[ScorerConfig(source=f"{file}:score")])
    spec = Chained(tmp_path).spec("ppo", LORA, config=config)
    assert on_processes(spec) == [9, 9], logs(spec)
    status = Status.read(spec.run_folder)
    assert status is not None
    assert status.where == "stage ppo, process 1 of 2"
    assert "raised ValueError: not today" in status.error
