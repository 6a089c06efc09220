"""Memory, operations and times of a training on shadows, against what can be counted by hand or is run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from alignment.config.model import Dtype
from alignment.costs.live_memory import ALIGNMENT, Heap
from alignment.costs.op_times import MOST_BYTES, NEAR_BYTES, bytes_of, flop_of, seconds_of
from alignment.costs.recorder import ACTIVATIONS, CACHE, GRADIENTS, LOGITS, WEIGHTS, Recorder, memory_for, one_of_each
from alignment.costs.shadows import Operation, Shadow, ShadowMode, zeros
from alignment.models.assembly.load import frozen_copy
from alignment.models.forward.flat import use_flat_attention
from alignment.stages.shared.reference import OwnRows

WIDTH = 64
SQUARE = WIDTH * WIDTH * 4
"""Bytes of a float32 matrix of that width."""


def test_memory_is_counted_from_its_first_use_to_its_last() -> None:
    recorder = Recorder()
    with recorder.recording():
        recorder.phase("one")
        first = torch.empty(WIDTH, WIDTH)
        second = first + 1  # both at once
        del first
        assert recorder.memory.total == SQUARE
        recorder.phase("two")
        view = second.t()
        del second
        assert recorder.memory.total == SQUARE
        del view
        assert recorder.memory.total == 0
    assert recorder.phases["one"].peak == 2 * SQUARE
    assert recorder.phases["two"].peak == SQUARE


def test_memory_has_the_name_of_what_it_is_for() -> None:
    recorder = Recorder()
    with recorder.recording():
        recorder.has_model(2048)
        with memory_for(WEIGHTS):
            layer = nn.Linear(WIDTH, WIDTH, bias=False)
        with memory_for(CACHE):
            cache = torch.empty(WIDTH, WIDTH)
        logits = torch.empty(2, 2048)
        recorder.begin_steps(1, layer, period=1)
        optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
        layer(cache).sum().backward()
        assert recorder.memory.now[GRADIENTS] == SQUARE
        before = recorder.memory.total
        optimizer.step()
        assert recorder.memory.total == before + 2 * SQUARE, "two moments a weight"
    parts = recorder.phases["starting"].parts
    assert (parts[WEIGHTS], parts[CACHE], parts[LOGITS]) == (SQUARE, SQUARE, logits.numel() * 4)
    assert type(torch.empty(WIDTH, WIDTH)) is Tensor, "nothing is recorded afterwards"


def test_a_frozen_copy_is_weights_in_the_dtype_of_products() -> None:
    """Two linear layers in bfloat16 beside the embeddings, which are tied to the head and stay as they are."""
    recorder = Recorder()
    with recorder.recording():
        with memory_for(WEIGHTS):
            config = LlamaConfig(
                hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=1, vocab_size=256, tie_word_embeddings=True
            )
            model = LlamaForCausalLM(config)
        own = recorder.memory.now[WEIGHTS]
        tied = model.get_input_embeddings().weight
        layers = [module for module in model.modules() if type(module) is nn.Linear and module.weight is not tied]
        linear = sum(layer.weight.nbytes for layer in layers)
        copied = frozen_copy(model, torch.bfloat16)
        assert recorder.memory.now[WEIGHTS] == 2 * own - linear // 2
        assert recorder.memory.now[ACTIVATIONS] == 0
        del copied
        assert recorder.memory.now[WEIGHTS] == own
        with memory_for(WEIGHTS):
            layers[0].weight.data = layers[0].weight.data.to(torch.bfloat16)
        assert recorder.memory.now[WEIGHTS] == own - layers[0].weight.nbytes, "the size of the new data"
        assert isinstance(layers[0].weight, nn.Parameter)


def test_the_last_steps_are_what_a_training_repeats() -> None:
    recorder = Recorder()
    with recorder.recording():
        recorder.phase("training")
        layer, x = nn.Linear(WIDTH, WIDTH, bias=False), torch.empty(8, WIDTH, 64)[:, :, 0]
        recorder.begin_steps(10, layer, period=1)
        layer(torch.empty(WIDTH, WIDTH))
        recorder.end_period(64.0)
        for _ in range(3):
            layer(torch.empty(WIDTH, WIDTH))
        recorder.end_period(192.0)
        del x
    products = {
        key: count for key, count in recorder.step_operations["training"].items() if flop_of(recorder.examples[key])
    }
    assert list(products.values()) == [3]
    assert recorder.tokens_of_period == 192.0


def test_flop_and_bytes_of_a_product() -> None:
    recorder = Recorder()
    with recorder.recording():
        a, b = torch.empty(32, WIDTH), torch.empty(WIDTH, 128)
        a @ b
        torch.empty(32, 128).addmm_(a, b)
        a.t()
    by_name = {example.func.overloadpacket.__name__: example for example in recorder.examples.values()}
    assert flop_of(by_name["mm"]) == flop_of(by_name["addmm_"]) == 2 * 32 * WIDTH * 128
    assert bytes_of(by_name["mm"]) == 4 * (32 * WIDTH + WIDTH * 128 + 32 * 128)
    assert flop_of(by_name["t"]) == bytes_of(by_name["t"]) == 0


def test_a_file_that_is_read_counts_beside_the_weights_in_its_phase_alone() -> None:
    recorder = Recorder()
    with recorder.recording():
        recorder.phase("loading")
        weights = torch.empty(WIDTH, WIDTH)
        recorder.memory.read_file(SQUARE // 2)
        recorder.phase("training")
        del weights
    assert recorder.phases["loading"].peak == SQUARE + SQUARE // 2
    assert SQUARE + SQUARE // 2 <= recorder.phases["loading"].resident < 2 * SQUARE
    assert recorder.phases["training"].peak == SQUARE
    assert recorder.phases["training"].resident < SQUARE + SQUARE // 2


def test_the_reference_of_many_rows_is_planned_on_few() -> None:
    """As many operations as there would be, on a number of micro-batches that does not grow with the rows."""
    counts, memory = [], []
    for rows in (16, 160):
        recorder = Recorder()
        with recorder.recording():
            model = LlamaForCausalLM(LlamaConfig(hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=1))
            use_flat_attention(model.eval())
            pairs = Dataset.from_dict({"prompt": [[5] * 20] * rows, "chosen": [[6] * 12] * rows})
            own = OwnRows(policy=model, rows=pairs, dtype=Dtype.float32, tokens=64, rank=0, world_size=1)
            sums = own.sums("chosen")
        assert sums.shape == (rows,)
        phase = recorder.phases["starting"]
        products = [count for key, count in phase.operations.items() if "addmm" in str(key[0]) or ".mm." in str(key[0])]
        counts.append(sum(products))
        memory.append(phase.peak)
    assert counts[1] == pytest.approx(10 * counts[0], rel=0.1), "but for what only a first pass does"
    assert memory[1] == memory[0]


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
    whole = torch.empty(WIDTH, WIDTH, dtype=torch.int32)
    assert ((whole * 2).dtype, (whole * 2.0).dtype) == (torch.int32, torch.float32), "two operations"


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
    assert x.mul_(2) is x
    total = same = torch.zeros(())
    total += x.sum()
    assert total is same
    assert not isinstance(total, Shadow)
    tied = nn.ModuleList([nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)])
    tied[1].weight = tied[0].weight
    copied = copy.deepcopy(tied)
    assert copied[0].weight is copied[1].weight
    assert copied[0].weight.data_ptr() != tied[0].weight.data_ptr()


def test_what_is_read_is_as_if_every_number_were_one_and_only_inside_the_mode() -> None:
    with ShadowMode():
        x = torch.empty(64, 64)
        assert x.sum().item() == 1.0
        assert x[:2, :2].tolist() == [[1.0, 1.0], [1.0, 1.0]]
        assert bool(torch.isfinite(x).all())
        assert not bool((x > 1).any())
        assert torch.equal(x, x + x)
        written = zeros({"adapter": torch.ones(64, 64), "weights": torch.ones(4096, 4096)})
    assert list(written) == ["adapter"], "what is large is not written"
    assert torch.equal(written["adapter"], torch.zeros(64, 64))
    with pytest.raises(RuntimeError, match="outside of ShadowMode"):
        x + 1


def test_the_heap_grows_where_nothing_free_is_large_enough_and_free_neighbours_become_one() -> None:
    heap = Heap()
    blocks = [heap.allocate(KIB) for _ in range(9)]
    assert len(set(blocks)) == 9
    assert 9 * KIB <= heap.top <= 9 * (KIB + SLACK)
    before = heap.top
    heap.free(blocks[0])
    heap.allocate(2 * KIB)
    assert heap.top >= before + 2 * KIB, "the gap is too small"
    before = heap.top
    for block in blocks[1:8]:
        heap.free(block)
    heap.allocate(5 * KIB)
    heap.allocate(KIB)
    assert heap.top == before
    heap.allocate(7 * KIB)
    assert heap.top >= before + 7 * KIB


KIB = 1024
SLACK = 2 * ALIGNMENT + 64
"""Bytes of a block beyond what was asked for, at most."""


def operation(func: Any, *shapes: tuple[int, ...]) -> Operation:
    args = tuple(torch.empty(shape, device="meta") for shape in shapes)
    return Operation(func=func, args=args, kwargs={}, results=())


def test_operations_that_cannot_run_have_no_time_and_the_others_have_theirs() -> None:
    def run(*_: Any) -> None:
        raise AssertionError("it was run, although it is on more memory than a plan may take")

    fitting, other = (operation(torch.ops.aten.mm.default, (4, 4), (size, 4)) for size in (4, 5))
    large = operation(run, (MOST_BYTES // 4 + 1,))
    seconds = seconds_of([(each, NEAR_BYTES) for each in (other, fitting, large, fitting)])
    assert [each > 0 for each in seconds] == [False, True, False, True]


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


def test_one_part_of_each_size_counts_for_all_of_that_size() -> None:
    recorder = Recorder()
    parts = [slice(0, 4), slice(4, 8), slice(8, 10)]
    with recorder.recording():
        recorder.phase("one")
        rows = torch.zeros(10, WIDTH * 64)
        for part in one_of_each(parts, lambda part: part.stop - part.start):
            rows[part].exp_()
    by_rows = {
        recorder.examples[key].results[0].shape[0]: count
        for key, count in recorder.phases["one"].operations.items()
        if "exp_" in str(key[0])
    }
    assert by_rows == {4: 2, 2: 1}
    assert list(one_of_each(parts, lambda part: part.stop - part.start)) == parts, "outside of an estimate"
