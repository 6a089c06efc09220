"""A stage ends on numbers that are not finite and on a training that diverged, and keeps nothing of them."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from transformers import TrainerControl, TrainingArguments

from alignment import worker
from alignment.core.errors import NonFiniteError, StageError
from alignment.records.training import MetricsLog
from alignment.stages.distil import run as distil
from alignment.stages.dpo import run as dpo
from alignment.stages.ppo.run import _save_critic
from alignment.stages.reward import run as reward
from alignment.stages.shared import language_model
from alignment.stages.shared.result import save_model
from alignment.training.callbacks import Checkpoints, StepLog
from alignment.training.checkpoints import newest
from alignment.training.context import StageContext
from alignment.training.finite import FiniteSteps, refuse_divergence, refuse_weights
from tests.chained import FULL, LORA, Chained
from tests.generating import distil_spec
from tests.tiny import tiny_model
from tests.unit.training.conftest import at_step


def trainer(norm: Any = None, **attributes: Any) -> Any:
    return SimpleNamespace(_get_grad_norm=lambda model, grad_norm=None: norm, **attributes)


def before_step_8(arguments: TrainingArguments, trainer: Any, model: Any = None) -> None:
    steps = FiniteSteps(trainer)
    steps.on_train_begin(arguments, at_step(0), TrainerControl())
    trainer._get_grad_norm(model)
    steps.on_pre_optimizer_step(arguments, at_step(7), TrainerControl(), model=model or torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("value", "clips", "named"),
    [
        (math.nan, False, r"1\.weight"),
        (-math.inf, False, r"1\.weight"),
        (math.nan, True, "their norm is nan"),  # clipping makes NaN of all gradients, so no parameter is blamed
        (3e38, True, "their norm is inf"),  # every gradient is zero after it
    ],
)
def test_a_gradient_that_is_not_finite_stops_before_the_step(
    arguments: TrainingArguments, value: float, clips: bool, named: str
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    model(torch.ones(1, 2)).sum().backward()
    model[1].weight.grad[0] = value
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) if clips else None
    with pytest.raises(NonFiniteError, match=rf"gradient is not finite at optimiser step 8 \({named}\)") as caught:
        before_step_8(arguments, trainer(norm), model)
    assert caught.value.exit_code == 6


def test_finite_and_missing_gradients_pass(arguments: TrainingArguments) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1).requires_grad_(False))
    model(torch.ones(1, 2)).sum().backward()
    for norm in (None, 3.0, torch.tensor(3.0)):
        before_step_8(arguments, trainer(norm, step_loss=torch.tensor(2.0)), model)


@pytest.mark.parametrize(("norm", "stops"), [(None, False), (3.0, False), (math.nan, True)])
def test_of_deepspeed_the_norm_of_the_gradients_tells(
    arguments: TrainingArguments, norm: float | None, stops: bool
) -> None:
    engine = SimpleNamespace(get_global_grad_norm=lambda: norm)
    with pytest.raises(NonFiniteError, match="step 8") if stops else contextlib.nullcontext():
        before_step_8(arguments, trainer(deepspeed=engine))


def test_a_model_that_has_no_gradient_left_stops_unless_nothing_is_left_to_learn(arguments: TrainingArguments) -> None:
    with pytest.raises(StageError, match=r"zero at optimiser step 8 with a loss of 5\.8"):
        before_step_8(arguments, trainer(0.0, step_loss=torch.tensor(5.8)))
    before_step_8(arguments, trainer(0.0, step_loss=torch.tensor(0.0)))
    before_step_8(arguments, trainer(0.0))  # PPO: every ratio may be clipped


def test_a_weight_may_be_as_large_as_its_type_allows() -> None:
    """The sum of their squares is not finite. A parameter may be empty where weights are sharded."""
    largest = torch.full((3,), torch.finfo(torch.float32).max)
    refuse_weights([("a", largest), ("b", torch.empty(0)), ("c", (-largest / 2).bfloat16())])
    with pytest.raises(NonFiniteError, match=r"a weight is not finite \(c\)"):
        refuse_weights([("a", largest), ("b", torch.empty(0)), ("c", torch.tensor([1.0, -math.inf]))])


@pytest.mark.parametrize(
    ("name", "value"),
    [("loss", math.nan), ("loss/value", math.inf), ("grad_norm", -math.inf), ("validation/loss", math.nan)],
)
def test_a_logged_figure_that_is_not_finite_is_written_and_stops(
    arguments: TrainingArguments, context: StageContext, name: str, value: float
) -> None:
    log = MetricsLog(context.content / "metrics.jsonl")
    callback = StepLog(context, log, headline="loss", period=1)
    with pytest.raises(NonFiniteError, match=f"{name} is .* at step 3"):
        callback.on_log(arguments, at_step(3), TrainerControl(), logs={"loss": 1.0, name: value})
    assert not math.isfinite(log.last()[name])
    callback.on_log(arguments, at_step(4), TrainerControl(), logs={"loss": 1.0, "val/explained_variance": math.nan})


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        ([2.0, 9.0, 11.0, 12.0, 12.0, 12.0], True),
        ([2.0, 1.9, 30.0], True),
        ([2.0, 1.9, 30.0, 1.9, 1.9, 1.9], False),
        ([2.0, 1.0, 1.0, 1.0, 1.0, 99.0], False),
        ([14.0, 12.0], False),
        ([], False),
    ],
    ids=str,
)
def test_a_loss_that_rose_above_a_guess_is_no_result(losses: list[float], diverged: bool) -> None:
    with pytest.raises(StageError, match="diverged") if diverged else contextlib.nullcontext():
        refuse_divergence(losses, ceiling=10.0)


def test_weights_that_are_not_finite_are_not_saved(context: StageContext) -> None:
    """No loss is computed after the last step."""
    model, critic = tiny_model(), torch.nn.Linear(2, 1)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = math.nan
    with pytest.raises(NonFiniteError, match=r"weight is not finite \(model\.layers\.1\.mlp"):
        save_model(model, None, context, None, {})  # type: ignore[arg-type]
    critic.weight.data[0, 1] = -math.inf
    with pytest.raises(NonFiniteError, match=r"weight is not finite \(weight\)"):
        _save_critic(critic, context)
    assert not list(context.content.iterdir())


def test_a_checkpoint_with_a_weight_that_is_not_finite_never_counts(
    context: StageContext, arguments: TrainingArguments
) -> None:
    """The step's own loss and gradients were finite, so only a look at the weights can tell."""
    model = torch.nn.Linear(2, 2)
    for step in (1, 2):
        if step == 2:
            model.weight.data[1, 0] = math.inf
        (context.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
        (context.checkpoints / f"checkpoint-{step}/weights").write_text("w")
        with pytest.raises(NonFiniteError) if step == 2 else contextlib.nullcontext():
            Checkpoints(context).on_save(arguments, at_step(step), TrainerControl(), model=model)
    assert newest(context.checkpoints, fingerprint=context.spec.fingerprint) == context.checkpoints / "checkpoint-1"


def test_what_fills_up_the_last_share_of_a_sharded_weight_is_not_looked_at(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's shares are equally long; seven numbers on three processes leave two behind the last one's own."""
    weight = torch.nn.Parameter(torch.empty(0))
    weight.ds_numel, weight.ds_tensor = 7, torch.tensor([1.0, math.nan, math.inf])
    for rank, passes in ((2, True), (1, False)):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        with contextlib.nullcontext() if passes else pytest.raises(NonFiniteError):
            refuse_weights([("weight", weight)])


def test_an_infinite_loss_of_finite_slope_ends_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(reward.MicroBatchedRewardTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) + math.inf

    monkeypatch.setattr(reward, "MicroBatchedRewardTrainer", Broken)
    with pytest.raises(NonFiniteError, match="the loss is inf at optimiser step 1"):
        Chained(tmp_path).run("reward", FULL)


def test_scores_that_are_not_finite_end_a_reward_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are finite, and so are its losses."""

    def scores(trainer: Any, context: StageContext, prompts: Any, answers: Any) -> torch.Tensor:
        return torch.full((len(answers),), math.nan)

    monkeypatch.setattr(reward, "scores", scores)
    with pytest.raises(NonFiniteError, match="score_offset is nan after the last step"):
        Chained(tmp_path).run("reward", LORA)
    assert not list(tmp_path.glob("artifacts/*/manifest.json"))


class _Begun(Exception):
    def __init__(self, ceiling: float) -> None:
        super().__init__()
        self.ceiling = ceiling


@pytest.mark.parametrize(
    ("kind", "module", "ceiling"),
    [
        ("sft", language_model, math.log(330)),
        ("distil", distil, math.log(330)),
        ("reward", reward, 10 * math.log(2)),
        ("dpo", dpo, 10 * math.log(2)),
    ],
    ids=["sft", "distil", "reward", "dpo"],
)
def test_a_stage_has_diverged_above_the_loss_of_a_guess(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, module: ModuleType, ceiling: float
) -> None:
    """Among the 330 tokens of the tiny model; between two answers, above ten times that of a guess."""

    def train(*_: Any, ceiling: float = math.inf, **__: Any) -> NoReturn:
        raise _Begun(ceiling)

    monkeypatch.setattr(module, "train", train)
    spec = distil_spec(tmp_path, eval_fraction=0.0) if kind == "distil" else Chained(tmp_path).spec(kind, LORA)
    with pytest.raises(_Begun) as begun:
        worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    assert begun.value.ceiling == pytest.approx(ceiling)
