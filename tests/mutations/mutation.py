"""One deliberate fault in the source, and whether it can still be put there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Mutation:
    """``old`` stands exactly once in ``file``; with ``new`` in its place, ``test`` must fail.

    Example: ``Mutation(name="DPO ignores beta", file="alignment/stages/dpo/run.py", old="beta=config.beta",
    new="beta=0.1", test="tests/unit/stages/test_dpo.py::test_a_loss_is_that_of_its_paper")``.
    """

    name: str
    file: str
    old: str
    new: str
    test: str

    def fault(self, root: Path) -> str:
        """What makes this entry stale in the tree at ``root``, or nothing."""
        count = _text(root / self.file).count(self.old)
        if count != 1:
            return f"{self.file} holds the text {count} times, not once: {self.old!r}"
        file, _, test = self.test.partition("::")
        if re.search(rf"^def {re.escape(test.partition('[')[0])}\(", _text(root / file), re.MULTILINE) is None:
            return f"there is no test {self.test}"
        return ""

    def apply(self, root: Path) -> str:
        """Puts the fault into the tree at ``root``; returns the file's text before."""
        path = root / self.file
        before = path.read_text(encoding="utf-8")
        path.write_text(before.replace(self.old, self.new), encoding="utf-8")
        return before


def in_file(file: str, tests: str, *entries: tuple[str, str, str, str]) -> list[Mutation]:
    """Mutations of one file that tests of one file must notice: name, text, replacement, test."""
    return [
        Mutation(name=name, file=f"alignment/{file}", old=old, new=new, test=f"tests/{tests}::{test}")
        for name, old, new, test in entries
    ]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
