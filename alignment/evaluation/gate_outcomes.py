"""Whether an evaluation meets its gates: by how much one arm has to be better than another, with confidence. A gate
that asks for a difference asks for one that the evaluation calls real."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignment.config.evaluating import GateConfig
from alignment.evaluation.paired_scores import corrected_p_values, difference, differences, scores
from alignment.records.evaluation import BETTER, FEWEST_PROMPTS, Comparison, Evaluation, adjusted_p_in_words
from alignment.records.interval import Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class GateOutcome:
    """A gate and what was measured. ``compared`` names the difference, such as ``dpo − sft in total``. ``gain`` is None
    if it is not known; ``why_unknown`` then says why. ``is_better``: the evaluation calls the arm better, by the p
    value ``adjusted_p``."""

    compared: str
    required: float
    gain: Interval | None
    why_unknown: str = ""
    is_better: bool = False
    adjusted_p: float | None = None

    @property
    def met(self) -> bool:
        """Whether the whole interval lies above what is required, and nothing says that it may do so by chance."""
        return self._is_above and not self._why_by_chance

    @property
    def more_prompts_may_help(self) -> bool:
        """Whether the gate is not met only because there are too few prompts to say."""
        return not self.met and self.gain is not None and self.gain.mean > self.required

    @property
    def _is_above(self) -> bool:
        return self.gain is not None and self.gain.bounds is not None and self.gain.bounds[0] > self.required

    @property
    def _why_by_chance(self) -> str:
        """Why the interval is not enough, in words; empty if it is."""
        if self.is_better or self.gain is None:
            return ""
        if self.required >= 0.0:
            return f"the evaluation does not call the difference real{adjusted_p_in_words(self.adjusted_p)}"
        if self.gain.low == self.gain.high:
            return "all prompts have the same difference, so the interval says nothing about others"
        return ""

    def in_words(self) -> str:
        """``dpo − sft in total: −1.000 (−1.000 to −1.000), required: the whole interval above −0.01``."""
        if self.gain is None or self.gain.bounds is None:
            return f"{self.compared}: not known, because {self.why_unknown}"
        low, high = (_signed(bound, ".3f") for bound in self.gain.bounds)
        why_not = f", but {self._why_by_chance}" if self._is_above and self._why_by_chance else ""
        measured = f"{_signed(self.gain.mean, '.3f')} ({low} to {high})"
        return f"{self.compared}: {measured}, required: {above(self.required)}{why_not}"


def outcomes(gates: Sequence[GateConfig], evaluation: Evaluation, artifact: Path) -> list[GateOutcome]:
    """The outcome of each gate, in order. ``artifact`` is the folder of the evaluation's result. Raises ValueError: a
    line of its samples is not JSON."""
    comparisons = [*evaluation.comparisons, *evaluation.other_comparisons]
    return [_outcome(gate, evaluation, artifact, comparisons) for gate in gates]


def compared(arm: str, against: str, metric: str, *, higher_is_better: bool) -> str:
    """The difference that a gate requires to be above a number: ``dpo − sft in total``. ``arm`` and ``against`` are
    labels. If less of the metric is better, the sides change places."""
    first, second = (arm, against) if higher_is_better else (against, arm)
    return f"{first} − {second} in {metric}{'' if higher_is_better else ' (less is better)'}"


def above(required: float) -> str:
    """What a gate requires of the interval, in words."""
    return f"the whole interval above {_signed(required, 'g')}"


def _outcome(
    gate: GateConfig, evaluation: Evaluation, artifact: Path, comparisons: Sequence[Comparison]
) -> GateOutcome:
    name = gate.metric or evaluation.primary or ""
    higher_is_better = next((metric.higher_is_better for metric in evaluation.metrics if metric.name == name), True)
    arm, against = (scores(artifact, side).get(name, {}) for side in (gate.arm, gate.against))
    why_unknown, gain = _why_unknown(arm, against), None
    if not why_unknown:
        gain = difference(arm, against) if higher_is_better else difference(against, arm)
    of_arm = [item if item.arm == gate.arm else item.turned() for item in comparisons]
    wanted = (name, gate.arm, gate.against)
    own = next((item for item in of_arm if (item.metric or evaluation.primary, item.arm, item.against) == wanted), None)
    if own is None and not why_unknown:
        own = _compared_alone(gate, name, arm, against)
    labels = evaluation.label(gate.arm), evaluation.label(gate.against)
    return GateOutcome(
        compared=compared(*labels, name, higher_is_better=higher_is_better),
        required=gate.min_difference,
        gain=gain,
        why_unknown=why_unknown,
        is_better=own is not None and evaluation.verdict(own) == BETTER,
        adjusted_p=None if own is None else own.adjusted_p,
    )


def _compared_alone(gate: GateConfig, metric: str, arm: dict[str, float], against: dict[str, float]) -> Comparison:
    """The difference of two arms that the evaluation does not list, as a family of its own."""
    interval = difference(arm, against)
    assert interval is not None, "both have scores on the same prompts"
    low, high = interval.bounds or (interval.mean, interval.mean)
    (adjusted_p,) = corrected_p_values([differences(arm, against) or []])
    return Comparison(
        arm=gate.arm,
        against=gate.against,
        metric=metric,
        difference=interval.mean,
        low=low,
        high=high,
        adjusted_p=adjusted_p,
    )


def _why_unknown(arm: dict[str, float], against: dict[str, float]) -> str:
    both = len(arm.keys() & against.keys())
    if both < FEWEST_PROMPTS:
        prompts = "1 prompt has a score" if both == 1 else f"{both or 'no'} different prompts have a score"
        return f"{prompts} of both arms, and a gate needs at least {FEWEST_PROMPTS}"
    if only_one := len(arm.keys() ^ against.keys()):
        return f"{'1 prompt has' if only_one == 1 else f'{only_one} prompts have'} a score of only one of these arms"
    return ""


def _signed(value: float, form: str) -> str:
    text = format(value, form)
    return text.replace("-", "−") if float(text) < 0 else f"+{text}" if float(text) > 0 else text.removeprefix("-")
