"""The student, the rows that it is taught, and its trainer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from alignment.core.artifacts import Manifest
from alignment.core.errors import DataError, ModelError
from alignment.data.tokens.tokenizer import tokenizer_hashes
from alignment.models.assembly.load import Lineage, load_policy, saved_adapters, weights_dtype
from alignment.models.assembly.modules import keep_first_layers
from alignment.models.forward.causal import IGNORED
from alignment.models.forward.divergence import learned_positions, teaching_at
from alignment.stages.distil.kind import DistilConfig, layers_left
from alignment.stages.shared.answer_sampling import AskedPrompts
from alignment.stages.shared.language_model import MicroBatchedSftTrainer
from alignment.stages.shared.preference_pairs import split_by_prompt
from alignment.stages.shared.result import StageResult, initial_policy
from alignment.training.context import StageContext
from alignment.training.micro_batches import Batch
from alignment.training.sharding import everyones, shared


def student_of(config: DistilConfig, context: StageContext, tokenizer: Any) -> Lineage:
    """The student before it learns; ``tokenizer`` is the teacher's."""
    start, own = initial_policy(context)
    where = f"stages.{context.spec.stage}"
    if tokenizer_hashes(own) != tokenizer_hashes(tokenizer):
        raise ModelError(
            f"{config.init} has a different tokenizer or chat template than the teacher {config.teacher}",
            where=f"{where}.init",
            remedy="use a student of the teacher's family; model.chat_template gives both the same template",
        )
    if config.layers is None:
        return start
    available = AutoConfig.from_pretrained(str(start.base)).get_text_config().num_hidden_layers
    layers_left(config, available, where)
    shared(lambda: _make(config.layers, context, start, tokenizer) if context.is_main else None)
    return Lineage(source="self", base=_folder(context), adapters=())


def _folder(context: StageContext) -> Path:
    return context.spec.work / "student"


def _make(layers: int | None, context: StageContext, start: Lineage, tokenizer: Any) -> None:
    assert layers is not None
    folder = _folder(context)
    if folder.is_dir():
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model = load_policy(start, weights_dtype(context.spec.model.dtype, context.adapter))
    keep_first_layers(model, layers)
    model.config.use_cache = True  # it is off during training, but generation needs it
    model.save_pretrained(str(unfinished))
    tokenizer.save_pretrained(str(unfinished))
    os.replace(unfinished, folder)


def saved_student(context: StageContext, start: Lineage, result: StageResult) -> Lineage:
    """The student that ``save_model`` has just saved, on every process."""
    lineage = None
    if context.is_main:
        saved = Manifest(
            stage=context.spec.stage,
            kind=context.spec.produces,
            fingerprint=context.spec.fingerprint,
            identity={},
            adapters=result.adapters,
            adapters_stood=result.adapters_stood,
        )
        own = result.base["source"] == "self"
        base = context.content / "model" if own else start.base
        lineage = Lineage(source=start.source, base=base, adapters=saved_adapters(context.content, saved))
    everywhere: Lineage = everyones(lineage)[0]  # type: ignore[assignment]
    return everywhere


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutAnswers:
    """Token ids of the teacher's ``answers`` to held-out prompts; an answer's prompt is repeated beside it. ``groups``
    are the numbers of the prompts, from 0, one for each answer."""

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    groups: Sequence[int]

    @property
    def distinct(self) -> list[Sequence[int]]:
        """Each prompt once."""
        return list(dict(zip(self.groups, self.prompts, strict=True)).values())


def taught_rows(
    config: DistilConfig, context: StageContext, asked: AskedPrompts, answers: Sequence[Sequence[Sequence[int]]]
) -> tuple[Dataset, HeldOutAnswers]:
    """Rows of ``input_ids`` and ``labels``, learned in the answers alone, and the answers that are held out."""
    pairs = [(ids, answer) for ids, of_prompt in zip(asked.ids, answers, strict=True) for answer in of_prompt]
    prompts, every = [list(prompt) for prompt, _ in pairs], [list(answer) for _, answer in pairs]
    rows = Dataset.from_dict(
        {
            "input_ids": [prompt + answer for prompt, answer in zip(prompts, every, strict=True)],
            "labels": [[IGNORED] * len(prompt) + answer for prompt, answer in zip(prompts, every, strict=True)],
        }
    )
    where = f"stages.{context.spec.stage}"
    learned: list[int] = list(range(len(rows)))
    held_out: list[int] = []
    if config.eval_fraction:
        rng = context.generator("split")
        learned, held_out = split_by_prompt(rows, config.eval_fraction, rng, where=where, setting="eval_fraction=0")
    if not learned:
        raise DataError("no answer is left to learn from", where=f"{where}.data", remedy="add prompts")
    groups = {row // config.completions_per_prompt: None for row in held_out}
    number = {prompt: index for index, prompt in enumerate(groups)}
    return rows.select(learned, keep_in_memory=True), HeldOutAnswers(
        prompts=[prompts[row] for row in held_out],
        answers=[every[row] for row in held_out],
        groups=[number[row // config.completions_per_prompt] for row in held_out],
    )


ACCEPTANCE, SAME_TOP = "acceptance", "same_top"


class DistilTrainer(MicroBatchedSftTrainer):
    """Minimises the mean of Σ p (log p − log q) over all answer tokens of an optimiser batch. The model must have
    ``install_divergence``. ``teacher`` is whole on every process, frozen and without wrappers."""

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
        """This process's part of the loss of a micro-batch, scaled as the trainer's other losses are. It is divided by
        the learned tokens of all processes, over which the gradient is then averaged."""
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
