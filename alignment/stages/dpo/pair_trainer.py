"""TRL's DPO trainer on tokenised pairs, with the losses that it lacks.

TRL computes the forward passes, the metrics and its own losses. Where the stage has a loss of ours (pair_losses), TRL's
is dropped, and ours is computed from the log-probabilities of the same forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer

from alignment.data.tokens.row_kinds import MARGIN
from alignment.stages.dpo.pair_losses import PairLogprobs, PairLoss, RewardsOf, nll_of_chosen
from alignment.stages.shared.reference import AgainstStart, Reference, answer_logprobs
from alignment.training.micro_batches import Batch, Unit


class WithMargins:
    """TRL's collator, which drops margins, and the margins."""

    def __init__(self, collator: Any) -> None:
        self._collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> Batch:
        batch: Batch = self._collator(examples)
        batch[MARGIN] = torch.tensor([example[MARGIN] for example in examples], dtype=torch.float32)
        return batch


class PairTrainer(AgainstStart, DPOTrainer):
    """TRL's trainer, with each optimiser batch split into micro-batches. Set what is not TRL's after construction.

    ``own_loss`` replaces TRL's loss, ``nll_weight`` times the chosen answer's negative log-likelihood is added to the
    loss, and ``implicit_rewards`` replace TRL's.
    """

    unit = Unit.pairs
    accuracy_metric = "rewards/accuracies"
    precomputed_held_out: Reference | None = None
    own_loss: PairLoss | None = None
    implicit_rewards: RewardsOf | None = None
    nll_weight: float = 0.0

    @property
    def has_own_terms(self) -> bool:
        """Whether TRL's loss alone is not the stage's loss."""
        return self.own_loss is not None or self.nll_weight > 0

    def logprobs_of(self, model: Any, inputs: Batch) -> tuple[Tensor, Tensor]:
        """``[pairs]`` log-probabilities of the chosen and of the rejected answers, in nats, without gradients."""
        with torch.no_grad(), self.accelerator.autocast():
            chosen, rejected = answer_logprobs(model, inputs).chunk(2)
        return chosen, rejected

    def _compute_loss(self, model: Any, inputs: Batch, return_outputs: bool) -> Tensor:
        """The mean loss of the pairs, and TRL's metrics of them."""
        margins = inputs.get(MARGIN)
        inputs = {name: value for name, value in inputs.items() if name != MARGIN}
        # Before the policy's activations are in memory.
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = self.reference_logprobs(inputs)
        if not self.has_own_terms:
            return super()._compute_loss(model, inputs, return_outputs)
        outputs = []

        def recorded(**kwargs: Any) -> Any:
            outputs.append(model(**kwargs))
            return outputs[-1]

        loss = super()._compute_loss(recorded, inputs, return_outputs)
        pairs = pairs_of(outputs[0].log_probs.sum(-1), inputs, margins)
        if self.own_loss is not None:
            loss = self.own_loss(pairs).mean()
        if self.implicit_rewards is not None:
            self._report(*self.implicit_rewards(pairs))
        return loss + self.nll_weight * nll_of_chosen(pairs).mean() if self.nll_weight else loss

    def reference_logprobs(self, inputs: Batch) -> tuple[Tensor, Tensor]:
        """Like ``logprobs_of`` of the reference, computed now or beforehand; zeros for a loss without a reference."""
        if "ref_chosen_logps" in inputs:
            return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        if self.needs_reference:
            return self.logprobs_of(self.ref_model, inputs)
        zeros = torch.zeros(len(inputs["input_ids"]) // 2, device=inputs["input_ids"].device)
        return zeros, zeros

    def _report(self, chosen: Tensor, rejected: Tensor) -> None:
        """Replaces the rewards among the metrics that TRL has just added."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        chosen, rejected = (self.accelerator.gather(rewards.detach()) for rewards in (chosen, rejected))
        is_right = (chosen > rejected).float()
        means = torch.stack([values.mean() for values in (chosen, rejected, is_right, chosen - rejected)]).tolist()
        for name, mean in zip(("chosen", "rejected", "accuracies", "margins"), means, strict=True):
            metrics[f"rewards/{name}"][-1] = mean


def pairs_of(logprobs: Tensor, inputs: Batch, margins: Tensor | None) -> PairLogprobs:
    """The log-probabilities ``[2 * pairs]`` of a batch, chosen answers first, with those of the reference."""
    chosen, rejected = logprobs.chunk(2)
    chosen_tokens, rejected_tokens = inputs["completion_mask"].sum(-1).chunk(2)
    return PairLogprobs(
        chosen=chosen,
        rejected=rejected,
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
        reference_chosen=inputs["ref_chosen_logps"],
        reference_rejected=inputs["ref_rejected_logps"],
        margins=margins,
    )
