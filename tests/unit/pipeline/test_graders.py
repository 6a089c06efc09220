"""Evaluations with graded metrics: planned, or refused before anything starts."""

from __future__ import annotations

import importlib.util

import pytest

from alignment.core.errors import ConfigError
from alignment.pipeline.backends.feasibility import why_not_here
from tests.unit.pipeline.conftest import MakePlan

STAGE = "stages.evaluate"
GRADER = f"{STAGE}.grader"
METRIC = f"{STAGE}.metrics=[{{name: helpful, source: grade}}]"
GRADED = [
    METRIC,
    f"{STAGE}.primary=helpful",
    f"{GRADER}.endpoint.base_url='http://localhost:8000/v1'",
    f"{GRADER}.endpoint.model=m",
]


def metric(**settings: object) -> str:
    listed = ", ".join(f"{name}: {value}" for name, value in {"name": "helpful", "source": "grade", **settings}.items())
    return f"{STAGE}.metrics=[{{{listed}}}]"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([METRIC, f"{STAGE}.primary=helpful"], f"{GRADER}.endpoint.base_url: missing"),
        ([METRIC, f"{STAGE}.primary=helpful"], f"{GRADER}.endpoint.model: missing"),
        ([f"{GRADER}.endpoint.model=m"], f"{GRADER}: unused, because no metric has the source 'grade'"),
        ([*GRADED, f"{GRADER}.highest=1"], f"{GRADER}.highest: must be above {GRADER}.lowest, which is 1; it is 1"),
        ([*GRADED, f"{GRADER}.rubric=''"], f"{GRADER}.rubric: '' is not allowed"),
        ([*GRADED, f"{GRADER}.max_invalid=1.5"], f"{GRADER}.max_invalid: 1.5 is not allowed"),
        (
            [*GRADED, f"{GRADER}.endpoint.timeout=300"],
            f"{GRADER}.endpoint.timeout: 300 seconds times 3 attempts is not",
        ),
        ([*GRADED, f"{GRADER}.endpoint.api_key_env=sk-123"], "the name of an environment variable"),
        ([*GRADED, f"{GRADER}.endpoint.criteria=x"], f"{GRADER}.endpoint.criteria: unknown key"),
        ([*GRADED, metric(pattern="x")], f"{STAGE}.metrics[0].pattern: 'x' has no effect; only 'regex' uses it"),
        (
            [*GRADED, metric(aggregate="pass@2"), f"{STAGE}.answers={{per_prompt: 2, temperature: 1}}"],
            f"{STAGE}.metrics[0].passing_score: 1 lets all grades pass or none, because grades go from 1 to 10",
        ),
        (
            [f"{STAGE}.metrics=[{{name: a, source: refusal, rubric: x}}]", f"{STAGE}.primary=a"],
            f"{STAGE}.metrics[0].rubric: has no effect; only the source 'grade' uses it, but source is 'refusal'",
        ),
        (
            ["stages.ppo.scorers=[{source: grade}]"],
            "stages.ppo.scorers[0].grader: missing; 'grade' needs it",
        ),
    ],
)
def test_a_grader_that_cannot_grade_is_refused(plan: MakePlan, overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(*overrides)
    assert words in str(caught.value)


def test_a_graded_metric_is_planned_and_its_settings_are_the_evaluations(plan: MakePlan) -> None:
    def fingerprint(*overrides: str) -> str:
        return next(stage.fingerprint for stage in plan(*overrides).stages if stage.name == "evaluate")

    first = fingerprint(*GRADED)
    assert first == fingerprint(*GRADED, f"{GRADER}.endpoint.timeout=30", f"{GRADER}.endpoint.api_key_env=KEY")
    changes = [
        f"{GRADER}.rubric=short",
        f"{GRADER}.highest=5",
        f"{GRADER}.show_reference=true",
        f"{GRADER}.endpoint.model=n",
        metric(rubric="short"),
    ]
    assert len({first, *(fingerprint(*GRADED, change) for change in changes)}) == 6


def test_a_missing_client_and_a_missing_key_are_named(plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADER_KEY", raising=False)
    planned = plan(*GRADED, f"{GRADER}.endpoint.api_key_env=GRADER_KEY")
    assert f"{GRADER}.endpoint.api_key_env: the environment variable GRADER_KEY is not set" in why_not_here(planned)
    monkeypatch.setenv("GRADER_KEY", "sk-canary")
    assert why_not_here(planned) == ""
    assert "canary" not in repr(planned)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openai" else find_spec(name))
    with pytest.raises(ConfigError, match=r"metrics\[0\]\.source: 'grade' needs the package openai"):
        plan(*GRADED)
