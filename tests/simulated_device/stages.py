"""Stages as the worker runs them, small enough that all kinds and adapters are tried on a device in a minute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignment import worker
from alignment.config.data import DataConfig, PtxConfig, ValidationConfig
from alignment.config.evaluating import AnswersConfig
from alignment.config.model import AdapterConfig, Critic, Dtype, ModelConfig
from alignment.config.scoring import GuardConfig, MetricConfig, ScorerConfig
from alignment.job import StageInput, StageSpec
from alignment.models.assembly.load import Lineage
from alignment.stages.distil.kind import Method
from alignment.stages.evaluate.kind import EvaluateConfig
from alignment.stages.forgetting.kind import ForgettingConfig
from alignment.stages.ppo.config import Advantage, KlConfig, KlTerm
from alignment.stages.reward_card.kind import RewardCardConfig
from alignment.stages.sample.kind import SampleConfig
from alignment.training.context import StageContext
from tests.chained import DATA, DORA, FULL, LORA, PREFIX, QLORA, Chained, config_of
from tests.generating import distil_spec
from tests.simulated_device.events import events
from tests.tiny import BASE_SOURCE, tiny_reward, tiny_spec

TRAINED = ("cpt", "sft", "reward", "dpo", "kto", "ppo", "grpo", "distil")
"""Each is tried with each adapter."""
ADAPTERS = ("full", "lora", "dora", "qlora", "prefix")
VARIANTS = ("ppo_shared", "ppo_guarded", "dpo_precomputed", "sft_validated", "distil_tokens")
ADAPTED = ("ppo-full", "ppo-qlora", "dpo-qlora", "sft-dora", "dpo-prefix", "ppo-prefix", "sft-bare")
"""What ``make test`` tries beside LoRA: each adapter, with those stages that have code of their own for it."""
FLOAT32 = "sft-lora-float32"
"""Left to on_card.py, as PPO's is tried."""
MEASURED = ("sample", "evaluate", "forgetting", "reward_card")
"""These train nothing; their policy is an SFT with LoRA."""
KINDS = ("cpt", "sft", "reward", "dpo", "kto", "ppo", "distil", *MEASURED)
_STEPS = 2
_NEVER = 100
"""Steps between checkpoints, more than there are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    stage: str
    adapter: str = "lora"
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return "-".join((self.stage, self.adapter, *(["float32"] if self.dtype == "float32" else [])))


def run_stage(cell: Cell, folder: Path) -> None:
    run_spec(spec_of(cell, folder))


def spec_of(cell: Cell, folder: Path) -> StageSpec:
    return _SPECS.get(cell.stage, _trained)(Chained(folder), cell)


def run_spec(spec: StageSpec, *, rank: int = 0, world_size: int = 1) -> None:
    worker._run(spec, StageContext(spec=spec, rank=rank, world_size=world_size))


def _adapter(name: str) -> Any:
    bare = AdapterConfig(kind=FULL.kind, master_weights=False)
    return {"full": FULL, "lora": LORA, "dora": DORA, "qlora": QLORA, "prefix": PREFIX, "bare": bare}[name]


def _changes(cell: Cell) -> dict[str, Any]:
    return {"model": ModelConfig(source=BASE_SOURCE, dtype=Dtype(cell.dtype))}


def _config(kind: str, adapter: Any, **changes: Any) -> Any:
    changes = {"data": DataConfig(source=str(DATA), limit=4 * _STEPS), **changes}
    config: Any = config_of(kind, adapter, **changes)
    if kind == "ppo":
        return replace(config, save_every=_NEVER)
    return replace(config, save_every=_NEVER, optim=replace(config.optim, max_steps=_STEPS))


def _trained(chained: Chained, cell: Cell, *, config: Any = None, **changes: Any) -> StageSpec:
    kind, adapter = cell.stage.partition("_")[0], _adapter(cell.adapter)
    return chained.spec(kind, adapter, config=config or _config(kind, adapter), **_changes(cell), **changes)


_RL: dict[str, dict[str, Any]] = {
    "ppo": {},
    "grpo": {
        "advantage": Advantage.grpo,
        "critic": Critic.none,
        "completions_per_prompt": 2,
        "kl": KlConfig(coefficient=0.04, apply_to=KlTerm.loss),
        "entropy_coefficient": 0.01,
        "drop_ties": True,
    },
    "ppo_shared": {"critic": Critic.shared, "whiten_rewards": True, "num_minibatches": 2},
    "ppo_guarded": {
        "guard": GuardConfig(every=1, prompts=2, scorer=ScorerConfig(source="length", target=3)),
        "ptx": PtxConfig(coefficient=0.1, batch_size=2, data=DataConfig(source="path:conversations", limit=4)),
        "critic_warmup": 1,
        "max_approxkl": 10.0,
    },
}


def _rl(chained: Chained, cell: Cell) -> StageSpec:
    adapter = _adapter(cell.adapter)
    chained.inputs["reward"] = tiny_reward(
        chained.folder / "made", adapter, start=_base(chained), base_path=chained.base, **_changes(cell)
    )
    config = _config("ppo", adapter, **_RL[cell.stage])
    conversations = {"ptx.data": DATA / "conversations.jsonl"} if config.ptx.coefficient else {}
    return chained.spec("ppo", adapter, config=config, extra_data=conversations, **_changes(cell))


def _base(chained: Chained) -> Any:
    return Lineage(source=BASE_SOURCE, base=chained.base, adapters=())


def _precomputed(chained: Chained, cell: Cell) -> StageSpec:
    return _trained(chained, cell, config=replace(_config("dpo", _adapter(cell.adapter)), precompute_reference=True))


def _validated(chained: Chained, cell: Cell) -> StageSpec:
    validation = ValidationConfig(every=1, share=0.25, keep_best=True)
    return _trained(chained, cell, config=replace(_config("sft", _adapter(cell.adapter)), validation=validation))


def _distilled(chained: Chained, cell: Cell) -> StageSpec:
    by_tokens = {"method": Method.tokens, "timed_prompts": 2}
    settings = {"method": Method.sequence, "timed_prompts": 0, "adapter": _adapter(cell.adapter), "save_every": _NEVER}
    settings |= by_tokens if cell.stage == "distil_tokens" else {}
    return replace(distil_spec(chained.folder, **settings), **_changes(cell))


def _measured(chained: Chained, cell: Cell, config: Any, **changes: Any) -> StageSpec:
    sft = _trained(chained, Cell(stage="sft", dtype=cell.dtype), config=_config("sft", LORA))
    run_spec(sft)
    assert sft.artifact == _sft(chained).path
    events.clear()
    return tiny_spec(chained.folder, config, **{**_changes(cell), **changes})


def _sft(chained: Chained) -> Any:
    return StageInput(ref="stage:sft", path=chained.folder / "artifacts" / "sft-0123abcd")


def _sampled(chained: Chained, cell: Cell) -> StageSpec:
    config = SampleConfig(
        reward=None,
        scorers=[ScorerConfig(source="length", target=3)],
        data=DataConfig(source="path:prompts", limit=6),
        max_prompt_length=4096,
        max_new_tokens=8,
        ended_only=False,
        batch_size=12,
    )
    fingerprints = {"policy": "f" * 64}
    inputs, prompts = {"policy": _sft(chained)}, DATA / "preferences.jsonl"
    return _measured(chained, cell, config, data_path=prompts, inputs=inputs, input_fingerprints=fingerprints)


def _evaluated(chained: Chained, cell: Cell) -> StageSpec:
    config = EvaluateConfig(
        arms=["base", "stage:sft"],
        metrics=[MetricConfig(name="length", source="length", target=3)],
        data=DataConfig(source=str(DATA), limit=4),
        answers=AnswersConfig(temperature=1.0, per_prompt=2),
        reward=None,
        max_new_tokens=6,
        bootstrap_samples=50,
    )
    arms = {"base": StageInput(ref="base", path=None), "stage:sft": _sft(chained)}
    inputs, prompts = {"reference": _sft(chained)}, DATA / "heldout.jsonl"
    return _measured(chained, cell, config, data_path=prompts, inputs=inputs, arms=arms)


def _forgotten(chained: Chained, cell: Cell) -> StageSpec:
    limited = {name: DataConfig(source=f"bundled:general/{name}", limit=4) for name in ("texts", "questions")}
    config = ForgettingConfig(
        arms=["stage:sft"], data=limited["texts"], questions=limited["questions"], bootstrap_samples=50
    )
    general = DATA.parent / "general"
    return _measured(
        chained,
        cell,
        config,
        data_path=general / "texts.jsonl",
        extra_data={"questions": general / "questions.jsonl"},
        inputs={},
        arms={"stage:sft": _sft(chained)},
    )


def _carded(chained: Chained, cell: Cell) -> StageSpec:
    changes = _changes(cell)
    reward = tiny_reward(chained.folder / "made", LORA, start=_base(chained), base_path=chained.base, **changes)
    config = RewardCardConfig(
        data=DataConfig(source=str(DATA), limit=8), max_length=4096, bootstrap_samples=50, invariance_pairs=2
    )
    inputs, pairs = {"reward": reward}, DATA / "preferences.jsonl"
    return tiny_spec(chained.folder, config, data_path=pairs, inputs=inputs, **changes)


_SPECS: dict[str, Callable[[Chained, Cell], StageSpec]] = {
    **dict.fromkeys(_RL, _rl),
    "dpo_precomputed": _precomputed,
    "sft_validated": _validated,
    "distil": _distilled,
    "distil_tokens": _distilled,
    "sample": _sampled,
    "evaluate": _evaluated,
    "forgetting": _forgotten,
    "reward_card": _carded,
}


def usual_cells() -> list[Cell]:
    return [cell for cell in all_cells() if str(cell) in ADAPTED or (cell.adapter == "lora" and str(cell) != FLOAT32)]


def all_cells() -> list[Cell]:
    trained = [
        Cell(stage=stage, adapter=adapter)
        for stage in TRAINED
        for adapter in (*ADAPTERS, *(["bare"] if stage in ("sft", "ppo") else []))
    ]
    variants = [Cell(stage=stage) for stage in (*VARIANTS, *MEASURED)]
    return [*trained, *variants, *(Cell(stage=stage, dtype="float32") for stage in ("sft", "ppo"))]
