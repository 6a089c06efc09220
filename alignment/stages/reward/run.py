"""A Bradley-Terry reward model with TRL's trainer: −log σ(r_chosen − r_rejected) (Stiennon et al. 2020, eq. 1). With a
``margin``, its product with a pair's score difference is subtracted inside σ (Touvron et al. 2023, eq. 2). The score is
read at the last real token, the end of the answer's turn, located by length and never by pad id. The pairs of some
prompts (``eval_fraction``) are held out, and their accuracy is reported with that of the rule "the longer answer wins".
The loss does not fix the scores' origin, so an offset is saved that makes held-out chosen answers score 0 on average
(Huang et al. 2024). Training pairs would bias it, because a model scores what it learned from higher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, TaskType
from trl import RewardConfig as TrlRewardConfig
from trl import RewardTrainer

from alignment.config.optim import tokens_of
from alignment.data.tokens.row_kinds import MARGIN
from alignment.models.assembly.load import products_in
from alignment.models.assembly.weight_file import write_weights
from alignment.models.forward.answers import batches, scalar_scores, unwrapped
from alignment.models.forward.causal import install_scalar
from alignment.stages.reward.kind import RewardConfig
from alignment.stages.shared.kind_answers import limits_of_parts, pair_rows
from alignment.stages.shared.preference_pairs import hold_out, pair_tokens, read_pairs, rows_of, split_by_prompt
from alignment.stages.shared.result import StageResult, initial_model, initial_policy, save_model
from alignment.stages.shared.stage_rows import split_origins
from alignment.training.context import StageContext
from alignment.training.finite import refuse_results
from alignment.training.micro_batches import MicroBatches, Unit
from alignment.training.optimizer import common_arguments, optimizer_arguments
from alignment.training.session import train
from alignment.training.sharding import gathered, prepare, whole
from alignment.training.validation import Validation, of_handed_on

DIVERGED = 10
"""A loss this many times the loss of a random guess cannot be noise."""
OFFSET_SAMPLE = 64
"""How many training pairs set the offset if no pairs were held out."""


def run(config: RewardConfig, context: StageContext) -> StageResult:
    """Pairs and a policy in, reward model out."""
    start, tokenizer = initial_policy(context)
    pairs, counts = read_pairs(config, context, tokenizer)
    rest, held_out = split(
        pairs, config.eval_fraction, context.generator("split"), where=f"stages.{context.spec.stage}"
    )
    kind, limits = pair_rows(config.margin), limits_of_parts(config)
    learned, validated = hold_out(config, context, rest, kind, limits, tokenizer, reported=held_out)
    trainer = _trainer(config, context, start, tokenizer, learned)
    validation = None
    if validated is not None:
        rows = _dataset(validated, config.margin)
        validation = Validation(config.validation, context, trainer, rows, pair_tokens(validated))
    last = train(trainer, context, headline="loss", ceiling=DIVERGED * math.log(2), validation=validation)
    context.progress("scoring")
    judged = held_out if len(held_out) else drawn(learned, OFFSET_SAMPLE, context.generator("offset"))
    with gathered(trainer, trainer.model):
        # Both answers to a prompt are in adjacent rows, so that the prompt is computed once.
        texts = list(rows_of(judged, "prompt", "chosen", "rejected"))
        prompts = [prompt for prompt, *_ in texts for _ in range(2)]
        both = scores(trainer, context, prompts, [answer for _, *answers in texts for answer in answers])
    offset = float(both[::2].mean())
    metrics = {"score_offset": offset, **counts, "rows": float(len(learned)), **of_handed_on(last)}
    if len(held_out):
        metrics |= held_out_metrics(both[::2], both[1::2], held_out)
    refuse_results(metrics)
    result = save_model(trainer.model, tokenizer, context, start, metrics)
    model = trainer.model
    head = model.get_base_model().score.modules_to_save["default"] if isinstance(model, PeftModel) else model.score
    weight = whole(head.weight)
    if context.is_main:
        weights = {"weight": weight.detach().float().cpu().contiguous(), "offset": torch.tensor(offset)}
        write_weights(weights, context.content / "head.safetensors")
    return result


def split(pairs: Dataset, fraction: float, rng: torch.Generator, *, where: str) -> tuple[Dataset, Dataset]:
    """Pairs to learn from, and held-out pairs; all pairs of a prompt are on the same side."""
    if fraction == 0:
        return pairs, pairs.select([])
    learned, held_out = split_by_prompt(pairs, fraction, rng, where=where, setting="eval_fraction=0")
    return pairs.select(learned, keep_in_memory=True), pairs.select(held_out, keep_in_memory=True)


def drawn(pairs: Dataset, number: int, rng: torch.Generator) -> Dataset:
    """At most ``number`` of the pairs, in random order."""
    return pairs.select(torch.randperm(len(pairs), generator=rng)[:number].tolist(), keep_in_memory=True)


def _trainer(
    config: RewardConfig, context: StageContext, start: Any, tokenizer: Any, learned: Dataset
) -> MicroBatchedRewardTrainer:
    pairs, origin_of = split_origins(learned)
    torch.manual_seed(context.seed("head") % 2**63)
    model = initial_model(context, start, TaskType.SEQ_CLS, may_drop=False)
    trainer = MicroBatchedRewardTrainer(
        model=model,
        args=TrlRewardConfig(
            **common_arguments(config.optim, context, log_every=config.log_every, save_every=config.save_every),
            max_length=None,
            center_rewards_coefficient=config.center_coefficient or None,
            remove_unused_columns=False,  # the collator's columns are made from the table's when a batch is read
        ),
        train_dataset=_dataset(pairs, config.margin),
        processing_class=tokenizer,
    )
    trainer.row_origin = origin_of
    trainer.micro_batch_tokens = tokens_of(config.optim.micro_batch_tokens)
    trainer.optimizer_cls_and_kwargs = optimizer_arguments(config.optim, context, model)
    install_scalar(unwrapped(model))
    prepare(model, context)
    return trainer


class MicroBatchedRewardTrainer(MicroBatches, RewardTrainer):
    """TRL's trainer, with each optimiser batch split into micro-batches."""

    unit = Unit.pairs
    accuracy_metric = "accuracy"

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset  # it is already tokenised


def _dataset(pairs: Dataset, margin: float) -> Dataset:
    """The pairs as rows for TRL's collator, made when a row is read; ``margin`` is the weight of score differences."""
    return pairs.with_transform(partial(_joined, margin=margin))


def _joined(rows: dict[str, list[Any]], margin: float) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {
        f"{answer}_ids": [prompt + ids for prompt, ids in zip(rows["prompt"], rows[answer], strict=True)]
        for answer in ("chosen", "rejected")
    }
    if MARGIN in rows:
        columns[MARGIN] = [margin * difference for difference in rows[MARGIN]]
    return columns


def held_out_metrics(chosen: torch.Tensor, rejected: torch.Tensor, pairs: Dataset) -> dict[str, float]:
    """Accuracy, loss and margin over ``[pairs]`` scores, and how often the longer answer wins; ties count half."""
    margins = chosen - rejected
    longer = torch.tensor([len(chosen) - len(rejected) for chosen, rejected in rows_of(pairs, "chosen", "rejected")])
    return {
        "eval_accuracy": _share_won(margins),
        "eval_loss": float(-torch.nn.functional.logsigmoid(margins).mean()),
        "eval_margin": float(margins.mean()),
        "eval_rows": float(len(pairs)),
        "eval_length_rule_accuracy": _share_won(longer),
    }


def _share_won(margins: torch.Tensor) -> float:
    return float(((margins > 0).float() + 0.5 * (margins == 0).float()).mean())


def scores(
    trainer: MicroBatchedRewardTrainer,
    context: StageContext,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
) -> torch.Tensor:
    """``[rows]`` scores; every process computes all of them."""
    with torch.no_grad(), products_in(context.spec.model.dtype, context.device):
        parts = batches(prompts, answers, tokens=trainer.micro_batch_tokens, device=trainer.args.device)
        return torch.cat([scalar_scores(trainer.model, part.rows) for part in parts]).cpu()
