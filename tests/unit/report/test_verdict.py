"""The sentences at the top of the report say what the intervals say, and nothing more."""

from __future__ import annotations

import re

import pytest

from alignment.records.evaluation import Evaluation
from alignment.report.doubts import of_evaluation


def lead_of(html: str) -> str:
    return html.split('<p class="lead">')[1].split("</p>")[0]


def against_sft(fake_run, make_comparison, **differences: float) -> str:
    """The lead of a run in which the named arms differ from sft by so much, with a half-width of 0.05."""
    pairs = [make_comparison(f"stage:{arm}", "stage:sft", value, 0.05) for arm, value in differences.items()]
    fake_run.evaluation["comparisons"] = pairs
    return lead_of(fake_run.html())


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ({"dpo": 0.09, "ppo": 0.08}, "Preference training helped: dpo and ppo beat sft."),
        ({"dpo": 0.09}, "Preference training helped: dpo beats sft."),
        ({"dpo": -0.09, "ppo": -0.2}, "Preference training hurt: dpo and ppo fall behind sft."),
        (
            {"dpo": 0.03, "ppo": -0.01},
            "Preference training is not shown to have helped: dpo and ppo cannot be told apart from sft.",
        ),
        (
            {"dpo": 0.09, "ppo": 0.03},
            "Preference training had mixed results: dpo beats sft; ppo cannot be told apart from sft.",
        ),
        ({"dpo": 0.09, "ppo": -0.07}, "Preference training had mixed results: dpo beats sft; ppo falls behind sft."),
    ],
)
def test_the_lead_says_whether_preference_training_helped(fake_run, make_comparison, differences, expected):
    assert against_sft(fake_run, make_comparison, **differences) == expected


def test_a_comparison_written_the_other_way_round_means_the_same(fake_run, make_comparison):
    fake_run.evaluation["comparisons"] = [make_comparison("stage:sft", "stage:dpo", -0.09, 0.05)]
    assert lead_of(fake_run.html()) == "Preference training helped: dpo beats sft."


def test_the_lead_holds_every_trained_arm_against_the_untrained_ones(fake_run, make_comparison):
    trained = {"stage:sft": 0.1, "stage:dpo": 0.2, "stage:ppo": 0.01}
    pairs = [make_comparison("stage:dpo", "stage:sft", 0.09, 0.05), make_comparison("base+prompt", "base", 0.1, 0.05)]
    pairs += [make_comparison(arm, "base", difference, 0.05) for arm, difference in trained.items()]
    pairs += [
        make_comparison("base+prompt", "stage:dpo", -0.3, 0.05),
        make_comparison("stage:ppo", "base+prompt", -0.2, 0.05),
    ]
    fake_run.evaluation["comparisons"] = pairs
    assert lead_of(fake_run.html()) == (
        "Preference training helped: dpo beats sft. Against base: sft and dpo beat base; ppo cannot be told apart from "
        "base. Against base+prompt: dpo beats base+prompt; ppo falls behind base+prompt."
    )


@pytest.mark.parametrize(
    ("scorers", "training"),
    [
        ([{"source": "exact_answer"}], "Reinforcement learning"),
        ([{"source": "/home/me/score.py:brevity"}], "Reinforcement learning"),
        ([{"source": "exact_answer"}, {"source": "reward"}], "Preference training"),
        ([{"source": "ensemble", "ensemble": {"members": [{"source": "stage:judge"}]}}], "Preference training"),
    ],
)
def test_training_on_scores_of_rules_is_not_called_preference_training(fake_run, make_comparison, scorers, training):
    fake_run.run["config"]["stages"]["ppo"]["scorers"] = scorers
    assert against_sft(fake_run, make_comparison, ppo=0.2) == f"{training} helped: ppo beats sft."


def test_training_on_preferences_and_on_scores_are_held_apart(fake_run, make_comparison):
    fake_run.run["config"]["stages"]["ppo"]["scorers"] = [{"source": "exact_answer"}]
    assert against_sft(fake_run, make_comparison, dpo=0.2, ppo=-0.2) == (
        "Preference training helped: dpo beats sft. Reinforcement learning hurt: ppo falls behind sft."
    )


def test_real_and_not_shown_differences_are_told_apart(fake_run):
    html = fake_run.html()
    assert "dpo is really better than sft: +0.090 in quality (95\u202f% interval +0.035 to +0.145)." in html
    assert "ppo is really worse than dpo: −0.060 in quality" in html
    assert "Not shown, because the interval includes zero: a difference between ppo and sft." in html
    assert html.count('<span class="verdict open" role="cell">no real difference</span>') == 1
    assert html.count('role="cell">real</span>') == 5


def test_a_difference_that_is_lost_by_the_correction_has_a_reason_of_its_own(fake_run, make_comparison):
    fake_run.evaluation["comparisons"] = [
        make_comparison("stage:dpo", "stage:sft", 0.09, 0.05) | {"p": 0.03, "adjusted_p": 0.09},
        make_comparison("stage:ppo", "stage:sft", 0.01, 0.05) | {"p": 0.7, "adjusted_p": 0.7},
    ]
    html = fake_run.html()
    assert "Not shown, because the interval includes zero: a difference between ppo and sft." in html
    assert "Not shown, because its p value, corrected, is 0.05 or more: a difference between dpo and sft." in html


def test_a_policy_that_moved_far_by_its_kl_is_named(fake_run):
    arm = next(arm for arm in fake_run.evaluation["arms"] if arm["name"] == "stage:ppo")
    arm |= {"greedy_log_ratio": None, "kl": {"mean": 400.0}}
    assert "ppo has moved far from the reference: it has a KL divergence of 400.0 nats" in fake_run.html()


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.0, 0.1, "no real difference"), (-0.1, 0.0, "no real difference"), (1e-4, 0.1, "real")],
)
def test_an_interval_that_touches_zero_is_not_real_whatever_the_file_claims(fake_run, low, high, verdict):
    entry = {"arm": "stage:dpo", "against": "stage:sft", "difference": (low + high) / 2, "low": low, "high": high}
    fake_run.evaluation["comparisons"] = [entry | {"real": True}]
    assert f'role="cell">{verdict}</span>' in fake_run.html()


def test_an_ordinary_run_has_no_warnings(fake_run):
    assert "Read this first" not in fake_run.html()


def test_a_smoke_run_concludes_nothing(fake_run):
    fake_run.run["profile"] = "smoke"
    fake_run.headlines["reward"]["eval_accuracy"] = 0.0
    html = fake_run.html()
    assert lead_of(html) == ("This is a smoke run: it shows only that the recipe runs; its numbers mean nothing.")
    assert "really better" not in html
    assert "Read this first" not in html


def test_stages_whose_own_figures_speak_against_them_are_named(fake_run):
    fake_run.headlines["reward"] = {"eval_accuracy": 0.5, "eval_rows": 30.0}
    fake_run.headlines["ppo"] = {"eos_rate": 0.0}
    fake_run.evaluation["arms"][-1].update(ended={"mean": 0.0})
    html = fake_run.html()
    assert "reward: right on 50% of 30 held-out pairs, no better than chance (50%)" in html
    assert "ppo: none of the last update&#39;s answers ended within max_new_tokens" in html
    (sentence,) = of_evaluation(Evaluation.read(fake_run.artifact("evaluate")))
    assert f"A{sentence.removeprefix('a')}." in html, "the page says what the driver said"
    assert "Some answers never ended" not in html


def test_degenerate_arms_large_kl_and_endless_answers_are_named(fake_run):
    ppo = fake_run.evaluation["arms"][-1]
    ppo.update(distinct=0.31, ended={"mean": 0.93}, greedy_log_ratio={"mean": 41.0, "low": 38.0, "high": 44.0})
    html = fake_run.html()
    assert "ppo is degenerate: only 31\u202f% of its answers are distinct, against " in html
    assert "ppo has moved far from the reference: its greedy answers have a log-ratio of 41.0 nats (more th" in html
    assert "Some answers never ended and were cut off at the limit: 7\u202f% of those from ppo." in html


def test_arms_that_are_compared_by_what_they_find_likeliest_are_not_degenerate(fake_run):
    """Nothing that they are compared by reads their answers."""
    fake_run.evaluation["arms"][-1].update(distinct=0.31, ended={"mean": 0.93})
    fake_run.evaluation["metrics"][0]["of_answers"] = False
    html = fake_run.html()
    assert "degenerate" not in html
    assert "Some answers never ended" in html, "the other metrics read them"
    for part in (*fake_run.evaluation["metrics"], *fake_run.evaluation["arms"]):
        part.update({"of_answers": False} if "higher_is_better" in part else {"reward": None})
    assert "Some answers never ended" not in fake_run.html()


def test_a_task_with_few_right_answers_makes_no_arm_degenerate(fake_run):
    """Whatever the untrained model says before it has learned their form."""
    for arm in fake_run.evaluation["arms"]:
        arm["distinct"] = 0.02 if arm["name"].startswith("stage:") else 1.0
    assert "degenerate" not in fake_run.html()


def test_preference_training_is_held_against_the_policy_that_it_started_from(fake_run, make_comparison):
    """Not against another stage that learned from demonstrations, whose data would be credited to it."""
    stages = fake_run.run["stages"]
    stages["smaller"] = {**stages["sft"], "artifact": "smaller-1"}
    stages["again"] = {**stages["dpo"], "inputs": {"init": "stage:dpo"}, "artifact": "again-1"}
    for name in ("smaller", "again"):
        fake_run.run["config"]["stages"][name] = dict(fake_run.run["config"]["stages"]["sft"])
    fake_run.evaluation["comparisons"] = [
        make_comparison("stage:dpo", "stage:sft", 0.01, 0.05),
        make_comparison("stage:dpo", "stage:smaller", 0.2, 0.05),
        make_comparison("stage:again", "stage:sft", 0.2, 0.05),
    ]
    expected = "Preference training had mixed results: again beats sft; dpo cannot be told apart from sft."
    assert lead_of(fake_run.html()) == expected


@pytest.mark.parametrize(("distinct", "kl"), [(0.5, 25.0), (1.0, 0.0), (None, None)])
def test_figures_at_the_limit_or_missing_raise_no_warning(fake_run, distinct, kl):
    fake_run.evaluation["arms"][-1].update(
        distinct=distinct, greedy_log_ratio=None if kl is None else {"mean": kl, "low": kl, "high": kl}
    )
    assert "Read this first" not in fake_run.html()


def test_a_higher_reward_with_really_worse_metric_is_called_over_optimisation(fake_run, make_comparison):
    fake_run.evaluation["comparisons"] = [make_comparison("stage:ppo", "stage:sft", -0.1, 0.05)]
    warning = "The reward model scores ppo above sft although its quality is really worse"
    for gain, warns in ((0.3, True), (0.02, False), (-0.3, False)):
        fake_run.evaluation["reward_comparisons"] = [make_comparison("stage:ppo", "stage:sft", gain, 0.05)]
        assert (warning in fake_run.html()) == warns
    fake_run.evaluation["reward_comparisons"] = [make_comparison("stage:sft", "stage:ppo", -0.3, 0.05)]
    assert warning in fake_run.html(), "the same pair from the other side"


def test_without_preference_stages_the_lead_says_which_arms_are_better(fake_run, make_comparison):
    fake_run.drop_arms(["base", "base+prompt", "stage:sft"])
    expected = "By quality, base+prompt is better than base; sft is better than base and base+prompt."
    assert lead_of(fake_run.html()) == expected
    pairs = fake_run.evaluation["comparisons"]
    fake_run.evaluation["comparisons"] = [
        make_comparison(pair["against"], pair["arm"], -pair["difference"], 0.01) for pair in pairs
    ]
    assert sorted(lead_of(fake_run.html())) == sorted(expected), "the same pairs, each from the other side"


def test_without_preference_stages_and_real_differences_no_arm_is_better(fake_run, make_comparison):
    fake_run.drop_arms(["base", "stage:sft"])
    fake_run.evaluation["comparisons"] = [make_comparison("stage:sft", "base", 0.01, 0.05)]
    assert lead_of(fake_run.html()) == "By quality, no arm is shown to be better than another."


def test_where_less_is_better_lower_means_are_better(fake_run, make_comparison):
    fake_run.evaluation["metrics"][0]["higher_is_better"] = False
    fake_run.evaluation["comparisons"] = [make_comparison("stage:dpo", "stage:sft", -0.1, 0.05)]
    html = fake_run.html()
    assert lead_of(html) == "Preference training helped: dpo beats sft."
    assert "dpo is really better than sft: −0.100 in quality" in html
    assert 'class="verdict good" role="cell">real' in html
    assert "quality</bdi>: less is better" in html


def test_without_a_metric_no_arm_is_called_better(fake_run):
    fake_run.evaluation.update(metrics=[], primary=None, comparisons=[], tasks={})
    html = fake_run.html()
    expected = "The evaluation has no metric and no judge, so no arm is called better than another."
    assert lead_of(html) == expected
    pair = {"arm": "stage:dpo", "against": "stage:sft", "wins": 8, "ties": 1, "losses": 1, "verdict": "better"}
    fake_run.evaluation["judge"] = {"name": "some-model", "pairs": [pair, pair | {"verdict": "no real difference"}]}
    expected = "The evaluation has no metric. By some-model, 1 of 2 pairs of arms shows a real difference."
    assert lead_of(fake_run.html()) == expected


def test_one_arm_alone_has_nothing_to_be_compared_with(fake_run):
    fake_run.drop_arms(["stage:sft"])
    html = fake_run.html()
    assert lead_of(html) == "Only sft was evaluated, so there is nothing to compare it with."
    assert "The evaluation contains no comparisons." in html


def test_an_earlier_policy_that_was_handed_on_is_named_with_both_opinions(fake_run):
    fake_run.headlines["ppo"] = {
        "updates": 20.0,
        "guard/kept_update": 12.0,
        "guard/best_scorer": 0.6123,
        "guard/scorer": 0.55,
    }
    html = fake_run.html()
    assert "ppo keeps its policy after update 12 of 20: the held-out scorer gave 0.612 there and" in html
    assert "and 0.550 at the end, on the prompts that were used to select it." in html


def test_a_last_policy_that_was_handed_on_is_no_news(fake_run):
    fake_run.headlines["ppo"] = {
        "updates": 20.0,
        "guard/kept_update": 20.0,
        "guard/best_scorer": 0.6,
        "guard/scorer": 0.6,
    }
    assert "hands on" not in fake_run.html()


def test_a_stage_that_ended_over_its_budget_says_so(fake_run):
    fake_run.run["config"]["stages"]["ppo"]["updates"] = 16
    fake_run.headlines["ppo"] = {"updates": 7.0}
    assert "ppo ended after 7 of 16 updates: its KL was above guard.max_kl twice in a row." in fake_run.html()


def test_a_step_that_validation_chose_and_an_early_end_are_said(fake_run):
    fake_run.run["config"]["stages"]["sft"]["validation"] = {"every": 10, "patience": 2}
    fake_run.headlines["sft"] = {
        "validation/loss": 1.21,
        "validation/step": 20.0,
        "validation/last_step": 40.0,
        "validation/last_loss": 1.3,
        "validation/planned_steps": 100.0,
    }
    html = fake_run.html()
    assert "sft keeps step 20, which had the lowest held-out loss: 1.21 (1.3 at step 40)" in html
    assert "sft stopped at step 40 of 100: no improvement in 2 validations." in html


def test_the_guards_two_opinions_are_drawn_over_the_root_of_the_kl(fake_run):
    assert "Held-out answers, over √KL" not in fake_run.html()
    for step, row in enumerate(fake_run.metrics["ppo"]):
        if step % 4 == 0:
            row |= {"guard/proxy": 0.1 * step, "guard/scorer": 0.5 - 0.01 * step, "guard/kl": 4.0 * step}
    html = fake_run.html()
    assert "Held-out answers, over √KL" in html
    chart = html[html.index("Held-out answers, over √KL") :]
    words = re.findall(r'<text class="tick s(\d)"[^>]*>(.*?)</text>', chart)
    assert [word for line, word in words if line == "0"][:2] == ["training", "score"]
    assert [word for line, word in words if line == "1"][:2] == ["held-out", "scorer"]


def with_judge(fake_run, *pairs: dict[str, object]) -> None:
    fake_run.evaluation["judge"] = {"kind": "endpoint", "name": "a-model", "num_prompts": 100, "pairs": list(pairs)}


def judged(arm: str, against: str, rate: float, verdict: str) -> dict[str, object]:
    win_rate = {"mean": rate, "low": rate - 0.05, "high": rate + 0.05}
    counts = {"wins": 40, "ties": 20, "losses": 40}
    return {"arm": arm, "against": against, **counts, "win_rate": win_rate, "verdict": verdict}


def test_a_judge_that_contradicts_the_primary_metric_is_in_the_headline(fake_run, make_comparison):
    fake_run.evaluation["comparisons"] = [make_comparison("stage:dpo", "stage:sft", 0.09, 0.05)]
    expected = (
        "Preference training helped: dpo beats sft. By quality, dpo is better than sft, but a-model prefers sft "
        "(win rate 0.70)."
    )
    for pair in (judged("stage:sft", "stage:dpo", 0.7, "better"), judged("stage:dpo", "stage:sft", 0.3, "worse")):
        with_judge(fake_run, pair)
        assert lead_of(fake_run.html()) == expected


@pytest.mark.parametrize(
    "pair",
    [
        judged("stage:dpo", "stage:sft", 0.7, "better"),
        judged("stage:dpo", "stage:sft", 0.48, "no real difference"),
        judged("stage:ppo", "stage:sft", 0.3, "worse"),
    ],
    ids=["it agrees", "it cannot tell", "another pair"],
)
def test_a_judge_that_does_not_contradict_is_not_in_the_headline(fake_run, make_comparison, pair):
    fake_run.evaluation["comparisons"] = [make_comparison("stage:dpo", "stage:sft", 0.09, 0.05)]
    with_judge(fake_run, pair)
    assert lead_of(fake_run.html()) == "Preference training helped: dpo beats sft."


def test_a_judge_of_fewer_than_ten_prompts_contradicts_nothing(fake_run, make_comparison):
    fake_run.evaluation["comparisons"] = [make_comparison("stage:dpo", "stage:sft", 0.09, 0.05)]
    with_judge(fake_run, judged("stage:sft", "stage:dpo", 0.7, "fewer than 10 prompts"))
    assert lead_of(fake_run.html()) == "Preference training helped: dpo beats sft."


def test_a_reward_model_that_contradicts_is_in_the_headline_if_its_difference_is_real(fake_run, make_comparison):
    fake_run.evaluation["comparisons"] = [make_comparison("stage:ppo", "stage:sft", -0.1, 0.05)]
    expected = "Preference training hurt: ppo falls behind sft."
    for gain, others in (
        (0.8, " By quality, sft is better than ppo, but the reward model scores ppo higher (+0.800)."),
        (0.03, ""),
        (-0.8, ""),
    ):
        for pair in (
            make_comparison("stage:ppo", "stage:sft", gain, 0.05),
            make_comparison("stage:sft", "stage:ppo", -gain, 0.05),
        ):
            fake_run.evaluation["reward_comparisons"] = [pair | {"metric": "reward"}]
            assert lead_of(fake_run.html()) == expected + others


def test_a_winner_that_says_the_same_to_everybody_is_doubted_in_the_headline(fake_run, make_comparison):
    fake_run.evaluation["comparisons"] = [make_comparison("stage:ppo", "stage:sft", 0.3, 0.05)]
    for arm in fake_run.evaluation["arms"]:
        arm["distinct"] = 0.03 if arm["name"] == "stage:ppo" else 0.98
    html = fake_run.html()
    doubt = (
        "only 3% of the answers of ppo are distinct, against 98% of those of sft: read some before you trust its score."
    )
    assert lead_of(html) == f"Preference training helped: ppo beats sft. But {doubt}"
    assert html.count(doubt) == 1


def test_too_few_prompts_give_no_verdict(fake_run):
    fake_run.evaluation["num_prompts"] = 9
    html = fake_run.html()
    assert lead_of(html) == "Only 9 prompts were evaluated, too few for a verdict, which needs at least 10."
    assert "really better" not in html
    assert 'role="cell">real</span>' not in html
    assert html.count('<span class="verdict open" role="cell">fewer than 10 prompts</span>') == 6
    fake_run.evaluation["num_prompts"] = 10
    assert "really better" in fake_run.html()


def test_a_run_with_several_evaluations_says_which_one_is_shown(fake_run):
    assert "The run also has" not in fake_run.html()
    first = fake_run.run["stages"]["evaluate"]
    fake_run.run["stages"]["ood"] = {**first, "artifact": "evaluate-01234567"}
    assert "These are the results of evaluate. The run also has: ood." in fake_run.html()
    first["artifact"] = None
    assert "These are the results of ood. The run also has: evaluate." in fake_run.html()


def test_what_the_plan_said_against_the_evaluation_stands_first_among_the_warnings(fake_run):
    fake_run.run["cautions"] = ["3 of the rows that sft may learn from ask what evaluate asks"]
    fake_run.headlines["ppo"] = {"eos_rate": 0.0}
    html = fake_run.html()
    assert html.index("3 of the rows that sft may learn from ask what evaluate asks.") < html.index("ended within")


def gated(fake_run, *gates: dict[str, object]) -> str:
    fake_run.run["config"]["stages"]["evaluate"]["gate"] = list(gates)
    return fake_run.html()


def test_the_page_begins_with_the_gates_that_are_met_and_that_are_not(fake_run):
    wanted = {"arm": "stage:dpo", "against": "base", "metric": None, "min_difference": -0.01}
    html = gated(fake_run, wanted, {**wanted, "min_difference": 0.9})
    gates = html.split('<ul class="gates">')[1].split("</ul>")[0]
    assert html.index('<ul class="gates">') < html.index('<p class="lead">')
    met, missed = gates.split("</li>")[:2]
    assert '<b class="verdict good">Gate met</b>' in met
    assert re.search(r"dpo − base in quality: \+0\.\d{3} \(\+0\.\d{3} to \+0\.\d{3}\), required: .* above −0\.01$", met)
    assert '<b class="verdict bad">Gate not met</b>' in missed
    assert missed.endswith("required: the whole interval above +0.9")


def test_a_page_without_gates_does_not_mention_them(fake_run):
    assert 'class="gates"' not in fake_run.html()
    assert 'class="gates"' not in gated(fake_run)


@pytest.mark.parametrize("gate", ["words", 3, {"arm": 1}, {"arm": "stage:dpo", "against": [], "min_difference": "x"}])
def test_a_gate_that_cannot_be_read_does_not_stop_the_page(fake_run, gate):
    assert "Gate not met" not in gated(fake_run, gate)


def test_gates_of_samples_that_cannot_be_read_are_not_met(fake_run):
    fake_run.samples = None
    wanted = {"arm": "stage:dpo", "against": "base", "metric": None, "min_difference": 0.0}
    assert "dpo − base in quality: not known, because no different prompts have a score" in gated(fake_run, wanted)
    (fake_run.artifact("evaluate") / "samples.jsonl").write_text("{")
    assert "Gate not met" not in fake_run.html()
