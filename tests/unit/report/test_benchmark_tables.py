"""What a stage's own tables show: on the run's page, side by side with other runs, and in a line on the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignment.report.comparison_page.comparison import build_comparison
from alignment.stages.registry import lines_of
from tests.unit.report.conftest import FakeRun
from tests.unit.report.test_page import assert_harmless

PAIR = {"arm": "stage:sft", "against": "base", "difference": 0.2, "low": 0.05, "high": 0.35, "p": 0.01}
RECORD: dict[str, Any] = {
    "harness": "0.4.13",
    "tasks": [
        {
            "name": "capitals",
            "num_fewshot": 2,
            "num_rows": 20,
            "all_rows": 20,
            "metrics": [{"name": "acc"}, {"name": "exact_match", "filter": "strict", "higher_is_better": False}],
        },
        {"name": "all", "group": True, "num_rows": 5, "all_rows": 40, "metrics": [{"name": "acc", "by_row": False}]},
    ],
    "arms": [
        {"name": "base", "values": {"capitals/acc": {"value": 0.35, "stderr": 0.1094}, "all/acc": {"value": 0.5}}},
        {"name": "stage:sft", "values": {"capitals/acc": {"value": 0.55, "stderr": 0.1141}}},
    ],
    "comparisons": [{**PAIR, "metric": "capitals/acc", "adjusted_p": 0.02}],
    "other_comparisons": [
        {**PAIR, "metric": "capitals/exact_match,strict", "adjusted_p": 0.03},
        {**PAIR, "metric": "capitals/acc_norm", "adjusted_p": 0.6},
    ],
}


def add(run: FakeRun, content: str | None) -> None:
    """Gives the run a stage ``asked`` that left this file."""
    entry = {"kind": "benchmark", "inputs": {"arms": ["base", "stage:sft"]}, "seconds": 9.0}
    run.run["stages"]["asked"] = entry | {"state": "done", "reason": "new", "artifact": "asked-01234567"}
    run.write()
    if content is not None:
        (run.artifact("asked") / "benchmark.json").write_text(content, encoding="utf-8")


def section(html: str) -> str:
    return html.split('<section id="results">')[1].split("</section>")[0]


def test_every_arm_has_its_values_with_standard_errors(fake_run: FakeRun) -> None:
    add(fake_run, json.dumps(RECORD))
    html = fake_run.html()
    assert '<a href="#results">' in html
    shown = section(html)
    assert "Values of lm-evaluation-harness 0.4.13 without a chat template" in shown
    for part in ("capitals/acc", "0.350<small>± 0.109</small>", "0.550<small>± 0.114</small>", "5/40"):
        assert part in shown
    assert "A limit left out rows" in shown, "of the group"


def test_differences_have_intervals_p_values_and_verdicts(fake_run: FakeRun) -> None:
    add(fake_run, json.dumps(RECORD))
    rows = [row for row in section(fake_run.html()).split("<tr>") if "sft − base" in row]
    assert len(rows) == 3
    better, worse, unclear = rows
    assert "capitals/acc: sft − base" in better
    assert "+0.200<small>+0.050 to +0.350</small>" in better
    assert '<span class="verdict good">better</span>' in better
    assert '<span class="verdict bad">worse</span>' in worse, "less of that metric is better"
    assert '<span class="verdict open">no real difference</span>' in unclear


def test_a_corrected_p_value_below_the_level_never_reads_as_the_level(fake_run: FakeRun) -> None:
    comparisons = [{**PAIR, "metric": "capitals/acc", "adjusted_p": 0.0497}]
    add(fake_run, json.dumps({**RECORD, "comparisons": comparisons}))
    (better,) = [row for row in section(fake_run.html()).split("<tr>") if "capitals/acc: sft − base" in row]
    assert '<td data-label="p, corrected">0.049</td>' in better
    assert '<span class="verdict good">better</span>' in better


def test_a_stage_without_tables_has_no_section(fake_run: FakeRun) -> None:
    assert '<section id="results">' not in fake_run.html()


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (None, "asked has no result yet."),
        ("[]", "The result of asked cannot be read."),
        ('{"arms": 3}', "The result of asked cannot be read."),
        ('{"version": 2}', "The result of asked cannot be read."),
    ],
)
def test_what_cannot_be_read_is_said(fake_run: FakeRun, content: str | None, note: str) -> None:
    add(fake_run, content)
    shown = section(fake_run.html())
    assert note in shown
    assert "<table" not in shown


def test_hostile_names_stay_text(fake_run: FakeRun) -> None:
    record = json.loads(json.dumps(RECORD).replace("capitals", "<script>alert(1)</script>"))
    add(fake_run, json.dumps(record))
    html = fake_run.html()
    assert "&lt;script&gt;alert(1)" in section(html)
    assert_harmless(html)


def test_runs_stand_side_by_side_by_task_and_metric(tmp_path: Path) -> None:
    runs = [FakeRun(tmp_path / name) for name in ("first", "second", "third")]
    other = json.loads(json.dumps(RECORD))
    other["arms"] = [{"name": "stage:dpo", "values": {"capitals/acc": {"value": 0.75}}}]
    other["tasks"] = other["tasks"][:1]
    for run, content in zip(runs, (json.dumps(RECORD), json.dumps(other), None), strict=True):
        if content is not None:
            add(run, content)
        run.write()
    page = tmp_path / "page.html"
    build_comparison([run.folder for run in runs], page, settings={}, differences=[], primary=None)
    shown = section(page.read_text(encoding="utf-8"))
    for heading in ("A: base", "A: sft", "B: dpo"):
        assert f"<bdi>{heading}</bdi>" in shown
    row = next(row for row in shown.split("<tr>") if "capitals/acc" in row)
    assert [part in row for part in ("0.350", "0.550", "0.750")] == [True] * 3
    group = next(row for row in shown.split("<tr>") if "all/acc" in row)
    assert '<td data-label="B: dpo">–</td>' in group
    assert "Differences between arms" not in shown, "those are of one run"


def test_the_terminal_says_the_same(fake_run: FakeRun) -> None:
    add(fake_run, json.dumps(RECORD))
    assert lines_of("benchmark", fake_run.artifact("asked")) == [
        "capitals/acc, 2-shot, 20 rows: base 0.350 ± 0.109, sft 0.550 ± 0.114",
        "capitals/exact_match,strict, 2-shot, 20 rows: base –, sft –",
        "all/acc, 5 of 40 rows: base 0.500, sft –",
        "sft against base in capitals/acc: +0.200 (+0.050 to +0.350), adjusted p 0.02, better",
        "sft is better than base in capitals/acc (+0.200).",
    ]


def compared(*differences: tuple[str, float, float]) -> list[dict[str, Any]]:
    """Comparisons of sft and base, each with a metric, a difference and a p value."""
    return [{**PAIR, "metric": metric, "difference": value, "adjusted_p": p} for metric, value, p in differences]


@pytest.mark.parametrize(
    ("comparisons", "lead"),
    [
        (compared(("a/acc", 0.2, 0.02)), "sft is better than base in a/acc (+0.200)."),
        (compared(("a/acc", 0.2, 0.2)), "sft and base: no real difference in a/acc."),
        (
            compared(("a/acc", 0.2, 0.02), ("b/acc", -0.1, 0.01), ("c/acc", 0.1, 0.5)),
            "sft is better than base in a/acc (+0.200) and worse than base in b/acc (-0.100); "
            "no real difference in c/acc.",
        ),
        (
            compared(*((f"{task}/acc", 0.2, 0.02) for task in "abcde")),
            "sft is better than base in a/acc (+0.200), b/acc (+0.200), c/acc (+0.200) and 2 more.",
        ),
        (
            [
                *compared(("a/acc", 0.2, 0.02)),
                {**compared(("a/acc", 0.3, 0.02))[0], "arm": "stage:dpo", "against": "stage:sft"},
            ],
            "sft is better than base in a/acc (+0.200).",
        ),
        ([], "base: all/acc 0.500, capitals/acc 0.350 ± 0.109. sft: capitals/acc 0.550 ± 0.114."),
    ],
)
def test_a_run_without_an_evaluation_begins_with_the_result_of_its_benchmark(
    fake_run: FakeRun, comparisons: list[dict[str, Any]], lead: str
) -> None:
    fake_run.evaluation = None
    del fake_run.run["stages"]["evaluate"]
    add(fake_run, json.dumps({**RECORD, "comparisons": comparisons}))
    assert fake_run.html().split('<p class="lead">')[1].split("</p>")[0] == lead
    assert lines_of("benchmark", fake_run.artifact("asked"))[-1] == lead
