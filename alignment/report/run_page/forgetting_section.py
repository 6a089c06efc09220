"""Turns forgetting.json into records, leaving out what cannot be understood."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alignment.report.kit import text
from alignment.report.kit.checked_json import interval, items
from alignment.report.run_page.run_records import Forgetting, Remembering


def read_forgetting(stage: str, folder: Path | None) -> Forgetting:
    """What the stage found, or a note that says why there is nothing."""
    if folder is None or not (folder / "forgetting.json").is_file():
        return Forgetting(stage=stage, note=f"{stage} has no result yet.")
    try:
        raw = json.loads((folder / "forgetting.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return Forgetting(stage=stage, note="The file forgetting.json cannot be read.")
    arms = [_arm(item) for item in items(raw, "arms") if isinstance(item, dict) and item.get("name")]
    if not arms:
        return Forgetting(stage=stage, note="The file forgetting.json names no arms.")
    limits = raw.get("limits") if isinstance(raw.get("limits"), dict) else {}
    return Forgetting(
        stage=stage,
        judged=raw.get("judged") is not False,
        arms=arms,
        num_texts=text.finite(raw.get("num_texts")),
        num_questions=text.finite(raw.get("num_questions")),
        max_rise=text.finite(limits.get("perplexity_rise")),
        max_drop=text.finite(limits.get("ability_drop")),
    )


def _arm(raw: dict[str, Any]) -> Remembering:
    return Remembering(
        label=text.name(raw.get("label") or raw["name"], limit=48),
        perplexity=text.finite(raw.get("perplexity")),
        ability=text.finite(raw.get("ability")),
        rise=interval(raw.get("rise")),
        drop=interval(raw.get("drop")),
        passed=raw.get("passed") is True,
        reasons=[text.prose(reason) for reason in items(raw, "reasons")],
    )
