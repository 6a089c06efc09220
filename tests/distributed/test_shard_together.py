"""Models that share weights are sharded so that a shared weight has one shard and is gathered layer by layer.

One process is a group of its own here: its shards are whole, and everything else is as on several.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaModel

from alignment.training.shard_together import put_sharded, shard_together, sharing, whole_units
from tests.oracles.close import close

WIDTH = 8


@pytest.fixture(autouse=True)
def _group_of_one() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Pair(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, ids: Tensor) -> Tensor:
        states: Tensor = self.first(ids).last_hidden_state + 2 * self.second(ids).last_hidden_state
        return states


def model(seed: int) -> LlamaModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=16, hidden_size=WIDTH, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaModel(config)


def share(first: LlamaModel, second: LlamaModel) -> None:
    """Freezes the first projection of each layer and the embeddings, and lets both models hold the same."""
    for module in (first.embed_tokens, *(layer.self_attn.q_proj for layer in first.layers)):
        module.weight.requires_grad_(False)
    second.embed_tokens.weight = first.embed_tokens.weight
    for layer, own in zip(first.layers, second.layers, strict=True):
        own.self_attn.q_proj.weight = layer.self_attn.q_proj.weight


def roles() -> tuple[Pair, LlamaModel]:
    """Two trained models and a frozen one, which share weights."""
    first, second, frozen = model(0), model(1), model(2)
    share(first, second)
    share(first, frozen)
    return Pair(first, second), frozen.requires_grad_(False)


def sharded() -> tuple[Pair, LlamaModel]:
    pair, frozen = roles()
    shard_together(pair, [frozen], FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True))
    return pair, frozen


def is_gathered(layer: nn.Module) -> bool:
    return not isinstance(next(layer.parameters()), DTensor)


IDS = torch.tensor([[1, 2, 3, 4]])


def test_layers_that_share_a_weight_are_one_unit() -> None:
    pair, frozen = roles()
    layers = [*pair.first.layers, *pair.second.layers, *frozen.layers, *model(3).layers]
    a0, a1, b0, b1, c0, c1, d0, d1 = layers
    assert sharing(layers) == [[a0, b0, c0], [a1, b1, c1], [d0], [d1]]


def test_a_shared_weight_has_one_shard() -> None:
    pair, frozen = sharded()
    weights = [each.layers[1].self_attn.q_proj.weight for each in (pair.first, pair.second, frozen)]
    assert isinstance(weights[0], DTensor)
    assert all(weight is weights[0] for weight in weights)
    assert pair.first.layers[1].self_attn.k_proj.weight is not pair.second.layers[1].self_attn.k_proj.weight


def test_a_layer_is_gathered_only_while_one_of_its_models_calls_it() -> None:
    pair, _ = sharded()
    gathered: list[list[bool]] = []
    layers = [*pair.first.layers, *pair.second.layers]
    for layer in layers:
        layer.self_attn.register_forward_hook(lambda *_: gathered.append([is_gathered(each) for each in layers]))
    pair(IDS)
    first, second = [True, False, True, False], [False, True, False, True]
    assert gathered == [first, second, first, second]


def test_gradients_of_two_passes_are_those_of_unsharded_models() -> None:
    plain, _ = roles()
    pair, _ = sharded()
    for each in (plain, pair):
        for _ in range(2):
            each(IDS).square().sum().backward()
    expected = {name: weight.grad for name, weight in plain.named_parameters() if weight.requires_grad}
    trained = {name: weight.grad for name, weight in pair.named_parameters() if weight.requires_grad}
    assert trained.keys() == expected.keys()
    for name, gradient in trained.items():
        assert isinstance(gradient, DTensor)
        close(gradient.full_tensor(), expected[name], rtol=1e-5)


@torch.no_grad()
def test_weights_are_whole_for_passes_without_gradients_and_sharded_again_after() -> None:
    plain, plain_frozen = roles()
    pair, frozen = sharded()
    with whole_units(pair):
        for _ in range(2):  # a call frees nothing
            close(frozen(IDS).last_hidden_state, plain_frozen(IDS).last_hidden_state)
            close(pair.second(IDS).last_hidden_state, plain.second(IDS).last_hidden_state)
    assert all(isinstance(weight, DTensor) for weight in pair.parameters())
    close(pair(IDS), plain(IDS))


def test_its_state_is_what_is_trained_and_can_be_loaded_again() -> None:
    pair, _ = sharded()
    state = pair.state_dict()
    assert state.keys() == {name for name, weight in pair.named_parameters() if weight.requires_grad}
    assert "first.layers.0.self_attn.k_proj.weight" in state
    changed = {name: weight + 1 for name, weight in state.items()}
    pair.load_state_dict(changed)
    for name, weight in pair.named_parameters():
        if weight.requires_grad:
            close(weight.full_tensor(), changed[name].full_tensor())


def test_an_optimiser_gets_its_sharded_weights_back() -> None:
    whole, shard = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([whole])
    put_sharded(optimizer, [{"params": [shard]}])
    assert [group["params"] for group in optimizer.param_groups] == [[shard]]
