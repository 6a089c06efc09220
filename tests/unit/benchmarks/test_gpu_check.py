"""What ``make gpu-check`` does with programs that pass, fail or do not end, and what its page says of them."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_check import checks, speed
from benchmarks.gpu_check.card import Card
from benchmarks.gpu_check.checks import Check, Outcome
from benchmarks.gpu_check.page import text_of, write
from tests.tiny import save_tiny_model

FAILED = "print('noise\\nFAILED tests/unit/x.py::test_y - assert 1 == 2\\nmore noise'); raise SystemExit(1)"


@pytest.mark.parametrize(
    ("code", "faults"),
    [
        ("print('well')", []),
        (FAILED, ["exit code 1", "FAILED tests/unit/x.py::test_y - assert 1 == 2"]),
        ("raise OSError('/secret/folder/file is gone')", ["exit code 1", "OSError: file is gone"]),
    ],
    ids=["passes", "tests fail", "another program fails"],
)
def test_a_program_passes_with_0_and_its_failures_are_named_without_folders(code: str, faults: list[str]) -> None:
    outcome = checks.run(check(code), seconds=60)
    assert (outcome.passed, outcome.figures) == (not faults, {})
    assert [*outcome.faults[:1], *outcome.faults[1:][-1:]] == faults
    silent = Check(name="speed", about="", command=(sys.executable, "-c", ""), seconds=60, figures=checks._last_line)
    assert "IndexError" in checks.run(silent, seconds=60).faults[0], "metrics that are missing are a fault"


CARD = Card(name="NVIDIA H100 80GB HBM3", count=2, memory=80 << 30, capability="9.0", cuda="12.8")


def check(code: str, *, name: str = "tried", seconds: float = 60.0) -> Check:
    return Check(name=name, about="a program", command=(sys.executable, "-c", code), seconds=seconds)


def test_a_program_that_does_not_end_is_stopped_with_all_that_it_started() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    started = time.monotonic()
    outcome = checks.run(check(code), seconds=1)
    assert outcome.faults[0] == "not done after 1 s; it was stopped"
    assert time.monotonic() - started < 30, "its child holds the pipe open while it lives"


def test_the_page_says_what_passed_what_failed_and_what_was_measured(tmp_path: Path) -> None:
    outcomes = [
        Outcome(check=check("", name="kernels"), seconds=12.4, faults=["exit code 1", "FAILED test_x"]),
        Outcome(check=check("", name="speed"), seconds=3.0, figures={"TFLOP/s": 612.5}),
    ]
    page = write(CARD, outcomes, folder=tmp_path / "gpu", commit="abc1234", date="2026-11-27")
    text = page.read_text()
    assert page.name == "nvidia-h100-80gb-hbm3.md"
    for words in (
        "on 2026-11-27, commit abc1234: 1 of 2 checks passed.",
        "- devices: 2, 80 GiB each, compute capability 9.0",
        "| kernels | a program | **failed** | 12 |",
        "## What failed: kernels\n\n```\nexit code 1\nFAILED test_x\n```",
        "| TFLOP/s | 612.5 |",
    ):
        assert words in text
    simulated = Card(name="simulated CUDA device", count=1, memory=1 << 30, capability="9.0", cuda="12.8")
    notes = ["Not a card" in text_of(card, [], commit="abc1234", date="2026-11-27") for card in (CARD, simulated)]
    assert notes == [False, True]


def test_speeds_are_measured_on_whatever_device_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_model(tmp_path / "model")
    assert speed.main(["--side", "64", "--megabytes", "1", "--model", str(model)]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(figures) == 4
    assert all(value >= 0 for value in figures.values())
    assert figures["greedy answers, tokens a second (2048 tokens, 32 at once)"] > 0
