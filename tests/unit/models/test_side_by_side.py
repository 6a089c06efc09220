"""Two parts of a batch on two threads: the plain forward's values and gradients, and when a batch is not divided."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import TaskType
from peft.tuners.lora.layer import LoraLayer, ParamWrapper

from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.config.model import Dtype
from alignment.costs.recorder import Recorder
from alignment.models.assembly.adapters import add_adapter
from alignment.models.assembly.load import Lineage, frozen_copy
from alignment.models.assembly.recomputing import checkpoint_activations
from alignment.models.assembly.start import load_start
from alignment.models.forward import flat, side_by_side, two_threads
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.causal import install_causal
from alignment.models.forward.flat import trunk_states, use_flat_attention
from alignment.models.forward.rows import FlatRows, stream
from alignment.models.kernels.nf4 import quantize_trunk
from tests.tiny import BASE_SOURCE, liven, save_tiny_model, tiny_model
from tests.unit.models.conftest import ROWS, gradients, padded, plain, relative, twin

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


def _lora(kind: AdapterKind = AdapterKind.lora, **changes: Any) -> Any:
    model = add_adapter(tiny_model(**changes), AdapterConfig(kind=kind, rank=4, alpha=8.0), TaskType.CAUSAL_LM)
    liven(model)
    return model


def _rows(batch: list[tuple[list[int], list[int]]]) -> FlatRows:
    return stream([[*prompt, *answer] for prompt, answer in batch], CPU)


@pytest.mark.parametrize(
    ("rows", "kind"), [*((rows, AdapterKind.lora) for rows in BATCHES), ("equal rows", AdapterKind.dora)]
)
def test_values_and_gradients_are_those_of_the_plain_forward(
    rows: str, kind: AdapterKind, passes: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "FEW", 1.0)
    model = _lora(kind)
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


def test_the_same_batch_gives_the_same_bytes_whichever_thread_is_faster(
    passes: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gradients that are there already, so that each part on its own would be rounded in another order."""
    monkeypatch.setattr(side_by_side, "FEW", 1.0)
    model = unwrapped(_lora())
    use_flat_attention(model)
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
        trunk_states(model.base_model, _rows(SIX)).square().sum().backward()
        results.append({name: gradient.clone() for name, gradient in gradients(model).items()})
    assert all(torch.equal(gradient, results[1][name]) for name, gradient in results[0].items())


def test_what_only_one_part_trains_has_its_gradient() -> None:
    gradient = torch.ones(2)
    assert side_by_side._sum(None, gradient) is gradient
    assert side_by_side._sum(gradient, None) is gradient
    assert side_by_side._sum(None, None) is None


def test_adapters_that_are_switched_off_get_no_gradients(
    passes: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "FEW", 1.0)
    wrapped = _lora()
    model = unwrapped(wrapped)
    use_flat_attention(model)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module._disable_adapters = True
    trunk_states(model.base_model, _rows(SIX)).sum().backward()
    assert [name for name, _ in passes] == ["part", "part"]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("is_cast", [True, False])
def test_parts_have_the_modes_of_the_caller(is_cast: bool, passes: list[tuple[str, int]]) -> None:
    model = tiny_model().to(torch.bfloat16)
    use_flat_attention(model)
    modes = []

    def watch(*_: Any) -> None:
        modes.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), sys.getswitchinterval()))

    model.base_model.layers[0].mlp.down_proj.register_forward_hook(watch)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
        trunk_states(model.base_model, _rows(SIX))
    assert modes == [(is_cast, False, 0.0005)] * 2


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


def test_threads_that_start_later_compute_as_this_one_does(passes: list[tuple[str, int]]) -> None:
    two_threads._part_threads.cache_clear()
    model = tiny_model()
    use_flat_attention(model)
    with torch.no_grad():
        trunk_states(model.base_model, _rows(SIX))
    assert [name for name, _ in passes] == ["part", "part"]
    assert torch.get_num_threads() == 2
    counts = []
    later = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert counts == [2]


def _dropout_in_adapters() -> Any:
    config = AdapterConfig(kind=AdapterKind.lora, rank=4, alpha=8.0, dropout=0.5)
    return add_adapter(tiny_model(), config, TaskType.CAUSAL_LM).train()


def _dropout_without_a_module() -> Any:
    model = tiny_model().requires_grad_(False).train()
    model.base_model.layers[0].mlp.residual_dropout = 0.1  # as Starcoder 2 and OPT have it
    return model


def _all_trained() -> Any:
    return tiny_model()


def _weights_made_for_a_call() -> Any:
    model = tiny_model().requires_grad_(False)
    model.base_model.layers[1].register_forward_pre_hook(lambda _module, _inputs: None)
    return model


def _four_bits() -> Any:
    model = tiny_model().requires_grad_(False)
    quantize_trunk(model, CPU)
    return model


def _adapters_on_experts() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of PEFT, about ranks of parameters that it converts itself
        model = add_adapter(tiny_model("mixtral"), AdapterConfig(rank=2), TaskType.CAUSAL_LM)
    assert any(isinstance(module, ParamWrapper) for module in model.modules())
    return model


@pytest.mark.parametrize(
    "make",
    [
        _adapters_on_experts,
        _dropout_in_adapters,
        _dropout_without_a_module,
        _all_trained,
        _weights_made_for_a_call,
        _four_bits,
    ],
)
def test_some_models_are_never_divided(make: Any, passes: list[tuple[str, int]]) -> None:
    model = unwrapped(make())
    use_flat_attention(model)
    trunk_states(model.base_model, _rows(SIX))
    assert passes == [("MainThread", 6)]


@pytest.mark.parametrize("types", ["longrope", {"full_attention": "default", "sliding_attention": "longrope"}])
def test_frequencies_that_a_pass_chooses_are_not_divided(types: Any) -> None:
    model = tiny_model()
    assert side_by_side.can_divide(model.base_model)
    model.base_model.rotary_emb.rope_type = types
    assert not side_by_side.can_divide(model.base_model)


def test_weights_that_each_part_would_convert_are_not_divided(passes: list[tuple[str, int]]) -> None:
    model = tiny_model()
    use_flat_attention(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        trunk_states(model.base_model, _rows(SIX))
    assert passes == [("MainThread", 6)]


@pytest.mark.parametrize("reason", ["dropout in evaluation", "no rate"])
def test_models_that_draw_nothing_are_divided(reason: str, passes: list[tuple[str, int]]) -> None:
    model = _dropout_without_a_module()
    if reason == "dropout in evaluation":
        model.eval()
    else:
        model.base_model.layers[0].mlp.residual_dropout = 0.0
    use_flat_attention(model)
    trunk_states(model.base_model, _rows(SIX))
    assert [name for name, _ in passes] == ["part", "part"]


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


@pytest.mark.parametrize("kind", [AdapterKind.full, AdapterKind.lora], ids=lambda kind: kind.value)
def test_what_is_compared_is_divided_alike(kind: AdapterKind, passes: list[tuple[str, int]], tmp_path: Path) -> None:
    """A policy with and without gradients, and its frozen copy: in bfloat16 they would differ otherwise."""
    base = save_tiny_model(tmp_path, vocab_size=4096)
    start = Lineage(source=BASE_SOURCE, base=base, adapters=())
    adapter = AdapterConfig(kind=kind, rank=1, master_weights=False)
    policy = load_start(start, adapter, Dtype.bfloat16, task=TaskType.CAUSAL_LM, device=CPU)
    models = [unwrapped(policy), frozen_copy(unwrapped(policy), torch.bfloat16)]
    for model in models:
        use_flat_attention(model)
    for model in models:
        trunk_states(model.base_model, _rows(SIX))
        with torch.no_grad():
            trunk_states(model.base_model, _rows(SIX))
    assert {rows for _, rows in passes} == {6 if kind is AdapterKind.full else 3}
