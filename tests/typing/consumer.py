"""What a type checker knows of the public API: ``make check`` runs mypy on this file, and nothing runs it."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import alignment
from alignment import Action, Evaluation, Interval, Run, RunPlan, Sweep, load_run, load_sweep, plan, run, sweep


def consume() -> None:
    """Uses every function, with each form of its arguments."""
    planned = plan("quickstart", ["stages.dpo.beta=0.3"], cost=True, device="h100")
    assert_type(planned, RunPlan)
    assert_type(planned.stages["dpo"].action, Action)
    finished = run(
        Path("mine.yaml"), {"stages.dpo.beta": 0.3, "stages.sft.optim": {"lr": 2e-4}}, stage="dpo", wait=True
    )
    assert_type(finished, Run)
    assert_type(load_run("runs/quickstart").evaluation, Evaluation | None)
    assert_type(finished.stages["dpo"].usage, dict[str, float])
    assert_type(sweep("quickstart", "dpo_beta", at_once=2), Sweep)
    assert_type(load_sweep("sweeps/quickstart.dpo_beta").best[0].figures, list[Interval])
    try:
        run("quickstart", overrides=(), quiet=True)
    except alignment.AlignmentError as error:
        assert_type(error.exit_code, int)
    plan("quickstart", {"stages.sft": {1}})  # type: ignore[dict-item]
    run("quickstart", only="dpo")  # type: ignore[call-arg]
    alignment.lode_run("runs/quickstart")  # type: ignore[attr-defined]
