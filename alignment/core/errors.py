"""Errors a user can act on. Each is one readable block: where, what, what is allowed, what to do.

    AlignmentError                 exit code
    ├── ConfigError                2   a key, value or reference that cannot be right; nothing was started
    ├── DataError                  3   a data file or row that cannot be used
    ├── ModelError                 4   a model, tokenizer or adapter that is missing or does not fit
    ├── StageError                 5   a stage that failed while it ran
    │   ├── DiskError             12   a file system that cannot be written to: full, over a quota or limit, read-only
    │   ├── NonFiniteError         6   NaN or infinity in a loss, gradient or metric; the last good checkpoint stays
    │   └── RewardError            9   a scorer that raised, or returned too few, too many or non-finite scores
    ├── ArtifactError              7   an artifact or checkpoint that is damaged or belongs to something else
    ├── Busy                       8   another process works on the same run or artifact
    ├── GateNotMet                10   a finished run whose results do not meet what its recipe requires
    ├── StoreError                11   a store of artifacts that cannot be reached, or refuses what is asked of it
    └── Preempted                 75   a run that stopped because it was asked to; start it again to continue

Other codes: 0 success, 1 a bug in this project or in a package that adds a kind of stage, 130 interrupted by the user
(in Python a KeyboardInterrupt).
"""

from __future__ import annotations


class AlignmentError(Exception):
    """Base of every error that is shown without a traceback.

    ``where`` is the key, file, stage, option or value that is wrong; ``remedy`` says what to do next. ``rank`` is the
    rank of the process that met the error, if the other processes raise it too."""

    exit_code = 1
    rank: int | None = None

    def __init__(self, message: str, *, where: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        message = self.message.removeprefix(f"{self.where!r} ")  # the place may be the value that is wrong
        head = f"{self.where}: {message}" if self.where else self.message
        return f"{head}\n  → {self.remedy}" if self.remedy else head

    @property
    def labelled(self) -> str:
        """The error as a command prints it, with its kind first: ``model: base: no folder …``."""
        kinds = {2: "configuration", 3: "data", 4: "model", 7: "artifact", 8: "busy", 9: "scorer", 10: "gate"}
        kinds[11] = "store"
        return f"{kinds.get(self.exit_code, 'error')}: {self}"


class ConfigError(AlignmentError):
    """One or more faults in the configuration, all reported together."""

    exit_code = 2


class DataError(AlignmentError):
    """A data file or row that cannot be used."""

    exit_code = 3


class ModelError(AlignmentError):
    """A model, tokenizer or adapter that is missing or does not fit."""

    exit_code = 4


class StageError(AlignmentError):
    """A stage failed while it ran."""

    exit_code = 5


class DiskError(StageError):
    """A file system that cannot be written to: it is full, over a quota or a limit on file sizes, or read-only."""

    exit_code = 12


class NonFiniteError(StageError):
    """NaN or infinity in a loss, a gradient or a metric of an evaluation."""

    exit_code = 6


class RewardError(StageError):
    """A scorer raised, or returned something that is not a valid score; the policy was not updated with it."""

    exit_code = 9


class ArtifactError(AlignmentError):
    """An artifact or checkpoint that is damaged or belongs to something else."""

    exit_code = 7


class Busy(AlignmentError):
    """Another process works on the same run or artifact."""

    exit_code = 8


class GateNotMet(AlignmentError):
    """All stages are done, but the results do not meet a gate: a policy forgot too much, or did not improve enough."""

    exit_code = 10


class StoreError(AlignmentError):
    """A store of artifacts cannot be reached, does not exist, or refuses a request."""

    exit_code = 11


PREEMPTED = 75
"""Exit code of a stage that saved and stopped because it was asked to; the next start continues."""


class Preempted(AlignmentError):
    """A stage saved and stopped because it was asked to, by a signal other than Ctrl-C; the next start continues."""

    exit_code = PREEMPTED
