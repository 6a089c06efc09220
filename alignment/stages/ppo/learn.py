"""The second phase of an update: the gradients of its minibatches. The minibatches of an update are the same in every
epoch, where Huang et al. 2024 draw new ones: then old log-probabilities can be computed in the micro-batches that are
learned from (docs/design/0059)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignment.algos.ppo import clipped_value_loss, explained_variance, k3, value_is_clipped
from alignment.data.tokens.tokenize import IGNORED, TokenizedConversation
from alignment.models.assembly.heads import ValueLoss
from alignment.models.assembly.load import products_in
from alignment.models.assembly.roles import Roles
from alignment.models.forward.answers import answer_stream, unwrapped
from alignment.models.forward.flat import trunk_states
from alignment.models.forward.head import label_statistics
from alignment.models.forward.rows import by_tokens, on_device, on_host, sent, stream
from alignment.models.kernels.nf4 import reused_norms
from alignment.stages.ppo.config import PpoConfig
from alignment.stages.ppo.experience import Experience, ScoredBatch, prompt_order, spread
from alignment.stages.ppo.kind import SCORE_STD
from alignment.stages.ppo.objective import Advantages, PolicyLoss, PolicyObjective, Sampled
from alignment.stages.ppo.rollouts import Episodes
from alignment.stages.ppo.step_metrics import UpdateMetrics
from alignment.training.context import StageContext
from alignment.training.micro_batches import accumulating, as_many_as_most


@dataclass(eq=False)
class Ptx:
    """Adds ``coefficient`` times the token-mean loss of a few conversations to the gradients of each optimiser step."""

    rows: Sequence[TokenizedConversation]
    context: StageContext
    coefficient: float
    batch_size: int

    def add_gradients(self, policy: PreTrainedModel, step: int, accelerator: Accelerator, *, tokens: int) -> Tensor:
        """Returns this process's share of the loss of the step's conversations, without the coefficient. A micro-batch
        has at most so many ``tokens``. Gradients stay local in the parameters; the caller must synchronise them in a
        later backward pass."""
        size = self.batch_size
        batch = prompt_order(len(self.rows), step * size, size, lambda round_: self.context.generator("ptx", round_))
        rows = [self.rows[index] for index in batch]
        learned = sum(label != IGNORED for row in rows for label in row.labels)
        shares = [rows[rank :: self.context.world_size] for rank in range(self.context.world_size)]
        lengths = [[len(row.input_ids) for row in share] for share in shares]
        own = shares[self.context.rank]
        total = torch.zeros((), device=self.context.device)
        for indices in as_many_as_most([by_tokens(share, tokens) for share in lengths], self.context.rank):
            # Every micro-batch is a collective call, so an empty one reads a row with weight 0.
            read, counted = ([own[index] for index in indices], learned) if indices else (rows[:1], math.inf)
            with products_in(self.context.spec.model.dtype, self.context.device):
                loss = _loss_sum(policy, read, self.context.device) / counted
            # Gradients are averaged over processes, but this loss is a sum.
            accelerator.backward(loss * self.coefficient * self.context.world_size)
            total += loss.detach()
        return total


def _loss_sum(policy: PreTrainedModel, rows: Sequence[TokenizedConversation], device: torch.device) -> Tensor:
    flat = stream([row.input_ids for row in rows], device)
    learned = [(row, column) for row, tokens in enumerate(rows) for column, label in _learned(tokens)]
    labels = [label for tokens in rows for _, label in _learned(tokens)]
    (index,), at = on_host(flat.index), torch.tensor(learned)
    before = index[at[:, 0], at[:, 1] - 1]  # the state before a token predicts it
    tensors = sent({"before": before, "labels": torch.tensor(labels)}, device)
    states = trunk_states(policy.base_model, flat)[tensors["before"]]
    return -label_statistics(policy, states, tensors["labels"]).logprobs.sum()


def _learned(row: TokenizedConversation) -> list[tuple[int, int]]:
    """Column and id of every learned token; a row's first token is never predicted."""
    return [(column, label) for column, label in enumerate(row.labels) if column and label != IGNORED]


def add_scores(metrics: UpdateMetrics, batch: ScoredBatch) -> None:
    """Adds each scorer's mean score, those of ensembles and penalties, and the standard deviation of the scores that
    PPO maximises, if there are several."""
    by_scorer = {f"score/{name}": values for name, values in batch.by_scorer.by_name().items()}
    metrics.values |= {name: float(values.mean()) for name, values in (by_scorer | dict(batch.parts)).items()}
    scores = batch.scores
    if len(scores) > 1:
        # The deviation of equal scores would be that of their rounded mean.
        is_equal = bool(scores.max() == scores.min())
        metrics.values[SCORE_STD] = 0.0 if is_equal else float(scores.std(unbiased=False))


def add_episodes(
    metrics: UpdateMetrics, batch: ScoredBatch, advantages: Advantages, *, kl_coefficient: float, base_copies: float
) -> None:
    """Adds metrics of the episodes; those summed over tokens are means over episodes, the others over answer tokens."""
    mask = batch.response_mask
    kl = batch.kl.sum(-1)
    episodes = {
        "objective/kl": kl,
        "objective/kl_k3": (k3(batch.logprobs, batch.reference_logprobs) * mask).sum(-1),
        # The objective, before any baseline or scaling.
        "objective/rlhf_reward": batch.scores - kl_coefficient * kl,
        "objective/score": batch.scores,
        "eos_rate": batch.ended.float(),
        "response_length": mask.sum(-1).float(),
    }
    tokens = {"objective/entropy": batch.entropy, "val/advantages": advantages.raw}
    if batch.values is not None and advantages.returns is not None:
        tokens |= {"val/returns": advantages.returns, "val/values": batch.values}
        metrics.values["val/explained_variance"] = explained_variance(batch.values, advantages.returns, mask)
    metrics.add_means(episodes, torch.ones_like(batch.scores))
    metrics.add_means(tokens, mask)
    metrics.values["objective/kl_coef"] = kl_coefficient
    metrics.values["memory/base_copies"] = base_copies


@dataclass(eq=False)
class Learner:
    """Computes the gradients of one minibatch at a time. ``autocast`` is the trainer's, for forward passes."""

    roles: Roles
    config: PpoConfig
    context: StageContext
    objective: PolicyObjective
    episodes: Episodes
    ptx: Ptx | None
    metrics: UpdateMetrics
    accelerator: Accelerator
    autocast: Callable[[], AbstractContextManager[Any]]

    def learn(self, model: nn.Module, experience: Experience, minibatch: int, *, update: int, step: int) -> None:
        """Computes the gradients of a minibatch of the experience and leaves them in the parameters."""
        policy_learns = update >= self.config.critic_warmup
        with reused_norms(model):
            if self.ptx is not None and policy_learns:
                self._add_ptx(self.ptx, model, step)
            self._backward(model, experience, minibatch, policy_learns=policy_learns)
        if not policy_learns:
            for parameter in self.roles.policy.parameters():
                if parameter.requires_grad:
                    parameter.grad = None  # with zero gradients, Adam would count the step

    def minibatch(self, update: int, step_of_update: int) -> int:
        """The index of the minibatch to learn from; in every epoch, those of the update have another order."""
        epoch, step = divmod(step_of_update, self.config.num_minibatches)
        order = torch.randperm(self.config.num_minibatches, generator=self.context.generator("epoch", update, epoch))
        return int(order[step])

    def order(self, update: int) -> list[int]:
        """The prompts of an update, in the random order in which they are divided into minibatches."""
        generator = self.context.generator("minibatches", update)
        order: list[int] = torch.randperm(self.episodes.prompts_per_update, generator=generator).tolist()
        return order

    def _add_ptx(self, ptx: Ptx, model: nn.Module, step: int) -> None:
        with accumulating(self.accelerator, model, last=False):
            tokens = self.episodes.micro_batch_tokens
            share = ptx.add_gradients(unwrapped(self.roles.policy), step, self.accelerator, tokens=tokens)
        self.metrics.add_share({"loss/ptx": share})

    def _backward(self, model: nn.Module, experience: Experience, minibatch: int, *, policy_learns: bool) -> None:
        """The loss is a sum over the minibatch divided by one number, over all micro-batches and processes."""
        every = experience.partition.rows_of(minibatch)
        mask = experience.response_mask[self._at(every)]
        tokens, divisor = mask.sum().float(), self.objective.divisor(mask)  # of the whole minibatch
        micro_batches = experience.partition.minibatches[minibatch][self.context.rank]
        for number, rows in enumerate(micro_batches):
            # Every micro-batch is a collective call, so an empty one reads a row with weight 0.
            read, by = (rows, (tokens, divisor)) if rows else (every[:1], (tokens * math.inf, divisor * math.inf))
            with accumulating(self.accelerator, model, last=number == len(micro_batches) - 1):
                with self.autocast():
                    loss = self._loss(model, experience, read, *by, policy_learns=policy_learns)
                # DDP averages over processes, but this loss is a sum.
                self.accelerator.backward(loss * self.context.world_size)

    def _loss(
        self,
        model: nn.Module,
        experience: Experience,
        indices: list[int],
        tokens: Tensor,
        divisor: Tensor,
        *,
        policy_learns: bool,
    ) -> Tensor:
        """A micro-batch's share of the loss, for its gradients only (``ActorCritic.forward``). ``tokens`` is the
        minibatch's number of answer tokens, and ``divisor`` that of its policy loss."""
        prompts, answers = [experience.prompts[row] for row in indices], [experience.answers[row] for row in indices]
        rows, width = self._at(indices), max(map(len, answers))
        mask = experience.response_mask[rows, :width]
        stream = answer_stream(prompts, answers, mask.device)

        statistics, value_loss = model(
            stream,
            self.episodes.temperature,
            self._value_loss(experience, rows, mask, tokens),
            policy_learns=policy_learns,
            entropy_gradient=self.objective.entropy_coefficient > 0.0,
        )
        loss = self.objective.loss(
            spread(statistics.logprobs, mask),
            spread(statistics.entropy, mask),
            Sampled(
                logprobs=experience.logprobs[rows, :width],
                reference_logprobs=experience.reference_logprobs[rows, :width],
                advantages=experience.advantages[rows, :width],
                response_mask=mask,
                importance=None if experience.importance is None else experience.importance[rows, :width],
            ),
            kl_coefficient=experience.kl_coefficient,
            divisor=divisor,
            tokens=tokens,
        )
        self._record(loss, statistics.entropy, mask, tokens)
        # Gradients must be 0 instead of missing, because DDP waits for those of every parameter.
        return float(policy_learns) * loss.total + value_loss

    @torch.no_grad()
    def _record(self, loss: PolicyLoss, entropy: Tensor, response_mask: Tensor, tokens: Tensor) -> None:
        over = loss.ratio - 1.0
        clipped = ((over > self.objective.clip_high) | (-over > self.objective.clip)).float()
        kl = {} if loss.kl is None else {"loss/kl": loss.kl}
        self.metrics.add_share(
            {
                "loss/policy": loss.policy,
                **kl,
                "policy/approxkl": (0.5 * loss.change**2 * response_mask).sum() / tokens,
                "policy/clipfrac": (clipped * response_mask).sum() / tokens,
                "policy/entropy": entropy.sum() / tokens,
                "val/ratio": (loss.ratio * response_mask).sum() / tokens,
            }
        )
        self.metrics.add_maximum("val/ratio_max", (loss.ratio * response_mask).max())

    def _at(self, rows: list[int]) -> Tensor:
        """The rows as indices on the device, because each use of a list would copy it there and wait."""
        return on_device(torch.tensor(rows), self.context.device)

    def _value_loss(self, experience: Experience, rows: Tensor, mask: Tensor, tokens: Tensor) -> ValueLoss:
        def value_loss(flat: Tensor) -> Tensor:
            assert experience.values is not None, "a critic has values"
            assert experience.returns is not None, "a critic has targets"
            width = mask.shape[1]
            old, returns = experience.values[rows, :width], experience.returns[rows, :width]
            values, clip = spread(flat, mask), self.config.value_clip
            loss = clipped_value_loss(values, old, returns, mask, clip=clip) / tokens
            clipped = (value_is_clipped(values.detach(), old, returns, clip=clip) * mask).sum() / tokens
            self.metrics.add_share({"loss/value": loss.detach(), "val/clipfrac": clipped})
            return self.config.value_coefficient * loss

        return value_loss
