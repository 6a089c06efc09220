"""The options of an export, which ``align export`` hands to its worker."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

from alignment.core.errors import ConfigError

GGUF, VLLM = "gguf", "vllm"
FORMS = ("model", "adapter", GGUF, VLLM)
GGUF_TYPES = ("f16", "bf16", "q8_0", "f32")
"""Types of the weights in a GGUF file; the first is the default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """``max_gap`` is a mean KL per token in nats; ``engine_python`` is the interpreter that has vLLM, for that form
    alone. The options below it are those of a GGUF file alone.

    ``llama_python`` is an interpreter with llama-cpp-python, by which the file is read too. ``has_modelfile`` asks for
    Ollama's Modelfile.
    """

    form: str = "model"
    max_gap: float = 0.01
    engine_python: str | None = None
    dtype: str | None = None
    llama_python: str | None = None
    has_modelfile: bool = True

    @property
    def as_arguments(self) -> list[str]:
        """The same options on a command line."""
        arguments = ["--as", self.form, "--max-gap", str(self.max_gap)]
        for name in ("dtype", "engine_python", "llama_python"):
            if (value := getattr(self, name)) is not None:
                arguments += [f"--{name.replace('_', '-')}", value]
        return arguments if self.has_modelfile else [*arguments, "--no-modelfile"]


def add_form_arguments(parser: argparse.ArgumentParser) -> None:
    """The form, and options of forms."""
    parser.add_argument(
        "--as",
        dest="form",
        choices=FORMS,
        default="model",
        help="model: all adapters merged into the weights (default); adapter: the only adapter, for PEFT; gguf: a "
        "file for llama.cpp and Ollama; vllm: merged weights, after a test in vLLM",
    )
    parser.add_argument(
        "--max-gap",
        type=float,
        default=0.01,
        metavar="NATS",
        help="the largest mean KL per token that rounding may cause when adapters are merged, and again when a GGUF "
        "file is written (default: 0.01)",
    )
    parser.add_argument(
        "--engine-python",
        metavar="PATH",
        help="Python of the environment that has vLLM (default: ALIGNMENT_ENGINE_PYTHON, or "
        "~/.cache/alignment/engines/vllm)",
    )
    parser.add_argument("--dtype", choices=GGUF_TYPES, help=f"type of a GGUF file's weights (default: {GGUF_TYPES[0]})")
    parser.add_argument(
        "--llama-python",
        metavar="PATH",
        help="Python of an environment with llama-cpp-python, in which the GGUF file is tested (default: "
        "ALIGNMENT_LLAMA_CPP_PYTHON, or ~/.cache/alignment/engines/llama-cpp if it exists)",
    )
    parser.add_argument(
        "--no-modelfile",
        dest="has_modelfile",
        action="store_false",
        help="write the GGUF file without Ollama's Modelfile",
    )


def options_of(arguments: argparse.Namespace) -> ExportOptions:
    """The options that were given. Raises ConfigError: an option of one form stands beside another."""
    options = ExportOptions(**{field.name: getattr(arguments, field.name) for field in fields(ExportOptions)})
    of_gguf = {
        "--dtype": options.dtype,
        "--llama-python": options.llama_python,
        "--no-modelfile": not options.has_modelfile,
    }
    for form, given in ((GGUF, of_gguf), (VLLM, {"--engine-python": options.engine_python})):
        for name, value in given.items():
            if value and options.form != form:
                remedy = f"leave it out, or add --as {form}"
                raise ConfigError(f"is an option of --as {form}", where=name, remedy=remedy)
    return options
