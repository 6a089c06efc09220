"""Every way of training can be estimated, against published figures and what can be counted by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, PreTrainedConfig

from alignment.config.data import DataConfig, MixedConfig, ValidationConfig
from alignment.config.evaluating import EndpointConfig, JudgeConfig, JudgeKind
from alignment.config.launch import Offload, Sharding
from alignment.config.model import AdapterConfig, AdapterKind, Critic, Dtype, ModelConfig
from alignment.config.optim import OptimConfig
from alignment.config.scoring import ScorerConfig
from alignment.costs.devices import DEVICES
from alignment.estimate import Timer, cost_of
from alignment.job import StageSpec
from alignment.records.cost import StageCost
from alignment.stages.dpo.kind import DpoConfig
from alignment.stages.evaluate.kind import EvaluateConfig
from alignment.stages.kto.kind import KtoConfig
from alignment.stages.ppo.config import Advantage
from alignment.stages.reward.kind import RewardConfig
from alignment.stages.sft.kind import SftConfig
from tests.chained import FULL, Chained, config_of
from tests.tiny import save_tiny_model, tiny_spec, tiny_tokenizer

ADAPTERS = {
    "full": AdapterConfig(kind=AdapterKind.full),
    "full without masters": AdapterConfig(kind=AdapterKind.full, master_weights=False),
    **{kind.value: AdapterConfig(kind=kind) for kind in AdapterKind if kind is not AdapterKind.full},
}


DIVIDED = {
    Sharding.none: set(),
    Sharding.zero2: {"optimiser", "gradients"},
    Sharding.zero3: {"optimiser", "gradients", "weights"},
    Sharding.fsdp: {"optimiser", "gradients", "weights"},
}


@pytest.fixture
def timer() -> Timer:
    return Timer("l4")


def spec_of(folder: Path, kind: type[Any], **settings: Any) -> StageSpec:
    rows = folder / "pairs.jsonl"
    pairs = [
        {
            "prompt": [{"role": "user", "content": f"When is shop {n} closed?"}],
            "chosen": f"On Monday, {n}.",
            "rejected": f"Say only {n}.",
        }
        for n in range(8)
    ]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    base = save_tiny_model(folder / "base", hidden_size=64)
    for weights in base.glob("*.safetensors"):
        weights.unlink()
    optim = OptimConfig(lr=1e-4, batch_size=4, micro_batch_tokens=settings.pop("tokens", 1024))
    config = kind(data=DataConfig(source=f"path:{rows}"), optim=optim, **settings)
    return tiny_spec(folder, config, base_path=base, data_path=rows)


def cost_when_whole(spec: StageSpec, timer: Timer) -> StageCost:
    cost = cost_of(spec, timer, publishes=False)
    assert cost.error == ""
    assert {"training", "trying the longest batch", "saving"} <= set(cost.phases)
    assert cost.flop > 0
    assert cost.seconds > 0
    return cost


def as_adapter(spec: StageSpec, adapter: AdapterConfig) -> StageSpec:
    return replace(spec, config=replace(spec.config, adapter=adapter))


def cost_of_ppo(chained: Chained, timer: Timer, scorer: ScorerConfig, **settings: Any) -> StageCost:
    config = config_of("ppo", FULL, reward=None, scorers=[scorer], **settings)
    cost = cost_of(chained.spec("ppo", FULL, config=config), timer, publishes=False)
    assert cost.error == ""
    return cost


@pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning")  # of shadows, whose sums have other strides
def test_every_epoch_over_the_sampled_answers_takes_its_time(tmp_path: Path, timer: Timer) -> None:
    chained, scorer = Chained(tmp_path), ScorerConfig(source="length", target=3)
    once, thrice = (cost_of_ppo(chained, timer, scorer, ppo_epochs=epochs) for epochs in (1, 3))
    assert thrice.steps == 3 * once.steps
    assert thrice.phases["training"].seconds == pytest.approx(3 * once.phases["training"].seconds, rel=0.01)
    assert thrice.phases["sampling"].seconds == pytest.approx(once.phases["sampling"].seconds, rel=0.01)


@pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning")  # of shadows, whose sums have other strides
def test_prompts_whose_answers_score_alike_still_cost_learning(tmp_path: Path, timer: Timer) -> None:
    chained, scorer = Chained(tmp_path), ScorerConfig(source="regex", pattern="no answer matches this")
    groups = {"advantage": Advantage.grpo, "critic": Critic.none, "completions_per_prompt": 2}
    dropped, whole = (cost_of_ppo(chained, timer, scorer, drop_ties=drop, **groups) for drop in (True, False))
    assert dropped.flop == whole.flop > 0
    assert dropped.peak == whole.peak


@pytest.mark.filterwarnings("ignore:Adapter name 'ref' should not be contained:UserWarning")  # TRL's own name
def test_every_way_has_phases_and_a_peak(tmp_path: Path, timer: Timer) -> None:
    spec = spec_of(tmp_path, DpoConfig)
    costs = {name: cost_when_whole(as_adapter(spec, adapter), timer) for name, adapter in ADAPTERS.items()}
    assert costs["full"].trained == costs["full"].weights
    assert costs["full"].result == 4 * costs["full"].trained
    assert costs["lora"].result == 4 * costs["lora"].trained
    # Three checkpoints, each with a weight and its two moments; those of small tensors are not counted.
    assert costs["full"].checkpoints == pytest.approx(3 * 3 * 4 * costs["full"].trained, rel=0.01)
    assert 0 < costs["prefix"].trained < costs["lora"].trained < costs["dora"].trained < costs["full"].trained
    held = {name: cost.phases["training"].parts.get("weights", 0) for name, cost in costs.items()}
    assert held["qlora"] < held["lora"]
    for kind, settings, adapter in (
        (KtoConfig, {}, AdapterKind.prefix),
        (RewardConfig, {"eval_fraction": 0.25}, AdapterKind.dora),
    ):
        cost_when_whole(as_adapter(spec_of(tmp_path, kind, **settings), AdapterConfig(kind=adapter)), timer)


def test_a_stage_that_asks_a_server_is_not_estimated(tmp_path: Path, timer: Timer) -> None:
    judge = JudgeConfig(kind=JudgeKind.endpoint, endpoint=EndpointConfig(base_url="http://127.0.0.1:1/v1", model="one"))
    config = EvaluateConfig(data=DataConfig(source="path:rows.jsonl"), arms=["base"], judge=judge)
    cost = cost_of(tiny_spec(tmp_path, config), timer, publishes=False)
    assert "http://127.0.0.1:1/v1" in cost.error
    assert cost.phases == {}


@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "with rows mixed in"])
def test_steps_and_tokens_are_those_of_the_whole_stage(
    tmp_path: Path, timer: Timer, monkeypatch: pytest.MonkeyPatch, mixed: bool
) -> None:
    """Rows that are mixed in, read whole beside a part of the stage's own, would be counted many times."""
    for user in ("estimate", "costs.repeats"):
        monkeypatch.setattr(f"alignment.{user}.STEP_ROWS", 2)
    spec, steps = spec_of(tmp_path, DpoConfig), 4 if mixed else 2
    if mixed:
        data = replace(spec.config.data, mix=[MixedConfig(source=spec.config.data.source)])
        extra_data = {**spec.extra_data, "data.mix[0]": spec.data_path}
        spec = replace(spec, config=replace(spec.config, data=data), extra_data=extra_data)
    whole = cost_of(spec, timer, publishes=False)
    monkeypatch.setattr("alignment.estimate.ROWS", 4)
    part = cost_of(spec, timer, publishes=False)
    assert (whole.error, part.error, whole.steps, part.steps) == ("", "", steps, steps)
    assert part.tokens == pytest.approx(whole.tokens, rel=0.1)
    more = replace(spec, config=replace(spec.config, optim=replace(spec.config.optim, max_steps=steps + 1)))
    limited = cost_of(more, timer, publishes=False)
    assert limited.steps == steps + 1
    assert limited.tokens == pytest.approx((1 + 1 / steps) * whole.tokens, rel=0.1)
    assert limited.flop == pytest.approx((1 + 1 / steps) * whole.flop, rel=0.3)


@pytest.mark.parametrize(
    ("rows", "optim", "every", "times"),
    [(None, {"max_steps": 6}, (2, 4), 1.5), (4, {"batch_size": 2}, (3, 4), 2.0)],
    ids=["three looks and two", "in the steps of all rows"],
)
def test_looks_at_held_out_rows_take_as_long_as_there_are_looks(
    tmp_path: Path, timer: Timer, monkeypatch: pytest.MonkeyPatch, rows: int | None, optim: dict[str, int],
    every: tuple[int, int], times: float,
) -> None:  # fmt: skip
    if rows:
        monkeypatch.setattr("alignment.estimate.ROWS", rows)  # half of them, in two of four steps
    spec = spec_of(tmp_path, DpoConfig)
    flop = []
    for steps in every:
        validation = ValidationConfig(share=0.25, every=steps)
        config = replace(spec.config, optim=replace(spec.config.optim, **optim), validation=validation)
        flop.append(cost_of(replace(spec, config=config), timer, publishes=False).phases["validating"].flop)
    assert flop[0] == pytest.approx(times * flop[1])
    assert flop[1] > 0


def test_processes_divide_what_their_launch_divides(tmp_path: Path) -> None:
    spec = as_adapter(spec_of(tmp_path, DpoConfig), AdapterConfig(kind=AdapterKind.full))
    whole = cost_of(spec, Timer("l4"), publishes=False)
    alone = whole.phases["training"]
    for sharding, divided in DIVIDED.items():
        cost = cost_of(replace(spec, sharding=sharding), Timer("l4", processes=4), publishes=False)
        shared = cost.phases["training"]
        own = shared.parts.pop("DeepSpeed", 0) + shared.parts.pop("DDP", 0)
        assert shared.parts == {name: size // 4 if name in divided else size for name, size in alone.parts.items()}
        trained = 4 * whole.trained  # two shares in one piece each, and buckets that are larger than the model
        gathered = alone.parts["weights"] if sharding is Sharding.zero3 else 0
        if sharding is Sharding.none:
            assert own == trained, "gradients once more, in buckets"
        else:
            assert own == (trained // 2 + 4 * trained + gathered if sharding.by_deepspeed else 0)
        less = sum(alone.parts.values()) - sum(shared.parts.values()) - own
        assert shared.peak == alone.peak - less
        assert cost.host <= whole.host
        assert shared.seconds == pytest.approx(alone.seconds / 4)


@pytest.mark.parametrize(
    ("sharding", "offload", "moved"),
    [
        (Sharding.zero1, Offload.optimizer, {"optimiser"}),
        (Sharding.zero3, Offload.optimizer, {"optimiser", "gradients"}),
        (Sharding.zero3, Offload.weights, {"optimiser", "gradients", "weights"}),
        (Sharding.fsdp, Offload.weights, {"optimiser", "gradients", "weights"}),
    ],
)
def test_what_is_offloaded_is_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharding: Sharding, offload: Offload, moved: set[str]
) -> None:
    monkeypatch.setattr("alignment.estimate.BEFORE", ())  # nothing else is on the host
    spec = replace(as_adapter(spec_of(tmp_path, DpoConfig), AdapterConfig(kind=AdapterKind.full)), sharding=sharding)
    whole = cost_of(spec, Timer("l4"), publishes=False)
    cost = cost_of(replace(spec, offload=offload), Timer("l4"), publishes=False)
    sizes = []
    for name, left in cost.phases.items():  # the rows are tokenised already
        phase = whole.phases[name]
        sizes.append(sum(phase.parts.get(part, 0) for part in moved))
        assert left.parts == {part: size for part, size in phase.parts.items() if part not in moved}
        assert (left.peak, left.held) == (phase.peak - sizes[-1], phase.held - sizes[-1])
    assert cost.host == max(sizes) > 0


LLAMA_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131_072,
    tie_word_embeddings=False,
)
WEIGHTS_OF_8B = 8_030_261_248
"""As the model's page has it."""

LINEAR_OF_LAYER = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14_336)
TWO_LAYERS = LlamaConfig(**{**LLAMA_8B.to_dict(), "num_hidden_layers": 2})

Estimate = Callable[..., StageCost]


@pytest.fixture
def estimate(tmp_path: Path) -> Estimate:
    def cost(
        model: PreTrainedConfig,
        adapter: AdapterConfig,
        *,
        words: int,
        max_length: int = 1024,
        timer: Timer | None = None,
    ) -> StageCost:
        base = tmp_path / "base"
        model.save_pretrained(base)
        tiny_tokenizer().save_pretrained(base)
        rows = tmp_path / "rows.jsonl"
        rows.write_text("".join(json.dumps(_row(words)) + "\n" for _ in range(2)), encoding="utf-8")
        config = SftConfig(
            adapter=adapter,
            data=DataConfig(source=f"path:{rows}"),
            optim=OptimConfig(lr=1e-5, batch_size=1, activation_checkpointing=True),
            max_length=max_length,
        )
        spec = replace(
            tiny_spec(tmp_path / "work", config),
            base_path=base,
            data_path=rows,
            model=ModelConfig(source=f"path:{base}", dtype=Dtype.bfloat16),
        )
        return cost_of(spec, timer or Timer("h100"), publishes=False)

    return cost


def _row(words: int) -> dict[str, Any]:
    turn = {"role": "user", "content": "the keys " * (words // 2)}
    return {"messages": [turn, {"role": "assistant", "content": "the hall " * (words // 2)}]}


def test_adam_takes_sixteen_bytes_a_weight(estimate: Estimate) -> None:
    """Four for the weight, its gradient and each of its two moments (Rajbhandari et al. 2020, section 3.1)."""
    cost = estimate(TWO_LAYERS, AdapterConfig(kind=AdapterKind.full), words=40)
    assert cost.error == ""
    assert cost.weights == cost.trained == 2 * 128_256 * 4096 + 2 * (LINEAR_OF_LAYER + 2 * 4096) + 4096
    parts = max(cost.phases.values(), key=lambda phase: phase.peak).parts
    states = parts["weights"] + parts["gradients"] + parts["optimiser"]
    # The embedding's gradient is counted as an activation until it is complete.
    assert states == pytest.approx(16 * cost.weights, rel=0.15)
    assert cost.peak > 16 * cost.weights


def test_qlora_on_eight_billion_weights_fits_on_a_card_of_24_gb(estimate: Estimate) -> None:
    """Dettmers et al. 2023 train 7 and 13 billion weights on one card of 24 GB, rows of 512 tokens."""
    cost = estimate(LLAMA_8B, AdapterConfig(kind=AdapterKind.qlora), words=1000, max_length=4096)
    assert cost.error == ""
    linear = 32 * LINEAR_OF_LAYER
    others = WEIGHTS_OF_8B - linear  # embeddings, head and norms stay in bfloat16
    parts = max(cost.phases.values(), key=lambda phase: phase.peak).parts
    assert parts["weights"] == pytest.approx(linear * 4.127 / 8 + others * 2, rel=0.02)
    assert cost.host > 2 * WEIGHTS_OF_8B
    assert 7e9 < cost.peak < DEVICES["4090"].memory
