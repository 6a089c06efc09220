"""The gold rule of the quickstart: house style times fact recall, in [0, 1].

The house style asks for at most two plain sentences that say what the given text says: no filler at either end,
no lists or markup, no refusal, nothing that the text does not say, and no copy of the text. Fact recall is the share
of a prompt's key facts that the answer carries. The two are multiplied, so an empty answer (no facts) and a copied
prompt (no style) both score zero. The score evaluates; no stage optimises it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from alignment.records.evaluation import Metric

STYLE_PROMPT = (
    "Answer in one or two plain sentences. Say only what the given text says and include the key facts. "
    "No greeting, no filler, no lists, no markup."
)
"""The style as an instruction: what the arm *base + prompt* is told."""

METRICS = [Metric(name=name) for name in ("style_and_facts", "style", "facts")]
"""What an evaluation reports of it, the primary one first."""

MAX_SENTENCES = 2
MAX_WORDS = 50
"""Beyond this many words the length score falls linearly, reaching zero at twice as many."""

_FILLER_OPENING = re.compile(
    r"^\W*(?:(?:summary|answer):|(?:sure|certainly|of course|absolutely|great question|good question|okay|ok|"
    r"here(?:'s| is| are)|"
    r"below is|the following|i hope|thank you for|thanks for (?:asking|sharing)|as an ai|i'd be happy|"
    r"i would be happy|i'm happy|let me|based on the (?:text|note|message|information|passage)|"
    r"according to the (?:text|note|message|passage)|in (?:summary|conclusion|short)|to summari[sz]e|"
    r"(?:the|this) (?:text|note|passage) (?:says|states|describes|discusses|is about))\b)",
    re.IGNORECASE,
)
_FILLER_ANYWHERE = re.compile(
    r"let me know|hope (?:this|that) helps|feel free to|"
    r"if you (?:need|have|would like) (?:any|more|anything|further|me)|is there anything else|happy to help|"
    r"don't hesitate|do not hesitate|please note that|it(?:'s| is) important to note|overall,|in conclusion",
    re.IGNORECASE,
)
_HELPING = (
    r"(?:help|answer|assist|provide|fulfil|comply|summari[sz]e|rewrite|extract|process|access|read|say|tell|view|judge|"
    r"give (?:\w+ )?advice)"
)
_REFUSAL = re.compile(
    rf"\bi(?:'m| am) (?:unable|not able) to {_HELPING}\b|\bi (?:cannot|can't|can not|could not|couldn't) {_HELPING}\b|"
    r"\bas an ai\b|\blanguage model\b",
    re.IGNORECASE,
)
"""What an assistant says of itself. "I am sorry" or "I am unable to come" may well be what a message says."""
_MARKUP = re.compile(r"^\s*(?:[-*•#>]|\d+[.)])\s|\*\*|__|```|`|^\s*\|.*\||<[a-z/][^>]*>|\n\s*\n|\n\s*\S", re.MULTILINE)
_ABBREVIATION = re.compile(r"\b(mr|mrs|ms|dr|st|no|nos|vs|approx|e\.g|i\.e|etc|[a-z])\.$", re.IGNORECASE)
_NUMBER_WORDS = {
    "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8",
    "nine": "9", "ten": "10", "eleven": "11", "twelve": "12",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldScore:
    """One answer's score. ``gold = style * facts``; every figure lies in [0, 1].

    ``checks`` names each part of the style with its factor; ``style`` is their product.
    """

    gold: float
    style: float
    facts: float
    checks: dict[str, float]


def score(answer: str, *, source: str, facts: list[list[str]]) -> GoldScore:
    """Scores an answer to a prompt whose text is ``source``.

    ``facts`` lists the key facts; each is a list of wordings, any of which counts.
    """
    checks = style_checks(answer, source=source)
    style = 1.0
    for factor in checks.values():
        style *= factor
    recall = fact_recall(answer, facts)
    return GoldScore(gold=style * recall, style=style, facts=recall, checks=checks)


def fact_recall(answer: str, facts: list[list[str]]) -> float:
    """The share of facts of which a wording stands in the answer: whole words, case and punctuation ignored."""
    if not facts:
        raise ValueError("a held-out prompt needs at least one key fact")
    text = f" {normalise(answer)} "
    found = sum(any(f" {normalise(wording)} " in text for wording in fact) for fact in facts)
    return found / len(facts)


def style_checks(answer: str, *, source: str) -> dict[str, float]:
    """Each part of the house style with its factor in [0, 1]."""
    answer = answer.strip()
    words = answer.split()
    if not words:
        return {"answered": 0.0}
    num_sentences = len(sentences(answer))
    return {
        "sentences": {0: 0.0, 1: 1.0, 2: 1.0, 3: 0.5}.get(num_sentences, 0.0),
        "length": min(1.0, max(0.0, 2.0 - len(words) / MAX_WORDS)),
        "finished": 1.0 if re.search(r"[.!?][\"'”’)]?$", answer) else 0.5,
        "filler": 0.5 if _FILLER_OPENING.search(answer) or _FILLER_ANYWHERE.search(answer) else 1.0,
        "plain": 0.25 if _MARKUP.search(answer) else 1.0,
        "answered": 0.0 if _REFUSAL.search(answer) else 1.0,
        "grounded": 1.0 / (1.0 + len(invented(answer, source=source))),
        "own_words": 0.0 if copied(answer, source=source) else 1.0,
    }


def sentences(text: str) -> list[str]:
    """Splits plain English into sentences; abbreviations, initials and decimal points do not end one."""
    parts: list[str] = []
    start = 0
    for match in re.finditer(r"[.!?]+[\"'”’)\]]*(?=\s|$)|\n+", text):
        candidate = text[start : match.end()]
        rest = text[match.end() :].lstrip()
        if "\n" not in match.group() and rest:
            if _ABBREVIATION.search(candidate.rstrip()) and not re.search(r"\b[ap]\.?m\.$", candidate, re.IGNORECASE):
                continue
            if rest[0].islower():
                continue
        if candidate.strip():
            parts.append(candidate.strip())
        start = match.end()
    if text[start:].strip():
        parts.append(text[start:].strip())
    return parts


def invented(answer: str, *, source: str) -> list[str]:
    """Numbers and names in the answer that the source does not contain.

    A name is a capitalised word that does not open a sentence. Small numbers count as said whether they are written
    in letters or in digits.
    """
    known = set(normalise(source).split())
    known |= {word.removesuffix("'s") for word in known}
    known |= {_NUMBER_WORDS[word] for word in known if word in _NUMBER_WORDS}
    known |= {word for word, digit in _NUMBER_WORDS.items() if digit in known}
    found: list[str] = []
    for sentence in sentences(answer):
        for position, raw in enumerate(sentence.split()):
            token = raw.strip("\"'“”‘’()[],;:.!?")
            is_name = position > 0 and token[:1].isupper() and token not in {"I", "I'm", "I'll", "I'd", "I've"}
            if not (is_name or any(c.isdigit() for c in token)):
                continue
            parts = normalise(token).removesuffix("'s").split()
            unknown = [p for p in parts if p not in known and p.rstrip("s") not in known and p + "s" not in known]
            if unknown:
                found.append(token)
    return found


def copied(answer: str, *, source: str) -> bool:
    """True when the answer repeats most of a longer source word for word (share of 5-grams, both ways)."""
    answer_words, source_words = normalise(answer).split(), normalise(source).split()
    if len(answer_words) < 0.7 * len(source_words) or len(source_words) < 12:
        return False
    grams = {tuple(source_words[i : i + 5]) for i in range(len(source_words) - 4)}
    mine = [tuple(answer_words[i : i + 5]) for i in range(len(answer_words) - 4)]
    return bool(mine) and sum(g in grams for g in mine) / len(mine) > 0.7


def normalise(text: str) -> str:
    """Lower case, plain quotes, no thousands separators, punctuation to spaces but for 7:30 and 4.5, single spaces."""
    text = text.lower().replace("’", "'").replace("‘", "'").replace("“", '"').replace("”", '"')
    text = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", text)
    text = re.sub(r"(?<=\d)\s*(am|pm)\b", r" \1", text)
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    text = re.sub(r"(?<!\d)[:.]|[:.](?!\d)", " ", text)
    text = re.sub(r"[^\w\s:.'%$€£@]", " ", text)
    text = re.sub(r"(?<!\w)'|'(?!\w)", " ", text)
    text = re.sub(r"[$€£](?=\d)|(?<=\d)%", " ", text)
    return re.sub(r"\s+", " ", text).strip()
