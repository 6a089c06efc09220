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
    """A student compared with its teacher, over all tokens of the teacher's answers; intervals are over prompts.

    ``acceptance`` is the mean probability that speculative sampling accepts a drafted token. ``same_top`` is the share
    of tokens for which both find the same token most likely, which is the acceptance of greedy decoding. ``divergence``
    is the forward divergence in nats per token. ``tokens_per_step`` is the expected number of tokens from one pass of
    the teacher, when sampling.
    """

    acceptance: Interval
    same_top: Interval
    divergence: Interval
    tokens_per_step: Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Assisted:
    """Greedy answers of the teacher with a draft; ``seconds`` is the time for all of them.

    ``expected`` is the speed-up that follows from the draft's ``same_top`` and the measured cost of a pass, and
    ``expected_sampling`` from its ``acceptance``. ``differing`` answers differ from those of the teacher alone; where
    they first differ, the teacher's logits of the two tokens differ by at most ``widest_gap``.
    """

    seconds: float
    expected: Interval
    expected_sampling: Interval
    differing: int = 0
    widest_gap: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Greedy answers to a few held-out ``prompts``, one at a time, with ``tokens`` tokens in total.

    ``seconds`` is the time of the teacher without a draft. ``cost_ratio`` is the time that the draft takes for a token,
    divided by the time that the teacher takes.
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
    """The record of a stage; ``gamma`` tokens are drafted per step, and ``temperature`` is the temperature of sampling.

    ``prompts`` counts the held-out prompts, and ``tokens`` the tokens of the teacher's answers to them. The student has
    the first ``layers`` of its ``init``; None if it is not a part of another model.
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
