"""A recipe as text: each value with the comment that says why it is this one."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from alignment.config.faults import suggestion
from alignment.config.new_recipe import Question, Reasoned
from alignment.core.errors import ConfigError
from alignment.core.terminal import visible

Ask = Callable[[str], str]
"""Shows a text, and returns the line that the user types."""


def answered(questions: Sequence[Question], given: Mapping[str, str], *, ask: Ask | None) -> dict[str, str]:
    """The answer to each question, and those that were ``given``, by the names of questions, although nobody asked.
    ``ask`` is None without a terminal. Raises ConfigError: an answer is missing and nobody can be asked."""
    missing = [question for question in questions if question.name not in given]
    if missing and ask is None:
        lines = "".join(f"\n  --{question.name}: {_described(question, indent=4)}" for question in missing)
        remedy = "add the options, or run the command on a terminal"
        raise ConfigError(f"these files leave a choice open:{lines}", remedy=remedy)
    return {**given, **{question.name: _asked(question, ask) for question in missing if ask is not None}}


def refuse_unasked(questions: Sequence[Question], given: Mapping[str, str], known: Sequence[Question]) -> None:
    """Accepts answers with choices only to questions that these files raise. Raises ConfigError: an answer would change
    nothing."""
    raised = {question.name for question in questions}
    for question in known:
        if question.choices and question.name in given and question.name not in raised:
            message = f"{given[question.name]!r} has no effect: the question does not arise for these files"
            raise ConfigError(message, where=f"--{question.name}", remedy="leave it out")


def _described(question: Question, *, indent: int) -> str:
    choices = (f"{' ' * indent}{choice}: {meaning}" for choice, meaning in question.choices.items())
    return "\n".join([question.text, *choices])


def _asked(question: Question, ask: Ask) -> str:
    """The answer that the user types, once it is one of the choices."""
    text = f"{_described(question, indent=2)}\n--{question.name}: "
    while True:
        try:
            answer = ask(text).strip()
        except EOFError:
            raise ConfigError("no answer", where=f"--{question.name}", remedy="give the option") from None
        if answer in question.choices or (answer and not question.choices):
            return answer
        hint = suggestion(answer, question.choices) if question.choices else "an answer is needed"
        text = f"{hint}\n--{question.name}: "


_WIDTH = 120
_INDENT = 2
_SMALL = 1e-2
"""Smaller numbers are written with an exponent."""


def group_lines(settings: Mapping[str, Any], *, depth: int) -> Iterator[str]:
    """Lines of a group of settings; each is plain, a group of further ones, or ``Reasoned``, whose reason stands behind
    the line, or above it if the two together are too long."""
    pad = " " * _INDENT * depth
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield f"{pad}{flow(key)}:"
            yield from group_lines(value, depth=depth + 1)
        elif isinstance(value, Reasoned):
            line, comment = f"{pad}{flow(key)}: {flow(value.value)}", comment_lines(value.why, pad=pad)
            behind = f"{line}  {comment[0].strip()}" if len(comment) == 1 else " " * _WIDTH * 2
            yield from [behind] if len(behind) <= _WIDTH else [*comment, line]
        else:
            yield f"{pad}{flow(key)}: {flow(value)}"


def comment_lines(text: str, *, pad: str = "") -> list[str]:
    """A comment, wrapped; nothing in the text can end it."""
    one_line = " ".join(visible(text).split())
    return [f"{pad}# {line}" for line in textwrap.wrap(one_line, _WIDTH - len(pad) - 2, break_on_hyphens=False)]


def flow(value: Any) -> str:
    """A value on one line."""
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=float("inf"), sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("...").removesuffix("\n")


class _Dumper(yaml.SafeDumper):
    """Writes rates as people do, 2e-4."""


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    if not 0 < abs(value) < _SMALL:
        return dumper.represent_float(value)
    digits, _, exponent = f"{value:.6e}".partition("e")
    mantissa = digits.rstrip("0").rstrip(".")
    # YAML 1.1 has no number of this form; OmegaConf, which reads recipes, does.
    return dumper.represent_scalar("tag:yaml.org,2002:str", f"{mantissa}e{int(exponent)}")


_Dumper.add_representer(float, _float)
