"""Lengths of rows, and a trial of the longest batch before a stage trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignment.config.launch import Sharding
from alignment.core.errors import StageError
from alignment.costs.recorder import OPTIMIZER, memory_for, recorder
from alignment.models.assembly.prefix import refuse_too_long
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.attention import ATTENTION
from alignment.training.context import StageContext, own_device
from alignment.training.micro_batches import MicroBatches, Unit

BLOCK = 10_000
"""How many packed rows are read at a time."""
_PACKED = "seq_lengths"
"""TRL's column of the lengths of the rows that were packed into one."""
_NOT_TOKENS = {"labels", "position_ids", _PACKED, "attention_mask", "completion_mask"}
"""Columns of a row that are as long as its tokens, or no tokens."""
_WITHOUT_GRADIENTS = "KL_"
"""TRL's prefix for columns of other answers, which are read in a pass of their own."""
_PROMPT = "prompt"
"""TRL's prefix for columns of prompts."""


def row_tokens(rows: Dataset, *, prompts_twice: bool = False) -> NDArray[np.int64]:
    """``[rows]``: the tokens of each row in all its columns; both answers of a pair, and their prompt once or twice."""

    def summed(lengths: Mapping[str, NDArray[np.int64]]) -> NDArray[np.int64]:
        times = {name: 2 if prompts_twice and name.startswith(_PROMPT) else 1 for name in lengths}
        return np.sum([times[name] * of_column for name, of_column in lengths.items()], axis=0, dtype=np.int64)

    columns = [name for name in _columns(rows) if not name.startswith(_WITHOUT_GRADIENTS)]
    return _measured(rows, columns, summed)


def longest_sequences(rows: Dataset) -> NDArray[np.int64]:
    """``[rows]``: the tokens of the longest sequence that the model reads of each row: its prompt with an answer, or
    the longest of the rows that were packed into it."""
    if _PACKED in rows.column_names:
        blocks = rows.select_columns([_PACKED]).iter(BLOCK)
        return np.array([max(lengths) for block in blocks for lengths in block[_PACKED]])

    def with_longest_answer(lengths: Mapping[str, NDArray[np.int64]]) -> NDArray[np.int64]:
        prompts = [of_column for name, of_column in lengths.items() if name.startswith(_PROMPT)]
        others = [of_column for name, of_column in lengths.items() if not name.startswith(_PROMPT)]
        return np.sum([*prompts, np.max(others, axis=0)], axis=0, dtype=np.int64)

    return _measured(rows, _columns(rows), with_longest_answer)


def refuse_long_rows(model: PreTrainedModel, rows: Dataset, origin: Callable[[int], str]) -> None:
    """Checks that the model can read every row; ``origin`` says where a row is from, by its number. Raises ModelError:
    a row is longer than the model's positions; the error names the longest."""
    tokens = longest_sequences(rows)
    longest = int(tokens.argmax())
    refuse_too_long(unwrapped(model).base_model, int(tokens[longest]), where=origin(longest))


def _columns(rows: Dataset) -> list[str]:
    return [
        field.name
        for field in rows.features.arrow_schema
        if (pa.types.is_list(field.type) or pa.types.is_large_list(field.type)) and field.name not in _NOT_TOKENS
    ]


def _measured(
    rows: Dataset, columns: Sequence[str], measure: Callable[[Mapping[str, NDArray[np.int64]]], NDArray[np.int64]]
) -> NDArray[np.int64]:
    """``[rows]``: what ``measure`` makes of the lengths of these columns, by their names. Lengths are read of all rows
    of the table in their order, because to gather selected rows takes a hundred times as long."""
    table = rows.data.table
    every = measure({name: pc.list_value_length(table[name]).to_numpy() for name in columns})
    return every if rows._indices is None else every[rows._indices.column(0).to_numpy()]


SHARE = 0.01
"""Largest share of a training's tokens that may be tried."""
_EIGHT_BIT = "8bit"
"""In the names of bitsandbytes' optimisers."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory. CUDA has its own error; the CPU's allocator is recognised by its message."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def largest(tokens: NDArray[np.int64], *, limit: int, most: int, padded: bool) -> list[int]:
    """Rows of the largest micro-batch of at most ``limit`` tokens and ``most`` rows; a longer row is alone. It has the
    longest row and, one after another, the longest of those that still fit. Where rows are ``padded``, the shortest
    ones: then as many as possible are as long as the longest."""
    order = np.argsort(tokens, kind="stable")
    chosen, left = [int(order[-1])], limit - int(tokens[order[-1]])
    if padded:
        fitting = np.searchsorted(np.cumsum(tokens[order[:-1]]), left, side="right")
        return chosen + order[: min(int(fitting), most - 1)].tolist()
    ascending, end = tokens[order], len(order) - 1  # rows from ``end`` on are taken or too long
    while len(chosen) < most:
        end = min(end, int(np.searchsorted(ascending, left, side="right"))) - 1
        if end < 0:
            break
        chosen.append(int(order[end]))
        left -= int(ascending[end])
    return chosen


def is_flat(trainer: MicroBatches) -> bool:
    """Whether the trainer's model computes a stream without padding."""
    return bool(trainer.model.config._attn_implementation == ATTENTION)


def counted_tokens(trainer: MicroBatches) -> NDArray[np.int64]:
    """``[rows]``: the tokens of the trainer's rows as its micro-batches count them: a stream has the prompt of a pair
    once."""
    return row_tokens(trainer.train_dataset, prompts_twice=trainer.unit is Unit.pairs and not is_flat(trainer))


class LongestBatch(TrainerCallback):
    """Tries it before the first step; with several processes, all try the same rows. Not with sharded weights:
    DeepSpeed and FSDP hold the gradients of a micro-batch where nothing can clear them."""

    def __init__(self, trainer: MicroBatches, context: StageContext) -> None:
        self._trainer = trainer
        self._context = context

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Runs once the optimiser is there and a checkpoint was loaded. Raises StageError: there is not enough memory;
        the error says which setting would fit."""
        if self._context.spec.sharding is not Sharding.none:
            return
        tokens = counted_tokens(self._trainer)
        most = args.per_device_train_batch_size
        coming = (state.max_steps - state.global_step) * most * float(tokens.mean())
        limit, padded = self._trainer.micro_batch_tokens, not is_flat(self._trainer)
        rows = largest(tokens, limit=limit, most=most, padded=padded)
        estimate = recorder()
        if int(tokens[rows].sum()) > SHARE * coming and not (estimate and estimate.tries_longest):
            return
        self._context.progress("trying the longest batch")
        fits = self._fits(rows)
        self._context.progress("training", state.global_step, state.max_steps)
        if not fits:
            raise self._error(tokens, rows)

    def _fits(self, rows: Sequence[int]) -> bool:
        moments = []
        try:
            with memory_for(OPTIMIZER):
                moments = _memory_for_moments(self._trainer.optimizer)
            self._trainer.try_rows(rows)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            moments.clear()
            if own_device().type == "cuda":
                torch.cuda.empty_cache()
        return True

    def _error(self, tokens: NDArray[np.int64], rows: Sequence[int]) -> StageError:
        where = f"stages.{self._context.spec.stage}.optim"
        number = int(tokens[list(rows)].sum())
        if len(rows) == 1:
            subject = f"the longest row, of {number} tokens ({self._trainer.row_origin(rows[0])}),"
            remedy = "lower the stage's limit of tokens per row, or leave the row out"
        else:
            subject = f"the largest micro-batch that these rows can form, {len(rows)} rows with {number} tokens,"
            remedy = f"set {where}.micro_batch_tokens=auto, which chooses a size that fits, or to less than {number}"
        if not self._trainer.args.activation_checkpointing:
            remedy = f"set {where}.activation_checkpointing=true, or {remedy}"
        return StageError(
            f"{subject} does not fit into memory (this was tried before the first step)",
            where=f"{where}.micro_batch_tokens",
            remedy=remedy,
        )


def _memory_for_moments(optimizer: Any) -> list[torch.Tensor]:
    """As many bytes as the moments will take that the optimiser does not hold yet."""
    own = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    reserved = []
    for parameter in (parameter for group in own.param_groups for parameter in group["params"]):
        if parameter.requires_grad and not own.state.get(parameter):
            each = 1 if _EIGHT_BIT in type(own).__name__ else parameter.element_size()
            # Filled, because the system gives a process the memory that it writes to.
            reserved.append(torch.full((2 * each * parameter.numel(),), 1, dtype=torch.uint8, device=parameter.device))
    return reserved


class RowTrials:
    """``Trials`` (size_search.py) of a trainer whose optimiser is ready and whose models may be spoiled."""

    def __init__(self, trainer: MicroBatches) -> None:
        self._trainer = trainer
        self._tokens = counted_tokens(trainer)
        self._most = trainer.args.per_device_train_batch_size

    def bounds(self) -> tuple[int, int]:
        """Tokens of the longest row, and of the longest rows that a process's share of a batch can have."""
        return int(self._tokens.max()), int(np.sort(self._tokens)[-self._most :].sum())

    def least_step(self) -> int:
        """Takes a step on the shortest row; returns its tokens."""
        return self._step([int(self._tokens.argmin())], limit=1)

    def step(self, limit: int) -> int:
        """Takes a step on the largest micro-batch of at most ``limit`` tokens; returns its tokens."""
        rows = largest(self._tokens, limit=limit, most=self._most, padded=not is_flat(self._trainer))
        return self._step(rows, limit=limit)

    def _step(self, rows: list[int], *, limit: int) -> int:
        self._trainer.micro_batch_tokens = limit
        self._trainer.learn_rows(rows)
        return int(self._tokens[rows].sum())
