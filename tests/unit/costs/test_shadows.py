"""Shadows have the shapes, types and shared memory of the tensors that they stand for, and no numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from alignment.costs.shadows import Shadow, ShadowMode, zeros


@pytest.fixture
def mode() -> Iterator[None]:
    with ShadowMode():
        yield


@pytest.mark.usefixtures("mode")
def test_large_numbers_are_shadows_and_small_or_whole_ones_are_real() -> None:
    assert isinstance(torch.zeros(40, 40), Shadow)
    assert not isinstance(torch.zeros(10, 10), Shadow)
    assert not isinstance(torch.zeros(40, 40, dtype=torch.int64), Shadow)
    assert isinstance(torch.arange(1600).float(), Shadow)


@pytest.mark.usefixtures("mode")
def test_a_product_has_its_shape_and_its_gradients_have_theirs() -> None:
    layer = nn.Linear(64, 48)
    x = torch.randn(100, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert (out.shape, out.dtype) == ((100, 48), torch.bfloat16)
    out.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.shape == (48, 64)
    assert layer.weight.grad.dtype is torch.float32
    assert x.grad is not None
    assert x.grad.shape == (100, 64)


@pytest.mark.usefixtures("mode")
def test_views_share_memory_and_copies_do_not() -> None:
    x = torch.empty(64, 64)
    assert x.t().data_ptr() == x[3:].data_ptr() == x.data_ptr()
    assert x.clone().data_ptr() != x.data_ptr()
    tied = nn.ModuleList([nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)])
    tied[1].weight = tied[0].weight
    copied = copy.deepcopy(tied)
    assert copied[0].weight is copied[1].weight
    assert copied[0].weight.data_ptr() != tied[0].weight.data_ptr()


@pytest.mark.usefixtures("mode")
def test_what_is_read_is_as_if_every_number_were_one() -> None:
    x = torch.empty(64, 64)
    assert x.sum().item() == 1.0
    assert x[:2, :2].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert bool(torch.isfinite(x).all())
    assert not bool((x > 1).any())
    assert torch.equal(x, x + x)


@pytest.mark.usefixtures("mode")
def test_real_masks_and_indices_choose_as_many_as_they_would() -> None:
    x, rows = torch.empty(64, 64), torch.arange(64)
    assert x[rows % 4 == 0].shape == (16, 64)
    assert x[rows[:5]].shape == (5, 64)
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:2] = True
    assert x.masked_select(mask).shape == (128,)
    chosen = x.argmax(-1)
    assert not isinstance(chosen, Shadow)
    assert chosen.shape == (64,)
    assert x.sort(-1).indices.dtype is torch.int64


@pytest.mark.usefixtures("mode")
def test_in_place_a_tensor_stays_the_one_that_it_was() -> None:
    total, x = torch.zeros(()), torch.empty(64, 64)
    same = total
    total += x.sum()
    assert total is same
    assert not isinstance(total, Shadow)
    assert x.mul_(2) is x


@pytest.mark.usefixtures("mode")
def test_equal_numbers_of_two_types_are_two_operations() -> None:
    x = torch.empty(64, 64, dtype=torch.int32)
    assert (x * 2).dtype is torch.int32
    assert (x * 2.0).dtype is torch.float32


def test_a_module_of_shadows_can_be_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    with ShadowMode():
        layer = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
        assert layer.weight.dtype is torch.bfloat16
        assert isinstance(layer.weight, nn.Parameter)
        assert layer(torch.empty(64, 64, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_a_shadow_is_not_used_after_its_mode() -> None:
    with ShadowMode():
        x = torch.empty(64, 64)
    with pytest.raises(RuntimeError, match="outside of ShadowMode"):
        x + 1


def test_small_shadows_are_written_as_zeros_and_large_ones_not() -> None:
    with ShadowMode():
        written = zeros({"adapter": torch.ones(64, 64), "weights": torch.ones(4096, 4096)})
    assert list(written) == ["adapter"]
    assert torch.equal(written["adapter"], torch.zeros(64, 64))
