"""Chooses the prompts that the page shows side by side, by a rule that the page states, never by hand or at random."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from alignment.report.run_page.run_records import Sample

WIDEST = "arms differ most"
BETTER = "by hash, better half"
WORSE = "by hash, worse half"

BY_HASH = "by hash"


def rule(primary: str | None) -> str:
    """The rule by which prompts were chosen, in words; ``primary`` names the metric that arms are compared by."""
    if primary is None:
        return "They are ordered by a hash of their id and taken from each task in turn."
    return (
        f"About half are the prompts on which the arms’ scores by {primary} differ most, taken from each task in turn. "
        "The rest are ordered by a hash of their id, again taken from each task in turn, alternating between the "
        "half of "
        "all prompts that the arms answered better and the half they answered worse."
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """A sample and the part of the rule that selected it."""

    sample: Sample
    why: str


def choose(samples: list[Sample], num_samples: int, *, widest: str = WIDEST) -> list[Chosen]:
    """``num_samples`` samples, or all if there are fewer; the same samples give the same choice in any order.

    Samples without a score by the primary metric come last.

    ``widest`` is the reason given for samples whose answers differ most by the primary metric.
    """
    ordered = sorted(samples, key=_hash)
    num_widest = (num_samples + 1) // 2
    by_gap = sorted((s for s in ordered if gap(s) > 0), key=lambda s: -gap(s))
    chosen = [Chosen(sample=s, why=widest) for s in _in_turn(by_gap, num_widest, _task)]
    taken = {id(item.sample) for item in chosen}
    rest = [s for s in ordered if id(s) not in taken]
    halves = _halves(ordered)
    by_half = [
        s for half in (WORSE, BETTER) for s in _in_turn([s for s in rest if halves[id(s)] == half], len(rest), _task)
    ]
    without = _in_turn([s for s in rest if halves[id(s)] == BY_HASH], len(rest), _task)
    following = [*_in_turn(by_half, len(rest), lambda s: halves[id(s)]), *without]
    wanted = max(0, num_samples - len(chosen))
    return [*chosen, *(Chosen(sample=s, why=halves[id(s)]) for s in following[:wanted])]


def _hash(sample: Sample) -> str:
    return hashlib.sha256(sample.id.encode("utf-8", "replace")).hexdigest()


def _task(sample: Sample) -> str:
    return sample.task


def _merits(sample: Sample) -> list[float]:
    return [answer.merit for answer in sample.answers if answer.merit is not None]


def gap(sample: Sample) -> float:
    """The largest difference between its answers' scores by the primary metric."""
    merits = _merits(sample)
    return max(merits) - min(merits) if merits else 0.0


def _halves(samples: list[Sample]) -> dict[int, str]:
    """Better or worse than the median prompt, by the mean merit of all arms; ``BY_HASH`` if no answer to the prompt has
    a merit."""
    means = {id(s): sum(_merits(s)) / len(_merits(s)) for s in samples if _merits(s)}
    middle = median(means.values()) if means else 0.0
    halves = {key: BETTER if mean > middle else WORSE for key, mean in means.items()}
    return {id(s): halves.get(id(s), BY_HASH) for s in samples}


def _in_turn(samples: list[Sample], count: int, group: Callable[[Sample], str]) -> list[Sample]:
    """The first ``count`` samples, taken from each group in turn, in the order in which groups first appear."""
    queues: dict[str, list[Sample]] = {}
    for sample in samples:
        queues.setdefault(group(sample), []).append(sample)
    rounds = max((len(queue) for queue in queues.values()), default=0)
    dealt = [queue[turn] for turn in range(rounds) for queue in queues.values() if turn < len(queue)]
    return dealt[: max(0, count)]
