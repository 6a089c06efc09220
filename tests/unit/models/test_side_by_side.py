"""Two parts of a batch on two threads: the plain forward's values and gradients, and when a batch is not divided."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
import torch
from peft import TaskType

from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.costs.recorder import Recorder
from alignment.models.assembly.adapters import add_adapter
from alignment.models.assembly.recomputing import checkpoint_activations
from alignment.models.forward import flat, side_by_side
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.causal import install_causal
from alignment.models.forward.flat import trunk_states, use_flat_attention
from alignment.models.forward.rows import FlatRows, stream
from tests.tiny import liven, tiny_model
from tests.unit.models.conftest import ROWS, gradients, padded, plain, relative, twin

LORA = AdapterConfig(kind=AdapterKind.lora, rank=4, alpha=8.0)
CPU = torch.device("cpu")
SIX = [(list(range(5 + row, 15 + row)), [9, 8, 7 + row, 2]) for row in range(6)]
"""Six rows of equal length without a beginning in common."""
BATCHES = {**ROWS, "equal rows": SIX}


@pytest.fixture(autouse=True)
def _two_threads(_one_thread: None) -> None:
    torch.set_num_threads(2)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The thread and the number of rows of each pass; small work is divided, too."""
    monkeypatch.setattr(side_by_side, "WORTH_DIVIDING", 0)
    seen: list[tuple[str, int]] = []
    compute = flat._flat_states

    def watched(trunk: Any, rows: FlatRows, **others: Any) -> torch.Tensor:
        seen.append((threading.current_thread().name.split("_")[0], len(rows.lengths)))
        return compute(trunk, rows, **others)

    monkeypatch.setattr(flat, "_flat_states", watched)
    return seen


def _lora(**changes: Any) -> Any:
    model = add_adapter(tiny_model(**changes), LORA, TaskType.CAUSAL_LM)
    liven(model)
    return model


def _rows(batch: list[tuple[list[int], list[int]]]) -> FlatRows:
    return stream([[*prompt, *answer] for prompt, answer in batch], CPU)


@pytest.mark.parametrize("rows", BATCHES)
def test_values_and_gradients_are_those_of_the_plain_forward(
    rows: str, passes: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "FEW", 1.0)
    model = _lora()
    reference = twin(model)
    install_causal(unwrapped(model))
    batch = padded(BATCHES[rows])
    output = model(**batch.arguments(), fused_lm_head=True)
    output.loss.backward()
    expected = plain(reference, batch)
    expected.loss.backward()
    assert relative(output.log_probs[output.label_mask], expected.logprobs) < 1e-5
    assert relative(output.loss, expected.loss) < 1e-5
    of_reference = gradients(reference)
    assert gradients(model).keys() == of_reference.keys()
    for name, gradient in gradients(model).items():
        assert relative(gradient, of_reference[name]) < 1e-5, name


def test_both_parts_run_beside_this_thread_and_together_have_all_rows(passes: list[tuple[str, int]]) -> None:
    model = unwrapped(_lora())
    use_flat_attention(model)
    trunk_states(model.base_model, _rows(SIX))
    assert passes == [("part", 3), ("part", 3)]


def test_states_without_gradients_are_in_the_order_of_the_whole_stream(passes: list[tuple[str, int]]) -> None:
    model = tiny_model()
    use_flat_attention(model)
    rows = _rows([([7, 8, 9], [4] * length) for length in (20, 3, 11, 9, 4)])
    with torch.no_grad():
        apart = trunk_states(model.base_model, rows)
        assert [name for name, _ in passes] == ["part", "part"]
        torch.set_num_threads(1)
        whole = trunk_states(model.base_model, rows)
    assert passes[2:] == [("MainThread", 5)]
    assert not apart.requires_grad
    assert relative(apart, whole) < 1e-6


def test_the_same_batch_gives_the_same_bytes_whichever_thread_is_faster(passes: list[tuple[str, int]]) -> None:
    model = unwrapped(_lora())
    use_flat_attention(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def once() -> tuple[torch.Tensor, ...]:
        states = trunk_states(model.base_model, _rows(SIX))
        return states.detach(), *torch.autograd.grad(states.square().sum(), trained)

    first = once()
    for _ in range(5):
        assert all(torch.equal(left, right) for left, right in zip(first, once(), strict=True))


def test_autocast_holds_in_both_parts(passes: list[tuple[str, int]]) -> None:
    model = tiny_model()
    use_flat_attention(model)
    seen = []
    model.base_model.layers[0].mlp.down_proj.register_forward_hook(lambda _module, _inputs, out: seen.append(out.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        trunk_states(model.base_model, _rows(SIX))
    assert seen == [torch.bfloat16, torch.bfloat16]


def test_recomputed_activations_give_the_same_gradients(
    passes: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "FEW", 1.0)
    results = []
    for recomputes in (False, True):
        model = unwrapped(_lora(seed=3))
        use_flat_attention(model)
        if recomputes:
            model.train()
            checkpoint_activations(model)
        trunk_states(model.base_model, _rows(SIX)).square().sum().backward()
        results.append(gradients(model))
    assert len(passes) == 4
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name]), name


def test_an_error_in_one_part_is_raised_and_later_batches_are_computed(passes: list[tuple[str, int]]) -> None:
    model = tiny_model()
    use_flat_attention(model)
    beyond = [(prompt, [*answer, 10**6 if row == 4 else 3]) for row, (prompt, answer) in enumerate(SIX)]
    with torch.no_grad():
        with pytest.raises(IndexError):
            trunk_states(model.base_model, _rows(beyond))
        assert trunk_states(model.base_model, _rows(SIX)).shape[0] == 6 * 14
    assert [name for name, _ in passes] == ["part"] * 4


def test_this_process_keeps_its_settings(passes: list[tuple[str, int]]) -> None:
    model = tiny_model()
    use_flat_attention(model)
    interval = sys.getswitchinterval()
    with torch.no_grad():
        trunk_states(model.base_model, _rows(SIX))
    assert [name for name, _ in passes] == ["part", "part"]
    assert torch.get_num_threads() == 2
    assert sys.getswitchinterval() == interval
    counts = []
    later = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert counts == [2]


def _with_dropout() -> Any:
    config = AdapterConfig(kind=AdapterKind.lora, rank=4, alpha=8.0, dropout=0.5)
    return add_adapter(tiny_model(), config, TaskType.CAUSAL_LM).train()


def _all_trained() -> Any:
    return tiny_model()


@pytest.mark.parametrize("make", [_with_dropout, _all_trained])
def test_some_models_are_never_divided(make: Any, passes: list[tuple[str, int]]) -> None:
    model = unwrapped(make())
    use_flat_attention(model)
    trunk_states(model.base_model, _rows(SIX))
    assert passes == [("MainThread", 6)]


@pytest.mark.parametrize("threads", [1, 3])
def test_only_two_threads_are_divided(threads: int, passes: list[tuple[str, int]]) -> None:
    model = tiny_model()
    use_flat_attention(model)
    torch.set_num_threads(threads)
    with torch.no_grad():
        trunk_states(model.base_model, _rows(SIX))
    assert passes == [("MainThread", 6)]


def test_little_work_is_not_divided(passes: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    use_flat_attention(model)
    weights = sum(parameter.numel() for parameter in model.base_model.parameters()) / model.config.num_hidden_layers
    rows = _rows(SIX)  # 84 tokens
    with torch.no_grad():
        monkeypatch.setattr(side_by_side, "WORTH_DIVIDING", 85 * weights)
        trunk_states(model.base_model, rows)
        monkeypatch.setattr(side_by_side, "WORTH_DIVIDING", 84 * weights)
        trunk_states(model.base_model, rows)
    assert [name for name, _ in passes] == ["MainThread", "part", "part"]


def test_several_processes_do_not_divide(passes: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model = tiny_model()
    use_flat_attention(model)
    with torch.no_grad():
        trunk_states(model.base_model, _rows(SIX))
    assert passes == [("MainThread", 6)]


def test_a_plan_does_not_divide(passes: list[tuple[str, int]]) -> None:
    with Recorder().recording():
        model = tiny_model()
        use_flat_attention(model)
        with torch.no_grad():
            trunk_states(model.base_model, _rows(SIX))
    assert passes == [("MainThread", 6)]
