"""``results/WORK.json`` and its table, made from the journal of single measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.figures import PHASES, Figures, figures_of, loss_differences, medians, ratios
from benchmarks.works import OURS, SERIES, WORKS, Work

_COLUMNS = {
    "tokens_per_second": ("tok/s", lambda value: f"{value:,.0f}"),
    "seconds_per_update": ("s an update", lambda value: f"{value:.1f}"),
    "mean_length": ("mean tokens", lambda value: f"{value:.1f}"),
    "peak_memory": ("peak memory", lambda value: f"{value / 1e9:.2f} GB"),
    "mfu": ("MFU", lambda value: f"{value:.1%}"),
    "base_copies": ("copies of the base", lambda value: f"{value:.2f}"),
    "first_loss": ("first loss", lambda value: f"{value:.4f}"),
    "second_loss": ("second loss", lambda value: f"{value:.4f}"),
}


def summarise(
    name: str, inputs: Mapping[str, Any], measurements: Sequence[Mapping[str, Any]], missing: Mapping[str, str]
) -> dict[str, Any]:
    """What the work's JSON says, but for the conditions. ``missing`` gives reasons why rivals could not take part."""
    work = WORKS[name]
    found: dict[str, dict[int, Figures]] = {}
    for one in measurements:
        if "result" in one:
            figures = _figures(work, one["contestant"], inputs, one["repetition"], one["result"])
            found.setdefault(one["contestant"], {})[one["repetition"]] = figures
    failures = {one["contestant"]: one["error"] for one in measurements if "error" in one} | dict(missing)
    middle = {contestant: medians(list(each.values())) for contestant, each in found.items()}
    own = {contestant for contestant, how in work.contestants.items() if how.against is None}
    rivals = {
        one: middle.get(one, {"failed": failures.get(one, "not run")}) for one in work.contestants if one not in own
    }
    content: dict[str, Any] = {
        "work": name,
        "ratios_are": "ours divided by the rival: above 1 is better for tokens_per_second, below 1 for all else",
        "ours": middle.get(OURS, {})
        if OURS in own
        else {one: middle[one] for one in work.contestants if one in middle},
        "rivals": rivals,
        "ratios": _against(work, found, lambda how, ours, rival: ratios(ours, rival, work.quantity)),
    }
    if variants := [one for one in work.contestants if one in own & set(middle) and one != OURS and OURS in own]:
        content["other_variants_of_ours"] = {one: middle[one] for one in variants}
        # Where nobody is compared with a variant alone, everybody is compared with each.
        if not any(how.against in variants for how in work.contestants.values()):
            content["ratios_of_variants"] = {
                one: {
                    rival: ratios(found[one], found[rival], work.quantity)
                    for rival, how in work.contestants.items()
                    if how.against is not None and rival in found
                }
                for one in variants
            }
    if work.kind in ("sft", "reward", "dpo", "kto"):
        content["learning"] = _against(work, found, lambda how, ours, rival: loss_differences(ours, rival))
    if failures:
        content["failures"] = failures
    if work.kind == "growth":
        content["series"] = {title: [one for one in points if one in middle] for title, points in SERIES.items()}
    content["allowed"] = {one: how.allowed for one, how in work.contestants.items()}
    content["measurements"] = list(measurements)
    return content


def _against(work: Work, found: Mapping[str, Mapping[int, Figures]], compare: Any) -> dict[str, Any]:
    """``compare`` for each rival that was measured, with the one of ours that it is compared with."""
    compared = {}
    for name, how in work.contestants.items():
        if how.against is not None and name in found and how.against in found:
            compared[name] = compare(how, found[how.against], found[name])
    return compared


def _figures(
    work: Work, contestant: str, inputs: Mapping[str, Any], repetition: int, result: Mapping[str, Any]
) -> Figures:
    chosen = inputs["repetitions"][repetition]
    if work.kind != "growth":
        sharing = work.contestants[contestant].sharing
        return figures_of(work.kind, work.adapter, inputs["models"]["base"], chosen["counts"], result, sharing)
    from benchmarks.works import POINTS

    model = inputs["models"][POINTS[contestant].model or "base"]
    return figures_of("sft", work.adapter, model, chosen[contestant]["counts"], result)


def table(content: Mapping[str, Any]) -> str:
    """The JSON's headline as a Markdown table: a line a contestant; ratios are ours divided by the line's."""
    work = WORKS[content["work"]]
    lines = _lines(work, content)
    shown = [name for name in _COLUMNS if any(name in figures for _, figures in lines)]
    compared = bool(content["ratios"])
    heads = ["contestant", *(_COLUMNS[name][0] for name in shown)]
    if compared:
        heads += [f"ours ÷ it, {_COLUMNS[work.quantity][0]}", "ours ÷ it, memory"]
    text = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, figures in lines:
        cells = [name, *(_COLUMNS[one][1](figures[one]) if one in figures else "–" for one in shown)]
        if compared:
            ratio = content["ratios"].get(name, {})
            cells += [_times(ratio, work.quantity), _times(ratio, "peak_memory")]
        text.append("| " + " | ".join(cells) + " |")
    notes = [*_phases(lines), *_variants(work, content)]
    notes += _unlike(content.get("learning", {}))
    if OURS in work.contestants:  # growth has one contestant at many points
        notes += [f"- {name}: {allowed}" for name, allowed in content["allowed"].items()]
    notes += [f"- {name} failed: {reason}" for name, reason in content.get("failures", {}).items()]
    return "\n".join([*text, "", *notes]) + "\n"


def _unlike(learning: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each rival whose first losses are not those of ours."""
    return [
        f"- {name}: its first losses differ from ours by up to {one['first_loss_difference']:.1%}"
        for name, one in learning.items()
        if not one["same_first_loss"]
    ]


def _phases(lines: Sequence[tuple[str, Mapping[str, float]]]) -> list[str]:
    """A line for each contestant that tells its phases apart."""
    found = []
    for name, figures in lines:
        if phases := [phase for phase in PHASES.values() if f"{phase}_seconds" in figures]:
            pairs = [(phase, figures[f"{phase}_seconds"], figures[f"{phase}_floor"]) for phase in phases]
            told = ", ".join(f"{phase} {seconds:.1f} s ({floor:.1f})" for phase, seconds, floor in pairs)
            found.append(f"- {name}: {told}; in brackets the phase's FLOP at the measured peak")
    return found


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
