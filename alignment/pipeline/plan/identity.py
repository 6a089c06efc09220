"""What defines a stage's result: the canonical form that is hashed into its fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment.config.run import RunConfig
from alignment.config.stage import StageConfig
from alignment.core.artifacts import EVALUATION
from alignment.core.fingerprint import canonical, digest, file_sha256
from alignment.data.chat_template import template_text
from alignment.pipeline.plan import references, scorer_checks
from alignment.pipeline.sources.model_sources import ModelSource
from alignment.stages.registry import kind_of


def of_stage(
    run: RunConfig,
    name: str,
    *,
    base: ModelSource,
    data: dict[str, str],
    inputs: dict[str, str],
    arms: dict[str, str],
    files: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """The identity of a stage. ``data`` maps each data field to the identity of its content; ``inputs`` and ``arms``
    map each slot to the fingerprint of what it holds. ``files`` are other files that it reads, by field.

    The stage's name is part of it because random numbers are derived from it. Paths, launch, tracking, and how often
    a stage logs or saves are not.
    """
    stage = run.stages[name]
    kind = kind_of(stage)
    others = {field: content for field, content in data.items() if field != "data"}
    optional = {
        "extra_data": others,
        "code": scorer_checks.code(stage),
        "files": {
            **kind.files.content(stage, f"stages.{name}"),
            **{field: file_sha256(path) for field, path in (files or {}).items()},
        },
    }  # left out if empty, as in results that are older than these keys
    return {
        "stage": name,
        "kind": stage.kind,
        "revision": kind.revision,
        "rule": None,  # older results hold a hash here if a rule of the package scored
        "config": canonical(_as_read(stage)),
        "data": data.get("data"),
        "inputs": inputs,
        "arms": arms,
        "base": {"content": base.identity, "dtype": run.model.dtype.value, **_template(run)},
        "seed": run.seed,
        **{key: value for key, value in optional.items() if value},
    }


def _as_read(stage: StageConfig) -> StageConfig:
    """The stage without paths, and without the settings of an arm or a loss that it does not use."""
    return scorer_checks.without_paths(kind_of(stage).as_read(stage))


def _template(run: RunConfig) -> dict[str, Any]:
    """Empty for the tokenizer's own template without options, as in results that are older than these settings."""
    template, options = run.model.chat_template, run.model.template_options
    named = {} if template is None else {"chat_template": digest(template_text(template))}
    return named | ({"template_options": canonical(options)} if options else {})


def of_report(run: RunConfig, name: str, *, inputs: dict[str, str]) -> dict[str, Any]:
    """A report shows the whole run, so ``inputs`` holds every other stage's fingerprint, which lacks its gates."""
    stage = run.stages[name]
    kind = kind_of(stage)
    gates = {other: canonical(kind_of(config).outcome.gates(config)) for other, config in run.stages.items()}
    gated = {other: requirements for other, requirements in gates.items() if requirements}
    optional = {"gates": gated, "shown": _shown(run, stage)}  # left out if empty, as in reports of before these keys
    return {
        "stage": name,
        "kind": stage.kind,
        "revision": kind.revision,
        "config": canonical(stage),
        "inputs": inputs,
        "run": {"name": run.name, "summary": run.summary},
        **{key: value for key, value in optional.items() if value},
    }


def _shown(run: RunConfig, report: StageConfig) -> dict[str, Any]:
    """The references in the slots of a report; empty for a report on the only evaluation of its run."""
    shown = {slot.field: slot.ref for slot in references.slots(report)}
    evaluations = [f"stage:{name}" for name, config in run.stages.items() if kind_of(config).produces == EVALUATION]
    return {} if list(shown.values()) == evaluations else shown or {"evaluation": "nothing"}
