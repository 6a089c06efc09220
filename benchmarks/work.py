"""What a work, its contestants and the rivals whose settings are searched consist of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.figures import Sharing
from benchmarks.grid import GOALS, Axis, Setting, described
from benchmarks.setting import MAX_PROMPT_LENGTH, PROMPTS, REPETITIONS

OURS = "ours"
OURS_FLOAT32 = "ours_float32"


@dataclass(frozen=True, kw_only=True, slots=True)
class Contestant:
    """``module`` runs one measurement. ``allowed`` says what it was given. ``measured`` steps follow one warm-up step.

    ``against`` names which of ours a rival is compared with; None for our own. ``environment`` names a requirements
    file in ``environments/``, or None for the project's own. ``engine`` is the package of an engine that the contestant
    asks, whose environment `make engine` builds. ``sharing`` is about PPO, ``master_weights`` about full training of
    ours, ``optim_changes`` are settings of its optimiser that a variant of ours changes (none of PPO).
    ``dtype`` is the number format of products. Only contestants that sample answers read it; others compute in
    bfloat16.
    ``differs`` says in the table's line how its work differs from that of ours.

    ``library`` names the searched rival that it belongs to, ``setting`` the values of that rival's axes. Where there is
    a ``goal``, the setting is the one that the search chose for it. ``threads_sleep`` says whether idle threads
    sleep soon as the launcher says, or spin as OpenMP's do by themselves. ``busy_neighbours`` processes compute beside
    it, a core each.
    """

    module: str
    allowed: str
    measured: int = 2
    against: str | None = OURS
    environment: str | None = None
    engine: str | None = None
    sharing: Sharing = field(default_factory=Sharing)
    master_weights: bool = True
    optim_changes: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"
    differs: str = ""
    library: str | None = None
    goal: str | None = None
    setting: Setting = field(default_factory=dict)
    threads_sleep: bool = True
    busy_neighbours: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Rival:
    """A library whose settings are searched. ``template`` is a contestant without a setting; ``axes`` are its choices.

    ``fixed`` are values that no search changes.
    """

    template: Contestant
    axes: tuple[Axis, ...]
    fixed: Setting = field(default_factory=dict)

    def contestant(self, setting: Setting, **changes: Any) -> Contestant:
        """The library with a setting of its axes."""
        allowed = f"{self.template.allowed}; {described(setting, self.axes)}"
        return replace(self.template, allowed=allowed, setting={**self.fixed, **setting}, **changes)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSize:
    """What ``sampling`` samples: an answer of at most ``new_tokens`` to each of ``prompts`` prompts, once a seed.

    A prompt has at most ``prompt_tokens``. With ``system_tokens`` it is then put behind one system turn, whose text has
    this number of tokens (in place of the template's own turn, if it has one).
    """

    prompts: int = PROMPTS
    prompt_tokens: int = MAX_PROMPT_LENGTH
    new_tokens: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)
    system_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """``kind`` is ``sft``, ``reward``, ``dpo``, ``kto``, ``ppo``, ``grpo``, ``sampling`` or ``growth``.

    ``adapter`` is ``lora`` or ``full``. ``quantity`` is what ratios are about, beside peak memory. ``size`` is about
    ``sampling``. A published result has ``repetitions`` or more. ``rivals`` are the libraries that are searched.
    A repetition has rows for ``batches`` steps: with 3, all three steps take fresh rows; with 1, all take the same.
    """

    kind: str
    adapter: str
    contestants: dict[str, Contestant] = field(default_factory=dict)
    rivals: dict[str, Rival] = field(default_factory=dict)
    quantity: str = "tokens_per_second"
    size: SamplingSize = field(default_factory=SamplingSize)
    repetitions: int = REPETITIONS
    batches: int = 1


def searched_contestants(library: str, rival: Rival) -> dict[str, Contestant]:
    """A library at its fastest and at its leanest; a search of its settings has yet to say what these are."""
    return {
        f"{library}_{goal}": replace(
            rival.template, allowed=f"{rival.template.allowed}; its {goal} setting of the search", goal=goal
        )
        for goal in GOALS
    }


def with_choices(work: Work, choices: Mapping[str, Setting]) -> Work:
    """The work with the settings that a search chose, by the names of the contestants.

    A setting takes part once, although it may be a library's default, its fastest and its leanest.
    """
    contestants = {name: how for name, how in work.contestants.items() if how.goal is None}
    for name, how in work.contestants.items():
        if how.goal is None or how.library is None:
            continue
        resolved = work.rivals[how.library].contestant(choices[name], goal=how.goal)
        same = next((other for other, taking in contestants.items() if _is_same(taking, resolved)), None)
        if same is None:
            contestants[name] = resolved
        else:
            allowed = f"{contestants[same].allowed} (this is also its {how.goal} setting)"
            contestants[same] = replace(contestants[same], allowed=allowed)
    return replace(work, contestants={name: contestants[name] for name in work.contestants if name in contestants})


def _is_same(contestant: Contestant, other: Contestant) -> bool:
    """Whether two contestants of one library do the same in the same way."""
    return all(
        getattr(contestant, name) == getattr(other, name) for name in ("library", "setting", "threads_sleep", "differs")
    )
