"""The page of the command line: every verb with its arguments, as the verbs declare them."""

from __future__ import annotations

import argparse

from alignment.cli import VERBS, load
from book.markdown import table

_LONGEST_CHOICES = 40


def parser_of(verb: str) -> argparse.ArgumentParser:
    """The parser of a verb, without ``--help``."""
    summary = VERBS[verb]
    description = f"{summary[0].upper()}{summary[1:]}."
    parser = argparse.ArgumentParser(prog=f"align {verb}", description=description, add_help=False)
    load(verb).add_arguments(parser)
    return parser


def page() -> str:
    """The page."""
    rows = ((f"[`align {verb}`](#align-{verb})", summary) for verb, summary in VERBS.items())
    return "\n\n".join(
        (
            "# Command line",
            "`align --help` lists the verbs, `align VERB --help` the arguments of one verb, and `align --version` "
            "the version.",
            "`KEY=VALUE` may stand anywhere after the recipe. [Configuration](configuration.md) lists the keys. "
            "`align doctor` takes settings of a [data source](configuration/groups.md#data) after the data.",
            "Every command ends with one of the [exit codes](errors.md).",
            table(["command", "what it does"], rows),
            *(_section(verb) for verb in VERBS),
        )
    )


def _section(verb: str) -> str:
    parser = parser_of(verb)
    actions = parser._actions  # argparse has no public list of them; tools that document a parser read this one
    usage = " ".join([f"align {verb}", *(_usage(action) for action in actions)])
    parts = [f"## align {verb}", f"```text\nusage: {usage}\n```", parser.description or ""]
    if actions:
        parts.append(table(["argument", "meaning"], ((_name(action), _meaning(action)) for action in actions)))
    return "\n\n".join(parts)


def _metavar(action: argparse.Action) -> str:
    """What stands for the value: the choices themselves if they are few."""
    if action.nargs == 0:
        return ""
    choices = "|".join(map(str, action.choices or ()))
    return str(action.metavar or (choices if len(choices) <= _LONGEST_CHOICES else "") or action.dest.upper())


def _usage(action: argparse.Action) -> str:
    words = _name_words(action)
    if not action.option_strings and action.nargs in ("*", "+"):
        words = f"{words} …"
    optional = not action.required or action.nargs in ("*", "?")
    return f"[{words}]" if optional else words


def _name_words(action: argparse.Action) -> str:
    option = action.option_strings[-1] if action.option_strings else ""
    return f"{option} {_metavar(action)}".strip()


def _name(action: argparse.Action) -> str:
    return f"`{_name_words(action)}`"


def _meaning(action: argparse.Action) -> str:
    words = str(action.help or "").replace("<", "&lt;")
    facts = []
    if action.choices is not None and "|" not in _metavar(action):
        facts.append(f"one of {', '.join(map(str, action.choices))}")
    if isinstance(action, argparse._AppendAction):
        facts.append("may be repeated")
    if action.required and action.option_strings:
        facts.append("required")
    has_default = action.option_strings and action.nargs != 0 and action.default not in (None, [], "")
    if has_default and "default" not in words:
        facts.append(f"default: {action.default}")
    return "; ".join([words, *facts])
