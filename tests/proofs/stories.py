"""A model of 260 thousand parameters that writes children's stories (Karpathy's tinyllamas), and its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignment.data.tokens.tokenizer import load_tokenizer
from tests.proofs.common import Skipped

FOLDER = Path(__file__).parents[3] / "shared/data/stories260k"
_NAMES = """
Lily Tom Ben Mia Sam Anna Max Lucy Tim Sue Jack Amy Bob Sara Leo Jane
Joe Rose Dan Kate Nick Ella Fred Zoe Bill Nora Pete Ivy Mark Ruth Carl Dora
"""
_OPENINGS = (
    "One day, {} went to",
    "{} had a toy that",
    "{} was walking home when",
    "In the morning, {} saw",
    "{} and the dog were",
    "At the park, {} found",
    "It was dark, and {} was",
    "{} did not want to",
    "{} looked at the sky and",
    "The rain came, so {}",
    "Mom told {} that",
    "{} lost a shoe and",
    "There was a big noise. {}",
    "{} sat under a tree and",
    "The cat saw {} and",
    "{} asked for a",
)
OPENINGS = tuple(opening.format(name) for opening in _OPENINGS for name in _NAMES.split())
"""512 beginnings of stories."""


class Stories:
    """The model's folder and tokenizer.

    Raises:
        Skipped: the folder is not there.
    """

    def __init__(self) -> None:
        if not FOLDER.is_dir():
            raise Skipped("there is no ../shared/data/stories260k beside the project")
        self.folder = FOLDER
        self.tokenizer: Any = load_tokenizer(FOLDER)
        self.end_id: int = self.tokenizer.eos_token_id

    def prompts(self) -> list[list[int]]:
        """Token ids of ``OPENINGS``, behind the token that begins a story."""
        return [self.tokenizer(opening)["input_ids"] for opening in OPENINGS]

    def text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text
