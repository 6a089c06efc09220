"""An optimiser batch in pieces that fit in memory, measured in tokens: a stream has no padding, so they are the cost.

The trainer hands over the process's whole share of an optimiser batch. It is learned from piece by piece, and the loss
is that of the whole: the token mean over all pieces and processes in SFT, the mean over all pairs elsewhere.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import Trainer

from alignment.models.forward.attention import ATTENTION
from alignment.models.forward.causal import IGNORED
from alignment.models.forward.rows import SHORTEST_SHARED, by_tokens

Batch = dict[str, Any]


def same_number_everywhere(pieces: list[range], accelerator: Accelerator) -> list[range]:
    """As many pieces as the process with most of them has, because TRL's trainers meet in each; some may be empty."""
    if accelerator.num_processes == 1:
        return pieces
    number = torch.tensor(len(pieces), device=accelerator.device)
    torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
    return divided(pieces, int(number))


def cut_alike(tokens: Tensor, limit: int, accelerator: Accelerator) -> list[range]:
    """The same pieces on every process, of ``[rows]`` tokens, as many rows on each: none is too large anywhere.

    TRL's trainers of pairs put figures of single pairs together, for which a piece must hold equally many everywhere.
    """
    if accelerator.num_processes > 1:
        tokens = tokens.to(accelerator.device, copy=True)
        torch.distributed.all_reduce(tokens, op=torch.distributed.ReduceOp.MAX)
    return by_tokens(tokens.tolist(), limit)


def as_many_as_most(shares: Sequence[list[range]], own: int) -> list[range]:
    """The same where every process knows how all cut their shares, without asking; ``own`` is this one's place."""
    return divided(shares[own], max(1, *(len(pieces) for pieces in shares)))


def divided(pieces: list[range], wanted: int) -> list[range]:
    """The rows of ``pieces`` in ``wanted`` pieces, which are not fewer: the longest are halved, so that none grows, and
    the last ones are empty if rows run out."""
    parts = list(pieces)
    while len(parts) < wanted:
        at = max(range(len(parts)), key=lambda number: len(parts[number]), default=None)
        if at is None or len(parts[at]) < 2:
            rows = parts[-1].stop if parts else 0
            return parts + [range(rows, rows)] * (wanted - len(parts))
        start, end = parts[at].start, parts[at].stop
        middle = (start + end) // 2
        parts[at : at + 1] = [range(start, middle), range(middle, end)]
    return parts


@contextlib.contextmanager
def accumulating(accelerator: Accelerator, model: nn.Module, *, last: bool) -> Iterator[None]:
    """Forward and backward of one piece; gradients meet across processes with the last one only.

    DDP decides in the forward pass whether the backward pass synchronises, DeepSpeed in the backward pass by the flag.
    """
    accelerator.gradient_state._set_sync_gradients(last)
    with contextlib.nullcontext() if last else accelerator.no_sync(model):
        yield


class MicroBatches(Trainer):
    """Mixed into TRL's trainers. Their batches are padded rows or packed ones (SFT), or pairs: chosen, then rejected.

    ``micro_batch_tokens`` limits a piece; set it after construction.
    """

    micro_batch_tokens: int
    pairs: bool = False
    step_loss: Tensor | None = None
    _share: float = 1.0

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """Gradients of the whole batch; returns its loss.

        The count of tokens goes on from the trainer's state, which a checkpoint holds; TRL would begin again at 0.
        """
        self._total_train_tokens = self.state.num_input_tokens_seen
        parts = self._parts(inputs)
        metrics = self._metrics["train"]
        before = {name: len(values) for name, values in metrics.items()}
        total = torch.zeros((), device=self.args.device)
        for number, (part, share) in enumerate(parts):
            self._share = share
            with accumulating(self.accelerator, model, last=number == len(parts) - 1):
                total += super().training_step(model, part, num_items_in_batch)
        _weigh(metrics, before, [share for _, share in parts])
        self.step_loss = total
        self.state.num_input_tokens_seen = self._total_train_tokens
        return total

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        """A mean over pairs counts for its share of the batch; a sum over tokens was divided by all of them."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * self._share if self.pairs else loss

    def _parts(self, inputs: Batch) -> list[tuple[Batch, float]]:
        """Pieces with their shares: of the pairs, or of the tokens learned from."""
        if "attention_mask" not in inputs:
            parts = self._packed_parts(inputs)
        else:
            lengths = inputs["attention_mask"].sum(-1)
            number = len(lengths) // 2 if self.pairs else len(lengths)
            tokens = lengths.view(-1, number).sum(0)
            if self.pairs and self.model.config._attn_implementation == ATTENTION:
                tokens -= shared_tokens(inputs["input_ids"], inputs["attention_mask"])
            if self.pairs:
                pieces = cut_alike(tokens, self.micro_batch_tokens, self.accelerator)
                return [(_pairs_of(inputs, piece, number), len(piece) / number) for piece in pieces]
            pieces = same_number_everywhere(by_tokens(tokens.tolist(), self.micro_batch_tokens), self.accelerator)
            parts = [{name: _cut(value, piece, number) for name, value in inputs.items()} for piece in pieces]
        learned = [int((part["labels"] != IGNORED).sum()) for part in parts]
        return [(part, count / max(1, sum(learned))) for part, count in zip(parts, learned, strict=True)]

    def _packed_parts(self, inputs: Batch) -> list[Batch]:
        """Rows stand one after another in ``[1, tokens]``, their position ids from 0."""
        positions = inputs["position_ids"].flatten()
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
        lengths = [end - start for start, end in itertools.pairwise(starts)]
        pieces = same_number_everywhere(by_tokens(lengths, self.micro_batch_tokens), self.accelerator)
        return [self._packed_part(inputs, starts[piece.start], starts[piece.stop], starts[1]) for piece in pieces]

    @staticmethod
    def _packed_part(inputs: Batch, start: int, end: int, first: int) -> Batch:
        """The columns from ``start`` to ``end``; where there are none, the first row with nothing to learn in it."""
        columns = slice(start, end) if end > start else slice(0, first)
        part = {name: inputs[name][:, columns] for name in ("input_ids", "labels", "position_ids")}
        if end == start:
            part["labels"] = torch.full_like(part["labels"], IGNORED)
        return part


def shared_tokens(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """``[pairs]`` tokens that stand once in a stream with both rows of a pair, chosen rows before rejected ones."""
    found = []
    rows = [ids[real].tolist() for ids, real in zip(input_ids.cpu(), attention_mask.bool().cpu(), strict=True)]
    for chosen, rejected in zip(rows[: len(rows) // 2], rows[len(rows) // 2 :], strict=True):
        same = itertools.takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))
        common = sum(1 for _ in same)
        found.append(common if common >= SHORTEST_SHARED else 0)
    return torch.tensor(found, device=input_ids.device)


def _cut(value: Any, piece: range, number: int) -> Any:
    """The rows of a column that has one entry a row."""
    return value[piece.start : piece.stop] if isinstance(value, Tensor) and value.shape[:1] == (number,) else value


def _pairs_of(inputs: Batch, piece: range, number: int) -> Batch:
    """Both rows of each pair of a column that has two entries a pair; a margin or a reference has one."""
    found = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape[:1] == (2 * number,):
            found[name] = torch.cat([half[piece.start : piece.stop] for half in value.split(number)])
        else:
            found[name] = _cut(value, piece, number)
    return found


def _weigh(metrics: dict[str, list[float]], before: dict[str, int], shares: Sequence[float]) -> None:
    """Figures that each piece appended become one: the extreme of extremes, the mean by share of all others."""
    for name, values in metrics.items():
        added = values[before.get(name, 0) :]
        if len(added) != len(shares) or len(shares) == 1:
            continue
        if name.startswith(("min_", "max_")):
            one = min(added) if name.startswith("min_") else max(added)
        else:
            one = sum(value * share for value, share in zip(added, shares, strict=True)) / sum(shares)
        values[before.get(name, 0) :] = [one]
