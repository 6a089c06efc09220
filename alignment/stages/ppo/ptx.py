"""Adds a language-modelling loss to PPO, so that the policy forgets less (Ouyang et al. 2022, eq. 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from alignment.data.tokens.tokenize import IGNORED, TokenizedConversation
from alignment.models.assembly.load import products_in
from alignment.models.forward.flat import trunk_states
from alignment.models.forward.head import label_statistics
from alignment.models.forward.rows import by_tokens, on_host, sent, stream
from alignment.stages.ppo.experience import prompt_order
from alignment.training.context import StageContext
from alignment.training.micro_batches import as_many_as_most


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
    """Sum of −log p over the learned tokens of the rows."""
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
