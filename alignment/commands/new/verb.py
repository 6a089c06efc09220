"""``align new``: looks at data files and writes a recipe for them."""

from __future__ import annotations

import argparse
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from alignment.commands.new import base_model, data_files
from alignment.commands.new.base_model import BaseModel, dtype_for
from alignment.commands.new.data_files import DataFile, NewFiles, joined, look_at
from alignment.config.faults import refuse, suggestion
from alignment.config.new_recipe import (
    FIRST,
    FROM_PAIRS,
    SCORER,
    Circumstances,
    Lengths,
    NewStage,
    Question,
    Reasoned,
    Rows,
)
from alignment.config.rules import NAME, is_name
from alignment.config.run import conf_folder
from alignment.config.typed import source_from_plain
from alignment.core.errors import ConfigError, DataError
from alignment.core.terminal import visible
from alignment.data.records import Conversation, LabelledAnswer, PlainText, PreferencePair, Prompt, Record
from alignment.pipeline.execute.shown_plan import show_plan
from alignment.pipeline.plan.compose import tree_of
from alignment.pipeline.plan.plan import make_plan
from alignment.pipeline.plan.settings import column_faults
from alignment.stages.registry import kind_named

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
    """Accepts answers with choices only to questions that these files raise. Raises ConfigError."""
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


_DEFAULT_OUT = "recipe.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Data files, a model, and answers to what it would ask."""
    parser.description = (
        "Looks at data files and writes a commented recipe for them. On a terminal it asks for what it cannot know; "
        "elsewhere, options must answer these questions."
    )
    add = parser.add_argument
    add(
        "files",
        metavar="FILE",
        nargs="+",
        help="a data file or a folder of them, bundled:NAME, or hub:ORG/NAME@REVISION",
    )
    add("--model", metavar="SOURCE", help="the model, written as in model.source (default: the bundled small model)")
    add("--out", default=_DEFAULT_OUT, metavar="FILE", help=f"a file that does not exist yet (default: {_DEFAULT_OUT})")
    add("--heldout", metavar="FILE", help="prompts to evaluate on (default: a part of the data, copied to a file)")
    add(
        "--columns",
        metavar="{NAME: YOURS}",
        help="columns of FILE that have other names, such as '{label: good}', as in a recipe's data.columns",
    )
    for question in (FROM_PAIRS, FIRST):
        help_text = f"the answer to: {question.text}"
        add(f"--{question.name}", choices=list(question.choices), help=help_text)
    add(
        f"--{SCORER.name}",
        metavar="SOURCE",
        help="a scorer of answers: the evaluation's metric, and also PPO's reward if the recipe has PPO",
    )
    add("--device", metavar="GPU", help="the GPU to train on, such as h100 (default: this machine)")


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Writes the recipe; returns the exit code."""
    answers = {question.name: getattr(arguments, question.name.replace("-", "_")) for question in _QUESTIONS}
    options = Options(
        model=arguments.model,
        heldout=arguments.heldout,
        device=arguments.device,
        columns=arguments.columns,
        answers={name: answer for name, answer in answers.items() if answer is not None},
    )
    return new_recipe(console, arguments.files, out=arguments.out, options=options)


_QUESTIONS = (FROM_PAIRS, FIRST, SCORER)

_ORDER: tuple[type[Record], ...] = (PreferencePair, LabelledAnswer, Conversation, Prompt, PlainText)
_SUFFIX = ".yaml"


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """``answers`` are those to questions, by name; None stands for a default, or for what is found out. ``columns``
    maps a format's columns to those of the files, written as in a recipe."""

    model: str | None = None
    heldout: str | None = None
    device: str | None = None
    columns: str | None = None
    answers: Mapping[str, str] = field(default_factory=dict)


def new_recipe(console: Console, files: Sequence[str], *, out: str, options: Options, ask: Ask | None = None) -> int:
    """Writes a recipe for these files to ``out``, shows what it plans, and returns 0. ``ask`` asks the user (default:
    on a terminal). Nothing is left behind if it fails, and no file is overwritten. Raises ConfigError, DataError,
    ModelError, AlignmentError."""

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    path = _new_file(out)
    named = [*files, *([options.heldout] if options.heldout else [])]
    if repeated := next((file for file in named if named.count(file) > 1), None):
        raise ConfigError("is named twice", where=repeated, remedy="name each file once")
    memory = base_model.free_bytes(options.device)
    columns = _columns(options.columns)
    looked = [look_at(console, file, where=file, columns=columns).counted() for file in files]
    given = None if options.heldout is None else look_at(console, options.heldout, where="--heldout").counted()
    if given is not None and not given.prompts:
        remedy = "name a file with prompts, or leave the option out"
        raise DataError("no row has a prompt", where="--heldout", remedy=remedy)
    model = base_model.base_model(options.model, announce=say)
    answers = _answers(console, looked, model, options, ask)
    new = NewFiles(out=path)
    try:
        learned, held_out = _split(looked, given, new, say)
        circumstances = _circumstances(learned, held_out, model, answers, say)
        stages = base_model.proposed_stages(circumstances)
        adapter = base_model.adapter_for(model, memory, dtype_for(options.device))
        summary = f"{', '.join(stages)} on {', '.join(file.name for file in learned)}"
        with new.create(path) as stream:
            stream.writelines(f"{line}\n" for line in _lines(files, stages, model, adapter, options, summary))
        plan = make_plan(_as_argument(path), [])
    except BaseException:
        new.remove()
        raise
    for written in new.written:
        say(f"wrote {written}")
    show_plan(console, plan)
    recipe = shlex.quote(_as_argument(path))
    say(f"next: align preview {recipe}, and align plan {recipe} --cost")
    return 0


def _columns(written: str | None) -> dict[str, str]:
    if written is None:
        return {}
    plain, faults = tree_of([f"columns={written}"], example="--columns '{prompt: my_question}'")
    data, wrong = source_from_plain(plain, where="")
    wrong += column_faults(data, "")
    refuse([*faults, *(replace(fault, where=f"--{fault.where}") for fault in wrong)])
    return data.columns


def _new_file(out: str) -> Path:
    path = Path(out).expanduser()
    if path.suffix != _SUFFIX or not is_name(path.stem):
        allowed = f"NAME{_SUFFIX}, where NAME is {NAME.allowed}"
        raise ConfigError(f"{out!r} cannot name a recipe; allowed: {allowed}", where="--out")
    if path.exists() or not path.absolute().parent.is_dir():
        why = "exists already" if path.exists() else "is in a folder that does not exist"
        raise ConfigError(f"{out!r} {why}", where="--out", remedy="name a new file in a folder that exists")
    return path


def _answers(
    console: Console, files: Sequence[DataFile], model: BaseModel, options: Options, ask: Ask | None
) -> dict[str, str]:
    known = Circumstances(rows=_by_record(files), positions=model.positions, has_template=model.has_template)
    raised = base_model.questions(known)
    refuse_unasked(raised, options.answers, _QUESTIONS)
    if ask is None and sys.stdin is not None and sys.stdin.isatty() and console.is_terminal:
        ask = input
    return answered(raised, options.answers, ask=ask)


def _split(
    files: Sequence[DataFile], given: DataFile | None, new: NewFiles, say: Callable[[str], None]
) -> tuple[Sequence[DataFile], DataFile | None]:
    """The files as stages will read them, and held-out prompts: some of these files', or the given ones."""
    if given is not None:
        return data_files.without(files, given, new), given
    if keys := data_files.held_out_keys(files):
        held_out, learned = data_files.split(files, keys, new)
        say(f"{len(keys)} prompts are held out for an evaluation")
        return learned, held_out
    say(f"no evaluation: it needs {data_files.FEWEST} different prompts, or --heldout FILE")
    return files, None


def _circumstances(
    files: Sequence[DataFile],
    held_out: DataFile | None,
    model: BaseModel,
    answers: Mapping[str, str],
    say: Callable[[str], None],
) -> Circumstances:
    lengths = data_files.measured_lengths(files, model.folder, model.template)
    for file, of_file in zip(files, lengths, strict=True):
        for remark in of_file.remarks:
            say(f"{file.name}: {remark} (docs/data.md says what to do)")
    return Circumstances(
        rows=_by_record(files, lengths),
        answers=answers,
        positions=model.positions,
        has_template=model.has_template,
        held_out=None if held_out is None else joined([held_out]),
    )


def _by_record(files: Sequence[DataFile], lengths: Sequence[Lengths] = ()) -> dict[type, Rows]:
    rows: dict[type, Rows] = {}
    for record in _ORDER:
        numbers = [number for number, file in enumerate(files) if file.record is record]
        if numbers:
            own = [lengths[number] for number in numbers] if lengths else []
            together = Lengths(
                rows=[length for of_file in own for length in of_file.rows],
                prompts=[length for of_file in own for length in of_file.prompts],
                answers=[length for of_file in own for length in of_file.answers],
            )
            rows[record] = replace(joined([files[number] for number in numbers]), lengths=together)
    return rows


def _lines(
    files: Sequence[str],
    stages: Mapping[str, NewStage],
    model: BaseModel,
    adapter: Reasoned,
    options: Options,
    summary: str,
) -> Iterator[str]:
    yield from comment_lines(
        f"Written by `align new` for {', '.join(files)}. Each number is a starting value, chosen by the rule in its "
        f"comment; none was tuned. Paths are relative to the folder from which you call align."
    )
    yield f"summary: {flow(summary)}"
    yield ""
    yield "model:"
    yield from group_lines(_model_settings(model, options), depth=1)
    yield from comment_lines(adapter.why)
    yield f"adapter: {adapter.value}"
    yield ""
    yield "stages:"
    for name, stage in stages.items():
        yield from comment_lines(stage.why, pad="  ")
        yield f"  {name}:"
        yield from group_lines({**_of_other_package(name, adapter), **stage.settings}, depth=2)


def _of_other_package(name: str, adapter: Reasoned) -> dict[str, Any]:
    """The kind and the adapter of a stage that has no file in ``conf/stage``."""
    if (conf_folder() / "stage" / f"{name}{_SUFFIX}").is_file():
        return {}
    return {"kind": name, **({"adapter": adapter.value} if kind_named(name).trains else {})}


def _model_settings(model: BaseModel, options: Options) -> dict[str, Any]:
    default = "the small model that ships with the project, because --model was not given"
    source = Reasoned(value=model.source, why=default) if options.model is None else model.source
    settings: dict[str, Any] = {"source": source}
    if dtype := dtype_for(options.device):
        settings["dtype"] = dtype
    if model.template:
        settings["chat_template"] = Reasoned(value=model.template, why="its tokenizer has no chat template")
    return settings


def _as_argument(path: Path) -> str:
    return str(path) if path.is_absolute() or path.parent != Path(".") else f"./{path}"
