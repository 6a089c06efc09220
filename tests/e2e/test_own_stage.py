"""The package that docs/own_stage.md shows is a package that runs: its files are written from the page."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
import typing
from pathlib import Path
from typing import Any

import pytest

from alignment.data import records
from tests.documented.blocks import ROOT, Block, blocks, tables
from tests.documented.commands import commands
from tests.e2e.forked import Forked

PAGE = ROOT / "docs/own_stage.md"

ROWS_PAGE = ROOT / "docs/own_rows.md"


def block_of(language: str, containing: str = "", *, page: Path = PAGE) -> Block:
    (block,) = [
        candidate for candidate in blocks(page) if candidate.language == language and containing in candidate.text
    ]
    return block


class Reader:
    """Somebody who has made the page's files in a folder, and has installed them."""

    def __init__(self, folder: Path, model: Path, forked: Forked, *, page: Path, name: str, recipe: str) -> None:
        self.folder, self.model, self.package = folder, model, f"{name}_stage"
        self._forked = forked
        project = block_of("toml").text.replace("wordcount", name)
        for path, text in (
            (f"{self.package}/kind.py", block_of("python", "KIND =", page=page).text),
            (f"{self.package}/run.py", block_of("python", "def run(", page=page).text),
            (recipe, block_of("yaml", page=page).text),
        ):
            assert f"`{path}`" in page.read_text(encoding="utf-8")
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
        (folder / self.package / "__init__.py").touch()
        (folder / "pyproject.toml").write_text(project, encoding="utf-8")

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
        more = [f"model.source=path:{self.model}"] if words[0] in ("plan", "run") else []
        ended, printed = self._forked.run([*words, *more], installed=self.folder, folder=self.folder)
        assert ended == code, printed
        return printed

    def record(self) -> dict[str, Any]:
        stages: dict[str, Any] = json.loads((self.folder / "runs/words/run.json").read_text(encoding="utf-8"))["stages"]
        return stages

    def report(self) -> str:
        return (self.folder / "runs/words/report.html").read_text(encoding="utf-8")

    def change(self, name: str, old: str, new: str) -> None:
        file = self.folder / self.package / name
        text = file.read_text(encoding="utf-8")
        assert text.count(old) == 1
        file.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture
def reader(tiny_model_folder: Path, forked: Forked, tmp_path: Path) -> Reader:
    reader = Reader(tmp_path, tiny_model_folder, forked, page=PAGE, name="wordcount", recipe="words.yaml")
    reader.install()
    return reader


def test_the_commands_of_the_page_do_what_it_says(reader: Reader) -> None:
    assert len(PAGE.read_text(encoding="utf-8").split()) <= 450, "the page is short"
    install, *called = [command.words for command in commands(block_of("bash"))]
    assert install == ["pip", "install", "-e", "."]
    listed, planned, ran, again = [reader.align(*words[1:]) for words in called]
    assert listed.splitlines()[-1] == "wordcount    words of plain texts (wordcount-stage)"
    assert re.search(r"\bcount .*run ", planned)
    (words,) = re.findall(r"^(\d+) words$", ran, re.MULTILINE)
    assert "count: reused " in again
    assert f"\n{words} words\n" in reader.align("status", "words")

    artifact = Path(reader.record()["count"]["artifact"])
    texts = (ROOT / "data/general/texts.jsonl").read_text(encoding="utf-8").splitlines()
    long = [word for line in texts for word in json.loads(line)["text"].split() if len(word) >= 3]
    metrics = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics == {"rows": len(texts), "words": len(long)}
    assert int(words) == len(long)
    most_common, count = json.loads((artifact / "words.json").read_text(encoding="utf-8"))[0]
    assert count == long.count(most_common)
    assert most_common in reader.report().partition("Common words")[2]


def test_a_function_that_fails_to_show_a_result_is_named_with_its_line_and_the_rest_is_shown(reader: Reader) -> None:
    reader.change("kind.py", "manifest.metrics['words']", "manifest.metrics['wrods']")
    reader.change("kind.py", "text=str(count)", "text=count.text")
    file = reader.folder / "wordcount_stage/kind.py"
    code = file.read_text(encoding="utf-8").splitlines()
    for printed in (reader.align("run", "./words.yaml"), reader.align("status", "words")):
        for name, error, text in (("lines", "KeyError: 'wrods'", "wrods"), ("tables", "AttributeError", "count.text")):
            (line,) = [number for number, words in enumerate(code, 1) if text in words]
            assert re.search(rf"Display\.{name} fails with {error}.*\n  {file}, line {line}\n", printed)
        assert "Traceback" not in printed
        assert f"report: {reader.folder}/runs/words/report.html" in printed
    assert {stage["state"] for stage in reader.record().values()} == {"done"}
    assert "The tables of count cannot be shown: kind of stage" in reader.report()


def test_what_a_newcomer_gets_wrong_ends_with_what_to_do(reader: Reader) -> None:
    """A plan refuses a faulty kind; a run says what the stage did not do, and goes well once that is mended."""
    launch = "    launch=LaunchShape(runs_on=RunsOn.one_process),\n"
    reader.change("kind.py", launch, "")
    assert "stages.count.kind: 'wordcount' cannot be used: " in reader.align("plan", "./words.yaml", code=2)
    reader.change("kind.py", "    display=", f"{launch}    display=")

    writes = '(context.content / "words.json").write_text(json.dumps(words.most_common()), encoding="utf-8")'
    reader.change("run.py", writes, "words.most_common()")
    failed = reader.align("run", "./words.yaml", code=5)
    assert "stage count: the stage wrote no file" in failed
    assert "→ write at least one file into context.content" in failed
    assert not list(reader.folder.glob("artifacts/count-????????"))

    reader.change("run.py", "words.most_common()", writes)
    reader.change("kind.py", '("rows", "words")', '("rows", "word")')
    assert "count: it did not report word" in reader.align("run", "./words.yaml")


def test_rows_of_a_stage_in_another_package_are_learned_and_its_settings_checked(
    tiny_model_folder: Path, forked: Forked, tmp_path: Path
) -> None:
    reader = Reader(tmp_path, tiny_model_folder, forked, page=ROWS_PAGE, name="shorten", recipe="short.yaml")
    reader.install()
    for setting, where in (("min_words=31", "stages.shorten.min_words"), ("max_words=0", "stages.shorten.max_words")):
        refused = reader.align("plan", "./short.yaml", f"stages.shorten.{setting}", code=2)
        assert f"{where}: {setting.partition('=')[2]} is " in refused
    reader.align("run", "./short.yaml", "profile=smoke")
    (folder,) = tmp_path.glob("artifacts/shorten-????????")
    metrics = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["metrics"]
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert metrics["kept"] == len(rows) > 0
    assert all(len(row["messages"][-1]["content"].split()) <= 30 for row in rows)
    assert list(tmp_path.glob("artifacts/sft-????????/manifest.json"))

    shows = """    rows=lambda config: MadeRows(example='{"prompt": "Hi", "completion": "Hello."}', others={}),\n"""
    reader.change("kind.py", shows, "")
    assert "makes rows, but shows none" in reader.align("plan", "./short.yaml", code=2)


def test_the_fields_of_records_are_there() -> None:
    (rows,) = [table.rows for table in tables(ROWS_PAGE) if table.head[0] == "record"]
    for name, _, fields in rows:
        record = getattr(records, name.strip("`"))
        has = {field.name for field in dataclasses.fields(record)}
        assert {*re.findall(r"`(\w+)`", fields), "id", "where"} <= has
    shown = {name.strip("`") for name, *_ in rows}
    assert shown == {record.__name__ for record in typing.get_args(records.Record)} - {"HeldOutPrompt", "Question"}
