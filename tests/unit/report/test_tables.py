"""Tables of the page: arms and judged pairs, people's votes, what was forgotten, a reward model's card, benchmarks."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.core.typed_json import to_json
from alignment.data.records import PreferencePair
from alignment.data.turns import Message
from alignment.evaluation.card_measures import Intervals, Judged, card_of, warnings
from alignment.records.reward_card import Change, Invariances, Learned, Rescored
from alignment.report.comparison_page.comparison import build_comparison
from alignment.stages.registry import lines_of
from tests.unit.report.conftest import HOSTILE, FakeRun, Page, assert_harmless, row_of, section, unlabelled

# ---- arms and their differences -------------------------------------------------------------------------------------


def test_shares_losses_and_words_are_shown_with_their_intervals(fake_run):
    figures = {"refusals": {"mean": 0.03, "low": 0.0, "high": 0.07}, "loss": {"mean": 1.5, "low": 1.4, "high": 1.6}}
    figures["ended"] = {"mean": 0.98, "low": 0.95, "high": 1.0}
    fake_run.evaluation["arms"][0] |= figures
    html = fake_run.html()
    row = row_of(html, "base")
    assert "1.40 to 1.60" in row
    assert "3\u202f%<small>0\u202f% to 7\u202f%</small>" in row
    assert "2\u202f% of those from base" in html
    assert "<td>52.0</td>" in row_of(html, "base+prompt"), "words without an interval"
    for absent in ("Judged pairs", "Differences in the other metrics", "By turn", 'id="results"', "reward-model"):
        assert absent not in html
    assert "forgotten" not in html


def test_means_say_over_how_many_prompts_and_turns_they_are(fake_run):
    assert "Dots are means over 100 held-out prompts, lines their" in Page(fake_run.html()).text
    fake_run.evaluation["gradings"] = [{"metric": "tone", "num_prompts": 70}, {"metric": "quality", "num_prompts": 60}]
    for number, arm in enumerate(fake_run.evaluation["arms"]):
        arm["by_turn"] = [{"quality": {"mean": mean + number / 10}} for mean in (0.5, 0.25)]
    page = Page(fake_run.html()).text
    assert "Dots are means over 60 of 100 held-out prompts (those with a grade in every arm), lines their" in page
    assert "By turn quality of the answers to each turn" in page
    assert "10.500.600.700.800.90 20.250.350.450.550.65" in page


def test_differences_have_their_p_values_and_those_of_other_metrics_a_table_of_their_own(fake_run):
    evaluation = fake_run.evaluation
    evaluation["comparisons"][0] |= {"metric": "quality", "p": 0.02, "adjusted_p": 0.0499}
    evaluation["comparisons"][1] |= {"metric": "quality", "p": 0.02, "adjusted_p": 0.12}
    other = {"arm": "stage:dpo", "against": "stage:sft", "difference": 0.07, "low": 0.02, "high": 0.12}
    evaluation["metrics"][1]["higher_is_better"] = False
    evaluation["other_comparisons"] = [
        other | {"metric": "truth", "p": 0.2, "adjusted_p": 0.4},
        other | {"metric": "tone", "p": 0.0001, "adjusted_p": 0.0002},
    ]
    html = unlabelled(fake_run.html())
    assert 'role="cell">real <small>p\u202f0.049</small></span>' in html, "never as a value that is not below the level"
    assert 'role="cell">no real difference <small>p\u202f0.120</small></span>' in html, "though it excludes zero"
    rows = re.findall(r'<tr><th scope="row"><bdi>(tone|truth)</bdi></th>(.*?)</tr>', html)
    assert [metric for metric, _ in rows] == ["tone", "truth"], "what is real comes first"
    cells = ("dpo − sft", "+0.070<small>+0.020 to +0.120</small>", "&lt;\u202f0.001")
    assert [cell for cell in cells if f"<td>{cell}</td>" not in rows[0][1]] == []
    assert '<td class="verdict bad">worse</td>' in rows[0][1]
    assert '<td class="verdict open">no real difference</td>' in rows[1][1]


# ---- judges ---------------------------------------------------------------------------------------------------------

DECIDED: dict[str, Any] = {
    "arm": "stage:dpo", "against": "stage:sft", "wins": 50, "ties": 24, "losses": 26,
    "win_rate": {"mean": 0.62, "low": 0.53, "high": 0.71}, "verdict": "better", "position_bias": -0.12,
    "metric_agreement": 0.7, "metric_kappa": 0.44, "metric_prompts": 98,
}  # fmt: skip


def judged_rows(html: str) -> tuple[str, list[str]]:
    """The table of judged pairs with what is said of it, and its rows about dpo."""
    table = html.split("<h3>Judged pairs</h3>")[1].split("<h3>")[0]
    return table, re.findall(r'<tr><th scope="row"><bdi>dpo</bdi></th>(.*?)</tr>', table)


def test_an_evaluation_with_a_judge_shows_its_pairs_and_what_can_be_concluded(fake_run):
    pair = DECIDED | {"invalid": 0.015, "agreement": 0.81}
    pair["length_controlled"] = {"mean": 0.55, "low": 0.47, "high": 0.63}
    none = pair | {"against": "base+prompt", "win_rate": None, "verdict": "nothing can be concluded", "invalid": 1.0}
    labelled = DECIDED | {"arm": "chosen", "against": "rejected", "win_rate": {"mean": 0.52, "low": 0.4, "high": 0.64}}
    labelled |= {"prompts": 50, "verdict": "no real difference", "agreement": 0.9, "position_bias": 0.31}
    pairs = [pair, none, {"arm": "x"}]
    fake_run.evaluation["judge"] = {"name": "a <b>judge</b>", "num_prompts": 100, "pairs": pairs, "labelled": labelled}
    fake_run.evaluation["conclusions"] = ["100 prompts, by quality: <i>nothing</i>.", 7]
    html = unlabelled(fake_run.html())
    _, (first, second) = judged_rows(html)
    shown = ("<td>sft</td>", "0.62", "0.53 to 0.71", "0.55", "0.47 to 0.63", "50 / 24 / 26", "81", "−0.12", "κ 0.44")
    assert [words for words in (*shown, "better") if words not in first] == []
    assert [words for words in ("<td>base+prompt</td>", "<td>–</td>", "nothing can be") if words not in second] == []
    assert "a &lt;b&gt;judge&lt;/b&gt;" in html
    assert "by quality: &lt;i&gt;nothing&lt;/i&gt;." in html
    page = Page(html).text
    row = page[page.index("chosen by people") :].split("By task")[0]
    shown = ("rejected", "0.52", "0.40 to 0.64", "50 / 24 / 26", "+0.31", "chance may agree as often")
    assert [words for words in shown if words not in row] == []
    assert "chance would give one half" in page


def judged_by_people(run: FakeRun) -> None:
    """Puts people's table into the evaluation: a pair that they judged, and one that nobody did."""
    assert run.evaluation is not None
    people = {"judged": 80, "same_answers": 4, "annotators": 3, "votes": 190, "stale": 7, "alpha": 0.612}
    counts = {"prompts": 102, "wins": 50, "ties": 9, "losses": 24}
    nobody = {"arm": "stage:dpo", "against": "base+prompt", **dict.fromkeys(counts, 0), "people": {}}
    nobody |= {"prompts": 102, "verdict": "nothing can be concluded"}
    pairs = [DECIDED | counts | {"metric_prompts": 76, "people": people}, nobody]
    run.evaluation["judge"] = {"kind": "people", "name": "the votes of people", "num_prompts": 80, "pairs": pairs}


def test_the_report_says_how_much_people_judged_and_whether_they_agree(fake_run):
    judged_by_people(fake_run)
    table, (first, second) = judged_rows(fake_run.html())
    cells = dict(re.findall(r'data-label="([^"]*)">(.*?)</td>', first))
    expected = {
        "against": "sft",
        "win rate": "0.62<small>0.53 to 0.71</small>",
        "win / tie / loss": "50 / 9 / 24",
        "prompts judged": "80 of 102<small>win rate over 83, 3 of them with identical answers</small>",
        "α": "0.61",
        "bias": "−0.12",
        "metric agrees": "70\u202f% (κ 0.44)<small>on 76 prompts</small>",
        "votes, annotators": "190 by 3<small>7 on other answers</small>",
    }
    assert {name: cells[name] for name in expected} == expected
    assert "nothing can be concluded" in second
    assert "0 of 102" in second
    assert "without the arms' names" in table
    assert "both orders" not in table, "which is about a model that judges"


# ---- what was forgotten ---------------------------------------------------------------------------------------------

FORGOT = {
    "name": "stage:sft", "label": "sft", "perplexity": 53.66, "ability": 0.5,
    "rise": {"mean": 0.877, "low": 0.734, "high": 1.042}, "drop": {"mean": 0.136, "low": 0.05, "high": 0.22},
    "passed": False,
    "reasons": ["perplexity of general text is 87.7% higher", "13.6% fewer questions are answered right"],
}  # fmt: skip
BEFORE = {"name": "base", "label": "base", "perplexity": 28.6, "ability": 0.636, "passed": True}
FORGETTING = {
    "num_texts": 48, "num_tokens": 4326, "num_questions": 110, "arms": [BEFORE, FORGOT], "passed": False,
    "limits": {"perplexity_rise": 0.2, "ability_drop": 0.1},
}  # fmt: skip


def forgetting(run: FakeRun, content: str) -> tuple[str, str]:
    """The report of a run whose stage ``forgetting`` left this file, and its section."""
    run.add("forgetting", "forgetting", {"arms": ["stage:sft"]}, "forgetting.json", content)
    html = run.built()
    return html, section(html, "forgotten")


def test_arms_stand_before_and_after_with_intervals_and_whether_they_passed(fake_run):
    html, shown = forgetting(fake_run, json.dumps(FORGETTING))
    assert '<a href="#forgotten">' in html
    for words in ("28.60", "53.66", "0.877", "0.734 to 1.042", "0.136", "0.050 to 0.220", "before", "48 general texts"):
        assert words in shown
    assert '<span class="verdict bad">forgot too much</span>' in shown
    assert "at most 20\u202f%" in shown
    warned = html.split('<div class="warnings">')[1].split("</div>")[0]
    assert f"sft forgot too much: {'; '.join(FORGOT['reasons'])}." in warned
    passed = FORGETTING | {"arms": [BEFORE, FORGOT | {"passed": True, "reasons": []}], "passed": True}
    html, shown = forgetting(fake_run, json.dumps(passed))
    assert '<span class="verdict good">passed</span>' in shown
    assert "forgot too much" not in html
    limits = {"perplexity_rise": None, "ability_drop": None}
    _, shown = forgetting(fake_run, json.dumps(passed | {"judged": False, "limits": limits}))
    assert '<td data-label="limits">not judged</td>' in shown
    assert "passed" not in shown
    assert "No limits were set" in shown


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"arms": 3, "limits": 4}', "names no arms"),
        ('{"version": 2, "arms": [{"name": "base"}]}', "was written by a newer version and is not shown"),
    ],
)
def test_a_file_that_cannot_be_understood_is_said_to_be(fake_run, content, reason):
    _, shown = forgetting(fake_run, content)
    assert f'<p class="missing">The file forgetting.json {reason}.</p>' in shown


# ---- a reward model's card ------------------------------------------------------------------------------------------


def made_card(*, words: str = "plain", margins: float = 1.0) -> dict[str, Any]:
    """A card as a stage leaves it, about forty pairs; ``words`` stand wherever text of the data's does."""
    rng = random.Random(5)
    pairs = [
        Judged(
            pair=PreferencePair(
                messages=(Message(role="user", content=f"{words} {number}"),),
                chosen=f"Yes. {words}",
                rejected=f"No. {words}",
                id=f"{words}-{number}",
                subset=f"{words}-{number % 2}",
            ),
            scores=(rng.gauss(0.4, 1) * margins, 0.0),
            tokens=(rng.randint(20, 60), 40),
            words=rng.gauss(0.1, 1),
            rule=(1.0, 0.5 if number % 2 else 1.0),
        )
        for number in range(40)
    ]
    changes = {"alone": Change(largest=0.004, flips=1), "padded on the left": Change(largest=3e-6)}
    card = replace(
        card_of(pairs, intervals=Intervals(samples=50, seed=0), num_worst=3),
        reward=f"path:{words}",
        learned=Learned(num_pairs=100, judged_too=7, left_out=True, words=9, for_answer=[words], against=["no"]),
        invariances=Invariances(num_pairs=16, formats={"bfloat16": Rescored(spread=1.1, changes=changes)}),
    )
    return to_json(replace(card, warnings=[*warnings(card), words]))


def with_card(run: FakeRun, card: str | dict[str, Any]) -> str:
    """The page of a run whose only judge is a card with this content."""
    run.run["stages"].pop("evaluate", None)
    content = card if isinstance(card, str) else json.dumps(card)
    run.add("card", "reward_card", {"reward": "stage:reward"}, "card.json", content)
    return run.built(num_samples=2)


def test_a_card_is_shown_with_all_that_it_measured(fake_run):
    fake_run.headlines["card"] = {"log_loss": 0.123}
    card = made_card()
    html = with_card(fake_run, card)
    assert_harmless(html)
    judges = html.split("<figcaption>Accuracy</figcaption>")[1].split("</figure>")[0]
    assert judges.count('class="guide"') == 3, "chance, behind each of the judges"
    page = Page(html).text
    shown = ["The reward model", f"{card['accuracy']['mean']:.3f}", "bag of words", "longer answer", "plain-0"]
    shown += ["accuracy minus the accuracy of: bag of words", "expected calibration error", "mean over subsets"]
    shown += ["prefers the longer answer", "agrees with the rule", "padded on the left", "1 flipped"]
    shown += ["100 pairs; 7 judged pairs overlap with them and were left out", "rejected, preferred by the model"]
    shown += [f"card: the reward model is right on {card['accuracy']['mean']:.2f} of 40 pairs"]
    assert [words for words in shown if words not in page] == []
    assert "log_loss" not in page, "the card says it, so the table of costs does not"
    assert 'aria-label="Calibration: ' in html
    assert 'aria-label="Margins: ' in html
    assert html.count('class="column') == 20
    assert fake_run.built(num_samples=2) == html, "the same files give the same bytes"


def test_hostile_text_in_a_card_stays_text(fake_run):
    assert_harmless(with_card(fake_run, made_card(words=HOSTILE)))


def test_cards_with_little_in_them_are_shown_and_unreadable_ones_named(fake_run):
    assert_harmless(with_card(fake_run, made_card(margins=0.0)))
    little = '{"accuracy": {"mean": 0.7}, "margins": {"edges": [1, 2], "counts": ["x"]}, "worst": 3}'
    html = with_card(fake_run, little)
    assert_harmless(html)
    assert "0.700" in Page(html).text
    for content in ("", "null", '{"accuracy": {}}', '{"accuracy": {"mean": "high"}}'):
        html = with_card(fake_run, content)
        assert "The file card.json cannot be read." in Page(html).text, content
        assert 'id="reward-model"' not in html


# ---- tables that a stage brings -------------------------------------------------------------------------------------

PAIR = {"arm": "stage:sft", "against": "base", "difference": 0.2, "low": 0.05, "high": 0.35, "p": 0.01}
STRICT = {"name": "exact_match", "filter": "strict", "higher_is_better": False}
CAPITALS = {"name": "capitals", "num_fewshot": 2, "num_rows": 20, "all_rows": 20, "metrics": [{"name": "acc"}, STRICT]}
GROUP = {"name": "all", "group": True, "num_rows": 5, "all_rows": 40, "metrics": [{"name": "acc", "by_row": False}]}
RECORD: dict[str, Any] = {
    "harness": "0.4.13",
    "tasks": [CAPITALS, GROUP],
    "arms": [
        {"name": "base", "values": {"capitals/acc": {"value": 0.35, "stderr": 0.1094}, "all/acc": {"value": 0.5}}},
        {"name": "stage:sft", "values": {"capitals/acc": {"value": 0.55, "stderr": 0.1141}}},
    ],
    "comparisons": [{**PAIR, "metric": "capitals/acc", "adjusted_p": 0.0497}],
    "other_comparisons": [
        {**PAIR, "metric": "capitals/exact_match,strict", "adjusted_p": 0.03},
        {**PAIR, "metric": "capitals/acc_norm", "adjusted_p": 0.6},
    ],
}


def add_benchmark(run: FakeRun, record: dict[str, Any] | str | None) -> None:
    content = json.dumps(record) if isinstance(record, dict) else record
    run.add("asked", "benchmark", {"arms": ["base", "stage:sft"]}, "benchmark.json", content)


def test_arms_of_a_benchmark_have_values_with_errors_and_differences_with_verdicts(fake_run):
    add_benchmark(fake_run, RECORD)
    html = fake_run.built()
    assert '<a href="#results">' in html
    shown = section(html, "results")
    assert "Values of lm-evaluation-harness 0.4.13 without a chat template" in shown
    for part in ("capitals/acc", "0.350<small>± 0.109</small>", "0.550<small>± 0.114</small>", "5/40"):
        assert part in shown
    assert "A limit left out rows" in shown, "of the group"
    better, worse, unclear = [row for row in shown.split("<tr>") if "sft − base" in row]
    assert "capitals/acc: sft − base" in better
    assert "+0.200<small>+0.050 to +0.350</small>" in better
    assert '<td data-label="p, corrected">0.049</td>' in better, "never as the level"
    assert '<span class="verdict good">better</span>' in better
    assert '<span class="verdict bad">worse</span>' in worse, "less of that metric is better"
    assert '<span class="verdict open">no real difference</span>' in unclear
    assert lines_of("benchmark", fake_run.artifact("asked")) == [
        "capitals/acc, 2-shot, 20 rows: base 0.350 ± 0.109, sft 0.550 ± 0.114",
        "capitals/exact_match,strict, 2-shot, 20 rows: base –, sft –",
        "all/acc, 5 of 40 rows: base 0.500, sft –",
        "sft against base in capitals/acc: +0.200 (+0.050 to +0.350), adjusted p 0.049, better",
        "sft is better than base in capitals/acc (+0.200).",
    ]


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (None, "asked has no result yet."),
        ("[]", "The result of asked cannot be read."),
    ],
)
def test_a_benchmark_that_cannot_be_read_is_said(fake_run, content, note):
    add_benchmark(fake_run, content)
    shown = section(fake_run.built(), "results")
    assert note in shown
    assert "<table" not in shown


def test_runs_stand_side_by_side_by_task_and_metric(tmp_path: Path):
    runs = [FakeRun(tmp_path / name) for name in ("first", "second", "third")]
    other = RECORD | {"arms": [{"name": "stage:dpo", "values": {"capitals/acc": {"value": 0.75}}}], "tasks": [CAPITALS]}
    for run, record in zip(runs, (RECORD, other, None), strict=True):
        run.write() if record is None else add_benchmark(run, record)
    page = tmp_path / "page.html"
    build_comparison([run.folder for run in runs], page, settings={}, differences=[], primary=None)
    shown = section(page.read_text(encoding="utf-8"), "results")
    for heading in ("A: base", "A: sft", "B: dpo"):
        assert f"<bdi>{heading}</bdi>" in shown
    row = next(row for row in shown.split("<tr>") if "capitals/acc" in row)
    assert [part in row for part in ("0.350", "0.550", "0.750")] == [True] * 3
    group = next(row for row in shown.split("<tr>") if "all/acc" in row)
    assert '<td data-label="B: dpo">–</td>' in group
    assert "Differences between arms" not in shown, "those are of one run"


def compared(*differences: tuple[str, float, float]) -> list[dict[str, Any]]:
    """Comparisons of sft and base, each with a metric, a difference and a p value."""
    return [{**PAIR, "metric": metric, "difference": value, "adjusted_p": p} for metric, value, p in differences]


BETTER = compared(("a/acc", 0.2, 0.02))


@pytest.mark.parametrize(
    ("comparisons", "lead"),
    [
        (compared(("a/acc", 0.2, 0.2)), "sft and base: no real difference in a/acc."),
        (
            [*BETTER, *compared(("b/acc", -0.1, 0.01), ("c/acc", 0.1, 0.5))],
            "sft is better than base in a/acc (+0.200) and worse than base in b/acc (-0.100); "
            "no real difference in c/acc.",
        ),
        (
            compared(*((f"{task}/acc", 0.2, 0.02) for task in "abcde")),
            "sft is better than base in a/acc (+0.200), b/acc (+0.200), c/acc (+0.200) and 2 more.",
        ),
        (
            [*BETTER, BETTER[0] | {"arm": "stage:dpo", "against": "stage:sft"}],
            "sft is better than base in a/acc (+0.200).",
        ),
        ([], "base: all/acc 0.500, capitals/acc 0.350 ± 0.109. sft: capitals/acc 0.550 ± 0.114."),
    ],
)
def test_a_run_without_an_evaluation_begins_with_the_result_of_its_benchmark(fake_run, comparisons, lead):
    fake_run.evaluation = None
    del fake_run.run["stages"]["evaluate"]
    add_benchmark(fake_run, RECORD | {"comparisons": comparisons})
    assert fake_run.built().split('<p class="lead">')[1].split("</p>")[0] == lead
    assert lines_of("benchmark", fake_run.artifact("asked"))[-1] == lead
