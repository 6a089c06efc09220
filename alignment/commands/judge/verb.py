"""``align judge``: its arguments, and what they call."""

from __future__ import annotations

import argparse

from rich.console import Console

from alignment.commands.shared.arguments import add_output, runs_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A run, two of its arms, and who judges."""
    parser.description = (
        "Serves a page on this machine where people compare the answers of two arms without knowing which arm gave "
        "which. Every vote is stored at once. Ctrl-C ends the page, and the same command continues."
    )
    parser.add_argument("run", metavar="RUN", help="the name or the recipe's path of a run with a finished evaluation")
    parser.add_argument(
        "--arm",
        dest="arms",
        action="append",
        default=[],
        metavar="ARM",
        help="an arm of the evaluation, such as sft; give the option twice (default: the evaluation's arms, if it "
        "has just two)",
    )
    parser.add_argument("--stage", metavar="NAME", help="the evaluation, if the run has several")
    parser.add_argument(
        "--annotator", metavar="NAME", help="the name of the person who judges (default: the page asks)"
    )
    parser.add_argument(
        "--votes", metavar="FILE", help="where votes are stored (default: runs/RUN/STAGE/votes.jsonl in this folder)"
    )
    parser.add_argument("--port", type=int, default=0, metavar="N", help="port on 127.0.0.1 (default: any free port)")
    parser.add_argument("--open", dest="opens_browser", action="store_true", help="open the page in a browser")
    add_output(parser)


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Serves the page until the user ends it; returns the exit code."""
    from alignment.commands.judge.driver import Options, judge

    options = Options(
        stage=arguments.stage,
        annotator=arguments.annotator,
        votes=arguments.votes,
        port=arguments.port,
        opens_browser=arguments.opens_browser,
    )
    output, (run,) = runs_of(arguments, arguments.run)
    return judge(console, run, arguments.arms, options=options, output=output)
