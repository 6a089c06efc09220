"""``align chat``: talks to a stage's policy, or to two side by side."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from alignment.commands.shared.arguments import add_output, add_policies, run_worker, runs_of
from alignment.commands.shared.policy_finder import PolicyFinder
from alignment.core.errors import ConfigError
from alignment.core.files import write_text

_GENERATION = ("system", "max_new_tokens", "temperature", "seed")
"""Options about how answers are made."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A run, its arms, and how they answer."""
    parser.description = (
        "Chats with a policy of a run, line by line, from a terminal or a pipe. /reset starts a new conversation; "
        "/exit or Ctrl-D ends the program."
    )
    add_policies(parser)
    add = parser.add_argument
    add("--system", default="", metavar="TEXT", help="the text of the system message")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="most tokens in an answer (default: 256)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 always takes the most likely token (default: 0)")
    add("--seed", type=int, default=0, metavar="N", help="random seed for a temperature above 0 (default: 0)")
    add(
        "--engine",
        choices=("own", "vllm"),
        default="own",
        help="what generates the answers: this program (default) or vLLM",
    )
    add(
        "--engine-python",
        metavar="PATH",
        help="Python of the environment that has vLLM (default: ALIGNMENT_ENGINE_PYTHON, or "
        "~/.cache/alignment/engines/vllm)",
    )
    add_output(parser)


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Talks until the user ends it; returns the exit code. Raises ConfigError."""
    if arguments.engine != "vllm" and arguments.engine_python is not None:
        remedy = "leave it out, or use --engine vllm"
        raise ConfigError("only vLLM has this option", where="--engine-python", remedy=remedy)
    output, (result,) = runs_of(arguments, arguments.result)
    return chat(
        console,
        result,
        arguments.arms,
        options={name: getattr(arguments, name) for name in _GENERATION},
        engine=None if arguments.engine == "own" else {"engine": "vllm", "python": arguments.engine_python},
        output=output,
    )


MOST_ARMS = 2


def chat(
    console: Console,
    result: str,
    arms: Sequence[str],
    *,
    options: Mapping[str, Any],
    engine: Mapping[str, Any] | None,
    output: Path,
) -> int:
    """Runs a chat until the user ends it; returns the exit code. ``result`` is a run under ``output``, or a result that
    ``align export`` takes. ``arms`` are stages of that run, ``base``, or such results; by default it is the run's last
    finished policy. ``options`` are the fields of ``GenerationOptions``. ``engine`` are settings of ``SamplingConfig``;
    None if the policies answer themselves. Raises ConfigError, ModelError, StageError."""
    _refuse_options(options)
    if len(arms) > MOST_ARMS:
        remedy = "name one or two"
        raise ConfigError(f"{len(arms)} arms; at most two can be shown side by side", where="--arm", remedy=remedy)
    policies = PolicyFinder(console, result, output).policies(arms)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "chat.json"
        write_text(
            file, json.dumps({"sessions": list(map(asdict, policies)), "options": dict(options), "engine": engine})
        )
        argv = [sys.executable, "-m", "alignment.commands.chat.worker", str(file)]
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C stops an answer, which the worker handles
        try:
            return run_worker(argv, verb="chat")
        finally:
            signal.signal(signal.SIGINT, before)


def _refuse_options(options: Mapping[str, Any]) -> None:
    length, temperature = options["max_new_tokens"], options["temperature"]
    if length < 1:
        raise ConfigError(f"{length} is not a valid length", where="--max-new-tokens", remedy="give 1 or more")
    if not 0 <= temperature < float("inf"):
        message = f"{temperature} is not a valid temperature"
        raise ConfigError(message, where="--temperature", remedy="give 0 (greedy) or more")
