"""Texts and choices read by the fast forward get what a slow one gives them, a token and a choice at a time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedModel

from alignment.core.errors import DataError, NonFiniteError
from alignment.data.records import PlainText, Question
from alignment.data.tokens.tokenize import prompt_ids
from alignment.data.turns import Message
from alignment.evaluation import general
from alignment.evaluation.arms import sequence_logprobs
from alignment.evaluation.general import Material, Measured, material, measured
from alignment.models.forward.flat import use_flat_attention
from tests.oracles import logprobs as oracle
from tests.oracles.close import close
from tests.tiny import tiny_model, tiny_tokenizer

TEXTS = [PlainText(text="The keys are in the hall."), PlainText(text="Closed — on Monday, <|im_end|> they say.")]
QUESTIONS = [
    Question(messages=(Message(role="user", content=text),), choices=choices, right=0)
    for text, choices in (
        ("Where are the keys of the shop?", ("With the caretaker", "Nowhere", "In the sea, I fear")),
        ("When is the shop closed?", ("On Mondays", "Né lundi")),
    )
]


def measure(model: PreTrainedModel, tokenized: Material, *, name: str) -> Measured:
    chunks, choices = (sequence_logprobs(model, *rows) for rows in (tokenized.chunk_rows, tokenized.choice_rows))
    return measured(tokenized, chunks, choices, name=name)


def _slow(model: PreTrainedModel, read: Sequence[int], scored: Sequence[int]) -> float:
    """Sum of log p(token | all before it), one forward a token."""
    total, ids = 0.0, list(read)
    for token in scored:
        total += oracle.log_softmax(model(torch.tensor([ids])).logits[0, -1].tolist())[token]
        ids.append(token)
    return total


@pytest.mark.parametrize("chunk", [5, 512])
def test_a_text_costs_the_nats_of_its_tokens_piece_by_piece(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(general, "CHUNK_TOKENS", chunk)
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    expected, counts = [], []
    for text in TEXTS:
        ids = tokenizer(text.text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        cut = [ids[start : start + chunk] for start in range(0, len(ids), chunk)]
        expected.append(-sum(_slow(model, part[:1], part[1:]) for part in cut))
        counts.append(sum(len(part) - 1 for part in cut))
    use_flat_attention(model)
    tokenized = material(tokenizer, TEXTS, QUESTIONS)
    assert tokenized.tokens == counts
    close(measure(model, tokenized, name="base").nats, expected)


def test_what_a_tokenizer_puts_in_front_of_texts_is_read_and_the_first_token_then_counts() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer.post_processor = _with_bos(tokenizer)
    ids = tokenizer(TEXTS[0].text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    (chunk,) = material(tokenizer, TEXTS[:1], QUESTIONS).chunks
    assert (chunk.read, chunk.scored) == (ids[:1], ids[1:])


def _with_bos(tokenizer):
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    return TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])


def test_a_choice_scores_its_likelihood_a_byte_as_the_assistants_answer() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    expected = []
    for question in QUESTIONS:
        prompt = prompt_ids(tokenizer, question.messages)
        for choice in question.choices:
            ids = tokenizer(choice, add_special_tokens=False)["input_ids"]
            expected.append(_slow(model, prompt, ids) / len(choice.encode()))
    use_flat_attention(model)
    scores = measure(model, material(tokenizer, TEXTS, QUESTIONS), name="base").scores
    assert [len(of_question) for of_question in scores] == [3, 2]
    close([score for of_question in scores for score in of_question], expected)


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n<|endoftext|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Puts an empty thought before an answer, and another token behind the end of the turn."""


def test_only_the_choice_s_own_text_counts() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKING
    for question, choices in zip(QUESTIONS, material(tokenizer, TEXTS, QUESTIONS).choices, strict=True):
        for text, choice in zip(question.choices, choices, strict=True):
            assert choice.answer == tokenizer(text, add_special_tokens=False)["input_ids"]
            assert choice.size == len(text.encode())
            assert tokenizer.decode(choice.prompt).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_a_text_of_a_single_token_is_refused_by_file_and_line() -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:3: the text has only one token"):
        material(tiny_tokenizer(), [PlainText(text="a", where="rows.jsonl:3")], QUESTIONS)


def test_a_policy_that_gives_nan_is_named() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    tokenized = material(tokenizer, TEXTS, QUESTIONS)
    with torch.no_grad():
        model.base_model.norm.weight.fill_(float("nan"))
    use_flat_attention(model)
    with pytest.raises(NonFiniteError, match="stage:sft gives log-probabilities that are not finite"):
        measure(model, tokenized, name="stage:sft")
