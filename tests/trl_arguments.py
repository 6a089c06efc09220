"""Arguments of TRL's own trainers where a test compares a stage with one: float32 on a CPU, nothing kept."""

from __future__ import annotations

from typing import Any

QUIET_FLOAT32: dict[str, Any] = {
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}
