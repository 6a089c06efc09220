"""PPO: its trainer, its rollouts, the guard and language modelling beside it."""

from __future__ import annotations

from tests.mutations.mutation import in_file

PPO, LIMITS = "unit/training/test_ppo.py", "unit/training/test_ppo_limits.py"
COLUMNS = "unit/training/test_ppo_columns.py"

MUTATIONS = [
    *in_file(
        "stages/ppo/trainer.py",
        COLUMNS,
        (
            "running means of scores are forgotten over a resume",
            'self.collector.rewards.restore(state["rewards"])',
            "pass",
            "test_running_means_of_scores_go_on_over_a_resume",
        ),
    ),
    *in_file(
        "stages/ppo/collect.py",
        COLUMNS,
    ),
    *in_file(
        "stages/ppo/report.py",
        COLUMNS,
        (
            "PPO's KL has the other sign",
            '"objective/kl": kl,',
            '"objective/kl": -kl,',
            "test_the_kl_is_that_of_the_sampled_answers_by_value",
        ),
        (
            "PPO's KL is read from its k3 estimate",
            '"objective/kl": kl,',
            '"objective/kl": (k3(batch.logprobs, batch.reference_logprobs) * mask).sum(-1),',
            "test_the_kl_is_that_of_the_sampled_answers_by_value",
        ),
    ),
    *in_file(
        "training/rl/rollouts.py",
        COLUMNS,
        (
            "every update begins with the first prompts",
            "update * number, number, lambda",
            "0, number, lambda",
            "test_updates_go_on_with_the_prompts_that_come_next",
        ),
    ),
    *in_file(
        "training/rl/engine.py",
        COLUMNS,
        (
            "answers are sampled at temperature 1",
            "Sampling(temperature=self.temperature, uniforms",
            "Sampling(temperature=1.0, uniforms",
            "test_answers_are_drawn_at_the_stages_temperature",
        ),
    ),
    *in_file(
        "stages/ppo/learn.py",
        PPO,
    ),
    *in_file(
        "training/rl/advantages.py",
        PPO,
        (
            "gamma and lambda change places",
            "gamma=self.gamma, gae_lambda=self.gae_lambda",
            "gamma=self.gae_lambda, gae_lambda=self.gamma",
            "test_an_experience_is_what_the_papers_say_of_its_own_figures",
        ),
        (
            "advantages are not whitened",
            "learned=center_and_scale(raw, response_mask)",
            "learned=raw",
            "test_an_experience_is_what_the_papers_say_of_its_own_figures",
        ),
        (
            "the prompt baseline is never taken off",
            "scores = leave_one_out(scores, self.baseline_group)",
            "pass",
            "test_with_a_prompt_baseline_rewards_are_relative_to_the_other_completions",
        ),
    ),
    *in_file(
        "stages/ppo/collect.py",
        PPO,
        (
            "an answer has ended when its first token is an end",
            "answer[-1] in self._end_ids",
            "answer[0] in self._end_ids",
            "test_an_answer_that_never_ended_scores_less_than_it_would_have",
        ),
        (
            "a wrong reference is not noticed",
            "if worst > START_KL_TOLERANCE:",
            "if worst > 1e9 * START_KL_TOLERANCE:",
            "test_a_wrong_reference_stops_before_anything_is_learned",
        ),
    ),
    *in_file(
        "stages/ppo/trainer.py",
        PPO,
        (
            "the KL coefficient moves as if one episode had been seen",
            "self.kl_controller.after(kl, self.episodes.per_update)",
            "self.kl_controller.after(kl, 1)",
            "test_the_adaptive_coefficient_follows_the_kl",
        ),
        (
            "the critic's own rate is ignored",
            "optim.lr if optim.critic_lr is None else optim.critic_lr",
            "optim.lr",
            "test_the_critic_may_have_a_rate_of_its_own",
        ),
        (
            "PPO decays weights",
            "**arguments, weight_decay=0.0)",
            "**arguments, weight_decay=0.1)",
            "test_the_critic_may_have_a_rate_of_its_own",
        ),
        (
            "a resumed stage starts at the first KL coefficient",
            'coefficient=state["kl_coefficient"])',
            "coefficient=self.kl_controller.coefficient)",
            "test_a_resumed_run_equals_the_straight_one",
        ),
    ),
    *in_file(
        "stages/ppo/checkpoint.py",
        PPO,
        (
            "a checkpoint's weights are not loaded",
            "parameter.copy_(saved[name])",
            "saved[name]",
            "test_a_resumed_run_equals_the_straight_one",
        ),
    ),
    *in_file(
        "stages/ppo/learn.py",
        LIMITS,
        (
            "the policy learns while the critic warms up",
            "policy_learns = update >= self._options.critic_warmup",
            "policy_learns = update >= 0",
            "test_only_the_critic_learns_while_it_warms_up",
        ),
        (
            "Adam counts the policy's steps of the warm-up",
            "parameter.grad = None  # with zero gradients",
            "parameter.grad.zero_()  # with zero gradients",
            "test_adam_counts_none_of_the_policys_warm_up_steps",
        ),
    ),
    *in_file(
        "stages/ppo/kl_budget.py",
        LIMITS,
        (
            "a KL above the budget ends nothing",
            "is_above = self._limit is not None and kl > self._limit",
            "is_above = self._limit is not None and kl > 1e9 * self._limit",
            "test_a_kl_above_the_budget_twice_in_a_row_ends_the_stage",
        ),
        (
            "one batch above the budget ends the stage",
            "is_exceeded = is_above and self.was_above",
            "is_exceeded = is_above",
            "test_one_batch_above_the_budget_ends_nothing_and_a_resume_remembers_it",
        ),
    ),
    *in_file(
        "stages/ppo/trainer.py",
        LIMITS,
        (
            "max_approxkl ends no update",
            "self._gathered(torch.tensor([share])).sum()) > limit",
            "self._gathered(torch.tensor([share])).sum()) > 1e9 * limit",
            "test_a_minibatch_that_moved_too_far_is_the_updates_last",
        ),
        (
            "the guard's best policy is forgotten over a resume",
            'self.guard.restore(folder, state["guard"])',
            "pass",
            "test_the_guard_neither_disturbs_training_nor_forgets_over_a_resume",
        ),
    ),
    *in_file(
        "training/rl/guard.py",
        LIMITS,
        (
            "the guard keeps the worst policy",
            "better_beyond_noise(scores, self._best_scores)",
            "better_beyond_noise(self._best_scores, scores)",
            "test_the_best_policy_by_the_held_out_scorer_is_handed_on",
        ),
        (
            "a policy that is better by chance is handed on",
            "better_beyond_noise(scores, self._best_scores)",
            "bool(scores.mean() > self._best_scores.mean())",
            "test_a_policy_that_is_better_by_chance_replaces_no_earlier_one",
        ),
        (
            "the guard judges by what is maximised",
            '"guard/scorer": float(scores.mean())',
            '"guard/scorer": float(self._proxy(rollout).mean())',
            "test_the_best_policy_by_the_held_out_scorer_is_handed_on",
        ),
        (
            "the guard's budget of KL is ignored",
            "(limit is None or kl <= limit)",
            "(limit is None or kl <= 1e9 * limit)",
            "test_a_policy_above_the_budget_is_never_the_best",
        ),
        (
            "the best weights are put back whatever was asked for",
            "if self._config.keep_best:",
            "if self._best is not None:",
            "test_without_keep_best_the_last_policy_is_handed_on",
        ),
    ),
    *in_file(
        "training/rl/rollouts.py",
        PPO,
        (
            "every update samples with the same numbers",
            '"sampling", update)',
            '"sampling", 0)',
            "test_every_update_samples_with_numbers_of_its_own",
        ),
    ),
    *in_file(
        "training/rl/ptx.py",
        LIMITS,
        (
            "ptx.coefficient is ignored",
            "loss * self._coefficient * self._context.world_size",
            "loss * self._context.world_size",
            "test_ptx_adds_the_token_mean_of_its_conversations",
        ),
        (
            "ptx predicts a token from itself",
            "at[:, 1] - 1]",
            "at[:, 1]]",
            "test_ptx_adds_the_token_mean_of_its_conversations",
        ),
    ),
    *in_file(
        "stages/ppo/kind.py",
        "unit/pipeline/test_unread.py",
        (
            "a small horizon makes the coefficient of KL negative",
            "elif config.kl.horizon * 5 <= config.optim.batch_size:",
            "elif False:",
            "test_settings_that_contradict_each_other_are_refused",
        ),
    ),
]
