"""A teacher's answers as rows to learn from, and those to held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset

from alignment.core.errors import DataError
from alignment.models.forward.causal import IGNORED
from alignment.stages.distil.config import DistilConfig
from alignment.stages.shared.answer_sampling import AskedPrompts
from alignment.stages.shared.preference_pairs import split_by_prompt
from alignment.training.context import StageContext


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutAnswers:
    """Token ids of the teacher's ``answers`` to held-out prompts; an answer's prompt is repeated beside it.

    ``groups`` are the numbers of the prompts, from 0, one for each answer.
    """

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
    """Rows of ``input_ids`` and ``labels``, learned in the answers alone, and the answers that are held out.

    Raises:
        DataError: too few prompts to hold any out.
    """
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
