"""The metrics of an evaluation as a plan sees them: named, checked, and part of its identity."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignment.core.errors import AlignmentError, ConfigError, DataError
from alignment.core.fingerprint import file_sha256
from alignment.pipeline.plan.compose import compose
from alignment.pipeline.plan.plan import PlannedStage
from tests.unit.pipeline.conftest import TURN, MakePlan

METRICS = "stages.evaluate.metrics"
STYLE = "{name: style, source: 'bundled:quickstart/house_style.py:style'}"


SAMPLED = "stages.evaluate.answers={per_prompt: 4, temperature: 0.7}"


def evaluation(plan: MakePlan, *settings: str) -> PlannedStage:
    return next(stage for stage in plan(*settings).stages if stage.name == "evaluate")


def of(*metrics: str) -> str:
    return f"{METRICS}=[{', '.join(metrics)}]"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([of("{source: length, target: 9}")], f"{METRICS}[0].name: missing; write a name"),
        ([of("{name: a b, source: length, target: 9}")], f"{METRICS}[0].name: 'a b' is not allowed"),
        ([of(STYLE, STYLE)], f"{METRICS}[1].name: 'style' is used twice"),
        ([of("{name: loss, source: length, target: 9}")], f"{METRICS}[0].name: 'loss' is reserved"),
        ([of("{name: primary, source: length, target: 9}")], f"{METRICS}[0].name: 'primary' is reserved"),
        (
            [of("{name: short, source: lenght}")],
            f"{METRICS}[0].source: 'lenght' is not a scorer; did you mean 'length'?",
        ),
        ([of("{name: short, source: length}")], f"{METRICS}[0].target: missing; 'length' needs it"),
        ([of("{name: short}")], f"{METRICS}[0].source: missing; allowed: reward, a reward model"),
        ([of("{name: s, source: 'nowhere.py:score'}")], "nowhere.py"),
        (
            [of("{name: r, source: reward}"), "stages.evaluate.reward=null"],
            f"{METRICS}[0].source: 'reward' needs the model in stages.evaluate.reward, which is null; name",
        ),
        ([of("{name: r, source: 'stage:sft'}")], "'stage:sft' is a policy; this slot takes a reward model"),
        (["stages.evaluate.primary=stile"], "stages.evaluate.primary: no metric 'stile'; did you mean 'style'?"),
        (
            [of(), "stages.evaluate.primary=style"],
            "stages.evaluate.primary: no metric 'style'; there are no metrics; add one, or set null",
        ),
        (
            ["stages.evaluate.answers={per_prompt: 4}"],
            "stages.evaluate.answers.temperature: 4 greedy answers to a prompt are all the same; set temperature",
        ),
        (
            [SAMPLED, of("{name: p, source: length, target: 9, aggregate: pass@8}")],
            f"{METRICS}[0].aggregate: 'pass@8' needs at least 8 answers per prompt; set answers.per_prompt",
        ),
        (
            [SAMPLED, of("{name: p, source: length, target: 9, aggregate: pass@2, higher_is_better: false}")],
            f"{METRICS}[0].aggregate: 'pass@2' counts high scores as correct, but for this metric lower is better",
        ),
        (
            [SAMPLED, of("{name: m, source: length, target: 9, aggregate: majority}")],
            f"{METRICS}[0].aggregate: 'majority' compares final answers, which only the source exact_answer has",
        ),
        (
            [of("{name: m, source: exact_answer, aggregate: majority}")],
            f"{METRICS}[0].aggregate: 'majority' needs several answers per prompt; set answers.per_prompt",
        ),
        (
            [of("{name: m, source: length, target: 9, aggregate: median}")],
            f"{METRICS}[0].aggregate: 'median' is not allowed; mean, majority, or pass@K, such as pass@4",
        ),
        (
            ["stages.evaluate.system_prompt=null"],
            "stages.evaluate.system_prompt: missing, but the arm 'base+prompt' needs it; write a system prompt, or",
        ),
        (["stages.evaluate.system_prompt=''"], "stages.evaluate.system_prompt: missing, but the arm 'base+prompt'"),
    ],
)
def test_a_metric_that_cannot_be_is_refused(plan: MakePlan, settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(*settings)
    assert words in str(caught.value)


def test_any_prompts_do_and_rows_are_held_against_what_a_rule_looks_at(plan: MakePlan, tmp_path: Path) -> None:
    file = tmp_path / "heldout.jsonl"
    rows = [{"messages": [TURN], "answer": "#### 21"}, {"messages": [TURN]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan(of())
    right = of("{name: right, source: exact_answer}")
    plan(right, "stages.evaluate.data.limit=1")
    with pytest.raises(DataError, match=rf"{file}:2: 'answer' is missing"):
        plan(right)


def test_the_code_of_a_metric_counts_by_its_content_alone(plan: MakePlan, tmp_path: Path) -> None:
    file, moved = tmp_path / "score.py", tmp_path / "moved.py"
    file.write_text("def brevity(prompts, completions, rows): return [-len(text) for text in completions]\n")
    moved.write_bytes(file.read_bytes())
    first = evaluation(plan, of(f"{{name: brevity, source: '{file}:brevity'}}"))
    assert first.identity["code"] == {"metrics[0].source": file_sha256(file)}
    assert evaluation(plan, of(f"{{name: brevity, source: '{moved}:brevity'}}")).fingerprint == first.fingerprint
    file.write_text(file.read_text().replace("-len", "-2 * len"))
    assert evaluation(plan, of(f"{{name: brevity, source: '{file}:brevity'}}")).fingerprint != first.fingerprint


def test_what_counts_of_metrics_and_of_a_system_prompt(plan: MakePlan) -> None:
    bare = ["stages.evaluate.arms=[base, 'stage:sft']"]
    before = evaluation(plan, *bare).fingerprint
    same = (["stages.evaluate.primary=style_and_facts"], ["stages.evaluate.system_prompt=Be brief."])
    other = (["stages.evaluate.primary=style"], [f"{METRICS}.1.higher_is_better=false"], [f"{METRICS}.1.name=manner"])
    assert {evaluation(plan, *bare, *settings).fingerprint for settings in same} == {before}
    assert len({before, *(evaluation(plan, *bare, *settings).fingerprint for settings in other)}) == 4
    prompted = [
        evaluation(plan, *settings).fingerprint for settings in ([], ["stages.evaluate.system_prompt=Be brief."])
    ]
    assert prompted[0] != prompted[1]


def test_a_metric_may_be_a_reward_model_of_its_own(plan: MakePlan, tmp_path: Path) -> None:
    stage = evaluation(plan, of("{name: liked, source: 'stage:reward'}"), "stages.evaluate.reward=null")
    assert stage.inputs["metrics[0].source"].ref == "stage:reward"
    assert "reward" not in stage.inputs
    missing = of(f"{{name: liked, source: 'path:{tmp_path}/nowhere'}}")
    with pytest.raises(AlignmentError, match="nowhere"):
        plan(missing)


def test_a_recipe_that_samples_runs_as_smoke(tmp_path: Path) -> None:
    recipe = tmp_path / "sampled.yaml"
    recipe.write_text(
        "defaults: [base, stage@stages.evaluate: evaluate, _self_]\nsummary: samples\nstages:\n  evaluate:\n"
        "    arms: [base]\n    reference: base\n    reward: null\n"
        "    answers: {per_prompt: 4, temperature: 1.0}\n    gate: [{arm: base, against: base}]\n"
        "    metrics: [{name: p, source: length, target: 9, aggregate: pass@4}]\n"
    )
    tree = compose(str(recipe), ["profile=smoke"]).tree["stages"]["evaluate"]
    assert (tree["answers"], tree["gate"]) == ({"per_prompt": 4, "temperature": 1.0}, [])
