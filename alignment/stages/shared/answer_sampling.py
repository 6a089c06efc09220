"""Samples answers to prompts, in parts that a resumed stage finds again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from alignment.config.data import DataConfig, TooLongConfig
from alignment.config.launch import SamplingConfig
from alignment.core.errors import DataError
from alignment.core.files import parse_json, write_text
from alignment.core.fingerprint import digest
from alignment.data.overlap import HeldOut, asked
from alignment.data.records import HeldOutPrompt, Prompt
from alignment.data.tokens.row_kinds import PROMPTS, Limits
from alignment.data.tokens.tokenize import end_ids
from alignment.engines.completions import SEEDS, Asked, Generation
from alignment.models.assembly.load import Lineage
from alignment.models.assembly.prefix import refuse_too_long
from alignment.models.forward.generate import Sampling, generate
from alignment.records.worker import PARTS
from alignment.stages.shared.policies import Policies, ServedPolicies, served_policies
from alignment.stages.shared.stage_rows import fitting, list_left_out, rows_of
from alignment.training.context import StageContext
from alignment.training.sharding import everyones, shared


class AskingConfig(Protocol):
    """Settings of a stage that asks a policy the prompts of its data."""

    data: DataConfig
    leave_out: list[DataConfig]
    max_prompt_length: int
    too_long: TooLongConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class AskedPrompts:
    """Indices of prompts in the stage's data (``rows``), and their token ``ids``; and how many were left out."""

    rows: Sequence[int]
    ids: Sequence[Sequence[int]]
    too_long: int
    evaluated: int
    repeated: int


def asked_prompts(
    config: AskingConfig, context: StageContext, tokenizer: Any, records: Sequence[Prompt]
) -> AskedPrompts:
    """The prompts of ``records`` that are asked; ``left_out.jsonl`` lists the others."""
    limits = Limits(row=config.max_prompt_length, too_long=config.too_long)
    by_row, counts = fitting(context, PROMPTS, records, config.data, limits, tokenizer)
    ids = {row: tokenized.rows[0]["prompt"] for row, tokenized in by_row.items()}
    evaluated = _evaluated(config, context, {row: records[row] for row in ids})
    first: dict[tuple[int, ...], int] = {}
    others = [row for row in ids if row not in evaluated]
    repeated = {row for row in others if first.setdefault(tuple(ids[row]), row) != row}
    reasons = {**evaluated, **dict.fromkeys(repeated, "its prompt repeats an earlier row")}
    list_left_out(context, ({"where": records[row].where, "reason": reasons[row]} for row in sorted(reasons)))
    rows = [row for row in ids if row not in reasons]
    if not rows:
        raise DataError(
            f"no prompt is left of {len(records)}: {len(evaluated)} are also evaluated, {len(repeated)} are repeated",
            where=f"stages.{context.spec.stage}.data",
            remedy="use prompts that no evaluation of the run uses",
        )
    return AskedPrompts(
        rows=rows,
        ids=[ids[row] for row in rows],
        too_long=int(counts["rows_too_long"]),
        evaluated=len(evaluated),
        repeated=len(repeated),
    )


def _evaluated(config: AskingConfig, context: StageContext, records: Mapping[int, Prompt]) -> dict[int, str]:
    """The rows that ask what an evaluation asks, with the reason."""
    held_out = HeldOut(
        asked(prompt)
        for number, data in enumerate(config.leave_out)
        for prompt in rows_of(context, HeldOutPrompt, data, field=f"leave_out[{number}]")
    )
    reasons = {}
    for row, record in records.items():
        for overlap in held_out.overlaps([asked(record)]):
            reasons[row] = f"it has {overlap.share:.0%} of the eight-word sequences of {overlap.held_out}"
    return reasons


log = logging.getLogger(__name__)


def made_in_parts(
    context: StageContext,
    name: str,
    keys: Sequence[Any],
    make: Callable[[int], Any],
    *,
    progress: Callable[[int], None],
    prepare: Callable[[], None] = lambda: None,
) -> list[Any]:
    """The value of every part, in order, on every process.

    ``keys`` has an entry of plain values for each part: what its content depends on beside the stage's fingerprint.
    ``make`` computes a part by its number; its value must be plain JSON. The processes share the missing parts, and
    the main process stores them under ``name``. A part is always computed as a whole, so that the number of processes
    does not change it. ``progress`` receives how many parts are done. ``prepare`` is called on every process if a part
    is missing.
    """
    files = [_file(context, name, number, key) for number, key in enumerate(keys)]
    parts: list[Any] = everyones([_read(file) for file in files] if context.is_main else [])[0]
    missing = [number for number, value in enumerate(parts) if value is None]
    progress(len(parts) - len(missing))
    if missing:
        prepare()
    for first in range(0, len(missing), context.world_size):
        group = missing[first : first + context.world_size]
        values = shared(partial(make, group[context.rank]) if context.rank < len(group) else lambda: None)
        for number, value in zip(group, values[: len(group)], strict=True):
            parts[number] = value
            if context.is_main:
                write_text(files[number], json.dumps({"value": value, "sha256": digest(json.dumps(value))}))
        progress(len(parts) - len(missing) + first + len(group))
    return parts


def _file(context: StageContext, name: str, number: int, key: Any) -> Path:
    """Its name depends on all that the part depends on, so that a part of other settings is never read."""
    return context.checkpoints / PARTS.replace("*", f"{name}-{number}-{digest([context.spec.fingerprint, key])[:16]}")


def _read(file: Path) -> Any:
    """The stored value, or None if it is missing or damaged; the log names a damaged one."""
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        value = content["value"]
        if digest(json.dumps(value)) != content["sha256"]:
            raise ValueError("its content does not match its hash")
        return value
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        log.warning("%s cannot be used and will be made again: %s", file, error)
        return None


SEED = "answers"
"""The name from which the random numbers of a prompt are derived, with the index of its row."""


BATCHES = 4
"""Batches in a part, at most. Within a part a waiting prompt takes over the row of a finished answer."""

LEAST_PARTS = 8
"""Parts that a stage has at least before a part has several batches."""


class SampledConfig(AskingConfig, Protocol):
    """Settings of a stage that samples answers to its prompts."""

    completions_per_prompt: int
    temperature: float
    max_new_tokens: int
    batch_size: int
    sampling: SamplingConfig


def sampled_answers(
    config: SampledConfig, context: StageContext, policy: Lineage, tokenizer: Any, asked: AskedPrompts
) -> list[list[list[int]]]:
    """Token ids of ``completions_per_prompt`` answers to each prompt, with the end of the turn if it was generated.

    Each prompt has random numbers of its own, so that its answers do not depend on the other prompts.
    """
    generation = Generation(
        max_new_tokens=config.max_new_tokens, temperature=config.temperature, end_ids=sorted(end_ids(tokenizer))
    )
    spans, longest = spans_of(config, asked), max(map(len, asked.ids)) + config.max_new_tokens
    served = served_policies(config.sampling, context)
    if served is None:
        policies = Policies(context)

        def sample(number: int) -> list[list[int]]:
            model = policies.load(policy)
            refuse_too_long(model.base_model, longest)  # of all prompts, so that no part is sampled in vain
            return _own_answers(config, context, model, asked, spans[number], generation)

        answers = in_parts(context, "answering", spans, asked, sample)
        policies.release()
    else:
        with served:
            answers = in_parts(
                context,
                "answering by vLLM",
                spans,
                asked,
                lambda number: _served_answers(config, context, served, asked, spans[number], generation),
                prepare=lambda: served.prepare(policy, longest),
            )
    flat = [answer for part in answers for answer in part]
    count = config.completions_per_prompt
    return [flat[first : first + count] for first in range(0, len(flat), count)]


def _own_answers(
    config: SampledConfig,
    context: StageContext,
    model: PreTrainedModel,
    asked: AskedPrompts,
    indices: Sequence[int],
    generation: Generation,
) -> list[list[int]]:
    count = config.completions_per_prompt
    return generate(
        model,
        [asked.ids[index] for index in indices for _ in range(count)],
        max_new_tokens=generation.max_new_tokens,
        end_ids=generation.end_ids,
        batch_size=config.batch_size,
        sampling=Sampling(
            temperature=generation.temperature,
            uniforms=torch.cat([_uniforms(config, context, asked.rows[index]) for index in indices]),
        ),
    )


def _served_answers(
    config: SampledConfig,
    context: StageContext,
    served: ServedPolicies,
    asked: AskedPrompts,
    indices: Sequence[int],
    generation: Generation,
) -> list[list[int]]:
    requests = [
        Asked(
            prompt=asked.ids[index],
            answers=config.completions_per_prompt,
            seed=context.seed(SEED, asked.rows[index]) % SEEDS,
        )
        for index in indices
    ]
    return [answer.ids for of_prompt in served.answers(requests, generation) for answer in of_prompt]


def spans_of(config: SampledConfig, asked: AskedPrompts) -> list[range]:
    """The prompts of each part: as many as have ``batch_size`` answers, or several times as many if there are enough
    parts for the processes to share."""
    answers = len(asked.rows) * config.completions_per_prompt
    batches = min(BATCHES, max(1, answers // (config.batch_size * LEAST_PARTS)))
    size = max(1, batches * config.batch_size // config.completions_per_prompt)
    return [range(first, min(first + size, len(asked.rows))) for first in range(0, len(asked.rows), size)]


def in_parts(
    context: StageContext,
    name: str,
    spans: Sequence[range],
    asked: AskedPrompts,
    make: Callable[[int], Any],
    prepare: Callable[[], None] = lambda: None,
) -> list[Any]:
    """What ``make`` makes of each span of prompts; progress is reported under ``name``, in prompts.

    ``prepare`` is called before the first that is not stored yet.
    """
    keys = [[asked.rows[index] for index in span] for span in spans]
    ends = [0, *(span.stop for span in spans)]
    return made_in_parts(
        context,
        name,
        keys,
        make,
        progress=lambda done: context.progress(name, ends[done], len(asked.rows)),
        prepare=prepare,
    )


def _uniforms(config: SampledConfig, context: StageContext, row: int) -> torch.Tensor:
    """``[answers, steps]`` random numbers of a prompt."""
    shape = (config.completions_per_prompt, config.max_new_tokens)
    return torch.rand(*shape, generator=context.generator(SEED, row), dtype=torch.float64)
