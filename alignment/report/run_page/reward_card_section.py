"""Turns a reward model's card.json into a record, leaving out what cannot be understood."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alignment.report.kit import text
from alignment.report.kit.checked_json import interval, items, mapping, part
from alignment.report.run_page.run_records import Bin, Change, Guesser, RewardCard, Subset, WrongPair


def read_card(path: Path, stage: str) -> RewardCard | None:
    """The card in a file, or None where it cannot be read or has no accuracy."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    accuracy = interval(part(raw, "accuracy"))
    if accuracy is None:
        return None
    subsets = [_subset(item) for item in items(raw, "subsets")]
    means = [one.accuracy.mean for one in subsets if one.accuracy]
    margins, calibration, invariances, rule = (
        part(raw, key) for key in ("margins", "calibration", "invariances", "rule")
    )
    edges, counts = _numbers(items(margins, "edges")), [int(count) for count in _numbers(items(margins, "counts"))]
    formats = mapping(invariances, "formats")
    return RewardCard(
        stage=stage,
        reward=text.name(part(raw, "reward") or ""),
        num_pairs=_count(raw, "num_pairs"),
        num_prompts=_count(raw, "num_prompts"),
        model=Guesser(name="reward model", accuracy=accuracy),
        judges=[found for found in map(_judge, items(raw, "baselines")) if found],
        subsets=subsets,
        subset_mean=sum(means) / len(means) if means else None,
        bins=[found for found in map(_bin, items(calibration, "bins")) if found],
        edges=edges if len(edges) == len(counts) + 1 else [],
        counts=counts if len(edges) == len(counts) + 1 else [],
        scales=_known(calibration, "ece", "brier", "log_loss"),
        length=_known(part(raw, "length"), *mapping(raw, "length")),
        rule={key: found for key in ("agreement", "accuracy") if (found := interval(part(rule, key)))},
        rule_pairs=_count(rule, "num_pairs"),
        learned=_learned(part(raw, "learned")),
        changes=_changes(formats),
        num_changed=_count(invariances, "num_pairs"),
        spread=next((text.finite(part(one, "spread")) for one in formats.values()), None),
        worst=[found for found in map(_wrong, items(raw, "worst")) if found],
        warnings=[text.prose(item) for item in items(raw, "warnings")],
    )


def _judge(raw: Any) -> Guesser | None:
    accuracy = interval(part(raw, "accuracy"))
    if accuracy is None:
        return None
    name = text.name(part(raw, "name") or "")
    return Guesser(name=name, accuracy=accuracy, difference=interval(part(raw, "difference")))


def _subset(raw: Any) -> Subset:
    others = {text.name(name): text.finite(value) for name, value in mapping(raw, "baselines").items()}
    return Subset(
        name=text.name(part(raw, "name") or ""),
        num_pairs=_count(raw, "num_pairs"),
        accuracy=interval(part(raw, "accuracy")),
        others={name: value for name, value in others.items() if value is not None},
    )


def _bin(raw: Any) -> Bin | None:
    confidence = text.finite(part(raw, "confidence"))
    share = interval({"mean": part(raw, "share"), "low": part(raw, "low"), "high": part(raw, "high")})
    if confidence is None or share is None:
        return None
    return Bin(num_pairs=_count(raw, "num_pairs"), confidence=confidence, share=share)


def _changes(formats: dict[str, Any]) -> list[Change]:
    told: dict[str, dict[str, tuple[float, int]]] = {}
    for form, found in formats.items():
        for name, change in mapping(found, "changes").items():
            largest = text.finite(part(change, "largest"))
            if largest is not None:
                told.setdefault(text.name(name), {})[text.name(form)] = (largest, _count(change, "flips"))
    return [Change(name=name, moved=moved) for name, moved in told.items()]


def _learned(raw: Any) -> dict[str, Any]:
    """Counts of pairs, and the words that speak for and against an answer; empty where nothing is known."""
    if not isinstance(raw, dict):
        return {}
    words = {key: [text.name(word, limit=24) for word in items(raw, key)] for key in ("for", "against")}
    counts = {key: _count(raw, key) for key in ("num_pairs", "judged_too", "words")}
    return {**counts, **words, "left_out": raw.get("left_out") is True}


def _wrong(raw: Any) -> WrongPair | None:
    margin = text.finite(part(raw, "margin"))
    if margin is None:
        return None
    messages = [item for item in items(raw, "messages") if isinstance(item, dict)]
    return WrongPair(
        id=text.name(part(raw, "id") or part(raw, "where") or ""),
        subset=text.name(part(raw, "subset") or ""),
        margin=margin,
        messages=[(text.name(item.get("role", "")), text.prose(item.get("content") or "")) for item in messages],
        chosen=text.prose(part(raw, "chosen") or ""),
        rejected=text.prose(part(raw, "rejected") or ""),
    )


def _known(raw: Any, *keys: str) -> dict[str, float]:
    found = {text.name(key): text.finite(part(raw, key)) for key in keys}
    return {key: value for key, value in found.items() if value is not None}


def _numbers(values: list[Any]) -> list[float]:
    """All of them, or none where one is no number."""
    found = [text.finite(value) for value in values]
    return [value for value in found if value is not None] if None not in found else []


def _count(raw: Any, key: str) -> int:
    return int(text.finite(part(raw, key)) or 0)
