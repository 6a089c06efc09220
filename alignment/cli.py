"""The ``align`` command: thin verbs over the driver."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from alignment import __version__
from alignment.config.stage import STAGES
from alignment.config.store import recipe_names
from alignment.core.errors import AlignmentError, ConfigError
from alignment.core.files import explained
from alignment.core.streams import make_unfailing
from alignment.core.terminal import Terminal, complain
from alignment.data.formats import FORMATS

_RIVAL = "alignment-handbook"
_EXAMPLES = """\
examples:
  align run quickstart                            the whole chain on a small model
  align run ./mine.yaml adapter=qlora             a recipe of your own; another choice from conf/

exit codes: 0 well, 1 a fault of ours, 2 configuration, 3 data, 4 model, 5 stage or full disk, 6 not finite,
7 artifact, 8 busy, 9 a scorer that failed, 10 a policy forgot too much, 75 preempted, 130 interrupted
"""


_COMPARE = "Settings that differ, arms side by side, and differences in gold from the first run, prompt by prompt."
_CHAT = "Talks to a policy of a run, line by line, from a terminal or a pipe: /reset begins anew, /exit or Ctrl-D ends."
_SWEEP = "Runs a recipe with many settings, each judged by its evaluation; called again, it makes what is missing."
_ADD_TOKENS = "Writes a model with more special tokens, whose rows are the mean of all others, to start a run from."
_DOCTOR = "Says what a data file looks like, what each kind of stage can make of it, and what is wrong in which rows."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code (alignment/core/errors.py)."""
    options = _options(arguments)
    console = Terminal(soft_wrap=False)
    try:
        _refuse_other_package()
        with explained(_here()):
            return _dispatch(options, console)
    except AlignmentError as error:
        complain(error)
        return error.exit_code
    except KeyboardInterrupt:
        Terminal(stderr=True).print("interrupted")
        return 130


def _here() -> Path:
    """The current folder.

    Raises:
        ConfigError: it was removed.
    """
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise ConfigError(
            "the folder that the command was called in is gone", remedy="change to one that is there"
        ) from None


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options may stand between a recipe and its overrides, where argparse would take no more of these."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _dispatch(options: argparse.Namespace, console: Console) -> int:
    """Imports a verb's code when it is asked for, so that ``--help`` and listings stay instant."""
    if options.verb in ("run", "plan", "preview") and options.recipe is None:
        known = ", ".join(recipe_names())
        raise ConfigError(f"which recipe? shipped: {known}", remedy=f"such as: align {options.verb} quickstart")
    if options.verb == "recipes":
        _show_recipes(console)
    elif options.verb == "stages":
        for kind, stage in STAGES.items():
            console.print(f"{kind:<12} {stage.summary}", highlight=False)
    elif options.verb == "status":
        from alignment.commands.status.driver import show_status

        show_status(console, Path(options.output).expanduser().absolute(), options.run)
    elif options.verb == "doctor":
        from alignment.commands.doctor.driver import show_diagnosis
        from alignment.config.data import SourceConfig

        told = {name: getattr(options, name) for name in ("format", "split", "subset") if getattr(options, name)}
        return show_diagnosis(console, SourceConfig(source=options.data, **told), against=options.against)
    elif options.verb == "preview":
        from alignment.commands.preview.driver import show_preview

        return show_preview(
            console, options.recipe, options.overrides, stage=options.stage, rows=options.rows, html=options.html
        )
    elif options.verb == "export":
        from alignment.commands.export.driver import export

        return export(
            console,
            options.result,
            to=options.to,
            form=options.form,
            max_gap=options.max_gap,
            output=Path(options.output).expanduser().absolute(),
        )
    elif options.verb == "add-tokens":
        from alignment.commands.add_tokens.driver import add_tokens

        return add_tokens(console, options.model, options.tokens, to=options.to)
    elif options.verb == "compare":
        from alignment.commands.compare.driver import compare

        compare(console, Path(options.output).expanduser().absolute(), options.runs, html=options.html)
    elif options.verb == "chat":
        from alignment.commands.chat.driver import chat

        return chat(
            console,
            options.result,
            options.arms,
            manner={name: getattr(options, name) for name in ("system", "max_new_tokens", "temperature", "seed")},
            output=Path(options.output).expanduser().absolute(),
        )
    elif options.verb == "sweep":
        from alignment.pipeline.sweeps.run import sweep

        return sweep(options.recipe, options.sweep, options.overrides, console=console, at_once=options.at_once)
    elif options.verb == "plan":
        _show_plan(console, options.recipe, options.overrides)
    else:
        from alignment.pipeline.execute.run import run

        return run(options.recipe, options.overrides, console=console, only=options.stage, wait=options.wait)
    return 0


def _show_plan(console: Console, recipe: str, overrides: Sequence[str]) -> None:
    from alignment.pipeline.backends.feasibility import refuse_sizes, why_not_here
    from alignment.pipeline.execute.summary import show_plan
    from alignment.pipeline.plan.plan import make_plan

    plan = make_plan(recipe, overrides)
    show_plan(console, plan)
    refuse_sizes(plan)
    if why := why_not_here(plan):
        console.print(f"this machine cannot start it: {why}", markup=False, highlight=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="align",
        description="Align a language model: SFT, reward model, DPO and PPO as one planned run.",
        epilog=_EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=16),
    )
    parser.add_argument("--version", action="version", version=f"align {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_recipes(verbs)
    _add_sweep(verbs)
    _add_runs(verbs)
    _add_doctor(verbs)
    _add_export(verbs)
    _add_chat(verbs)
    more = verbs.add_parser("add-tokens", help="write a model with more special tokens", description=_ADD_TOKENS)
    more.add_argument("model", metavar="MODEL", help="what model.source takes: bundled:NAME, path:FOLDER, hub:ORG/NAME")
    more.add_argument("tokens", metavar="TOKEN", nargs="+", help="such as '<|think|>'")
    more.add_argument("--to", required=True, metavar="FOLDER", help="a folder that does not exist yet")
    verbs.add_parser("recipes", help="list the shipped recipes", description="List the shipped recipes.")
    verbs.add_parser("stages", help="list the kinds of stage", description="List the kinds of stage.")
    return parser


def _add_recipes(verbs: Any) -> None:
    for verb, summary in (
        ("run", "plan a recipe and run what has to run"),
        ("plan", "say what would run, and why; start nothing"),
        ("preview", "show rows as each stage would learn from them; train nothing"),
    ):
        one = verbs.add_parser(verb, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        one.add_argument(
            "recipe", metavar="RECIPE", nargs="?", help=f"{', '.join(recipe_names())}, or the path of your own .yaml"
        )
        one.add_argument(
            "overrides", metavar="KEY=VALUE", nargs="*", help="such as stages.dpo.beta=0.3 or output=FOLDER"
        )
        if verb == "run":
            one.add_argument("--stage", help="only this stage, from results of earlier ones")
            one.add_argument("--wait", action="store_true", help="wait for a result that another process works on")
        if verb == "preview":
            one.add_argument("--stage", help="only this stage")
            one.add_argument("--rows", type=int, default=2, help="rows of each stage (default: 2)")
            one.add_argument("--html", metavar="FILE", help="write the same as a page")


def _add_sweep(verbs: Any) -> None:
    sweep = verbs.add_parser("sweep", help="run a recipe with many settings", description=_SWEEP)
    sweep.add_argument("recipe", metavar="RECIPE", help="a recipe's name, or the path of your own .yaml")
    sweep.add_argument("sweep", metavar="SWEEP", help="a file's name in conf/sweep, or the path of your own .yaml")
    sweep.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="for every trial")
    sweep.add_argument(
        "--at-once",
        type=int,
        default=1,
        metavar="N",
        help="trials at the same time, each with its share of the machine",
    )


def _add_runs(verbs: Any) -> None:
    status = verbs.add_parser("status", help="how runs stand", description="How runs stand.")
    status.add_argument("run", metavar="RUN", nargs="?", help="a run's name; without it, all runs are listed")
    status.add_argument(
        "--output", default=".", metavar="FOLDER", help="the folder that holds runs/ (default: this one)"
    )
    runs = verbs.add_parser("compare", help="what differs between runs", description=_COMPARE)
    runs.add_argument("runs", metavar="RUN", nargs="+", help="names of runs; the others are compared with the first")
    runs.add_argument("--html", metavar="FILE", help="write a page with curves laid over each other and answers, too")
    runs.add_argument("--output", default=".", metavar="FOLDER", help="the folder that holds runs/ (default: this one)")


def _add_doctor(verbs: Any) -> None:
    doctor = verbs.add_parser("doctor", help="what a data file is, and what is wrong in it", description=_DOCTOR)
    doctor.add_argument(
        "data", metavar="DATA", help="a data file or a folder of them, bundled:NAME, or hub:ORG/NAME@REVISION"
    )
    doctor.add_argument("--format", choices=sorted(FORMATS), help="read it as this; else the columns tell")
    doctor.add_argument("--split", help="of a hub's data set (default: train)")
    doctor.add_argument("--subset", help="of a hub's data set, where it has several")
    doctor.add_argument(
        "--against", metavar="DATA", help="say which rows ask what this file asks: of an evaluation, say"
    )


def _add_export(verbs: Any) -> None:
    summary = "write a result as a folder that transformers or PEFT reads"
    one = verbs.add_parser("export", help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    one.add_argument("result", metavar="RESULT", help="an artifact's folder, or RUN/STAGE such as quickstart/dpo")
    one.add_argument("--to", required=True, metavar="FOLDER", help="a folder that does not exist yet")
    one.add_argument(
        "--as",
        dest="form",
        choices=("model", "adapter"),
        default="model",
        help="adapters merged into whole weights (default), or the one adapter on its base",
    )
    one.add_argument(
        "--max-gap",
        type=float,
        default=0.01,
        metavar="NATS",
        help="mean KL a token that merging may cause by rounding (default: 0.01)",
    )
    one.add_argument("--output", default=".", metavar="FOLDER", help="the folder that holds runs/ (default: this one)")


def _add_chat(verbs: Any) -> None:
    one = verbs.add_parser("chat", help="talk to a stage's policy, or to two side by side", description=_CHAT)
    one.add_argument("result", metavar="RUN", help="a run's name, RUN/STAGE, or an artifact's folder")
    one.add_argument(
        "--arm",
        dest="arms",
        action="append",
        default=[],
        metavar="ARM",
        help="a stage of the run, base, or RUN/STAGE of another; give it twice for two (default: the last policy)",
    )
    one.add_argument("--system", default="", metavar="TEXT", help="what the system message says")
    one.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    one.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0, the likeliest token each time (default), or more",
    )
    one.add_argument("--seed", type=int, default=0, metavar="N", help="of answers above temperature 0 (default: 0)")
    one.add_argument("--output", default=".", metavar="FOLDER", help="the folder that holds runs/ (default: this one)")


def _show_recipes(console: Console) -> None:
    from alignment.config import yaml_file
    from alignment.config.store import recipes_folder

    for name in recipe_names():
        content = yaml_file.read(recipes_folder() / f"{name}.yaml")
        console.print(f"{name:<20} {escape(content['summary'])}", highlight=False, soft_wrap=True)


def _refuse_other_package() -> None:
    """Another distribution brings an import package of the same name; the two overwrite each other's files.

    Raises:
        ConfigError: it is installed beside this one.
    """
    try:
        version = importlib.metadata.version(_RIVAL)
    except importlib.metadata.PackageNotFoundError:
        return
    raise ConfigError(
        f"{_RIVAL} {version} is installed in this environment and brings a package 'alignment' too",
        where=sys.prefix,
        remedy="use an environment of its own for alignment-pipeline",
    )


def console_script() -> None:
    """Entry point of the installed command. What it does never depends on whether anybody reads what it prints."""
    make_unfailing()
    sys.exit(main())


if __name__ == "__main__":
    console_script()
