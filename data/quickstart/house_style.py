"""The quickstart's rules for an answer: its house style, the key facts that it carries, and both together.

The house style asks for at most two plain sentences that say what the given text says: no filler at either end,
no lists or markup, no refusal, nothing that the text does not say, and no copy of the text. Fact recall is the share
of a prompt's key facts that the answer carries. The two are multiplied, so an empty answer (no facts) and a copied
prompt (no style) both score zero.

Recipes name the first three functions as any recipe names a function (docs/rewards.md), such as
``bundled:quickstart/house_style.py:style``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Prompts = Sequence[Sequence[Mapping[str, str]]]
"""Conversations, each a list of ``{"role", "content"}`` messages."""

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


def style(prompts: Prompts, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """The house style of each answer, from 0 to 1: the product of its checks."""
    return [_style(answer, prompt) for prompt, answer in zip(prompts, completions, strict=True)]


def facts(prompts: Prompts, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """The share of its row's ``facts`` that each answer carries, from 0 to 1."""
    return [fact_recall(answer, _facts(row)) for answer, row in zip(completions, rows, strict=True)]


def style_and_facts(prompts: Prompts, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """House style times fact recall, from 0 to 1."""
    both = zip(style(prompts, completions, rows), facts(prompts, completions, rows), strict=True)
    return [of_style * of_facts for of_style, of_facts in both]


def _style(answer: str, prompt: Sequence[Mapping[str, str]]) -> float:
    product = 1.0
    for factor in style_checks(answer, source=source_text(prompt)).values():
        product *= factor
    return product


def source_text(prompt: Sequence[Mapping[str, str]]) -> str:
    """What an answer may draw on: everything but the assistant's own turns."""
    return "\n".join(message["content"] for message in prompt if message["role"] != "assistant")


def _facts(row: Mapping[str, Any]) -> list[list[str]]:
    """The key facts of a row, such as ``[["21 March", "March 21"], ["laundry"]]``: of each all wordings that count.

    Raises:
        KeyError: it has none.
        ValueError: they have another form.
    """
    found = row["facts"]
    if not isinstance(found, list) or not found or not all(map(_is_fact, found)):
        raise ValueError(f"'facts' must be a list of facts, each a list of wordings; it is {found!r:.60}")
    return found


def _is_fact(wordings: Any) -> bool:
    return isinstance(wordings, list) and bool(wordings) and all(isinstance(one, str) and one for one in wordings)


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
