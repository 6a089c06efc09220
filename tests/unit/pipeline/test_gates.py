"""The gates of evaluations and of forgetting: which are refused, which are met, and what a run says of them."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from alignment.core.errors import ConfigError, DataError, GateNotMet
from alignment.pipeline.execute import gates, notes
from alignment.pipeline.execute.run import run_plan
from alignment.pipeline.execute.summary import show_forgetting
from alignment.pipeline.plan.plan import Plan, make_plan
from alignment.records.evaluation import ArmResult, Comparison, Evaluation, Metric, Sample, SampleAnswer, write_samples
from alignment.records.interval import Interval
from alignment.records.run import RunRecord
from alignment.records.stages import ArmForgetting, Forgetting, Limits
from tests.unit.pipeline.conftest import MakePlan, changed, leave_artifact, screened, stage_of, write, write_rows

GATE = "stages.evaluate.gate"
METRICS = (
    "[{name: total, source: length, target: 9}, {name: errors, source: regex, pattern: x, higher_is_better: false}]"
)
SFT, DPO = "stage:sft", "stage:dpo"


def entry(arm: str = DPO, against: str = SFT, **more: object) -> str:
    given = {"arm": arm, "against": against, **more}
    return f"{{{', '.join(f'{key}: {value!r}' for key, value in given.items())}}}"


def settings(*entries: str, data: str = "bundled:quickstart/heldout") -> list[str]:
    gate = f"{GATE}=[{', '.join(entries)}]"
    return [f"stages.evaluate.metrics={METRICS}", gate, f"stages.evaluate.data.source={data}"]


def gated(plan: MakePlan, *entries: str, limit: int = 20) -> Plan:
    return plan(*settings(*entries), f"stages.evaluate.data.limit={limit}")


def left(plan: Plan, totals: Sequence[float], errors: Sequence[float] = (0.0,), *, before: float = 0.25) -> Plan:
    stage = stage_of(plan, "evaluate")
    leave_artifact(stage)
    metrics = [Metric(name="total"), Metric(name="errors", higher_is_better=False)]
    Evaluation(metrics=metrics, primary="total", arms=[ArmResult(name=SFT), ArmResult(name=DPO)]).write(stage.artifact)
    samples = []
    for number, more in enumerate(totals):
        scores = {
            SFT: {"total": before, "errors": 0.5},
            DPO: {"total": before + more, "errors": 0.5 + errors[number % len(errors)]},
        }
        answers = {arm: SampleAnswer(scores=of_arm) for arm, of_arm in scores.items()}
        samples.append(Sample(id=str(number), answers=answers))
    write_samples(stage.artifact, samples)
    return plan


@pytest.mark.parametrize(
    ("of_gate", "where", "word"),
    [
        (entry(SFT, "stage:ddpo"), f"{GATE}[0].against", "did you mean 'stage:dpo'"),
        (entry(metric="totl"), f"{GATE}[0].metric", "'total'"),
        (entry(min_difference=1e7), f"{GATE}[0].min_difference", "not allowed"),
        ("{against: 'stage:sft'}", f"{GATE}[0].arm", "not an arm"),
    ],
)
def test_a_gate_that_cannot_be_is_refused(plan: MakePlan, of_gate: str, where: str, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        gated(plan, of_gate)
    assert (caught.value.where, word in caught.value.message) == (where, True)


def test_a_gate_needs_a_metric_and_different_prompts_that_are_used(plan: MakePlan, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stages\.evaluate\.metrics is empty"):
        plan("stages.evaluate.metrics=[]", f"{GATE}=[{entry()}]")

    def held_out(prompts: Sequence[str], *more: str) -> Plan:
        rows = [{"messages": [{"role": "user", "content": prompt}]} for prompt in prompts]
        return plan(*settings(entry(), data=f"path:{write_rows(tmp_path / 'many.jsonl', *rows)}"), *more)

    different = [f"What is {number} and {number}?" for number in range(20)]
    for prompts, more, number in (
        (different[:1] * 12, (), 1),
        (different[:9], (), 9),
        (different, ("stages.evaluate.data.fraction=0.4",), 8),
    ):
        with pytest.raises(ConfigError, match=rf"at least 10 different .*stages\.evaluate\.data has {number}; add"):
            held_out(prompts, *more)
    held_out(different[:10])
    held_out(different, "stages.evaluate.data.fraction=0.5")


@pytest.mark.parametrize(
    ("margin", "before", "totals", "met"),
    [
        (0.24, 0.25, [0.25] * 10, True),
        (0.25, 0.25, [0.25] * 10, False),  # not above it
        (0.0, 0.25, [0.25] * 9, False),  # too few prompts
        (0.0, 0.25, [0.5, -0.4] * 5, False),  # better in the mean, and not with confidence
        (0.0, 0.0, [1.0] * 4 + [0.0] * 196, False),  # p = 2 / 2⁴ = 0.125
        (0.0, 0.0, [1.0] * 12 + [0.0] * 188, True),
        (0.05, 0.0, [1.0] * 12 + [0.0] * 188, False),  # real, but it may be smaller
        (-0.1, 1.0, [-1.0] * 4 + [0.0] * 196, True),
        (-0.06, 0.0, [0.0] * 54, False),  # z² / (54 + z²) = 0.066
        (-0.01, 0.25, [0.0] * 54, False),  # of a score without a range, equal prompts say nothing of others
    ],
)
def test_the_whole_interval_has_to_lie_above_the_margin_and_the_difference_to_be_real(
    plan: MakePlan, margin: float, before: float, totals: Sequence[float], met: bool
) -> None:
    made = left(gated(plan, entry(min_difference=margin)), totals, before=before)
    assert (gates.not_met(made.stages) == []) is met


@pytest.mark.parametrize(("metric", "met"), [("total", True), ("errors", False)])
def test_a_gate_on_a_compared_pair_takes_its_verdict(plan: MakePlan, metric: str, met: bool) -> None:
    """That by the metric of the gate: only the difference in ``total`` is real."""
    made = left(gated(plan, entry(metric=metric)), [0.25] * 10, errors=[-0.25])
    artifact = stage_of(made, "evaluate").artifact
    pair = Comparison(arm=SFT, against=DPO, difference=-0.25, low=-0.25, high=-0.25)
    total = replace(pair, metric="total", adjusted_p=0.04)
    errors = replace(pair.turned(), metric="errors", adjusted_p=0.06)
    replace(Evaluation.read(artifact), comparisons=[total], other_comparisons=[errors]).write(artifact)
    assert (gates.not_met(made.stages) == []) is met


def test_less_of_a_metric_may_be_better(plan: MakePlan) -> None:
    fewer = entry(metric="errors", min_difference=0.2)
    assert gates.not_met(left(gated(plan, fewer), [0.0] * 10, errors=[-0.25]).stages) == []
    made = left(gated(plan, entry(min_difference=-0.01), entry(SFT, DPO, metric="errors"), limit=21), [-1.0] * 10)
    above = "required: the whole interval above"
    assert gates.not_met(made.stages) == [
        f"{GATE}[0]: dpo − sft in total: −1.000 (−1.000 to −1.000), {above} −0.01",
        f"{GATE}[1]: dpo − sft in errors (less is better): 0.000 (0.000 to 0.000), {above} 0",
    ]
    assert "evaluate requires dpo − sft in errors (less is better): the whole interval above 0" in screened(made)


def test_a_run_ends_with_the_gates_that_are_not_met(plan: MakePlan) -> None:
    entries = [entry(min_difference=0.1), entry(min_difference=0.5), entry(against="base")]
    made = left(gated(plan, *entries), [0.25] * 10)
    with pytest.raises(GateNotMet) as caught:
        gates.refuse(made.stages, made.config.stages)
    assert caught.value.exit_code == 10
    first, second, remedy = str(caught.value).splitlines()
    above = "required: the whole interval above +0.5"
    assert first == f"{GATE}[1]: dpo − sft in total: +0.250 (+0.250 to +0.250), {above}"
    assert second.startswith(f"  {GATE}[2]: dpo − base in total: not known, because no different prompts have a score")
    assert remedy == f"  → {GATE} sets the requirement"


WITHOUT_REPORT = "~stages.report"


@pytest.fixture
def reused(plan: MakePlan) -> None:
    made = left(plan(*settings(), WITHOUT_REPORT), [0.25] * 10)
    for stage in made.stages:
        if stage.name != "evaluate":
            leave_artifact(stage)


@pytest.mark.usefixtures("reused")
@pytest.mark.parametrize("backend", ["local", "slurm"])
def test_a_run_of_reused_results_ends_with_its_gates(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    sbatch = tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.touch(0o755)  # it has nothing to submit
    monkeypatch.setenv("PATH", str(sbatch.parent), prepend=os.pathsep)
    met, missed = entry(min_difference=0.1), entry(min_difference=0.5)
    planned = plan(*settings(met, missed, met), WITHOUT_REPORT, f"launch/backend={backend}")
    screen = io.StringIO()
    with pytest.raises(GateNotMet, match=r"evaluate\.gate\[1\]"):
        run_plan(planned, console=Console(file=screen, width=80))
    assert RunRecord.read(planned.run_folder).state == "gate not met"
    figures = "dpo − sft in total: +0.250 (+0.250 to +0.250), required: the whole interval above +0.1"
    assert screen.getvalue().splitlines()[-2:] == [f"{GATE}[{number}] is met: {figures}" for number in (0, 2)]


def test_other_gates_make_only_the_report_again_and_none_is_judged_before_there_is_a_result(plan: MakePlan) -> None:
    without, gate, two = gated(plan), gated(plan, entry()), gated(plan, entry(), entry())
    assert changed(without, gate) == changed(gate, two) == ["report"]
    gates.refuse(gate.stages, gate.config.stages)
    assert gates.met(gate.stages) == []


Gate = Callable[..., Plan]


@pytest.fixture
def forgetting(tmp_path: Path, overrides: list[str]) -> Gate:
    stages = ", ".join(f"stage@stages.{name}: {name}" for name in ("sft", "reward", "ppo", "forgetting"))
    recipe = write(tmp_path / "gate.yaml", f"defaults: [base, {stages}, _self_]\n")
    given = [override for override in overrides if not override.startswith(("stages.dpo", "stages.evaluate"))]
    return lambda arms, *more: make_plan(recipe, [*given, f"stages.forgetting.arms={arms}", *more])


BOTH = "['stage:sft','stage:ppo']"


def test_questions_and_texts_are_checked_and_part_of_the_result(forgetting: Gate, tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    source, question = f"stages.forgetting.questions.source=path:{file}", {"question": "2 + 2?", "choices": ["3", "4"]}
    write_rows(file, {**question, "answer": "5"})
    with pytest.raises(DataError, match=r"own\.jsonl:1: 'answer' is '5', which is not one of the choices: '3', '4'"):
        forgetting(BOTH, source)
    write_rows(file, {**question, "answer": "4"})
    before = forgetting(BOTH, source).stages[-1]
    assert before.extra_data["questions"] == file
    write_rows(file, {**question, "answer": 0})
    assert forgetting(BOTH, source).stages[-1].fingerprint != before.fingerprint
    with pytest.raises(DataError, match="contains no rows"):
        forgetting(BOTH, f"stages.forgetting.data.source=path:{write(tmp_path / 'texts.jsonl', '')}")


def test_without_limits_the_terminal_does_not_say_passed(capsys: pytest.CaptureFixture[str]) -> None:
    base = ArmForgetting(name="base", perplexity=28.6, ability=0.6)
    arm = replace(base, name="stage:sft", label="sft", perplexity=497.0, rise=Interval(mean=16.39), passed=True)
    for judged, verdict in ((True, "sft passed: "), (False, "sft not judged: ")):
        show_forgetting(Console(), "forgetting", Forgetting(judged=judged, arms=[base, arm]))
        text = capsys.readouterr().out
        assert (verdict in text, "passed" in text) == (True, judged)


def test_a_run_ends_with_the_arms_that_forgot_and_what_helps_each(forgetting: Gate) -> None:
    plan = forgetting(BOTH)
    leave_artifact(plan.stages[-1])
    arms = [ArmForgetting(name=f"stage:{arm}", label=arm, passed=False, reasons=["too dear"]) for arm in ("sft", "ppo")]
    Forgetting(arms=[ArmForgetting(name="base", passed=True), *arms], passed=False).write(plan.stages[-1].artifact)
    with pytest.raises(GateNotMet) as caught:
        gates.refuse(plan.stages, plan.config.stages)
    assert caught.value.exit_code == 10
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[:2] == [f"stages.forgetting: {arm} forgot too much: too dear" for arm in ("sft", "ppo")]
    assert "stages.sft.data.mix=[{source: 'bundled:general/conversations'}]" in lines[2]
    assert "stages.ppo.ptx.coefficient" in lines[3]
    assert "max_perplexity_rise and max_ability_drop" in lines[4]


def test_arms_within_the_limits_are_named_with_their_figures_and_the_limits(forgetting: Gate) -> None:
    plan = forgetting(BOTH)
    stage = plan.stages[-1]
    leave_artifact(stage)
    base = ArmForgetting(name="base", passed=True)
    rise, drop = Interval(mean=0.02, low=0.015, high=0.025), Interval(mean=-0.01, low=-0.03, high=0.02)
    arm = replace(base, name="stage:sft", label="sft", rise=rise, drop=drop)
    forgetful = replace(arm, name="stage:ppo", label="ppo", passed=False, reasons=["too dear"])
    record = Forgetting(limits=Limits(perplexity_rise=0.2, ability_drop=0.05), arms=[base, arm, forgetful])
    within = "stages.forgetting: sft is within the limits: perplexity of general text +2.0% (+1.5% to +2.5%), "
    within += "required: a rise of at most 20.0%"
    drop_in_words = "; questions answered right +1.0% (-2.0% to +3.0%), required: a drop of at most 5.0%"
    for limits, lines in (
        (record.limits, [within + drop_in_words]),
        (Limits(perplexity_rise=0.2), [within]),
        (Limits(), []),
    ):
        replace(record, limits=limits, judged=bool(lines)).write(stage.artifact)
        assert gates.met(plan.stages) == lines


def test_a_smoke_run_says_that_it_drops_gates(overrides: list[str], tmp_path: Path) -> None:
    for stages, is_dropped in ((f"stages: {{evaluate: {{gate: [{entry(against='base')}]}}}}", True), ("", False)):
        recipe = write(tmp_path / "mine.yaml", f"defaults: [quickstart, _self_]\nsummary: mine\n{stages}\n")
        every = notes.of_plan(make_plan(recipe, [*overrides, "profile=smoke"]))
        assert ("profile=smoke drops the gates of evaluate" in every) is is_dropped
