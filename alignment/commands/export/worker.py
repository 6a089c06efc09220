"""Exports a result for other programs: ``worker ARTIFACT --base FOLDER --to FOLDER --as model|adapter|gguf|vllm``.

``align export`` calls it. Adapters are merged into the weights that they were trained on, after dequantising weights in
four bits. The difference that rounding the sum makes is measured and limited. The written folder is then loaded by
plain transformers or PEFT, and must give the expected outputs before the export is complete.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignment.commands.export.export_options import GGUF, VLLM, ExportOptions, add_form_arguments, options_of
from alignment.commands.export.exported import ExportedResult, exported_result
from alignment.commands.export.forms import write_adapter, write_for_vllm, write_gguf, write_policy, write_reward
from alignment.commands.export.model_card import model_card
from alignment.commands.export.provenance import provenance, value_without_folders
from alignment.commands.shared.worker_process import reported, run_as_program, silence_libraries
from alignment.core.artifacts import REWARD_MODEL, Manifest, readable, verify
from alignment.core.files import explained, partial_folder


@reported
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit code 0, or that of the error."""
    parser = argparse.ArgumentParser(prog="python -m alignment.commands.export.worker", description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument(
        "--base", type=Path, help="the folder of the base model; not needed if the artifact contains a model"
    )
    parser.add_argument("--to", type=Path, required=True)
    add_form_arguments(parser)
    parser.add_argument("--run", help="the run whose evaluation the card describes, if several runs have this artifact")
    given = parser.parse_args(arguments)
    silence_libraries()
    with explained(given.to.parent):
        print(export(given.artifact, given.base, given.to, options_of(given), run=given.run))
    return 0


def export(artifact: Path, base: Path | None, to: Path, options: ExportOptions, *, run: str | None = None) -> str:
    """Writes the folder ``to`` in one rename; returns notes about it. Raises ModelError: the result cannot have this
    form, merging or rounding changed more than ``options.max_gap``, or the written model gives other outputs when it is
    loaded."""
    result = exported_result(artifact, verify(artifact, content=True), base)
    partial = partial_folder(to)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        notes = _write(result, partial, options)
        if options.form != GGUF:  # a GGUF file holds the tokenizer
            result.tokenizer.save_pretrained(str(partial))
        _describe(result, partial, form=options.form, notes=notes, run=run)
        readable(partial)
        partial.rename(to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return "\n".join(notes)


def _write(result: ExportedResult, folder: Path, options: ExportOptions) -> list[str]:
    if options.form == "adapter":
        return write_adapter(result, folder)
    if options.form == GGUF:
        return write_gguf(result, folder, options)
    if options.form == VLLM:
        return write_for_vllm(result, folder, options)
    if result.manifest.kind == REWARD_MODEL:
        return write_reward(result, folder)
    return write_policy(result, folder, max_gap=options.max_gap)


def _describe(result: ExportedResult, folder: Path, *, form: str, notes: Sequence[str], run: str | None) -> None:
    """Writes the card and the manifests of all stages on the way, without folders of this machine."""
    origin = provenance(result.artifact, result.manifest, run)
    files = sorted(file.name for file in folder.iterdir())
    turn_end = None if form in ("adapter", GGUF) else result.turn_end  # their lines render no conversation
    card = model_card(result.manifest, origin, form=form, turn_end=turn_end, notes=notes, files=files)
    (folder / "README.md").write_text(card, encoding="utf-8")
    steps = [_lineage(step.manifest) for step in origin.steps]
    (folder / "lineage.json").write_text(
        json.dumps({**steps[-1], "made_from": steps[:-1]}, indent=1, ensure_ascii=False), encoding="utf-8"
    )


def _lineage(manifest: Manifest) -> dict[str, Any]:
    record = {name: value for name, value in dataclasses.asdict(manifest).items() if name != "files"}
    record["base"] = {
        name: value_without_folders(str(value)) if name == "source" else value
        for name, value in manifest.base.items()
        if name != "path"
    }
    return record


if __name__ == "__main__":
    run_as_program(main)
