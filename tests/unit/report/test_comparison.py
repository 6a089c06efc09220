"""The page of several runs: what differs, whose line is whose, what is missing; nothing that a browser would run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from alignment.records.evaluation import Metric
from alignment.records.interval import Interval
from alignment.report.comparison_page.comparison import MOST_RUNS, build_comparison
from alignment.report.run_page.run_records import Difference
from alignment.stages.registry import config_classes
from tests.unit.report.conftest import HOSTILE, FakeRun, Page, assert_harmless, unlabelled

QUALITY = Metric(name="quality")
STAGES = config_classes()


class Compared:
    """Runs in folders of their own, and the page about them."""

    def __init__(self, root: Path, count: int = 2) -> None:
        self.root = root
        self.runs = [FakeRun(root / str(index)) for index in range(count)]
        for index, run in enumerate(self.runs):
            run.run["name"] = f"run {index}"
            for stage, entry in run.run["stages"].items():
                entry["artifact"] = f"{stage}-{index}"
        self.settings = {"stages.dpo.beta": ["0.1", "0.3"][:count] + ["0.5"] * (count - 2)}
        self.primary: Metric | None = QUALITY
        self.differences = [_difference("stage:dpo", 0.09, 0.05), _difference("stage:ppo", 0.01, 0.05)]

    def html(self) -> str:
        for run in self.runs:
            run.write()
        output = self.root / "page.html"
        build_comparison(
            [run.folder for run in self.runs],
            output,
            settings=self.settings,
            differences=self.differences,
            primary=self.primary,
        )
        return output.read_text(encoding="utf-8")


def _difference(arm: str, mean: float, half: float, **changes: Any) -> Difference:
    """A difference that is real if the interval excludes zero."""
    interval = Interval(mean=mean, low=mean - half, high=mean + half)
    p = {"prompts": 40, "adjusted_p": 0.01 if interval.excludes_zero() else 0.4}
    return Difference(**{"run": 1, "arm": arm, "metric": QUALITY, "interval": interval, **p, **changes})


@pytest.fixture
def compared(tmp_path: Path) -> Compared:
    return Compared(tmp_path)


def test_it_stands_alone_and_every_drawing_is_well_formed(compared: Compared) -> None:
    html = compared.html()
    assert_harmless(html)
    assert "http" not in html.replace("http-equiv", "")
    drawings = re.findall(r"<svg.*?</svg>(?!</svg>)", html, flags=re.DOTALL)
    assert len(drawings) > 30
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    assert html == compared.html(), "the same files give the same bytes"
    assert str(compared.root) not in html


def test_hostile_text_stays_text(compared: Compared) -> None:
    hostile = HOSTILE
    for run in compared.runs:
        run.run.update(name=hostile, recipe=hostile)
        run.run["stages"]["ppo"].update(state=hostile, kind=hostile)
        run.evaluation["arms"][0]["label"] = hostile
        run.evaluation["arms"][0]["metrics"][hostile] = {"mean": 1.0, "low": 0.5, "high": 1.5}
        run.evaluation["metrics"].append({"name": hostile})
        for row in run.samples[:3]:
            row.update(task=hostile, reference=hostile, messages=[{"role": hostile, "content": hostile}])
            row["answers"] = {hostile: {"text": hostile, "scores": {"quality": 0.5, hostile: 0.5}}}
    compared.settings[hostile] = [hostile, "plain"]
    compared.differences.append(_difference(hostile, 0.1, 0.05, metric=Metric(name=hostile)))
    assert_harmless(compared.html())


def test_settings_arms_costs_and_what_may_be_said_of_them(compared: Compared) -> None:
    compared.runs[1].run["stages"]["dpo"]["seconds"] = 61.0
    same = _difference("stage:sft", 0.0, 0.0, adjusted_p=None)
    compared.differences += [same, _difference("stage:ppo", 0.2, 0.05, metric=Metric(name="brevity"))]
    html = unlabelled(compared.html())
    times = r"<td>6\u202fmin 43\u202fs</td><td>2\.4\u202fGB</td><td>1\u202fmin 01\u202fs</td>"
    assert re.search(rf'<th scope="row"><bdi>dpo</bdi></th>{times}', html)
    page = Page(html).text
    assert '<th scope="row"><code>stages.dpo.beta</code></th><td><code>0.1</code></td><td><code>0.3</code></td>' in html
    assert "1 of 3 differences from A in quality is real." in page
    assert (
        "dpo: B is really better than A: +0.090 in quality (95 % interval +0.040 to +0.140, adjusted p 0.01)." in page
    )
    assert "ppo: no difference between B and A is shown: +0.010 in quality" in page
    assert "sft: the same quality in B and A on every prompt." in page
    assert re.search(r"A dpo ?0.71 0.66 to 0.76 B dpo ?0.71 0.66 to 0.76", page), "an arm's runs stand below each other"


def test_curves_of_a_stage_lie_over_each_other(compared: Compared) -> None:
    html = compared.html()
    (drawn,) = re.findall(r'<svg class="curve"[^>]*aria-label="dpo, Loss: A from[^"]*, B from[^"]*">.*?</svg>', html)
    assert {'class="line s0"', 'class="line s1"'} <= set(re.findall(r'class="line s\d"', drawn))
    ends = re.findall(r'<text class="end s(\d)"[^>]*>(\w) ', drawn)
    assert sorted(ends) == [("0", "A"), ("1", "B")]
    marks = re.findall(r'<path class="dot s\d" d="M[\d. ]+(m[^"]+)"', drawn)
    assert len(set(marks)) == 2, "not only colours differ"
    style = html.split("<style>")[1].split("</style>")[0]
    assert "@media (prefers-color-scheme: dark)" in style
    looks = re.findall(r"\.s(\d) \{ --run: (#\w+); --dash: ([^;]+); \}", style)
    assert len(looks) == len({colour for _, colour, _ in looks}) == len({dash for _, _, dash in looks}) == MOST_RUNS


def test_a_result_that_runs_share_is_drawn_once(compared: Compared) -> None:
    for run in compared.runs:
        run.run["stages"]["sft"]["artifact"] = "sft-0"
    html = compared.html()
    assert "B has the same result as A, drawn once." in html
    assert re.search(r'aria-label="sft, Loss: A from [^B"]*"', html)


def test_other_losses_leave_out_a_guide_and_have_margins_of_their_own(compared: Compared) -> None:
    compared.runs[1].run["config"]["stages"]["dpo"]["loss"] = "ipo"
    html = compared.html()
    assert 'class="guide"' not in re.search(r'aria-label="dpo, Loss: .*?</svg>', html)[0]
    assert "dotted: ln 2" not in html
    compared.runs[1].run["config"]["stages"]["dpo"]["loss"] = "orpo"
    charts = re.findall(r'aria-label="dpo, Margin: ([AB] from[^"]*)"', compared.html())
    assert [chart.count(" from ") for chart in charts] == [1, 1]
    assert [chart[0] for chart in charts] == ["A", "B"]


def test_what_a_run_lacks_is_said(compared: Compared) -> None:
    first, second = compared.runs
    second.evaluation = second.samples = None
    second.run["stages"]["evaluate"].update(state="waiting", artifact=None)
    second.run["stages"]["ppo"].update(state="failed")
    del second.metrics["ppo"]
    compared.differences = []
    page = Page(compared.html()).text
    assert "No arm was scored by quality both in A and in another run" in page
    assert "The evaluation (evaluate) has no result yet." in page
    assert "The run is not complete: ppo (failed) and evaluate (waiting)." in page
    assert "B has no curves for this stage yet (failed)." in page
    assert "No prompt was answered by an arm of the same name in two of these runs." in page
    first.evaluation = first.samples = None
    first.run["stages"]["evaluate"].update(state="waiting", artifact=None)
    assert "None of these runs was evaluated" in Page(compared.html()).text


def test_runs_judged_on_other_prompts_are_not_compared(compared: Compared) -> None:
    compared.differences = [_difference("stage:dpo", 0.0, 0.0, interval=None)]
    for row in compared.runs[1].samples:
        row["messages"] = [{"role": "user", "content": f"Another question. {row['id']}"}]
    page = Page(compared.html()).text
    assert "The other runs were evaluated on different prompts than A, so differences are unknown." in page
    assert "dpo: B was evaluated on different prompts than A." in page
    assert "No prompt was answered by an arm of the same name in two of these runs." in page


def test_answers_of_one_arm_stand_together_and_equal_ones_once(compared: Compared) -> None:
    for run in compared.runs:
        run.samples = run.samples[:1]
        run.samples[0]["answers"] = {
            "base": {"text": "The same.", "scores": {"quality": 0.5}},
            "stage:dpo": {"text": f"Of {run.run['name']}.", "scores": {"quality": 0.5}},
        }
    compared.runs[0].samples[0]["answers"]["stage:ppo"] = {"text": "Only here.", "scores": {"quality": 1.0}}
    page = Page(compared.html()).text
    assert "base A B The same." in page
    assert page.index("dpo A Of run 0.") < page.index("dpo B Of run 1.")
    assert "Only here." not in page
    compared.runs[1].samples[0]["answers"]["base"]["scores"] = {"quality": 0.25, "brevity": 1.0}
    page = Page(compared.html()).text
    assert re.search(r"base A The same\. .*0\.50 base B The same\. .*0\.25", page), page


def test_a_prompt_on_which_one_arm_differs_most_comes_first(compared: Compared) -> None:
    for number, run in enumerate(compared.runs):
        for index, row in enumerate(run.samples):
            qualities = {"base": 0.05, "stage:ppo": 0.9} if index == 7 else {"base": 0.1, "stage:ppo": 0.1}
            row["answers"] = {arm: {"text": "A.", "scores": {"quality": q * number}} for arm, q in qualities.items()}
    assert re.findall(r"Note (\d+):", Page(compared.html()).text)[0] == "7"
