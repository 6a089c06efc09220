"""A worker without a model: reads ``stage.yaml`` and does what the contract asks of a worker, in a process of its own.

``WORKER_FAULT=stage:what`` makes that stage ``fail``, ``reward``, ``disk``, ``crash``, ``template``, ``bug``,
``preempt``, ``part`` (store a part of its result, and then the same), ``hang`` or ``lie`` (say that it is done and
leave nothing), or come to its end with a ``note`` or with metrics by ``chance``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignment.core.artifacts import Manifest, publish, write_json
from alignment.core.deadline import KILLED_BY
from alignment.job import StageSpec
from alignment.records.worker import Progress
from alignment.stages.registry import kind_of, read_spec

INTERVAL = {"mean": 0.5, "low": 0.4, "high": 0.6}


def main(path: Path) -> int:
    spec = read_spec(path)
    print(f"working on {spec.stage}")
    stage, _, fault = os.environ.get("WORKER_FAULT", ":").partition(":")
    noted, by_chance = (stage == spec.stage and fault == end for end in ("note", "chance"))
    if stage == spec.stage and not (noted or by_chance):
        misbehave(spec, fault)
    write_json(spec.work / "progress.json", {"phase": "training", "step": 1, "total": 2, "figures": {"loss": 1.5}})
    content = spec.work / "content"
    content.mkdir(exist_ok=True)
    (content / "metrics.jsonl").write_text('{"step": 1, "seconds": 0.1, "loss": 1.5}\n')
    if spec.arms:
        write_json(content / "evaluation.json", evaluation(spec))
    manifest = Manifest(
        stage=spec.stage,
        kind=kind_of(spec.config).produces,
        fingerprint=spec.fingerprint,
        identity=spec.identity,
        inputs=spec.input_fingerprints,
        usage={"seconds": 1.0},
        metrics={"eval_accuracy": 0.4, "eval_rows": 30.0} if by_chance else {},
    )
    publish(content, spec.artifact, manifest)
    shutil.rmtree(spec.work)
    return say(spec, "done", 0, "", notes=["TensorBoard failed"] if noted else [])


def misbehave(spec: StageSpec, fault: str) -> None:
    if fault == "crash":
        Progress(phase="trying the longest batch").write(spec.work)
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "silence":
        os._exit(1)
    if fault == "template":
        os.kill(os.getpid(), KILLED_BY)
    if fault == "hang":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(say(spec, "preempted", 75, "stopped on request")))
        (spec.run_folder / "hanging").touch()
        time.sleep(60)
    if fault == "part":
        parts = spec.work / "checkpoints"
        parts.mkdir(exist_ok=True)
        (parts / f"part-{len(list(parts.iterdir()))}.json").touch()
    if fault == "torn":
        (spec.run_folder / "status.json").write_text('{"state": 3}')
        sys.exit(5)
    states = {
        "fail": ("failed", 6, "the loss is NaN at step 3\n  → lower the learning rate"),
        "reward": ("failed", 9, "score.py:brevity: gave nan"),
        "disk": ("failed", 12, "no space left on the device; 4 kB are free"),
        "bug": ("failed", 1, "KeyError: 'x'"),
        "preempt": ("preempted", 75, "stopped on request"),
        "part": ("preempted", 75, "stopped on request"),
        "lie": ("done", 0, ""),
    }
    sys.exit(say(spec, *states[fault]))


def evaluation(spec: StageSpec) -> dict[str, Any]:
    arms = [
        {
            "name": name,
            "label": name.removeprefix("stage:"),
            "metrics": {"style_and_facts": INTERVAL, "style": INTERVAL},
            "words": {"mean": 21.4},
            "reward": INTERVAL if "reward" in spec.inputs else None,
            "greedy_log_ratio": None if name == "base+prompt" else INTERVAL,
            "distinct": 1.0,
            "ended": {"mean": 1.0},
            "seconds": 1.0,
        }
        for name in spec.arms
    ]
    comparisons = [
        {"arm": "stage:dpo", "against": "stage:sft", "difference": 0.08, "low": 0.02, "high": 0.14, "real": True},
        {"arm": "base", "against": "stage:sft", "difference": -0.01, "low": -0.05, "high": 0.03, "real": False},
    ]
    comparisons = [row for row in comparisons if row["arm"] in spec.arms]
    metrics = [{"name": "style_and_facts"}, {"name": "style"}]
    measurements = {"metrics": metrics, "primary": "style_and_facts", "arms": arms, "comparisons": comparisons}
    return {"num_prompts": 30, **measurements, "tasks": {}, "version": 2}


def say(spec: StageSpec, state: str, code: int, error: str, *, notes: Sequence[str] = ()) -> int:
    status = {"state": state, "exit_code": code, "error": error, "where": f"stage {spec.stage}", "notes": notes}
    (spec.run_folder / "status.json").write_text(json.dumps(status))
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
