"""Prompts that several runs answered, and what the same arm said to them in each, chosen by a rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from alignment.report.run_page.run_records import Answer, Run, Sample
from alignment.report.run_page.sample_rows import choose, gap

WIDEST = "runs differ most"


def rule(primary: str | None) -> str:
    """How the shown prompts were chosen, where runs are compared by this metric."""
    others = "Arms that only one run has are left out; runs that said the same are named together."
    if primary is None:
        return f"They are in order of a hash of their id, taken from each task in turn. {others}"
    return (
        f"About half are the prompts on which one arm’s score by {primary} differs most between runs, taken from each "
        "task in turn. The rest are in order of a hash of their id, alternating between the half that this arm "
        f"answered better and the half it answered worse. {others}"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """An answer, and which runs (by place) gave it."""

    runs: list[int]
    answer: Answer


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """A prompt that several runs answered: ``arms`` are (arm, what was said)."""

    sample: Sample
    why: str
    arms: list[tuple[str, list[Said]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """``shown`` of ``count`` prompts that at least two of the runs answered by an arm of the same name."""

    shown: list[Shared]
    count: int


def share(runs: Sequence[Run], num_samples: int) -> Chosen:
    """The prompts to show; one with the same id and the same turns is the same prompt."""
    found: dict[tuple[str, str], dict[int, Sample]] = {}
    for place, run in enumerate(runs):
        for sample in run.samples:
            found.setdefault((sample.id, str(sample.messages)), {}).setdefault(place, sample)
    together = [(next(iter(by_run.values())), _arms(by_run)) for by_run in found.values()]
    shared = [(sample, arms) for sample, arms in together if arms]
    told = [_widest(sample, arms) for sample, arms in shared]
    arms_of = {id(one): arms for one, (_, arms) in zip(told, shared, strict=True)}
    shown = [
        Shared(
            sample=one.sample,
            why=one.why,
            arms=[(arm, _said(by_run)) for arm, by_run in arms_of[id(one.sample)].items()],
        )
        for one in choose(told, num_samples, widest=WIDEST)
    ]
    return Chosen(shown=shown, count=len(shared))


def _arms(by_run: dict[int, Sample]) -> dict[str, dict[int, Answer]]:
    """Each arm's answers by run, of arms that two runs have or more."""
    arms: dict[str, dict[int, Answer]] = {}
    for place, sample in by_run.items():
        for answer in sample.answers:
            arms.setdefault(answer.arm, {})[place] = answer
    return {arm: answers for arm, answers in arms.items() if len(answers) > 1}


def _widest(sample: Sample, arms: dict[str, dict[int, Answer]]) -> Sample:
    """The sample with the answers of one arm, that in which the runs differ most."""
    return max((replace(sample, answers=list(by_run.values())) for by_run in arms.values()), key=gap)


def _said(by_run: dict[int, Answer]) -> list[Said]:
    said: dict[str, Said] = {}
    for place, answer in by_run.items():
        if answer.text in said:
            said[answer.text].runs.append(place)
        else:
            said[answer.text] = Said(runs=[place], answer=answer)
    return list(said.values())
