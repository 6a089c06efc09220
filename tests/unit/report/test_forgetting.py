"""The page says what was forgotten, where a run measured it, and stays whole where the file cannot be understood."""

from __future__ import annotations

import json

import pytest

ARMS = [
    {"name": "base", "label": "base", "perplexity": 28.6, "ability": 0.636, "rise": None, "drop": None, "passed": True},
    {
        "name": "stage:sft",
        "label": "sft",
        "perplexity": 53.66,
        "ability": 0.5,
        "rise": {"mean": 0.877, "low": 0.734, "high": 1.042},
        "drop": {"mean": 0.136, "low": 0.05, "high": 0.22},
        "passed": False,
        "reasons": ["perplexity of general text is 87.7% higher", "13.6% fewer questions are answered right"],
    },
]
LIMITS = {"perplexity_rise": 0.2, "ability_drop": 0.1}
RECORD = {"num_texts": 48, "num_tokens": 4326, "num_questions": 110, "limits": LIMITS, "arms": ARMS, "passed": False}


def page(fake_run, content: str) -> str:
    """The report of a run whose stage ``forgetting`` left this file."""
    entry = {"kind": "forgetting", "inputs": {"arms": ["stage:sft"]}, "seconds": 41.0}
    fake_run.run["stages"]["forgetting"] = entry | {"state": "done", "reason": "new", "artifact": "forgetting-01234567"}
    fake_run.write()
    (fake_run.artifact("forgetting") / "forgetting.json").write_text(content, encoding="utf-8")
    return fake_run.html()


def test_arms_stand_before_and_after_with_intervals_and_whether_they_passed(fake_run):
    html = page(fake_run, json.dumps(RECORD))
    section = html.split('<section id="forgotten">')[1].split("</section>")[0]
    assert '<a href="#forgotten">' in html
    for shown in ("28.60", "53.66", "0.877", "0.734 to 1.042", "0.136", "0.050 to 0.220", "before", "48 general texts"):
        assert shown in section
    assert '<span class="verdict bad">forgot too much</span>' in section
    assert "at most 20\u202f%" in section
    warnings = html.split('<div class="warnings">')[1].split("</div>")[0]
    assert (
        "sft forgot too much: perplexity of general text is 87.7% higher; 13.6% fewer questions are answered right."
        in warnings
    )


def test_an_arm_within_its_limits_passed_and_nothing_is_warned_of(fake_run):
    passed = [ARMS[0], ARMS[1] | {"passed": True, "reasons": []}]
    html = page(fake_run, json.dumps(RECORD | {"arms": passed, "passed": True}))
    assert '<span class="verdict good">passed</span>' in html
    assert "forgot too much" not in html


def test_without_limits_no_arm_is_said_to_have_passed(fake_run):
    limits = {"perplexity_rise": None, "ability_drop": None}
    passed = [ARMS[0], ARMS[1] | {"passed": True, "reasons": []}]
    html = page(fake_run, json.dumps(RECORD | {"arms": passed, "passed": True, "judged": False, "limits": limits}))
    section = html.split('<section id="forgotten">')[1].split("</section>")[0]
    assert '<td data-label="limits">not judged</td>' in section
    assert "passed" not in section
    assert "No limits were set" in section


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "cannot be read"),
        ("[]", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("{}", "names no arms"),
        ('{"arms": [{}]}', "names no arms"),
        ('{"arms": 3, "limits": 4}', "names no arms"),
        ('{"version": 2, "arms": [{"name": "base"}]}', "was written by a newer version and is not shown"),
    ],
)
def test_a_file_that_cannot_be_understood_is_said_to_be(fake_run, content, reason):
    section = page(fake_run, content).split('<section id="forgotten">')[1].split("</section>")[0]
    assert f'<p class="missing">The file forgetting.json {reason}.</p>' in section


def test_figures_that_are_missing_are_dashes(fake_run):
    html = page(fake_run, '{"arms": [{"name": "base"}, {"name": "stage:sft", "rise": 3, "drop": "x"}], "limits": []}')
    assert '<td data-label="perplexity">–</td>' in html.split('<section id="forgotten">')[1].split("</section>")[0]


def test_a_run_that_measured_nothing_has_no_such_section(fake_run):
    assert "forgotten" not in fake_run.html()
