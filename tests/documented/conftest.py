"""The reader's folder, made once; each test gets one of its own whose files are links into it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from alignment.core import hardware
from alignment.pipeline.backends import processes
from tests.documented import workplace

Enter = Callable[[str], Path]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workplace.build(tmp_path_factory.mktemp("files"))


@pytest.fixture
def enter(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Enter:
    """Changes to a folder with the files of a page; returns it. The worker of a preview runs in this process. Pages
    show what a processor with bfloat16 prints."""
    monkeypatch.setattr(processes, "call", _here)
    monkeypatch.setattr(hardware, "has_bfloat16", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")

    def change(page: str) -> Path:
        folder = tmp_path / "reader"
        folder.mkdir()
        workplace.for_page(files, page, folder)
        monkeypatch.chdir(folder)
        return folder

    return change


def _here(argv: Sequence[str]) -> int:
    _, option, module, *arguments = argv
    assert option == "-m"
    code: int = importlib.import_module(module).main(arguments)
    return code
