"""Faults of one optimiser step of PPO: its loss, its rewards, its critic's start, and how processes cut it."""

from __future__ import annotations

from tests.mutations.mutation import in_file

PPO = "unit/training/test_ppo.py"
STEP, PAPERS = "unit/training/test_ppo_step.py", "test_a_step_is_what_the_papers_say"

MUTATIONS = [
    *in_file(
        "stages/ppo/learn.py",
        STEP,
        ("values are never clipped", "mask, clip=clip) / tokens", "mask, clip=1e9 * clip) / tokens", PAPERS),
        ("value_coefficient is ignored", "return self._options.value_coefficient * loss", "return loss", PAPERS),
        ("the policy does not learn", "float(policy_learns) * loss.total", "0.0 * loss.total", PAPERS),
        (
            "returns are advantages",
            "old, returns = experience.values[rows, :width], experience.returns[rows, :width]",
            "old, returns = experience.values[rows, :width], experience.advantages[rows, :width]",
            PAPERS,
        ),
    ),
    *in_file(
        "training/rl/policy_objective.py",
        STEP,
        (
            "the policy's ratio is never clipped",
            "clip=self.clip, clip_high=self.clip_high)",
            "clip=1e9 * self.clip, clip_high=1e9 * self.clip_high)",
            PAPERS,
        ),
        (
            "the ratio is one",
            "change = log_ratio(logprobs, sampled.logprobs)",
            "change = log_ratio(logprobs, logprobs.detach())",
            PAPERS,
        ),
        (
            "a minibatch's sums are divided by its rows",
            "return response_mask.sum().float()",
            "return response_mask.any(-1).sum().float()",
            PAPERS,
        ),
    ),
    *in_file(
        "training/rl/advantages.py",
        STEP,
        ("rewards are never whitened", "if self.whiten_rewards:", "if False:", PAPERS),
        ("gamma is ignored", "gamma=self.gamma,", "gamma=1.0,", PAPERS),
        ("lambda is ignored", "gae_lambda=self.gae_lambda", "gae_lambda=1.0", PAPERS),
    ),
    *in_file(
        "stages/ppo/trainer.py",
        STEP,
        (
            "the KL costs nothing",
            "kl_coefficient=0.0 if self._objective.kl_in_loss else coefficient",
            "kl_coefficient=0.0",
            PAPERS,
        ),
    ),
    *in_file(
        "stages/ppo/collect.py",
        STEP,
        ("the KL is paid out", "kl = k1(logprobs, reference) * mask", "kl = k1(reference, logprobs) * mask", PAPERS),
    ),
    *in_file(
        "stages/ppo/penalties.py",
        STEP,
        ("an answer without an end costs nothing", "- self.missing_eos *", "- 0.0 *", PAPERS),
        ("an answer with an end costs the penalty", "(~ended).float()", "ended.float()", PAPERS),
    ),
    *in_file(
        "stages/ppo/methods.py",
        STEP,
        (
            "the ratio's clip never arrives",
            "        clip=config.clip,",
            "        clip=1e9 * config.clip,",
            PAPERS,
        ),
        ("the discount is lambda", "gamma=config.gamma,", "gamma=config.gae_lambda,", PAPERS),
    ),
    *in_file(
        "stages/ppo/trainer_setup.py",
        STEP,
        (
            "PPO's gradients are never clipped",
            "max_grad_norm=config.optim.max_grad_norm,",
            "max_grad_norm=1e9 * config.optim.max_grad_norm,",
            PAPERS,
        ),
    ),
    *in_file(
        "stages/ppo/methods.py",
        PPO,
        (
            "the prompt baseline is never asked for",
            "baseline_group=config.completions_per_prompt if config.prompt_baseline else None",
            "baseline_group=None",
            "test_with_a_prompt_baseline_rewards_are_relative_to_the_other_completions",
        ),
    ),
    *in_file(
        "stages/ppo/trainer_setup.py",
        PPO,
        (
            "a critic starts at the reward model's scores whatever comes back",
            "values_are_scores=_returns_are_scores(config)",
            "values_are_scores=True",
            "test_the_critic_starts_at_the_reward_models_scores_where_returns_are_these_and_else_at_zero",
        ),
        (
            "a critic never starts at the reward model's scores",
            "values_are_scores=_returns_are_scores(config)",
            "values_are_scores=False",
            "test_the_critic_starts_at_the_reward_models_scores_where_returns_are_these_and_else_at_zero",
        ),
    ),
    *in_file(
        "training/micro_batches.py",
        "unit/training/test_micro_batches.py",
        (
            "a process cuts as it likes",
            "divided(shares[rank], max(1, *(len(micro_batches) for micro_batches in shares)))",
            "shares[rank]",
            "test_cut_further_no_piece_grows_and_no_row_is_lost",
        ),
        (
            "rows of a piece that is cut further are learned from twice",
            "[range(start, middle), range(middle, end)]",
            "[range(start, middle), range(start, end)]",
            "test_cut_further_no_piece_grows_and_no_row_is_lost",
        ),
    ),
]
