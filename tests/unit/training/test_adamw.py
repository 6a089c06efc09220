"""AdamW with and without float32 master weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignment.config.optim import Moments
from alignment.core.errors import ConfigError
from alignment.training import optimizer as module
from alignment.training.context import StageContext
from alignment.training.optimizer import RandomlyRoundedAdamW, adamw, rounded_at_random


def _steps(optimizer: torch.optim.Optimizer, weight: nn.Parameter, count: int, start: int = 0) -> None:
    for step in range(start, start + count):
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
        weight.grad = (weight.detach().float() - 1.0 + 0.1 * noise).to(weight.dtype)
        optimizer.step()


def _weight(dtype: torch.dtype = torch.bfloat16, count: int = 64) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, count).to(dtype))


def test_float32_weights_take_torchs_own_steps() -> None:
    weight, expected = _weight(torch.float32), _weight(torch.float32)
    settings: dict[str, Any] = {"lr": 0.01, "eps": 1e-5, "weight_decay": 0.1}
    _steps(RandomlyRoundedAdamW([weight], **settings, seed=3), weight, 50)
    _steps(torch.optim.AdamW([expected], **settings), expected, 50)
    assert torch.allclose(weight, expected, rtol=1e-5, atol=1e-6)


def test_steps_below_the_spacing_of_bfloat16_add_up() -> None:
    """At 1 bfloat16 numbers are 1/128 or 1/256 apart; 500 steps of 1/10,000 are lost one by one when rounded."""
    rounded, lost = _weight(count=4096), _weight(count=4096)
    exact = _weight(torch.float32, count=4096)
    for weight, optimizer in (
        (rounded, RandomlyRoundedAdamW([rounded], lr=1e-4, seed=3)),
        (lost, torch.optim.AdamW([lost], lr=1e-4, weight_decay=0.0)),
        (exact, torch.optim.AdamW([exact], lr=1e-4, weight_decay=0.0)),
    ):
        _steps(optimizer, weight, 500)
    start = torch.linspace(-1, 1, 4096)
    far = start < -0.5  # where a step is below half of the spacing, and the gradient always has the same sign
    moved = {name: float((w.detach().float() - start)[far].mean()) for name, w in (("f", rounded), ("l", lost))}
    expected = float((exact.detach() - start)[far].mean())
    assert moved["f"] == pytest.approx(expected, rel=0.05)
    assert abs(moved["l"]) < 0.1 * expected


def test_the_second_moment_of_bfloat16_weights_follows_the_gradient() -> None:
    weight = nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))
    optimizer = RandomlyRoundedAdamW([weight], lr=0.0, seed=3)
    for size, count in ((1.0, 3000), (0.1, 3000)):
        for _ in range(count):
            weight.grad = torch.full_like(weight, size)
            optimizer.step()
    expected = 0.01 + (1.0 - 0.999**3000 - 0.01) * 0.999**3000
    assert float(optimizer.state[weight]["exp_avg_sq"].float().mean()) == pytest.approx(expected, rel=0.05)


def test_rounding_is_right_on_average_and_goes_to_a_neighbour() -> None:
    values = torch.tensor([1.0, 1.0 + 2**-9, -1.0 - 2**-9, 3e-5, 1e-30, 2.0 - 2**-20]).repeat(20_000, 1)
    bits = torch.randint(0, 2**16, values.shape, dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    rounded = rounded_at_random(values.clone(), bits)
    assert torch.equal(rounded, rounded.bfloat16().float())
    spacing = values.abs() * 2**-7
    assert bool(((rounded - values).abs() <= spacing).all())
    assert torch.allclose(rounded.double().mean(0), values[0].double(), rtol=1e-4, atol=0.0)
    assert torch.equal(rounded[:, 0], values[:, 0])
    assert set(rounded[:, 5].tolist()) <= {2.0, 2.0 - 2**-7}, "a carry goes into the exponent"
    infinite = torch.tensor([float("inf"), float("-inf")])
    assert torch.equal(rounded_at_random(infinite.clone(), torch.full((2,), 2**16 - 1, dtype=torch.int32)), infinite)


@pytest.mark.parametrize("chunk", [2**20, 7])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    whole, half = _weight(), _weight()
    _steps(RandomlyRoundedAdamW([whole], lr=0.01, seed=3), whole, 20)
    first = RandomlyRoundedAdamW([half], lr=0.01, seed=3)
    _steps(first, half, 10)
    second = RandomlyRoundedAdamW([half], lr=0.01, seed=3)
    second.load_state_dict(first.state_dict())
    _steps(second, half, 10, start=10)
    assert torch.equal(whole, half)


def test_another_seed_or_parameter_rounds_otherwise() -> None:
    def after(seed: int) -> list[Tensor]:
        weights = [_weight(), _weight()]
        optimizer = RandomlyRoundedAdamW(weights, lr=1e-3, seed=seed)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        return weights

    first, other = after(1), after(2)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(first[0], after(1)[0])


def test_trained_weights_decide_which_optimiser_it_is(context: StageContext) -> None:
    def optimizer(*weights: Tensor, moments: Moments = Moments.full) -> tuple[type[Any], dict[str, Any]]:
        return adamw(weights, context, lr=1e-3, eps=1e-7, moments=moments)

    assert optimizer(_weight(torch.float32), _weight())[0] is RandomlyRoundedAdamW
    kind, arguments = optimizer(_weight(torch.float32), _weight().requires_grad_(False))
    assert kind is torch.optim.AdamW
    assert arguments == {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-7, "fused": True}
    with pytest.raises(ConfigError, match=r"optim\.moments: 'eight_bit' needs float32"):
        optimizer(_weight(), moments=Moments.eight_bit)


@pytest.mark.parametrize("eps", [1e-8, 1e-5])
def test_moments_in_eight_bits_take_nearly_adamws_steps_in_a_quarter_of_the_memory(
    context: StageContext, eps: float
) -> None:
    """Few moments stay in float32."""
    kind, arguments = adamw([], context, lr=1e-2, eps=eps, moments=Moments.eight_bit)
    weight, few, exact = (_weight(torch.float32, count=count) for count in (8192, 1024, 8192))
    optimizer, small = (kind([held], **arguments, weight_decay=0.0) for held in (weight, few))
    _steps(optimizer, weight, 100)
    _steps(small, few, 1)
    _steps(torch.optim.AdamW([exact], lr=1e-2, eps=eps, weight_decay=0.0), exact, 100)
    moved = (exact - _weight(torch.float32, count=8192)).abs().mean()
    assert ((weight - exact).abs().mean() / moved).item() < 0.05
    state = optimizer.state[weight]
    held = sum(value.nbytes for name, value in state.items() if name.startswith(("state", "absmax")))
    assert (state["state1"].dtype, small.state[few]["state1"].dtype) == (torch.uint8, torch.float32)
    assert held < 0.27 * 2 * weight.nbytes
