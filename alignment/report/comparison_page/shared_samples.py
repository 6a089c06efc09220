"""Prompts that several runs answered, with the answers of the same arm in each run, chosen by a rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from alignment.report.run_page.run_records import Answer, Run, Sample
from alignment.report.run_page.sample_rows import choose, gap

WIDEST = "runs differ most"


def rule(primary: str | None) -> str:
    """A description of how the shown prompts were chosen, if runs are compared by this metric."""
    others = "Arms that only one run has are left out; runs with the same answer are named together."
    if primary is None:
        return f"They are ordered by a hash of their id and taken from each task in turn. {others}"
    return (
        f"About half are the prompts on which one arm’s score by {primary} differs most between runs, taken from each "
        "task in turn. The rest are ordered by a hash of their id, alternating between the half that this arm "
        f"answered better and the half it answered worse. {others}"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedAnswer:
    """An answer, and the indices of the runs that gave it."""

    runs: list[int]
    answer: Answer


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """A prompt that several runs answered: ``arms`` are (arm, answers)."""

    sample: Sample
    why: str
    arms: list[tuple[str, list[SharedAnswer]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """``shown`` of ``count`` prompts that at least two of the runs answered by an arm of the same name."""

    shown: list[Shared]
    count: int


def share(runs: Sequence[Run], num_samples: int) -> Chosen:
    """The prompts to show."""
    samples_by_prompt: dict[str, dict[int, Sample]] = {}
    for run_index, run in enumerate(runs):
        for sample in run.samples:
            samples_by_prompt.setdefault(sample.prompt, {}).setdefault(run_index, sample)
    together = [(next(iter(by_run.values())), _arms(by_run)) for by_run in samples_by_prompt.values()]
    shared = [(sample, arms) for sample, arms in together if arms]
    widest = [_widest(sample, arms) for sample, arms in shared]
    arms_of = {id(chosen_sample): arms for chosen_sample, (_, arms) in zip(widest, shared, strict=True)}
    shown = [
        Shared(
            sample=chosen_sample.sample,
            why=chosen_sample.why,
            arms=[(arm, _different(by_run)) for arm, by_run in arms_of[id(chosen_sample.sample)].items()],
        )
        for chosen_sample in choose(widest, num_samples, widest=WIDEST)
    ]
    return Chosen(shown=shown, count=len(shared))


def _arms(by_run: dict[int, Sample]) -> dict[str, dict[int, Answer]]:
    """The answers of each arm by run index, for arms that at least two runs have."""
    arms: dict[str, dict[int, Answer]] = {}
    for run_index, sample in by_run.items():
        for answer in sample.answers:
            arms.setdefault(answer.arm, {})[run_index] = answer
    return {arm: answers for arm, answers in arms.items() if len(answers) > 1}


def _widest(sample: Sample, arms: dict[str, dict[int, Answer]]) -> Sample:
    """The sample with the answers of the one arm in which the runs differ most."""
    return max((replace(sample, answers=list(by_run.values())) for by_run in arms.values()), key=gap)


def _different(by_run: dict[int, Answer]) -> list[SharedAnswer]:
    """Each answer once; the same text with other scores, as after a change of a metric, is another one."""
    different: dict[tuple[object, ...], SharedAnswer] = {}
    for run_index, answer in by_run.items():
        key = (answer.text, *answer.later, *sorted(answer.scores.items()))
        if key in different:
            different[key].runs.append(run_index)
        else:
            different[key] = SharedAnswer(runs=[run_index], answer=answer)
    return list(different.values())
