"""The rows of the page's tables, as text and ready-made plots, so that the template only lays them out."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from markupsafe import Markup

from alignment.evaluation.conclusions import verdict_on_judge
from alignment.records.evaluation import (
    BETTER,
    NO_DIFFERENCE,
    TOO_FEW,
    WORSE,
    ArmResult,
    Comparison,
    Evaluation,
    JudgedPair,
)
from alignment.records.interval import Interval
from alignment.records.reward_card import Learned, Length, RewardCard
from alignment.records.training import USAGE
from alignment.report.kit import text
from alignment.report.kit.plots import calibration_curve, histogram, scale_axis, scale_of, whisker
from alignment.report.run_page.run_records import Card, Run, Stage
from alignment.stages.registry import trains

Row = dict[str, Any]
"""A row of a table, or a figure, as a template takes it, by name."""
TONES = {BETTER: "good", WORSE: "bad", NO_DIFFERENCE: "open", TOO_FEW: "open"}
"""The CSS class of each verdict."""


def primary_plot(evaluation: Evaluation) -> Row | None:
    known = [
        (arm.label, mean, "trained" if arm.name.startswith("stage:") else "plain")
        for arm in evaluation.arms
        if (mean := evaluation.primary_of(arm)) is not None
    ]
    return whisker_plot(known) if known else None


def whisker_plot(means: Sequence[tuple[str, Interval, str]], *, rule: float | None = None, digits: int = 2) -> Row:
    """An interval plot of labelled means between 0 and 1, each with its CSS class: its ``rows`` and the ``axis`` under
    them."""
    scale = scale_of([mean for _, mean, _ in means], within=(0.0, 1.0), include=rule)
    rows = [
        {
            "label": label,
            "svg": whisker(mean, scale, tone=tone, rule=rule),
            "value": text.number(mean.mean, digits),
            "bounds": text.bounds(mean),
        }
        for label, mean, tone in means
    ]
    return {"rows": rows, "axis": scale_axis(scale)}


def _figure(item: Interval | None, digits: int = 2) -> tuple[str, str]:
    return ("–", "") if item is None else (text.number(item.mean, digits), text.bounds(item, digits))


def _share(item: Interval | None) -> tuple[str, str]:
    if item is None:
        return "–", ""
    return text.share(item.mean), "" if item.low is None else f"{text.share(item.low)} to {text.share(item.high)}"


_OF_ARMS: dict[str, Callable[[ArmResult], tuple[str, str]]] = {
    "words": lambda arm: _figure(arm.words, 1),
    "reward": lambda arm: _figure(arm.reward),
    "log-ratio": lambda arm: _figure(arm.greedy_log_ratio, 1),
    "KL, nats": lambda arm: _figure(arm.kl),
    "loss, nats": lambda arm: _figure(arm.loss),
    "perplexity": lambda arm: _figure(arm.perplexity, 1),
    "refusals": lambda arm: _share(arm.refusals),
    "distinct": lambda arm: (text.share(arm.distinct), ""),
    "ended": lambda arm: _share(arm.ended),
}


def arm_table(evaluation: Evaluation) -> Row:
    """The figures of the arms, the recipe's metrics first, as ``headings`` and ``rows`` (label, cells); a cell is
    (figure, bounds). Figures that no arm has are left out."""
    every = {
        metric.name: [_figure(arm.metrics.get(metric.name)) for arm in evaluation.arms] for metric in evaluation.metrics
    }
    every |= {heading: [of_arm(arm) for arm in evaluation.arms] for heading, of_arm in _OF_ARMS.items()}
    columns = {heading: cells for heading, cells in every.items() if any(value != "–" for value, _ in cells)}
    rows = [(arm.label, [cells[row] for cells in columns.values()]) for row, arm in enumerate(evaluation.arms)]
    return {"headings": list(columns), "rows": rows}


def comparison_rows(evaluation: Evaluation) -> tuple[list[Row], Markup]:
    """Comparisons of an evaluation by its primary metric, and the axis of their plot."""
    if not evaluation.comparisons:
        return [], Markup("")
    scale = scale_of([item.interval for item in evaluation.comparisons], within=None, include=0.0)
    rows = []
    for item in evaluation.comparisons:
        row = _comparison(item, evaluation)
        row["svg"] = whisker(item.interval, scale, tone=row["tone"], rule=0.0)
        row["p"] = f"p\u202f{row['p']}" if row["p"] else ""
        rows.append(row | ({"verdict": "real"} if evaluation.is_real(item) else {}))
    return rows, scale_axis(scale)


def _comparison(item: Comparison, evaluation: Evaluation) -> Row:
    verdict = evaluation.verdict(item)
    return {
        "metric": item.metric,
        "arm": evaluation.label(item.arm),
        "against": evaluation.label(item.against),
        "difference": text.signed(item.difference),
        "bounds": text.bounds(item.interval, 3, text.signed),
        "p": "" if item.adjusted_p is None else text.probability(item.adjusted_p),
        "verdict": verdict,
        "tone": TONES[verdict],
    }


def other_comparison_rows(evaluation: Evaluation) -> list[Row]:
    ordered = sorted(evaluation.other_comparisons, key=lambda item: not evaluation.is_real(item))
    return [_comparison(item, evaluation) for item in ordered]


def judged_rows(evaluation: Evaluation) -> list[Row]:
    """The judge's table; answers that people have chosen come last, against those that they rejected."""
    judge = evaluation.judge
    rows = [judged_row(pair, evaluation) for pair in (judge.pairs if judge else [])]
    if judge is not None and judge.labelled is not None:
        tone = "good" if judge.labelled.verdict == BETTER else "bad"
        own = {"arm": "chosen by people", "verdict": verdict_on_judge(judge.labelled), "tone": tone}
        rows.append(judged_row(judge.labelled, evaluation) | own)
    return rows


def judged_row(pair: JudgedPair, evaluation: Evaluation) -> Row:
    """A judged pair; ``counts`` are wins, ties and losses, ``metric`` says how often the judge prefers the same arm as
    the primary metric (``70 % (κ 0.44)``), and ``compared`` on how many prompts."""
    kappa = "" if pair.metric_kappa is None else f" (κ {text.number(pair.metric_kappa)})"
    return {
        "arm": evaluation.label(pair.arm),
        "against": evaluation.label(pair.against),
        "rate": pair.win_rate,
        "at_equal_lengths": pair.length_controlled,
        "counts": f"{pair.wins} / {pair.ties} / {pair.losses}",
        "invalid": text.share(pair.invalid),
        "agreement": text.share(pair.agreement),
        "bias": "–" if pair.position_bias is None else text.signed(pair.position_bias, 2),
        "metric": f"{text.share(pair.metric_agreement)}{kappa}",
        "compared": "" if pair.metric_prompts is None else f"on {pair.metric_prompts} prompts",
        "verdict": pair.verdict,
        "tone": TONES.get(pair.verdict, "open"),
    }


def task_rows(evaluation: Evaluation) -> list[tuple[str, list[tuple[str, int]]]]:
    """Per task, each arm's mean of the primary metric with a shade from 0 to 5: the better, the stronger."""
    rows = []
    every = [value for means in evaluation.tasks.values() for value in means.values()]
    low, high = min([0.0, *every]), max([1.0, *every])
    less_is_better = evaluation.primary_metric is not None and not evaluation.primary_metric.higher_is_better

    def shade(value: float | None) -> int:
        share = 0.0 if value is None else (value - low) / (high - low)
        return round(5 * (1 - share if less_is_better and value is not None else share))

    for task, means in evaluation.tasks.items():
        values = [means.get(arm.name) for arm in evaluation.arms]
        rows.append((task, [(text.number(value), shade(value)) for value in values]))
    return rows


def turn_rows(evaluation: Evaluation) -> list[list[Interval | None]]:
    """Per turn, each arm's mean of the primary metric; empty if prompts have one turn, or without such a metric."""
    longest = max((len(arm.by_turn) for arm in evaluation.arms), default=0)
    if evaluation.primary is None:
        return []
    return [
        [arm.by_turn[turn].get(evaluation.primary) if turn < len(arm.by_turn) else None for arm in evaluation.arms]
        for turn in range(longest)
    ]


_SIZE = "optim.micro_batch_tokens"


def settings(stage: Stage) -> list[tuple[str, str]]:
    """The stage's resolved configuration as (dotted key, value); a size that the stage chose stands behind ``auto``."""
    rows = {key: text.setting_text(value) for key, value in text.flat(stage.config).items()}
    usage = stage.manifest.usage if stage.manifest else {}
    if _SIZE in rows and (chosen := text.finite(usage.get(USAGE))) is not None:
        rows[_SIZE] = f"{rows[_SIZE]}: {chosen:.0f}"
    return [(text.name(key, limit=120), text.prose(value)) for key, value in rows.items()]


def lineage(stage: Stage) -> list[tuple[str, str]]:
    """What the artifact was made from, as (heading, value); empty entries are left out."""
    manifest = stage.manifest
    if manifest is None:
        return []
    base = text.flat(manifest.base).items()
    data = [
        f"{key}: {value}" for key, value in text.flat(manifest.identity).items() if "data" in key and _is_hash(value)
    ]
    entries = [
        ("fingerprint", manifest.fingerprint),
        ("inputs", ", ".join(f"{slot} {_short(value)}" for slot, value in manifest.inputs.items())),
        ("base", ", ".join(f"{key}: {_short(value)}" for key, value in base if value not in (None, "", {}, []))),
        ("adapters, in order", " → ".join(manifest.adapters)),
        ("data", ", ".join(data)),
        ("tokenizer", manifest.tokenizer_sha256),
        ("chat template", manifest.chat_template_sha256),
        ("git commit", manifest.git_commit),
        ("made", manifest.created),
        ("packages", ", ".join(f"{key} {value}" for key, value in sorted(manifest.versions.items()))),
    ]
    return [(heading, text.name(value, limit=2000)) for heading, value in entries if value]


def _short(value: Any) -> str:
    """A value as text; a long hash is cut to its first twelve digits."""
    return value[:12] if _is_hash(value) else text.setting_text(value)


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) >= 40 and set(value) <= set("0123456789abcdef")


def usage_rows(run: Run) -> list[Row]:
    """Time, memory and closing figures of every stage that recorded its time or memory, and what its plan said of the
    two. ``share`` is its time relative to the longest, as an SVG length."""
    rows = []
    longest = max((stage.seconds or 0.0 for stage in run.stages), default=0.0)
    for stage in run.stages:
        usage = stage.manifest.usage if stage.manifest else {}
        peak, of_engine = (text.finite(usage.get(name)) for name in ("peak_rss_bytes", "peak_engine_bytes"))
        if stage.seconds is None and peak is None:
            continue
        engine = "" if of_engine is None else f", and {text.memory(of_engine)} in vLLM"
        attempts = f" in {stage.attempts} attempts" if stage.seconds is not None and stage.attempts > 1 else ""
        plan = stage.planned
        rows.append(
            {
                "name": stage.name,
                "state": stage.state,
                "seconds": f"{text.duration(stage.seconds)}{attempts}",
                "share": f"{100 * (stage.seconds or 0.0) / longest:.2f}%" if longest > 0 else "0%",
                "memory": f"{text.memory(peak)}{engine}",
                # empty where only the time of the first rows is known, because nobody counted the others
                "planned_seconds": text.duration(plan.seconds) if plan and not plan.first_rows else "",
                "planned_memory": text.memory(float(plan.peak)) if plan else "",
                # other stages have their own tables
                "figures": [(text.name(name), _closing(value)) for name, value in stage.headlines.items()]
                if trains(stage.kind)
                else [],
            }
        )
    return rows


def _closing(value: float) -> str:
    """Three decimals, and of a number that these would make 0 its first digits."""
    if 0 < abs(value) < 1e-3:
        return text.compact(value)
    return text.number(value, 0 if value == round(value) else 3)


def command(run: Run) -> str:
    words = ["align", "run", run.record.recipe or "RECIPE", *run.record.overrides]
    return " ".join(shlex.quote(word) for word in words)


def facts(run: Run) -> list[tuple[str, str]]:
    """Facts about the run as (heading, value), independent of the machine that it ran on."""
    model = run.record.config.get("model")
    source = text.name(model.get("source") or "") if isinstance(model, dict) else ""
    seconds = sum(stage.seconds or 0.0 for stage in run.stages)
    prompts = run.evaluation.num_prompts if run.evaluation else None
    seed = run.record.config.get("seed")
    pairs = [
        ("started", date(run.record.started)),
        ("model", source),
        ("recipe", run.record.recipe),
        ("stages", str(len(run.stages))),
        ("time, all stages", text.duration(seconds) if seconds else ""),
        ("held-out prompts", "" if prompts is None else str(prompts)),
        ("seed", "" if seed is None else text.name(seed)),
    ]
    return [(heading, value) for heading, value in pairs if value]


def date(stamp: str) -> str:
    """An ISO time to the minute; any other text unchanged."""
    return f"{stamp[:10]} {stamp[11:16]}" if len(stamp) >= 16 and stamp[10] in "T " else stamp


MODEL = "reward model"
CHANCE = 0.5
"""Accuracy of a judge that knows nothing."""
FEW_WORDS = 8
"""How many words for and against an answer the page names."""


def card_view(card: Card) -> Row:
    """The card with its plots and tables, for the template; ``spread`` is the scores' standard deviation."""
    formats = {} if card.record.invariances is None else card.record.invariances.formats
    names = dict.fromkeys(name for scores in formats.values() for name in scores.changes)
    changes = [
        {
            "name": name,
            "by_format": {form: scores.changes[name] for form, scores in formats.items() if name in scores.changes},
        }
        for name in names
    ]
    known = [(MODEL, card.record.accuracy), *((judge.name, judge.accuracy) for judge in card.record.baselines)]
    accuracies = [(name, accuracy, "plain" if index else "trained") for index, (name, accuracy) in enumerate(known)]
    return {
        "stage": card.stage,
        "card": card.record,
        "judges": whisker_plot(accuracies, rule=CHANCE, digits=3),
        "plots": list(plots(card.record)),
        "figures": list(_card_figures(card.record)),
        "changes": changes,
        "formats": list(dict.fromkeys(form for form, scores in formats.items() if scores.changes)),
        "spread": next((scores.spread for scores in formats.values()), None),
    }


def card_lead(card: Card) -> str:
    """The card in a sentence or two."""
    accuracy, within = card.record.accuracy, text.bounds(card.record.accuracy)
    right = f"{card.stage}: the reward model is right on {text.number(accuracy.mean)} of {card.record.num_pairs} pairs"
    others = [f"{judge.name} {text.number(judge.accuracy.mean)}" for judge in card.record.baselines]
    return f"{right}{f' ({within})' if within else ''}{f'; {text.listing(others)}' if others else ''}."


def plots(card: RewardCard) -> Iterator[Row]:
    """The calibration curve and the histogram of margins, if the card has them."""
    if bins := card.calibration.bins:
        caption = "share of pairs that it gets right, by its confidence; dotted: perfect calibration"
        points = [(part.confidence, Interval(mean=part.share, low=part.low, high=part.high)) for part in bins]
        yield {"title": "Calibration", "caption": caption, "svg": calibration_curve(points, title="Calibration")}
    edges, counts = card.margins.edges, card.margins.counts
    if counts and len(edges) == len(counts) + 1:
        caption = "pairs by margin: score of chosen − rejected; below 0 it is wrong"
        yield {"title": "Margins", "caption": caption, "svg": histogram(edges, counts, title="Margins")}


def _card_figures(card: RewardCard) -> Iterator[tuple[str, str]]:
    for judge in card.baselines:
        if judge.difference is not None:
            yield f"accuracy minus the accuracy of: {judge.name}", _signed(judge.difference)
    calibration = card.calibration
    if calibration.ece is not None and calibration.brier is not None and calibration.log_loss is not None:
        yield "expected calibration error", text.number(calibration.ece, 3)
        yield "Brier score (chance: .25)", text.number(calibration.brier, 3)
        yield "log loss, nats (chance: .693)", text.number(calibration.log_loss, 3)
    yield from _of_length(card.length)
    if card.rule and card.rule.agreement and card.rule.accuracy:
        agreement = f"{text.number(card.rule.agreement.mean)} of the {card.rule.num_pairs} pairs that the rule decides"
        yield "agrees with the rule", f"{agreement}; the rule itself is right on {text.number(card.rule.accuracy.mean)}"
    if means := [subset.accuracy.mean for subset in card.subsets if subset.accuracy]:
        yield "mean over subsets", text.number(sum(means) / len(means), 3)
    if card.learned:
        yield "learned from", _learned(card.learned)
        for words, heading in (
            (card.learned.for_answer, "words that favour an answer (bag of words)"),
            (card.learned.against, "words that count against an answer"),
        ):
            if words:
                yield heading, ", ".join(words[:FEW_WORDS])


def _of_length(length: Length) -> Iterator[tuple[str, str]]:
    if length.prefers_longer is not None and length.longer_is_chosen is not None:
        shares = text.share(length.prefers_longer), text.share(length.longer_is_chosen)
        yield "prefers the longer answer", f"{shares[0]} of pairs; the longer one is better in {shares[1]}"
    if length.correlation is not None:
        yield "correlation of margin and difference in length", text.number(length.correlation)
    if length.accuracy_where_longer is not None and length.accuracy_where_shorter is not None:
        sides = text.number(length.accuracy_where_longer), text.number(length.accuracy_where_shorter)
        yield "right where the better answer is longer, shorter", f"{sides[0]}, {sides[1]}"


def _signed(item: Interval) -> str:
    bounds = text.bounds(item, 3, text.signed)
    return text.signed(item.mean) + (f" ({bounds})" if bounds else "")


def _learned(learned: Learned) -> str:
    pairs = f"{learned.num_pairs} pairs"
    if not learned.judged_too:
        return f"{pairs}; no judged pair overlaps with them"
    fate = "left out" if learned.left_out else "judged anyway"
    return f"{pairs}; {learned.judged_too} judged pairs overlap with them and were {fate}"
