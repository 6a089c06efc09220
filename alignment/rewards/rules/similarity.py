"""Rules that compare an answer's text with its row's reference: ROUGE-L and chrF, by libraries."""

from __future__ import annotations

import unicodedata
from typing import Any

from alignment.core.scripts import divided, unified
from alignment.data.records import HasRow, Prompt
from alignment.rewards.rules.rule_kind import Package, lacking, texts_in

ROUGE = Package(modules=("rouge_score",), requirement="'rouge-score>=0.1.2,<0.2'")
CHRF = Package(modules=("sacrebleu",), requirement="'sacrebleu>=2.5,<3'")
REFERENCE = "reference"
_EXAMPLE = f'it needs a text or a list of texts: {{"{REFERENCE}": "The shop is closed on Monday."}}'


class _Words:
    """Cuts a text into words of letters, their marks, and digits. In scripts without spaces each character is one."""

    def tokenize(self, text: str) -> list[str]:
        """The words in lower case."""
        lower = unicodedata.normalize("NFC", unified(text.lower()))
        return divided("".join(char if unicodedata.category(char)[0] in "LMN" else " " for char in lower))


class RougeL:
    """ROUGE-L's F1: the longest common subsequence of words, against the reference (Lin 2004).

    It is that of ``rouge-score``, without a stemmer: lower case, letters and digits only. That library knows only the
    letters a to z, so texts are cut into words here; for ASCII these are the library's. Of several references the best
    counts. A metric is its mean over prompts.
    """

    def __init__(self) -> None:
        from rouge_score.rouge_scorer import RougeScorer

        self._scorer: Any = RougeScorer(["rougeL"], tokenizer=_Words())

    def expected(self, record: HasRow) -> list[str]:
        """The row's references; raises DataError if it has none."""
        return references_of(record)

    def score(self, text: str, expected: list[str]) -> float:
        """From 0 to 1."""
        return max(float(self._scorer.score(reference, text)["rougeL"].fmeasure) for reference in expected)


class ChrF:
    """chrF of each answer: an F2 of character n-grams up to six, against the reference (Popović 2015).

    It is the sentence score of ``sacrebleu``, divided by 100. A metric is its mean over prompts, which differs from the
    corpus score that papers report.
    """

    def __init__(self) -> None:
        from sacrebleu.metrics import CHRF as CharacterScore

        self._scorer: Any = CharacterScore()

    def expected(self, record: HasRow) -> list[str]:
        """The row's references; raises DataError if it has none."""
        return references_of(record)

    def score(self, text: str, expected: list[str]) -> float:
        """From 0 to 1."""
        return float(self._scorer.sentence_score(text, expected).score) / 100.0


def first_reference(prompt: Prompt) -> str:
    """The reference answer to a prompt, of several the first; empty without one.

    A column of references comes before an answer that ends the conversation, as in ``references_of``. Each turn of a
    row that asks several has its own, so the column of such a row is not looked at.
    """
    own = str(getattr(prompt, REFERENCE, ""))
    if getattr(prompt, "later_turns", ()):
        return own
    return (texts_in(prompt.row, REFERENCE) or [own])[0]


def references_of(record: HasRow) -> list[str]:
    """The reference answers of a row: those of its column, or the answer that ends its conversation.

    Raises:
        DataError: there is none.
    """
    references = texts_in(record.row, REFERENCE)
    if references is None and record.row.get(REFERENCE) is None and (ending := getattr(record, REFERENCE, "")):
        return [ending]
    return lacking(record, REFERENCE, _EXAMPLE) if references is None else references
