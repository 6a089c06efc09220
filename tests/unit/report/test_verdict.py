"""The sentences at the top of the report say what the intervals say, and nothing more; figures may speak against it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from alignment.records.evaluation import ArmResult, Comparison, Evaluation, Grading, Judge, JudgedPair, Metric
from alignment.records.interval import Interval
from alignment.report.doubts import of_evaluation
from alignment.report.run_page.run_files import read_run
from alignment.report.run_page.verdict import Verdict, judge
from alignment.stages.registry import doubts
from tests.unit.report.conftest import FakeRun, comparison

# ---- the lead -------------------------------------------------------------------------------------------------------


def verdict(run: FakeRun, *pairs: tuple[str, str, float]) -> Verdict:
    """The verdict on a run; in which the arms of ``pairs`` differ by so much, with a half-width of 0.05."""
    if pairs:
        run.evaluation["comparisons"] = [comparison(*pair, 0.05) for pair in pairs]
    run.write()
    return judge(read_run(run.folder))


def against_sft(run: FakeRun, **differences: float) -> Verdict:
    return verdict(run, *((f"stage:{arm}", "stage:sft", difference) for arm, difference in differences.items()))


HELPED = "Preference training helped: dpo beats sft."


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ({"dpo": 0.09, "ppo": 0.08}, "helped: dpo and ppo beat sft."),
        ({"dpo": 0.09}, "helped: dpo beats sft."),
        ({"dpo": -0.09, "ppo": -0.2}, "hurt: dpo and ppo fall behind sft."),
        ({"dpo": 0.03, "ppo": -0.01}, "is not shown to have helped: dpo and ppo cannot be told apart from sft."),
        ({"dpo": 0.09, "ppo": -0.07}, "had mixed results: dpo beats sft; ppo falls behind sft."),
    ],
)
def test_the_lead_says_whether_preference_training_helped(fake_run, differences, expected):
    assert against_sft(fake_run, **differences).lead == f"Preference training {expected}"


def test_every_trained_arm_is_held_against_the_untrained_ones_whichever_way_round(fake_run):
    pairs = [("stage:sft", "stage:dpo", -0.09), ("base+prompt", "base", 0.1)]
    pairs += [("stage:sft", "base", 0.1), ("stage:dpo", "base", 0.2), ("stage:ppo", "base", 0.01)]
    pairs += [("base+prompt", "stage:dpo", -0.3), ("stage:ppo", "base+prompt", -0.2)]
    assert verdict(fake_run, *pairs).lead == (
        f"{HELPED} Against base: sft and dpo beat base; ppo cannot be told apart from base. Against base+prompt: dpo "
        "beats base+prompt; ppo falls behind base+prompt."
    )


@pytest.mark.parametrize(
    ("scorers", "training"),
    [
        ([{"source": "exact_answer"}], "Reinforcement learning"),
        ([{"source": "exact_answer"}, {"source": "reward"}], "Preference training"),
        ([{"source": "ensemble", "ensemble": {"members": [{"source": "stage:judge"}]}}], "Preference training"),
    ],
)
def test_training_on_scores_of_rules_is_not_called_preference_training(fake_run, scorers, training):
    fake_run.run["config"]["stages"]["ppo"]["scorers"] = scorers
    assert against_sft(fake_run, ppo=0.2).lead == f"{training} helped: ppo beats sft."
    if training == "Reinforcement learning":
        expected = f"{HELPED} Reinforcement learning hurt: ppo falls behind sft."
        assert against_sft(fake_run, dpo=0.2, ppo=-0.2).lead == expected


def test_preference_training_is_held_against_the_policy_that_it_started_from(fake_run):
    """Not against another stage that learned from demonstrations, whose data would be credited to it."""
    stages = fake_run.run["stages"]
    stages["smaller"] = {**stages["sft"], "artifact": "smaller-1"}
    stages["again"] = {**stages["dpo"], "inputs": {"init": "stage:dpo"}, "artifact": "again-1"}
    for name in ("smaller", "again"):
        fake_run.run["config"]["stages"][name] = dict(fake_run.run["config"]["stages"]["sft"])
    pairs = [("stage:dpo", "stage:sft", 0.01), ("stage:dpo", "stage:smaller", 0.2), ("stage:again", "stage:sft", 0.2)]
    expected = "Preference training had mixed results: again beats sft; dpo cannot be told apart from sft."
    assert verdict(fake_run, *pairs).lead == expected


def test_without_preference_stages_the_lead_says_which_arms_are_better(fake_run):
    fake_run.drop_arms(["base", "base+prompt", "stage:sft"])
    expected = "By quality, base+prompt is better than base; sft is better than base and base+prompt."
    assert verdict(fake_run).lead == expected
    turned = [(pair["against"], pair["arm"], -pair["difference"]) for pair in fake_run.evaluation["comparisons"]]
    assert sorted(verdict(fake_run, *turned).lead) == sorted(expected), "the same pairs, each from the other side"
    fake_run.drop_arms(["base", "stage:sft"])
    expected = "By quality, no arm is shown to be better than another."
    assert verdict(fake_run, ("stage:sft", "base", 0.01)).lead == expected


def test_without_a_metric_or_another_arm_no_arm_is_called_better(fake_run):
    fake_run.evaluation.update(metrics=[], primary=None, comparisons=[], tasks={})
    expected = "The evaluation has no metric and no judge, so no arm is called better than another."
    assert verdict(fake_run).lead == expected
    pair = {"arm": "stage:dpo", "against": "stage:sft", "wins": 8, "ties": 1, "losses": 1, "verdict": "better"}
    fake_run.evaluation["judge"] = {"name": "some-model", "pairs": [pair, pair | {"verdict": "no real difference"}]}
    expected = "The evaluation has no metric. By some-model, 1 of 2 pairs of arms shows a real difference."
    assert verdict(fake_run).lead == expected
    fake_run.drop_arms(["stage:sft"])
    assert verdict(fake_run).lead == "Only sft was evaluated, so there is nothing to compare it with."
    assert "The evaluation contains no comparisons." in fake_run.html()


def test_a_smoke_run_or_too_few_prompts_conclude_nothing(fake_run):
    fake_run.evaluation["num_prompts"], fake_run.run["profile"] = 10, "half"
    assert verdict(fake_run).differences
    fake_run.evaluation["num_prompts"] = 9
    html = fake_run.html()
    sentences = verdict(fake_run)
    assert sentences.lead == "Only 9 prompts were evaluated, too few for a verdict, which needs at least 10."
    assert sentences.differences == []
    assert 'role="cell">real</span>' not in html
    assert html.count('<span class="verdict open" role="cell">fewer than 10 prompts</span>') == 6
    fake_run.run["profile"] = "smoke"
    fake_run.headlines["reward"]["eval_accuracy"] = 0.0
    lead = "This is a smoke run: it shows only that the recipe runs; its numbers mean nothing."
    assert verdict(fake_run) == Verdict(lead=lead, differences=[], warnings=[])


# ---- differences ----------------------------------------------------------------------------------------------------


def test_real_and_not_shown_differences_are_told_apart(fake_run):
    html = fake_run.html()
    sentences = verdict(fake_run)
    assert "dpo is really better than sft: +0.090 in quality (95\u202f% interval +0.035 to +0.145)." in html
    assert "ppo is really worse than dpo: −0.060 in quality" in html
    assert len(sentences.differences) == 6
    sizes = [re.findall(r": [+−](\d\.\d+) in", sentence) for sentence in sentences.differences[:-1]]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes[0]) == 1
    assert sentences.differences[-1] == (
        "Not shown, because the interval includes zero: a difference between ppo and sft."
    )
    assert all(sentence in html for sentence in (sentences.lead, *sentences.differences))
    assert html.count('<span class="verdict open" role="cell">no real difference</span>') == 1
    assert html.count('role="cell">real</span>') == 5
    assert sentences.warnings == []
    assert "Read this first" not in html


def test_a_difference_that_is_lost_by_the_correction_has_a_reason_of_its_own(fake_run):
    fake_run.evaluation["comparisons"] = [
        comparison("stage:dpo", "stage:sft", 0.09, 0.05) | {"p": 0.03, "adjusted_p": 0.09},
        comparison("stage:ppo", "stage:sft", 0.01, 0.05) | {"p": 0.7, "adjusted_p": 0.7},
    ]
    assert verdict(fake_run).differences == [
        "Not shown, because the interval includes zero: a difference between ppo and sft.",
        "Not shown, because its p value, corrected, is 0.05 or more: a difference between dpo and sft.",
    ]


# ---- others contradict ----------------------------------------------------------------------------------------------


def judged(arm: str, against: str, rate: float, decided: str) -> dict[str, object]:
    win_rate = {"mean": rate, "low": rate - 0.05, "high": rate + 0.05}
    counts = {"wins": 40, "ties": 20, "losses": 40}
    return {"arm": arm, "against": against, **counts, "win_rate": win_rate, "verdict": decided}


PREFERS_SFT = " By quality, dpo is better than sft, but a-model prefers sft (win rate 0.70)."


@pytest.mark.parametrize(
    ("pair", "more"),
    [
        (judged("stage:sft", "stage:dpo", 0.7, "better"), PREFERS_SFT),
        (judged("stage:dpo", "stage:sft", 0.3, "worse"), PREFERS_SFT),
        (judged("stage:ppo", "stage:sft", 0.3, "worse"), ""),
        (judged("stage:sft", "stage:dpo", 0.7, "fewer than 10 prompts"), ""),
    ],
)
def test_a_judge_that_contradicts_the_primary_metric_is_in_the_headline(fake_run, pair, more):
    fake_run.evaluation["judge"] = {"kind": "endpoint", "name": "a-model", "num_prompts": 100, "pairs": [pair]}
    assert against_sft(fake_run, dpo=0.09).lead == HELPED + more


@pytest.mark.parametrize(
    ("gain", "contradicts", "turned"),
    [(0.8, True, False), (0.8, True, True), (0.03, False, True), (-0.8, False, False)],
)
def test_a_reward_model_that_really_likes_what_is_really_worse_is_named(fake_run, gain, contradicts, turned):
    arms = ("stage:sft", "stage:ppo", -gain) if turned else ("stage:ppo", "stage:sft", gain)
    fake_run.evaluation["reward_comparisons"] = [comparison(*arms, 0.05) | {"metric": "reward"}]
    sentences = against_sft(fake_run, ppo=-0.1)
    more = " By quality, sft is better than ppo, but the reward model scores ppo higher (+0.800)."
    assert sentences.lead == f"Preference training hurt: ppo falls behind sft.{more if contradicts else ''}"
    warning = "The reward model scores ppo above sft although its quality is really worse: a sign of over-optimisation."
    assert sentences.warnings == ([warning] if contradicts else [])


def test_a_winner_that_says_the_same_to_everybody_is_doubted_in_the_headline(fake_run):
    for arm in fake_run.evaluation["arms"]:
        arm["distinct"] = 0.03 if arm["name"] == "stage:ppo" else 0.98
    sentences = against_sft(fake_run, ppo=0.3)
    doubt = "only 3% of the answers of ppo are distinct, against 98% of those of sft: read some before you trust its"
    assert sentences.lead == f"Preference training helped: ppo beats sft. But {doubt} score."
    assert [warning for warning in sentences.warnings if doubt in warning.lower()] == []


# ---- warnings -------------------------------------------------------------------------------------------------------


def warned(run: FakeRun) -> str:
    return "\n".join(verdict(run).warnings)


def test_arms_that_are_degenerate_far_away_or_endless_are_named(fake_run):
    ppo = fake_run.evaluation["arms"][-1]
    ppo |= {"distinct": 0.31, "ended": {"mean": 0.93}, "greedy_log_ratio": {"mean": 41.0, "low": 38.0, "high": 44.0}}
    text = warned(fake_run)
    assert "ppo is degenerate: only 31\u202f% of its answers are distinct, against " in text
    assert "ppo has moved far from the reference: its greedy answers have a log-ratio of 41.0 nats (more th" in text
    assert "Some answers never ended and were cut off at the limit: 7\u202f% of those from ppo." in text
    ppo |= {"greedy_log_ratio": None, "kl": {"mean": 400.0}}
    assert "ppo has moved far from the reference: it has a KL divergence of 400.0 nats" in warned(fake_run)
    fake_run.evaluation["metrics"][0]["of_answers"] = False  # nothing that arms are compared by reads their answers
    text = warned(fake_run)
    assert "degenerate" not in text
    assert "Some answers never ended" in text, "the other metrics read them"
    for part in (*fake_run.evaluation["metrics"], *fake_run.evaluation["arms"]):
        part.update({"of_answers": False} if "higher_is_better" in part else {"reward": None})
    assert "Some answers never ended" not in warned(fake_run)


@pytest.mark.parametrize(("distinct", "kl"), [(0.5, 25.0), (1.0, 0.0), (None, None)])
def test_figures_at_the_limit_or_missing_raise_no_warning(fake_run, distinct, kl):
    ratio = None if kl is None else {"mean": kl, "low": kl, "high": kl}
    fake_run.evaluation["arms"][-1].update(distinct=distinct, greedy_log_ratio=ratio)
    assert warned(fake_run) == ""
    for arm in fake_run.evaluation["arms"]:  # few right answers, whatever the untrained model says before it knows them
        arm["distinct"] = 0.02 if arm["name"].startswith("stage:") else 1.0
    assert "degenerate" not in warned(fake_run)


def test_stages_whose_own_figures_speak_against_them_are_named_behind_what_the_plan_said(fake_run):
    fake_run.run["cautions"] = ["3 of the rows that sft may learn from ask what evaluate asks"]
    fake_run.headlines["reward"] = {"eval_accuracy": 0.5, "eval_rows": 30.0}
    fake_run.headlines["ppo"] = {"eos_rate": 0.0}
    fake_run.evaluation["arms"][-1].update(ended={"mean": 0.0})
    caution, reward, ppo, cut = verdict(fake_run).warnings
    assert caution == "3 of the rows that sft may learn from ask what evaluate asks."
    assert reward.startswith("reward: right on 50% of 30 held-out pairs, no better than chance (50%)")
    assert ppo.startswith("ppo: none of the last update's answers ended within max_new_tokens")
    (sentence,) = of_evaluation(Evaluation.read(fake_run.artifact("evaluate")))
    assert cut == f"A{sentence.removeprefix('a')}.", "the page says what the driver said"
    assert fake_run.html().index(caution) < fake_run.html().index("ended within")


@pytest.mark.parametrize(
    ("stage", "settings", "headlines", "sentences"),
    [
        (
            "ppo",
            {},
            {"updates": 20.0, "guard/kept_update": 12.0, "guard/best_scorer": 0.6123, "guard/scorer": 0.55},
            [
                "ppo keeps its policy after update 12 of 20: the held-out scorer gave 0.612 there and 0.550 at the "
                "end, on the prompts that were used to select it."
            ],
        ),
        (
            "ppo",
            {"updates": 16},
            {"updates": 7.0},
            ["ppo ended after 7 of 16 updates: its KL was above guard.max_kl twice in a row."],
        ),
        (
            "sft",
            {"validation": {"every": 10, "patience": 2}},
            {
                "validation/loss": 1.21,
                "validation/step": 20.0,
                "validation/last_step": 40.0,
                "validation/last_loss": 1.3,
                "validation/planned_steps": 100.0,
            },
            [
                "sft keeps step 20, which had the lowest held-out loss: 1.21 (1.3 at step 40); that loss is "
                "optimistic, because the step was chosen by it.",
                "sft stopped at step 40 of 100: no improvement in 2 validations.",
            ],
        ),
    ],
)
def test_an_earlier_policy_and_an_early_end_are_said(fake_run, stage, settings, headlines, sentences):
    fake_run.run["config"]["stages"][stage] |= settings
    fake_run.headlines[stage] = headlines
    assert verdict(fake_run).warnings == sentences


def test_a_run_with_several_evaluations_says_which_one_is_shown(fake_run):
    assert "The run also has" not in fake_run.html()
    first = fake_run.run["stages"]["evaluate"]
    fake_run.run["stages"]["ood"] = {**first, "artifact": "evaluate-01234567"}
    assert "These are the results of evaluate. The run also has: ood." in fake_run.html()
    named = fake_run.run["stages"]["report"].pop("inputs")
    assert "These are the results of ood. The run also has: evaluate." in fake_run.html()
    fake_run.run["stages"]["report"]["inputs"] = named
    first["artifact"] = None
    assert "These are the results of ood. The run also has: evaluate." in fake_run.html()


# ---- gates ----------------------------------------------------------------------------------------------------------

GATE = {"arm": "stage:dpo", "against": "base", "metric": None, "min_difference": -0.01}


def gated(fake_run, *gates: object) -> str:
    fake_run.run["config"]["stages"]["evaluate"]["gate"] = list(gates)
    return fake_run.html()


def test_the_page_begins_with_the_gates_that_are_met_and_that_are_not(fake_run):
    assert 'class="gates"' not in gated(fake_run)
    html = gated(fake_run, GATE, {**GATE, "min_difference": 0.9})
    assert html.index('<ul class="gates">') < html.index('<p class="lead">')
    met, missed = html.split('<ul class="gates">')[1].split("</ul>")[0].split("</li>")[:2]
    assert '<b class="verdict good">Gate met</b>' in met
    assert re.search(r"dpo − base in quality: \+0\.\d{3} \(\+0\.\d{3} to \+0\.\d{3}\), required: .* above −0\.01$", met)
    assert '<b class="verdict bad">Gate not met</b>' in missed
    assert missed.endswith("required: the whole interval above +0.9")


# ---- what figures say against a result ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "figures", "beginning"),
    [
        ("reward", {"eval_accuracy": 0.5, "eval_rows": 30.0}, "right on 50% of 30 held-out pairs, no better than"),
        ("ppo", {"objective/score_std": 0.0}, "all answers to each of the last update's prompts had the same score"),
        ("ppo", {"objective/tied_share": 1.0}, "all answers to each of the last update's prompts had the same score"),
        ("ppo", {"eos_rate": 0.0}, "none of the last update's answers ended within max_new_tokens"),
        ("reward", {"eval_accuracy": 0.51, "eval_rows": 30.0}, None),
        ("ppo", {"eos_rate": 0.01}, None),
    ],
)
def test_a_figure_that_speaks_against_a_stage_is_named(kind, figures, beginning):
    sentences = doubts(kind, figures)
    assert [sentence[: len(beginning or "")] for sentence in sentences] == ([beginning] if beginning else [])


CUT = ArmResult(name="base", ended=Interval(mean=0.0, low=0.0, high=0.0))
HALF = [ArmResult(name="stage:sft", ended=Interval(mean=0.5)), ArmResult(name="stage:dpo")]
MOST = [ArmResult(name="base", ended=Interval(mean=0.49)), ArmResult(name="stage:ppo", ended=Interval(mean=0.1))]
UNFINISHED = "were cut off at max_new_tokens, so their scores are those of unfinished text; raise it"
GRADED = Evaluation(
    num_prompts=60,
    primary="helpful",
    gradings=[Grading(metric="polite", num_prompts=9), Grading(metric="helpful", num_prompts=10)],
)
TOO_FEW = "too few for a verdict, which needs at least 10"
SILENT = JudgedPair(arm="stage:dpo", against="stage:sft", prompts=20, wins=0, ties=0, losses=0, invalid=1.0)
HEARD = replace(SILENT, win_rate=Interval(mean=0.5, low=0.4, high=0.6))
SAME_SCORE = "are distinct, against 86% of those of"


def compared(distinct: float, other: float, difference: float) -> Evaluation:
    """An evaluation of two arms that differ by so much, with such shares of distinct answers."""
    arms = [ArmResult(name="stage:ppo", distinct=distinct), ArmResult(name="stage:sft", distinct=other)]
    bounds = {"difference": difference, "low": difference - 0.05, "high": difference + 0.05}
    p = 0.01 if abs(difference) > 0.1 else 0.4
    item = Comparison(arm="stage:ppo", against="stage:sft", metric="liked", adjusted_p=p, **bounds)
    metrics = [Metric(name="liked")]
    return Evaluation(arms=arms, comparisons=[item], metrics=metrics, primary="liked", num_prompts=100)


@pytest.mark.parametrize(
    ("evaluation", "sentence"),
    [
        (Evaluation(arms=[CUT, *HALF]), f"all answers of base {UNFINISHED}"),
        (Evaluation(arms=HALF), None),
        (Evaluation(arms=MOST), f"most answers of base (51%), ppo (90%) {UNFINISHED}"),
        (Evaluation(num_prompts=9), f"only 9 prompts were evaluated, {TOO_FEW}"),
        (GRADED, None),
        (replace(GRADED, primary="polite"), f"only 9 of 60 prompts have a score by polite in every arm, {TOO_FEW}"),
        (
            Evaluation(judge=Judge(name="a-model", pairs=[SILENT, SILENT])),
            "by a-model, nothing can be concluded about any pair of arms: 100% of the verdicts are invalid",
        ),
        (Evaluation(judge=Judge(name="a-model", pairs=[SILENT, HEARD])), None),
        (
            compared(0.03, 0.86, 0.2),
            f"only 3% of the answers of ppo {SAME_SCORE} sft: read some before you trust its score",
        ),
        (compared(0.44, 0.86, 0.2), None),  # half as many
        (compared(0.03, 0.86, -0.2), None),  # it loses
        (compared(0.03, 0.86, 0.01), None),  # it may be chance
    ],
)
def test_an_evaluation_is_doubted_where_its_figures_say_so(evaluation, sentence):
    assert of_evaluation(evaluation) == ([] if sentence is None else [sentence])


def test_answers_that_nothing_reads_may_be_cut_off_and_alike():
    """A metric may be the letter that a policy finds likeliest; then its answers decide nothing."""
    both = compared(0.03, 0.86, 0.2)
    arms = [replace(arm, ended=Interval(mean=0.0)) for arm in both.arms]
    chosen = replace(both, arms=arms, metrics=[Metric(name="liked", of_answers=False)])
    assert of_evaluation(chosen) == []
    assert of_evaluation(replace(chosen, judge=Judge(kind="metric", name="liked"))) == []
    for read in (
        replace(chosen, metrics=[*chosen.metrics, Metric(name="brevity")]),
        replace(chosen, judge=Judge(kind="endpoint", name="a-model")),
        replace(chosen, arms=[replace(arm, reward=Interval(mean=1.0)) for arm in arms]),
    ):
        (doubt,) = of_evaluation(read)
        assert doubt.startswith("all answers of ppo, sft were cut off at max_new_tokens, ")
