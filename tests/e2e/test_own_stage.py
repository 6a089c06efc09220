"""The package that docs/own_stage.md shows is a package that runs: its files are written from the page."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.documented.blocks import ROOT, Block, blocks
from tests.documented.commands import commands
from tests.e2e.conftest import environment

PAGE = ROOT / "docs/own_stage.md"
MOST_WORDS = 450
INSTALL = ["pip", "install", "-e", "."]


def block_of(language: str, containing: str = "") -> Block:
    """The page's only block of the language with this text."""
    (block,) = [one for one in blocks(PAGE) if one.language == language and containing in one.text]
    return block


class Reader:
    """Somebody who has made the page's files in a folder, and has installed them."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        for name, block in (
            ("wordcount_stage/__init__.py", None),
            ("wordcount_stage/kind.py", block_of("python", "KIND =")),
            ("wordcount_stage/run.py", block_of("python", "def run(")),
            ("pyproject.toml", block_of("toml")),
            ("words.yaml", block_of("yaml")),
        ):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(block.text if block else "", encoding="utf-8")
            assert name.rpartition("/")[2] == "__init__.py" or f"`{name}`" in PAGE.read_text(encoding="utf-8")

    def install(self) -> None:
        """Writes what pip writes for an editable installation; pip itself would need a network."""
        project = tomllib.loads((self.folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        points = project["entry-points"]["alignment.stages"]
        info = self.folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        (info / "METADATA").write_text(metadata, encoding="utf-8")
        lines = "".join(f"{name} = {value}\n" for name, value in points.items())
        (info / "entry_points.txt").write_text(f"[alignment.stages]\n{lines}", encoding="utf-8")

    def align(self, *words: str, code: int = 0) -> str:
        """What a command prints. The model is a tiny one; no stage of the page loads it."""
        more = [f"model.source=path:{self.model}"] if words[0] in ("plan", "run") else []
        path = os.pathsep.join(part for part in (str(self.folder), os.environ.get("PYTHONPATH", "")) if part)
        done = subprocess.run(
            [sys.executable, "-m", "alignment.cli", *words, *more],
            cwd=self.folder,
            env=environment() | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def change(self, name: str, old: str, new: str) -> None:
        """Replaces a text in a file of the package."""
        file = self.folder / "wordcount_stage" / name
        text = file.read_text(encoding="utf-8")
        assert text.count(old) == 1
        file.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture
def reader(tiny_model_folder: Path, tmp_path: Path) -> Reader:
    reader = Reader(tmp_path, tiny_model_folder)
    reader.install()
    return reader


def test_the_page_is_short() -> None:
    assert len(PAGE.read_text(encoding="utf-8").split()) <= MOST_WORDS


def test_the_commands_of_the_page_do_what_it_says(reader: Reader) -> None:
    install, *called = [command.words for command in commands(block_of("bash"))]
    assert install == INSTALL
    listed, planned, ran, again = [reader.align(*words[1:]) for words in called]
    assert listed.splitlines()[-1] == "wordcount    words of plain texts (wordcount-stage)"
    assert re.search(r"count +run ", planned)
    (words,) = re.findall(r"^(\d+) words$", ran, re.MULTILINE)
    assert "count: reused " in again
    assert f"\n{words} words\n" in reader.align("status", "words")

    record = json.loads((reader.folder / "runs/words/run.json").read_text(encoding="utf-8"))
    artifact = Path(record["stages"]["count"]["artifact"])
    texts = (ROOT / "data/general/texts.jsonl").read_text(encoding="utf-8").splitlines()
    long = [word for line in texts for word in json.loads(line)["text"].split() if len(word) >= 3]
    assert int(words) == len(long)
    metrics = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics == {"rows": len(texts), "words": len(long)}
    report = (reader.folder / "runs/words/report.html").read_text(encoding="utf-8")
    most_common, count = json.loads((artifact / "words.json").read_text(encoding="utf-8"))[0]
    assert "Common words" in report
    assert count == long.count(most_common)
    assert most_common in report


def test_a_function_that_fails_to_show_a_result_is_named_with_its_line_and_the_rest_is_shown(reader: Reader) -> None:
    reader.change("kind.py", "manifest.metrics['words']", "manifest.metrics['wrods']")
    reader.change("kind.py", "text=str(count)", "text=count.text")
    file = reader.folder / "wordcount_stage/kind.py"
    code = file.read_text(encoding="utf-8").splitlines()
    for printed in (reader.align("run", "./words.yaml"), reader.align("status", "words")):
        for name, error, text in (
            ("lines", "KeyError: 'wrods'", "wrods"),
            ("tables", "AttributeError: 'int' object has no attribute 'text'", "count.text"),
        ):
            (line,) = [number for number, words in enumerate(code, 1) if text in words]
            where = f"error: kind of stage 'wordcount' (wordcount-stage): Outcome.{name} fails with "
            assert f"{where}{error}\n  {file}, line {line}\n" in printed
        assert "Traceback" not in printed
        assert f"report: {reader.folder}/runs/words/report.html" in printed
    record = json.loads((reader.folder / "runs/words/run.json").read_text(encoding="utf-8"))
    assert {stage["state"] for stage in record["stages"].values()} == {"done"}
    report = (reader.folder / "runs/words/report.html").read_text(encoding="utf-8")
    assert "The tables of count cannot be shown: kind of stage" in report


def test_what_a_newcomer_gets_wrong_ends_with_what_to_do(reader: Reader) -> None:
    """A plan refuses a faulty kind; a run says what the stage did not do, and goes well once that is mended."""
    reader.change("kind.py", "    launch=LaunchShape(runs_on=RunsOn.one_process),\n", "")
    assert "stages.count.kind: 'wordcount' cannot be used: " in reader.align("plan", "./words.yaml", code=2)
    reader.change("kind.py", "    outcome=", "    launch=LaunchShape(runs_on=RunsOn.one_process),\n    outcome=")

    writes = '(context.content / "words.json").write_text(json.dumps(words.most_common()), encoding="utf-8")'
    reader.change("run.py", writes, "words.most_common()")
    failed = reader.align("run", "./words.yaml", code=5)
    assert "stage count: the stage wrote no file" in failed
    assert "→ write at least one file into context.content" in failed
    assert not list(reader.folder.glob("artifacts/count-????????"))

    reader.change("run.py", "words.most_common()", writes)
    reader.change("kind.py", '("rows", "words")', '("rows", "word")')
    assert "count: it did not report word, which Outcome.metrics" in reader.align("run", "./words.yaml")
