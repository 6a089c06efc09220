"""Which rows a stage learns: mixed ones, parts of them, and rows that are too long, which are dropped or cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignment.config.data import MixedConfig, Side, TooLong, TooLongConfig
from alignment.core.errors import DataError
from alignment.data.mix import mixed, subset
from alignment.data.records import Conversation, PreferencePair, Prompt
from alignment.data.tokens.row_kinds import (
    CONVERSATIONS,
    PAIRS,
    PROMPTS,
    Limits,
    Parts,
    RowTooLong,
    Tokenized,
    cut_to,
    excess,
    refuse_losses,
    tokenized,
)
from alignment.data.tokens.tokenize import Tokens, prompt_ids
from alignment.data.turns import Message
from tests.tiny import tiny_tokenizer


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _mixed(own: int, *parts: tuple[MixedConfig, int], seed: int = 0) -> list[str]:
    sizes = [own, *(size for _, size in parts)]
    rows = [f"{name}{number}" for name, size in zip("abc", sizes, strict=False) for number in range(size)]
    return [rows[index] for index in mixed(own, list(parts), _generator(seed), where="s.data")]


@pytest.mark.parametrize(
    ("own", "parts", "counts"),
    [
        (1000, [(MixedConfig(share=0.2), 1000), (MixedConfig(share=0.1), 1000)], [1000, 286, 143]),
        (80, [(MixedConfig(count=20), 100), (MixedConfig(share=0.5), 1000)], [80, 20, 100]),
        (60, [(MixedConfig(), 40), (MixedConfig(share=0.2), 1000)], [60, 40, 25]),
    ],
)
def test_shares_are_of_the_whole_and_every_own_row_is_there_once(own: int, parts: Any, counts: list[int]) -> None:
    rows = _mixed(own, *parts)
    assert [sum(row[0] == name for row in rows) for name in "abc"[: len(counts)]] == counts
    assert len(set(rows)) == len(rows) == sum(counts), "drawn without replacement"
    assert rows != sorted(rows)


def test_the_seed_decides_which_rows_and_in_which_order() -> None:
    first, again, other = (_mixed(20, (MixedConfig(count=5), 100), seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    drawn = [{row for row in rows if row[0] == "b"} for rows in (first, other, [f"b{n}" for n in range(5)])]
    assert len(set(map(frozenset, drawn))) == 3, "its first rows may be all of one kind"
    parts = [subset(1000, 0.25, _generator(seed)).tolist() for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]
    assert parts[0] != list(range(250)), "not just the beginning"
    drawn_before = [9, 1, 0, 3, 4, 14, 13, 5, 6, 2]
    sources = [(MixedConfig(count=2), 4), (MixedConfig(share=0.3), 6)]
    assert mixed(5, sources, _generator(), where="data").tolist() == drawn_before, "as in earlier versions"
    assert subset(12, 0.4, _generator()).tolist() == [0, 5, 7, 8, 9]


def test_a_source_with_too_few_rows_is_named() -> None:
    with pytest.raises(DataError, match="10 rows, but 20") as caught:
        _mixed(80, (MixedConfig(count=1), 1), (MixedConfig(share=0.2), 10))
    assert caught.value.where == "s.data.mix[1]"


DROP = TooLongConfig()
LEFT = TooLongConfig(do=TooLong.cut)
RIGHT = TooLongConfig(do=TooLong.cut, side=Side.right)
HEADER = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def _tokens(*ids: int, learned: bool = False) -> Tokens:
    return Tokens(ids=list(ids), learned=[learned] * len(ids))


PARTS = Parts(
    prompt=_tokens(1, 2, 3, 4, 5),
    answers={"chosen": _tokens(6, 7, 8, learned=True), "rejected": _tokens(9, learned=True)},
    head=1,
    tail=2,
)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(row=8, prompt=5, answer=3), ""),
        (Limits(row=7), "the row has 8 tokens of 7"),
        (Limits(row=9, answer=2), "'chosen' has 3 tokens of 2"),
        (Limits(row=7, prompt=4), "the row has 8 tokens of 7, the prompt has 5 tokens of 4"),
    ],
)
def test_the_limits_that_a_longer_row_breaks_are_named(limits: Limits, message: str) -> None:
    assert excess(PARTS, limits) == message


@pytest.mark.parametrize(
    ("limits", "prompt", "chosen"),
    [
        (Limits(row=7, too_long=LEFT), [1, 3, 4, 5], [6, 7, 8]),
        (Limits(row=9, prompt=4, too_long=LEFT), [1, 3, 4, 5], [6, 7, 8]),
        (Limits(row=7, answer=2, too_long=LEFT), [1, 2, 3, 4, 5], [6, 7]),
        (Limits(row=7, too_long=RIGHT), [1, 2, 4, 5], [6, 7, 8]),
    ],
)
def test_an_answer_loses_its_end_and_the_prompt_its_side(limits: Limits, prompt: list[int], chosen: list[int]) -> None:
    cut = cut_to(PARTS, limits)
    assert (cut.prompt.ids, cut.answers["chosen"].ids, cut.answers["rejected"].ids) == (prompt, chosen, [9])


EARLIER = Parts(
    prompt=Tokens(ids=[1, 2, 3], learned=[True, False, False]), answers={"answer": _tokens(4, 5)}
)  # what would be left of it was learned in an earlier turn
ALIKE = Parts(prompt=_tokens(1), answers={name: _tokens(6, last, learned=True) for name, last in (("a", 7), ("b", 8))})


@pytest.mark.parametrize(
    ("parts", "limits", "message"),
    [
        *((PARTS, Limits(row=row, too_long=how), "left of the prompt") for row in (3, 6) for how in (LEFT, RIGHT)),
        (EARLIER, Limits(row=4, too_long=LEFT), "left to learn"),
        (ALIKE, Limits(row=9, answer=1, too_long=LEFT), "'a' has 2 tokens of 1, .* two answers would be the same"),
    ],
)
def test_a_cut_that_leaves_too_little_is_refused(parts: Parts, limits: Limits, message: str) -> None:
    with pytest.raises(RowTooLong, match=message):
        cut_to(parts, limits)


def _prompt(tokenizer: Any, limits: Limits, *turns: Message) -> Tokenized:
    (prompt,) = tokenized(tokenizer, PROMPTS, [Prompt(messages=turns, where="x:1")], limits)
    return prompt


LONG = Message(role="user", content="First this. " * 20 + "When does it open?")


@pytest.mark.parametrize(
    ("how", "remaining", "lost"), [(LEFT, "When does it open?", "You are"), (RIGHT, "You are", "open")]
)
def test_a_prompt_that_is_cut_still_opens_the_assistants_turn(
    tokenizer: Any, how: TooLongConfig, remaining: str, lost: str
) -> None:
    prompt = _prompt(tokenizer, Limits(row=60, too_long=how), LONG)
    text = tokenizer.decode(prompt.rows[0]["prompt"])
    assert len(prompt.rows[0]["prompt"]) == 60
    assert prompt.tokens == len(prompt_ids(tokenizer, [LONG])) > 60
    assert prompt.cut == f"the row has {prompt.tokens} tokens of 60"
    assert text.endswith(HEADER)
    assert remaining in text
    assert lost not in text.removesuffix(HEADER)


def test_an_answer_that_is_cut_does_not_end_and_a_pair_is_dropped_by_its_longer_answer(tokenizer: Any) -> None:
    asked = Message(role="user", content="Hi.")
    talk = Conversation(messages=(asked, Message(role="assistant", content="Hello there. " * 9)), where="x:1")
    (conversation,) = tokenized(tokenizer, CONVERSATIONS, [talk], Limits(row=200, answer=5, too_long=LEFT))
    learned = [label for label in conversation.rows[0]["labels"] if label != -100]
    assert len(learned) == 5
    assert tokenizer.eos_token_id not in learned
    pair = PreferencePair(messages=(asked,), chosen="A.", rejected="No. " * 9, where="x:3")
    (tokenized_pair,) = tokenized(tokenizer, PAIRS, [pair], Limits(row=200, answer=5))
    assert isinstance(tokenized_pair.fault, RowTooLong)
    assert tokenized_pair.fault.where == "x:3"
    assert tokenized_pair.fault.message.startswith("'rejected' has ")
    assert tokenized_pair.rows == ()


def _losses(how: TooLongConfig, dropped: int, cut: int, records: int) -> DataError | None:
    try:
        refuse_losses(Limits(row=5, too_long=how), dropped=dropped, cut=cut, records=records, longest=9, where="x")
    except DataError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("share", "dropped", "cut", "records"),
    [(0.1, 1, 0, 10), (0.2, 1, 1, 10), (0.29, 29, 0, 100), (0.57, 57, 0, 100), (0.41, 123, 0, 300)],
)
def test_the_share_that_was_allowed_may_be_lost_and_no_more(share: float, dropped: int, cut: int, records: int) -> None:
    """.29 * 100 is 28.999999999999996."""
    for more in (0, 1):
        how = TooLongConfig(max_share=share)
        assert (_losses(how, dropped, cut + more, records) is None) == (more == 0)


@pytest.mark.parametrize(
    ("how", "lost", "words", "remedy"),
    [
        (DROP, (2, 0, 10), ["2 dropped of 10 rows", "more than 10%", "9 tokens", "limit is 5"], "set too_long.do=cut"),
        (LEFT, (1, 2, 10), ["1 dropped and 2 cut of 10 rows"], "raise too_long.max_share"),
        (TooLongConfig(max_share=1.0), (3, 0, 3), ["3 dropped of 3 rows"], "or set too_long.do=cut"),
    ],
    ids=["dropped", "cut", "no share allows to lose all"],
)
def test_too_many_lost_rows_are_counted_with_what_to_do(
    how: TooLongConfig, lost: tuple[int, int, int], words: list[str], remedy: str
) -> None:
    error = _losses(how, *lost)
    assert error is not None
    assert error.where == "x"
    assert all(word in error.message for word in words)
    assert remedy in error.remedy
    assert ("do=cut" in error.remedy) == (how is not LEFT)
    assert ("max_share" in error.remedy) == (how.max_share < 1.0)
