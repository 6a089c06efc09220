"""How alike an answer and a reference are: texts, and numbers."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from typing import Any

from alignment.core.errors import DataError
from alignment.core.wording import divided, unified
from alignment.data.records import HasRow, Prompt
from alignment.rewards.rules.rule_kind import Package, Rule, lacking, texts_in

ROUGE = Package(modules=("rouge_score",), requirement="'rouge-score>=0.1.2,<0.2'")
CHRF = Package(modules=("sacrebleu",), requirement="'sacrebleu>=2.5,<3'")
REFERENCE = "reference"
_EXAMPLE = f'it needs a text or a list of texts: {{"{REFERENCE}": "The shop is closed on Monday."}}'


class _Words:
    """Cuts a text into words of letters, their marks, and digits. In scripts without spaces each character is one."""

    def tokenize(self, text: str) -> list[str]:
        lower = unicodedata.normalize("NFC", unified(text.lower()))
        return divided("".join(char if unicodedata.category(char)[0] in "LMN" else " " for char in lower))


def rouge_l() -> Rule:
    """ROUGE-L's F1: the longest common subsequence of words, against the reference (Lin 2004), from 0 to 1. It is that
    of ``rouge-score``, without a stemmer: lower case, letters and digits only. That library knows only the letters a to
    z, so texts are cut into words here; for ASCII these are the library's. Of several references the best counts. A
    metric is its mean over prompts."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer: Any = RougeScorer(["rougeL"], tokenizer=_Words())
    return Rule(
        expected=references_of,
        score=lambda text, expected: max(
            float(scorer.score(reference, text)["rougeL"].fmeasure) for reference in expected
        ),
    )


def chrf() -> Rule:
    """chrF of each answer: an F2 of character n-grams up to six, against the reference (Popović 2015). It is the
    sentence score of ``sacrebleu``, divided by 100. A metric is its mean over prompts, which differs from the corpus
    score that papers report."""
    from sacrebleu.metrics import CHRF as CharacterScore

    scorer: Any = CharacterScore()
    return Rule(
        expected=references_of,
        score=lambda text, expected: float(scorer.sentence_score(text, expected).score) / 100.0,
    )


def first_reference(prompt: Prompt) -> str:
    """The reference answer to a prompt, of several the first; empty without one. A column of references comes before an
    answer that ends the conversation, as in ``references_of``. Each turn of a row that asks several has its own, so the
    column of such a row is not looked at."""
    own = str(getattr(prompt, REFERENCE, ""))
    if getattr(prompt, "later_turns", ()):
        return own
    return (texts_in(prompt.row, REFERENCE) or [own])[0]


def references_of(record: HasRow) -> list[str]:
    """The reference answers of a row: those of its column, or the answer that ends its conversation. Raises DataError:
    there is none."""
    references = texts_in(record.row, REFERENCE)
    if references is None and record.row.get(REFERENCE) is None and (ending := getattr(record, REFERENCE, "")):
        return [ending]
    return lacking(record, REFERENCE, _EXAMPLE) if references is None else references


ANSWER = "answer"
_MARK = "####"
_NUMBER_EXAMPLE = '{"messages": […], "answer": "6 times 3 is 18. #### 18"}'
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]}%])[-−])?"  # a minus sign, but not the operator between two operands: 5-3
    r"(?:[$€£¥](?P<inner_sign>[-−])?)?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
)
_LATEX_COMMA = re.compile(r"(?<=\d)(?:\{,\}|,\\!)(?=\d)")
"""How LaTeX writes a thousands separator: ``1{,}080`` or ``1,\\!080``."""


def exact_answer(completion: str, expected: Decimal) -> float:
    """1 if the last number of the completion is ``expected``, else 0 (Cobbe et al. 2021, GSM8K).

    Thousands separators, currency signs and trailing zeros are ignored: ``$1,080.00`` is 1080, and so is LaTeX's
    ``\\$1{,}080``."""
    return float(_last_number(completion) == expected)


def final_number(completion: str) -> str:
    """The last number of the completion in one spelling, such as ``1080``; empty if it has none."""
    number = _last_number(completion)
    return "" if number is None else f"{number.normalize():f}"


def _last_number(completion: str) -> Decimal | None:
    numbers = list(_NUMBER.finditer(_without_latex(completion)))
    return _value(numbers[-1]) if numbers else None


def expected_answer(record: HasRow) -> Decimal:
    """The number after ``####`` in a row's ``answer``, or the field itself if it is a number. Raises DataError: there
    is no such number, or more than one."""
    answer = record.row.get(ANSWER)
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    if isinstance(answer, str):
        _, mark, after = answer.rpartition(_MARK)
        whole = _without_latex(after if mark else answer.strip().rstrip(".%"))
        number = _NUMBER.search(whole) if mark else _NUMBER.fullmatch(whole)
        if number and exact_answer(number.string, _value(number)):
            return _value(number)
        if number:
            raise DataError(
                f"'{ANSWER}' has several numbers after {_MARK}, so it is not clear which one is meant: {after!r:.60}",
                where=record.where,
                remedy=f"write one number after {_MARK}: {_NUMBER_EXAMPLE}",
            )
    missing = "is missing" if ANSWER not in record.row else f"contains no number to check against; it is {answer!r:.60}"
    remedy = f"exact_answer uses the number after {_MARK}: {_NUMBER_EXAMPLE}"
    raise DataError(f"'{ANSWER}' {missing}", where=record.where, remedy=remedy)


def _without_latex(text: str) -> str:
    """The text with separators and dollar signs as they stand outside LaTeX."""
    return _LATEX_COMMA.sub(",", text).replace("\\$", "$")


def _value(number: re.Match[str]) -> Decimal:
    size = Decimal(number["digits"].replace(",", ""))
    return -size if number["sign"] or number["inner_sign"] else size
