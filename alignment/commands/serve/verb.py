"""``align serve``: its arguments, and what they call."""

from __future__ import annotations

import argparse

from rich.console import Console

from alignment.commands.shared.arguments import add_output, add_policies, runs_of

ENGINES = ("transformers", "vllm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A run, its arms, and what serves them."""
    parser.description = (
        "Serves policies of a run on this machine (127.0.0.1) with an OpenAI-compatible API, each under its own "
        "model name, until Ctrl-C."
    )
    add_policies(parser)
    parser.add_argument(
        "--engine", choices=ENGINES, default=ENGINES[0], help="the engine that serves (default: transformers)"
    )
    parser.add_argument(
        "--port", type=int, default=8000, metavar="N", help="port; 0 takes any free port (default: 8000)"
    )
    parser.add_argument(
        "--engine-python",
        metavar="PATH",
        help="Python of the environment that has vLLM (default: ALIGNMENT_ENGINE_PYTHON, or "
        "~/.cache/alignment/engines/vllm)",
    )
    parser.add_argument(
        "--api-key-env", metavar="VARIABLE", help="the environment variable with the key that clients must send (vLLM)"
    )
    parser.add_argument(
        "--tool-parser", metavar="NAME", help="vLLM's parser for tool calls in answers (default: hermes)"
    )
    add_output(parser)


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Serves until the user ends it; returns the exit code."""
    from alignment.commands.serve.driver import Options, serve

    options = Options(
        engine=arguments.engine,
        port=arguments.port,
        engine_python=arguments.engine_python,
        api_key_env=arguments.api_key_env,
        tool_parser=arguments.tool_parser,
    )
    output, (result,) = runs_of(arguments, arguments.result)
    return serve(console, result, arguments.arms, options=options, output=output)
