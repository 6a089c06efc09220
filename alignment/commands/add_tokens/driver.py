"""``align add-tokens``: a model with more tokens as a folder to start a run from, made in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from alignment.commands.shared.worker_process import write_folder
from alignment.core.files import new_folder
from alignment.pipeline.execute.display import announcer
from alignment.pipeline.sources import model_sources

ADVICE = """to start a run from it, set model.source=path:{}; an adapter trains the new embeddings only with
stages.NAME.adapter.modules_to_save=[embed_tokens] (and lm_head, if it has its own weights)"""
OF_CONTROL = """only a chat template can write these tokens; in the text of rows they are ordinary text (--in-text adds
tokens that rows may contain)"""


def add_tokens(console: Console, source: str, tokens: Sequence[str], *, to: str, in_text: bool = False) -> int:
    """Writes the folder ``to``; returns the exit code. ``source`` is what ``model.source`` takes.

    The tokens are control tokens, or with ``in_text`` tokens that the text of rows may contain.

    Raises:
        ConfigError: ``to`` exists already.
        ModelError: there is no such model.
        StageError: the process was killed.
    """
    target = new_folder(to)
    model = model_sources.resolve(source, where="MODEL")
    if not model.ready:
        model = model_sources.fetch(model, announce=announcer(console))
    argv = [
        sys.executable,
        "-m",
        "alignment.commands.add_tokens.worker",
        str(model.folder),
        "--to",
        str(target),
        *(["--in-text"] if in_text else []),
        "--",
        *tokens,
    ]
    code = write_folder(argv, target, verb="add-tokens")
    if code == 0:
        advice = [ADVICE.format(target), *([] if in_text else [OF_CONTROL])]
        console.print("\n".join([f"written: {target}", *advice]), markup=False, highlight=False, soft_wrap=True)
    return code
