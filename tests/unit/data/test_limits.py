"""Rows that are longer than their stage allows: dropped or cut, never in silence."""

from __future__ import annotations

from typing import Any

import pytest

from alignment.config.stage import CptConfig, DpoConfig, PpoConfig
from alignment.config.too_long import Side, TooLong, TooLongConfig
from alignment.data.kinds import CONVERSATIONS, PAIRS, PROMPTS, tokenized
from alignment.data.limits import Limits, Parts, RowTooLong, fitted, refuse_losses
from alignment.data.records import Conversation, PreferencePair, Prompt
from alignment.data.tokenize import Tokens, prompt_ids
from alignment.data.turns import Message
from alignment.errors import DataError
from tests.tiny import tiny_tokenizer

LEFT = TooLongConfig(do=TooLong.cut)
RIGHT = TooLongConfig(do=TooLong.cut, side=Side.right)
HEADER = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte-level BPE with ChatML turns."""
    return tiny_tokenizer()


def _tokens(*ids: int, learned: bool = False) -> Tokens:
    return Tokens(ids=list(ids), learned=[learned] * len(ids))


PARTS = Parts(
    prompt=_tokens(1, 2, 3, 4, 5),
    answers={"chosen": _tokens(6, 7, 8, learned=True), "rejected": _tokens(9, learned=True)},
    tail=2,
)


def test_a_row_within_its_limits_is_left_as_it_is() -> None:
    assert fitted(PARTS, Limits(row=8, prompt=5, answer=3)) == (PARTS, "")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(row=7), "the row has 8 tokens of 7"),
        (Limits(row=9, prompt=4), "the prompt has 5 tokens of 4"),
        (Limits(row=9, answer=2), "'chosen' has 3 tokens of 2"),
        (Limits(row=7, prompt=4), "the row has 8 tokens of 7, the prompt has 5 tokens of 4"),
    ],
)
def test_a_longer_row_is_refused_with_the_limits_that_it_breaks(limits: Limits, message: str) -> None:
    with pytest.raises(RowTooLong) as caught:
        fitted(PARTS, limits)
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("limits", "prompt", "chosen"),
    [
        (Limits(row=7, too_long=LEFT), [2, 3, 4, 5], [6, 7, 8]),
        (Limits(row=9, prompt=3, too_long=LEFT), [3, 4, 5], [6, 7, 8]),
        (Limits(row=7, answer=2, too_long=LEFT), [1, 2, 3, 4, 5], [6, 7]),
        (Limits(row=7, too_long=RIGHT), [1, 2, 4, 5], [6, 7, 8]),
        (Limits(row=6, too_long=RIGHT), [1, 4, 5], [6, 7, 8]),
    ],
)
def test_an_answer_loses_its_end_and_the_prompt_its_side(limits: Limits, prompt: list[int], chosen: list[int]) -> None:
    cut, what = fitted(PARTS, limits)
    assert (cut.prompt.ids, cut.answers["chosen"].ids, cut.answers["rejected"].ids) == (prompt, chosen, [9])
    assert what.startswith(("the row has", "the prompt has", "'chosen' has"))


@pytest.mark.parametrize("row", [3, 5])
def test_a_cut_that_leaves_nothing_of_the_prompt_is_refused(row: int) -> None:
    with pytest.raises(RowTooLong, match="nothing would be left of the prompt"):
        fitted(PARTS, Limits(row=row, too_long=RIGHT))


def test_a_cut_that_leaves_nothing_to_learn_is_refused() -> None:
    earlier = Tokens(ids=[1, 2, 3], learned=[True, False, False])
    parts = Parts(prompt=earlier, answers={"answer": _tokens(4, 5)})
    with pytest.raises(RowTooLong, match="nothing would be left to learn"):
        fitted(parts, Limits(row=4, too_long=LEFT))


def test_each_stage_has_its_own_limits() -> None:
    config = DpoConfig(max_length=9, max_prompt_length=5, max_answer_length=4, too_long=LEFT)
    assert Limits.of(config) == Limits(row=9, prompt=5, answer=4, too_long=LEFT)
    assert Limits.of(PpoConfig(max_prompt_length=7)) == Limits(row=7)
    assert Limits.of(CptConfig(max_length=6)) == Limits(row=6)


# ---- on real rows ---------------------------------------------------------------------------------------------------

LONG = Message(role="user", content="First this. " * 20 + "When does it open?")


@pytest.mark.parametrize(("how", "kept", "lost"), [(LEFT, "When does it open?", "You are"), (RIGHT, "You are", "open")])
def test_a_prompt_that_is_cut_still_opens_the_assistants_turn(
    tokenizer: Any, how: TooLongConfig, kept: str, lost: str
) -> None:
    (one,) = tokenized(tokenizer, PROMPTS, [Prompt(messages=(LONG,), where="x:1")], Limits(row=60, too_long=how))
    ids = one.rows[0]["prompt"]
    text = tokenizer.decode(ids)
    assert len(ids) == 60
    assert one.tokens == len(prompt_ids(tokenizer, [LONG])) > 60
    assert text.endswith(HEADER)
    assert kept in text
    assert lost not in text.removesuffix(HEADER)
    assert one.cut == f"the row has {one.tokens} tokens of 60"


def test_an_answer_that_is_cut_does_not_end(tokenizer: Any) -> None:
    messages = (Message(role="user", content="Hi."), Message(role="assistant", content="Hello there. " * 9))
    limits = Limits(row=200, answer=5, too_long=LEFT)
    (one,) = tokenized(tokenizer, CONVERSATIONS, [Conversation(messages=messages, where="x:1")], limits)
    learned = [label for label in one.rows[0]["labels"] if label != -100]
    assert len(learned) == 5
    assert tokenizer.eos_token_id not in learned


def test_a_pair_is_dropped_by_its_longer_answer(tokenizer: Any) -> None:
    pair = PreferencePair(
        messages=(Message(role="user", content="Hi."),), chosen="A.", rejected="No. " * 9, where="x:3"
    )
    (one,) = tokenized(tokenizer, PAIRS, [pair], Limits(row=200, answer=5))
    assert isinstance(one.fault, RowTooLong)
    assert one.fault.where == "x:3"
    assert one.fault.message.startswith("'rejected' has ")
    assert one.rows == ()


# ---- how many may be lost -------------------------------------------------------------------------------------------


def test_few_lost_rows_are_allowed_and_many_are_not() -> None:
    limits = Limits(row=5)
    refuse_losses(limits, dropped=1, cut=0, records=10, longest=9, where="x")
    with pytest.raises(DataError) as caught:
        refuse_losses(limits, dropped=2, cut=0, records=10, longest=9, where="x")
    assert str(caught.value) == (
        "x: 2 of 10 rows are too long and would be dropped, more than 10% (the longest has 9 tokens; the limit is 5)\n"
        "  → raise the stage's length limits, set too_long.do=cut, or raise too_long.max_share"
    )
    refuse_losses(
        Limits(row=5, too_long=TooLongConfig(max_share=0.2)), dropped=1, cut=1, records=10, longest=9, where="x"
    )


def test_no_share_allows_to_lose_all() -> None:
    with pytest.raises(DataError):
        refuse_losses(
            Limits(row=5, too_long=TooLongConfig(max_share=1.0)), dropped=3, cut=0, records=3, longest=9, where="x"
        )
