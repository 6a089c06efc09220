"""Turns evaluation.json and the rows of samples.jsonl into records, leaving out what cannot be understood."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignment.records.interval import Interval
from alignment.report.kit import text
from alignment.report.kit.checked_json import interval, items, mapping
from alignment.report.run_page.run_records import Answer, Arm, Comparison, Evaluation, Judge, JudgedPair, Sample


def read_evaluation(path: Path) -> tuple[Evaluation | None, str]:
    """The evaluation, or None and the reason in words."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None, "The file evaluation.json cannot be read."
    arms = [_arm(item) for item in items(raw, "arms") if isinstance(item, dict) and item.get("name")]
    if not arms:
        return None, "The file evaluation.json names no arms."
    comparisons = [_comparison(item) for item in items(raw, "comparisons")]
    tasks = mapping(raw, "tasks")
    num_prompts = text.finite(raw.get("num_prompts"))
    return Evaluation(
        num_prompts=None if num_prompts is None else int(num_prompts),
        arms=arms,
        comparisons=[item for item in comparisons if item],
        tasks={text.name(task): _means(by_arm) for task, by_arm in tasks.items() if isinstance(by_arm, dict)},
        judge=_judge(mapping(raw, "judge")),
        conclusions=[text.name(item, limit=2000) for item in items(raw, "conclusions") if isinstance(item, str)],
    ), ""


def read_samples(rows: list[dict[str, Any]]) -> tuple[list[Sample], int]:
    """The samples that have at least one answer, and how many rows had none."""
    samples = [_sample(row) for row in rows]
    kept = [sample for sample in samples if sample.answers]
    return kept, len(samples) - len(kept)


def _arm(raw: dict[str, Any]) -> Arm:
    name = text.name(raw["name"])
    return Arm(
        name=name,
        label=text.name(raw.get("label") or name.removeprefix("stage:"), limit=48),
        gold=interval(raw.get("gold")),
        style=interval(raw.get("style")),
        facts=interval(raw.get("facts")),
        reward=interval(raw.get("reward")),
        greedy_log_ratio=interval(raw.get("greedy_log_ratio")),
        win_rate=interval(raw.get("win_rate")),
        loss=interval(raw.get("loss")),
        perplexity=interval(raw.get("perplexity")),
        refusals=interval(raw.get("refusals")),
        words=interval(raw.get("words")),
        distinct=text.finite(raw.get("distinct")),
        ended=interval(raw.get("ended")),
        seconds=text.finite(raw.get("seconds")),
        figures=dict(_figures(raw)),
    )


def _figures(raw: dict[str, Any]) -> Iterator[tuple[str, Interval]]:
    """Every figure of an arm's row, also of groups of them (``{"wins": {"sft": {"mean": …}}}`` gives ``wins sft``)."""
    for key, value in raw.items():
        if key == "seconds":  # says nothing of the answers
            continue
        if item := interval(value):
            yield text.name(key), item
        elif isinstance(value, dict) and "mean" not in value:
            for inner, one in value.items():
                if item := interval(one):
                    yield text.name(f"{key} {inner}"), item


def _comparison(raw: Any) -> Comparison | None:
    if not isinstance(raw, dict) or not raw.get("arm") or not raw.get("against"):
        return None
    difference, low, high = (text.finite(raw.get(key)) for key in ("difference", "low", "high"))
    if difference is None or low is None or high is None:
        return None
    arm, against = text.name(raw["arm"]), text.name(raw["against"])
    return Comparison(arm=arm, against=against, difference=difference, low=low, high=high)


def _judge(raw: dict[str, Any]) -> Judge | None:
    pairs = [_judged_pair(item) for item in items(raw, "pairs") if isinstance(item, dict)]
    num_prompts = text.finite(raw.get("num_prompts"))
    kept = [pair for pair in pairs if pair]
    if not kept:
        return None
    return Judge(
        name=text.name(raw.get("name") or "a judge"),
        num_prompts=None if num_prompts is None else int(num_prompts),
        pairs=kept,
    )


def _judged_pair(raw: dict[str, Any]) -> JudgedPair | None:
    counts = [text.finite(raw.get(key)) for key in ("wins", "ties", "losses")]
    if not raw.get("arm") or not raw.get("against") or None in counts:
        return None
    wins, ties, losses = (int(count or 0) for count in counts)
    shares = ("invalid", "agreement", "position_bias", "gold_agreement", "gold_kappa")
    return JudgedPair(
        arm=text.name(raw["arm"]),
        against=text.name(raw["against"]),
        wins=wins,
        ties=ties,
        losses=losses,
        verdict=text.name(raw.get("verdict") or ""),
        win_rate=interval(raw.get("win_rate")),
        **{share: text.finite(raw.get(share)) for share in shares},
    )


def _means(raw: dict[str, Any]) -> dict[str, float]:
    means = {text.name(arm): text.finite(value) for arm, value in raw.items()}
    return {arm: value for arm, value in means.items() if value is not None}


def _sample(raw: dict[str, Any]) -> Sample:
    messages = [item for item in items(raw, "messages") if isinstance(item, dict)]
    answers = mapping(raw, "answers")
    return Sample(
        id=text.name(raw.get("id", "")),
        task=text.name(raw.get("task") or "no task"),
        messages=[(text.name(item.get("role", "")), text.prose(item.get("content") or "")) for item in messages],
        reference=text.prose(raw.get("reference") or ""),
        answers=[_answer(arm, item) for arm, item in answers.items() if isinstance(item, dict)],
    )


def _answer(arm: str, raw: dict[str, Any]) -> Answer:
    checks = mapping(raw, "checks")
    factors = [(text.name(key), text.finite(value if not isinstance(value, bool) else float(value)))
               for key, value in checks.items()]  # fmt: skip
    failed = [(key, factor) for key, factor in factors if factor is not None and factor < 1]
    return Answer(
        arm=text.name(arm),
        text=text.prose(raw.get("text") or ""),
        gold=text.finite(raw.get("gold")),
        style=text.finite(raw.get("style")),
        facts=text.finite(raw.get("facts")),
        failed=sorted(failed, key=lambda pair: (pair[1], pair[0])),
    )
