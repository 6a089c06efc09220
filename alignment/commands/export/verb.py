"""``align export``: writes a result to a folder that transformers, PEFT, vLLM or llama.cpp can load."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from alignment.commands.export.export_options import GGUF, ExportOptions, add_form_arguments, options_of
from alignment.commands.shared.arguments import add_output, runs_of, write_folder
from alignment.core.artifacts import POLICY, REWARD_MODEL, read_manifest
from alignment.core.errors import ArtifactError, ConfigError
from alignment.core.files import new_folder
from alignment.engines.engine_environment import build_command, engines_folder
from alignment.pipeline.execute.stored_results import artifact_of, base_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A result, and where and how to write it."""
    parser.add_argument(
        "result",
        metavar="RESULT",
        help="an artifact's folder, RUN/STAGE such as quickstart/dpo, or an adapter that PEFT saved (path:FOLDER, "
        "hub:ORG/NAME)",
    )
    parser.add_argument("--to", required=True, metavar="FOLDER", help="a folder that does not exist yet")
    add_form_arguments(parser)
    add_output(parser)


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Writes the folder; returns the exit code."""
    output, (result,) = runs_of(arguments, arguments.result)
    return export(console, result, to=arguments.to, options=options_of(arguments), output=output)


EXPORTED = (POLICY, REWARD_MODEL)
LLAMA_PYTHON = "ALIGNMENT_LLAMA_CPP_PYTHON"
"""The environment variable that names an interpreter with llama-cpp-python."""


def export(console: Console, result: str, *, to: str, options: ExportOptions, output: Path) -> int:
    """Writes the folder ``to``; returns the exit code.

    ``result`` is an artifact's folder or ``RUN/STAGE`` of a run under ``output``.

    Raises:
        ConfigError: there is no such result, ``to`` exists already, or there is no interpreter where one was named.
        ModelError: the base of the result is missing on this machine.
        StageError: the process was killed.
    """
    folder = artifact_of(result, output, console)
    manifest = read_manifest(folder)
    if manifest is None:
        raise ArtifactError("no complete artifact here", where=str(folder), remedy="run the stage that makes it")
    if manifest.kind not in EXPORTED:
        message = f"{folder.name} is of kind {manifest.kind}; only a policy or a reward model can be exported"
        raise ConfigError(message, where=result)
    target = new_folder(to)
    argv = [sys.executable, "-m", "alignment.commands.export.worker", str(folder), "--to", str(target)]
    argv += _with_llama_python(options).as_arguments
    if manifest.base["source"] != "self":
        argv += ["--base", str(base_of(manifest, folder, console))]
    if not Path(result).expanduser().is_dir():
        argv += ["--run", result.partition("/")[0]]
    code = write_folder(argv, target, verb="export")
    if code == 0:
        console.print(f"written: {target}", markup=False, highlight=False, soft_wrap=True)
    return code


def _with_llama_python(options: ExportOptions) -> ExportOptions:
    """The options with the interpreter that reads a GGUF file too: one named, or that make engine-llama built."""
    if options.form != GGUF:
        return options
    named = options.llama_python or os.environ.get(LLAMA_PYTHON)
    built = engines_folder() / "llama-cpp" / "bin" / "python"
    path = shutil.which(Path(named).expanduser()) if named else shutil.which(built)
    if named and path is None:
        raise ConfigError(
            f"{named!r} is not a program that can be run",
            where="--llama-python" if options.llama_python else LLAMA_PYTHON,
            remedy="name bin/python of an environment with llama-cpp-python, or leave the option out; "
            f"`{build_command('llama-cpp')}` builds one",
        )
    return replace(options, llama_python=None if path is None else str(Path(path).absolute()))
