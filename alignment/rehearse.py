"""Checks that need a tokenizer, or that run the user's code: ``python -m alignment.rehearse``. The driver starts it
before the first stage of a run, so that faults that would stop a later stage are reported before any training: no chat
template, rows that are all too long, a scorer that fails, a base model that a stage or its adapter does not fit. It
reads the first rows of each source to learn from, and calls each of the user's functions with one answer to a row of
each class. The outcome is written to ``status.json`` next to the log."""

from __future__ import annotations

import argparse
import importlib
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from alignment.config.data import DataConfig, MixedConfig, OnError, SourceConfig, ValidationConfig
from alignment.config.scoring import MetricConfig
from alignment.config.stage import TrainedConfig
from alignment.core.child_processes import end_process
from alignment.core.errors import AlignmentError
from alignment.core.model_files import positions_in, reason_of_positions, row_too_long
from alignment.data.reading import iterate
from alignment.data.records import Prompt
from alignment.data.tokens.row_kinds import PROMPTS, Limits, RowTooLong, Tokenized, refuse_losses, tokenized
from alignment.data.tokens.thoughts import lost_words
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.job import StageSpec
from alignment.records.worker import DONE, FAILED, Status
from alignment.rewards.functions import FunctionScorer, load_function
from alignment.rewards.scorer_sources import function_of, source_field
from alignment.rewards.scorers import Answers
from alignment.stages.registry import as_trained, kind_of, learned_data, read_spec
from alignment.stages.shared.base_check import refuse_adapter_that_does_not_fit
from alignment.training.context import StageContext

NUM_RECORDS = 500
"""How many records of each source are tokenised."""
NUM_PROMPTS = 10_000
"""Among so many prompts, rows of each class are looked for."""
MOST_CLASSES = 20
"""A column with more values than this, such as an id, does not divide rows into classes (chosen, not tuned)."""
TRIAL_ANSWER = "Yes."
"""The answer that the user's functions are called with."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit code 0, or that of the first fault."""
    parser = argparse.ArgumentParser(prog="python -m alignment.rehearse", description=__doc__)
    parser.add_argument("folder", type=Path, help="where status.json is written")
    parser.add_argument("--rows", nargs="*", type=Path, default=[], help="stage files whose data rows are checked")
    parser.add_argument("--scorers", nargs="*", type=Path, default=[], help="stage files whose functions are called")
    parser.add_argument("--model", nargs="*", type=Path, default=[], help="stage files that the base model must fit")
    options = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    where, notes = "", []
    checks = ((check_rows, options.rows), (try_functions, options.scorers), (check_model, options.model))
    try:
        for check, files in checks:
            for file in files:
                spec = read_spec(file)
                where = f"stage {spec.stage}, checked before any training"
                notes += [f"{spec.stage}: {note}" for note in check(spec)]
    except AlignmentError as error:
        return _write_status(options.folder, error.exit_code, str(error), where)
    except Exception as error:  # noqa: BLE001 - last resort: the driver must learn of every failure
        traceback.print_exc()
        return _write_status(options.folder, 1, f"{type(error).__name__}: {error}", where)
    return _write_status(options.folder, 0, "", where, notes)


def _write_status(folder: Path, code: int, error: str, where: str, notes: Sequence[str] = ()) -> int:
    Status(state=FAILED if code else DONE, exit_code=code, error=error, where=where, notes=list(notes)).write(folder)
    return code


def check_rows(spec: StageSpec) -> list[str]:
    """What the chat template leaves out of the first records of each source, if the stage can learn from some of them.
    Raises DataError: none of them can be rendered or tokenised, or too many rows of a source that was read to its end
    are too long; ModelError: there is no usable tokenizer, or a row within the stage's limits is longer than the base
    model's positions."""
    config = as_trained(spec.config)
    assert config is not None, "the driver passes only stages that train"
    tokenizer = load_tokenizer(spec.base_path, spec.model.template)
    sources = [*spec.sources(config.data, "data"), *_held_out_sources(spec)]
    return [note for data, path in sources for note in _check_source(spec, config, tokenizer, data, path)]


def _held_out_sources(spec: StageSpec) -> list[tuple[SourceConfig, Path]]:
    validation = getattr(spec.config, "validation", None)
    if not isinstance(validation, ValidationConfig) or "validation.data" not in spec.extra_data:
        return []
    return spec.sources(validation.data, "validation.data")


def _check_source(
    spec: StageSpec, config: TrainedConfig, tokenizer: object, data: SourceConfig, path: Path
) -> list[str]:
    kind, limits = learned_data(config)
    lenient = replace(data, on_error=OnError.skip, max_skipped=1.0)  # the plan has checked for these faults
    records = list(islice(iterate(path, kind.record, lenient), NUM_RECORDS))
    every = list(tokenized(tokenizer, kind, records, limits))
    faults = [row.fault for row in every if row.fault is not None]
    others = [fault for fault in faults if not isinstance(fault, RowTooLong)]
    whole = len(every) < NUM_RECORDS
    if every and len(others) == len(every) and (whole or data.on_error is OnError.fail):
        raise others[0]  # if faulty rows are skipped, later rows of a longer source may still be usable
    if whole:
        dropped, cut = len(faults) - len(others), sum(row.cut != "" for row in every)
        longest = max((row.tokens for row in every), default=0)
        refuse_losses(limits, dropped=dropped, cut=cut, records=len(every), longest=longest, where=str(path))
    if not _is_sampled(data):
        answer = getattr(config, "max_new_tokens", 0) if kind is PROMPTS else 0  # a prompt's answer follows it
        _refuse_beyond_positions(spec, [row for row in every if row.fault is None], limits, answer)
    lost = Counter(loss for row in every for loss in row.lost)
    begin = f"{path}: " + ("" if whole else "of the first records, ")
    return [begin + lost_words(loss, count, len(every)) for loss, count in lost.items()]


def _is_sampled(data: SourceConfig) -> bool:
    """Whether the stage takes only some of the source's rows, so that one that it cannot read may not be among them."""
    if isinstance(data, DataConfig):
        return data.fraction < 1.0
    return isinstance(data, MixedConfig) and (data.share is not None or data.count is not None)


def _refuse_beyond_positions(spec: StageSpec, rows: Sequence[Tokenized], limits: Limits, answer: int) -> None:
    positions = positions_in(spec.base_path)
    if positions is None:
        return
    for row in rows:
        tokens = max(parts.longest for parts in row.parts)
        tokens = min(tokens, limits.row) + answer  # a text of any length becomes several rows
        if tokens > positions:
            raise row_too_long(tokens, positions, reason_of_positions(spec.base_path), where=row.record.where)


def try_functions(spec: StageSpec) -> list[str]:
    """No notes, if each of the user's functions returns one finite number for an answer to a row of each class. A
    metric may also return None. Raises RewardError: a function does not; the error names it and what it returned or
    raised."""
    data = getattr(spec.config, "data", None)
    assert isinstance(data, DataConfig), "the driver passes only stages that score answers"
    prompts = one_of_each_class(islice(iterate(spec.data_path, Prompt, data), NUM_PROMPTS))
    for field, config in kind_of(spec.config).scorers(spec.config).items():
        source = function_of(config.source)
        if source is None:
            continue
        planned = spec.identity.get("code", {}).get(source_field(field))
        scorer = FunctionScorer(source, load_function(source, planned=planned))
        for prompt in prompts:
            answers = Answers(prompt_ids=[[]], answer_ids=[[]], texts=[TRIAL_ANSWER], prompts=[prompt], rows=[0])
            if isinstance(config, MetricConfig):
                scorer.optional_scores(answers)
            else:
                scorer.scores(answers)
    return []


def one_of_each_class(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The first prompt with each value of a column that has few values, and with each set of columns. A function that
    fails on some rows only often does so because of a label, a task or a missing column."""
    first: dict[str, dict[str, Prompt]] = {}
    for prompt in prompts:
        filled = sorted(f"{name} {type(value).__name__}" for name, value in prompt.row.items() if value is not None)
        for name, value in [("", str(filled)), *_classes(prompt.row)]:
            of_column = first.setdefault(name, {})
            if len(of_column) <= MOST_CLASSES:
                of_column.setdefault(value, prompt)
    few = [column for name, column in first.items() if not name or len(column) <= MOST_CLASSES]
    return list({id(prompt): prompt for column in few for prompt in column.values()}.values())


def _classes(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in row.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str | int | float):
                yield name, repr(item)


def check_model(spec: StageSpec) -> list[str]:
    """Whether the run's base model fits the stage: its adapter, and what its kind says (``StageKind.rehearse``), whose
    notes are returned. Raises AlignmentError: it does not."""
    trained = as_trained(spec.config)
    if trained is not None:
        refuse_adapter_that_does_not_fit(spec, trained.adapter)
    module, _, name = kind_of(spec.config).rehearse.partition(":")
    if not module:
        return []
    # The second of two processes, because only the first one writes files.
    context = StageContext(spec=spec, rank=1, world_size=2)
    getattr(importlib.import_module(module), name)(spec.config, context)
    return context.notes


if __name__ == "__main__":
    end_process(main())
