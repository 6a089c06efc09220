"""``align export``: writes a result to a folder that transformers, PEFT, vLLM or llama.cpp can load."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

from rich.console import Console

from alignment.commands.export.export_options import FORMS, GGUF, GGUF_TYPES, VLLM, ExportOptions
from alignment.commands.shared.arguments import add_output, runs_of, write_folder
from alignment.core.artifacts import POLICY, REWARD_MODEL, read_manifest
from alignment.core.errors import ArtifactError, ConfigError
from alignment.core.files import new_folder
from alignment.engines.engine_environment import build_command, engines_folder
from alignment.pipeline.execute.stored_results import artifact_of, base_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A result, where and in which form to write it, and options of forms."""
    add = parser.add_argument
    add(
        "result",
        metavar="RESULT",
        help="an artifact's folder, RUN/STAGE such as quickstart/dpo, or an adapter that PEFT saved (path:FOLDER, "
        "hub:ORG/NAME)",
    )
    add("--to", required=True, metavar="FOLDER", help="a folder that does not exist yet")
    add(
        "--as",
        dest="form",
        choices=FORMS,
        default="model",
        help="model: all adapters merged into the weights (default); adapter: the only adapter, for PEFT; gguf: a "
        "file for llama.cpp and Ollama; vllm: merged weights, after a test in vLLM",
    )
    add(
        "--max-gap",
        type=float,
        default=0.01,
        metavar="NATS",
        help="the largest mean KL per token that rounding may cause when adapters are merged, and again when a GGUF "
        "file is written (default: 0.01)",
    )
    add(
        "--engine-python",
        metavar="PATH",
        help="Python of the environment that has vLLM (default: ALIGNMENT_ENGINE_PYTHON, or "
        "~/.cache/alignment/engines/vllm)",
    )
    add("--dtype", choices=GGUF_TYPES, help=f"type of a GGUF file's weights (default: {GGUF_TYPES[0]})")
    add(
        "--llama-python",
        metavar="PATH",
        help="Python of an environment with llama-cpp-python, in which the GGUF file is tested (default: "
        "ALIGNMENT_LLAMA_CPP_PYTHON, or ~/.cache/alignment/engines/llama-cpp if it exists)",
    )
    add(
        "--no-modelfile",
        dest="has_modelfile",
        action="store_false",
        help="write the GGUF file without Ollama's Modelfile",
    )
    add_output(parser)


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Writes the folder; returns the exit code. Raises ConfigError: an option of one form stands beside another."""
    output, (result,) = runs_of(arguments, arguments.result)
    options = ExportOptions(**{field.name: getattr(arguments, field.name) for field in fields(ExportOptions)})
    for form, name, value in (
        (GGUF, "--dtype", options.dtype),
        (GGUF, "--llama-python", options.llama_python),
        (GGUF, "--no-modelfile", not options.has_modelfile),
        (VLLM, "--engine-python", options.engine_python),
    ):
        if value and options.form != form:
            remedy = f"leave it out, or add --as {form}"
            raise ConfigError(f"is an option of --as {form}", where=name, remedy=remedy)
    return export(console, result, to=arguments.to, options=options, output=output)


EXPORTED = (POLICY, REWARD_MODEL)
LLAMA_PYTHON = "ALIGNMENT_LLAMA_CPP_PYTHON"
"""The environment variable that names an interpreter with llama-cpp-python."""


def export(console: Console, result: str, *, to: str, options: ExportOptions, output: Path) -> int:
    """Writes the folder ``to``; returns the exit code. ``result`` is an artifact's folder or ``RUN/STAGE`` of a run
    under ``output``. Raises ConfigError, ModelError, StageError."""
    folder = artifact_of(result, output, console)
    manifest = read_manifest(folder)
    if manifest is None:
        raise ArtifactError("no complete artifact here", where=str(folder), remedy="run the stage that makes it")
    if manifest.kind not in EXPORTED:
        message = f"{folder.name} is of kind {manifest.kind}; only a policy or a reward model can be exported"
        raise ConfigError(message, where=result)
    target = new_folder(to)
    request = {
        "artifact": str(folder),
        "base": None if manifest.base["source"] == "self" else str(base_of(manifest, folder, console)),
        "to": str(target),
        "run": None if Path(result).expanduser().is_dir() else result.partition("/")[0],
        "options": asdict(_with_llama_python(options)),
    }
    argv = [sys.executable, "-m", "alignment.commands.export.worker", json.dumps(request)]
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
