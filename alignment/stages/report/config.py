"""Settings of a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from alignment.config.rules import POSITIVE
from alignment.config.stage import reference_to


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    """One self-contained HTML file about the run; the driver makes it only from files."""

    kind: str = "report"
    evaluation: str | None = reference_to("stage:evaluate", "evaluation")
    num_samples: Annotated[int, POSITIVE] = 12
