"""``align add-tokens``: writes a copy of a model with more special tokens."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from alignment.commands.shared.arguments import write_folder
from alignment.core.files import new_folder
from alignment.pipeline.execute.display import announcer
from alignment.pipeline.sources import model_sources


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A model, and its new tokens."""
    parser.description = (
        "Writes a copy of a model with additional tokens, from which a run can start. Their embeddings are the mean of "
        "all others. They are control tokens, which only a chat template can write: in the text of a row they are "
        "ordinary text, as are all control tokens. With --in-text they are tokens in the text of rows and answers too."
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a model, written as in model.source: bundled:NAME, path:FOLDER or hub:ORG/NAME")
    add("tokens", metavar="TOKEN", nargs="+", help="such as '<|think|>'")
    add("--in-text", action="store_true", help="add tokens that the text of rows contains (default: control tokens)")
    add("--to", required=True, metavar="FOLDER", help="a folder that does not exist yet")


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Writes the model; returns the exit code."""
    return add_tokens(console, arguments.model, arguments.tokens, to=arguments.to, in_text=arguments.in_text)


ADVICE = """to start a run from it, set model.source=path:{}; an adapter trains the new embeddings only with
stages.NAME.adapter.modules_to_save=[embed_tokens] (and lm_head, if it has its own weights)"""
OF_CONTROL = """only a chat template can write these tokens; in the text of rows they are ordinary text (--in-text adds
tokens that rows may contain)"""


def add_tokens(console: Console, source: str, tokens: Sequence[str], *, to: str, in_text: bool = False) -> int:
    """Writes the folder ``to``; returns the exit code. ``source`` is what ``model.source`` takes. The tokens are
    control tokens, or with ``in_text`` tokens that the text of rows may contain. Raises ConfigError, ModelError,
    StageError."""
    target = new_folder(to)
    model = model_sources.resolve(source, where=source)
    if not model.ready:
        model = model_sources.fetch(model, announce=announcer(console))
    argv = [sys.executable, "-m", "alignment.commands.add_tokens.worker", str(model.folder), "--to", str(target)]
    argv += [*(["--in-text"] if in_text else []), "--", *tokens]
    code = write_folder(argv, target, verb="add-tokens")
    if code == 0:
        advice = [ADVICE.format(target), *([] if in_text else [OF_CONTROL])]
        console.print("\n".join([f"written: {target}", *advice]), markup=False, highlight=False, soft_wrap=True)
    return code
