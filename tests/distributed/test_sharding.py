"""Two processes that share out weights, gradients or optimiser state train what one process trains.

Every stage under every adapter and launcher is tried by ``make matrix``; here are those that differ in kind.
"""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from alignment.config.launch import Offload, Sharding
from alignment.config.model import AdapterConfig, Dtype, ModelConfig
from alignment.config.scoring import GuardConfig, ScorerConfig
from alignment.config.stage import StageConfig
from alignment.core.artifacts import verify
from alignment.job import StageInput, StageSpec
from alignment.models.forward.answers import micro_batches_of
from alignment.stages.dpo.kind import DpoLoss
from alignment.stages.ppo.config import KlConfig, KlControl
from alignment.stages.ppo.experience import Experience
from alignment.stages.ppo.learn import Learner
from alignment.training.context import StageContext
from alignment.training.sharding import sharding_arguments
from tests.chained import DORA, FULL, LORA, PREFIX, QLORA, Chained, config_of
from tests.distributed.processes import on_processes
from tests.oracles.close import close
from tests.tiny import BASE_SOURCE

NONE, ZERO1, ZERO2, ZERO3, FSDP = Sharding.none, Sharding.zero1, Sharding.zero2, Sharding.zero3, Sharding.fsdp


NAMES = {"ppo": ("objective/score", "loss/policy", "loss/value", "grad_norm")}


needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def shared_out(chained: Chained, kind: str, adapter: AdapterConfig, sharding: Sharding, **changes: Any) -> StageSpec:
    return replace(chained.spec(kind, adapter, **changes), sharding=sharding)


def run_on(spec: StageSpec, world_size: int = 2) -> StageSpec:
    assert on_processes(spec, world_size=world_size) == [0] * world_size, logs(spec)
    return spec


def lines_of(spec: StageSpec, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (spec.artifact / name).read_text().splitlines()]


def error_of(spec: StageSpec) -> str:
    error: str = json.loads((spec.run_folder / "status.json").read_text())["error"]
    return error


def steadied(kind: str, adapter: AdapterConfig) -> StageConfig:
    """With an optimiser that does not blow a gradient up that is nothing but rounding."""
    config: Any = config_of(kind, adapter)
    return replace(config, optim=replace(config.optim, adam_eps=1e-2))


def ragged(config: Any) -> StageConfig:
    """In PPO one of two processes cuts its two answers in two micro-batches and the other does not; of four pairs each
    would cut others, were it alone."""
    room = {"ppo": {"micro_batch_tokens": 480}}
    room["reward"] = room["dpo"] = room["kto"] = {"micro_batch_tokens": 1100, "batch_size": 8, "max_steps": 2}
    changed: StageConfig = replace(config, optim=replace(config.optim, **room.get(config.kind, {})))
    return changed


def cuts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Of each minibatch from now on: the micro-batches that two processes would cut, were there two."""
    counts: list[list[int]] = []
    backward = Learner._backward

    def noted(self: Learner, model: Any, experience: Experience, minibatch: int, **how: Any) -> None:
        rows = experience.partition.rows_of(minibatch)
        shares = [[(experience.prompts[row], experience.answers[row]) for row in rows[rank::2]] for rank in range(2)]
        counts.append([len(micro_batches_of(share, tokens=480)) for share in shares])
        backward(self, model, experience, minibatch, **how)

    monkeypatch.setattr(Learner, "_backward", noted)
    return counts


def logs(spec: StageSpec) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted(spec.run_folder.glob("log-*.txt")))


def figures(artifact: Path, kind: str) -> torch.Tensor:
    lines = [json.loads(line) for line in (artifact / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([[line[name] for name in NAMES.get(kind, ("loss", "grad_norm"))] for line in lines])


def weights(artifact: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in artifact.rglob("*.safetensors"):
        tensors |= {f"{file.relative_to(artifact)}/{name}": held for name, held in load_file(file).items()}
    assert tensors, f"no weights in {artifact}"
    return tensors


def alike(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, atol: float) -> None:
    assert actual.keys() == expected.keys()
    for name, held in actual.items():
        assert held.shape == expected[name].shape
        close(held, expected[name], atol=atol)


@needs_deepspeed
@pytest.mark.parametrize(
    ("kind", "adapter", "sharding"),
    [
        ("sft", DORA, ZERO3),
        ("sft", QLORA, ZERO2),
        ("reward", LORA, ZERO3),
        ("dpo", LORA, FSDP),
        ("kto", LORA, NONE),
        ("kto", FULL, ZERO3),
        ("dpo", PREFIX, FSDP),
        ("kto", PREFIX, ZERO3),
        ("sft", QLORA, ZERO3),
        ("ppo", LORA, NONE),
        ("ppo", FULL, ZERO1),
        ("ppo", LORA, ZERO3),
        ("ppo", FULL, FSDP),
        ("ppo", QLORA, FSDP),
    ],  # each kind, adapter and sharding; ``make matrix`` tries all together, test_sharded_loading.py full training
    ids=lambda value: getattr(getattr(value, "kind", value), "value", value),
)
def test_it_trains_what_one_process_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, adapter: AdapterConfig, sharding: Sharding
) -> None:
    runs = []
    minibatches = cuts(monkeypatch)
    config = ragged(steadied(kind, adapter))
    for shared in (False, True):
        chained = Chained(tmp_path / str(shared))
        if kind == "ppo":
            chained.run("reward", adapter)
        if shared:
            spec = run_on(shared_out(chained, kind, adapter, sharding, config=config))
        else:
            chained.run(kind, adapter, config=config)
            spec = chained.spec(kind, adapter)
        runs.append((figures(spec.artifact, kind), weights(spec.artifact)))
    if kind == "ppo" and sharding in (NONE, FSDP) and adapter is not FULL:
        manifest = verify(spec.artifact, content=False)
        assert manifest.metrics["memory/base_copies"] < 1.1, "each process has the base once"
    assert bool(minibatches) is (kind == "ppo")
    assert not minibatches or any(first != second for first, second in minibatches), "processes should differ"
    (alone, alone_weights), (together, shared_weights) = runs
    close(together, alone, atol=1e-4, rtol=1e-4)
    alike(shared_weights, alone_weights, atol=1e-5)


@needs_deepspeed
@pytest.mark.parametrize(
    ("settings", "adapter", "sharding"),
    [
        ({"loss": DpoLoss.orpo}, FULL, FSDP),
        ({"loss": DpoLoss.simpo, "target_margin": 0.5, "nll_weight": 0.5}, LORA, NONE),
        ({"label_smoothing": 0.1, "nll_weight": 0.5}, FULL, ZERO3),
    ],
    ids=["orpo-fsdp", "simpo-ddp", "conservative-zero3"],
)
def test_losses_of_ours_and_the_changes_of_answers_are_those_of_one_process(
    tmp_path: Path, settings: dict[str, Any], adapter: AdapterConfig, sharding: Sharding
) -> None:
    steady: Any = ragged(steadied("dpo", adapter))
    config = replace(steady, **settings)
    results = []
    for world_size, launch in ((1, NONE), (2, sharding)):
        chained = Chained(tmp_path / str(world_size))
        spec = run_on(shared_out(chained, "dpo", adapter, launch, config=config), world_size)
        metrics = verify(spec.artifact, content=False).metrics
        assert abs(metrics["logps/chosen_change"]) > 0.1
        results.append((figures(spec.artifact, "dpo"), list(metrics.values())))
    (alone, alone_metrics), (together, together_metrics) = results
    close(together, alone, atol=1e-4, rtol=1e-4)
    close(together_metrics, alone_metrics, atol=1e-4, rtol=1e-4)


TRAINED = ("lora_", "score", "prompt_e")
"""Parts of the names of all weights that are trained under an adapter."""


def weights_in(checkpoint: Path, sharding: Sharding) -> set[str]:
    if sharding is FSDP:
        metadata = FileSystemReader(checkpoint / "pytorch_model_fsdp_0").read_metadata()
        return set(metadata.state_dict_metadata)
    trained, *_ = sorted(checkpoint.glob("**/*mp_rank_00_model_states.pt"))
    return set(torch.load(trained, weights_only=False)["module"])


def ppo(**changes: Any) -> StageConfig:
    config: Any = config_of("ppo", LORA, missing_eos_penalty=0.0, **changes)
    return config


def stateful() -> StageConfig:
    """PPO with a coefficient that adapts, means of scores and a best policy."""
    return ppo(
        updates=3,
        kl=KlConfig(control=KlControl.adaptive, target=0.01, horizon=8),
        scorers=[ScorerConfig(normalize=True)],
        guard=GuardConfig(every=1, prompts=2, scorer=ScorerConfig(source="length", target=4)),
    )


@needs_deepspeed
@pytest.mark.parametrize(
    ("kind", "adapter", "sharding"),
    [
        ("sft", LORA, ZERO3),
        ("ppo", LORA, ZERO3),
        ("ppo", LORA, ZERO2),
        ("ppo", AdapterConfig(rank=1), FSDP),  # of a factor with one row, one process has nothing
        ("sft", PREFIX, ZERO3),
        ("sft", PREFIX, FSDP),
    ],
    ids=["sft-zero3", "ppo-zero3", "ppo-zero2", "ppo-fsdp", "sft-prefix-zero3", "sft-prefix-fsdp"],
)
def test_stopped_and_started_again_it_ends_as_it_would_have(
    tmp_path: Path, kind: str, adapter: AdapterConfig, sharding: Sharding
) -> None:
    """PPO stops where an update ends, and goes on with the KL's coefficient, the scores' means and the best policy."""
    saved, logged = [], []
    config = replace(stateful(), adapter=adapter) if kind == "ppo" else None
    for stopped in (False, True):
        chained = Chained(tmp_path / str(stopped))
        if kind == "ppo":
            chained.run("reward", adapter)
        spec = shared_out(chained, kind, adapter, sharding, config=config)
        if stopped:
            first = 1 if kind == "sft" else 2
            assert on_processes(spec, stop_after=first) == [75, 75], logs(spec)
            (spec.run_folder / "status.json").unlink()
            if sharding is FSDP or (kind, sharding) == ("ppo", ZERO3):
                names = weights_in(spec.work / "checkpoints" / f"checkpoint-{first}", sharding)
                assert names
                assert all(any(part in name for part in TRAINED) for name in names), sorted(names)
        saved.append(weights(run_on(spec).artifact))
        if kind == "ppo":
            coefficients = [(line["objective/kl_coef"], line["loss/policy"]) for line in lines_of(spec)]
            logged.append((coefficients, lines_of(spec, "guard.jsonl")))
    if kind == "ppo":
        assert logged[0] == logged[1]
        assert len({coefficient for coefficient, _ in logged[0][0]}) == 3
    assert saved[0].keys() == saved[1].keys()
    for name, held in saved[0].items():
        assert torch.equal(held, saved[1][name]), name


@needs_deepspeed
def test_shares_of_another_launch_are_refused(tmp_path: Path) -> None:
    spec = shared_out(Chained(tmp_path), "sft", LORA, ZERO2)
    assert on_processes(spec, stop_after=1) == [75, 75], logs(spec)
    (spec.run_folder / "status.json").unlink()
    other = replace(spec, sharding=NONE)
    assert on_processes(other) == [2, 2], logs(other)
    assert "checkpoint-1 contains shares of 2 processes (zero2)" in error_of(spec)


@needs_deepspeed
@pytest.mark.parametrize("sharding", [ZERO3, FSDP], ids=lambda sharding: sharding.value)
def test_a_guard_may_ask_a_reward_model_that_shares_the_base(tmp_path: Path, sharding: Sharding) -> None:
    config = ppo(guard=GuardConfig(every=1, prompts=2, scorer=ScorerConfig(source="reward")))
    looks = []
    for world_size, how in ((1, NONE), (2, sharding)):
        chained = Chained(tmp_path / how.value)
        chained.run("reward", LORA)
        spec = run_on(shared_out(chained, "ppo", LORA, how, config=config), world_size)
        looks.append(lines_of(spec, "guard.jsonl"))
    for alone, together in zip(*looks, strict=True):
        assert together == pytest.approx(alone, abs=1e-4)


@needs_deepspeed
@pytest.mark.parametrize("sharding", [NONE, ZERO3], ids=lambda sharding: sharding.value)
def test_the_reference_is_computed_once_by_all_processes(tmp_path: Path, sharding: Sharding) -> None:
    config: Any = replace(steadied("dpo", LORA), precompute_reference=True)
    runs = []
    for world_size, how in ((1, NONE), (2, sharding)):
        chained = Chained(tmp_path / str(world_size))
        spec = run_on(shared_out(chained, "dpo", LORA, how, config=config), world_size)
        (cached,) = spec.artifact.parent.glob("cache/reference-*.safetensors")
        runs.append((load_file(cached), figures(spec.artifact, "dpo")))
    for side in ("chosen", "rejected"):
        assert len(runs[0][0][side]) == 8
        close(runs[1][0][side], runs[0][0][side], rtol=1e-5)
    close(runs[1][1], runs[0][1], atol=1e-4, rtol=1e-4)


@needs_deepspeed
@pytest.mark.parametrize(("kind", "adapter"), [("sft", LORA), ("dpo", FULL)])
def test_in_low_precision_policy_and_reference_still_agree_and_learn_the_same(
    tmp_path: Path, kind: str, adapter: AdapterConfig
) -> None:
    """A beta of 1 sums up what two roundings would differ by; the stage stops if the first loss is not ln 2.

    Two processes are compared with two: one process has other micro-batches, which bfloat16 rounds differently."""
    model = ModelConfig(source=BASE_SOURCE, dtype=Dtype.bfloat16)
    config: Any = steadied(kind, adapter)
    config = replace(config, beta=1.0) if kind == "dpo" else config
    losses = []
    for sharding in (NONE, ZERO3):
        chained = Chained(tmp_path / sharding.value)
        spec = run_on(shared_out(chained, kind, adapter, sharding, config=config, model=model), 2)
        assert {held.dtype for held in weights(spec.artifact).values()} == {torch.float32}
        losses.append(figures(spec.artifact, kind)[:, 0].tolist())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    if kind == "dpo":
        assert losses[1][0] == pytest.approx(math.log(2), abs=1e-3)


@needs_deepspeed
@pytest.mark.parametrize("sharding", [NONE, ZERO2, ZERO3, FSDP], ids=lambda sharding: sharding.value)
def test_a_loss_that_is_no_number_on_one_process_stops_all_and_keeps_nothing(
    tmp_path: Path, sharding: Sharding
) -> None:
    spec = shared_out(Chained(tmp_path), "sft", LORA, sharding)
    assert on_processes(spec, nan_at=2) == [6, 6], logs(spec)
    assert "a gradient is not finite at optimiser step 2" in error_of(spec)
    assert not spec.artifact.exists()


@pytest.mark.parametrize(
    ("sharding", "offload", "expected"),
    [
        (ZERO2, Offload.optimizer, {"offload_optimizer"}),
        (ZERO3, Offload.optimizer, {"offload_optimizer"}),
        (ZERO3, Offload.weights, {"offload_optimizer", "offload_param"}),
        (ZERO3, Offload.none, set()),
    ],
)
def test_deepspeed_is_told_what_to_offload(
    tmp_path: Path, sharding: Sharding, offload: Offload, expected: set[str]
) -> None:
    spec = replace(shared_out(Chained(tmp_path), "sft", LORA, sharding), offload=offload)
    zero = sharding_arguments(StageContext(spec=spec, rank=0, world_size=2))["deepspeed"]["zero_optimization"]
    assert {name for name in zero if name.startswith("offload")} == expected


@needs_deepspeed
@pytest.mark.parametrize(
    ("kind", "adapter", "sharding", "changes"),
    [
        ("sft", LORA, ZERO3, {"offload": Offload.weights}),
        ("sft", FULL, ZERO3, {"again": True}),
        ("dpo", LORA, ZERO3, {"again": True}),
        ("ppo", LORA, FSDP, {"again": True}),
    ],
    ids=["offloaded", "sft-zero3", "dpo-zero3", "ppo-fsdp"],
)
def test_weights_in_the_machines_memory_or_activations_computed_again_change_nothing(
    tmp_path: Path, kind: str, adapter: AdapterConfig, sharding: Sharding, changes: dict[str, Any]
) -> None:
    trained = []
    for own in ({}, changes):
        chained = Chained(tmp_path / str(bool(own)))
        if kind == "ppo":
            chained.run("reward", adapter)
        config: Any = steadied(kind, adapter)
        config = replace(config, optim=replace(config.optim, activation_checkpointing=own.get("again", False)))
        spec = shared_out(chained, kind, adapter, sharding, config=config)
        spec = replace(spec, offload=own.get("offload", Offload.none))
        trained.append(weights(run_on(spec).artifact))
    alike(trained[1], trained[0], atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@needs_deepspeed
@pytest.mark.parametrize("sharding", [NONE, ZERO1, ZERO2, ZERO3, FSDP], ids=lambda sharding: sharding.value)
@pytest.mark.parametrize(
    ("kind", "adapter"), [("sft", FULL), ("reward", LORA), ("dpo", LORA), ("kto", LORA), ("ppo", LORA)]
)
def test_all_gpus_train_what_one_trains(tmp_path: Path, kind: str, adapter: AdapterConfig, sharding: Sharding) -> None:
    """Not yet run: two or more GPUs whose number divides 4, or one, whose shares are the whole."""
    logged = []
    for world_size, how in ((1, NONE), (torch.cuda.device_count(), sharding)):
        chained = Chained(tmp_path / str(len(logged)))
        if kind == "ppo":
            reward = run_on(chained.spec("reward", adapter), 1)
            chained.inputs["reward"] = StageInput(ref="stage:reward", path=reward.artifact)
        spec = run_on(shared_out(chained, kind, adapter, how, config=steadied(kind, adapter)), world_size)
        logged.append(figures(spec.artifact, kind))
    close(logged[1], logged[0], atol=1e-4, rtol=1e-4)
