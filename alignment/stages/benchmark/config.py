"""Settings of a stage that runs tasks of lm-evaluation-harness."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from alignment.config.rules import FILLED, NOT_NEGATIVE, POSITIVE
from alignment.config.stage import not_identity


@dataclass(kw_only=True, slots=True)
class BenchmarkConfig:
    """Runs ``tasks`` of lm-evaluation-harness on every arm, and compares arms row by row.

    ``arms`` are ``base``, ``stage:NAME``, ``path:FOLDER`` and ``hub:ORG/NAME@REVISION``. ``tasks`` are names of tasks,
    groups or tags in the YAML files of ``task_folders``. ``limit`` measures only the first rows of each task, to try a
    task out; such figures cannot be compared with others. ``num_fewshot`` replaces each task's own number of examples.
    With ``apply_chat_template`` prompts are turns of a conversation, otherwise plain text.

    ``max_length`` is the largest number of tokens that a model reads at once, by default all of its positions; longer
    prompts lose their beginning. ``max_new_tokens`` limits the answers of tasks that set no limit themselves; its
    default is also the harness's. ``micro_batch_tokens`` tokens are scored at once, and ``batch_size`` answers are
    generated at once. ``bootstrap_samples`` is the number of resamples for the intervals of differences, and for
    standard errors without a formula.
    """

    kind: str = "benchmark"
    arms: Annotated[list[str], FILLED] = field(
        default_factory=lambda: ["base"], metadata={"reference": ("policy",), "identity": False}
    )
    tasks: list[str] = field(default_factory=list)
    task_folders: list[str] = field(default_factory=list, metadata={"identity": False})
    limit: Annotated[int | None, POSITIVE] = None
    num_fewshot: Annotated[int | None, NOT_NEGATIVE] = None
    apply_chat_template: bool = False
    max_length: Annotated[int | None, POSITIVE] = None
    max_new_tokens: Annotated[int, POSITIVE] = 256
    micro_batch_tokens: Annotated[int, POSITIVE] = not_identity(4096)
    batch_size: Annotated[int, POSITIVE] = not_identity(64)
    bootstrap_samples: Annotated[int, POSITIVE] = 2000
