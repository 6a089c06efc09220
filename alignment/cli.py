"""The ``align`` command: a table of verbs, and what all of them have in common.

A verb is a file of ``alignment/commands/``, or a folder with a ``verb.py``. It has two functions, ``add_arguments`` and
``handle``, and is imported only when it is called, so that ``align --help`` stays instant.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, Protocol, cast

from rich.console import Console

from alignment import __version__
from alignment.config.faults import suggestion
from alignment.core.errors import PREEMPTED, AlignmentError, ConfigError
from alignment.core.files import current_folder, explained
from alignment.core.terminal import Terminal, complain, make_unfailing
from alignment.pipeline.execute.signals import INTERRUPTED, Terminated, exit_with, termination_raises

VERB_GROUPS = {
    "train": {
        "run": "plan a recipe and run the stages that are not done yet",
        "plan": "show what would run, and why; start nothing",
        "sweep": "run a recipe with many combinations of settings",
        "recipes": "list the shipped recipes",
        "stages": "list the kinds of stage",
    },
    "data": {
        "new": "look at data files and write a recipe for them",
        "doctor": "show what a data file contains and what is wrong with it",
        "preview": "show the rows that each stage would train on; train nothing",
    },
    "results": {
        "status": "show the state of runs, or follow one",
        "watch": "serve the report of a run while it is running",
        "compare": "show what differs between runs",
        "judge": "let people say which of two arms answers better",
        "track": "send a recorded run to a tracker",
    },
    "use a model": {
        "chat": "talk to a stage's policy, or to two side by side",
        "serve": "serve policies behind an OpenAI-compatible endpoint",
        "export": "write a result to a folder that transformers or PEFT can load",
        "push": "upload an exported folder to a Hugging Face hub",
    },
    "tools": {
        "add-tokens": "write a copy of a model with more special tokens",
        "schema": "print the JSON Schema of recipes or sweeps, for editors",
    },
}
"""The verbs by what people do, each with what it does, in the order of ``align --help``."""

VERBS = {name: summary for verbs in VERB_GROUPS.values() for name, summary in verbs.items()}
"""Each verb and what it does."""

_ELSEWHERE = {
    "run RECIPE": ("train", "finetune", "fine-tune", "fit", "resume", "launch"),
    "run RECIPE, with a stage of kind evaluate": ("eval", "bench", "score"),
    "export RUN/STAGE --to FOLDER": ("merge", "merge-lora", "merge_lora", "merge-sharded-fsdp-weights"),
    "chat RUN": ("infer", "inference", "generate", "webchat", "vllm-infer"),
    "serve RUN": ("api", "vllm-serve", "deploy"),
    "new FILE": ("init", "config", "quickstart"),
    "doctor FILE": ("validate", "inspect", "check", "lint"),
    "preview RECIPE": ("preprocess", "tokenize"),
    "recipes": ("list", "ls"),
}
"""What to type here, for verbs that other tools have or that people guess."""

_RIVAL = "alignment-handbook"
_EXAMPLES = """\
examples: align run quickstart, align new pairs.jsonl, align run ./mine.yaml adapter=qlora
exit codes: 0 success, 1 a bug, 2 configuration, 3 data, 4 model, 5 stage, 6 not finite (NaN or infinity),
7 artifact, 8 busy, 9 a failed scorer, 10 a gate not met, 11 store or hub, 12 full disk, 75 preempted,
130 interrupted
"""
_GC_THRESHOLD = 50_000
"""New objects between two searches for garbage (Python: 700). Imports and plans make many objects and no garbage; with
Python's own setting, the searches take a fourteenth of ``align plan``."""


class Verb(Protocol):
    """What the module of every verb has."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the verb's arguments; sets the parser's description where its line in ``VERBS`` is not enough."""

    def handle(self, console: Console, arguments: argparse.Namespace) -> int:
        """Does what the verb says; returns the exit code (alignment/core/errors.py)."""


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code (alignment/core/errors.py).

    A signal that would end this process at once raises an exception instead, so that every verb ends the processes that
    it started and removes its temporary files."""
    arguments = parse(sys.argv[1:] if words is None else words)
    console = Terminal(soft_wrap=False)
    try:
        _refuse_other_package()
        with termination_raises(), explained(current_folder()):
            return int(arguments.handle(console, arguments))
    except AlignmentError as error:
        complain(error)
        return error.exit_code
    except KeyboardInterrupt:
        Terminal(stderr=True).print("interrupted")
        return INTERRUPTED
    except Terminated:
        Terminal(stderr=True).print("stopped by a signal")
        return PREEMPTED


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command, with ``verb``, its ``handle``, and its ``refuse``, which ends the process with a
    message; help and faults end it, too, as in argparse.

    Options may come between a recipe and its overrides; argparse alone would reject the overrides after them."""
    parser = _parser(words)
    arguments, rest = parser.parse_known_args(words)
    if rest and (not hasattr(arguments, "overrides") or any(word.startswith("-") for word in rest)):
        arguments.refuse(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """A parser that has the summaries of all verbs, but only the arguments of the one that is called."""
    parser = _parser_class(words)(
        prog="align",
        usage="align [-h] [-V] VERB ...",
        description="Align a language model: SFT, reward model, DPO and PPO as one planned run.",
        epilog=f"{_verb_list()}\n\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-V", "--version", action="version", version=f"align {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", prog="align", help=argparse.SUPPRESS)
    asked = next((word for word in words if not word.startswith("-")), None)
    if asked is not None and asked not in VERBS:
        parser.error(f"no verb '{asked}'; {_hint(asked)}")
    for name, summary in VERBS.items():
        subparser = verbs.add_parser(name, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == asked:
            verb = load(name)
            verb.add_arguments(subparser)
            subparser.set_defaults(handle=verb.handle, refuse=subparser.error)
    return parser


def _verb_list() -> str:
    """The verbs by group, as ``align --help`` prints them. argparse itself cannot group subcommands."""
    width = max(map(len, VERBS)) + 2
    groups = (
        "\n".join([f"{title}:", *(f"  {name:<{width}}{summary}" for name, summary in verbs.items())])
        for title, verbs in VERB_GROUPS.items()
    )
    return "\n\n".join(groups)


def _hint(asked: str) -> str:
    """What to type instead of a verb that is not there."""
    from alignment.stages.registry import kinds  # here, so that `align --help` stays instant

    if asked in kinds():
        return f"it is a kind of stage; use: align run RECIPE --stage {asked}"
    here = next((command for command, names in _ELSEWHERE.items() if asked in names), None)
    return f"use: align {here}" if here is not None else suggestion(asked, VERBS)


def _parser_class(words: Sequence[str]) -> type[argparse.ArgumentParser]:
    """A parser whose errors say how to write the name of a file that looks like an option."""
    like_option = next((word for word in words if word.startswith("-") and Path(word).exists()), None)

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            super().error(message if like_option is None else f"{message}; to name the file, write ./{like_option}")

    return Parser


def load(name: str) -> Verb:
    """The module of a verb of ``VERBS``."""
    module = importlib.import_module(f"alignment.commands.{name.replace('-', '_')}")
    if not hasattr(module, "handle"):  # a folder
        module = importlib.import_module(f"{module.__name__}.verb")
    return cast(Verb, module)


def _refuse_other_package() -> None:
    """Another distribution has an import package of the same name; the two overwrite each other's files."""
    try:
        version = importlib.metadata.version(_RIVAL)
    except importlib.metadata.PackageNotFoundError:
        return
    message = f"{_RIVAL} {version} is installed in this environment, and it also has a package named 'alignment'"
    remedy = "install alignment-pipeline in an environment of its own"
    raise ConfigError(message, where=sys.prefix, remedy=remedy)


def console_script() -> None:
    """Entry point of the installed command. What it does never depends on whether anybody reads its output."""
    gc.set_threshold(_GC_THRESHOLD)
    make_unfailing()
    exit_with(main)


if __name__ == "__main__":
    console_script()
