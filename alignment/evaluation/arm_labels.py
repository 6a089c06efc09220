"""Short labels for the arms of an evaluation; torch-free, because the driver uses them too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def labels(arms: Sequence[str]) -> dict[str, str]:
    """A unique label for each arm: ``stage:dpo`` → ``dpo``, ``path:/models/tiny`` → ``tiny``."""
    short = {
        arm: Path(arm.removeprefix("path:")).name if arm.startswith("path:") else arm.removeprefix("stage:")
        for arm in arms
    }
    taken = list(short.values())
    return {arm: label if taken.count(label) == 1 else arm for arm, label in short.items()}
