"""A model card: what a result is, its origin, its measurements, and what is unknown about it. Its text is a template
(``templates/card.md.j2``)."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from alignment.commands.export.provenance import Measured, Provenance, value_without_folders, without_folders
from alignment.core.artifacts import FROM_OUTSIDE, REWARD_MODEL, Manifest
from alignment.pipeline.sources import bundled_model
from alignment.records.interval import Interval

_OF_OPTIM = ("lr", "batch_size", "epochs", "max_steps", "schedule", "warmup_ratio", "weight_decay", "max_grad_norm")
_OF_ADAPTER = {
    "full": ("kind", "master_weights"),
    "prefix": ("kind", "virtual_tokens", "chain"),
    "low-rank": ("kind", "rank", "alpha", "rslora", "dropout", "target_modules", "modules_to_save", "chain"),
}
_ELSEWHERE = ("kind", "adapter", "optim", "data")
"""Settings of a stage that have their own lines."""


def model_card(
    manifest: Manifest,
    origin: Provenance,
    *,
    form: str,
    turn_end: str | None,
    notes: Sequence[str],
    files: Sequence[str] = (),
) -> str:
    """Markdown with a header for model hubs; ``notes`` are sentences about this export, ``files`` its files, and
    ``turn_end`` is the token that ends a turn; None without a chat template. Folders of this machine are left out,
    because the card may be published."""
    scheme, _, name = (source := str(manifest.base["source"])).partition(":")
    hubs = [data.removeprefix("hub:").partition("@")[0] for step in origin.steps for data in step.data if _of_hub(data)]
    text = (
        _environment()
        .get_template("card.md.j2")
        .render(
            manifest=manifest,
            identity=manifest.identity,
            origin=origin,
            form=form,
            turn_end=turn_end,
            notes=[_published(note) for note in notes],
            files=files,
            source=source,
            is_reward=manifest.kind == REWARD_MODEL,
            outside=FROM_OUTSIDE,
            is_outside=manifest.identity["kind"] == FROM_OUTSIDE,
            licence=bundled_model.MODELS[name].licence if scheme == "bundled" and name in bundled_model.MODELS else "",
            hubs=list(dict.fromkeys(hubs)),
            kinds=dict.fromkeys(step.manifest.identity["kind"] for step in origin.steps),
            values=list(_values(origin.evaluation)) if origin.evaluation is not None else [],
            command=shlex.join(origin.command),
        )
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip("\n") + "\n"


def _environment() -> Environment:
    loader = PackageLoader("alignment.commands.export")
    environment = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.tests["endswith"] = str.endswith
    environment.filters |= {
        "arm": _arm,
        "json": partial(json.dumps, ensure_ascii=False),
        "percent": "{:+.1%}".format,
        "without_folders": value_without_folders,
        "adapter": lambda config: _settings(config, _OF_ADAPTER.get(config.get("kind", ""), _OF_ADAPTER["low-rank"])),
        "optimiser": lambda config: _settings(config, _OF_OPTIM),
        "others": _other_settings,
    }
    return environment


def _of_hub(source: str) -> bool:
    return source.startswith("hub:")


def _published(note: str) -> str:
    """A note without folders of the machine; behind its last colon may be a path with spaces."""
    words, colon, value = note.rpartition(": ")
    return f"{without_folders(words)}{colon}{value_without_folders(value)}"


def _values(judged: Measured) -> Iterator[tuple[str, Interval]]:
    """All measured values, with the direction of each metric, and win rates with judge and opponent."""
    metrics = {metric.name: metric for metric in judged.record.metrics}
    for name, value in judged.arm.all_metrics.items():
        if name in metrics:
            yield f"{name} ({'more' if metrics[name].higher_is_better else 'less'} is better)", value
        elif name != "win_rate":
            yield name, value
    if (judge := judged.record.judge) is not None:
        for pair in judge.pairs:
            if pair.arm == judged.arm.name and pair.win_rate is not None:
                yield f"win rate against {_arm(pair.against)}, by {value_without_folders(judge.name)}", pair.win_rate


def _arm(name: Any) -> str:
    return str(name).removeprefix("stage:")


def _other_settings(config: Mapping[str, Any]) -> str:
    others = _flat({name: value for name, value in config.items() if name not in _ELSEWHERE})
    return _settings(others, list(others))


def _flat(tree: Mapping[str, Any], ahead: str = "") -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name, value in tree.items():
        settings |= _flat(value, f"{ahead}{name}.") if isinstance(value, dict) else {ahead + name: value}
    return settings


def _settings(config: Mapping[str, Any], names: Sequence[str]) -> str:
    pairs = [(name, config[name]) for name in names if config.get(name) not in (None, [], "")]
    texts = [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in pairs]
    return ", ".join(f"{name} {value_without_folders(text)}" for name, text in texts)
