"""TRL's trainer for Kahneman–Tversky optimisation, with the KL divergence of the whole batch in every micro-batch.

TRL estimates the divergence from the rows that it is given at once. As the loss is not linear in it, the size of a
micro-batch and the number of processes would change what is learned. Here the mismatched answers of the batch come
first, without gradients, and all micro-batches of all processes take the mean over them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from trl import KTOTrainer

from alignment.models.forward.transfer import on_host
from alignment.stages.shared.reference import AgainstStart, StartRow, answer_logprobs
from alignment.training.micro_batches import Batch, Unit

TEXT = ("input_ids", "attention_mask", "completion_mask")
OTHER = "KL_"
"""Prefix of the columns of mismatched answers."""
REFERENCE, OTHER_REFERENCE, LABEL = "ref_logps", "ref_KL_logps", "label"
CHOSEN, REJECTED, MARGINS = "rewards/chosen", "rewards/rejected", "rewards/margins"


class TokenizedKtoTrainer(AgainstStart, KTOTrainer):
    """TRL's trainer on tokenised rows, with each optimiser batch split into micro-batches."""

    unit = Unit.rows
    _divergence: Tensor
    _label_counts: Mapping[str, Sequence[float]]

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """Gradients of the whole batch; returns its loss."""
        metrics = self._metrics["train"]
        before = {name: len(metrics[name]) if name in metrics else 0 for name in (CHOSEN, REJECTED, MARGINS)}
        batch = self.with_estimates(model, inputs)
        self._label_counts = self._counted(batch)
        loss = super().training_step(model, batch, num_items_in_batch)
        rewards = [metrics[name][before[name] :] for name in (CHOSEN, REJECTED) if name in metrics]
        if len(rewards) == 2 and all(rewards):
            metrics[MARGINS][before[MARGINS] :] = [rewards[0][0] - rewards[1][0]]
        return loss

    @torch.no_grad()
    def with_estimates(self, model: nn.Module, inputs: Batch) -> Batch:
        """The batch with the reference's log-probabilities, and without the mismatched answers.

        What remains of these is the estimate of the divergence. Every process must call this.
        """
        parts = [part for part, _ in self._micro_batches(inputs)]
        batch = {name: value for name, value in inputs.items() if not name.startswith(OTHER)}
        with self.accelerator.autocast():
            batch[REFERENCE] = torch.cat([self._of_reference(part, REFERENCE, part) for part in parts])
            if self.calculate_KL:
                log_ratios = [
                    answer_logprobs(model, _others(part)) - self._of_reference(part, OTHER_REFERENCE, _others(part))
                    for part in parts
                ]
                self._divergence = self.accelerator.gather(torch.cat(log_ratios).mean()).mean()
                batch[OTHER_REFERENCE] = torch.zeros_like(batch[REFERENCE])  # it is in the divergence already
        return batch

    def _of_reference(self, batch: Batch, column: str, rows: Batch) -> Tensor:
        """``[rows]`` log-probabilities by the reference: the column, or those of ``rows``.

        The policy reads the same rows at once, so that both are rounded alike.
        """
        known: Tensor | None = batch.get(column)
        return answer_logprobs(self.ref_model, rows) if known is None else known

    def _compute_kl_logps(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """TRL takes the mean of these, less ``ref_KL_logps``, over the micro-batch and all processes."""
        return self._divergence.expand(len(batch[LABEL])) if self.calculate_KL else None

    def _counted(self, batch: Batch) -> Mapping[str, Sequence[float]]:
        """The rows of each label in each micro-batch, of all processes; those of no row are left out."""
        labels = [on_host(part[LABEL])[0].bool() for part, _ in self._micro_batches(batch)]
        counts = torch.tensor([[int(own.sum()), int((~own).sum())] for own in labels])
        chosen, rejected = self.on_all_processes(counts).T.tolist()
        return {"chosen": list(filter(None, chosen)), "rejected": list(filter(None, rejected))}

    def _metric_weights(self, name: str, shares: Sequence[float]) -> Sequence[float]:
        """A mean over the rows of a label is weighted by their number."""
        return self._label_counts.get(name.rpartition("/")[2], shares)

    def start_rows(self, batch: Batch) -> Iterator[StartRow]:
        """One row for each answer of a batch, before anything is learned."""
        for part, _ in self._micro_batches(batch):
            with torch.no_grad(), self.accelerator.autocast():
                policy = answer_logprobs(self.model, part)
                reference = self._of_reference(part, REFERENCE, part)
            tokens = part["completion_mask"].sum(-1)
            for row in zip(policy.tolist(), reference.tolist(), tokens.tolist(), strict=True):
                yield StartRow(*row)


def _others(batch: Batch) -> Batch:
    return {name: batch[OTHER + name] for name in TEXT}
