"""Answers behind their prompts as one stream: places, log-probabilities at a temperature, values before each token."""

from __future__ import annotations

import pytest
import torch
from transformers import CohereConfig, GraniteConfig, PreTrainedConfig

from alignment.core.errors import ModelError
from alignment.models.forward.answers import answer_statistics, answer_stream, answer_values, batches
from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.rows import stream
from tests.tiny import tiny_model, tiny_scorer
from tests.unit.models.conftest import ROWS, SIZES, padded, plain, random_model, relative, twin

CPU = torch.device("cpu")
PROMPTS = [prompt for name in ROWS for prompt, _ in ROWS[name]]
ANSWERS = [answer for name in ROWS for _, answer in ROWS[name]]


def test_places_are_the_positions_before_each_answer_token() -> None:
    part = answer_stream([[5, 6], [9]], [[7, 2], [2]], CPU)
    assert part.rows.input_ids.tolist() == [5, 6, 7, 2, 9, 2]
    assert part.rows.position_ids.tolist() == [0, 1, 2, 3, 0, 1]
    assert part.rows.ends.tolist() == [3, 5]
    assert part.indices.tolist() == [1, 2, 4]
    assert part.labels.tolist() == [7, 2, 2]
    assert part.lengths == (2, 1)


def test_a_stream_knows_which_columns_its_rows_would_fill() -> None:
    rows = stream([[7, 8, 9], [5, 6]], CPU)
    assert rows.is_real.tolist() == [[True, True, True], [True, True, False]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("architecture", ["llama", "gemma"])
def test_statistics_of_answers_equal_the_plain_forward(architecture: str, temperature: float) -> None:
    model = tiny_model(architecture)
    reference = twin(model)
    use_flat_attention(model)
    statistics = answer_statistics(model, answer_stream(PROMPTS, ANSWERS, CPU), temperature=temperature)
    expected = plain(reference, padded(list(zip(PROMPTS, ANSWERS, strict=True))), temperature=temperature)
    for name in ("logprobs", "entropy", "mean_logits"):
        assert relative(getattr(statistics, name), getattr(expected, name)) < 1e-5
    assert torch.equal(statistics.is_top1, expected.is_top1)


@pytest.mark.parametrize("tokens", [1, 12, 100])
def test_the_size_of_a_batch_never_changes_log_probabilities(tokens: int) -> None:
    model = tiny_model()
    use_flat_attention(model)
    whole = answer_statistics(model, answer_stream(PROMPTS, ANSWERS, CPU)).logprobs
    parts = [answer_statistics(model, part).logprobs for part in batches(PROMPTS, ANSWERS, tokens=tokens, device=CPU)]
    assert relative(torch.cat(parts), whole) < 1e-6


def test_a_value_is_read_before_its_token_is_emitted() -> None:
    """It depends on everything before the token and on nothing from the token on."""
    model = tiny_scorer()
    use_flat_attention(model)
    values = answer_values(model, answer_stream([[5, 6]], [[7, 8, 2]], CPU))
    reference = twin(tiny_scorer())
    for step, before in enumerate(([5, 6], [5, 6, 7], [5, 6, 7, 8])):
        states = reference.base_model(input_ids=torch.tensor([before])).last_hidden_state
        assert relative(values[step], reference.score(states[0, -1])[0]) < 1e-5
    changed = answer_values(model, answer_stream([[5, 6]], [[7, 9, 2]], CPU))
    assert torch.equal(changed[:2], values[:2])
    assert changed[2] != values[2]


@pytest.mark.parametrize("config", [CohereConfig, GraniteConfig])
def test_a_factor_of_the_logits_counts(config: type[PreTrainedConfig]) -> None:
    """Cohere multiplies them, Granite divides them."""
    model = random_model(
        config(**SIZES, **({"logit_scale": 3.0} if config is CohereConfig else {"logits_scaling": 3.0}))
    )
    plain = twin(model)
    use_flat_attention(model)
    statistics = answer_statistics(model, answer_stream([[5, 6]], [[7, 2]], CPU), temperature=0.7)
    expected = (plain(torch.tensor([[5, 6, 7, 2]])).logits[0, 1:3] / 0.7).log_softmax(-1)
    assert relative(statistics.logprobs, expected[[0, 1], [7, 2]]) < 1e-5
    assert relative(statistics.entropy, -(expected.exp() * expected).sum(-1)) < 1e-5


def test_a_head_with_a_bias_is_refused() -> None:
    model = tiny_model()
    use_flat_attention(model)
    model.lm_head.bias = torch.nn.Parameter(torch.ones(128))
    with pytest.raises(ModelError, match="adds a bias"):
        answer_statistics(model, answer_stream([[5, 6]], [[7, 2]], CPU))
