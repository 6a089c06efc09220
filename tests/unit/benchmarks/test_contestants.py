"""Contestants get our rows, in our order, and the setting of their table's line; no setting changes a loss."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from trl import DPOConfig, GRPOConfig

from alignment.stages.registry import read_spec
from alignment.stages.shared.language_model import learn_conversations
from alignment.training.context import StageContext
from alignment.training.micro_batches import MicroBatches
from benchmarks.contestants import training, trl_grpo, trl_latest
from benchmarks.contestants.stock import train
from benchmarks.grid import LAUNCHER_MEMORY, Setting, start_of
from benchmarks.measure import Steps
from benchmarks.prepare import in_our_order
from benchmarks.setting import BETA, GRPO_BETA, LORA, PROMPTS, ROWS, WITHOUT_AUTOCAST, read_json
from benchmarks.stage import stage_config, write_stage
from benchmarks.works import WORKS
from tests.tiny import save_tiny_model, tiny_model, tiny_scorer


def test_others_take_rows_in_the_order_of_our_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    question = {"role": "user", "content": "Say."}
    rows = [{"messages": [question, {"role": "assistant", "content": "x" * (i + 1)}]} for i in range(24)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = stage_config("sft", "lora", data, steps=3, rows=8)
    spec = read_spec(write_stage(tmp_path, config, base=save_tiny_model(tmp_path / "model"), data=data))
    for name in ("content", "checkpoints"):
        (spec.work / name).mkdir()
    batches: list[list[int]] = []
    step = MicroBatches.training_step

    def noted(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        batches.append((inputs["labels"] != -100).sum(-1).tolist())
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(MicroBatches, "training_step", noted)
    learn_conversations(config, StageContext(spec=spec, rank=0, world_size=1))
    lengths = sorted(length for batch in batches for length in batch)
    assert len(set(lengths)) == 24, "a row's number is seen in the length of its answer"
    order = in_our_order("sft", "lora", tmp_path, list(range(24)))
    assert [[lengths.index(length) for length in batch] for batch in batches] == [order[:8], order[8:16], order[16:]]
    assert order != sorted(order)


STOCK_ROWS = [
    {"input_ids": [5 + i, 6, 7, *range(20, 20 + i)], "labels": [-100, 6, -100, *range(20, 20 + i)]} for i in range(16)
]
STOCK_PAIRS = [
    {"prompt": [5, 6 + i], "chosen": [7, *range(30, 30 + i)], "rejected": [9, 8] if i % 2 else [9]} for i in range(16)
]
STOCK_ANSWERS = [
    {"prompt": [5, 6 + i], "completion": [7, *range(30, 30 + i)], "KL_completion": [9, 8 + i], "label": i % 3 > 0}
    for i in range(16)
]
PLAIN = {"micro_rows": 8, "checkpointing": False, "precision": WITHOUT_AUTOCAST, "padding_free": False}


def _losses(kind: str, rows: list[dict[str, Any]], **changes: Any) -> list[float]:
    """Of two steps of a tiny model with an adapter."""
    setting = PLAIN | changes
    torch.manual_seed(0)
    model: Any = tiny_scorer(use_cache=False) if kind == "reward" else tiny_model(use_cache=False)
    task_type = "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
    lora = LoraConfig(task_type=task_type, r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, lora)
    if setting["checkpointing"]:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    steps = Steps(1)
    task = {"kind": kind, "adapter": "lora", "steps": 2, "setting": setting}
    train(model.train(), rows, model.config.pad_token_id, task, steps)
    assert len(steps.seconds) == 1
    return steps.losses


@pytest.mark.parametrize("change", [{"micro_rows": 1}, {"micro_rows": 4, "padding_free": True}], ids=str)
@pytest.mark.parametrize(
    ("kind", "rows"),
    [("sft", STOCK_ROWS), ("reward", STOCK_PAIRS), ("dpo", STOCK_PAIRS), ("kto", STOCK_ANSWERS)],
    ids=["sft", "reward", "dpo", "kto"],
)
def test_no_setting_changes_a_loss(kind: str, rows: list[dict[str, Any]], change: dict[str, Any]) -> None:
    if "padding_free" in change and kind != "sft":
        change = {"micro_rows": 8, "checkpointing": True}
    losses = _losses(kind, rows)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3), "the second step has other rows and other weights"
    assert _losses(kind, rows, **change) == pytest.approx(losses, rel=1e-5)


def test_the_loss_is_the_mean_over_all_labels_of_the_step() -> None:
    model, logprobs = tiny_model().eval(), []
    for row in STOCK_ROWS[:8]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
        for position, label in enumerate(row["labels"][1:]):
            if label != -100:
                logprobs.append(float(logits[position].log_softmax(-1)[label]))
    torch.manual_seed(0)
    steps, task = Steps(0), {"kind": "sft", "adapter": "full", "steps": 1, "setting": {**PLAIN, "micro_rows": 4}}
    train(tiny_model(use_cache=False).train(), STOCK_ROWS, 2, task, steps)
    assert steps.losses == [pytest.approx(-sum(logprobs) / len(logprobs), rel=1e-5)]
    assert len(steps.seconds) == 1, "without a warm-up the first step is measured"


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


def test_rivals_train_with_our_hyperparameters_and_make_our_updates(tmp_path: Path) -> None:
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
    assert (ours.adapter.rank, ours.adapter.alpha, ours.adapter.dropout) == (
        *(lora.r, lora.lora_alpha, lora.lora_dropout),
    )
    assert ours.adapter.target_modules == [LORA["target_modules"]]
    assert ours.precompute_reference is False
    sampling: Any = stage_config("grpo", "lora", tmp_path, steps=3, rows=PROMPTS)
    setting = start_of(WORKS["grpo_lora"].rivals["trl"].axes)
    grpo: GRPOConfig = trl_grpo._arguments({"adapter": "lora", "steps": 3, "setting": setting}, str(tmp_path))
    assert (sampling.completions_per_prompt, sampling.max_new_tokens, sampling.ppo_epochs) == (
        *(grpo.num_generations, grpo.max_completion_length, grpo.num_iterations),
    )
    assert sampling.kl.coefficient == grpo.beta == GRPO_BETA
    batch = grpo.per_device_train_batch_size * grpo.gradient_accumulation_steps
    assert sampling.optim.batch_size == batch == PROMPTS
