"""``results/WORK.json`` and its table, made from single measurements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from benchmarks.figures import (
    PHASES,
    Figures,
    at_its_best,
    figures_of,
    highest_peaks,
    loss_differences,
    medians,
    ratios,
)
from benchmarks.growth import POINTS, SERIES
from benchmarks.work import OURS, Work
from benchmarks.works import WORKS

_COLUMNS = {
    "tokens_per_second": ("tok/s", lambda value: f"{value:,.0f}"),
    "seconds_per_update": ("s an update", lambda value: f"{value:.1f}"),
    "mean_length": ("mean tokens", lambda value: f"{value:.1f}"),
    "peak_memory": ("peak memory", lambda value: f"{value / 1e9:.2f} GB"),
    "mfu": ("MFU", lambda value: f"{value:.1%}"),
    "base_copies": ("copies of the base", lambda value: f"{value:.2f}"),
    "first_loss": ("first loss", lambda value: f"{value:.4f}"),
    "last_loss": ("last loss", lambda value: f"{value:.4f}"),
}


def summarise(
    name: str,
    work: Work,
    inputs: Mapping[str, Any],
    measurements: Sequence[Mapping[str, Any]],
    missing: Mapping[str, str],
) -> dict[str, Any]:
    """What the JSON of a work says, but for the conditions.

    ``work`` has the settings that a search chose. ``missing`` gives reasons why rivals could not take part.
    """
    measured: dict[str, dict[int, Figures]] = {}
    done = [entry for entry in measurements if "result" in entry]
    dtypes = {contestant: how.dtype for contestant, how in work.contestants.items()}
    peaks = highest_peaks([(dtypes[entry["contestant"]], entry["result"]["matmul_peak"]) for entry in done])
    for entry in done:
        peak = peaks[dtypes[entry["contestant"]]]
        figures = _figures(work, entry["contestant"], inputs, entry["repetition"], entry["result"], peak)
        measured.setdefault(entry["contestant"], {})[entry["repetition"]] = figures
    failures = {entry["contestant"]: entry["error"] for entry in measurements if "error" in entry} | dict(missing)
    middle = {contestant: medians(list(each.values())) for contestant, each in measured.items()}
    own = {contestant for contestant, how in work.contestants.items() if how.against is None}
    content: dict[str, Any] = {
        "work": name,
        "ratios_are": "ours divided by the rival: above 1 is better for tokens_per_second, below 1 for all else",
        "ours": middle.get(OURS, {})
        if OURS in own
        else {point: middle[point] for point in work.contestants if point in middle},
        "rivals": {
            rival: middle.get(rival, {"failed": failures.get(rival, "not run")})
            for rival in work.contestants
            if rival not in own
        },
        "ratios": _against(work, measured, lambda ours, rival: ratios(ours, rival, work.quantity)),
        "at_their_best": _at_their_best(work, measured),
        "peaks": peaks,
    }
    content |= _of_variants(work, measured, middle, own)
    if work.kind in ("sft", "reward", "dpo", "kto"):
        content["learning"] = _against(work, measured, loss_differences)
    if failures:
        content["failures"] = failures
    if work.kind == "growth":
        content["series"] = {title: [point for point in points if point in middle] for title, points in SERIES.items()}
    content["allowed"] = {contestant: how.allowed for contestant, how in work.contestants.items()}
    content["differs"] = {contestant: how.differs for contestant, how in work.contestants.items() if how.differs}
    content["settings"] = {contestant: dict(how.setting) for contestant, how in work.contestants.items() if how.setting}
    if work.kind != "growth":  # whose points are in the names
        content["counts_of_steps"] = [repetition["steps"] for repetition in inputs["repetitions"]]
    content["measurements"] = list(measurements)
    return content


def _of_variants(
    work: Work, measured: Mapping[str, Mapping[int, Figures]], middle: Mapping[str, Figures], own: AbstractSet[str]
) -> dict[str, Any]:
    """Variants of ours. Where nobody is compared with a variant alone, everybody is compared with each."""
    if OURS not in own:
        return {}
    variants = [name for name in work.contestants if name in own & set(middle) and name != OURS]
    if not variants:
        return {}
    content: dict[str, Any] = {"other_variants_of_ours": {name: middle[name] for name in variants}}
    if not any(how.against in variants for how in work.contestants.values()):
        content["ratios_of_variants"] = {
            name: {
                rival: ratios(measured[name], measured[rival], work.quantity)
                for rival, how in work.contestants.items()
                if how.against is not None and rival in measured
            }
            for name in variants
        }
    return content


def _at_their_best(work: Work, measured: Mapping[str, Mapping[int, Figures]]) -> dict[str, Any]:
    """Ours beside the fastest and the leanest contestant of each library whose settings were searched."""
    best = {}
    for library, rival in work.rivals.items():
        own = [
            name
            for name, how in work.contestants.items()
            if how.library == library and name in measured and not how.differs
        ]
        against = rival.template.against
        if own and against is not None and against in measured:
            best[library] = at_its_best(measured[against], {name: measured[name] for name in own}, work.quantity)
    return best


def _against(
    work: Work,
    measured: Mapping[str, Mapping[int, Figures]],
    compare: Callable[[Mapping[int, Figures], Mapping[int, Figures]], Any],
) -> dict[str, Any]:
    """``compare`` for each rival that was measured, with the one of ours that it is compared with."""
    return {
        name: compare(measured[how.against], measured[name])
        for name, how in work.contestants.items()
        if how.against is not None and name in measured and how.against in measured
    }


def _figures(
    work: Work, contestant: str, inputs: Mapping[str, Any], repetition: int, result: Mapping[str, Any], peak: float
) -> Figures:
    rows = inputs["repetitions"][repetition]
    if work.kind != "growth":
        sharing = work.contestants[contestant].sharing
        return figures_of(work.kind, work.adapter, inputs["models"]["base"], rows["steps"], result, sharing, peak=peak)
    model = inputs["models"][POINTS[contestant].model or "base"]
    return figures_of("sft", work.adapter, model, rows[contestant]["steps"], result, peak=peak)


def table(content: Mapping[str, Any]) -> str:
    """The JSON's headline as a Markdown table: a line a contestant; ratios are ours divided by the line's."""
    work = WORKS[content["work"]]
    lines = _lines(work, content)
    shown = [name for name in _COLUMNS if any(name in figures for _, figures in lines)]
    compared = bool(content["ratios"])
    differs = content.get("differs", {})
    heads = ["contestant", *(_COLUMNS[name][0] for name in shown)]
    if compared:
        heads += [f"ours ÷ it, {_COLUMNS[work.quantity][0]}", "ours ÷ it, memory"]
    if differs:
        heads.append("what differs")
    text = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, figures in lines:
        cells = [name, *(_COLUMNS[column][1](figures[column]) if column in figures else "–" for column in shown)]
        if compared:
            ratio = content["ratios"].get(name, {})
            cells += [_times(ratio, work.quantity), _times(ratio, "peak_memory")]
        if differs:
            cells.append(differs.get(name, ""))
        text.append("| " + " | ".join(cells) + " |")
    notes = [*_best(work, content), *_phases(lines), *_variants(work, content)]
    notes += _unlike(content.get("learning", {}))
    if OURS in work.contestants:  # growth has one contestant at many points
        notes += [f"- {name}: {allowed}" for name, allowed in content["allowed"].items()]
    notes += [f"- {name} failed: {reason}" for name, reason in content.get("failures", {}).items()]
    return "\n".join([*text, "", *notes]) + "\n"


def _best(work: Work, content: Mapping[str, Any]) -> list[str]:
    """A line for each library at its best."""
    column = _COLUMNS[work.quantity][0]
    return [
        f"- **{library} at its best**: ours ÷ its fastest ({best['fastest']['contestant']}) "
        f"{_times(best['fastest'], work.quantity)} in {column}, ours ÷ its leanest ({best['leanest']['contestant']}) "
        f"{_times(best['leanest'], 'peak_memory')} in memory"
        for library, best in content.get("at_their_best", {}).items()
    ]


def _unlike(learning: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each rival whose losses are not those of ours."""
    return [
        f"- {name}: its losses differ from ours by up to {difference['first_loss_difference']:.1%} in the first step "
        f"and {difference['last_loss_difference']:.1%} in the last"
        for name, difference in learning.items()
        if not difference["same_losses"]
    ]


def _phases(lines: Sequence[tuple[str, Mapping[str, float]]]) -> list[str]:
    """A line for each contestant that tells its phases apart."""
    notes = []
    for name, figures in lines:
        if phases := [phase for phase in PHASES.values() if f"{phase}_seconds" in figures]:
            pairs = [(phase, figures[f"{phase}_seconds"], figures[f"{phase}_floor"]) for phase in phases]
            seconds = ", ".join(f"{phase} {seconds:.1f} s ({floor:.1f})" for phase, seconds, floor in pairs)
            notes.append(f"- {name}: {seconds}; in brackets the phase's FLOP at the measured peak")
    return notes


def _variants(work: Work, content: Mapping[str, Any]) -> list[str]:
    """A line for each variant of ours and rival."""
    return [
        f"- {variant} ÷ {rival}: {_times(ratio, work.quantity)} in {_COLUMNS[work.quantity][0]}, "
        f"{_times(ratio, 'peak_memory')} in memory"
        for variant, rivals in content.get("ratios_of_variants", {}).items()
        for rival, ratio in rivals.items()
    ]


def _lines(work: Work, content: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    known = {**content.get("other_variants_of_ours", {}), **content["rivals"]}
    known |= content["ours"] if OURS not in work.contestants else {OURS: content["ours"]}
    return [(name, known[name]) for name in work.contestants if name in known]


def _times(ratio: Mapping[str, Any], quantity: str) -> str:
    if quantity not in ratio:
        return ""
    span = ratio.get(f"{quantity}_range")
    return f"{ratio[quantity]:.2f}" + (f" ({span[0]:.2f}–{span[1]:.2f})" if span else "")
