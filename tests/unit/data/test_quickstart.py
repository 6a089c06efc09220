"""The data that ships with the project: large enough, all different, and good where it claims to be."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from statistics import mean

import pytest

from alignment.config.data import DataConfig
from alignment.data.bundled_files import locate
from alignment.data.reading import read_records
from alignment.data.records import Conversation, HeldOutPrompt, PreferencePair
from alignment.data.turns import Message
from data.quickstart.house_style import fact_recall, normalise, source_text, style_checks

ALL = DataConfig(source="")
CONVERSATIONS = read_records(locate("bundled:quickstart/conversations"), Conversation, ALL)
PAIRS = read_records(locate("bundled:quickstart/preferences"), PreferencePair, ALL)
HELD_OUT = read_records(locate("bundled:quickstart/heldout"), HeldOutPrompt, ALL)
FILES = {"conversations": CONVERSATIONS, "preferences": PAIRS, "heldout": HELD_OUT}
ROWS = [row for rows in FILES.values() for row in rows]

TASKS = {"summarise", "answer", "rewrite", "extract"}
FLAWS = {"base_sample", "verbose", "filler", "markup", "invented", "vague", "refusal", "cut_off"}
MAX_JACCARD = 0.4
GRAM = 5


def _source(messages: Sequence[Message]) -> str:
    return source_text([message.as_dict() for message in messages])


def _style(answer: str, source: str) -> float:
    product = 1.0
    for factor in style_checks(answer, source=source).values():
        product *= factor
    return product


def _good_answers() -> Iterator[tuple[str, str, str]]:
    """Id, answer and the text that it may draw on."""
    for row in CONVERSATIONS:
        for index, message in enumerate(row.messages):
            if message.role == "assistant":
                yield f"{row.id}[{index}]", message.content, _source(row.messages[:index])
    for pair in PAIRS:
        yield pair.id, pair.chosen, _source(pair.messages)
    for prompt in HELD_OUT:
        yield prompt.id, prompt.reference, _source(prompt.messages)


def _user_text(messages: Sequence[Message]) -> str:
    return "\n".join(message.content for message in messages if message.role == "user")


def _grams(text: str) -> set[tuple[str, ...]]:
    words = normalise(text).split()
    size = min(GRAM, len(words))
    return {tuple(words[start : start + size]) for start in range(len(words) - size + 1)}


def _near_duplicates(texts: dict[str, str]) -> list[tuple[float, str, str]]:
    """Pairs of texts whose word 5-grams have a Jaccard index of at least the limit; only texts that share one meet."""
    grams = {name: _grams(text) for name, text in texts.items()}
    holders: dict[tuple[str, ...], list[str]] = defaultdict(list)
    pairs = []
    for name, own_grams in grams.items():
        shared = Counter(other for gram in own_grams for other in holders[gram])
        for other, count in shared.items():
            jaccard = count / (len(own_grams) + len(grams[other]) - count)
            if jaccard >= MAX_JACCARD:
                pairs.append((jaccard, name, other))
        for gram in own_grams:
            holders[gram].append(name)
    return pairs


@pytest.mark.parametrize(("name", "least"), [("conversations", 300), ("preferences", 300), ("heldout", 100)])
def test_each_file_is_large_enough(name: str, least: int) -> None:
    assert len(FILES[name]) >= least


def test_every_row_has_an_id_of_its_own() -> None:
    assert [name for name, count in Counter(row.id for row in ROWS).items() if count > 1 or not name] == []


@pytest.mark.parametrize("name", FILES)
def test_every_task_has_its_share_of_every_file(name: str) -> None:
    tasks = Counter(row.task for row in FILES[name])
    assert set(tasks) == TASKS
    assert min(tasks.values()) > 0.15 * len(FILES[name])


def test_every_flaw_is_there_and_none_is_most_of_the_pairs() -> None:
    flaws = Counter(pair.flaw for pair in PAIRS)
    assert set(flaws) == FLAWS
    assert min(flaws.values()) >= 10
    assert max(flaws.values()) <= len(PAIRS) / 2


def test_every_good_answer_keeps_the_house_style() -> None:
    assert [(name, answer) for name, answer, source in _good_answers() if _style(answer, source) != 1.0] == []


def test_every_reference_carries_every_fact() -> None:
    assert [row.id for row in HELD_OUT if fact_recall(row.reference, row.row["facts"]) != 1.0] == []


def test_a_held_out_prompt_asks_for_more_than_one_fact() -> None:
    assert [row.id for row in HELD_OUT if len(row.row["facts"]) < 2] == []


def test_facts_stand_in_the_prompt_unless_they_are_put_in_other_words() -> None:
    """At least one wording of nearly every fact is in the text; the others are paraphrases."""
    verbatim = [
        any(f" {normalise(wording)} " in f" {normalise(_source(row.messages))} " for wording in fact)
        for row in HELD_OUT
        for fact in row.row["facts"]
    ]
    assert mean(verbatim) > 0.9


def test_rejected_answers_are_clearly_worse_in_style() -> None:
    chosen = mean(_style(pair.chosen, _source(pair.messages)) for pair in PAIRS)
    rejected = mean(_style(pair.rejected, _source(pair.messages)) for pair in PAIRS)
    assert chosen == 1.0
    assert rejected < 0.6


@pytest.mark.parametrize(
    ("flaw", "check", "most"),
    [
        ("verbose", None, 0.2),
        ("filler", "filler", 0.5),
        ("markup", "plain", 0.25),
        ("refusal", "answered", 0.0),
        ("cut_off", "finished", 0.5),
        ("base_sample", None, 0.5),
    ],
)
def test_a_named_flaw_is_one_that_the_rule_sees(flaw: str, check: str | None, most: float) -> None:
    factors = []
    for pair in PAIRS:
        if pair.flaw == flaw:
            source = _source(pair.messages)
            checks = style_checks(pair.rejected, source=source)
            factors.append(_style(pair.rejected, source) if check is None else checks[check])
    assert mean(factors) <= most


def test_the_rejected_answer_is_often_the_shorter_one() -> None:
    """Otherwise 'shorter is better' would be all there is to learn, or 'longer is worse'."""
    shorter = mean(len(pair.rejected.split()) < len(pair.chosen.split()) for pair in PAIRS)
    assert 0.1 < shorter < 0.9


# ---- variety --------------------------------------------------------------------------------------------------------


def test_no_two_prompts_are_the_same_or_nearly_so() -> None:
    """Over all three files, so that nothing held out is learned from."""
    assert _near_duplicates({row.id: _user_text(row.messages) for row in ROWS}) == []


def test_no_two_good_answers_are_the_same_or_nearly_so() -> None:
    assert _near_duplicates({name: answer for name, answer, _ in _good_answers()}) == []


def test_no_two_rejected_answers_are_the_same_or_nearly_so() -> None:
    assert _near_duplicates({pair.id: pair.rejected for pair in PAIRS}) == []


def test_the_search_for_duplicates_finds_them() -> None:
    text = "the quick brown fox jumps over the lazy dog and runs away from the hounds"
    near = text.replace("hounds", "dogs")
    pairs = _near_duplicates({"a": text, "b": near, "c": text, "d": "something else altogether, with words of its own"})
    assert {(name, other) for _, name, other in pairs} == {("b", "a"), ("c", "a"), ("c", "b")}


@pytest.mark.parametrize("name", ["prompts", "good answers", "rejected answers"])
def test_texts_begin_in_many_ways(name: str) -> None:
    texts = {
        "prompts": [next(m.content for m in row.messages if m.role == "user") for row in ROWS],
        "good answers": [answer for _, answer, _ in _good_answers()],
        "rejected answers": [pair.rejected for pair in PAIRS],
    }[name]
    openings = {" ".join(normalise(text).split()[:4]) for text in texts}
    assert len(openings) / len(texts) > 0.9


@pytest.mark.parametrize(("name", "least"), [("conversations", 0.15), ("preferences", 0.03), ("heldout", 0.08)])
def test_some_rows_have_several_turns(name: str, least: float) -> None:
    several = [sum(message.role == "user" for message in row.messages) > 1 for row in FILES[name]]
    assert least < mean(several) < 0.5


@pytest.mark.parametrize(("name", "least"), [("conversations", 0.15), ("preferences", 0.05), ("heldout", 0.1)])
def test_some_rows_have_a_system_message(name: str, least: float) -> None:
    assert least < mean(row.messages[0].role == "system" for row in FILES[name]) < 0.5
