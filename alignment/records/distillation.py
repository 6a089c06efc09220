"""``distillation.json``: how near a student is to its teacher on held-out prompts, before and after it learned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from alignment.core import typed_json
from alignment.core.typed_json import Name
from alignment.records.interval import Interval

FILE = "distillation.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentFigures:
    """A student beside its teacher, over all tokens of the teacher's answers; intervals are over prompts.

    ``acceptance`` is the mean probability that speculative sampling accepts a drafted token, and ``same_top`` the share
    of tokens at which both find the same one most likely, which is the acceptance of greedy decoding. ``divergence`` is
    the forward divergence in nats a token. ``tokens_per_step`` are those that a pass of the teacher is expected to
    yield, when sampling.
    """

    acceptance: Interval
    same_top: Interval
    divergence: Interval
    tokens_per_step: Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Assisted:
    """Greedy answers of the teacher with a draft: the ``seconds`` of all.

    ``expected`` is the speed-up that follows from the draft's ``same_top`` and the measured cost of a pass, and
    ``expected_sampling`` from its ``acceptance``. ``differing`` answers are not those of the teacher alone; where they
    first differ, the teacher's logits of the two tokens are at most ``widest_gap`` apart.
    """

    seconds: float
    expected: Interval
    expected_sampling: Interval
    differing: int = 0
    widest_gap: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Greedy answers to a few held-out ``prompts``, of so many ``tokens`` together, one at a time.

    ``seconds`` is the time of the teacher alone. ``cost_ratio`` is the time of a token of the draft alone divided by
    that of the teacher.
    """

    prompts: int
    tokens: int
    seconds: float
    cost_ratio: float
    before: Assisted
    after: Assisted

    def speed_up(self, assisted: Assisted) -> float:
        """How many times faster the answers were made with a draft."""
        return self.seconds / assisted.seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Distillation:
    """The record of a stage; ``gamma`` tokens are drafted in a step, and ``temperature`` is that of sampling.

    ``prompts`` were held out, with ``tokens`` in the teacher's answers to them. ``layers`` of the student are the first
    of its ``init``; None: it is not a part of another model.
    """

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

    def write(self, folder: Path) -> None:
        """Writes the file into an artifact's folder."""
        typed_json.write(folder / FILE, self)

    @staticmethod
    def read(artifact: Path) -> Distillation:
        """The record of an artifact.

        Raises:
            FileNotFoundError: the artifact has none.
            ArtifactError: it is damaged, or was written by a newer version.
        """
        return typed_json.read(artifact / FILE, Distillation, remedy=f"delete {artifact} to remake it")
