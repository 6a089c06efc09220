"""Kahneman–Tversky optimisation with TRL's trainer (Ethayarajh et al. 2024, eq. 7). The reference is the policy at the
start of the stage. At step 0 both must agree on every answer (``check_start``); then the divergence is 0 and the loss
is half the mean weight. The loss lies between 0 and the largest weight, so it has no bound beyond which training has
diverged."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from numpy.typing import NDArray
from peft import TaskType
from torch import Tensor, nn
from trl import KTOConfig as TrlKtoConfig
from trl import KTOTrainer

from alignment.algos.sampling import LabelWeights, label_weights
from alignment.config.optim import tokens_of
from alignment.core.errors import DataError
from alignment.data.tokens.row_kinds import DESIRABLE, LABELLED_ANSWERS, PROMPT, UNDESIRABLE
from alignment.models.assembly.load import Lineage
from alignment.models.assembly.prefix import positions_of
from alignment.models.assembly.weight_file import copied_in_calls
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.rows import on_host
from alignment.records.training import METRICS, MetricsLog
from alignment.stages.kto.kind import FIGURES, ONE_LABEL_REMEDY, KtoConfig, one_label
from alignment.stages.shared import reference as references
from alignment.stages.shared.kind_answers import limits_of_parts
from alignment.stages.shared.preference_pairs import prompts_of
from alignment.stages.shared.result import StageResult, initial_model, initial_policy, save_model
from alignment.stages.shared.stage_rows import WHERE, split_origins, token_rows
from alignment.training.context import StageContext
from alignment.training.longest_batch import refuse_long_rows
from alignment.training.micro_batches import WITHOUT_ROUTER_LOSS, Batch, Unit
from alignment.training.optimizer import common_arguments
from alignment.training.session import train

ANSWER, MISMATCHED, LABEL = "completion", "KL_completion", "label"
"""Columns: the answer to the prompt, an answer to another prompt, and whether the first is desirable."""


def count_labels(rows: Dataset) -> dict[str, int]:
    """The number of rows of each label, in rows of ``LABELLED_ANSWERS``."""
    desirable = int(pc.sum(_is_desirable(_table(rows))).as_py() or 0)
    return {DESIRABLE: desirable, UNDESIRABLE: len(rows) - desirable}


def in_order(rows: Dataset, rng: torch.Generator, *, batch_size: int, max_length: int, mismatch: bool) -> Dataset:
    """Rows of ``LABELLED_ANSWERS``, shuffled, with the columns ``prompt``, ``completion``, ``label`` and ``where``.
    ``mismatch`` adds the column ``KL_completion``: the answer of another row of the same batch of ``batch_size`` rows,
    cut so that it has at most ``max_length`` tokens with the prompt."""
    order = pa.array(torch.randperm(len(rows), generator=rng).numpy())
    table = _table(rows).take(order)
    label = _is_desirable(table)
    columns = {
        PROMPT: table[PROMPT],
        ANSWER: pc.if_else(label, table[DESIRABLE], table[UNDESIRABLE]),
        LABEL: label,
        WHERE: table[WHERE],
    }
    shuffled = Dataset(pa.table(columns), fingerprint=f"{rng.initial_seed():016x}")  # else all rows would be hashed
    if not mismatch:
        return shuffled
    others = pa.array(mismatched(prompts_of(shuffled), batch_size))
    room = np.maximum(0, max_length - pc.list_value_length(columns[PROMPT]).to_numpy())
    table = pa.table({**columns, MISMATCHED: _cut(columns[ANSWER].take(others), room)})
    return Dataset(table, fingerprint=shuffled._fingerprint)


def mismatched(prompts: Sequence[Hashable], batch_size: int) -> list[int]:
    """``[rows]``: for each row, the row whose answer is put beside its prompt. Within a batch, each prompt gets the
    answer of the row before it, and the first the last one's. If several rows have one prompt, the distance is the
    least at which fewest prompts get an answer to themselves. A batch of a single row, the last, gets the answer of the
    row before it. Example: prompts ``a b c d e`` in batches of 3 give ``2 0 1 4 3``."""
    others: list[int] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        distance = _distance(batch)
        others += [start + (row - distance) % len(batch) for row in range(len(batch))]
    if len(prompts) > 1 and len(prompts) % batch_size == 1:
        others[-1] -= 1
    return others


def _distance(batch: Sequence[Hashable]) -> int:
    fewest, best = len(batch) + 1, 1
    for distance in range(1, len(batch)):
        own = sum(batch[row] == batch[row - distance] for row in range(len(batch)))
        if own < fewest:
            fewest, best = own, distance
        if not fewest:
            break
    return best


def _cut(answers: pa.ChunkedArray, room: NDArray[np.int64]) -> pa.ChunkedArray | pa.Array:
    """``[rows]``: the first tokens of each answer, at most ``[rows]`` so many."""
    lengths = pc.list_value_length(answers).to_numpy()
    if (lengths <= room).all():
        return answers
    cut = np.minimum(lengths, room)
    token = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)  # its number in its answer
    ids = pc.list_flatten(answers).filter(pa.array(token < np.repeat(cut, lengths)))
    return pa.ListArray.from_arrays(np.append(0, cut.cumsum()), ids.combine_chunks()).cast(answers.type)


def _table(rows: Dataset) -> pa.Table:
    return rows.with_format("arrow")[:]


def _is_desirable(table: pa.Table) -> pa.ChunkedArray:
    """``[rows]``: whether the answer is in the column of desirable answers; an answer has at least one token."""
    return pc.greater(pc.list_value_length(table[DESIRABLE]), 0)


TEXT = ("input_ids", "attention_mask", "completion_mask")
OTHER = "KL_"
"""Prefix of the columns of mismatched answers."""
REFERENCE, OTHER_REFERENCE = "ref_logps", "ref_KL_logps"
CHOSEN, REJECTED, MARGINS = "rewards/chosen", "rewards/rejected", "rewards/margins"


class TokenizedKtoTrainer(references.AgainstStart, KTOTrainer):
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
        """The batch with the reference's log-probabilities, and without the mismatched answers. What remains of these
        is the estimate of the divergence. Every process must call this."""
        parts = [part for part, _ in self._micro_batches(inputs)]
        batch = {name: value for name, value in inputs.items() if not name.startswith(OTHER)}
        with self.accelerator.autocast():
            batch[REFERENCE] = torch.cat([self._of_reference(part, REFERENCE, part) for part in parts])
            if self.calculate_KL:
                log_ratios = [
                    references.answer_logprobs(model, _others(part))
                    - self._of_reference(part, OTHER_REFERENCE, _others(part))
                    for part in parts
                ]
                self._divergence = self.accelerator.gather(torch.cat(log_ratios).mean()).mean()
                batch[OTHER_REFERENCE] = torch.zeros_like(batch[REFERENCE])  # it is in the divergence already
        return batch

    def _of_reference(self, batch: Batch, column: str, rows: Batch) -> Tensor:
        """``[rows]`` log-probabilities by the reference: the column, or those of ``rows``. The policy reads the same
        rows at once, so that both are rounded alike."""
        known: Tensor | None = batch.get(column)
        return references.answer_logprobs(self.ref_model, rows) if known is None else known

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
        return self._label_counts.get(name.rpartition("/")[2], shares)

    def start_rows(self, batch: Batch) -> Iterator[references.StartRow]:
        """One row for each answer of a batch, before anything is learned."""
        for part, _ in self._micro_batches(batch):
            with torch.no_grad(), self.accelerator.autocast():
                policy = references.answer_logprobs(self.model, part)
                reference = self._of_reference(part, REFERENCE, part)
            tokens = part["completion_mask"].sum(-1)
            for row in zip(policy.tolist(), reference.tolist(), tokens.tolist(), strict=True):
                yield references.StartRow(*row)


def _others(batch: Batch) -> Batch:
    return {name: batch[OTHER + name] for name in TEXT}


def run(config: KtoConfig, context: StageContext) -> StageResult:
    """Labelled answers and a policy in, policy out. Raises DataError: all answers have the same label."""
    start, tokenizer = initial_policy(context)
    rows, counts = token_rows(context, LABELLED_ANSWERS, config.data, limits_of_parts(config), tokenizer)
    labels = count_labels(rows)
    weights = weights_of(config, labels, where=f"stages.{context.spec.stage}.data")
    trainer = _trainer(config, context, start, tokenizer, rows, weights)
    check_start(trainer)
    if trainer.precomputed is not None and context.is_main:
        trainer.precomputed.keep()
    train(trainer, context, headline="loss")
    # The last value of each: a batch without answers of one label has no reward of that label.
    logged = MetricsLog(context.content / METRICS).rows() if context.is_main else []
    metrics = {
        **{name: float(row[name]) for row in logged for name in FIGURES if name in row},
        **counts,
        "desirable_rows": float(labels[DESIRABLE]),
        "undesirable_rows": float(labels[UNDESIRABLE]),
        "desirable_weight": weights.desirable,
        "undesirable_weight": weights.undesirable,
    }
    return save_model(trainer.model, tokenizer, context, start, metrics)


def weights_of(config: KtoConfig, labels: Mapping[str, int], *, where: str) -> LabelWeights:
    """The weights of the labels, given the number of rows of each."""
    if why := one_label(labels):
        raise DataError(why, where=where, remedy=ONE_LABEL_REMEDY)
    return label_weights(
        labels[DESIRABLE], labels[UNDESIRABLE], desirable=config.desirable_weight, undesirable=config.undesirable_weight
    )


def _trainer(
    config: KtoConfig, context: StageContext, start: Lineage, tokenizer: Any, answers: Dataset, weights: LabelWeights
) -> TokenizedKtoTrainer:
    policy = initial_model(context, start, TaskType.CAUSAL_LM, may_drop=False)
    mismatch = config.loss.estimates_kl
    rng = context.generator("order")
    size, limit = config.optim.batch_size, min(config.max_length, positions_of(unwrapped(policy).base_model))
    rows, origin_of = split_origins(in_order(answers, rng, batch_size=size, max_length=limit, mismatch=mismatch))
    refuse_long_rows(policy, rows, origin_of)  # before the reference reads them
    names = {ANSWER: REFERENCE, MISMATCHED: OTHER_REFERENCE} if mismatch else {ANSWER: REFERENCE}
    reference = precomputed = None
    if config.precompute_reference:
        tokens = tokens_of(config.optim.micro_batch_tokens)
        precomputed = references.precomputed_reference(
            policy, start, rows, context, answers=tuple(names), tokens=tokens
        )
    else:
        reference = references.copy_of_start(policy, context)
    with_ids = rows.rename_columns({name: f"{name}_ids" for name in rows.column_names if name != LABEL})
    trainer = TokenizedKtoTrainer(
        model=policy,
        ref_model=reference,
        args=TrlKtoConfig(
            **common_arguments(config.optim, context, log_every=config.log_every, save_every=config.save_every),
            **WITHOUT_ROUTER_LOSS,
            beta=config.beta,
            loss_type=config.loss.value,
            desirable_weight=weights.desirable,
            undesirable_weight=weights.undesirable,
            max_length=None,
            precompute_ref_log_probs=config.precompute_reference,
        ),
        train_dataset=references.with_reference(with_ids, precomputed, names),
        processing_class=tokenizer,
    )
    trainer.precompute_ref_logps = True  # each batch gets them before it is learned from (with_estimates)
    trainer.row_origin = origin_of
    references.make_ready(trainer, policy, reference, precomputed, config.optim, context)
    return trainer


def check_start(trainer: TokenizedKtoTrainer) -> None:
    """Policy and reference must agree on every answer of the first batch. Raises StageError: they do not."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()  # as in training, so that active dropout is noticed
    with copied_in_calls(unwrapped(trainer.model), trainer.args.device):
        references.refuse_other_start(trainer, trainer.start_rows(batch))
