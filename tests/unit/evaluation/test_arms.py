"""What models say of answers, texts, choices and rows: the fast forwards give what slow ones give, in any batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel

from alignment.core.errors import DataError, NonFiniteError
from alignment.data.fields import Fields
from alignment.data.formats import FORMATS
from alignment.data.records import Conversation, HeldOutPrompt, PlainText, Question
from alignment.data.tokens.tokenize import prompt_ids
from alignment.data.turns import Message
from alignment.evaluation import arms, forgetting_measures
from alignment.evaluation.arms import answer_and_score, read_answers, reward_scores, sequence_logprobs
from alignment.evaluation.exchanges import (
    LetterRows,
    choice_scores,
    draw_examples,
    letter_rows,
    with_examples,
    with_system_prompt,
)
from alignment.evaluation.forgetting_measures import Material, Measured, material, measured
from alignment.evaluation.invariance import Rows, beyond_rounding, flat_scores, moved, padded_scores
from alignment.models.forward.causal import install_scalar
from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.generate import generate
from alignment.records.reward_card import Change, Rescored
from tests.oracles import logprobs as oracle
from tests.oracles.close import close
from tests.templates import styled_tokenizer
from tests.tiny import ARCHITECTURES, tiny_model, tiny_scorer, tiny_tokenizer

CPU = torch.device("cpu")
TOKENIZER = tiny_tokenizer()
PROMPTS = [[5, 9, 2, 7], [8], [3, 2, 6]]
ANSWERS = [[11, 2], [12, 13, 14], [2]]


def model_of_words(seed: int = 0) -> PreTrainedModel:
    """One with a logit for each token of the tokenizer."""
    return tiny_model(vocab_size=len(TOKENIZER), seed=seed)


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def slow_logprob(model: PreTrainedModel, read: Sequence[int], scored: Sequence[int]) -> float:
    """Sum of log p(token | all before it), one forward a token."""
    total, ids = 0.0, list(read)
    for token in scored:
        total += oracle.log_softmax(model(torch.tensor([ids])).logits[0, -1].tolist())[token]
        ids.append(token)
    return total


@pytest.mark.parametrize("tokens", [1, 12, 1000])
def test_answers_are_scored_by_all_their_tokens_and_rewarded_at_the_last_whatever_the_batch(
    monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    monkeypatch.setattr(arms, "TOKENS", tokens)
    model, scorer = tiny_model(), tiny_scorer()
    rows = list(zip(PROMPTS, ANSWERS, strict=True))
    close(sequence_logprobs(model, PROMPTS, ANSWERS), [slow_logprob(model, *row) for row in rows])
    with torch.no_grad():
        rewards = [
            scorer.score(scorer.base_model(torch.tensor([[*prompt, *answer]])).last_hidden_state[0, -1]).item()
            for prompt, answer in rows
        ]
    install_scalar(scorer)
    close(reward_scores(scorer, PROMPTS, ANSWERS), rewards)


def test_rewards_are_rounded_no_more_under_autocast_than_by_the_trunk() -> None:
    """The head computes in float32; rounded to bfloat16, answers would tie."""
    model = tiny_scorer().to(torch.bfloat16)
    model.score.float()
    install_scalar(model)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        states = [
            model.base_model(torch.tensor([[*prompt, *answer]])).last_hidden_state[0, -1]
            for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
        ]
        rewards = reward_scores(model, PROMPTS, ANSWERS)
    expected = [float(state.float() @ model.score.weight[0].detach()) for state in states]
    assert max(abs(a - b) for a, b in zip(rewards, expected, strict=True)) < 0.05
    assert all(score != float(torch.tensor(score).bfloat16()) for score in rewards)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("architecture", ["llama", "sliding"])
def test_answers_and_scores_come_in_the_order_of_the_prompts(architecture: str, batch_size: int) -> None:
    """By a model that reads a prompt once, and by one that cannot."""
    model = tiny_model() if architecture == "llama" else tiny_model("mistral", sliding_window=4)
    use_flat_attention(model)
    others = [[answer] * (index % 3) for index, answer in enumerate(ANSWERS)]
    reported: list[int] = []
    answers, scores = answer_and_score(
        model, PROMPTS, others, max_new_tokens=4, end_ids=[2], batch_size=batch_size, with_own=True,
        progress=reported.append,
    )  # fmt: skip
    assert reported == [min(3, done) for done in range(batch_size, 3 + batch_size, batch_size)]
    for prompt, texts, answer, logprobs in zip(PROMPTS, others, answers, scores, strict=True):
        assert answer == generate(model, [prompt], max_new_tokens=4, end_ids=[2], batch_size=1)[0]
        close(logprobs, sequence_logprobs(model, [prompt] * (1 + len(texts)), [answer, *texts]))


def test_prompts_are_read_once_for_answers_and_scores() -> None:
    model = tiny_model()
    use_flat_attention(model)
    read: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    options: dict[str, Any] = {"max_new_tokens": 1, "end_ids": [2], "batch_size": 3, "progress": lambda _: None}
    answer_and_score(model, PROMPTS, [[answer] for answer in ANSWERS], with_own=True, **options)
    assert read == [sum(map(len, PROMPTS)), len(PROMPTS) + sum(map(len, ANSWERS))]


def test_answers_are_decoded_and_know_whether_they_ended() -> None:
    ids = ids_of("The shop is open.")
    whole, cut = read_answers(TOKENIZER, [[*ids, TOKENIZER.eos_token_id], ids])
    assert (whole.text, whole.ended, cut.text, cut.ended) == ("The shop is open.", True, "The shop is open.", False)


TEXTS = [PlainText(text="The keys are in the hall."), PlainText(text="Closed — on Monday, <|im_end|> they say.")]
QUESTIONS = [
    Question(messages=(Message(role="user", content=text),), choices=choices, right=0)
    for text, choices in (
        ("Where are the keys of the shop?", ("With the caretaker", "Nowhere", "In the sea, I fear")),
        ("When is the shop closed?", ("On Mondays", "Né lundi")),
    )
]


def measure(model: PreTrainedModel, tokenized: Material) -> Measured:
    use_flat_attention(model)
    chunks, choices = (sequence_logprobs(model, *rows) for rows in (tokenized.chunk_rows, tokenized.choice_rows))
    return measured(tokenized, chunks, choices, name="stage:sft")


@pytest.mark.parametrize("chunk", [5, 512])
def test_a_text_costs_the_nats_of_its_tokens_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(forgetting_measures, "CHUNK_TOKENS", chunk)
    model = model_of_words()
    cut = [
        [ids[start : start + chunk] for start in range(0, len(ids), chunk)]
        for ids in (ids_of(text.text) for text in TEXTS)
    ]
    expected = [-sum(slow_logprob(model, part[:1], part[1:]) for part in parts) for parts in cut]
    tokenized = material(TOKENIZER, TEXTS, QUESTIONS)
    assert tokenized.tokens == [sum(len(part) - 1 for part in parts) for parts in cut]
    close(measure(model, tokenized).nats, expected)


def test_what_stands_in_front_of_texts_is_read_and_a_text_of_a_single_token_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    bos = tokenizer.bos_token
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    (chunk,) = material(tokenizer, TEXTS[:1], QUESTIONS).chunks
    assert (chunk.read, chunk.scored) == ([tokenizer.bos_token_id], ids_of(TEXTS[0].text))
    with pytest.raises(DataError, match=r"rows\.jsonl:3.*token"):
        material(TOKENIZER, [PlainText(text="a", where="rows.jsonl:3")], QUESTIONS)


def test_a_choice_scores_the_likelihood_a_byte_of_its_own_text() -> None:
    model = model_of_words()
    expected = [
        slow_logprob(model, prompt_ids(TOKENIZER, question.messages), ids_of(choice)) / len(choice.encode())
        for question in QUESTIONS
        for choice in question.choices
    ]
    scores = measure(model, material(TOKENIZER, TEXTS, QUESTIONS)).scores
    assert [len(of_question) for of_question in scores] == [3, 2]
    close([score for of_question in scores for score in of_question], expected)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKING
    for question, choices in zip(QUESTIONS, material(tokenizer, TEXTS, QUESTIONS).choices, strict=True):
        for text, choice in zip(question.choices, choices, strict=True):
            assert (choice.answer, choice.size) == (ids_of(text), len(text.encode()))
            assert tokenizer.decode(choice.prompt).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n<|endoftext|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Puts an empty thought before an answer, and another token behind the end of the turn."""


CHOICES = (("On Monday", "On Sunday", "Never"), ("Yes", "No"), ("The hall", "The sea", "Nowhere", "Here"))


def letter_prompts(right: Sequence[int]) -> list[HeldOutPrompt]:
    read = FORMATS["choices"].read
    questions = [
        {"question": f"Question {number}?", "choices": list(choices), "answer": answer}
        for number, (choices, answer) in enumerate(zip(CHOICES, right, strict=True))
    ]
    return [record for row in questions for record in HeldOutPrompt.of(read(Fields(row, where="x:1", example="")))]


def letter_scores(model: PreTrainedModel, right: Sequence[int]) -> list[float]:
    use_flat_attention(model)
    asked = letter_rows(TOKENIZER, letter_prompts(right), lambda row: row.messages)
    return choice_scores(letter_prompts(right), asked, sequence_logprobs(model, *asked.flat()), name="stage:sft")


@pytest.mark.parametrize("seed", [0, 1])
def test_a_row_counts_if_its_right_letter_is_the_likeliest(seed: int) -> None:
    """The one with the largest logit after the prompt, which is written out here as the tiny template does."""
    model, best = model_of_words(seed), []
    for number, choices in enumerate(CHOICES):
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=False))
        turns = [{"role": "user", "content": f"Question {number}?\n{listed}\nAnswer:"}]
        text = TOKENIZER.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompt = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        logits = model(torch.tensor([prompt])).logits[0, -1].tolist()
        logprobs = [logits[token] for (token,) in map(ids_of, "ABCD"[: len(choices)])]
        best.append(logprobs.index(max(logprobs)))
    others = [(letter + 1) % len(choices) for letter, choices in zip(best, CHOICES, strict=True)]
    for right, expected in ((best, [1.0, 1.0, 1.0]), (others, [0.0, 0.0, 0.0]), ([best[0], *others[1:]], [1.0, 0, 0])):
        assert letter_scores(model, right) == expected


def test_choices_stand_behind_the_tools_of_their_row() -> None:
    tokenizer = styled_tokenizer("qwen")
    tool = {"type": "function", "function": {"name": "calendar", "parameters": {"type": "object"}}}
    asked = letter_rows(tokenizer, [replace(letter_prompts([0, 0, 0])[0], tools=(tool,))], lambda row: row.messages)
    turns = [{"role": "user", "content": "Question 0?\nA. On Monday\nB. On Sunday\nC. Never\nAnswer:"}]
    text = tokenizer.apply_chat_template(turns, tools=[tool], tokenize=False, add_generation_prompt=True)
    assert asked.prompts == [tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert asked.letters == [[tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in "ABC"]]


@pytest.mark.parametrize(
    ("logprobs", "points"),
    [
        ([-2.0, -1.0, -1.0], [0.0, 1 / 2, 1 / 2]),
        ([-1.0, -1.0, -1.0], [1 / 3, 1 / 3, 1 / 3]),
        ([-1.0, -2.0, -2.0], [1.0, 0.0, 0.0]),
    ],
)
def test_the_likeliest_letters_share_the_point(logprobs: list[float], points: list[float]) -> None:
    row = letter_prompts([0, 0, 0])[0]
    asked = LetterRows(prompts=[[1]], letters=[[[2], [3], [4]]])
    assert [choice_scores([replace(row, right=right)], asked, logprobs, name="base")[0] for right in range(3)] == points


@pytest.mark.parametrize(
    "score",
    [
        pytest.param(lambda model: letter_scores(model, [0, 0, 0]), id="letters"),
        pytest.param(lambda model: measure(model, material(TOKENIZER, TEXTS, QUESTIONS)), id="texts and choices"),
    ],
)
def test_log_probabilities_that_are_not_finite_name_the_arm(score: Callable[[PreTrainedModel], object]) -> None:
    model = model_of_words()
    torch.nn.init.constant_(model.get_output_embeddings().weight, torch.nan)
    with pytest.raises(NonFiniteError, match="stage:sft"):
        score(model)


def pairs_of_rows() -> list[list[int]]:
    """Four pairs behind common prompts, of different lengths."""
    rng = torch.Generator().manual_seed(0)
    sequences = []
    for length in (20, 40, 30, 18):
        prompt = torch.randint(3, 120, (length,), generator=rng).tolist()
        sequences += [prompt + torch.randint(3, 120, (more,), generator=rng).tolist() for more in (4, 9)]
    return sequences


def rescored(model: Any) -> Rescored:
    return moved(
        lambda rows: flat_scores(model, rows, tokens=100, device=CPU),
        lambda rows, left: padded_scores(model, rows, left=left, device=CPU),
        pairs_of_rows(),
        torch.Generator().manual_seed(1),
    )


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gpt2"])
def test_a_score_depends_on_its_row_alone(architecture: str) -> None:
    model = tiny_scorer(architecture)
    use_flat_attention(model)
    result = rescored(model)
    assert list(result.changes) == ["alone", "in another order", "padded on the left", "padded on the right"]
    assert result.spread > 0.01
    assert beyond_rounding(result) == []
    assert all(change.flips == 0 for change in result.changes.values())


def test_what_a_model_goes_by_besides_its_row_is_named() -> None:
    def by_position(rows: Rows) -> torch.Tensor:
        return torch.tensor([float(len(row)) + position for position, row in enumerate(rows)])

    def padded(rows: Rows, left: bool) -> torch.Tensor:
        return by_position(rows) + (0.5 if left else 0.0)

    result = moved(by_position, padded, [[1] * length for length in range(1, 9)], torch.Generator().manual_seed(1))
    assert beyond_rounding(result) == ["alone", "in another order", "padded on the left"]
    assert result.changes["alone"].largest == 7.0
    assert result.changes["padded on the left"] == Change(largest=0.5, flips=0)
    assert result.changes["in another order"].flips > 0
    broken = moved(lambda rows: torch.full((len(rows),), torch.nan), None, [[1], [2]], torch.Generator())
    assert beyond_rounding(broken) == ["alone", "in another order"], "NaN is not taken for steady"


def turns(*contents: str) -> tuple[Message, ...]:
    roles = ("user", "assistant")
    return tuple(Message(role=roles[index % 2], content=content) for index, content in enumerate(contents))


SECRET = "the ferry to Norra leaves at half past seven from pier two every day"
HELD_OUT = [HeldOutPrompt(messages=turns(f"Shorten this: {SECRET}"), where="h.jsonl:1")]


def draw(rows: Sequence[Sequence[Message]], count: int, seed: int = 0) -> list[Message]:
    records = [Conversation(messages=tuple(row), where=f"a.jsonl:{number}") for number, row in enumerate(rows)]
    generator = torch.Generator().manual_seed(seed)
    return draw_examples(records, HELD_OUT, count=count, generator=generator, where="stages.evaluate.few_shot")


def test_the_prompt_reads_system_then_examples_then_the_question() -> None:
    system, question = Message(role="system", content="You help cats."), Message(role="user", content="When?")
    examples = turns("Where?", "In the hall.", "Who?", "Ida.")
    assert with_examples([system, question], examples) == [system, *examples, question]
    assert with_system_prompt([question], "Be brief.") == [Message(role="system", content="Be brief."), question]
    both = Message(role="system", content="You help cats.\nBe brief.")
    assert with_system_prompt([system, question], "Be brief.") == [both, question]


def test_examples_are_drawn_from_rows_that_give_no_held_out_answer_away() -> None:
    rows = [turns(f"Question {number}?", f"Answer {number}.") for number in range(30)]
    first, again, other = draw(rows, 3), draw(rows, 3), draw(rows, 3, seed=1)
    assert first == again != other
    assert len({turn.content for turn in first}) == 6
    assert [turn.role for turn in first] == ["user", "assistant"] * 3
    free = turns("Who has the keys?", "Ida has.")
    rows = [
        turns(f"Please say it politely: {SECRET}!", "The ferry leaves at 7:30."),
        turns(f"Shorten this: {SECRET}", "It leaves at 7:30."),
        turns("Hi.", "Hello.", "When?", "Now."),
        (Message(role="system", content="Be odd."), *turns("Hi.", "Odd.")),
        free,
    ]
    assert draw(rows, 1) == [*free]
    with pytest.raises(DataError, match="1 of 5"):
        draw(rows, 2)
