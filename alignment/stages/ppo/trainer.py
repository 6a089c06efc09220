"""PPO as a ``transformers.Trainer`` whose batches are rollouts that it makes itself. One trainer step is one optimiser
step on one minibatch; an update is ``ppo_epochs * num_minibatches`` steps, and the first of them samples new answers.
An update collects (rollouts.py), learns (learn.py) and reports (learn.py). A step loops over its micro-batches without
``accelerator.accumulate``, which would synchronise and step too often at the end of a dataloader. Checkpoints are made
between updates. There, weights, optimiser, step number and a few numbers (``_save_state``) are all that a resumed run
needs, because all randomness is derived from seed and step."""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignment.algos.ppo import AdaptiveKl, KlController, tied_groups
from alignment.config.launch import Engine
from alignment.core.errors import StageError
from alignment.models.assembly.modules import checkpoint_activations, recompute
from alignment.models.assembly.roles import Roles
from alignment.rewards.scorers import Rewards
from alignment.stages.ppo import learn
from alignment.stages.ppo.config import Advantage, PpoConfig
from alignment.stages.ppo.engine import EngineGap, RolloutEngine
from alignment.stages.ppo.experience import Answers, Experience, Partition, Samples
from alignment.stages.ppo.guard import Guard
from alignment.stages.ppo.kind import TIED_SHARE
from alignment.stages.ppo.learn import Learner, Ptx
from alignment.stages.ppo.objective import PolicyObjective, advantages_of
from alignment.stages.ppo.rollouts import Collector, Episodes, Rollouts, warn_of_equal_scores
from alignment.stages.ppo.step_metrics import UpdateMetrics
from alignment.training.context import StageContext
from alignment.training.optimizer import adamw
from alignment.training.shard_together import ShardedTrainer, put_sharded, shard_together
from alignment.training.sharding import gathered, leave_frozen_out, prepare

log = logging.getLogger(__name__)

FILE = "actor_critic.safetensors"
SAMPLES_DIFFER = (
    "the stage continues from its checkpoint, but the engine's answers depend on what else it samples at the time, "
    "so from here on they may differ from those of an uninterrupted run."
)


class PpoTrainer(ShardedTrainer):
    """Proximal policy optimisation with a clipped value function (Huang et al. 2024 for every detail), or without a
    critic (``Advantage``)."""

    def __init__(
        self,
        roles: Roles,
        config: PpoConfig,
        context: StageContext,
        *,
        episodes: Episodes,
        engine: RolloutEngine,
        rewards: Rewards,
        objective: PolicyObjective,
        kl_controller: KlController,
        args: TrainingArguments,
        ptx: Ptx | None = None,
        samples: Samples | None = None,
    ) -> None:
        self.roles = roles
        self.config = config
        self.context = context
        self.episodes = episodes
        self._objective = objective
        self.kl_controller = kl_controller
        self.kl_budget = KlBudget(config.guard.max_kl)
        where = f"stages.{context.spec.stage}.sampling"
        self._engine_gap = EngineGap(config.sampling, whole_answers=objective.whole_answers, where=where)
        self.samples = samples
        self.guard: Guard | None = None
        self.over_budget = False
        self.metrics = UpdateMetrics(self._gathered)
        self._experience: Experience | None = None
        self._update_ended = False
        self._skipped = False
        steps = range(args.max_steps * context.world_size)
        super().__init__(
            model=roles.actor_critic, args=args, train_dataset=list(steps), data_collator=lambda rows: {"step": rows}
        )
        self.accelerator.device_placement = False
        whole = functools.partial(gathered, self, roles.actor_critic)  # for sampling and scoring
        rollouts = Rollouts(roles, context, episodes=episodes, engine=engine, rewards=rewards, gathered=whole)
        self.collector = Collector(rollouts, rewards, config, end_ids=episodes.end_ids)
        self.learner = Learner(
            roles,
            config,
            context,
            objective=objective,
            episodes=episodes,
            ptx=ptx,
            metrics=self.metrics,
            accelerator=self.accelerator,
            autocast=self.compute_loss_context_manager,
        )
        # Once the learner and the rollouts have the roles:
        if config.optim.activation_checkpointing:
            for language_model in roles.trained_models():
                checkpoint_activations(language_model)
        prepare(roles.actor_critic, context, *roles.trained_models())
        if self.is_fsdp_enabled:
            shard_together(roles.actor_critic, roles.frozen_models(), self.accelerator.state.fsdp_plugin)

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        """Does nothing, because all roles are already on their device. With several processes on CPUs the device is
        named ``cpu:0`` here. Moving a role there would copy it, and roles would no longer share memory."""

    def _gathered(self, values: Tensor) -> Tensor:
        """``[processes, values]``; with one process they stay where they are."""
        if self.accelerator.num_processes == 1:
            return values[None]
        every: Tensor = self.accelerator.gather(values.to(self.args.device)[None])
        return every

    @property
    def rollouts(self) -> Rollouts:
        """The maker of rollout batches."""
        return self.collector.rollouts

    @property
    def steps_per_update(self) -> int:
        """The number of optimiser steps on one rollout batch."""
        return self.config.ppo_epochs * self.config.num_minibatches

    @property
    def updates_done(self) -> int:
        """How many updates were learned from; a last one that was only sampled, over the KL budget, does not count."""
        return (self.state.global_step - int(self.over_budget)) // self.steps_per_update

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Adam without weight decay; the critic may have its own learning rate."""
        optim = self.config.optim
        groups = self._trained_groups()
        weights = [weight for group in groups for weight in group["params"]]
        kind, arguments = adamw(weights, self.context, lr=optim.lr, eps=optim.adam_eps, moments=optim.moments)
        self.optimizer: torch.optim.Optimizer = kind(groups, **arguments, weight_decay=0.0)
        return self.optimizer

    def _trained_groups(self) -> list[dict[str, Any]]:
        optim, value = self.config.optim, self.roles.actor_critic.value
        groups = [{"params": _trained(self.roles.actor_critic.policy), "lr": optim.lr}]
        if value is not None:
            critic_lr = optim.lr if optim.critic_lr is None else optim.critic_lr
            groups.append({"params": _trained(value), "lr": critic_lr})
        return groups

    # ---- an update --------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Computes the gradients of one whole minibatch for the optimiser; the first step of an update samples first. A
        skipped minibatch leaves no gradients, so the optimiser changes nothing."""
        update, step_of_update = divmod(self.state.global_step, self.steps_per_update)
        model.eval()  # without dropout, which would make the ratio noisy
        recompute(model)
        if step_of_update == 0:
            self._begin(update)
        if self._experience is None:
            raise StageError(
                f"the checkpoint was made inside update {update} and cannot be continued",
                remedy="delete the stage's .work folder and run again",
            )
        minibatch = self.learner.minibatch(update, step_of_update)
        is_empty = not self._experience.partition.rows_of(minibatch)
        self._skipped = self.over_budget or self._update_ended or is_empty
        if not self._skipped:
            self._learn(model, self._experience, minibatch, update)
        if step_of_update == self.steps_per_update - 1:
            kl = self.metrics.values["objective/kl"]
            self.kl_controller = self.kl_controller.after(kl, self.episodes.per_update)
        return torch.zeros((), device=self.args.device)  # losses are reported as metrics

    def _begin(self, update: int) -> None:
        self._update_ended = False
        self.metrics.clear()
        self.context.progress("rollouts", update, self.config.updates)
        if self.guard is not None and update % self.config.guard.every == 0:
            started = time.monotonic()
            self.metrics.values |= self.guard.evaluate(update, self.rollouts)
            self.metrics.add_seconds("guard", time.monotonic() - started)
        self._experience = self._collect(update)
        if self.config.sampling.max_staleness and update + 1 < self.config.updates:
            self.rollouts.sample_ahead(update + 1)
        self.context.progress("training", update, self.config.updates)

    @torch.no_grad()
    def _collect(self, update: int) -> Experience:
        """Computed on the host, where answers and scores are: some numbers a token, and many reads."""
        batch, partition = self.collector.collect(update, self.metrics, functools.partial(self._partition, update))
        coefficient = self.kl_controller.coefficient
        advantages = advantages_of(
            self.config,
            scores=batch.scores,
            kl=batch.kl,
            values=batch.values,
            response_mask=batch.response_mask,
            kl_coefficient=0.0 if self._objective.kl_in_loss else coefficient,
        )
        learn.add_scores(self.metrics, batch)
        learn.add_episodes(
            self.metrics, batch, advantages, kl_coefficient=coefficient, base_copies=self.roles.base_copies()
        )
        importance = self._engine_gap.importance(batch, update, self.metrics)
        self._check(update, batch.scores)
        if self.samples is not None:
            self.samples.write(update, batch.rollout, batch.scores.tolist())
        experience = Experience(
            prompts=batch.rollout.prompts,
            answers=batch.rollout.answers,
            response_mask=batch.response_mask,
            logprobs=batch.logprobs,
            reference_logprobs=batch.reference_logprobs,
            values=batch.values,
            scores=batch.scores,
            advantages=advantages.learned,
            importance=importance,
            returns=advantages.returns,
            partition=partition,
            kl_coefficient=coefficient,
        )
        return experience.to(self.args.device)

    def _partition(self, update: int, answers: Answers, scores: Tensor) -> Partition:
        """Of the update's answers; prompts whose answers all score alike are not learned from if ties are dropped."""
        order = self.learner.order(update)
        if self.config.advantage is not Advantage.gae:
            tied = tied_groups(scores, self.episodes.group).tolist()
            self.metrics.values["objective/tied_prompts"] = float(sum(tied))
            self.metrics.values[TIED_SHARE] = sum(tied) / len(tied)
            order = [prompt for prompt in order if not (self.config.drop_ties and tied[prompt])]
        group, number = self.episodes.group, self.config.num_minibatches
        return self.rollouts.cut(answers, order, group=group, num_minibatches=number)

    def _check(self, update: int, scores: Tensor) -> None:
        kl = self.metrics.values["objective/kl"]
        self.over_budget = self.kl_budget.is_exceeded(kl)
        if not self.context.is_main:
            return
        warn_of_equal_scores(scores)
        if self.over_budget:
            log.warning(
                "the KL was above guard.max_kl twice in a row (now %.2f nats per sequence); the stage ends after %d "
                "updates.",
                kl,
                update,
            )

    def _learn(self, model: Any, experience: Experience, minibatch: int, update: int) -> None:
        started = time.monotonic()
        self.learner.learn(model, experience, minibatch, update=update, step=self.state.global_step)
        self.metrics.step_done()
        limit = self.config.max_approxkl
        if limit is not None:  # if the policy of this minibatch had moved too far, the remaining ones are skipped
            share = self.metrics.approximate_kl()
            self._update_ended = float(self._gathered(torch.tensor([share])).sum()) > limit
        self.metrics.add_seconds("learning", time.monotonic() - started)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the update's metrics to the trainer's own; there is one log line per update."""
        if "loss" in logs:
            logs.pop("loss")
            logs.update(self.metrics.result())
            if self._skipped:
                logs["grad_norm"] = 0.0  # DeepSpeed would report that of an earlier step
        super().log(logs, start_time)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Called after the optimiser is prepared, and before a checkpoint is loaded."""
        if self.is_deepspeed_enabled:
            leave_frozen_out(self.accelerator.deepspeed_engine_wrapped.engine)
        elif self.is_fsdp_enabled:
            put_sharded(self.optimizer, self._trained_groups())
        return super().create_scheduler(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """If weights are sharded, writes only our state; weights and optimiser state are written by shards."""
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            self._save_state(Path(output_dir or self.args.output_dir))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        self._save_state(folder)
        trained = {n: p.detach().contiguous() for n, p in self.roles.actor_critic.named_parameters() if p.requires_grad}
        save_file(trained, folder / FILE)

    def _save_state(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "kl_coefficient": self.kl_controller.coefficient,
            "rewards": self.collector.rewards.state(),
            "was_above_budget": self.kl_budget.was_above,
        }
        if self.guard is not None:
            state["guard"] = self.guard.save(folder)
        (folder / "ppo.json").write_text(json.dumps(state))

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = load_file(Path(resume_from_checkpoint) / FILE)
        for name, parameter in self.roles.actor_critic.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(saved[name])

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Trains; from a checkpoint, it first restores our state."""
        if resume_from_checkpoint is not None:
            self._restore_state(Path(resume_from_checkpoint))
            if self.config.sampling.engine is not Engine.own and self.context.is_main:
                log.warning(SAMPLES_DIFFER)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _restore_state(self, folder: Path) -> None:
        state = json.loads((folder / "ppo.json").read_text())
        if isinstance(self.kl_controller, AdaptiveKl):
            self.kl_controller = replace(self.kl_controller, coefficient=state["kl_coefficient"])
        self.collector.rewards.restore(state["rewards"])
        self.kl_budget.was_above = state["was_above_budget"]
        if self.guard is not None:
            self.guard.restore(folder, state["guard"])


def _trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@dataclass(eq=False)
class KlBudget:
    """The budget is exceeded when two batches in a row have a KL above ``limit`` (nats per sequence). The KL of a
    single batch is too noisy. ``was_above`` is whether the last batch was above; checkpoints store it."""

    limit: float | None
    was_above: bool = False

    def is_exceeded(self, kl: float) -> bool:
        """Whether the budget is exceeded after the next batch, whose mean KL is ``kl``."""
        is_above = self.limit is not None and kl > self.limit
        is_exceeded = is_above and self.was_above
        self.was_above = is_above
        return is_exceeded


class EndsOverBudget(TrainerCallback):
    """Ends the training when ``over_budget`` returns True; nothing was learned from the last batch."""

    def __init__(self, over_budget: Callable[[], bool]) -> None:
        self._over_budget = over_budget

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stops on all processes, because they have the same rollout batch."""
        if self._over_budget():
            control.should_log = True
            control.should_save = False  # checkpoints are made only between updates
            control.should_training_stop = True
