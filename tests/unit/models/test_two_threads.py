"""Work on two threads: who does what, the plain forward's values and gradients, and when a batch is not divided."""

from __future__ import annotations

import multiprocessing
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import TaskType
from peft.tuners.lora.layer import ParamWrapper

from alignment.config.launch import DIVIDE_ROWS
from alignment.config.model import AdapterConfig, AdapterKind, Dtype
from alignment.core.errors import ConfigError
from alignment.models.assembly.adapters import add_adapter
from alignment.models.assembly.load import Lineage, frozen_copy
from alignment.models.assembly.roles import load_start
from alignment.models.forward import flat, side_by_side
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.causal import install_causal
from alignment.models.forward.flat import trunk_states, use_flat_attention
from alignment.models.forward.rows import FlatRows, stream
from alignment.models.forward.side_by_side import can_share, has_two_threads, in_two_threads
from alignment.models.kernels.nf4 import quantize_trunk
from tests.tiny import BASE_SOURCE, save_tiny_model, tiny_model
from tests.unit.models.conftest import CPU, ROWS, adapted, assert_learns_alike, gradients, padded, twin


@pytest.fixture(autouse=True)
def _two_threads(_one_thread: None) -> None:
    torch.set_num_threads(2)


@pytest.mark.parametrize(
    ("costs", "shares"), [([10], False), ([70, 30], False), ([61, 39], False), ([60, 40], True), ([9, 8, 7, 6], True)]
)
def test_work_is_shared_unless_one_thread_would_have_most_of_it(costs: list[int], shares: bool) -> None:
    assert can_share(costs) is shares


def test_users_can_have_operations_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, divides in (("0", False), ("1", True)):
        monkeypatch.setenv(DIVIDE_ROWS, value)
        assert has_two_threads(torch.zeros(1)) is divides
    monkeypatch.setenv(DIVIDE_ROWS, "false")
    with pytest.raises(ConfigError, match="ALIGNMENT_DIVIDE_ROWS: 'false' is not allowed; allowed: 0, 1"):
        has_two_threads(torch.zeros(1))


def test_an_error_waits_for_the_other_part_and_frees_what_the_parts_held() -> None:
    class Held:
        pass

    ended, alive = [], []

    def work(number: int) -> Held:
        held = Held()
        alive.append(weakref.ref(held))
        if number == 0:
            raise ValueError("the first part fails")
        time.sleep(0.1)
        ended.append(number)
        return held

    def fails() -> None:
        with pytest.raises(ValueError, match="the first part fails"):
            in_two_threads(work, [0, 1])

    fails()
    assert ended == [1]
    assert [reference() for reference in alive] == [None, None]


def _in_a_fork(queue: multiprocessing.Queue[list[int]], work: Callable[[int], int]) -> None:
    queue.put(in_two_threads(work, [3, 4]))


def _doubled(number: int) -> int:
    return 2 * number


def test_a_forked_process_has_threads_of_its_own() -> None:
    assert in_two_threads(_doubled, [1, 2]) == [2, 4]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_a_fork, args=(queue, _doubled), daemon=True)
    child.start()
    assert queue.get(timeout=30) == [6, 8]
    child.join(30)
    assert child.exitcode == 0


SIX = [(list(range(5 + row, 15 + row)), [9, 8, 7 + row, 2]) for row in range(6)]
"""Six rows of equal length without a beginning in common."""
BATCHES = {**ROWS, "equal rows": SIX}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    monkeypatch.setattr(side_by_side, "WORTH_DIVIDING", 0)
    seen: list[tuple[str, int]] = []
    compute = flat._flat_states

    def watched(trunk: Any, rows: FlatRows, **others: Any) -> torch.Tensor:
        seen.append((threading.current_thread().name.split("_")[0], len(rows.lengths)))
        return compute(trunk, rows, **others)

    monkeypatch.setattr(flat, "_flat_states", watched)
    return seen


@pytest.fixture
def trained_passes(passes: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    monkeypatch.setattr(side_by_side, "FEW", 1.0)
    return passes


ALONE, APART = [("MainThread", 6)], [("part", 3), ("part", 3)]


def _states(model: Any, batch: list[tuple[list[int], list[int]]] = SIX) -> torch.Tensor:
    use_flat_attention(model)
    return trunk_states(model.base_model, stream([[*prompt, *answer] for prompt, answer in batch], CPU))


def _lora(kind: AdapterKind = AdapterKind.lora, **changes: Any) -> Any:
    return adapted(tiny_model(**changes), AdapterConfig(kind=kind, rank=4, alpha=8.0))


@pytest.mark.parametrize(
    ("rows", "kind"),
    [(rows, AdapterKind.lora) for rows in ("ragged", "pairs of one prompt", "turns of one conversation", "equal rows")]
    + [("equal rows", AdapterKind.dora)],
)
def test_values_and_gradients_are_those_of_the_plain_forward(
    rows: str, kind: AdapterKind, trained_passes: list[tuple[str, int]]
) -> None:
    model = _lora(kind)
    reference = twin(model)
    install_causal(unwrapped(model))
    assert_learns_alike(model, reference, padded(BATCHES[rows]))
    assert rows != "equal rows" or trained_passes == APART


def test_the_same_batch_gives_the_same_bytes_whichever_thread_is_faster(
    trained_passes: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gradients that are there already, so that each part on its own would be rounded in another order."""
    model = unwrapped(_lora())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    compute, late = torch.autograd.grad, [0]

    def delayed(states: torch.Tensor, *others: Any, **options: Any) -> Any:
        if threading.current_thread().name.endswith(str(late[0])):
            time.sleep(0.05)
        return compute(states, *others, **options)

    monkeypatch.setattr(torch.autograd, "grad", delayed)
    results = []
    for late[0] in (0, 1):
        for index, parameter in enumerate(trained):
            parameter.grad = torch.full_like(parameter, 0.1 * (index + 1))
        _states(model).square().sum().backward()
        results.append({name: gradient.clone() for name, gradient in gradients(model).items()})
    assert all(torch.equal(gradient, results[1][name]) for name, gradient in results[0].items())


def _adapters_on_experts() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of PEFT, about ranks of parameters that it converts itself
        model = add_adapter(tiny_model("mixtral"), AdapterConfig(rank=2), TaskType.CAUSAL_LM)
    assert any(isinstance(module, ParamWrapper) for module in model.modules())
    return model


def _changed(change: Callable[[Any], object]) -> Any:
    model = tiny_model().requires_grad_(False).train()
    change(model)
    return model


def _residual_dropout(rate: float) -> Callable[[Any], object]:
    return lambda model: setattr(model.base_model.layers[0].mlp, "residual_dropout", rate)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (tiny_model, ALONE),  # all of it trained
        (_adapters_on_experts, ALONE),
        (lambda: add_adapter(tiny_model(), AdapterConfig(dropout=0.5), TaskType.CAUSAL_LM).train(), ALONE),
        (lambda: _changed(_residual_dropout(0.1)), ALONE),
        (lambda: _changed(_residual_dropout(0.1)).eval(), APART),
        (lambda: _changed(lambda model: model.base_model.layers[1].register_forward_pre_hook(lambda *_: None)), ALONE),
        (lambda: _changed(lambda model: quantize_trunk(model, CPU)), ALONE),
    ],
)
def test_models_that_draw_numbers_or_make_weights_for_a_call_are_never_divided(
    make: Callable[[], Any], expected: list[tuple[str, int]], passes: list[tuple[str, int]]
) -> None:
    _states(unwrapped(make()))
    assert passes == expected


@pytest.mark.parametrize("types", ["longrope", {"full_attention": "default", "sliding_attention": "longrope"}])
def test_frequencies_that_a_pass_chooses_are_not_divided(types: Any) -> None:
    model = tiny_model()
    assert side_by_side.can_divide(model.base_model)
    model.base_model.rotary_emb.rope_type = types
    assert not side_by_side.can_divide(model.base_model)


@pytest.mark.parametrize("kind", [AdapterKind.full, AdapterKind.lora], ids=lambda kind: kind.value)
def test_what_is_compared_is_divided_alike(kind: AdapterKind, passes: list[tuple[str, int]], tmp_path: Path) -> None:
    """A policy with and without gradients, and its frozen copy: in bfloat16 they would differ otherwise."""
    start = Lineage(source=BASE_SOURCE, base=save_tiny_model(tmp_path, vocab_size=4096), adapters=())
    adapter = AdapterConfig(kind=kind, rank=1, master_weights=False)
    policy = load_start(start, adapter, Dtype.bfloat16, task=TaskType.CAUSAL_LM, device=CPU)
    for model in (unwrapped(policy), frozen_copy(unwrapped(policy), torch.bfloat16)):
        _states(model)
        with torch.no_grad():
            _states(model)
    assert {rows for _, rows in passes} == {6 if kind is AdapterKind.full else 3}


def test_a_signal_waits_for_both_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    wait, calls, ended = side_by_side.wait, [], []

    def interrupted(futures: list[object]) -> None:
        calls.append(len(futures))
        if len(calls) == 1:
            raise KeyboardInterrupt
        wait(futures)

    def work(number: int) -> None:
        time.sleep(0.1)
        ended.append(number)

    monkeypatch.setattr(side_by_side, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        in_two_threads(work, [0, 1])
    assert sorted(ended) == [0, 1]
