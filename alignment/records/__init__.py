"""The files that cross from worker to driver or report, each as one typed record that both sides use. No module here
needs torch, Hydra or numpy. docs/design/0001 shows the files."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from alignment.core import typed_json


class ResultFile:
    """A record that is a file of an artifact, ``file``."""

    __slots__ = ()
    file: ClassVar[str]

    def write(self, folder: Path) -> None:
        """Writes the file into an artifact's folder."""
        typed_json.write(folder / self.file, self)

    @classmethod
    def read(cls, artifact: Path) -> Self:
        """The record of an artifact. Raises FileNotFoundError: the artifact has none; ArtifactError: it is damaged, or
        was written by a newer version."""
        return typed_json.read(artifact / cls.file, cls, remedy=f"delete {artifact} to remake it")
