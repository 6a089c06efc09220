"""The driver's side of counting tokens: a process that has the tokenizer does it."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.commands.new.data_files import DataFile
from alignment.config.new_recipe import Lengths
from alignment.core.artifacts import write_json
from alignment.core.errors import AlignmentError, DataError, ModelError, StageError
from alignment.pipeline.backends import processes

Measure = Callable[[Mapping[str, Any]], Sequence[Lengths]]
"""What ``alignment.commands.new.worker.measured`` is."""
_ERRORS = {error.exit_code: error for error in (DataError, ModelError)}


def measured_lengths(
    files: Sequence[DataFile], folder: Path, template: str | None, *, measure: Measure | None = None
) -> list[Lengths]:
    """The lengths of each file's records, by the tokenizer and the chat template of the model in a folder.

    Raises:
        ModelError: there is no usable tokenizer.
        DataError: no record of a file can be rendered.
        StageError: the process failed.
    """
    asked = {
        "folder": str(folder),
        "template": template,
        "files": [
            {"path": str(file.path), "record": file.record.__name__, "columns": dict(file.columns)} for file in files
        ],
    }
    return list((_in_process if measure is None else measure)(asked))


def _in_process(asked: Mapping[str, Any]) -> list[Lengths]:
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder) / "asked.json", Path(folder) / "answer.json"
        write_json(question, asked)
        code = processes.call([sys.executable, "-m", "alignment.commands.new.worker", str(question), str(answer)])
        if code or not answer.is_file():
            raise StageError(
                f"the process that counts tokens ended with {code}",
                where="new",
                remedy="its output is above; a chat template that runs forever is stopped",
            )
        content = json.loads(answer.read_text(encoding="utf-8"))
    if fault := content.get("error"):
        kind = _ERRORS.get(fault["code"], AlignmentError)
        raise kind(fault["message"], where=fault["where"], remedy=fault["remedy"])
    return [Lengths(**lengths) for lengths in content["lengths"]]
