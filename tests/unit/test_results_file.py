"""Results of slow programs stay traceable to the run that measured them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import results_file

OLD: dict[str, Any] = {"date": "2026-11-01", "commit": "a" * 40, "device": "CPU, old"}
NEW: dict[str, Any] = {"date": "2026-11-02", "commit": "b" * 40, "device": "CPU, new"}


def test_an_entry_replaces_its_own_older_one_and_names_its_run() -> None:
    content = {"runs": [OLD], "proofs": [{"name": "x", "seconds": 1, "run": 0}, {"name": "y", "seconds": 2, "run": 0}]}
    merged = results_file.merge(content, NEW, "proofs", [{"name": "y", "seconds": 3}], names=("name",))
    assert merged == {
        "runs": [OLD, NEW],
        "proofs": [{"name": "x", "seconds": 1, "run": 0}, {"name": "y", "seconds": 3, "run": 1}],
    }


def test_a_run_of_which_nothing_is_left_is_dropped() -> None:
    content = {"runs": [OLD], "proofs": [{"name": "x", "seconds": 1, "run": 0}]}
    merged = results_file.merge(content, NEW, "proofs", [{"name": "x", "seconds": 3}], names=("name",))
    assert merged == {"runs": [NEW], "proofs": [{"name": "x", "seconds": 3, "run": 0}]}


def test_results_of_sources_that_are_not_committed_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/page.md").touch()
    assert results_file.uncommitted(tmp_path) == [], "a page is not a source"
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/new.py").touch()
    monkeypatch.setattr(results_file, "ROOT", tmp_path)
    monkeypatch.setattr(results_file, "uncommitted", lambda: ["?? tests/"])
    file = tmp_path / "docs/proofs.json"
    assert results_file.update(file, "proofs", [{"name": "x"}], names=("name",)) is None
    assert not file.exists()
    assert "docs/proofs.json is left as it is: 1 files are not committed (?? tests/)" in capsys.readouterr().out
