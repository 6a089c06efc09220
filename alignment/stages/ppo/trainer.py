"""PPO as a ``transformers.Trainer`` whose batches are rollouts that it makes itself.

One trainer step is one optimiser step on one minibatch; ``ppo_epochs * num_minibatches`` of them make an update, and
the first of these samples fresh answers. Micro-batches are looped over here, without ``accelerator.accumulate``, which
would synchronise and step too often at the end of a dataloader. Checkpoints fall on update boundaries, where nothing
but weights, optimiser, price of KL and step number is needed to go on: all randomness is derived from seed and step.
"""

from __future__ import annotations

import json
import logging
import math
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignment.algos.gae import advantages_and_returns, leave_one_out, token_rewards
from alignment.algos.kl import AdaptiveKl, FixedKl, k1, k3
from alignment.algos.masked import center_and_scale, scale_only
from alignment.algos.ppo import (
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    log_ratio,
    value_is_clipped,
)
from alignment.core.errors import StageError
from alignment.models.assembly.roles import Roles
from alignment.models.forward.answers import answer_stream, pieces_of, unwrapped
from alignment.rewards.slot import Rewards
from alignment.stages.ppo.config import PpoConfig
from alignment.training.adamw import adamw
from alignment.training.context import StageContext
from alignment.training.micro_batches import accumulating, as_many_as_most
from alignment.training.rl.engine import RolloutEngine
from alignment.training.rl.experience import Experience, Rollout, response_mask, rows_of, spread, stack
from alignment.training.rl.guard import Guard
from alignment.training.rl.ptx import Ptx
from alignment.training.rl.rollouts import Episodes, Rollouts
from alignment.training.rl.samples import Samples
from alignment.training.rl.step_metrics import UpdateFigures
from alignment.training.sharding import gathered, leave_frozen_out, prepare

log = logging.getLogger(__name__)

KlPrice = FixedKl | AdaptiveKl
START_KL_TOLERANCE = 0.02
"""Nats a sequence that bfloat16 may make of a KL of zero; a wrong reference is off by far more."""


class PpoTrainer(Trainer):
    """Proximal policy optimisation with a clipped value function (Huang et al. 2024 for every detail)."""

    def __init__(
        self,
        roles: Roles,
        config: PpoConfig,
        context: StageContext,
        *,
        episodes: Episodes,
        engine: RolloutEngine,
        rewards: Rewards,
        price: KlPrice,
        args: TrainingArguments,
        ptx: Ptx | None = None,
        samples: Samples | None = None,
    ) -> None:
        self.roles = roles
        self.config = config
        self.context = context
        self.episodes = episodes
        self.rewards = rewards
        self.price = price
        self.ptx = ptx
        self.samples = samples
        self.guard: Guard | None = None
        self.over_budget = False
        self._was_above_budget = False
        self._experience: Experience | None = None
        self._update_ended = False
        self._passed_over = False
        self.figures = UpdateFigures(self._gathered)
        steps = range(args.max_steps * context.world_size)
        super().__init__(
            model=roles.actor_critic, args=args, train_dataset=list(steps), data_collator=lambda rows: {"step": rows}
        )
        self.accelerator.device_placement = False
        self.rollouts = Rollouts(
            roles, context, episodes=episodes, engine=engine, rewards=rewards, gathered=self._gathered_roles
        )
        prepare(roles.actor_critic, context, *roles.trained_models())

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        """Nothing: all roles are on their device, and among several processes on CPUs that has another name here
        (``cpu:0``), to which torch copies whatever it moves: roles would no longer share memory."""

    def _gathered_roles(self) -> AbstractContextManager[None]:
        """Whole weights, to sample and score with."""
        return gathered(self, self.roles.actor_critic)

    @property
    def steps_per_update(self) -> int:
        """Optimiser steps on one rollout batch."""
        return self.config.ppo_epochs * self.config.num_minibatches

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Adam without weight decay; the critic may have a rate of its own."""
        optim = self.config.optim
        critic_lr = optim.lr if optim.critic_lr is None else optim.critic_lr
        groups = [
            {"params": _trained(self.roles.actor_critic.policy), "lr": optim.lr},
            {"params": _trained(self.roles.actor_critic.value), "lr": critic_lr},
        ]
        kind, arguments = adamw(self.config.adapter, optim, self.context)
        self.optimizer: torch.optim.Optimizer = kind(groups, **arguments, weight_decay=0.0)
        return self.optimizer

    @property
    def updates_done(self) -> int:
        """Updates that were learned from; one that was only sampled, and found to be over the budget, is none."""
        return (self.state.global_step - int(self.over_budget)) // self.steps_per_update

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One minibatch: gradients of the whole of it, ready for the optimiser. An update begins by sampling.

        A minibatch that is passed over leaves no gradients, and the optimiser then changes nothing.
        """
        update, place = divmod(self.state.global_step, self.steps_per_update)
        model.eval()  # dropout would make the ratio noisy; everything here runs without it
        if place == 0:
            self._begin(update)
        if self._experience is None:
            raise StageError(
                f"a checkpoint inside update {update} cannot be continued",
                remedy="delete the stage's .work folder and run again",
            )
        self._passed_over = self.over_budget or self._update_ended
        if not self._passed_over:
            self._learn(model, self._experience, update, place)
        if place == self.steps_per_update - 1:
            self.price = self.price.after(self.figures.values["objective/kl"], self.episodes.per_update)
        return torch.zeros((), device=self.args.device)  # losses are among the figures, by name

    def _begin(self, update: int) -> None:
        self._update_ended = False
        self.figures.clear()
        self.context.progress("rollouts", self.state.global_step, self.args.max_steps)
        if self.guard is not None and self.guard.due(update):
            started = time.monotonic()
            self.figures.values |= self.guard.look(update, self.rollouts)
            self.figures.add_seconds("guard", time.monotonic() - started)
        self._experience = self._collect(update)
        self.context.progress("training", self.state.global_step, self.args.max_steps)

    def _learn(self, model: Any, experience: Experience, update: int, place: int) -> None:
        epoch, minibatch = divmod(place, self.config.num_minibatches)
        order = torch.randperm(
            self.episodes.prompts_per_update, generator=self.context.generator("minibatches", update, epoch)
        ).tensor_split(self.config.num_minibatches)[minibatch]
        started = time.monotonic()
        policy_learns = update >= self.config.critic_warmup
        if self.ptx is not None and policy_learns:
            self._add_ptx(model)
        self._backward(model, experience, order.tolist(), policy_learns=policy_learns)
        if not policy_learns:
            for parameter in _trained(self.roles.policy):
                parameter.grad = None  # with zeros instead, Adam would count the step
        self._check_step(self.figures.step_done())
        self.figures.add_seconds("learning", time.monotonic() - started)

    def _add_ptx(self, model: Any) -> None:
        assert self.ptx is not None
        with accumulating(self.accelerator, model, last=False):
            share = self.ptx.add_gradients(unwrapped(self.roles.policy), self.state.global_step, self.accelerator)
        self.figures.add_share({"loss/ptx": share})

    def _check_step(self, share: float) -> None:
        """Where a minibatch saw a policy that was too far, the update's remaining ones are passed over."""
        limit = self.config.max_approxkl
        if limit is not None:
            self._update_ended = float(self._gathered(torch.tensor([share])).sum()) > limit

    # ---- sampling -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _collect(self, update: int) -> Experience:
        rollout = self.rollouts.of_update(update, self.figures)
        device = self.args.device
        mask = response_mask(rollout.answers, device)
        logprobs, values = stack(rollout.logprobs, mask), stack(rollout.values, mask)
        reference = stack(rollout.reference_logprobs, mask)
        by_scorer = rollout.scores.to(device)
        self.figures.values |= {f"score/{name}": float(each.mean()) for name, each in by_scorer.by_name().items()}
        self.rewards.observe(by_scorer)
        kept_scores = self.scores_of(rollout)
        ended = self._ended(rollout)
        kl = k1(logprobs, reference) * mask
        self._check_start(update, kl)
        self._check_scores(kept_scores)
        told = leave_one_out(kept_scores, self.episodes.group) if self.config.prompt_baseline else kept_scores
        rewards = token_rewards(told, kl, mask, kl_coefficient=self.price.coefficient)
        if self.config.whiten_rewards:
            rewards = scale_only(rewards, mask)
        raw, returns = advantages_and_returns(
            rewards, values, mask, gamma=self.config.gamma, gae_lambda=self.config.gae_lambda
        )
        self._log_episodes(
            kept_scores,
            ended,
            mask,
            {
                "objective/kl": kl,
                "objective/kl_k3": k3(logprobs, reference) * mask,
                "objective/entropy": stack(rollout.entropy, mask),
                "val/returns": returns,
                "val/advantages": raw,
                "val/values": values,
            },
        )
        self.figures.values["val/explained_variance"] = explained_variance(values, returns, mask)
        self._check_budget(update)
        if self.samples is not None:
            self.samples.keep(update, rollout, kept_scores.tolist())
        return Experience(
            prompts=rollout.prompts,
            answers=rollout.answers,
            response_mask=mask,
            logprobs=logprobs,
            values=values,
            scores=kept_scores,
            advantages=center_and_scale(raw, mask),
            returns=returns,
        )

    def scores_of(self, rollout: Rollout) -> Tensor:
        """``[rows]`` scores that PPO maximises: scorers put together, less the penalty of unended answers."""
        total = self.rewards.total(rollout.scores.to(self.args.device))
        return total - self.config.missing_eos_penalty * (~self._ended(rollout)).float()

    def _ended(self, rollout: Rollout) -> Tensor:
        ended = [answer[-1] in self.episodes.end_ids for answer in rollout.answers]
        return torch.tensor(ended, device=self.args.device)

    def _check_scores(self, scores: Tensor) -> None:
        """Without differences there is nothing to prefer; the update then only returns towards the reference."""
        self.figures.values["objective/score_std"] = float(scores.std(unbiased=False))
        if float(scores.max() - scores.min()) == 0.0 and self.context.is_main:
            log.warning(
                "all %d answers of this update score %g, so there is nothing to learn from them. If this goes on: look "
                "at samples.jsonl, raise max_new_tokens if no answer ends, or choose a scorer with more shades.",
                len(scores),
                float(scores[0]),
            )

    def _check_budget(self, update: int) -> None:
        """The KL of a single batch is noisy, so two in a row above the budget end the stage."""
        limit, kl = self.config.guard.max_kl, self.figures.values["objective/kl"]
        is_above = limit is not None and kl > limit
        self.over_budget = is_above and self._was_above_budget
        self._was_above_budget = is_above
        if self.over_budget and self.context.is_main:
            log.warning(
                "the KL was above guard.max_kl twice in a row, %.2f nats at last; the stage ends after %d updates.",
                kl,
                update,
            )

    def _check_start(self, update: int, kl: Tensor) -> None:
        """Policy and reference are the same before the first step."""
        worst = float(kl.sum(-1).abs().mean())
        if update == 0 and worst > START_KL_TOLERANCE:
            raise StageError(
                f"at step 0 the KL to the reference is {worst:.4f} nats a sequence, not 0: the reference is not the "
                "policy that the stage starts from",
                remedy="report this with the stage.yaml of the run; nothing was trained",
            )

    # ---- learning -------------------------------------------------------------------------------------------------

    def _backward(self, model: Any, experience: Experience, prompts: list[int], *, policy_learns: bool) -> None:
        """Sums over the minibatch divided by its tokens, across micro-batches and processes: never a mean of means."""
        group = self.episodes.group
        tokens = experience.response_mask[rows_of(prompts, group)].sum().float()
        world_size = self.context.world_size
        shares = [rows_of(prompts[rank::world_size], group) for rank in range(world_size)]
        rows = shares[self.context.rank]
        pieces = as_many_as_most([self._pieces(experience, share) for share in shares], self.context.rank)
        for number, piece in enumerate(pieces):
            # Processes meet in every piece; in one that is empty a row is read and counts for nothing.
            read, counted = ([rows[i] for i in piece], tokens) if piece else (rows[:1], tokens * math.inf)
            with accumulating(self.accelerator, model, last=number == len(pieces) - 1):
                with self.compute_loss_context_manager():
                    loss = self._loss(model, experience, read, counted, policy_learns=policy_learns)
                # DDP averages over processes; the sum over all of them is wanted.
                self.accelerator.backward(loss * world_size)

    def _pieces(self, experience: Experience, rows: list[int]) -> list[range]:
        told = [experience.prompts[row] for row in rows], [experience.answers[row] for row in rows]
        return pieces_of(*told, tokens=self.episodes.micro_batch_tokens)

    def _loss(
        self, model: Any, experience: Experience, rows: list[int], tokens: Tensor, *, policy_learns: bool
    ) -> Tensor:
        """A micro-batch's share, to be backpropagated and not read (``ActorCritic.forward``)."""
        width = max(len(experience.answers[row]) for row in rows)
        mask = experience.response_mask[rows, :width]
        part = answer_stream(
            [experience.prompts[row] for row in rows], [experience.answers[row] for row in rows], self.args.device
        )

        def value_loss(flat: Tensor) -> Tensor:
            old, returns = experience.values[rows, :width], experience.returns[rows, :width]
            values, clip = spread(flat, mask), self.config.value_clip
            loss = clipped_value_loss(values, old, returns, mask, clip=clip) / tokens
            clipped = (value_is_clipped(values.detach(), old, returns, clip=clip) * mask).sum() / tokens
            self.figures.add_share({"loss/value": loss.detach(), "val/clipfrac": clipped})
            return self.config.value_coefficient * loss

        statistics, loss = model(part, self.episodes.temperature, value_loss, policy_learns=policy_learns)
        change = log_ratio(spread(statistics.logprobs, mask), experience.logprobs[rows, :width])
        advantages = experience.advantages[rows, :width]
        policy_loss = clipped_policy_loss(change.exp(), advantages, mask, clip=self.config.clip) / tokens
        self._log_minibatch(policy_loss.detach(), change.detach(), statistics.entropy, mask, tokens)
        # Gradients of 0 rather than none: DDP waits for those of every parameter.
        return float(policy_learns) * policy_loss + loss

    def _gathered(self, values: Tensor) -> Tensor:
        """``[processes, values]``."""
        found: Tensor = self.accelerator.gather(values.to(self.args.device)[None])
        return found

    # ---- figures --------------------------------------------------------------------------------------------------

    def _log_episodes(self, scores: Tensor, ended: Tensor, mask: Tensor, named: dict[str, Tensor]) -> None:
        """Sums over tokens become means over episodes; the rest are means over counted tokens."""
        summed = ("objective/kl", "objective/kl_k3")
        episodes = {name: named[name].sum(-1) for name in summed}
        # What is maximised, before any baseline or scaling.
        episodes["objective/rlhf_reward"] = scores - self.price.coefficient * episodes["objective/kl"]
        episodes |= {"objective/score": scores, "eos_rate": ended.float(), "response_length": mask.sum(-1).float()}
        self.figures.add_means(episodes, torch.ones_like(scores))
        self.figures.add_means({name: values for name, values in named.items() if name not in summed}, mask)
        self.figures.values["objective/kl_coef"] = self.price.coefficient
        self.figures.values["memory/base_copies"] = self.roles.base_copies()

    @torch.no_grad()
    def _log_minibatch(
        self, policy_loss: Tensor, change: Tensor, entropy: Tensor, mask: Tensor, tokens: Tensor
    ) -> None:
        ratio = change.exp()
        clipped = ((ratio - 1.0).abs() > self.config.clip).float()
        self.figures.add_share(
            {
                "loss/policy": policy_loss,
                "policy/approxkl": (0.5 * change**2 * mask).sum() / tokens,
                "policy/clipfrac": (clipped * mask).sum() / tokens,
                "policy/entropy": entropy.sum() / tokens,
                "val/ratio": (ratio * mask).sum() / tokens,
            }
        )
        self.figures.add_maximum("val/ratio_max", (ratio * mask).max())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the update's figures to the trainer's own; one line an update."""
        if "loss" in logs:
            logs.pop("loss")
            logs.update(self.figures.result())
            if self._passed_over:
                logs["grad_norm"] = 0.0  # DeepSpeed tells the last one
        super().log(logs, start_time)

    # ---- price of KL and checkpoints ------------------------------------------------------------------------------

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Follows right after DeepSpeed's engine is made, and comes before a checkpoint is loaded into it."""
        if self.is_deepspeed_enabled:
            leave_frozen_out(self.accelerator.deepspeed_engine_wrapped.engine)
        return super().create_scheduler(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """DeepSpeed writes weights with the optimiser's state, and every process its share."""
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            self._save_state(Path(output_dir or self.args.output_dir))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """What is trained and the price of KL; frozen weights are the base's and are not copied."""
        folder = Path(output_dir or self.args.output_dir)
        self._save_state(folder)
        save_file(
            {
                name: p.detach().contiguous()
                for name, p in self.roles.actor_critic.named_parameters()
                if p.requires_grad
            },
            folder / "actor_critic.safetensors",
        )

    def _save_state(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "kl_coefficient": self.price.coefficient,
            "rewards": self.rewards.state(),
            "was_above_budget": self._was_above_budget,
        }
        if self.guard is not None:
            state["guard"] = self.guard.save(folder)
        (folder / "ppo.json").write_text(json.dumps(state))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / "actor_critic.safetensors")
        with torch.no_grad():
            for name, parameter in self.roles.actor_critic.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(saved[name])

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As every trainer does, from a checkpoint with the state of what is no model."""
        if resume_from_checkpoint is not None:
            self._restore_state(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _restore_state(self, folder: Path) -> None:
        state = json.loads((folder / "ppo.json").read_text())
        if isinstance(self.price, AdaptiveKl):
            self.price = replace(self.price, coefficient=state["kl_coefficient"])
        self.rewards.restore(state["rewards"])
        self._was_above_budget = state["was_above_budget"]
        if self.guard is not None:
            self.guard.restore(folder, state["guard"])


class EndsOverBudget(TrainerCallback):
    """Ends the training where the policy went further from the reference than it may; nothing more was learned."""

    def __init__(self, trainer: PpoTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """All processes have the same rollout batch, so they agree."""
        if self._trainer.over_budget:
            control.should_log = True
            control.should_save = False  # inside an update
            control.should_training_stop = True


def _trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
