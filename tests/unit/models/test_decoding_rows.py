"""Prompts that take over the rows of finished answers: tokens and log-probabilities are those of a padded forward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignment.models.forward import decoding_rows
from alignment.models.forward import shared_beginning as beginning_module
from alignment.models.forward.decoding_rows import DecodingRows
from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.generate import Sampling, generate, reading_order
from alignment.models.forward.shared_beginning import shared_beginning
from alignment.models.forward.waiting_prompts import WaitingPrompts
from alignment.models.kernels import kv_cache
from tests.tiny import tiny_model
from tests.unit.models.test_architectures import model_of

LIMIT = 14
ENDS = list(range(16))
"""Of 128 tokens, so that answers end at different steps."""
START = list(range(30, 50))
"""Long enough to be computed once."""
PROMPTS = [
    [5, 9, 2, 7],
    [8],
    [3, 2, 2, 6, 4, 9, 2, 11],
    [40, 41],
    [17, 18, 19, 20, 21],
    [8],
    [8],
    [60, 61, 62],
    [17, 18, 19, 20, 21],
    [9] * 7,
    [101],
    [7, 77],
]
BEHIND_A_BEGINNING = [[*START, *prompt] for prompt in PROMPTS]
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tiny_model("llama"),
    "gpt2": lambda: tiny_model("gpt2"),
    "mistral with a window": lambda: model_of("mistral with a window"),
    "gemma2": lambda: model_of("gemma2"),  # windows, capped scores and capped logits
}


@dataclass(kw_only=True, slots=True)
class Steps:
    """What each step saw: the prompts that its rows answer, log p of the chosen tokens, the columns of the cache."""

    numbers: list[list[int]] = field(default_factory=list)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    columns: list[int] = field(default_factory=list)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Records the steps of the batches that are decoded from here on."""
    seen, next_tokens = Steps(), DecodingRows.next_tokens

    def recorded(rows: DecodingRows, temperature: float) -> Tensor:
        tokens = next_tokens(rows, temperature)
        logprobs = (rows.logits.double() / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        for number, logprob in zip(rows.numbers, logprobs.tolist(), strict=True):
            seen.logprobs.setdefault(number, []).append(logprob)
        seen.numbers.append(list(rows.numbers))
        seen.columns.append(rows.cache.layers[0].keys.shape[2])
        return tokens

    monkeypatch.setattr(DecodingRows, "next_tokens", recorded)
    return seen


def _uniforms(prompts: Sequence[Sequence[int]]) -> Tensor:
    return torch.rand(len(prompts), LIMIT, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def _entered_beside_others(numbers: Sequence[Sequence[int]]) -> bool:
    """Whether a prompt entered while another one was being answered."""
    return any(set(before) & set(after) and set(after) - set(before) for before, after in itertools.pairwise(numbers))


@pytest.mark.parametrize("batch_size", [3, 4, 12])
@pytest.mark.parametrize("prompts", [PROMPTS, BEHIND_A_BEGINNING], ids=["apart", "behind one beginning"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_sampled_tokens_and_logprobs_are_those_of_a_padded_forward(
    name: str, prompts: list[list[int]], batch_size: int, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows enter and leave at different steps, columns are dropped, and the cache grows."""
    monkeypatch.setattr(decoding_rows, "DROPPED", 2)
    monkeypatch.setattr(kv_cache, "ROOM", 3)
    monkeypatch.setattr(beginning_module, "FEWEST_TOKENS", 16)
    monkeypatch.setattr(beginning_module, "FEWEST_ROWS", 1)
    model, reference = MODELS[name](), MODELS[name]()
    if name != "gpt2":
        use_flat_attention(model)
    uniforms = _uniforms(prompts)
    answers = generate(
        model,
        prompts,
        max_new_tokens=LIMIT,
        end_ids=ENDS,
        batch_size=batch_size,
        sampling=Sampling(temperature=0.8, uniforms=uniforms),
    )
    assert _entered_beside_others(steps.numbers) is (batch_size < len(prompts))
    is_held_once = name == "llama" and prompts is BEHIND_A_BEGINNING
    assert (min(steps.columns) < len(START)) is (is_held_once or prompts is PROMPTS)
    assert len({len(answer) for answer in answers}) > 4
    for number, index in enumerate(reading_order(prompts)):
        prompt, answer = prompts[index], answers[index]
        logits = reference(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].double() / 0.8
        cumulative = logits.softmax(-1).cumsum(-1)
        assert answer == (cumulative <= uniforms[index, : len(answer), None]).sum(-1).tolist()
        assert all((token in ENDS) == (step == len(answer) - 1) for step, token in enumerate(answer[: LIMIT - 1]))
        expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        logprobs = torch.tensor(steps.logprobs[number][: len(answer)], dtype=torch.float64)
        torch.testing.assert_close(logprobs, expected, rtol=0.0, atol=1e-5)


def test_many_prompts_take_a_bounded_number_of_rows_and_columns(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding_rows, "DROPPED", 2)
    monkeypatch.setattr(kv_cache, "ROOM", 3)
    model = tiny_model()
    use_flat_attention(model)
    prompts = [[number % 100 + 20, 7, 9] for number in range(60)]
    sampling = Sampling(temperature=1.0, uniforms=_uniforms(prompts))
    answers = generate(model, prompts, max_new_tokens=LIMIT, end_ids=ENDS, batch_size=4, sampling=sampling)
    assert {len(numbers) for numbers in steps.numbers[:-LIMIT]} == {4}
    # The prompt with its answer, columns that are not worth moving, and those allocated ahead.
    assert max(steps.columns) <= 3 + LIMIT + 2 + 3
    tokens = sum(map(len, answers))
    assert len(steps.numbers) < 1.4 * tokens / 4, "finished rows do not wait for the longest answer"


def test_equal_prompts_leave_the_queue_together_unless_they_are_too_many() -> None:
    queue = WaitingPrompts(prompts=[[5, 6]] * 3 + [[7]] * 3 + [[4]], uniforms=None)
    assert list(queue.next(2).numbers) == [0, 1]
    assert list(queue.next_group(3).numbers) == [2], "the next three would be parted"
    assert list(queue.next_group(2).numbers) == [3, 4], "three do not fit, so two of them have to do"
    assert queue.waiting == 2
    assert list(queue.next_group(9).numbers) == [5, 6]
    assert queue.waiting == 0


def test_a_beginning_is_held_once_if_it_pays_and_attention_can() -> None:
    model = tiny_model()
    prompts = [[*range(70), 5, 6], [*range(70), 5], [*range(70), 9]]
    assert shared_beginning(model, prompts, 8) is None, "its attention is not flat"
    use_flat_attention(model)
    beginning = shared_beginning(model, prompts, 8)
    assert beginning is not None
    assert beginning.tokens == 70
    assert {keys.shape[1] for keys, _ in beginning.keys_values.layers.values()} == {70}
    assert shared_beginning(model, prompts, 7) is None, "few rows"
    assert shared_beginning(model, [*prompts, [*range(63), 99, 98]], 8) is None, "few tokens"
    repeated = shared_beginning(model, [list(range(70))] * 3, 8)
    assert repeated is not None
    assert repeated.tokens == 69, "each prompt has a token of its own"


@pytest.mark.parametrize("name", ["mistral with a window", "gemma2"])
def test_a_beginning_stays_with_each_row_where_attention_has_windows_or_caps(name: str) -> None:
    model = model_of(name)
    use_flat_attention(model)
    assert shared_beginning(model, [[*range(70), number] for number in range(8)], 8) is None


@torch.no_grad()
def test_a_finished_row_that_stays_needs_no_positions_that_the_model_lacks() -> None:
    """The model has as many as its longest prompt and answer take together."""
    random = Random(1)
    prompts = [[random.randrange(20, 120) for _ in range(random.choice([1, 2, 3, 4, 8]))] for _ in range(40)]
    prompts += [[50] * 8] * 6
    model = tiny_model("gpt2", max_position_embeddings=8 + LIMIT)
    sampling = Sampling(temperature=1.0, uniforms=_uniforms(prompts))
    answers = [
        generate(model, prompts, max_new_tokens=LIMIT, end_ids=ENDS, batch_size=size, sampling=sampling)
        for size in (5, len(prompts))
    ]
    assert answers[0] == answers[1]
