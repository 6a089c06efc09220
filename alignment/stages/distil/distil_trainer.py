"""TRL's trainer of next tokens with another loss: the student's divergence from its teacher at each answer token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignment.models.forward.distilled import learned_positions, teaching_at
from alignment.stages.shared.language_model import MicroBatchedSftTrainer
from alignment.training.micro_batches import Batch

ACCEPTANCE, SAME_TOP = "acceptance", "same_top"


class DistilTrainer(MicroBatchedSftTrainer):
    """Minimises the mean of Σ p (log p − log q) over all answer tokens of an optimiser batch.

    The model must have ``install_divergence``. ``teacher`` is whole on every process, frozen and without wrappers.
    """

    teacher: PreTrainedModel
    temperature: float
    _sums: Tensor

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """Gradients of the whole batch; returns its loss."""
        self._sums = torch.zeros(4, device=self.args.device, dtype=torch.float64)
        loss = super().training_step(model, inputs, num_items_in_batch)
        read, learned, accepted, same = self.accelerator.reduce(self._sums, reduction="sum").tolist()
        self._total_train_tokens += int(read)
        self.state.num_input_tokens_seen = self._total_train_tokens
        metrics = self._metrics["train"]
        metrics["num_tokens"] = [self._total_train_tokens]
        metrics[ACCEPTANCE].append(accepted / max(1.0, learned))
        metrics[SAME_TOP].append(same / max(1.0, learned))
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """This process's part of the loss of a micro-batch, scaled as the trainer's other losses are.

        It is divided by the learned tokens of all processes, over which the gradient is then averaged.
        """
        rows, indices = learned_positions(inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
        with torch.no_grad():
            teaching = teaching_at(self.teacher, rows, indices)
        divergence, acceptance, is_same_top = model(
            rows=rows, indices=indices, teaching=teaching, temperature=self.temperature
        )
        learned = self._sums.new_full((), len(indices))
        counts = [inputs["attention_mask"].sum(), learned, acceptance.sum(), is_same_top.sum()]
        self._sums += torch.stack([count.to(self._sums) for count in counts])
        total = torch.as_tensor(len(indices) if num_items_in_batch is None else num_items_in_batch)
        loss: Tensor = divergence.sum() / total.to(divergence.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return loss
