"""``align chat``: its arguments, and what they call."""

from __future__ import annotations

import argparse

from rich.console import Console

from alignment.commands.shared.arguments import add_output, add_policies, output_of

_GENERATION = ("system", "max_new_tokens", "temperature", "seed")
"""Options about how answers are made."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A run, its arms, and how they answer."""
    parser.description = (
        "Talks to a policy of a run, line by line, from a terminal or a pipe: /reset begins anew, /exit or Ctrl-D ends."
    )
    add_policies(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="what the system message says")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0, the likeliest token each time (default), or more",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of answers above temperature 0 (default: 0)")
    parser.add_argument(
        "--engine", choices=("own", "vllm"), default="own", help="what answers: this program (default), or vLLM"
    )
    parser.add_argument(
        "--engine-python",
        metavar="PATH",
        help="the interpreter that has vLLM (default: ALIGNMENT_ENGINE_PYTHON, or ~/.cache/alignment/engines/vllm)",
    )
    add_output(parser)


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Talks until the user ends it; returns the exit code."""
    from alignment.commands.chat.driver import chat

    return chat(
        console,
        arguments.result,
        arguments.arms,
        options={name: getattr(arguments, name) for name in _GENERATION},
        engine=None if arguments.engine == "own" else {"engine": "vllm", "python": arguments.engine_python},
        output=output_of(arguments),
    )
