"""Splits an optimiser batch into micro-batches that fit in memory, by tokens, which determine the cost of a stream. The
trainer passes the process's whole share of an optimiser batch. Gradients are accumulated over its micro-batches, and
the loss is that of the whole: the mean over the learned tokens, pairs or rows of all micro-batches and processes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from alignment.models.forward.attention import ATTENTION
from alignment.models.forward.causal import IGNORED
from alignment.models.forward.rows import SHORTEST_SHARED, by_tokens, on_device, on_host, sent
from alignment.models.kernels.nf4 import reused_norms
from alignment.training.shard_together import ShardedTrainer

_COEFFICIENT = "router_aux_loss_coef"
WITHOUT_ROUTER_LOSS = {_COEFFICIENT: 0.0}
"""Arguments of TRL's configurations."""


@contextmanager
def own_coefficient(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Puts the coefficient in the model's configuration back after a ``with`` block. TRL's SFT trainer writes its own
    there, with which the model would be saved."""
    config = model.config.get_text_config()
    before = getattr(config, _COEFFICIENT, None)
    yield
    if before is not None:
        setattr(config, _COEFFICIENT, before)


Batch = dict[str, Any]
PACKED_COLUMNS = ("input_ids", "labels", "position_ids")


@contextlib.contextmanager
def outside_of_data_loaders(accelerator: Accelerator) -> Iterator[None]:
    """In the last batch of training rows, accelerate would cut what it gathers to the size of that batch, and so leave
    out figures of some processes."""
    state = accelerator.gradient_state
    references, state.dataloader_references = state.dataloader_references, [None]
    try:
        yield
    finally:
        state.dataloader_references = references


def same_number_everywhere(micro_batches: list[range], accelerator: Accelerator) -> list[range]:
    """Splits further, to as many micro-batches as any process has, because each is a collective call in TRL's trainers.
    Some may be empty."""
    if accelerator.num_processes == 1:
        return micro_batches
    number = torch.tensor(len(micro_batches), device=accelerator.device)
    torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
    return divided(micro_batches, int(number))


def cut_alike(tokens: Tensor, limit: int, accelerator: Accelerator) -> list[range]:
    """The same micro-batches on every process, by ``[rows]`` tokens, so that none is too large on any process. All
    processes have equally many rows. TRL's trainers of pairs and of rows gather metrics in each micro-batch, so it must
    hold equally many on every process."""
    if accelerator.num_processes > 1:
        tokens = tokens.to(accelerator.device, copy=True)
        torch.distributed.all_reduce(tokens, op=torch.distributed.ReduceOp.MAX)
    return by_tokens(tokens.tolist(), limit)


def as_many_as_most(shares: Sequence[list[range]], rank: int) -> list[range]:
    """Like ``same_number_everywhere`` without communication, because every process knows all shares."""
    return divided(shares[rank], max(1, *(len(micro_batches) for micro_batches in shares)))


def divided(micro_batches: list[range], wanted: int) -> list[range]:
    """The rows of ``micro_batches`` in ``wanted`` micro-batches, at least as many. The longest are halved, so none
    grows; the last ones are empty if there are too few rows."""
    ranges = list(micro_batches)
    while len(ranges) < wanted:
        at = max(range(len(ranges)), key=lambda number: len(ranges[number]), default=None)
        if at is None or len(ranges[at]) < 2:
            rows = ranges[-1].stop if ranges else 0
            return ranges + [range(rows, rows)] * (wanted - len(ranges))
        start, end = ranges[at].start, ranges[at].stop
        middle = (start + end) // 2
        ranges[at : at + 1] = [range(start, middle), range(middle, end)]
    return ranges


@contextlib.contextmanager
def accumulating(accelerator: Accelerator, model: nn.Module, *, last: bool) -> Iterator[None]:
    """Context for forward and backward of one micro-batch; only the last one reduces gradients across processes. DDP
    decides in the forward pass whether the backward pass synchronises, DeepSpeed in the backward pass by the flag."""
    accelerator.gradient_state._set_sync_gradients(last)
    with contextlib.nullcontext() if last else accelerator.no_sync(model):
        yield


class Unit(Enum):
    """What a trainer's loss is a mean over: learned tokens, pairs, or rows. A batch of pairs holds the chosen rows,
    then the rejected ones."""

    tokens = "tokens"
    pairs = "pairs"
    rows = "rows"


class MicroBatches(ShardedTrainer):
    """A mix-in for TRL's trainers. Batches are padded rows, or packed ones (SFT). They stay on the host, where tokens
    are counted and streams are built. Their micro-batches are sent to the device, and remember what they were
    (shown_rows.py). ``micro_batch_tokens`` limits a micro-batch; set it after construction. ``accuracy_metric`` is
    TRL's name of the share of pairs, or of learned tokens, on which the model is right. ``row_origin`` says where a row
    is from, by its number in ``train_dataset``."""

    micro_batch_tokens: int
    row_origin: Callable[[int], str] = staticmethod(lambda row: f"row {row + 1} of its training rows")
    unit: Unit = Unit.tokens
    accuracy_metric: str = ""
    step_loss: Tensor | None = None
    _share: float = 1.0
    _keeps_gradients: bool = True

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Its batches are on the host."""
        placement, self.accelerator.device_placement = self.accelerator.device_placement, False
        try:
            return super().get_train_dataloader()
        finally:
            self.accelerator.device_placement = placement

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        """Batches, and the number of their learned tokens on all processes, on ``device``."""
        # One process counts where the batches are; several gather the counts of their devices.
        counted_on = torch.device("cpu") if self.accelerator.num_processes == 1 else device
        batches, num_tokens = super().get_batch_samples(epoch_iterator, num_batches, counted_on)
        return batches, on_device(num_tokens, device) if isinstance(num_tokens, Tensor) else num_tokens

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """Gradients of the whole batch; returns its loss. The count of tokens continues from the trainer's state, which
        is in checkpoints; TRL would restart at 0."""
        self._total_train_tokens = self.state.num_input_tokens_seen
        micro_batches = self._micro_batches(inputs)
        metrics = self._metrics["train"]
        before = {name: len(values) for name, values in metrics.items()}
        total = torch.zeros((), device=self.args.device)
        with reused_norms(model), outside_of_data_loaders(self.accelerator):
            for number, (micro_batch, share) in enumerate(micro_batches):
                self._share = share
                last = self._keeps_gradients and number == len(micro_batches) - 1
                with accumulating(self.accelerator, model, last=last):
                    total += super().training_step(model, micro_batch, num_items_in_batch)
        shares = [share for _, share in micro_batches]
        _weigh(metrics, before, lambda name: self._metric_weights(name, shares))
        self.step_loss = total
        self.state.num_input_tokens_seen = self._total_train_tokens
        return total

    def try_rows(self, rows: Sequence[int]) -> None:
        """Computes a step's gradients of these rows and forgets them, with all else that a step leaves behind. Every
        process must call this, with equally many rows."""
        batch, num_tokens = self._batch_of(rows)
        metrics = {name: list(values) for name, values in self._metrics["train"].items()}
        tokens_seen, self._keeps_gradients = self.state.num_input_tokens_seen, False
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):
                self.training_step(self.model_wrapped, batch, num_tokens)
        finally:
            self._keeps_gradients, self.state.num_input_tokens_seen, self.step_loss = True, tokens_seen, None
            self._metrics["train"].clear()
            self._metrics["train"].update(metrics)
            self.model_wrapped.zero_grad(set_to_none=True)

    def learn_rows(self, rows: Sequence[int]) -> None:
        """Takes an optimiser step on these rows. Every process must call this, with equally many rows."""
        batch, num_tokens = self._batch_of(rows)
        self.training_step(self.model_wrapped, batch, num_tokens)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _batch_of(self, rows: Sequence[int]) -> tuple[Batch, Any]:
        self.current_gradient_accumulation_steps = 1  # as in a step, before which the trainer sets it
        batch = self.data_collator([self.train_dataset[row] for row in rows])
        _, num_tokens = self.get_batch_samples(iter([batch]), 1, self.args.device)
        return batch, num_tokens

    def _metric_weights(self, name: str, shares: Sequence[float]) -> Sequence[float]:
        return shares

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        """Weights a mean over pairs or rows by its share of the batch; a sum over tokens is already divided by all
        tokens."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss if self.unit is Unit.tokens else loss * self._share

    def held_out_loss(self, model: nn.Module, inputs: Batch) -> tuple[float, float, float]:
        """The loss of one micro-batch of held-out rows, with TRL's loss and masks as in training. Every process must
        call this, with equally many rows. Returns this process's loss, whose mean over all processes is that of all
        their rows; their accuracy; and how many pairs or learned tokens all processes have together. The model must be
        in evaluation mode."""
        if "attention_mask" not in inputs:  # packed rows are delimited by their position ids alone
            inputs = {name: inputs[name] for name in PACKED_COLUMNS}
        _, num_tokens = self.get_batch_samples(iter([inputs]), 1, self.args.device)
        inputs = sent(inputs, self.args.device)
        self._share = 1.0
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_tokens)
        accuracy = self._metrics["eval"][self.accuracy_metric][-1]
        num_pairs = len(inputs["input_ids"]) // 2 * self.accelerator.num_processes
        return float(loss), accuracy, float(num_pairs if self.unit is Unit.pairs else num_tokens)

    def _micro_batches(self, inputs: Batch) -> list[tuple[Batch, float]]:
        """Micro-batches on the device, with their shares of the pairs or rows, or of all processes' learned tokens.
        Every process must call this."""
        return [(sent(micro_batch, self.args.device), share) for micro_batch, share in self._divided(inputs)]

    def _divided(self, inputs: Batch) -> list[tuple[Batch, float]]:
        if "attention_mask" not in inputs:
            micro_batches = self._packed_micro_batches(inputs)
        else:
            if self.unit is Unit.pairs:
                return self._micro_batches_of_pairs(inputs)
            lengths = inputs["attention_mask"].sum(-1)
            if self.unit is Unit.rows:
                ranges = cut_alike(lengths, self.micro_batch_tokens, self.accelerator)
                return [(_rows_of(inputs, span, len(lengths)), len(span) / len(lengths)) for span in ranges]
            ranges = same_number_everywhere(by_tokens(lengths.tolist(), self.micro_batch_tokens), self.accelerator)
            micro_batches = [_rows_of(inputs, span, len(lengths)) for span in ranges]
        own = [int((micro_batch["labels"] != IGNORED).sum()) for micro_batch in micro_batches]
        learned = self.on_all_processes(torch.tensor(own)).tolist()  # TRL's figures of a micro-batch are of all of them
        return [
            (micro_batch, count / max(1, sum(learned)))
            for micro_batch, count in zip(micro_batches, learned, strict=True)
        ]

    def on_all_processes(self, counts: Tensor) -> Tensor:
        """The sums of these counts over all processes, which must all call this."""
        if self.accelerator.num_processes == 1:
            return counts
        return self.accelerator.reduce(counts.to(self.args.device), reduction="sum")

    def _micro_batches_of_pairs(self, inputs: Batch) -> list[tuple[Batch, float]]:
        ids, mask = on_host(inputs["input_ids"], inputs["attention_mask"])
        number = len(ids) // 2
        tokens = mask.sum(-1).view(-1, number).sum(0)
        if self.model.config._attn_implementation == ATTENTION:
            tokens -= shared_tokens(ids, mask)
        ranges = cut_alike(tokens, self.micro_batch_tokens, self.accelerator)
        return [(_pairs_of(inputs, span, number), len(span) / number) for span in ranges]

    def _packed_micro_batches(self, inputs: Batch) -> list[Batch]:
        """Micro-batches of packed rows ``[1, tokens]``, whose position ids restart at 0."""
        positions = inputs["position_ids"].flatten()
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
        lengths = [end - start for start, end in itertools.pairwise(starts)]
        ranges = same_number_everywhere(by_tokens(lengths, self.micro_batch_tokens), self.accelerator)
        return [self._packed_micro_batch(inputs, starts[span.start], starts[span.stop], starts[1]) for span in ranges]

    @staticmethod
    def _packed_micro_batch(inputs: Batch, start: int, end: int, first: int) -> Batch:
        """The columns from ``start`` to ``end``; if there are none, the first row without learned tokens."""
        columns = slice(start, end) if end > start else slice(0, first)
        columns_of_batch = {name: inputs[name][:, columns] for name in PACKED_COLUMNS}
        if end == start:
            columns_of_batch["labels"] = torch.full_like(columns_of_batch["labels"], IGNORED)
        return columns_of_batch


def shared_tokens(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """``[pairs]``: tokens that both rows of a pair share in a stream; chosen rows come before rejected rows. All
    tensors are on the CPU."""
    counts = []
    rows = [ids[real].tolist() for ids, real in zip(input_ids, attention_mask.bool(), strict=True)]
    for chosen, rejected in zip(rows[: len(rows) // 2], rows[len(rows) // 2 :], strict=True):
        same = itertools.takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))
        common = sum(1 for _ in same)
        counts.append(common if common >= SHORTEST_SHARED else 0)
    return torch.tensor(counts)


def _cut(value: Any, span: range, number: int) -> Any:
    return value[span.start : span.stop] if isinstance(value, Tensor) and value.shape[:1] == (number,) else value


def _rows_of(inputs: Batch, span: range, number: int) -> Batch:
    return {name: _cut(value, span, number) for name, value in inputs.items()}


def _pairs_of(inputs: Batch, span: range, number: int) -> Batch:
    """Both rows of each pair in ``span``; columns such as a margin or a reference have one entry per pair."""
    pairs = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape[:1] == (2 * number,):
            pairs[name] = torch.cat([half[span.start : span.stop] for half in value.split(number)])
        else:
            pairs[name] = _cut(value, span, number)
    return pairs


def _weigh(
    metrics: dict[str, list[float]], before: dict[str, int], weights_of: Callable[[str], Sequence[float]]
) -> None:
    """Combines the metrics that the micro-batches appended: extremes of extremes, weighted means of others."""
    for name, values in metrics.items():
        added, weights = values[before.get(name, 0) :], weights_of(name)
        if len(added) != len(weights) or len(added) < 2:  # none: a batch without answers of a label
            continue
        if name.startswith(("min_", "max_")):
            combined = min(added) if name.startswith("min_") else max(added)
        else:
            combined = sum(value * weight for value, weight in zip(added, weights, strict=True)) / sum(weights)
        values[before.get(name, 0) :] = [combined]
