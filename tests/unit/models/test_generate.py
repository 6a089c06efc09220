"""Answers: greedy ones equal transformers' own, sampled ones follow the distribution, and neighbours never matter."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from alignment.core.errors import ModelError
from alignment.costs.recorder import Recorder
from alignment.models.forward import decoding
from alignment.models.forward import shared_prompts as reading_module
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.attention import ATTENTION
from alignment.models.forward.decoding import DecodingRows, sampled_tokens
from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.generate import Sampling, generate, reading_order
from alignment.models.kernels import kv_cache
from tests.oracles import logprobs as oracle
from tests.tiny import tiny_model
from tests.unit.models.conftest import LORA, PROMPTS, adapted, greedy
from tests.unit.models.test_architectures import model_of

END = 2


@pytest.fixture(params=["flat", "padded"])
def made(request: pytest.FixtureRequest) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        model = tiny_model(*args, **kwargs)
        if request.param == "flat":
            use_flat_attention(model)
        return model

    return make


def _uniforms(rows: int, steps: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_equal_prompts_are_read_once_and_answered_each_for_itself(made: Callable[..., Any]) -> None:
    model = made(vocab_size=8)
    prompts = [[5, 6, 7, 4], [3, 1], [5, 6, 7, 4], [5, 6, 7, 4], [3, 1]]
    sampling = Sampling(temperature=1.0, uniforms=_uniforms(5, 12))
    read: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    shared = generate(model, prompts, max_new_tokens=12, end_ids=[END], batch_size=5, sampling=sampling)
    flat = model.config._attn_implementation == ATTENTION
    assert read[0] == (6 if flat else 8), "two prompts, the shorter one padded to four tokens or not at all"
    assert max(read[1:]) <= 5
    hook.remove()
    alone = generate(model, prompts, max_new_tokens=12, end_ids=[END], batch_size=1, sampling=sampling)
    assert shared == alone
    assert len({tuple(answer) for answer in shared}) > 2


def test_an_adapter_that_is_active_counts(made: Callable[..., Any]) -> None:
    model, merged = adapted(made(), LORA).eval(), adapted(tiny_model(), LORA).eval().merge_and_unload()
    answers = generate(unwrapped(model), PROMPTS, max_new_tokens=10, end_ids=[END], batch_size=5)
    assert answers == [greedy(merged, prompt, limit=10, ends=[END]) for prompt in PROMPTS]
    assert answers != generate(made(), PROMPTS, max_new_tokens=10, end_ids=[END], batch_size=5)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_sampled_answers_never_depend_on_the_batch_or_on_the_order(made: Callable[..., Any], batch_size: int) -> None:
    model = made(vocab_size=8)
    prompts = [[token % 8 for token in prompt] for prompt in [*PROMPTS, PROMPTS[2], PROMPTS[0]]]
    uniforms = _uniforms(len(prompts), 16)

    def answers(order: list[int], size: int) -> list[list[int]]:
        return generate(
            model,
            [prompts[i] for i in order],
            max_new_tokens=16,
            end_ids=[END],
            batch_size=size,
            sampling=Sampling(temperature=1.0, uniforms=uniforms[order]),
        )

    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    together = answers(list(range(len(prompts))), len(prompts))
    assert answers(order, batch_size) == [together[i] for i in order]


@pytest.mark.parametrize("vocabulary", [1, 5, 256, 257, 1_000])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_inverts_the_cumulative_distribution(vocabulary: int, temperature: float) -> None:
    """Exactly, but where a uniform number lies within float32 rounding of a step."""
    rng = torch.Generator().manual_seed(vocabulary)
    logits = 2 * torch.randn(1, vocabulary, generator=rng)
    logits[0, vocabulary // 2 :: 3] = float("-inf")
    logits[0, 0] = 0.0
    finite = [logit if logit > float("-inf") else -1e9 for logit in logits[0].tolist()]
    probabilities = torch.tensor(oracle.log_softmax(finite, temperature=temperature), dtype=torch.float64).exp()
    cumulative = list(itertools.accumulate(probabilities.tolist()))
    uniforms = _uniforms(2_000, 1)[:, 0]
    tokens = sampled_tokens(logits.expand(2_000, -1), uniforms, temperature)
    checked = 0
    for uniform, token in zip(uniforms.tolist(), tokens.tolist(), strict=True):
        if min(abs(uniform - step) for step in cumulative) > 1e-6:
            assert token == bisect.bisect_right(cumulative, uniform)
            checked += 1
    assert checked > 1_900


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2.0**-53, 1.0])
def test_a_token_of_probability_zero_is_never_drawn(uniform: float) -> None:
    logits = torch.full((1, 600), float("-inf"))
    logits[0, [300, 310]] = torch.tensor([1.0, 2.0])
    token = sampled_tokens(logits, torch.tensor([uniform], dtype=torch.float64), 1.0)
    assert int(token) == (300 if uniform == 0.0 else 310)


@pytest.mark.parametrize("window", [None, 3])
def test_prompts_that_cannot_be_answered_are_refused(window: int | None) -> None:
    model = tiny_model("mistral", sliding_window=window, max_position_embeddings=8)
    use_flat_attention(model)
    options: dict[str, Any] = {"end_ids": [], "batch_size": 2}
    assert [len(answer) for answer in generate(model, [[5], [5, 6, 7]], max_new_tokens=5, **options)] == [5, 5]
    with pytest.raises(ModelError, match="a row of 9 tokens is longer than the model's 8 positions"):
        generate(model, [[5], [5, 6, 7]], max_new_tokens=6, **options)
    with pytest.raises(ValueError, match="a prompt has no token"):
        generate(model, [[5], []], max_new_tokens=2, **options)


LIMIT = 14
ENDS = list(range(16))
"""Of 128 tokens, so that answers end at different steps."""
START = list(range(30, 50))
"""Long enough to be computed once."""
MANY = [[5, 9, 2, 7], [8], [3, 2, 2, 6, 4, 9, 2, 11], [40, 41], [17, 18, 19, 20, 21], [8], [8], [60, 61, 62]]
MANY += [[17, 18, 19, 20, 21], [9] * 7, [101], [7, 77]]
BEHIND_A_BEGINNING = [[*START, *prompt] for prompt in MANY]
PADDED = ("gpt2", "gemma2 padded")


@dataclass(kw_only=True, slots=True)
class Steps:
    numbers: list[list[int]] = field(default_factory=list)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    columns: list[int] = field(default_factory=list)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
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


def _entered_beside_others(numbers: Sequence[Sequence[int]]) -> bool:
    return any(set(before) & set(after) and set(after) - set(before) for before, after in itertools.pairwise(numbers))


@pytest.mark.parametrize("batch_size", [3, 12])
@pytest.mark.parametrize("prompts", [MANY, BEHIND_A_BEGINNING], ids=["apart", "behind one beginning"])
@pytest.mark.parametrize("name", ["llama", "mistral with a window", "gemma2", *PADDED])
@torch.no_grad()
def test_sampled_tokens_and_logprobs_are_those_of_a_padded_forward(
    name: str, prompts: list[list[int]], batch_size: int, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows enter and leave at different steps, columns are dropped, and the cache grows. Gemma 2 has windows, capped
    scores and capped logits."""
    monkeypatch.setattr(decoding, "DROPPED", 2)
    monkeypatch.setattr(kv_cache, "ROOM", 3)
    monkeypatch.setattr(reading_module, "FEWEST_TOKENS", 16)
    monkeypatch.setattr(reading_module, "FEWEST_ROWS", 1)
    model, reference = (model_of(name.removesuffix(" padded")) for _ in "12")
    if name not in PADDED:
        use_flat_attention(model)
    uniforms = _uniforms(len(prompts), LIMIT, seed=4)
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
    assert (min(steps.columns) < len(START)) is (is_held_once or prompts is MANY)
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


def test_answers_on_shapes_are_long_but_not_equally_long() -> None:
    with Recorder().recording():
        model = tiny_model("llama")
        answers = generate(model, [[5, 6, 7]] * 10, max_new_tokens=12, end_ids=[END], batch_size=10)
    assert [len(answer) for answer in answers] == [12, 11, 10, 9, 8, 7, 6, 5, 12, 11]
    assert {answer.index(END) for answer in answers if END in answer} <= set(range(4, 12))


def test_progress_counts_the_prompts_that_are_done(made: Callable[..., Any]) -> None:
    counts: list[int] = []
    generate(made(), PROMPTS, max_new_tokens=2, end_ids=[], batch_size=2, progress=counts.append)
    assert counts == [2, 4, 5]
