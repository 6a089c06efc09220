"""The first batch of pairs: before the first step it shows whether the reference is the starting policy, and after the
last one, whether the answers became more or less likely."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from alignment.config.model import Dtype
from alignment.data.tokens.row_kinds import MARGIN
from alignment.stages.dpo.pair_losses import PairLogprobs
from alignment.stages.dpo.pair_trainer import PairTrainer
from alignment.stages.shared.reference import StartRow, refuse_other_reference
from alignment.training.micro_batches import Batch
from alignment.training.sharding import everyones


class FirstBatch:
    """The first batch, of which each process has its share, and the policy's log-probabilities of it at the start."""

    def __init__(self, trainer: PairTrainer) -> None:
        self._trainer = trainer
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()  # as in training, so that active dropout is noticed
        self._micro_batches: list[Batch] = [micro_batch for micro_batch, _ in trainer._micro_batches(batch)]
        chosen, rejected = self._of_all(lambda inputs: trainer.logprobs_of(trainer.model, inputs))
        chosen_tokens, rejected_tokens = self._of_all(lambda inputs: inputs["completion_mask"].sum(-1).chunk(2))
        margins, _ = self._of_all(_margins)
        self.start = PairLogprobs(
            chosen=chosen,
            rejected=rejected,
            chosen_tokens=chosen_tokens,
            rejected_tokens=rejected_tokens,
            reference_chosen=chosen,
            reference_rejected=rejected,
            margins=margins,
        )

    def changes(self) -> dict[str, float]:
        """By how many nats the log-probability of an answer has changed since the start, on average.

        Call it after training, on every process.
        """
        chosen, rejected = self._of_all(lambda inputs: self._trainer.logprobs_of(self._trainer.model_wrapped, inputs))
        return {
            "logps/chosen_change": float((chosen - self.start.chosen).mean()),
            "logps/rejected_change": float((rejected - self.start.rejected).mean()),
        }

    def refuse_other_start(self) -> None:
        """Raises StageError unless policy and reference agree on every answer.

        A precomputed reference must have the policy's numbers in its own micro-batches, and the rows of this batch.
        """
        precomputed = self._trainer.precomputed
        if precomputed is not None:
            refuse_other_reference(precomputed.start_rows())
        reference = torch.cat(self._of_all(self._trainer.reference_logprobs))
        policy = torch.cat([self.start.chosen, self.start.rejected])
        tokens = torch.cat([self.start.chosen_tokens, self.start.rejected_tokens]).int()
        rows = zip(policy.tolist(), reference.tolist(), tokens.tolist(), strict=True)
        is_rounded = precomputed is not None and precomputed.own.dtype is Dtype.bfloat16
        refuse_other_reference((StartRow(*row) for row in rows), is_rounded=is_rounded)

    def _of_all(self, values: Callable[[Batch], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """``[pairs]`` values of chosen and of rejected answers, of all processes, on the CPU."""
        own = [[side.float().cpu() for side in values(inputs)] for inputs in self._micro_batches]
        chosen, rejected = zip(*(side for share in everyones(own) for side in share), strict=True)
        return torch.cat(chosen), torch.cat(rejected)


def _margins(inputs: Batch) -> tuple[Tensor, Tensor]:
    margins = inputs[MARGIN] if MARGIN in inputs else torch.zeros(len(inputs["input_ids"]) // 2)
    return margins, margins
