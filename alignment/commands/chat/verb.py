"""``align chat``: its arguments, and what they call."""

from __future__ import annotations

import argparse

from rich.console import Console

from alignment.commands.shared.arguments import add_output, add_policies, runs_of
from alignment.core.errors import ConfigError

_GENERATION = ("system", "max_new_tokens", "temperature", "seed")
"""Options about how answers are made."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A run, its arms, and how they answer."""
    parser.description = (
        "Chats with a policy of a run, line by line, from a terminal or a pipe. /reset starts a new conversation; "
        "/exit or Ctrl-D ends the program."
    )
    add_policies(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="the text of the system message")
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="most tokens in an answer (default: 256)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 always takes the most likely token (default: 0)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed for a temperature above 0 (default: 0)"
    )
    parser.add_argument(
        "--engine",
        choices=("own", "vllm"),
        default="own",
        help="what generates the answers: this program (default) or vLLM",
    )
    parser.add_argument(
        "--engine-python",
        metavar="PATH",
        help="Python of the environment that has vLLM (default: ALIGNMENT_ENGINE_PYTHON, or "
        "~/.cache/alignment/engines/vllm)",
    )
    add_output(parser)


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Talks until the user ends it; returns the exit code.

    Raises:
        ConfigError: an option has no effect, or the arms cannot talk.
    """
    from alignment.commands.chat.driver import chat

    if arguments.engine != "vllm" and arguments.engine_python is not None:
        raise ConfigError(
            "only vLLM has this option", where="--engine-python", remedy="leave it out, or use --engine vllm"
        )
    output, (result,) = runs_of(arguments, arguments.result)
    return chat(
        console,
        result,
        arguments.arms,
        options={name: getattr(arguments, name) for name in _GENERATION},
        engine=None if arguments.engine == "own" else {"engine": "vllm", "python": arguments.engine_python},
        output=output,
    )
