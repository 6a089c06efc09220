"""Rows that are longer than their stage allows: dropped or cut, never in silence."""

from __future__ import annotations

from typing import Any

import pytest

from alignment.config.too_long import Side, TooLong, TooLongConfig
from alignment.core.errors import DataError
from alignment.data.records import Conversation, PreferencePair, Prompt
from alignment.data.tokens.limits import Limits, Parts, RowTooLong, cut_to, excess, refuse_losses
from alignment.data.tokens.rendering import prompt_text
from alignment.data.tokens.row_kinds import CONVERSATIONS, PAIRS, PROMPTS, tokenized
from alignment.data.tokens.tokenize import Tokens, encode, prompt_ids
from alignment.data.turns import Message
from alignment.stages.cpt.config import CptConfig
from alignment.stages.dpo.config import DpoConfig
from alignment.stages.ppo.config import PpoConfig
from alignment.stages.registry import kind_of
from tests.templates import STYLES, styled_tokenizer
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
    head=1,
    tail=2,
)


def test_a_row_within_its_limits_exceeds_nothing() -> None:
    assert excess(PARTS, Limits(row=8, prompt=5, answer=3)) == ""


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(row=7), "the row has 8 tokens of 7"),
        (Limits(row=9, prompt=4), "the prompt has 5 tokens of 4"),
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
        (Limits(row=9, prompt=4, too_long=RIGHT), [1, 2, 4, 5], [6, 7, 8]),
    ],
)
def test_an_answer_loses_its_end_and_the_prompt_its_side(limits: Limits, prompt: list[int], chosen: list[int]) -> None:
    cut = cut_to(PARTS, limits)
    assert (cut.prompt.ids, cut.answers["chosen"].ids, cut.answers["rejected"].ids) == (prompt, chosen, [9])


@pytest.mark.parametrize("how", [LEFT, RIGHT])
@pytest.mark.parametrize("row", [3, 6])
def test_a_cut_that_leaves_nothing_of_what_was_said_is_refused(row: int, how: TooLongConfig) -> None:
    with pytest.raises(RowTooLong, match="nothing would be left of the prompt"):
        cut_to(PARTS, Limits(row=row, too_long=how))


def test_a_cut_that_leaves_nothing_to_learn_is_refused() -> None:
    earlier = Tokens(ids=[1, 2, 3], learned=[True, False, False])
    parts = Parts(prompt=earlier, answers={"answer": _tokens(4, 5)})
    with pytest.raises(RowTooLong, match="nothing would be left to learn"):
        cut_to(parts, Limits(row=4, too_long=LEFT))


def test_a_cut_that_makes_two_answers_the_same_is_refused() -> None:
    answers = {"chosen": _tokens(6, 7, learned=True), "rejected": _tokens(6, 8, learned=True)}
    with pytest.raises(
        RowTooLong, match=r"'chosen' has 2 tokens of 1, .*; after a cut, its two answers would be the same"
    ):
        cut_to(Parts(prompt=_tokens(1), answers=answers), Limits(row=9, answer=1, too_long=LEFT))


def limits_of(config: Any) -> Limits:
    """What the kind of stage says."""
    return kind_of(config).learning.limits(config)


def test_each_stage_has_its_own_limits() -> None:
    config = DpoConfig(max_length=9, max_prompt_length=5, max_answer_length=4, too_long=LEFT)
    assert limits_of(config) == Limits(row=9, prompt=5, answer=4, too_long=LEFT)
    assert limits_of(PpoConfig(max_prompt_length=7)) == Limits(row=7)
    assert limits_of(CptConfig(max_length=6)) == Limits(row=6)


# ---- on real rows ---------------------------------------------------------------------------------------------------

LONG = Message(role="user", content="First this. " * 20 + "When does it open?")


@pytest.mark.parametrize(
    ("how", "remaining", "lost"), [(LEFT, "When does it open?", "You are"), (RIGHT, "You are", "open")]
)
def test_a_prompt_that_is_cut_still_opens_the_assistants_turn(
    tokenizer: Any, how: TooLongConfig, remaining: str, lost: str
) -> None:
    (prompt,) = tokenized(tokenizer, PROMPTS, [Prompt(messages=(LONG,), where="x:1")], Limits(row=60, too_long=how))
    ids = prompt.rows[0]["prompt"]
    text = tokenizer.decode(ids)
    assert len(ids) == 60
    assert prompt.tokens == len(prompt_ids(tokenizer, [LONG])) > 60
    assert text.endswith(HEADER)
    assert remaining in text
    assert lost not in text.removesuffix(HEADER)
    assert prompt.cut == f"the row has {prompt.tokens} tokens of 60"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("word", ["a", "id", "assistant", "end"])
@pytest.mark.parametrize("how", [LEFT, RIGHT])
def test_any_family_s_prompt_keeps_its_beginning_and_its_end(style: str, word: str, how: TooLongConfig) -> None:
    """A last turn that reads like a part of the template is not taken for it."""
    tokenizer = styled_tokenizer(style)
    turns = (
        Message(role="user", content="First this. " * 20),
        Message(role="assistant", content="Yes."),
        Message(role="user", content=f"{word} " * 30 + word),
    )
    whole = prompt_ids(tokenizer, turns)
    header = encode(tokenizer, prompt_text(tokenizer, [Message(role="user", content="xyz")]).partition("xyz")[2])
    (prompt,) = tokenized(tokenizer, PROMPTS, [Prompt(messages=turns, where="x:1")], Limits(row=50, too_long=how))
    ids = prompt.rows[0]["prompt"]
    assert len(ids) == 50 < len(whole)
    assert ids[-len(header) :] == header == whole[-len(header) :]
    if STYLES[style].bos:
        assert ids[0] == whole[0] == tokenizer.bos_token_id
    if how is LEFT:
        assert ids[1:] == whole[len(whole) - 49 :]


def test_rows_within_limits_are_the_same_whether_others_are_cut_or_not(tokenizer: Any) -> None:
    records = [Prompt(messages=(Message(role="user", content=text),), where="x:1") for text in ("a", "is", "Hi there.")]
    rows_by_limits = [
        [prompt.rows for prompt in tokenized(tokenizer, PROMPTS, records, Limits(row=200, too_long=how))]
        for how in (TooLongConfig(), LEFT, RIGHT)
    ]
    assert rows_by_limits[0] == rows_by_limits[1] == rows_by_limits[2]


def test_a_prompt_whose_end_cannot_be_told_is_dropped(tokenizer: Any) -> None:
    """This template says the last turn twice, so what stands behind it is not known."""
    odd = tiny_tokenizer()
    odd.chat_template = odd.chat_template + "{{ messages[-1]['content'] }}"
    (prompt,) = tokenized(odd, PROMPTS, [Prompt(messages=(LONG,), where="x:1")], Limits(row=60, too_long=RIGHT))
    assert prompt.fault is not None
    assert prompt.fault.message.endswith("so it cannot be cut")


def test_an_answer_that_is_cut_does_not_end(tokenizer: Any) -> None:
    messages = (Message(role="user", content="Hi."), Message(role="assistant", content="Hello there. " * 9))
    limits = Limits(row=200, answer=5, too_long=LEFT)
    (conversation,) = tokenized(tokenizer, CONVERSATIONS, [Conversation(messages=messages, where="x:1")], limits)
    learned = [label for label in conversation.rows[0]["labels"] if label != -100]
    assert len(learned) == 5
    assert tokenizer.eos_token_id not in learned


def test_a_pair_is_dropped_by_its_longer_answer(tokenizer: Any) -> None:
    pair = PreferencePair(
        messages=(Message(role="user", content="Hi."),), chosen="A.", rejected="No. " * 9, where="x:3"
    )
    (tokenized_pair,) = tokenized(tokenizer, PAIRS, [pair], Limits(row=200, answer=5))
    assert isinstance(tokenized_pair.fault, RowTooLong)
    assert tokenized_pair.fault.where == "x:3"
    assert tokenized_pair.fault.message.startswith("'rejected' has ")
    assert tokenized_pair.rows == ()


# ---- how many may be lost -------------------------------------------------------------------------------------------


def test_few_lost_rows_are_allowed_and_many_are_not() -> None:
    limits = Limits(row=5)
    refuse_losses(limits, dropped=1, cut=0, records=10, longest=9, where="x")
    with pytest.raises(DataError) as caught:
        refuse_losses(limits, dropped=2, cut=0, records=10, longest=9, where="x")
    assert str(caught.value) == (
        "x: 2 dropped of 10 rows because they are too long, more than 10% (the longest has 9 tokens, the limit is 5)\n"
        "  → raise the stage's length limits, set too_long.do=cut, or raise too_long.max_share"
    )
    with pytest.raises(DataError, match="1 dropped and 2 cut of 10 rows") as caught:
        refuse_losses(Limits(row=5, too_long=LEFT), dropped=1, cut=2, records=10, longest=9, where="x")
    assert "do=cut" not in caught.value.remedy
    refuse_losses(
        Limits(row=5, too_long=TooLongConfig(max_share=0.2)), dropped=1, cut=1, records=10, longest=9, where="x"
    )


def test_no_share_allows_to_lose_all() -> None:
    with pytest.raises(DataError) as caught:
        refuse_losses(
            Limits(row=5, too_long=TooLongConfig(max_share=1.0)), dropped=3, cut=0, records=3, longest=9, where="x"
        )
    assert str(caught.value) == (
        "x: 3 dropped of 3 rows because they are too long (the longest has 9 tokens, the limit is 5)\n"
        "  → raise the stage's length limits, or set too_long.do=cut"
    )


@pytest.mark.parametrize(("rows", "lost", "share"), [(100, 29, 0.29), (100, 57, 0.57), (300, 123, 0.41)])
def test_the_share_that_was_allowed_is_allowed(rows: int, lost: int, share: float) -> None:
    """.29 * 100 is 28.999999999999996."""
    limits = Limits(row=5, too_long=TooLongConfig(max_share=share))
    refuse_losses(limits, dropped=lost, cut=0, records=rows, longest=9, where="x")
    with pytest.raises(DataError, match="more than"):
        refuse_losses(limits, dropped=lost, cut=1, records=rows, longest=9, where="x")
