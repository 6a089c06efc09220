"""Stages as the worker runs them, small enough that all kinds and adapters are tried on a device in a minute.

Nothing is imported at the top that imports torch, because tests name cells without it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignment.job import StageSpec
    from tests.chained import Chained

TRAINED = ("cpt", "sft", "reward", "dpo", "kto", "ppo", "grpo", "distil")
"""Each is tried with each adapter."""
ADAPTERS = ("full", "lora", "dora", "qlora", "prefix")
VARIANTS = ("ppo_shared", "ppo_guarded", "dpo_precomputed", "sft_validated", "distil_tokens")
ADAPTED = ("sft", "dpo", "ppo")
"""Those that ``make test`` tries with each adapter, one for each way to learn; the others share their models' code."""
MEASURED = ("sample", "evaluate", "forgetting", "reward_card")
"""These train nothing; their policy is an SFT with LoRA."""
KINDS = ("cpt", "sft", "reward", "dpo", "kto", "ppo", "distil", *MEASURED)
_STEPS = 2
_NEVER = 100
"""Steps between checkpoints, more than there are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A stage under an adapter. ``bare`` is full training without master weights."""

    stage: str
    adapter: str = "lora"
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return "-".join((self.stage, self.adapter, *(["float32"] if self.dtype == "float32" else [])))

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Cell:
        """From ``to_json``."""
        return cls(**json.loads(line))


def run_stage(cell: Cell, folder: Path) -> None:
    """Runs the stage of a cell in an empty folder, on the device that torch finds."""
    run_spec(spec_of(cell, folder))


def spec_of(cell: Cell, folder: Path) -> StageSpec:
    """What the worker is told. A stage that measures a policy has that policy trained first."""
    from tests.chained import Chained

    return _SPECS.get(cell.stage, _trained)(Chained(folder), cell)


def run_spec(spec: StageSpec, *, rank: int = 0, world_size: int = 1) -> None:
    """Runs a stage as the worker does."""
    from alignment import worker
    from alignment.training.context import StageContext

    worker._run(spec, StageContext(spec=spec, rank=rank, world_size=world_size))


def _adapter(name: str) -> Any:
    from alignment.config.adapter import AdapterConfig
    from tests.chained import DORA, FULL, LORA, PREFIX, QLORA

    bare = AdapterConfig(kind=FULL.kind, master_weights=False)
    return {"full": FULL, "lora": LORA, "dora": DORA, "qlora": QLORA, "prefix": PREFIX, "bare": bare}[name]


def _changes(cell: Cell) -> dict[str, Any]:
    """What differs from the default specification of a tiny stage."""
    from alignment.config.model import Dtype, ModelConfig
    from tests.tiny import BASE_SOURCE

    return {"model": ModelConfig(source=BASE_SOURCE, dtype=Dtype(cell.dtype))}


def _config(kind: str, adapter: Any, **changes: Any) -> Any:
    """Two optimiser steps on eight rows, without a checkpoint before the last."""
    from alignment.config.data import DataConfig
    from tests.chained import DATA, config_of

    changes = {"data": DataConfig(source=str(DATA), limit=4 * _STEPS), **changes}
    config: Any = config_of(kind, adapter, **changes)
    if kind == "ppo":
        return replace(config, save_every=_NEVER)
    return replace(config, save_every=_NEVER, optim=replace(config.optim, max_steps=_STEPS))


def _trained(chained: Chained, cell: Cell, *, config: Any = None, **changes: Any) -> StageSpec:
    kind, adapter = cell.stage.partition("_")[0], _adapter(cell.adapter)
    return chained.spec(kind, adapter, config=config or _config(kind, adapter), **_changes(cell), **changes)


def _rl(chained: Chained, cell: Cell, *, extra_data: dict[str, Path] | None = None, **settings: Any) -> StageSpec:
    """PPO against a reward model that was trained with the same adapter."""
    from tests.tiny import tiny_reward

    adapter = _adapter(cell.adapter)
    chained.inputs["reward"] = tiny_reward(
        chained.folder / "made", adapter, start=_base(chained), base_path=chained.base, **_changes(cell)
    )
    config = _config("ppo", adapter, **settings)
    return chained.spec("ppo", adapter, config=config, extra_data=extra_data or {}, **_changes(cell))


def _base(chained: Chained) -> Any:
    from alignment.models.assembly.load import Lineage
    from tests.tiny import BASE_SOURCE

    return Lineage(source=BASE_SOURCE, base=chained.base, adapters=())


def _without_critic(chained: Chained, cell: Cell) -> StageSpec:
    from alignment.config.critic import Critic
    from alignment.stages.ppo.config import Advantage, KlConfig, KlTerm

    return _rl(
        chained,
        cell,
        advantage=Advantage.grpo,
        critic=Critic.none,
        completions_per_prompt=2,
        kl=KlConfig(coefficient=0.04, apply_to=KlTerm.loss),
        entropy_coefficient=0.01,
        drop_ties=True,
    )


def _shared_critic(chained: Chained, cell: Cell) -> StageSpec:
    from alignment.config.critic import Critic

    return _rl(chained, cell, critic=Critic.shared, whiten_rewards=True, num_minibatches=2)


def _guarded(chained: Chained, cell: Cell) -> StageSpec:
    from alignment.config.data import DataConfig
    from alignment.config.overoptimisation import GuardConfig
    from alignment.config.replay import PtxConfig
    from alignment.config.scoring import ScorerConfig
    from tests.chained import DATA

    conversations = {"ptx.data": DATA / "conversations.jsonl"}
    guard = GuardConfig(every=1, prompts=2, scorer=ScorerConfig(source="length", target=3))
    ptx = PtxConfig(coefficient=0.1, batch_size=2, data=DataConfig(source="path:conversations", limit=4))
    settings = {"guard": guard, "ptx": ptx, "critic_warmup": 1, "max_approxkl": 10.0}
    return _rl(chained, cell, extra_data=conversations, **settings)


def _precomputed(chained: Chained, cell: Cell) -> StageSpec:
    return _trained(chained, cell, config=replace(_config("dpo", _adapter(cell.adapter)), precompute_reference=True))


def _validated(chained: Chained, cell: Cell) -> StageSpec:
    from alignment.config.validation import ValidationConfig

    validation = ValidationConfig(every=1, share=0.25, keep_best=True)
    return _trained(chained, cell, config=replace(_config("sft", _adapter(cell.adapter)), validation=validation))


def _distilled(chained: Chained, cell: Cell, **settings: Any) -> StageSpec:
    from alignment.stages.distil.config import Method
    from tests.generating import distil_spec

    settings = {
        "method": Method.sequence,
        "adapter": _adapter(cell.adapter),
        "timed_prompts": 0,
        "save_every": _NEVER,
        **settings,
    }
    return replace(distil_spec(chained.folder, **settings), **_changes(cell))


def _distilled_by_tokens(chained: Chained, cell: Cell) -> StageSpec:
    from alignment.stages.distil.config import Method

    return _distilled(chained, cell, method=Method.tokens, timed_prompts=2)


def _measured(chained: Chained, cell: Cell, config: Any, **changes: Any) -> StageSpec:
    """What a stage is told that measures an SFT of the base, which is trained here."""
    from tests.chained import LORA
    from tests.simulated_device.events import events
    from tests.tiny import tiny_spec

    sft = _trained(chained, Cell(stage="sft", dtype=cell.dtype), config=_config("sft", LORA))
    run_spec(sft)
    assert sft.artifact == _sft(chained).path
    events.clear()
    return tiny_spec(chained.folder, config, **{**_changes(cell), **changes})


def _sft(chained: Chained) -> Any:
    """A reference to the SFT that ``_measured`` trains."""
    from alignment.job import StageInput

    return StageInput(ref="stage:sft", path=chained.folder / "artifacts" / "sft-0123abcd")


def _sampled(chained: Chained, cell: Cell) -> StageSpec:
    from alignment.config.data import DataConfig
    from alignment.config.scoring import ScorerConfig
    from alignment.stages.sample.config import SampleConfig
    from tests.chained import DATA

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
    from alignment.config.data import DataConfig
    from alignment.config.evaluating import AnswersConfig
    from alignment.config.scoring import MetricConfig
    from alignment.job import StageInput
    from alignment.stages.evaluate.config import EvaluateConfig
    from tests.chained import DATA

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
    from alignment.config.data import DataConfig
    from alignment.stages.forgetting.config import ForgettingConfig
    from tests.chained import DATA

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
    from alignment.config.data import DataConfig
    from alignment.stages.reward_card.config import RewardCardConfig
    from tests.chained import DATA, LORA
    from tests.tiny import tiny_reward, tiny_spec

    changes = _changes(cell)
    reward = tiny_reward(chained.folder / "made", LORA, start=_base(chained), base_path=chained.base, **changes)
    config = RewardCardConfig(
        data=DataConfig(source=str(DATA), limit=8), max_length=4096, bootstrap_samples=50, invariance_pairs=2
    )
    inputs, pairs = {"reward": reward}, DATA / "preferences.jsonl"
    return tiny_spec(chained.folder, config, data_path=pairs, inputs=inputs, **changes)


_SPECS: dict[str, Callable[[Chained, Cell], StageSpec]] = {
    "ppo": _rl,
    "grpo": _without_critic,
    "ppo_shared": _shared_critic,
    "ppo_guarded": _guarded,
    "dpo_precomputed": _precomputed,
    "sft_validated": _validated,
    "distil": _distilled,
    "distil_tokens": _distilled_by_tokens,
    "sample": _sampled,
    "evaluate": _evaluated,
    "forgetting": _forgotten,
    "reward_card": _carded,
}


def usual_cells() -> list[Cell]:
    """Those of ``make test``: every kind of stage with LoRA, and some with every other adapter."""
    return [cell for cell in all_cells() if cell.adapter == "lora" or cell.stage in ADAPTED]


def all_cells() -> list[Cell]:
    """Every kind of stage with every adapter that it takes, its variants, and some in float32."""
    trained = [
        Cell(stage=stage, adapter=adapter)
        for stage in TRAINED
        for adapter in (*ADAPTERS, *(["bare"] if stage in ("sft", "ppo") else []))
    ]
    variants = [Cell(stage=stage) for stage in (*VARIANTS, *MEASURED)]
    return [*trained, *variants, *(Cell(stage=stage, dtype="float32") for stage in ("sft", "ppo"))]
