"""Arms side by side on held-out prompts. The gold rule judges; nothing was ever trained on it."""

from __future__ import annotations

import json
import time
from typing import Any

from transformers import PreTrainedModel

from alignment.artifacts import write_json
from alignment.config.stage import PROMPTED, EvaluateConfig
from alignment.data.records import HeldOutPrompt
from alignment.data.tokenize import prompt_ids, tokenize_rows
from alignment.data.tokenizer import load_tokenizer
from alignment.evaluation.arms import (
    Answered,
    answer_all,
    reward_scores,
    sequence_logprobs,
    side_by_side,
    with_style_prompt,
)
from alignment.evaluation.tables import Intervals, arm_row, by_task, compare, samples
from alignment.models.flat import use_flat_attention
from alignment.models.load import DTYPES, Lineage, lineage, load_policy, products_in, refuse_other_tokenizer
from alignment.models.reward import load_reward_model
from alignment.stages.result import StageResult
from alignment.stages.rows import rows_of
from alignment.training.context import StageContext


def run(config: EvaluateConfig, context: StageContext) -> StageResult:
    """Policies and a reward model in, ``evaluation.json`` and ``samples.jsonl`` out. One process does it all."""
    spec = context.spec
    context.progress("loading")
    tokenizer = load_tokenizer(spec.base_path, spec.model.chat_template)
    for stage_input in [*spec.inputs.values(), *spec.arms.values()]:
        refuse_other_tokenizer(spec, stage_input, tokenizer)
    rows = rows_of(context, HeldOutPrompt, config.data)
    prompts = tokenize_rows(rows, lambda row: prompt_ids(tokenizer, row.messages))
    policies = _Policies(context)
    arms = {name: _answer(name, config, context, policies, tokenizer, rows, prompts) for name in config.arms}
    context.progress("scoring", len(arms) * len(rows), len(arms) * len(rows))
    divergences = _divergences(context, policies, prompts, arms)
    rewards = _rewards(context, prompts, arms)
    intervals = Intervals(samples=config.bootstrap_samples, seed=context.seed("bootstrap"))
    table = [
        arm_row(name, arm, rewards=rewards[name], divergences=divergences[name], intervals=intervals)
        for name, arm in arms.items()
    ]
    comparisons = compare(arms, reference=spec.inputs["reference"].ref, intervals=intervals)
    evaluation = {"num_prompts": len(rows), "arms": table, "comparisons": comparisons, "tasks": by_task(rows, arms)}
    write_json(context.content / "evaluation.json", evaluation)
    answered = samples(rows, arms)
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in answered]
    (context.content / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    context.trackers.table("arms", table)
    context.trackers.table("samples", answered)
    return StageResult(metrics={f"gold/{arm['label']}": arm["gold"]["mean"] for arm in table})


def _answer(
    name: str,
    config: EvaluateConfig,
    context: StageContext,
    policies: _Policies,
    tokenizer: Any,
    rows: list[HeldOutPrompt],
    plain: list[list[int]],
) -> Answered:
    started = time.monotonic()
    prompts = plain
    if name == PROMPTED:
        prompts = [prompt_ids(tokenizer, with_style_prompt(row.messages)) for row in rows]
    model = policies.load(lineage(context.spec, context.spec.arms[name]))
    before, total = config.arms.index(name) * len(rows), len(config.arms) * len(rows)
    answers = answer_all(
        model,
        tokenizer,
        rows,
        prompts,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        progress=lambda done: context.progress("answering", before + done, total),
    )
    logprobs = None
    if name != PROMPTED and not _is_reference(name, context):
        logprobs = sequence_logprobs(model, prompts, [answer.ids for answer in answers])
    return Answered(answers=answers, logprobs=logprobs, seconds=time.monotonic() - started)


class _Policies:
    """Loads policies one at a time; asking for the one that is loaded costs nothing."""

    def __init__(self, context: StageContext) -> None:
        self._context = context
        self._found: Lineage | None = None
        self._model: PreTrainedModel | None = None

    def load(self, found: Lineage) -> PreTrainedModel:
        """The policy with its adapters merged, on this process's device."""
        if self._model is None or found != self._found:
            self._model = None  # free the old weights before the new ones come
            self._model = load_policy(found, DTYPES[self._context.spec.model.dtype]).to(self._context.device)
            use_flat_attention(self._model)
            self._found = found
        return self._model


def _divergences(
    context: StageContext, policies: _Policies, prompts: list[list[int]], arms: dict[str, Answered]
) -> dict[str, list[float] | None]:
    """Log π − log ref of each arm's own answers, in nats a sequence; None for an arm that saw other prompts.

    The reference reads the answers of all arms side by side, so that a prompt is computed once.
    """
    found: dict[str, list[float] | None] = dict.fromkeys(arms)
    found |= {name: [0.0] * len(prompts) for name in arms if _is_reference(name, context)}
    compared = {name: (arm, arm.logprobs) for name, arm in arms.items() if arm.logprobs is not None}
    if not compared:
        return found
    reference = policies.load(lineage(context.spec, context.spec.inputs["reference"]))
    under = sequence_logprobs(reference, *side_by_side(prompts, [arm for arm, _ in compared.values()]))
    for place, (name, (_, own)) in enumerate(compared.items()):
        theirs = under[place :: len(compared)]
        found[name] = [mine - other for mine, other in zip(own, theirs, strict=True)]
    return found


def _is_reference(name: str, context: StageContext) -> bool:
    """Whether an arm is the policy from which divergences are taken."""
    return name != PROMPTED and context.spec.arms[name].path == context.spec.inputs["reference"].path


def _rewards(
    context: StageContext, prompts: list[list[int]], arms: dict[str, Answered]
) -> dict[str, list[float] | None]:
    """Every arm's answers are scored under the plain prompt, so that the scores can be compared."""
    if "reward" not in context.spec.inputs:
        return dict.fromkeys(arms)
    model = load_reward_model(context.spec, context.spec.inputs["reward"], device=context.device).to(context.device)
    with products_in(context.spec.model.dtype, context.device):
        scores = reward_scores(model, *side_by_side(prompts, list(arms.values())))
    return {name: scores[place :: len(arms)] for place, name in enumerate(arms)}
