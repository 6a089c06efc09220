"""Answers to what only the user can decide: from options, or asked on a terminal. Nothing is guessed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from alignment.config.faults import suggestion
from alignment.config.new_recipe import Question
from alignment.core.errors import ConfigError

Ask = Callable[[str], str]
"""Shows a text, and returns the line that the user types."""


def answered(questions: Sequence[Question], given: Mapping[str, str], *, ask: Ask | None) -> dict[str, str]:
    """The answer to each question, and those that were given although nobody asked.

    ``given`` are answers by the names of questions. ``ask`` is None without a terminal.

    Raises:
        ConfigError: an answer is missing and nobody can be asked, or one would change nothing.
    """
    by_name = {question.name: question for question in questions}
    missing = [question for name, question in by_name.items() if name not in given]
    if missing and ask is None:
        lines = "".join(f"\n  --{question.name}: {_described(question)}" for question in missing)
        raise ConfigError(
            f"these files leave a choice open:{lines}", remedy="add the options, or run the command on a terminal"
        )
    return {**given, **{question.name: _asked(question, ask) for question in missing if ask is not None}}


def refuse_unasked(questions: Sequence[Question], given: Mapping[str, str], known: Sequence[Question]) -> None:
    """Accepts answers with choices only to questions that these files raise.

    Raises:
        ConfigError: an answer would change nothing.
    """
    raised = {question.name for question in questions}
    for question in known:
        if question.choices and question.name in given and question.name not in raised:
            raise ConfigError(
                f"{given[question.name]!r} has no effect: the question does not arise for these files",
                where=f"--{question.name}",
                remedy="leave it out",
            )


def _described(question: Question) -> str:
    return "".join([question.text, *(f"\n    {choice}: {meaning}" for choice, meaning in question.choices.items())])


def _asked(question: Question, ask: Ask) -> str:
    """The answer that the user types, once it is one of the choices."""
    lines = [question.text, *(f"  {choice}: {meaning}" for choice, meaning in question.choices.items())]
    text = "\n".join([*lines, f"--{question.name}: "])
    while True:
        try:
            answer = ask(text).strip()
        except EOFError:
            raise ConfigError("no answer", where=f"--{question.name}", remedy="give the option") from None
        if answer in question.choices or (answer and not question.choices):
            return answer
        hint = suggestion(answer, question.choices) if question.choices else "an answer is needed"
        text = f"{hint}\n--{question.name}: "
