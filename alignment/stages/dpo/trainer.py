"""Losses on pairs, their trainer, and the check of the first batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer

from alignment.algos import preferences
from alignment.data.tokens.row_kinds import MARGIN
from alignment.stages.dpo.kind import DpoConfig, DpoLoss
from alignment.stages.shared.reference import AgainstStart, Reference, StartRow, answer_logprobs, refuse_other_start
from alignment.training.micro_batches import Batch, Unit
from alignment.training.sharding import everyones


@dataclass(frozen=True, kw_only=True, slots=True)
class PairLogprobs:
    """``[pairs]`` log-probabilities of answers in nats, and the tokens of each answer. The reference's are 0 for a loss
    without a reference. ``margins`` are score differences; 0 if rows have none."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    margins: Tensor

    @property
    def mean_chosen(self) -> Tensor:
        """log p(chosen) divided by its tokens."""
        return self.chosen / self.chosen_tokens

    @property
    def mean_rejected(self) -> Tensor:
        """log p(rejected) divided by its tokens."""
        return self.rejected / self.rejected_tokens

    def gaps(self, beta: float, *, by_token: bool) -> Tensor:
        """β times the log-ratio of the chosen answer, less that of the rejected one; sums, or means ``by_token``."""
        chosen, rejected = self.chosen - self.reference_chosen, self.rejected - self.reference_rejected
        if by_token:
            chosen, rejected = chosen / self.chosen_tokens, rejected / self.rejected_tokens
        return beta * (chosen - rejected)


PairLoss = Callable[[PairLogprobs], Tensor]
"""A loss for each pair."""
RewardsOf = Callable[[PairLogprobs], tuple[Tensor, Tensor]]
"""By what answers are ranked: ``[pairs]`` of the chosen and of the rejected ones."""


def own_loss(config: DpoConfig) -> PairLoss | None:
    """The loss of these settings without ``nll_weight``; None if TRL's trainer has it."""
    by_token, beta = config.loss is DpoLoss.sigmoid_norm, config.beta
    if config.loss is DpoLoss.simpo:
        simpo = partial(preferences.simpo, beta=beta, target_margin=config.target_margin or 0.0)
        return lambda pairs: simpo(pairs.mean_chosen, pairs.mean_rejected)
    if config.loss is DpoLoss.orpo:  # Hong et al. 2024, eq. 6
        ratio, weight = preferences.odds_ratio, config.odds_weight
        return lambda pairs: nll_of_chosen(pairs) + weight * ratio(pairs.mean_chosen, pairs.mean_rejected)
    if config.label_smoothing and config.loss is not DpoLoss.robust:
        flipped = config.label_smoothing
        return lambda pairs: preferences.conservative(pairs.gaps(beta, by_token=by_token), flipped=flipped)
    if config.margin:
        return lambda pairs: preferences.offset(pairs.gaps(beta, by_token=False), config.margin * pairs.margins)
    return None


def implicit_rewards(config: DpoConfig) -> RewardsOf | None:
    """By what a loss without a reference ranks answers, chosen and rejected; None for TRL's β times log-ratio."""
    if config.loss is DpoLoss.simpo:
        return lambda pairs: (config.beta * pairs.mean_chosen, config.beta * pairs.mean_rejected)
    if config.loss is DpoLoss.orpo:
        return lambda pairs: (preferences.log_odds(pairs.mean_chosen), preferences.log_odds(pairs.mean_rejected))
    return None


def nll_of_chosen(pairs: PairLogprobs) -> Tensor:
    """−log p(chosen) divided by its tokens (Pang et al. 2024); TRL's is a mean over all tokens of a micro-batch."""
    return -pairs.mean_chosen


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
    loss, and ``implicit_rewards`` replace TRL's."""

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
        margins, _ = _margins(inputs)
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
        metrics = self._metrics["train" if self.model.training else "eval"]
        chosen, rejected = (self.accelerator.gather(rewards.detach()) for rewards in (chosen, rejected))
        is_right = (chosen > rejected).float()
        means = torch.stack([values.mean() for values in (chosen, rejected, is_right, chosen - rejected)]).tolist()
        for name, mean in zip(("chosen", "rejected", "accuracies", "margins"), means, strict=True):
            metrics[f"rewards/{name}"][-1] = mean


def pairs_of(logprobs: Tensor, inputs: Batch, margins: Tensor) -> PairLogprobs:
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
        """By how many nats the log-probability of an answer has changed since the start, on average. Call it after
        training, on every process."""
        chosen, rejected = self._of_all(lambda inputs: self._trainer.logprobs_of(self._trainer.model_wrapped, inputs))
        return {
            "logps/chosen_change": float((chosen - self.start.chosen).mean()),
            "logps/rejected_change": float((rejected - self.start.rejected).mean()),
        }

    def refuse_other_start(self) -> None:
        """Raises StageError unless policy and reference agree on every answer."""
        reference = torch.cat(self._of_all(self._trainer.reference_logprobs))
        policy = torch.cat([self.start.chosen, self.start.rejected])
        tokens = torch.cat([self.start.chosen_tokens, self.start.rejected_tokens]).int()
        rows = zip(policy.tolist(), reference.tolist(), tokens.tolist(), strict=True)
        refuse_other_start(self._trainer, (StartRow(*row) for row in rows))

    def _of_all(self, values: Callable[[Batch], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """``[pairs]`` values of chosen and of rejected answers, of all processes, on the CPU."""
        own = [[side.float().cpu() for side in values(inputs)] for inputs in self._micro_batches]
        chosen, rejected = zip(*(side for share in everyones(own) for side in share), strict=True)
        return torch.cat(chosen), torch.cat(rejected)


def _margins(inputs: Batch) -> tuple[Tensor, Tensor]:
    margins = inputs[MARGIN] if MARGIN in inputs else torch.zeros(len(inputs["input_ids"]) // 2)
    return margins, margins
