"""The real stage: the hardware's peak is measured, then ``alignment.worker`` runs in this process as under the driver.

Seconds are differences of ``seconds`` in the stage's own ``metrics.jsonl``.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from alignment import worker
from alignment.core.child_processes import end_process
from benchmarks.measure import matmul_peak, write_result
from benchmarks.setting import PROMPTS, read_json


def main(task_file: Path) -> int:
    """Exit code of the worker; the result is written only where that is 0."""
    task = read_json(task_file)
    peak = matmul_peak()
    code = worker.main(Path(task["stage_file"]))
    if code != 0:
        return code
    lines = Path(task["artifact"], "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps: list[dict[str, Any]] = [json.loads(line) for line in lines]
    clock = [step["seconds"] for step in steps]
    figures: dict[str, Any] = {"losses": [step["loss"] for step in steps if "loss" in step]}
    if "response_length" in steps[-1]:
        measured = [step["response_length"] for step in steps[1:]]
        figures["answer_tokens"] = PROMPTS * sum(measured) / len(measured)
        figures["updates"] = steps
    seconds = [after - before for before, after in pairwise(clock)]
    write_result(Path(task["result"]), peak=peak, seconds=seconds, **figures)
    return 0


if __name__ == "__main__":
    end_process(main(Path(sys.argv[1])))
