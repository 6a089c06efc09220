"""Sweeps over data of a hub: it is fetched before the first trial, so that no trial and no study is lost by it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from alignment.core.errors import ConfigError, DataError
from tests.hub import answer, leave_data_set, use_cache
from tests.unit.pipeline.conftest import ROWS
from tests.unit.pipeline.sweeps.fake_runs import Runs, go, trials

SOURCE = "stages.sft.data.source=hub:org/name@v1"
FILES = {"data/train.jsonl": (json.dumps(ROWS["conversations"]) + "\n") * 2}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder below which a hub's cache lies."""
    use_cache(monkeypatch, tmp_path)
    return tmp_path


def test_a_hub_that_is_away_fails_no_trial(runs: Runs, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        answer(patched, TimeoutError("timed out"))
        with pytest.raises(DataError, match=r"hub:org/name@v1: cannot be downloaded: timed out\n  → try again"):
            go(runs, "dpo_beta", SOURCE)
    assert runs.asked == []
    leave_data_set(cache, FILES, revision="v1")
    assert go(runs, "dpo_beta", SOURCE)[0] == 0
    assert [row["state"] for row in trials(runs)] == ["done"] * 4


def test_nothing_is_downloaded_for_a_sweep_that_cannot_begin(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, TimeoutError("it was asked for the data set"))
    with pytest.raises(ConfigError, match=r"name: a trial's run would be called 'a{60}\.dpo_beta\.3'"):
        go(runs, "dpo_beta", SOURCE, f"name={'a' * 60}")
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match="sweeps need optuna"):
        go(runs, "dpo_beta", SOURCE)


def test_the_first_download_begins_no_second_study(runs: Runs, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:

        def download() -> Path:
            patched.undo()  # asked again, the client itself finds what the download has left
            return leave_data_set(cache, FILES, revision="v1")

        def figure(settings: dict[str, str]) -> float:
            download()  # a run would do so as well
            return float(settings["stages.dpo.beta"])

        answer(patched, download)
        runs.figure = figure
        _, printed = go(runs, "dpo_beta", SOURCE)
    assert printed.count("downloading the data set org/name@v1 from its hub") == 1
    assert len(runs.asked) == 4
    assert go(runs, "dpo_beta", SOURCE)[0] == 0
    assert len(runs.asked) == 4, "its trials are found again"
