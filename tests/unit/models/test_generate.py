"""Answers: greedy ones equal transformers' own, sampled ones follow the distribution, and neighbours never matter."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import TaskType
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, PreTrainedConfig, Qwen3Config

from alignment.config.adapter import AdapterConfig
from alignment.core.errors import ModelError
from alignment.costs.recorder import Recorder
from alignment.models.assembly.adapters import add_adapter
from alignment.models.forward import entering_prompts as padded_module
from alignment.models.forward import generate as generate_module
from alignment.models.forward import shared_prompts as reading_module
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.attention import ATTENTION
from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.generate import Sampling, generate
from alignment.models.forward.token_choice import sampled_tokens
from alignment.models.kernels import kv_cache as cache_module
from tests.oracles import logprobs as oracle
from tests.tiny import ARCHITECTURES, liven, tiny_model
from tests.unit.models.conftest import PROMPTS, SIZES

END = 2
_SIZES = {**SIZES, "head_dim": 8}
OTHERS: dict[str, PreTrainedConfig] = {
    "qwen3": Qwen3Config(**_SIZES),
    # Capped attention scores, which only the eager function has, capped logits, and every second layer with a window.
    "gemma2": Gemma2Config(
        **_SIZES, sliding_window=4, final_logit_softcapping=3.0, query_pre_attn_scalar=8, attn_implementation="eager"
    ),
    "gemma3": Gemma3TextConfig(**_SIZES, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
}


def _own_greedy(model: torch.nn.Module, prompt: list[int], *, ends: list[int], limit: int) -> list[int]:
    """transformers' generate on one row by itself."""
    ids = torch.tensor([prompt])
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=ends,
        pad_token_id=0,
    )
    return generated[0, len(prompt) :].tolist()


def _other_model(name: str) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(OTHERS[name], dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


Maker = Callable[..., Any]


@pytest.fixture(params=["flat", "padded"])
def made(request: pytest.FixtureRequest) -> Maker:
    """Makes tiny models whose prompts are read in one stream, as in the stages, or padded."""

    def make(*args: Any, **kwargs: Any) -> Any:
        model = tiny_model(*args, **kwargs)
        if request.param == "flat":
            use_flat_attention(model)
        return model

    return make


def _uniforms(rows: int, steps: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gpt_neox"])
def test_greedy_answers_equal_those_of_transformers_row_by_row(architecture: str, batch_size: int) -> None:
    model, reference = tiny_model(architecture), tiny_model(architecture)
    use_flat_attention(model)
    free = [_own_greedy(reference, prompt, ends=[], limit=12) for prompt in PROMPTS]
    ends = [free[0][2], free[2][5]]
    answers = generate(model, PROMPTS, max_new_tokens=12, end_ids=ends, batch_size=batch_size)
    assert answers == [_own_greedy(reference, prompt, ends=ends, limit=12) for prompt in PROMPTS]
    assert len({len(answer) for answer in answers}) > 1, "rows should finish at different steps"


def test_a_model_with_a_sliding_window_answers_as_transformers_does() -> None:
    model, reference = (tiny_model("mistral", sliding_window=3) for _ in range(2))
    answers = generate(model, PROMPTS, max_new_tokens=10, end_ids=[END], batch_size=5)
    assert answers == [_own_greedy(reference, prompt, ends=[END], limit=10) for prompt in PROMPTS]


@pytest.mark.parametrize("batch_size", [2, 5])
@pytest.mark.parametrize("name", OTHERS)
def test_windows_capped_scores_and_normalised_heads_are_those_of_the_model(name: str, batch_size: int) -> None:
    model, reference = _other_model(name), _other_model(name)
    answers = generate(model, PROMPTS, max_new_tokens=10, end_ids=[END], batch_size=batch_size)
    assert answers == [_own_greedy(reference, prompt, ends=[END], limit=10) for prompt in PROMPTS]


def test_a_model_with_learned_positions_answers_as_transformers_does() -> None:
    model, reference = tiny_model("gpt2"), tiny_model("gpt2")
    answers = generate(model, PROMPTS, max_new_tokens=10, end_ids=[END], batch_size=2)
    assert answers == [_own_greedy(reference, prompt, ends=[END], limit=10) for prompt in PROMPTS]


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize(("name", "value"), [("ROOM", 0), ("ROOM", 3), ("FULL_ENOUGH", 0.0), ("FULL_ENOUGH", 1.0)])
def test_answers_never_depend_on_the_room_of_the_cache_or_on_when_rows_leave(
    made: Maker, architecture: str, name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of 40 tokens is beyond what is allocated at first."""
    changes = {"sliding_window": 6} if architecture == "mistral" else {}
    model, reference = made(architecture, **changes), tiny_model(architecture, **changes)
    monkeypatch.setattr(cache_module if name == "ROOM" else generate_module, name, value)
    free = [_own_greedy(reference, prompt, ends=[], limit=40) for prompt in PROMPTS]
    ends = [free[0][9], free[3][20]]
    answers = generate(model, PROMPTS, max_new_tokens=40, end_ids=ends, batch_size=5)
    assert answers == [_own_greedy(reference, prompt, ends=ends, limit=40) for prompt in PROMPTS]
    assert len({len(answer) for answer in answers}) > 1, "rows should finish at different steps"


@pytest.mark.parametrize("tokens", [1, 9, 20, 10_000])
def test_answers_never_depend_on_how_prompts_are_read_together(
    made: Maker, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made()
    expected = generate(model, PROMPTS, max_new_tokens=8, end_ids=[END], batch_size=1)
    monkeypatch.setattr(padded_module, "PREFILL_TOKENS", tokens)
    monkeypatch.setattr(reading_module, "READ_TOKENS", tokens)
    assert generate(model, PROMPTS, max_new_tokens=8, end_ids=[END], batch_size=5) == expected


@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_of_prompts_never_changes_an_answer(made: Maker, seed: int) -> None:
    model = made(vocab_size=8)
    prompts = [[token % 8 for token in prompt] for prompt in [*PROMPTS, PROMPTS[2], PROMPTS[0]]]
    uniforms = _uniforms(len(prompts), 16)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()

    def answers(indices: list[int]) -> list[list[int]]:
        return generate(
            model,
            [prompts[i] for i in indices],
            max_new_tokens=16,
            end_ids=[END],
            batch_size=4,
            sampling=Sampling(temperature=1.0, uniforms=uniforms[indices]),
        )

    straight = answers(list(range(len(prompts))))
    assert answers(order) == [straight[i] for i in order]


def test_equal_prompts_are_read_once_and_answered_each_for_itself(made: Maker) -> None:
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


def test_an_adapter_that_is_active_counts(made: Maker) -> None:
    adapted = add_adapter(made(), AdapterConfig(rank=4), TaskType.CAUSAL_LM).eval()
    liven(adapted)
    merged = add_adapter(tiny_model(), AdapterConfig(rank=4), TaskType.CAUSAL_LM).eval()
    liven(merged)
    reference = merged.merge_and_unload()
    answers = generate(unwrapped(adapted), PROMPTS, max_new_tokens=10, end_ids=[END], batch_size=5)
    assert answers == [_own_greedy(reference, prompt, ends=[END], limit=10) for prompt in PROMPTS]
    assert answers != generate(made(), PROMPTS, max_new_tokens=10, end_ids=[END], batch_size=5)


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_answers_are_likely_under_the_models_own_forward(made: Maker, autocast: bool) -> None:
    """Low precision may take another token where two are nearly as likely, and nowhere else."""
    model = made() if autocast else made().to(torch.bfloat16)
    context = torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast)
    with context:
        answers = generate(model, PROMPTS, max_new_tokens=12, end_ids=[END], batch_size=5)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        with torch.no_grad(), context:
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        gap = logits.max(-1).values - logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]
        assert gap.max() < 0.1 * logits.std()


def test_the_generation_config_of_a_model_never_leaks_in(made: Maker) -> None:
    model = made()
    plain = generate(model, PROMPTS, max_new_tokens=8, end_ids=[END], batch_size=2)
    config = model.generation_config
    config.do_sample, config.temperature, config.top_k, config.top_p = True, 5.0, 2, 0.1
    config.repetition_penalty, config.no_repeat_ngram_size, config.max_new_tokens = 3.0, 1, 1
    assert generate(model, PROMPTS, max_new_tokens=8, end_ids=[END], batch_size=2) == plain


def test_an_answer_ends_with_its_end_token_or_at_the_limit() -> None:
    uniforms = _uniforms(64, 20)
    answers = generate(
        tiny_model(vocab_size=8),
        [[5, 6]] * 64,
        max_new_tokens=20,
        end_ids=[END, 3],
        batch_size=64,
        sampling=Sampling(temperature=1.0, uniforms=uniforms),
    )
    for answer in answers:
        assert not {END, 3} & set(answer[:-1])
        assert answer[-1] in (END, 3) or len(answer) == 20
    assert {answer[-1] for answer in answers} >= {END, 3}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_sampled_answers_never_depend_on_the_batch(made: Maker, batch_size: int) -> None:
    model = made(vocab_size=8)
    prompts = [[token % 8 for token in prompt] for prompt in PROMPTS]
    sampling = Sampling(temperature=1.0, uniforms=_uniforms(len(prompts), 16))
    together, split = (
        generate(model, prompts, max_new_tokens=16, end_ids=[END], batch_size=size, sampling=sampling)
        for size in (len(prompts), batch_size)
    )
    assert split == together


def test_rows_that_finish_early_leave_the_others_unchanged(made: Maker) -> None:
    """The same row beside neighbours that end at once and beside neighbours that never end."""
    model = made(vocab_size=8)
    uniforms = _uniforms(4, 12)
    sampling = Sampling(temperature=1.0, uniforms=uniforms)
    prompts = [[5, 6, 7], [4], [5, 5], [6, 4, 4, 5]]
    never = generate(model, prompts, max_new_tokens=12, end_ids=[], batch_size=4, sampling=sampling)
    for end in range(8):
        answers = generate(model, prompts, max_new_tokens=12, end_ids=[end], batch_size=4, sampling=sampling)
        for answer, endless in zip(answers, never, strict=True):
            cut = endless.index(end) + 1 if end in endless else len(endless)
            assert answer == endless[:cut]


def test_other_uniforms_give_other_answers(made: Maker) -> None:
    model = made(vocab_size=8)
    answers = [
        generate(
            model,
            [[5, 6]],
            max_new_tokens=16,
            end_ids=[],
            batch_size=1,
            sampling=Sampling(temperature=1.0, uniforms=_uniforms(1, 16, seed=seed)),
        )[0]
        for seed in (0, 0, 1)
    ]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize("temperature", [1.0, 0.8, 3.0])
def test_evenly_spread_uniforms_reproduce_the_distribution(made: Maker, temperature: float) -> None:
    model = made(vocab_size=8)
    logits = model(torch.tensor([[5, 6]])).logits[0, -1].tolist()
    count = 4_000
    uniforms = (torch.arange(count, dtype=torch.float64)[:, None] + 0.5) / count
    answers = generate(
        model,
        [[5, 6]] * count,
        max_new_tokens=1,
        end_ids=[],
        batch_size=1_000,
        sampling=Sampling(temperature=temperature, uniforms=uniforms),
    )
    seen = Counter(answer[0] for answer in answers)
    expected = torch.tensor(oracle.log_softmax(logits, temperature=temperature)).exp()
    assert expected.max() < 0.99, "the distribution should not be trivial"
    for token in range(8):
        assert abs(seen[token] / count - float(expected[token])) < 1.5 / count


def test_random_uniforms_pass_a_chi_square_test_on_two_steps(made: Maker) -> None:
    """16 cells, 15 degrees of freedom: the statistic stays below 37.7 in 999 of 1,000 cases."""
    model = made(vocab_size=4)
    count = 4_000
    answers = generate(
        model,
        [[1, 3]] * count,
        max_new_tokens=2,
        end_ids=[],
        batch_size=1_000,
        sampling=Sampling(temperature=2.0, uniforms=_uniforms(count, 2)),
    )
    seen = Counter(map(tuple, answers))
    statistic = 0.0
    for first in range(4):
        first_logprob = oracle.log_softmax(model(torch.tensor([[1, 3]])).logits[0, -1].tolist(), temperature=2.0)[first]
        after = model(torch.tensor([[1, 3, first]])).logits[0, -1].tolist()
        for second, second_logprob in enumerate(oracle.log_softmax(after, temperature=2.0)):
            expected = count * float(torch.tensor(first_logprob + second_logprob).exp())
            statistic += (seen[first, second] - expected) ** 2 / expected
    assert 2.0 < statistic < 37.7


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


def test_capped_logits_are_what_is_sampled_from() -> None:
    model = _other_model("gemma2")
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6]])).logits[0, -1].tolist()
    assert max(map(abs, logits)) <= 3.0
    count = 2_000
    uniforms = (torch.arange(count, dtype=torch.float64)[:, None] + 0.5) / count
    sampling = Sampling(temperature=0.7, uniforms=uniforms)
    answers = generate(model, [[5, 6]] * count, max_new_tokens=1, end_ids=[], batch_size=count, sampling=sampling)
    seen = Counter(answer[0] for answer in answers)
    for token, logprob in enumerate(oracle.log_softmax(logits, temperature=0.7)):
        assert abs(seen[token] / count - float(torch.tensor(logprob).exp())) < 1.5 / count


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_unit_interval_give_tokens_of_the_vocabulary(uniform: float) -> None:
    sampling = Sampling(temperature=1.0, uniforms=torch.full((1, 3), uniform, dtype=torch.float64))
    answer = generate(tiny_model(), [[5]], max_new_tokens=3, end_ids=[], batch_size=1, sampling=sampling)[0]
    assert all(0 <= token < 128 for token in answer)


def test_progress_counts_the_prompts_that_are_done(made: Maker) -> None:
    counts: list[int] = []
    generate(made(), PROMPTS, max_new_tokens=2, end_ids=[], batch_size=2, progress=counts.append)
    assert counts == [2, 4, 5]


@pytest.mark.parametrize("window", [None, 3])
def test_an_answer_that_may_outgrow_the_models_positions_is_refused(window: int | None) -> None:
    model = tiny_model("mistral", sliding_window=window, max_position_embeddings=8)
    use_flat_attention(model)
    options: dict[str, Any] = {"end_ids": [], "batch_size": 2}
    assert [len(answer) for answer in generate(model, [[5], [5, 6, 7]], max_new_tokens=5, **options)] == [5, 5]
    with pytest.raises(ModelError, match="a row of 9 tokens is longer than the model's 8 positions"):
        generate(model, [[5], [5, 6, 7]], max_new_tokens=6, **options)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="a prompt has no token"):
        generate(tiny_model(), [[5], []], max_new_tokens=2, end_ids=[END], batch_size=2)


def test_generation_leaves_no_gradients_and_no_mode_behind() -> None:
    model = tiny_model()
    generate(unwrapped(model), PROMPTS, max_new_tokens=2, end_ids=[END], batch_size=2)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training


@pytest.mark.parametrize("chosen", [True, False])
def test_every_step_runs_without_cudnns_attention_and_leaves_the_callers_choice(made: Maker, chosen: bool) -> None:
    model = made()
    during: list[bool] = []
    model.register_forward_pre_hook(lambda *_: during.append(torch.backends.cuda.cudnn_sdp_enabled()))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(chosen)
    try:
        generate(model, PROMPTS, max_new_tokens=3, end_ids=[], batch_size=2)
        assert torch.backends.cuda.cudnn_sdp_enabled() is chosen
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert len(during) >= 2 * 3
    assert not any(during)


def test_answers_on_shapes_are_long_but_not_equally_long() -> None:
    with Recorder().recording():
        model = tiny_model("llama")
        answers = generate(model, [[5, 6, 7]] * 10, max_new_tokens=12, end_ids=[END], batch_size=10)
    assert [len(answer) for answer in answers] == [12, 11, 10, 9, 8, 7, 6, 5, 12, 11]
    assert {answer.index(END) for answer in answers if END in answer} <= set(range(4, 12))
