"""Arms side by side on held-out prompts. The gold rule judges; nothing was ever trained on it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from alignment.artifacts import write_json
from alignment.config.stage import EvaluateConfig
from alignment.data.records import HeldOutPrompt
from alignment.data.sources import read_jsonl
from alignment.data.tokenize import prompt_ids, tokenize_rows
from alignment.evaluation import arms as arms_module
from alignment.evaluation.arms import Answer
from alignment.evaluation.bootstrap import mean_interval
from alignment.models.flat import use_flat_attention
from alignment.models.load import DTYPES, Lineage, lineage, load_policy, load_tokenizer, products_in
from alignment.models.reward import load_reward_model
from alignment.stages.result import StageResult
from alignment.training.context import StageContext
from alignment.training.tracking import open_tracker

Arm = dict[str, Any]


def run(config: EvaluateConfig, context: StageContext) -> StageResult:
    """Policies and a reward model in, ``evaluation.json`` and ``samples.jsonl`` out. One process does it all."""
    spec = context.spec
    context.progress("loading")
    tokenizer = load_tokenizer(spec.base_path)
    rows = list(read_jsonl(spec.data_path, HeldOutPrompt, limit=config.data.limit))
    plain = tokenize_rows(spec.data_path, rows, lambda row: prompt_ids(tokenizer, row.messages))
    policies = _Policies(context)
    answers: dict[str, list[Answer]] = {}
    logprobs: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    for name in config.arms:
        started = time.monotonic()
        prompts = plain
        if name == "base+prompt":
            prompts = [prompt_ids(tokenizer, arms_module.with_style_prompt(row.messages)) for row in rows]
        model = policies.load(_lineage_of(name, context))
        answers[name] = arms_module.answer_all(
            model,
            tokenizer,
            rows,
            prompts,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            progress=_progress(context, name, config, len(rows)),
        )
        texts = [answer.ids for answer in answers[name]]
        logprobs[name] = arms_module.sequence_logprobs(model, prompts, texts, batch_size=config.batch_size)
        seconds[name] = time.monotonic() - started
    context.progress("scoring", len(config.arms) * len(rows), len(config.arms) * len(rows))
    divergences = _divergences(config, context, policies, plain, answers, logprobs)
    rewards = _rewards(config, context, plain, answers)
    table = [
        _arm(name, answers[name], rewards[name], divergences[name], seconds[name], config, context)
        for name in config.arms
    ]
    comparisons = _comparisons(config, context, answers)
    tasks = _by_task(rows, answers)
    write_json(
        context.content / "evaluation.json",
        {"num_prompts": len(rows), "arms": table, "comparisons": comparisons, "tasks": tasks},
    )
    _write_samples(context, rows, answers)
    metrics = {f"gold/{arm['label']}": arm["gold"]["mean"] for arm in table}
    tracker = open_tracker(context)
    tracker.summarise(metrics)
    tracker.close()
    return StageResult(metrics=metrics)


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


def label(arm: str) -> str:
    """``stage:dpo`` → ``dpo``."""
    return arm.removeprefix("stage:")


def _lineage_of(arm: str, context: StageContext) -> Lineage:
    return lineage(context.spec, context.spec.arms[arm])


def _progress(context: StageContext, name: str, config: EvaluateConfig, count: int) -> Any:
    before = config.arms.index(name) * count

    def tell(done: int) -> None:
        context.progress("answering", before + done, len(config.arms) * count)

    return tell


def _divergences(
    config: EvaluateConfig,
    context: StageContext,
    policies: _Policies,
    prompts: list[list[int]],
    answers: dict[str, list[Answer]],
    logprobs: dict[str, list[float]],
) -> dict[str, list[float] | None]:
    """Log π − log ref of each arm's own answers, in nats a sequence; None for an arm that saw other prompts."""
    reference = policies.load(lineage(context.spec, context.spec.inputs["reference"]))
    found: dict[str, list[float] | None] = {}
    for name in config.arms:
        if name == "base+prompt":
            found[name] = None
            continue
        ids = [answer.ids for answer in answers[name]]
        under = arms_module.sequence_logprobs(reference, prompts, ids, batch_size=config.batch_size)
        found[name] = [mine - theirs for mine, theirs in zip(logprobs[name], under, strict=True)]
    return found


def _rewards(
    config: EvaluateConfig, context: StageContext, prompts: list[list[int]], answers: dict[str, list[Answer]]
) -> dict[str, list[float] | None]:
    """Every arm's answers are scored under the plain prompt, so that the scores can be compared."""
    if "reward" not in context.spec.inputs:
        return dict.fromkeys(config.arms)
    model = load_reward_model(context.spec, context.spec.inputs["reward"]).to(context.device)
    with products_in(context.spec.model.dtype, context.device):
        return {
            name: arms_module.reward_scores(
                model, prompts, [answer.ids for answer in answers[name]], batch_size=config.batch_size
            )
            for name in config.arms
        }


def _arm(
    name: str,
    answers: list[Answer],
    rewards: list[float] | None,
    divergences: list[float] | None,
    seconds: float,
    config: EvaluateConfig,
    context: StageContext,
) -> Arm:
    def interval(values: list[float]) -> dict[str, float]:
        return asdict(mean_interval(values, samples=config.bootstrap_samples, seed=context.seed("bootstrap")))

    return {
        "name": name,
        "label": label(name),
        "gold": interval([answer.gold.gold for answer in answers]),
        "style": interval([answer.gold.style for answer in answers]),
        "facts": interval([answer.gold.facts for answer in answers]),
        "words": sum(len(answer.text.split()) for answer in answers) / len(answers),
        "reward": None if rewards is None else interval(rewards),
        "kl": None if divergences is None else interval(divergences),
        "distinct": len({answer.text for answer in answers}) / len(answers),
        "ended": sum(answer.ended for answer in answers) / len(answers),
        "seconds": seconds,
    }


def _comparisons(config: EvaluateConfig, context: StageContext, answers: dict[str, list[Answer]]) -> list[Arm]:
    """Each arm against the one it should beat: trained stages against the reference arm, that against the base."""
    reference = context.spec.inputs["reference"].ref
    pairs = [(name, reference) for name in config.arms if name.startswith("stage:") and name != reference]
    pairs = [("base+prompt", "base"), (reference, "base"), (reference, "base+prompt"), *pairs]
    found = []
    for arm, against in pairs:
        if arm not in answers or against not in answers:
            continue
        paired = zip(answers[arm], answers[against], strict=True)
        gains = [mine.gold.gold - theirs.gold.gold for mine, theirs in paired]
        interval = mean_interval(gains, samples=config.bootstrap_samples, seed=context.seed("bootstrap"))
        found.append(
            {
                "arm": arm,
                "against": against,
                "difference": interval.mean,
                "low": interval.low,
                "high": interval.high,
                "real": interval.excludes_zero(),
            }
        )
    return found


def _by_task(rows: list[HeldOutPrompt], answers: dict[str, list[Answer]]) -> dict[str, dict[str, float]]:
    tasks: dict[str, dict[str, float]] = {}
    for task in sorted({row.task for row in rows if row.task}):
        places = [i for i, row in enumerate(rows) if row.task == task]
        tasks[task] = {name: sum(found[i].gold.gold for i in places) / len(places) for name, found in answers.items()}
    return tasks


def _write_samples(context: StageContext, rows: list[HeldOutPrompt], answers: dict[str, list[Answer]]) -> None:
    with (context.content / "samples.jsonl").open("w", encoding="utf-8") as stream:
        for place, row in enumerate(rows):
            sample = {
                "id": row.id,
                "task": row.task,
                "messages": [message.as_dict() for message in row.messages],
                "reference": row.reference,
                "answers": {name: _sample(found[place]) for name, found in answers.items()},
            }
            stream.write(json.dumps(sample, ensure_ascii=False) + "\n")


def _sample(answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "gold": answer.gold.gold,
        "style": answer.gold.style,
        "facts": answer.gold.facts,
        "checks": answer.gold.checks,
    }
