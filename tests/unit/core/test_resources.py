"""Folders that ship beside the code, and commands that messages advise, in a checkout and in an installed package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from alignment.core import resources


def test_a_checkout_has_its_folders_at_the_root_and_its_commands_in_make() -> None:
    assert (resources.shipped("conf") / "base.yaml").is_file()
    assert resources.shipped("conf").parent == resources.CODE_ROOT
    assert resources.command_for("engine", "alignment.engines.build_environment", "vllm") == "make engine"


def test_an_installed_package_has_copies_and_no_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_COPIES", tmp_path)
    assert resources.shipped("conf") == tmp_path / "conf"
    command = resources.command_for("engine", "alignment.engines.build_environment", "vllm")
    assert command == f"{sys.executable} -m alignment.engines.build_environment vllm"
