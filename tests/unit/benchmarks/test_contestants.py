"""Rivals get the setting that their table's line says, and everything else as ours has it."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import save_file
from trl import DPOConfig, GRPOConfig

from benchmarks.contestants import generate_sampling, training, trl_grpo, trl_latest
from benchmarks.grid import LAUNCHER_MEMORY, Setting, start_of
from benchmarks.setting import BETA, GRPO_BETA, LORA, PROMPTS, ROWS, read_json
from benchmarks.stage import stage_config
from benchmarks.works import WORKS
from tests.tiny import save_tiny_model, tiny_model

SFT = [{"input_ids": [5 + i, 6, 7], "labels": [-100, 6, 7]} for i in range(ROWS)]
PAIRS = [{"prompt": [5, 6 + i], "chosen": [7, 8], "rejected": [9]} for i in range(ROWS)]
ANSWERS = [{"prompt": [5, 6 + i], "completion": [7, 8], "KL_completion": [9], "label": i % 2 == 0} for i in range(ROWS)]
ROWS_OF = {"sft": SFT, "reward": PAIRS, "dpo": PAIRS, "kto": ANSWERS, "sampling": [[5, 6], [7, 8]]}
ROWS_OF["grpo"] = [[5, 6 + i] for i in range(PROMPTS)]


@pytest.fixture(autouse=True)
def _nothing_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What trainers leave in accelerate's shared state and in the environment."""
    environment = dict(os.environ)
    for state in (AcceleratorState, PartialState):
        monkeypatch.setattr(state, "_shared_state", {})
    yield
    for name in os.environ.keys() - environment:
        del os.environ[name]
    os.environ.update(environment)


class Noting(dict[str, Any]):
    """A setting that notes which of its values are read."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)


RIVALS = [
    (name, library)
    for name, work in WORKS.items()
    for library, rival in work.rivals.items()
    if rival.template.environment is None and not name.startswith("sampling_")
]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_:FutureWarning")  # TRL calls it by its old name
@pytest.mark.parametrize(("name", "library"), RIVALS)
def test_a_contestant_reads_each_value_of_its_setting(
    name: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a whole measurement with a tiny model."""
    work, rival = WORKS[name], WORKS[name].rivals[library]
    first = rival.contestant(start_of(rival.axes))
    setting = Noting(first.setting)
    task = _task(work.kind, work.adapter, tmp_path, setting)
    module = importlib.import_module(f"benchmarks.contestants.{first.module}")
    monkeypatch.setattr(module, "matmul_peak", lambda *_: 1.0, raising=False)
    monkeypatch.setattr("benchmarks.contestants.sampling.matmul_peak", lambda *_: 1.0)
    monkeypatch.setattr(module, "read_json", lambda path: task if path.name == "task.json" else read_json(path))
    module.main(tmp_path / "task.json")
    result = read_json(tmp_path / "result.json")
    assert len(result["seconds"]) == 1
    assert result["compiled_graphs"] == 0
    assert {axis.name for axis in rival.axes} - setting.read <= {LAUNCHER_MEMORY.name}


def _task(kind: str, adapter: str, folder: Path, setting: Setting) -> dict[str, Any]:
    (folder / "tokens.json").write_text(json.dumps(ROWS_OF[kind]))
    save_file({"weight": torch.zeros(1, 32)}, folder / "head.safetensors")
    return {
        "kind": kind,
        "adapter": adapter,
        "setting": setting,
        "dtype": "float32",
        "warm_up": 0,
        "steps": 1,
        "size": {"system_tokens": 0, "seeds": [0], "new_tokens": 8},
        "base": str(save_tiny_model(folder / "base")),
        "head": str(folder / "head.safetensors"),
        "tokens": str(folder / "tokens.json"),
        "result": str(folder / "result.json"),
    }


@dataclass(frozen=True)
class _Change:
    """A value of an axis, and what TRL's arguments then have to be."""

    axis: str
    value: Any
    expected: dict[str, Any]


AS_IT_STARTS = {"per_device_train_batch_size": 8, "gradient_checkpointing": True, "bf16": True}


@pytest.mark.parametrize(
    "change",
    [
        _Change("micro_rows", 2, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
        _Change("micro_rows", 8, {**AS_IT_STARTS, "gradient_accumulation_steps": 1}),
        _Change("checkpointing", False, {**AS_IT_STARTS, "gradient_checkpointing": False}),
        _Change("precision", "no autocast", {**AS_IT_STARTS, "bf16": False}),
        _Change("precision", "autocast without input casts", AS_IT_STARTS),
    ],
)
def test_trls_trainers_get_the_setting(change: _Change, tmp_path: Path) -> None:
    axes = WORKS["dpo_lora"].rivals["trl"].axes
    setting = {**start_of(axes), change.axis: change.value}
    task = {"kind": "dpo", "adapter": "lora", "steps": 3, "setting": setting}
    arguments = trl_latest._arguments(task, str(tmp_path))
    assert {name: arguments[name] for name in change.expected} == change.expected


@pytest.mark.parametrize(
    "change",
    [
        _Change("micro_rows", 4, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": PROMPTS // 4}),
        _Change("checkpointing", False, {**AS_IT_STARTS, "gradient_checkpointing": False}),
        _Change("compiled", True, {**AS_IT_STARTS, "torch_compile": True}),
        _Change("cache", "static", {**AS_IT_STARTS, "cache_implementation": "static"}),
        _Change("cache", "dynamic", {**AS_IT_STARTS, "cache_implementation": None}),
        _Change("precision", "no autocast", {**AS_IT_STARTS, "bf16": False}),
    ],
)
def test_trls_grpo_gets_the_setting(change: _Change, tmp_path: Path) -> None:
    axes = WORKS["grpo_lora"].rivals["trl"].axes
    task = {"adapter": "lora", "steps": 3, "setting": {**start_of(axes), change.axis: change.value}}
    arguments = trl_grpo._arguments(task, str(tmp_path))
    assert {name: getattr(arguments, name) for name in change.expected} == change.expected


@pytest.mark.parametrize(
    ("precision", "autocast", "casts"),
    [("autocast", True, True), ("autocast without input casts", True, False), ("no autocast", False, True)],
)
def test_each_precision_is_a_pair_of_autocast_and_input_casts(
    precision: str, autocast: bool, casts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    spared: list[Any] = []
    monkeypatch.setattr(training, "disable_input_dtype_casting", spared.append)
    task = {"setting": {"precision": precision}}
    training.input_casts(task, model)
    assert training.uses_autocast(task) is autocast
    assert spared == ([] if casts else [model])


@pytest.mark.parametrize(("precision", "expected"), [("autocast", "bf16"), ("no autocast", "no")])
@pytest.mark.parametrize(("name", "module"), [("sft_lora", trl_latest), ("grpo_lora", trl_grpo)])
def test_trls_trainers_use_autocast_as_the_setting_says(
    name: str, module: Any, precision: str, expected: str, tmp_path: Path
) -> None:
    work = WORKS[name]
    setting = work.rivals["trl"].contestant({**start_of(work.rivals["trl"].axes), "precision": precision}).setting
    task = _task(work.kind, work.adapter, tmp_path, setting)
    assert module._trainer(task, str(tmp_path / "trainer")).accelerator.mixed_precision == expected


def test_rivals_train_with_our_hyperparameters(tmp_path: Path) -> None:
    ours = stage_config("dpo", "lora", tmp_path, steps=3, rows=ROWS)
    setting = start_of(WORKS["dpo_lora"].rivals["trl"].axes)
    task = {"kind": "dpo", "adapter": "lora", "steps": 3, "setting": setting}
    trl = DPOConfig(**trl_latest._arguments(task, str(tmp_path)), beta=BETA)
    assert (ours.optim.lr, ours.optim.weight_decay, ours.optim.adam_eps, ours.optim.max_grad_norm) == (
        *(trl.learning_rate, trl.weight_decay, trl.adam_epsilon, trl.max_grad_norm),
    )
    assert (trl.adam_beta1, trl.adam_beta2, trl.optim.value) == (0.9, 0.999, "adamw_torch_fused")
    assert (ours.optim.schedule.value, ours.optim.warmup_ratio) == (trl.lr_scheduler_type.value, trl.warmup_steps)
    assert (ours.beta, ours.optim.max_steps, ours.optim.batch_size) == (BETA, 3, ROWS)
    lora = training.lora_of({"kind": "dpo", "adapter": "lora"})
    assert lora is not None
    assert (ours.adapter.rank, ours.adapter.alpha, ours.adapter.dropout) == (
        *(lora.r, lora.lora_alpha, lora.lora_dropout),
    )
    assert ours.adapter.target_modules == [LORA["target_modules"]]
    assert ours.precompute_reference is False


def test_rivals_make_our_updates(tmp_path: Path) -> None:
    ours: Any = stage_config("grpo", "lora", tmp_path, steps=3, rows=PROMPTS)
    setting = start_of(WORKS["grpo_lora"].rivals["trl"].axes)
    trl: GRPOConfig = trl_grpo._arguments({"adapter": "lora", "steps": 3, "setting": setting}, str(tmp_path))
    assert (ours.completions_per_prompt, ours.max_new_tokens, ours.ppo_epochs) == (
        *(trl.num_generations, trl.max_completion_length, trl.num_iterations),
    )
    assert ours.kl.coefficient == trl.beta == GRPO_BETA
    batch = trl.per_device_train_batch_size * trl.gradient_accumulation_steps
    assert ours.optim.batch_size == batch == PROMPTS


@pytest.mark.parametrize(("kind", "adapter"), [("sft", "lora"), ("sft", "full"), ("reward", "lora")])
def test_each_layer_is_compiled_if_the_setting_says_so(
    kind: str, adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", False)
    for wanted in (False, True):
        task = _task(kind, adapter, tmp_path, {"attention": "sdpa", "layers_compiled": wanted})
        training.model_of(task, training.tokenizer_of(task))
        assert compiled == ["LlamaDecoderLayer"] * 2 * wanted
    assert torch._dynamo.config.fail_on_recompile_limit_hit is True


def test_models_below_an_adapter_are_in_bfloat16_and_those_trained_whole_in_float32(tmp_path: Path) -> None:
    for adapter, dtype in (("lora", torch.bfloat16), ("full", torch.float32)):
        task = _task("sft", adapter, tmp_path, {"attention": "eager", "layers_compiled": False})
        model = training.model_of(task, training.tokenizer_of(task))
        assert {weight.dtype for weight in model.parameters()} == {dtype}
        assert model.config._attn_implementation == "eager"


def test_compiled_decoding_is_asked_for_without_a_gpu() -> None:
    assert generate_sampling.cache_options("dynamic") == {}
    assert generate_sampling.cache_options("static") == {"cache_implementation": "static", "disable_compile": True}
    options = generate_sampling.cache_options("static, compiled")
    assert options["compile_config"]._compile_all_devices is True
