"""Versions agree: of the package, its changelog and its citation; of pyproject, constraints and the lock."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from alignment import __version__
from tests.release.lock import LOCK, PYTHONS, left_to_the_machine, locked, pins

ROOT = Path(__file__).parents[2]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT: dict[str, Any] = PYPROJECT["project"]
DIRECT = [
    Requirement(text)
    for texts in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in texts
    if not text.startswith(PROJECT["name"])
]
SECTION = re.compile(r"^## \[(.+?)\](?: - (\S+))?$", re.MULTILINE)
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_changelog_begins_with_what_is_unreleased_and_dates_every_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    names = SECTION.findall(text)
    assert names[0] == ("Unreleased", "")
    assert names[1][0] == __version__
    days = [date.fromisoformat(day) for _, day in names[1:]]
    assert days == sorted(days, reverse=True)
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= KINDS


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    released = SECTION.findall((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))[1]
    assert (citation["version"], citation["date-released"].isoformat()) == released
    assert citation["license"] == PROJECT["license"]
    assert citation["abstract"] == PROJECT["description"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]


def test_the_lock_has_the_packages_of_the_constraints_with_hashes() -> None:
    text = LOCK.read_text(encoding="utf-8")
    assert "://" not in text
    lock = locked(text)
    assert {name: entry.version for name, entry in lock.items()} == pins()
    for name, entry in lock.items():
        assert 1 <= len(entry.hashes) <= len(PYTHONS), name
        assert all(re.fullmatch(r"[0-9a-f]{64}", value) for value in entry.hashes), name


@pytest.mark.parametrize("requirement", DIRECT, ids=str)
def test_every_direct_requirement_is_pinned_within_its_bounds(requirement: Requirement) -> None:
    name = canonicalize_name(requirement.name)
    if name == "torch":
        assert name not in pins()  # each machine has its build
    else:
        assert requirement.specifier.contains(pins()[name], prereleases=True)


def test_all_that_is_required_here_is_pinned() -> None:
    """Follows the requirements of pyproject through those of what is installed."""
    todo = [(canonicalize_name(direct.name), extra) for direct in DIRECT for extra in ("", *direct.extras)]
    seen = set[tuple[str, str]]()
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for text in _required_by(name):
            required = Requirement(text)
            if required.marker is None or required.marker.evaluate({"extra": extra}):
                todo += [(canonicalize_name(required.name), extra) for extra in ("", *required.extras)]
    assert {name for name, _ in seen if not left_to_the_machine(name)} <= set(pins())


def _required_by(name: str) -> list[str]:
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:  # of an extra that the tests do without
        return []


def test_the_classifiers_name_versions_of_python_that_are_allowed_and_the_lock_has_them() -> None:
    stated = [c.removeprefix("Programming Language :: Python :: ") for c in PROJECT["classifiers"] if " :: 3." in c]
    assert stated == list(PYTHONS)
    assert PROJECT["requires-python"] == f">={stated[0]}"
    assert PYPROJECT["tool"]["mypy"]["python_version"] == stated[0]
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{stated[0].replace('.', '')}"
