"""``align push``: its arguments, and what they call."""

from __future__ import annotations

import argparse

from rich.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """An exported folder, and the repository that gets it."""
    parser.add_argument("folder", metavar="FOLDER", help="a folder that align export wrote")
    parser.add_argument("--to", required=True, metavar="OWNER/NAME", help="a model repository of a Hugging Face hub")
    parser.add_argument("--public", action="store_true", help="make the repository public (default: private)")
    parser.add_argument(
        "--replace", action="store_true", help="if the repository has files, replace them all in one commit"
    )


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Uploads the folder; returns the exit code."""
    from alignment.commands.push.driver import push

    push(console, arguments.folder, to=arguments.to, public=arguments.public, replace=arguments.replace)
    return 0
