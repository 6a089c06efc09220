"""The gates of an evaluation: which are refused, which are met, and what a run prints of them."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from alignment.core.errors import ConfigError, GateNotMet
from alignment.pipeline.execute import gates, notes
from alignment.pipeline.execute.plan_table import show_plan
from alignment.pipeline.execute.run import run_plan
from alignment.pipeline.plan.plan import Plan, make_plan
from alignment.records.evaluation import (
    ArmResult,
    Comparison,
    Evaluation,
    Metric,
    Sample,
    SampleAnswer,
    write_samples,
)
from alignment.records.run import RunRecord
from tests.unit.pipeline.conftest import MakePlan, leave_artifact

GATE = "stages.evaluate.gate"
METRICS = (
    "[{name: total, source: length, target: 9}, {name: errors, source: regex, pattern: x, higher_is_better: false}]"
)
SFT, DPO = "stage:sft", "stage:dpo"


def gated(plan: MakePlan, *entries: str, limit: int = 20) -> Plan:
    """With gates, and as many held-out prompts as they need."""
    return plan(
        *settings(*entries),
        "stages.evaluate.data.source=bundled:quickstart/heldout",
        f"stages.evaluate.data.limit={limit}",
    )


def settings(*entries: str) -> list[str]:
    return [f"stages.evaluate.metrics={METRICS}", f"{GATE}=[{', '.join(entries)}]"]


def left(plan: Plan, totals: Sequence[float], errors: Sequence[float] = (0.0,), *, before: float = 0.25) -> Plan:
    """With a result in which DPO's scores exceed SFT's by ``totals`` and ``errors``, one prompt after another.

    The totals of SFT are ``before``, its errors 0.5."""
    stage = next(stage for stage in plan.stages if stage.name == "evaluate")
    leave_artifact(stage)
    metrics = [Metric(name="total"), Metric(name="errors", higher_is_better=False)]
    arms = [ArmResult(name=SFT), ArmResult(name=DPO)]
    Evaluation(metrics=metrics, primary="total", arms=arms).write(stage.artifact)
    samples = [
        Sample(
            id=str(number),
            answers={
                SFT: SampleAnswer(scores={"total": before, "errors": 0.5}),
                DPO: SampleAnswer(scores={"total": before + more, "errors": 0.5 + errors[number % len(errors)]}),
            },
        )
        for number, more in enumerate(totals)
    ]
    write_samples(stage.artifact, samples)
    return plan


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            "{arm: 'stage:sft', against: 'stage:ddpo'}",
            f"{GATE}[0].against: 'stage:ddpo' is not an arm of this evaluation; did",
        ),
        (
            "{arm: 'stage:sft', against: 'stage:sft'}",
            f"{GATE}[0]: 'stage:sft' cannot be compared with itself; name two",
        ),
        (
            "{arm: 'stage:dpo', against: 'stage:sft', metric: totl}",
            f"{GATE}[0].metric: no metric 'totl'; did you mean 'total'?",
        ),
        (
            "{arm: 'stage:dpo', against: 'stage:sft', min_difference: 1e7}",
            f"{GATE}[0].min_difference: 10000000.0 is not allowed",
        ),
        ("{against: 'stage:sft'}", f"{GATE}[0].arm: '' is not an arm of this evaluation;"),
    ],
)
def test_a_gate_that_cannot_be_is_refused(plan: MakePlan, entry: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        gated(plan, entry)
    assert words in str(caught.value)


def test_a_gate_needs_a_metric(plan: MakePlan) -> None:
    with pytest.raises(ConfigError, match=r"compares by a metric, and stages\.evaluate\.metrics is empty; add one"):
        plan("stages.evaluate.metrics=[]", f"{GATE}=[{{arm: 'stage:dpo', against: 'stage:sft'}}]")


@pytest.mark.parametrize(
    ("margin", "totals", "met"),
    [
        (0.0, [0.25] * 10, True),
        (0.24, [0.25] * 10, True),
        (0.25, [0.25] * 10, False),  # not above it
        (0.0, [0.0] * 10, False),  # an arm that changed nothing
        (0.0, [0.25] * 9, False),  # too few prompts
        (0.0, [0.5, -0.4] * 5, False),  # better in the mean, and not with confidence
        (-0.5, [0.5, -0.4] * 5, True),
        (-0.1, [-0.25] * 10, False),
    ],
)
def test_the_whole_interval_has_to_lie_above_the_margin(
    plan: MakePlan, margin: float, totals: Sequence[float], met: bool
) -> None:
    made = left(gated(plan, f"{{arm: 'stage:dpo', against: 'stage:sft', min_difference: {margin}}}"), totals)
    assert (gates.not_met(made.stages) == []) is met


@pytest.mark.parametrize(
    ("margin", "before", "totals", "met"),
    [
        (0.0, 0.0, [1.0] * 4 + [0.0] * 196, False),  # p = 2 / 2⁴ = 0.125
        (0.0, 0.25, [0.5] * 4 + [0.0] * 196, False),
        (0.0, 0.0, [1.0] * 12 + [0.0] * 188, True),
        (0.05, 0.0, [1.0] * 12 + [0.0] * 188, False),  # real, but it may be smaller
        (-0.05, 1.0, [-1.0] * 4 + [0.0] * 196, False),
        (-0.1, 1.0, [-1.0] * 4 + [0.0] * 196, True),
        (-0.06, 0.0, [0.0] * 54, False),  # z² / (54 + z²) = 0.066
        (-0.07, 0.0, [0.0] * 54, True),
        (-0.01, 0.25, [0.0] * 54, False),  # of a score without a range, equal prompts say nothing of others
        (-0.01, 0.25, [0.25] * 54, True),
    ],
)
def test_a_gate_is_met_only_by_what_the_evaluation_would_call_real(
    plan: MakePlan, margin: float, before: float, totals: Sequence[float], met: bool
) -> None:
    made = gated(plan, f"{{arm: 'stage:dpo', against: 'stage:sft', min_difference: {margin}}}")
    assert (gates.not_met(left(made, totals, before=before).stages) == []) is met


@pytest.mark.parametrize(("metric", "met"), [("total", True), ("errors", False)])
def test_a_gate_on_a_pair_that_the_evaluation_compares_takes_its_verdict(
    plan: MakePlan, metric: str, met: bool
) -> None:
    """That by the metric of the gate: only the difference in ``total`` is real."""
    made = left(
        gated(plan, f"{{arm: 'stage:dpo', against: 'stage:sft', metric: {metric}}}"), [0.25] * 10, errors=[-0.25]
    )
    artifact = next(stage.artifact for stage in made.stages if stage.name == "evaluate")
    pair = Comparison(arm=SFT, against=DPO, difference=-0.25, low=-0.25, high=-0.25)
    total = replace(pair, metric="total", adjusted_p=0.04)
    errors = replace(pair.turned(), metric="errors", adjusted_p=0.06)
    replace(Evaluation.read(artifact), comparisons=[total], other_comparisons=[errors]).write(artifact)
    assert (gates.not_met(made.stages) == []) is met


def test_less_of_a_metric_may_be_better(plan: MakePlan) -> None:
    fewer = "{arm: 'stage:dpo', against: 'stage:sft', metric: errors, min_difference: 0.2}"
    assert gates.not_met(left(gated(plan, fewer), [0.0] * 10, errors=[-0.25]).stages) == []
    more = "{arm: 'stage:sft', against: 'stage:dpo', metric: errors, min_difference: 0.2}"
    assert gates.not_met(gated(plan, more).stages) != []


def test_a_run_ends_with_the_gates_that_are_not_met(plan: MakePlan) -> None:
    entries = [
        "{arm: 'stage:dpo', against: 'stage:sft', min_difference: 0.1}",
        "{arm: 'stage:dpo', against: 'stage:sft', min_difference: 0.5}",
        "{arm: 'stage:dpo', against: base}",
    ]
    made = left(gated(plan, *entries), [0.25] * 10)
    with pytest.raises(GateNotMet) as caught:
        gates.refuse(made.stages, made.config.stages)
    assert caught.value.exit_code == 10
    assert str(caught.value).splitlines() == [
        "stages.evaluate.gate[1]: dpo − sft in total: +0.250 (+0.250 to +0.250), required: the whole interval above "
        "+0.5",
        "  stages.evaluate.gate[2]: dpo − base in total: not known, because no different prompts have a score of both "
        "arms, and a gate needs at least 10",
        "  → stages.evaluate.gate sets the requirement",
    ]


def test_a_run_of_reused_results_prints_the_gates_that_are_met(plan: MakePlan) -> None:
    met = "{arm: 'stage:dpo', against: 'stage:sft', min_difference: 0.1}"
    missed = "{arm: 'stage:dpo', against: 'stage:sft', min_difference: 0.5}"
    without_report = ("~stages.report", "stages.evaluate.data.source=bundled:quickstart/heldout")
    made = left(plan(*settings(met, missed, met), *without_report), [0.25] * 10)
    for stage in made.stages:
        if stage.name != "evaluate":
            leave_artifact(stage)
    screen = io.StringIO()
    with pytest.raises(GateNotMet, match=r"evaluate\.gate\[1\]"):
        run_plan(plan(*settings(met, missed, met), *without_report), console=Console(file=screen, width=80))
    figures = "dpo − sft in total: +0.250 (+0.250 to +0.250), required: the whole interval above +0.1"
    assert screen.getvalue().splitlines()[-2:] == [f"{GATE}[{number}] is met: {figures}" for number in (0, 2)]
    assert run_plan(plan(*settings(met), *without_report), console=Console(file=screen, width=80)) == 0
    assert screen.getvalue().splitlines()[-1] == f"{GATE}[0] is met: {figures}"


@pytest.mark.parametrize("backend", ["local", "slurm"])
def test_a_run_of_reused_results_is_recorded_with_the_gate_that_it_misses(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    sbatch = tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.touch(0o755)  # it has nothing to submit
    monkeypatch.setenv("PATH", str(sbatch.parent), prepend=os.pathsep)
    gate = settings("{arm: 'stage:dpo', against: 'stage:sft', min_difference: 0.5}")
    more = (*gate, "~stages.report", "stages.evaluate.data.source=bundled:quickstart/heldout")
    made = left(plan(*more), [0.25] * 10)
    for stage in made.stages:
        if stage.name != "evaluate":
            leave_artifact(stage)
    with pytest.raises(GateNotMet):
        run_plan(plan(*more, f"launch/backend={backend}"), console=Console(file=io.StringIO()))
    assert RunRecord.read(made.run_folder).state == "gate not met"


def test_a_worse_arm_and_a_metric_of_which_less_is_better_read_well(plan: MakePlan) -> None:
    entries = [
        "{arm: 'stage:dpo', against: 'stage:sft', min_difference: -0.01}",
        "{arm: 'stage:sft', against: 'stage:dpo', metric: errors}",
    ]
    made = left(gated(plan, *entries), [-1.0] * 10, errors=[0.0])
    assert gates.not_met(made.stages) == [
        f"{GATE}[0]: dpo − sft in total: −1.000 (−1.000 to −1.000), required: the whole interval above −0.01",
        f"{GATE}[1]: dpo − sft in errors (less is better): 0.000 (0.000 to 0.000), required: the whole interval above "
        "0",
    ]


@pytest.mark.parametrize(
    ("totals", "advised"),
    [([0.5, -0.4] * 5, True), ([0.0] * 10, False), ([-0.25] * 10, False), ([-0.5, 0.4] * 5, False)],
)
def test_more_prompts_are_advised_only_where_the_interval_is_too_wide(
    plan: MakePlan, totals: Sequence[float], advised: bool
) -> None:
    made = left(gated(plan, "{arm: 'stage:dpo', against: 'stage:sft'}"), totals)
    with pytest.raises(GateNotMet) as caught:
        gates.refuse(made.stages, made.config.stages)
    assert ("more prompts" in caught.value.remedy) is advised


def test_a_gate_needs_as_many_held_out_prompts_as_there_are(plan: MakePlan) -> None:
    entry = "{arm: 'stage:dpo', against: 'stage:sft'}"
    with pytest.raises(ConfigError) as caught:
        plan(*settings(entry))
    words = f"{GATE}: a gate needs at least 10 different held-out prompts, and stages.evaluate.data has 1; add prompts"
    assert words in str(caught.value)
    with pytest.raises(ConfigError, match=r"stages\.evaluate\.data has 9; add prompts"):
        gated(plan, entry, limit=9)
    gated(plan, entry, limit=10)


def test_prompts_of_a_gate_are_different_and_are_used(plan: MakePlan, tmp_path: Path) -> None:
    entry = "{arm: 'stage:dpo', against: 'stage:sft'}"
    file = tmp_path / "many.jsonl"

    def held_out(prompts: Sequence[str], *more: str) -> Plan:
        rows = [{"messages": [{"role": "user", "content": prompt}]} for prompt in prompts]
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return plan(*settings(entry), f"stages.evaluate.data.source=path:{file}", *more)

    different = [f"What is {number} and {number}?" for number in range(20)]
    with pytest.raises(ConfigError, match=r"stages\.evaluate\.data has 1; add prompts"):
        held_out(["What is 1 and 1?"] * 12)
    with pytest.raises(ConfigError, match=r"stages\.evaluate\.data has 8; add prompts"):
        held_out(different, "stages.evaluate.data.fraction=0.4")
    held_out(different, "stages.evaluate.data.fraction=0.5")


def test_a_plan_shows_its_gates(plan: MakePlan) -> None:
    entries = [
        "{arm: 'stage:dpo', against: base, min_difference: -0.01}",
        "{arm: 'stage:dpo', against: 'stage:sft', metric: errors}",
    ]
    screen = io.StringIO()
    show_plan(Console(file=screen, width=200), gated(plan, *entries))
    shown = screen.getvalue().splitlines()
    assert "evaluate requires dpo − base in total: the whole interval above −0.01" in shown
    assert "evaluate requires sft − dpo in errors (less is better): the whole interval above 0" in shown


def test_a_smoke_run_says_that_it_drops_gates(overrides: list[str], tmp_path: Path) -> None:
    recipe, dropped = tmp_path / "mine.yaml", "profile=smoke drops the gates of evaluate"
    rest = "defaults: [quickstart, _self_]\nsummary: mine\n"
    recipe.write_text(f"{rest}stages: {{evaluate: {{gate: [{{arm: 'stage:dpo', against: base}}]}}}}\n")
    assert dropped in notes.of_plan(make_plan(str(recipe), [*overrides, "profile=smoke"]))
    recipe.write_text(rest)
    assert dropped not in notes.of_plan(make_plan(str(recipe), [*overrides, "profile=smoke"]))


def test_the_report_is_made_again_with_other_gates(plan: MakePlan) -> None:
    def fingerprint(*entries: str) -> str:
        return next(stage.fingerprint for stage in gated(plan, *entries).stages if stage.name == "report")

    entry = "{arm: 'stage:dpo', against: 'stage:sft'}"
    assert len({fingerprint(), fingerprint(entry), fingerprint(entry, entry)}) == 3


def test_another_gate_makes_nothing_again(plan: MakePlan) -> None:
    def fingerprint(*entries: str) -> str:
        return next(stage.fingerprint for stage in gated(plan, *entries).stages if stage.name == "evaluate")

    assert fingerprint("{arm: 'stage:dpo', against: 'stage:sft'}") == fingerprint()


def test_before_there_is_a_result_no_gate_is_judged(plan: MakePlan) -> None:
    made = gated(plan, "{arm: 'stage:dpo', against: 'stage:sft', min_difference: 0.5}")
    gates.refuse(made.stages, made.config.stages)
    assert gates.met(made.stages) == []
