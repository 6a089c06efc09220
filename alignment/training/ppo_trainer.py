"""PPO as a ``transformers.Trainer`` whose batches are rollouts that it makes itself.

One trainer step is one optimiser step on one minibatch; ``ppo_epochs * num_minibatches`` of them make an update, and
the first of these samples fresh answers. Micro-batches are looped over here, without ``accelerator.accumulate``, which
would synchronise and step too often at the end of a dataloader. Checkpoints fall on update boundaries, where nothing
but weights, optimiser, price of KL and step number is needed to go on: all randomness is derived from seed and step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainingArguments

from alignment.algos.gae import advantages_and_returns, leave_one_out, token_rewards
from alignment.algos.kl import AdaptiveKl, FixedKl, k1, k3
from alignment.algos.masked import center_and_scale, scale_only
from alignment.algos.ppo import clipped_policy_loss, clipped_value_loss, explained_variance, log_ratio
from alignment.config.stage import PpoConfig
from alignment.errors import StageError
from alignment.models.answers import answer_statistics, answer_stream, batches, pieces_of, scalar_scores, unwrapped
from alignment.models.generate import Sampling, generate
from alignment.models.roles import Roles
from alignment.training.context import StageContext
from alignment.training.experience import (
    Experience,
    Rollout,
    interleave,
    prompt_order,
    response_mask,
    rows_of,
    spread,
    stack,
)
from alignment.training.micro_batches import accumulating
from alignment.training.ppo_figures import UpdateFigures

KlPrice = FixedKl | AdaptiveKl
START_KL_TOLERANCE = 0.02
"""Nats a sequence that bfloat16 may make of a KL of zero; a wrong reference is off by far more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Episodes:
    """How episodes are made: from which prompts, how answers end, and how many an update, over all processes.

    ``group`` answers are sampled to each prompt; they stay together, so that their prompt is computed once.
    ``micro_batch_tokens`` are learned from at once; a process samples its whole share at once.
    """

    prompts: Sequence[Sequence[int]]
    end_id: int
    per_update: int
    group: int
    micro_batch_tokens: int

    @property
    def prompts_per_update(self) -> int:
        """Distinct draws from the prompts in one update."""
        return self.per_update // self.group


class PpoTrainer(Trainer):
    """Proximal policy optimisation with a clipped value function (Huang et al. 2024 for every detail)."""

    def __init__(
        self,
        roles: Roles,
        config: PpoConfig,
        context: StageContext,
        *,
        episodes: Episodes,
        price: KlPrice,
        args: TrainingArguments,
    ) -> None:
        self.roles = roles
        self.config = config
        self.context = context
        self.episodes = episodes
        self.price = price
        self._experience: Experience | None = None
        self.figures = UpdateFigures(self._summed)
        steps = range(args.max_steps * context.world_size)
        super().__init__(
            model=roles.actor_critic, args=args, train_dataset=list(steps), data_collator=lambda rows: {"step": rows}
        )

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
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            groups, lr=optim.lr, eps=optim.adam_eps, weight_decay=0.0
        )
        return self.optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One minibatch: gradients of the whole of it, ready for the optimiser. An update begins by sampling."""
        update, place = divmod(self.state.global_step, self.steps_per_update)
        model.eval()  # dropout would make the ratio noisy; everything here runs without it
        if place == 0:
            self._experience = self._collect(update)
        if self._experience is None:
            raise StageError(
                f"a checkpoint inside update {update} cannot be continued",
                remedy="delete the stage's .work folder and run again",
            )
        epoch, minibatch = divmod(place, self.config.num_minibatches)
        order = torch.randperm(
            self.episodes.prompts_per_update, generator=self.context.generator("minibatches", update, epoch)
        ).tensor_split(self.config.num_minibatches)[minibatch]
        started = time.monotonic()
        loss = self._backward(model, self._experience, order.tolist())
        self.figures.step_done()
        self.figures.add_seconds("learning", time.monotonic() - started)
        if place == self.steps_per_update - 1:
            self.price = self.price.after(self.figures.values["objective/kl"], self.episodes.per_update)
        return loss

    # ---- sampling -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _collect(self, update: int) -> Experience:
        self.figures.clear()
        rollout = self._rollout(update)
        device = self.args.device
        mask = response_mask(rollout.answers, device)
        logprobs, values = stack(rollout.logprobs, mask), stack(rollout.values, mask)
        reference = stack(rollout.reference_logprobs, mask)
        scores = torch.tensor(rollout.scores, device=device)
        ended = torch.tensor([answer[-1] == self.episodes.end_id for answer in rollout.answers], device=device)
        kept_scores = torch.where(ended, scores, torch.full_like(scores, self.config.missing_eos_score))
        kl = k1(logprobs, reference) * mask
        self._check_start(update, kl)
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
                "objective/rlhf_reward": rewards,
                "objective/entropy": stack(rollout.entropy, mask),
                "val/returns": returns,
                "val/advantages": raw,
                "val/values": values,
            },
        )
        self.figures.values["val/explained_variance"] = explained_variance(values, returns, mask)
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

    def _rollout(self, update: int) -> Rollout:
        """The whole batch on every process: each makes its share, then all are put together."""
        prompts, answers = self._sample(update)
        started = time.monotonic()
        lengths = [len(answer) for answer in answers]

        def rows(flat: Tensor) -> list[Tensor]:
            return list(flat.float().cpu().split(lengths))

        with self.accelerator.autocast():
            logprobs, entropy, values = self._policy_and_values(prompts, answers)
            share = Rollout(
                prompts=prompts,
                answers=answers,
                logprobs=rows(logprobs),
                reference_logprobs=rows(self._reference_logprobs(prompts, answers)),
                entropy=rows(entropy),
                values=rows(values),
                scores=self._scores(prompts, answers).tolist(),
            )
        whole = interleave(gather_object([share]), group=self.episodes.group)
        self.figures.add_seconds("scoring", time.monotonic() - started)
        return whole

    def _sample(self, update: int) -> tuple[list[list[int]], list[list[int]]]:
        """This process's share of the update's episodes; the whole batch does not depend on how many share it."""
        started = time.monotonic()
        rank, world = self.context.rank, self.context.world_size
        group, number = self.episodes.group, self.episodes.prompts_per_update
        order = prompt_order(
            len(self.episodes.prompts),
            update * number,
            number,
            lambda round_: self.context.generator("prompts", round_),
        )
        uniforms = torch.rand(
            self.episodes.per_update,
            self.config.max_new_tokens,
            generator=self.context.generator("sampling", update),
            dtype=torch.float64,
        )
        mine = range(rank, number, world)
        prompts = [list(self.episodes.prompts[order[i]]) for i in mine for _ in range(group)]
        self.context.progress("rollouts", self.state.global_step, self.args.max_steps)
        with self.accelerator.autocast():
            answers = generate(
                unwrapped(self.roles.policy),
                prompts,
                max_new_tokens=self.config.max_new_tokens,
                end_ids=[self.episodes.end_id],
                batch_size=len(prompts),
                sampling=Sampling(temperature=self.config.temperature, uniforms=uniforms[rows_of(mine, group)]),
            )
        self.figures.add_seconds("rollouts", time.monotonic() - started)
        return prompts, answers

    def _policy_and_values(self, prompts: Any, answers: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities recomputed by the training forward: those of sampling drift in low precision."""
        parts = [self.roles.actor_critic(part, self.config.temperature) for part in self._parts(prompts, answers)]
        statistics = [statistics for statistics, _ in parts]
        return (
            torch.cat([found.logprobs for found in statistics]),
            torch.cat([found.entropy for found in statistics]),
            torch.cat([values for _, values in parts]),
        )

    def _reference_logprobs(self, prompts: Any, answers: Any) -> Tensor:
        with self.roles.reference() as reference:
            found = [
                answer_statistics(reference, part, temperature=self.config.temperature).logprobs
                for part in self._parts(prompts, answers)
            ]
        return torch.cat(found)

    def _scores(self, prompts: Any, answers: Any) -> Tensor:
        return torch.cat([scalar_scores(self.roles.reward, part.rows) for part in self._parts(prompts, answers)])

    def _parts(self, prompts: Any, answers: Any) -> Any:
        return batches(prompts, answers, tokens=self.episodes.micro_batch_tokens, device=self.args.device)

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

    def _backward(self, model: Any, experience: Experience, prompts: list[int]) -> Tensor:
        """Sums over the minibatch divided by its tokens, across micro-batches and processes: never a mean of means."""
        group = self.episodes.group
        tokens = experience.response_mask[rows_of(prompts, group)].sum().float()
        rows = rows_of(prompts[self.context.rank :: self.context.world_size], group)
        total = torch.zeros((), device=self.args.device)
        told = [experience.prompts[row] for row in rows], [experience.answers[row] for row in rows]
        pieces = pieces_of(*told, tokens=self.episodes.micro_batch_tokens)
        for number, piece in enumerate(pieces):
            with accumulating(self.accelerator, model, last=number == len(pieces) - 1):
                with self.compute_loss_context_manager():
                    policy_loss, value_loss = self._losses(model, experience, [rows[i] for i in piece], tokens)
                    loss = policy_loss + self.config.value_coefficient * value_loss
                # DDP averages over processes; the sum over all of them is wanted.
                self.accelerator.backward(loss * self.context.world_size)
            total += loss.detach()
        return total

    def _losses(self, model: Any, experience: Experience, rows: list[int], tokens: Tensor) -> tuple[Tensor, Tensor]:
        width = max(len(experience.answers[row]) for row in rows)
        mask = experience.response_mask[rows, :width]
        part = answer_stream(
            [experience.prompts[row] for row in rows], [experience.answers[row] for row in rows], self.args.device
        )
        statistics, flat_values = model(part, self.config.temperature)
        logprobs, values = spread(statistics.logprobs, mask), spread(flat_values, mask)
        change = log_ratio(logprobs, experience.logprobs[rows, :width])
        advantages = experience.advantages[rows, :width]
        policy_loss = clipped_policy_loss(change.exp(), advantages, mask, clip=self.config.clip) / tokens
        value_loss = (
            clipped_value_loss(
                values,
                experience.values[rows, :width],
                experience.returns[rows, :width],
                mask,
                clip=self.config.value_clip,
            )
            / tokens
        )
        losses = {"loss/policy": policy_loss.detach(), "loss/value": value_loss.detach()}
        self._log_minibatch(losses, change.detach(), statistics.entropy, mask, tokens)
        return policy_loss, value_loss

    def _summed(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Each value summed over processes."""
        stacked = torch.stack([value.to(self.args.device) for value in values])
        return tuple(self.accelerator.reduce(stacked, reduction="sum").unbind())

    # ---- figures --------------------------------------------------------------------------------------------------

    def _log_episodes(self, scores: Tensor, ended: Tensor, mask: Tensor, named: dict[str, Tensor]) -> None:
        """Sums over tokens become means over episodes; the rest are means over counted tokens."""
        summed = ("objective/kl", "objective/kl_k3", "objective/rlhf_reward")
        episodes = {name: named[name].sum(-1) for name in summed}
        episodes |= {"objective/score": scores, "eos_rate": ended.float(), "response_length": mask.sum(-1).float()}
        self.figures.add_means(episodes, torch.ones_like(scores))
        self.figures.add_means({name: values for name, values in named.items() if name not in summed}, mask)
        self.figures.values["objective/kl_coef"] = self.price.coefficient

    @torch.no_grad()
    def _log_minibatch(
        self, losses: dict[str, Tensor], change: Tensor, entropy: Tensor, mask: Tensor, tokens: Tensor
    ) -> None:
        ratio = change.exp()
        clipped = ((ratio - 1.0).abs() > self.config.clip).float()
        self.figures.add_share(
            {
                **losses,
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
            logs.pop("loss")  # the trainer's sum of two losses over several steps says nothing
            logs.update(self.figures.result())
        super().log(logs, start_time)

    # ---- price of KL and checkpoints ------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """What is trained and the price of KL; frozen weights are the base's and are not copied."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {
                name: p.detach().contiguous()
                for name, p in self.roles.actor_critic.named_parameters()
                if p.requires_grad
            },
            folder / "actor_critic.safetensors",
        )
        (folder / "ppo.json").write_text(json.dumps({"kl_coefficient": self.price.coefficient}))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / "actor_critic.safetensors")
        with torch.no_grad():
            for name, parameter in self.roles.actor_critic.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(saved[name])
        coefficient = json.loads((Path(resume_from_checkpoint) / "ppo.json").read_text())["kl_coefficient"]
        if isinstance(self.price, AdaptiveKl):
            self.price = AdaptiveKl(coefficient=coefficient, target=self.price.target, horizon=self.price.horizon)


def _trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
