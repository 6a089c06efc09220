"""Records of stages: sampled answers, distillation, forgetting, and rows that were left out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import ClassVar

from alignment.core.typed_json import Label, Name
from alignment.records import ResultFile
from alignment.records.interval import Interval

SAMPLING_FILE = "sampling.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class BestOf:
    """The mean score of the best of ``answers`` to a prompt; it is within ``kl_bound`` nats of the policy."""

    answers: int
    score: float
    kl_bound: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling(ResultFile):
    """Counts of a stage that samples answers.

    ``prompts`` counts the prompts that were asked. Prompts that are too long, that are also evaluated, or that were
    asked already were left out before. ``rows`` were made of the answers, except answers that repeat another one, are
    empty or have no end. A prompt is ``tied`` if it has several usable answers and all of them have the same score."""

    file: ClassVar[str] = SAMPLING_FILE
    select: Name
    prompts: int
    answers: int
    rows: int
    rows_too_long: int = 0
    prompts_evaluated: int = 0
    prompts_repeated: int = 0
    prompts_without_row: int = 0
    prompts_tied: int = 0
    answers_repeated: int = 0
    answers_empty: int = 0
    answers_without_end: int = 0
    best_of: list[BestOf] = field(default_factory=list)
    version: int = 1


COUNTS = tuple(part.name for part in fields(Sampling) if part.type == "int" and part.name != "version")
"""The fields of the record that are also counts in the manifest."""

DISTILLATION_FILE = "distillation.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentFigures:
    """A student compared with its teacher, over all tokens of the teacher's answers; intervals are over prompts.

    ``acceptance`` is the mean probability that speculative sampling accepts a drafted token. ``same_top`` is the share
    of tokens for which both find the same token most likely, which is the acceptance of greedy decoding. ``divergence``
    is the forward divergence in nats per token. ``tokens_per_step`` is the expected number of tokens from one pass of
    the teacher, when sampling."""

    acceptance: Interval
    same_top: Interval
    divergence: Interval
    tokens_per_step: Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Assisted:
    """Greedy answers of the teacher with a draft; ``seconds`` is the time for all of them.

    ``expected`` is the speed-up that follows from the draft's ``same_top`` and the measured cost of a pass, and
    ``expected_sampling`` from its ``acceptance``. ``differing`` answers differ from those of the teacher alone; where
    they first differ, the teacher's logits of the two tokens differ by at most ``widest_gap``."""

    seconds: float
    expected: Interval
    expected_sampling: Interval
    differing: int = 0
    widest_gap: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Greedy answers to a few held-out ``prompts``, one at a time, with ``tokens`` tokens in total.

    ``seconds`` is the time of the teacher without a draft. ``cost_ratio`` is the time that the draft takes for a token,
    divided by the time that the teacher takes."""

    prompts: int
    tokens: int
    seconds: float
    cost_ratio: float
    before: Assisted
    after: Assisted

    def speed_up(self, assisted: Assisted) -> float:
        return self.seconds / assisted.seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Distillation(ResultFile):
    """The record of a stage; ``gamma`` tokens are drafted per step, and ``temperature`` is the temperature of sampling.

    ``prompts`` counts the held-out prompts, and ``tokens`` the tokens of the teacher's answers to them. The student has
    the first ``layers`` of its ``init``; None if it is not a part of another model."""

    file: ClassVar[str] = DISTILLATION_FILE
    method: Name
    layers: int | None
    temperature: float
    gamma: int
    prompts: int
    tokens: int
    before: StudentFigures
    after: StudentFigures
    timing: Timing | None = None
    version: int = 1


FORGETTING_FILE = "forgetting.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The largest losses allowed: the rise of perplexity as a share of the base's, and the drop of right answers as a
    share of the questions.

    None means no limit."""

    perplexity_rise: float | None = None
    ability_drop: float | None = None

    @property
    def judge(self) -> bool:
        return self.perplexity_rise is not None or self.ability_drop is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmForgetting:
    """One arm; ``nats`` is the loss in nats per token, ``ability`` the share of right answers, and ``tasks`` that share
    by task.

    ``rise`` is the rise of the perplexity as a share of the base's, ``drop`` the drop of the share of right answers;
    both are None for the base itself. ``reasons`` say in words which limits were exceeded."""

    name: Name
    label: Label = ""
    nats: float | None = None
    perplexity: float | None = None
    ability: float | None = None
    tasks: dict[Name, float] = field(default_factory=dict)
    rise: Interval | None = None
    drop: Interval | None = None
    passed: bool = False
    reasons: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.label:
            object.__setattr__(self, "label", self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Forgetting(ResultFile):
    """All arms, the base model first; every arm has ``passed`` if nothing was ``judged``."""

    file: ClassVar[str] = FORGETTING_FILE
    num_texts: int | None = None
    num_tokens: int | None = None
    num_questions: int | None = None
    limits: Limits = field(default_factory=Limits)
    judged: bool = True
    arms: list[ArmForgetting] = field(default_factory=list)
    passed: bool = False
    version: int = 1


LEFT_OUT_FILE = "left_out.jsonl"
FAULT, SET_ASIDE, TOO_LONG, CUT, LOST = "fault", "set aside", "too long", "cut", "lost"


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """Why a row was left out, what was cut from it, or what the chat template left out of it.

    ``where`` is its file and line. ``kind`` is ``fault``, ``set aside`` (of no use for this stage), ``too long`` or
    ``cut``; what the template leaves out has a kind for each loss, ``lost: thoughts of earlier turns``. A prompt that
    is not asked because others ask it has none."""

    where: str
    kind: str = ""
    reason: str
    remedy: str = ""

    def as_row(self) -> dict[str, str]:
        """The note as a line of the file, without empty fields."""
        return {name: value for name, value in asdict(self).items() if value}
