"""SFT, reward model, DPO and PPO as one planned run: a driver plans, workers train, artifacts connect them.

The names below are the public API (docs/python.md). They are imported when they are first used, so that importing this
package, and ``align --help``, takes no time.
"""

from __future__ import annotations

__version__ = "0.1.0"

import importlib
import logging
from typing import TYPE_CHECKING, Any

# PEFT imports it, and its first word on some CPUs is that a kernel which nobody asked for cannot be downloaded.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_HOMES = {
    "alignment.api.calls": ("RunPlan", "StagePlan", "plan", "run", "sweep"),
    "alignment.api.loaded_run": ("Run", "RunStage", "Series", "Sweep", "load_run", "load_sweep"),
    "alignment.core.artifacts": ("Manifest",),
    "alignment.core.errors": (
        "AlignmentError",
        "ArtifactError",
        "Busy",
        "ConfigError",
        "DataError",
        "DiskError",
        "GateNotMet",
        "ModelError",
        "NonFiniteError",
        "Preempted",
        "RewardError",
        "StageError",
        "StoreError",
    ),
    "alignment.pipeline.plan.actions": ("Action",),
    "alignment.records.cost": ("PhaseCost", "RunCost", "StageCost"),
    "alignment.records.evaluation": ("ArmResult", "Comparison", "Evaluation", "Metric", "Sample", "SampleAnswer"),
    "alignment.records.stages": ("ArmForgetting", "Forgetting"),
    "alignment.records.interval": ("Interval",),
    "alignment.records.reward_card": ("RewardCard",),
    "alignment.records.run": ("RunRecord", "StageEntry"),
    "alignment.records.sweep_record": ("Goal", "SweepRecord", "Trial"),
    "alignment.records.worker": ("Progress",),
    "alignment.report.run_page.run_records": ("Difference",),
}
"""The public names by the module that defines them."""
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from alignment.api.calls import RunPlan, StagePlan, plan, run, sweep
    from alignment.api.loaded_run import Run, RunStage, Series, Sweep, load_run, load_sweep
    from alignment.core.artifacts import Manifest
    from alignment.core.errors import (
        AlignmentError,
        ArtifactError,
        Busy,
        ConfigError,
        DataError,
        DiskError,
        GateNotMet,
        ModelError,
        NonFiniteError,
        Preempted,
        RewardError,
        StageError,
        StoreError,
    )
    from alignment.pipeline.plan.actions import Action
    from alignment.records.cost import PhaseCost, RunCost, StageCost
    from alignment.records.evaluation import ArmResult, Comparison, Evaluation, Metric, Sample, SampleAnswer
    from alignment.records.interval import Interval
    from alignment.records.reward_card import RewardCard
    from alignment.records.run import RunRecord, StageEntry
    from alignment.records.stages import ArmForgetting, Forgetting
    from alignment.records.sweep_record import Goal, SweepRecord, Trial
    from alignment.records.worker import Progress
    from alignment.report.run_page.run_records import Difference
else:  # a type checker would take any name for one that exists

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_MODULE_OF})


__all__ = [
    "Action",
    "AlignmentError",
    "ArmForgetting",
    "ArmResult",
    "ArtifactError",
    "Busy",
    "Comparison",
    "ConfigError",
    "DataError",
    "Difference",
    "DiskError",
    "Evaluation",
    "Forgetting",
    "GateNotMet",
    "Goal",
    "Interval",
    "Manifest",
    "Metric",
    "ModelError",
    "NonFiniteError",
    "PhaseCost",
    "Preempted",
    "Progress",
    "RewardCard",
    "RewardError",
    "Run",
    "RunCost",
    "RunPlan",
    "RunRecord",
    "RunStage",
    "Sample",
    "SampleAnswer",
    "Series",
    "StageCost",
    "StageEntry",
    "StageError",
    "StagePlan",
    "StoreError",
    "Sweep",
    "SweepRecord",
    "Trial",
    "load_run",
    "load_sweep",
    "plan",
    "run",
    "sweep",
]
