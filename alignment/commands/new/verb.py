"""``align new``: looks at data files and writes a recipe for them."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from alignment.commands.new.base_model import (
    BaseModel,
    adapter_for,
    base_model,
    dtype_for,
    free_bytes,
    proposed_stages,
    questions,
)
from alignment.commands.new.data_files import (
    FEWEST,
    DataFile,
    Measure,
    NewFiles,
    held_out_keys,
    joined,
    look_at,
    measured_lengths,
    refuse_repeated,
    split,
    without,
)
from alignment.commands.new.recipe_text import Ask, answered, comment_lines, flow, group_lines, refuse_unasked
from alignment.config.faults import refuse
from alignment.config.model import AdapterKind
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
from alignment.data.records import Conversation, LabelledAnswer, PlainText, PreferencePair, Prompt, Record
from alignment.pipeline.execute.summary import show_plan
from alignment.pipeline.plan.compose import tree_of
from alignment.pipeline.plan.plan import make_plan
from alignment.pipeline.plan.settings import column_faults
from alignment.stages.registry import kind_named

_DEFAULT_OUT = "recipe.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Data files, a model, and answers to what it would ask."""
    parser.description = (
        "Looks at data files and writes a commented recipe for them. On a terminal it asks for what it cannot know; "
        "elsewhere, options must answer these questions."
    )
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help="a data file or a folder of them, bundled:NAME, or hub:ORG/NAME@REVISION",
    )
    parser.add_argument(
        "--model", metavar="SOURCE", help="the model, written as in model.source (default: the bundled small model)"
    )
    parser.add_argument(
        "--out", default=_DEFAULT_OUT, metavar="FILE", help=f"a file that does not exist yet (default: {_DEFAULT_OUT})"
    )
    parser.add_argument(
        "--heldout", metavar="FILE", help="prompts to evaluate on (default: a part of the data, copied to a file)"
    )
    parser.add_argument(
        "--columns",
        metavar="{NAME: YOURS}",
        help="columns of FILE that have other names, such as '{label: good}', as in a recipe's data.columns",
    )
    for question in (FROM_PAIRS, FIRST):
        parser.add_argument(f"--{question.name}", choices=list(question.choices), help=_help(question))
    parser.add_argument(
        f"--{SCORER.name}",
        metavar="SOURCE",
        help="a scorer of answers: the evaluation's metric, and also PPO's reward if the recipe has PPO",
    )
    parser.add_argument("--device", metavar="GPU", help="the GPU to train on, such as h100 (default: this machine)")


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


def _help(question: Question) -> str:
    return f"the answer to: {question.text}"


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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Data:
    """The user's files, as stages will read them, and the held-out prompts."""

    files: Sequence[DataFile]
    held_out: DataFile | None = None


def new_recipe(
    console: Console,
    files: Sequence[str],
    *,
    out: str,
    options: Options,
    ask: Ask | None = None,
    measure: Measure | None = None,
) -> int:
    """Writes a recipe for these files to ``out``, shows what it plans, and returns 0.

    ``ask`` asks the user (default: on a terminal), and ``measure`` counts tokens (default: in a process of its own).
    Nothing is left behind if it fails, and no file is overwritten.

    Raises:
        ConfigError: ``out`` cannot be written, an answer is missing, or no stage uses a file.
        DataError: a file cannot be read, or no stage can use it.
        ModelError: there is no such model, its folder has no weights, or it has no usable tokenizer.
        AlignmentError: the plan of the recipe is refused.
    """
    path = _new_file(out)
    refuse_repeated([*files, *([options.heldout] if options.heldout else [])])
    memory = free_bytes(options.device)
    columns = _columns(options.columns)
    looked = [look_at(console, file, where="FILE", columns=columns).counted() for file in files]
    given = None if options.heldout is None else _held_out_file(console, options.heldout)
    model = base_model(options.model, announce=lambda line: _say(console, line))
    answers = _answers(console, looked, model, options, ask)
    new = NewFiles(out=path)
    try:
        data = _split(console, looked, given, new)
        circumstances = _circumstances(data, model, answers, measure, lambda line: _say(console, line))
        stages = proposed_stages(circumstances)
        adapter = adapter_for(model, memory, dtype_for(options.device))
        text = "\n".join(_lines(files, stages, model, adapter, options, data)) + "\n"
        with new.create(path) as stream:
            stream.write(text)
        plan = make_plan(_as_argument(path), [])
    except BaseException:
        new.remove()
        raise
    for written in new.written:
        _say(console, f"wrote {written}")
    show_plan(console, plan)
    recipe = shlex.quote(_as_argument(path))
    _say(console, f"next: align preview {recipe}, and align plan {recipe} --cost")
    return 0


def _columns(written: str | None) -> dict[str, str]:
    """The names of a format's columns and those of the files'."""
    if written is None:
        return {}
    plain, faults = tree_of([f"columns={written}"], example="--columns '{prompt: my_question}'")
    data, wrong = source_from_plain(plain, where="FILE")
    refuse([*faults, *wrong, *column_faults(data, "FILE")])
    return data.columns


def _held_out_file(console: Console, source: str) -> DataFile:
    file = look_at(console, source, where="--heldout").counted()
    if not file.prompts:
        raise DataError(
            "no row has a prompt", where="--heldout", remedy="name a file with prompts, or leave the option out"
        )
    return file


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
    by_record = _by_record(files)
    raised = questions(Circumstances(rows=by_record, positions=model.positions, has_template=model.has_template))
    refuse_unasked(raised, options.answers, _QUESTIONS)
    if ask is None and sys.stdin is not None and sys.stdin.isatty() and console.is_terminal:
        ask = input
    return answered(raised, options.answers, ask=ask)


def _split(console: Console, files: Sequence[DataFile], given: DataFile | None, new: NewFiles) -> _Data:
    """Holds prompts out, or leaves the given ones out of what is learned."""
    if given is not None:
        return _Data(files=without(files, given, new), held_out=given)
    keys = held_out_keys(files)
    if keys:
        held_out, learned = split(files, keys, new)
        _say(console, f"{len(keys)} prompts are held out for an evaluation")
        return _Data(files=learned, held_out=held_out)
    _say(console, f"no evaluation: it needs {FEWEST} different prompts, or --heldout FILE")
    return _Data(files=files)


def _circumstances(
    data: _Data, model: BaseModel, answers: Mapping[str, str], measure: Measure | None, say: Callable[[str], None]
) -> Circumstances:
    lengths = measured_lengths(data.files, model.folder, model.template, measure=measure)
    for file, of_file in zip(data.files, lengths, strict=True):
        for remark in of_file.remarks:
            say(f"{file.name}: {remark} (docs/data.md says what to do)")
    return Circumstances(
        rows=_by_record(data.files, lengths),
        answers=answers,
        positions=model.positions,
        has_template=model.has_template,
        held_out=None if data.held_out is None else joined([data.held_out]),
    )


def _by_record(files: Sequence[DataFile], lengths: Sequence[Lengths] = ()) -> dict[type, Rows]:
    """The rows of each type of record, in the order in which preferences come first."""
    rows: dict[type, Rows] = {}
    for record in _ORDER:
        numbers = [number for number, file in enumerate(files) if file.record is record]
        if numbers:
            own = [lengths[number] for number in numbers] if lengths else []
            rows[record] = replace(joined([files[number] for number in numbers]), lengths=_together(own))
    return rows


def _together(lengths: Sequence[Lengths]) -> Lengths:
    return Lengths(
        rows=[length for of_file in lengths for length in of_file.rows],
        prompts=[length for of_file in lengths for length in of_file.prompts],
        answers=[length for of_file in lengths for length in of_file.answers],
    )


def _lines(
    files: Sequence[str],
    stages: Mapping[str, NewStage],
    model: BaseModel,
    adapter: Reasoned,
    options: Options,
    data: _Data,
) -> Iterator[str]:
    yield from comment_lines(
        f"Written by `align new` for {', '.join(files)}. Each number is a starting value, chosen by the rule in its "
        f"comment; none was tuned. Paths are relative to the folder from which you call align."
    )
    yield "defaults:"
    yield "  - base"
    for name in stages:
        if _has_file(name):
            yield f"  - stage@stages.{name}: {name}"
    trained = [name for name in stages if kind_named(name).trains]
    yield from comment_lines(f"{adapter.value}: {adapter.why}", pad="  ")
    if adapter.value != AdapterKind.lora.value:
        yield from (f"  - override /adapter@stages.{name}.adapter: {adapter.value}" for name in trained)
    yield "  - _self_"
    yield ""
    yield f"summary: {flow(_summary(stages, data))}"
    yield ""
    yield "model:"
    yield from group_lines(_model_settings(model, options), depth=1)
    yield ""
    yield "stages:"
    for name, stage in stages.items():
        yield from comment_lines(stage.why, pad="  ")
        own = {} if _has_file(name) else {"kind": name}
        settings = {**own, **stage.settings}
        yield f"  {name}:" if settings else f"  {name}: {{}}"
        yield from group_lines(settings, depth=2)


def _summary(stages: Mapping[str, NewStage], data: _Data) -> str:
    return f"{', '.join(stages)} on {', '.join(file.name for file in data.files)}"


def _model_settings(model: BaseModel, options: Options) -> dict[str, Any]:
    default = "the small model that ships with the project, because --model was not given"
    source = Reasoned(value=model.source, why=default) if options.model is None else model.source
    settings: dict[str, Any] = {"source": source}
    if dtype := dtype_for(options.device):
        settings["dtype"] = dtype
    if model.template:
        settings["chat_template"] = Reasoned(value=model.template, why="its tokenizer has no chat template")
    return settings


def _has_file(kind: str) -> bool:
    """Whether conf/stage has a file for the kind, which chooses its adapter too."""
    return (conf_folder() / "stage" / f"{kind}{_SUFFIX}").is_file()


def _as_argument(path: Path) -> str:
    """The path as `align` takes it for that of a file."""
    return str(path) if path.is_absolute() or path.parent != Path(".") else f"./{path}"


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
