"""What the report says of pairs that people judged."""

from __future__ import annotations

import re

from tests.unit.report.conftest import FakeRun

PEOPLE = {"judged": 80, "same_answers": 4, "annotators": 3, "votes": 190, "stale": 7, "alpha": 0.612}
PAIR = {
    "arm": "stage:dpo",
    "against": "stage:sft",
    "prompts": 102,
    "wins": 50,
    "ties": 9,
    "losses": 24,
    "win_rate": {"mean": 0.62, "low": 0.53, "high": 0.71},
    "verdict": "better",
    "position_bias": -0.12,
    "metric_agreement": 0.7,
    "metric_kappa": 0.44,
    "metric_prompts": 76,
    "people": PEOPLE,
}
NOBODY = {
    "arm": "stage:dpo",
    "against": "base+prompt",
    "prompts": 102,
    "wins": 0,
    "ties": 0,
    "losses": 0,
    "verdict": "nothing can be concluded",
    "people": {},
}


def judged_by_people(run: FakeRun) -> None:
    """Puts people's table into the evaluation: a pair that they judged, and one that nobody did."""
    assert run.evaluation is not None
    run.evaluation["judge"] = {
        "kind": "people",
        "name": "the votes of people",
        "num_prompts": 80,
        "pairs": [PAIR, NOBODY],
    }


def test_the_report_says_how_much_people_judged_and_whether_they_agree(fake_run: FakeRun) -> None:
    judged_by_people(fake_run)
    section = fake_run.html().split("<h3>Judged pairs</h3>")[1].split("<h3>")[0]
    rows = re.findall(r'<tr><th scope="row"><bdi>dpo</bdi></th>(.*?)</tr>', section)
    cells = dict(re.findall(r'data-label="([^"]*)">(.*?)</td>', rows[0]))
    assert cells["win rate"] == "0.62<small>0.53 to 0.71</small>"
    assert cells["prompts judged"] == "80 of 102<small>win rate over 83, 3 of them with identical answers</small>"
    assert (cells["α"], cells["bias"]) == ("0.61", "−0.12")
    assert cells["metric agrees"] == "70 % (κ 0.44)<small>on 76 prompts</small>".replace(" %", "\u202f%")
    assert cells["votes, annotators"] == "190 by 3<small>7 on other answers</small>"
    assert "nothing can be concluded" in rows[1]
    assert "0 of 102" in rows[1]
    assert "without the arms' names" in section
    assert "both orders" not in section, "which is about a model that judges"
