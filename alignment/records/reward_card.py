"""``card.json`` and the lines of ``pairs.jsonl``: how a reward model judges pairs (docs/design/0016).

Shares are of pairs and between 0 and 1. A field is None or empty if there was nothing to measure it on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from alignment.core.typed_json import KEY, LEFT_OUT_IF_EMPTY, Line, Name
from alignment.records import ResultFile
from alignment.records.interval import Interval

FILE = "card.json"
Word = Annotated[str, Line(24)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A turn of a conversation."""

    role: Name = ""
    content: str = ""
    tool_calls: list[Any] = field(default_factory=list, metadata=LEFT_OUT_IF_EMPTY)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredPair:
    """A pair with its scores, chosen answer first: a line of ``pairs.jsonl``.

    ``margin`` is the score of the chosen answer minus that of the rejected one, and ``bag_of_words`` the margin by a
    bag of words. ``tokens`` are the lengths of prompt and answer together, ``rule`` the rule's score of each answer."""

    id: Name = ""
    where: Name = ""
    subset: Name = ""
    messages: list[Turn] = field(default_factory=list)
    chosen: str = ""
    rejected: str = ""
    scores: list[float] = field(default_factory=list)
    margin: float
    tokens: list[int] = field(default_factory=list)
    bag_of_words: float | None = None
    rule: list[float] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Baseline:
    """How often a simpler judge is right, and how much more often the model is, paired."""

    name: Name = ""
    accuracy: Interval
    difference: Interval | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Subset:
    """A part of the pairs; ``baselines`` is how often each simpler judge is right there, by its name."""

    name: Name = ""
    num_pairs: int = 0
    accuracy: Interval | None = None
    baselines: dict[Name, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bin:
    """Pairs about which the model is about equally sure, from ``start`` to ``end``.

    ``confidence`` is the mean of σ(|margin|), ``share`` the share of pairs that it gets right, with its 95 % interval.
    """

    start: float | None = field(default=None, metadata={KEY: "from"})
    end: float | None = field(default=None, metadata={KEY: "to"})
    num_pairs: int = 0
    confidence: float
    share: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Expected calibration error, Brier score and log loss in nats, and the bins from which the first is computed."""

    bins: list[Bin] = field(default_factory=list)
    ece: float | None = None
    brier: float | None = None
    log_loss: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Margins:
    """A histogram: ``counts`` of margins between ``edges``; there is one edge more than counts."""

    edges: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    mean: float | None = None
    std: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Length:
    """Whether the model prefers long answers: shares, and the correlation of margin and difference in length."""

    correlation: float | None = None
    prefers_longer: float | None = None
    longer_is_chosen: float | None = None
    accuracy_where_longer: float | None = None
    accuracy_where_shorter: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleAgreement:
    """Pairs that the rule scores differently: how often the model agrees with it, and how often the rule is right."""

    num_pairs: int = 0
    agreement: Interval | None = None
    accuracy: Interval | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned:
    """The pairs that the model learned from. ``judged_too`` of them are also to be judged, and may be ``left_out``.

    ``words``, ``penalty`` and the words ``for_answer`` and ``against`` belong to the bag of words."""

    num_pairs: int = 0
    judged_too: int = 0
    left_out: bool = False
    part_known: bool = True
    words: int = 0
    penalty: float | None = None
    for_answer: list[Word] = field(default_factory=list, metadata={KEY: "for"})
    against: list[Word] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """The largest absolute change of a score, and the number of pairs whose preferred answer changes."""

    largest: float
    flips: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Rescored:
    """Scores in one number format, computed again in other ways; ``spread`` is their standard deviation."""

    spread: float | None = None
    changes: dict[Name, Change] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Invariances:
    """How far changes that should not matter move the scores of the first pairs; ``moved`` names those that do so in
    float32."""

    num_pairs: int = 0
    formats: dict[Name, Rescored] = field(default_factory=dict)
    moved: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardCard(ResultFile):
    """The card. ``worst`` are pairs in which the model is most sure of the wrong answer, ``warnings`` are sentences."""

    file: ClassVar[str] = FILE
    reward: Name = ""
    rows_too_long: int = 0
    learned: Learned | None = None
    num_pairs: int = 0
    num_prompts: int = 0
    accuracy: Interval
    baselines: list[Baseline] = field(default_factory=list)
    subsets: list[Subset] = field(default_factory=list)
    calibration: Calibration = field(default_factory=Calibration)
    margins: Margins = field(default_factory=Margins)
    length: Length = field(default_factory=Length)
    rule: RuleAgreement | None = None
    worst: list[ScoredPair] = field(default_factory=list)
    invariances: Invariances | None = None
    warnings: list[str] = field(default_factory=list)
    version: int = 1
