"""Trainers, what happens around their steps, checkpoints, and how weights are shared out."""

from __future__ import annotations

from tests.mutations.mutation import in_file

PPO, LIMITS = "unit/training/test_ppo.py", "unit/training/test_ppo_limits.py"
COLUMNS = "unit/training/test_ppo_columns.py"

MUTATIONS = [
    *in_file(
        "training/ppo_trainer.py",
        COLUMNS,
        (
            "running means of scores are forgotten over a resume",
            'self.rewards.restore(state["rewards"])',
            "pass",
            "test_running_means_of_scores_go_on_over_a_resume",
        ),
        (
            "PPO's KL has the other sign",
            '"objective/kl": kl,',
            '"objective/kl": -kl,',
            "test_the_kl_is_that_of_the_sampled_answers_by_value",
        ),
        (
            "PPO's KL is read from its k3 estimate",
            '"objective/kl": kl,',
            '"objective/kl": k3(logprobs, reference) * mask,',
            "test_the_kl_is_that_of_the_sampled_answers_by_value",
        ),
    ),
    *in_file(
        "training/rollouts.py",
        COLUMNS,
        (
            "every update begins with the first prompts",
            "update * number, number, lambda",
            "0, number, lambda",
            "test_updates_go_on_with_the_prompts_that_come_next",
        ),
        (
            "answers are sampled at temperature 1",
            "Sampling(temperature=self._config.temperature, uniforms",
            "Sampling(temperature=1.0, uniforms",
            "test_answers_are_drawn_at_the_stages_temperature",
        ),
    ),
    *in_file(
        "training/ppo_trainer.py",
        PPO,
        (
            "PPO's minibatches have one order in all epochs",
            '"minibatches", update, epoch)',
            '"minibatches", update, 0)',
            "test_every_episode_is_learned_from_once_an_epoch",
        ),
        (
            "a micro-batch learns from the rows of the first one",
            "[rows[i] for i in piece], tokens",
            "[rows[i] for i in pieces[0]], tokens",
            "test_the_size_of_a_micro_batch_never_changes_the_weights",
        ),
        (
            "the price of KL moves as if one episode had been seen",
            'self.figures.values["objective/kl"], self.episodes.per_update)',
            'self.figures.values["objective/kl"], 1)',
            "test_the_adaptive_price_follows_the_kl",
        ),
        (
            "gamma and lambda change places",
            "gamma=self.config.gamma, gae_lambda=self.config.gae_lambda",
            "gamma=self.config.gae_lambda, gae_lambda=self.config.gamma",
            "test_an_experience_is_what_the_papers_say_of_its_own_figures",
        ),
        (
            "advantages are not whitened",
            "advantages=center_and_scale(raw, mask)",
            "advantages=raw",
            "test_an_experience_is_what_the_papers_say_of_its_own_figures",
        ),
        (
            "the prompt baseline is never taken off",
            "leave_one_out(kept_scores, self.episodes.group) if self.config.prompt_baseline else kept_scores",
            "kept_scores",
            "test_with_a_prompt_baseline_rewards_are_relative_to_the_other_completions",
        ),
        (
            "an answer has ended when its first token is an end",
            "answer[-1] in self.episodes.end_ids",
            "answer[0] in self.episodes.end_ids",
            "test_an_answer_that_never_ended_scores_less_than_it_would_have",
        ),
        (
            "a wrong reference is not noticed",
            "if update == 0 and worst > START_KL_TOLERANCE:",
            "if update < 0 and worst > START_KL_TOLERANCE:",
            "test_a_wrong_reference_stops_before_anything_is_learned",
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
            "a resumed stage starts at the first price of KL",
            'coefficient=state["kl_coefficient"])',
            "coefficient=self.price.coefficient)",
            "test_a_resumed_run_equals_the_straight_one",
        ),
        (
            "a checkpoint's weights are not loaded",
            "parameter.copy_(saved[name])",
            "saved[name]",
            "test_a_resumed_run_equals_the_straight_one",
        ),
    ),
    *in_file(
        "training/ppo_trainer.py",
        LIMITS,
        (
            "the policy learns while the critic warms up",
            "policy_learns = update >= self.config.critic_warmup",
            "policy_learns = update >= 0",
            "test_only_the_critic_learns_while_it_warms_up",
        ),
        (
            "Adam counts the policy's steps of the warm-up",
            "parameter.grad = None  # with zeros",
            "parameter.grad.zero_()  # with zeros",
            "test_adam_counts_none_of_the_policys_warm_up_steps",
        ),
        (
            "max_approxkl ends no update",
            "self._gathered(torch.tensor([share])).sum()) > limit",
            "self._gathered(torch.tensor([share])).sum()) > 1e9 * limit",
            "test_a_minibatch_that_moved_too_far_is_the_updates_last",
        ),
        (
            "a KL above the budget ends nothing",
            "self.over_budget = limit is not None and kl > limit",
            "self.over_budget = limit is not None and kl > 1e9 * limit",
            "test_a_kl_above_the_budget_ends_the_stage",
        ),
        (
            "the guard's best policy is forgotten over a resume",
            'self.guard.restore(folder, state["guard"])',
            "pass",
            "test_the_guard_neither_disturbs_training_nor_forgets_over_a_resume",
        ),
    ),
    *in_file(
        "training/guard.py",
        LIMITS,
        (
            "the guard keeps the worst policy",
            'return figures["guard/gold"] > self.best_gold and',
            'return figures["guard/gold"] < -self.best_gold and',
            "test_the_best_policy_by_the_second_opinion_is_handed_on",
        ),
        (
            "the guard judges by what is maximised",
            '"guard/gold": float(total.mean())',
            '"guard/gold": float(self._proxy(found).mean())',
            "test_the_best_policy_by_the_second_opinion_is_handed_on",
        ),
        (
            "the guard's budget of KL is ignored",
            'figures["guard/kl"] <= limit)',
            'figures["guard/kl"] <= 1e9 * limit)',
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
        "training/rollouts.py",
        PPO,
        (
            "every update samples with the same numbers",
            '"sampling", update)',
            '"sampling", 0)',
            "test_every_update_samples_with_numbers_of_its_own",
        ),
        (
            "the reference is read at temperature 1",
            "answer_statistics(reference, part, temperature=self._config.temperature)",
            "answer_statistics(reference, part, temperature=1.0)",
            "test_nothing_has_changed_at_the_first_minibatch",
        ),
    ),
    *in_file(
        "training/ptx.py",
        LIMITS,
        (
            "ptx.coefficient is ignored",
            "loss * self._config.coefficient * self._context.world_size",
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
        "training/micro_batches.py",
        "unit/training/test_micro_batches.py",
        (
            "a micro-batch of pairs counts as a whole batch",
            "return loss * self._share if self.pairs else loss",
            "return loss",
            "test_what_saves_memory_changes_neither_weights_nor_figures",
        ),
        (
            "figures of micro-batches are averaged whatever their size",
            "value * share for value, share in zip(added, shares, strict=True)) / sum(shares)",
            "added) / len(added)",
            "test_figures_of_pieces_count_by_their_share",
        ),
    ),
    *in_file(
        "training/callbacks.py",
        "unit/training/test_callbacks.py",
        (
            "gradients that are not finite are stepped on",
            "if fault is not None:",
            "if fault == 0:",
            "test_a_gradient_that_is_not_finite_stops_before_the_step",
        ),
        (
            "checkpoints are never sealed",
            "checkpoints.seal(folder, fingerprint=self._context.spec.fingerprint, layout=layout(self._context))",
            "pass",
            "test_a_saved_checkpoint_is_sealed_and_the_oldest_removed",
        ),
        (
            "a signal stops in the middle of an update",
            "if state.global_step % self._period:",
            "if state.global_step < 0:",
            "test_a_signal_saves_and_stops_at_the_next_exact_step",
        ),
        (
            "a signal at the end of a stage saves inside an update",
            "if asked and not ends_anyway:",
            "if asked:",
            "test_a_signal_when_the_stage_ends_by_itself_saves_nothing",
        ),
    ),
    *in_file(
        "training/checkpoints.py",
        "unit/training/test_checkpoints.py",
        (
            "a checkpoint of another stage is taken",
            "if owner != fingerprint:",
            "if owner is None:",
            "test_a_checkpoint_that_cannot_be_trusted_is_set_aside_and_the_older_one_taken",
        ),
        (
            "a checkpoint's hashes are not looked at",
            ' or file_sha256(path) != expected["sha256"]',
            "",
            "test_a_checkpoint_that_cannot_be_trusted_is_set_aside_and_the_older_one_taken",
        ),
        (
            "the oldest checkpoint is taken",
            "key=step_of, reverse=True",
            "key=step_of, reverse=False",
            "test_the_newest_sealed_checkpoint_is_taken_by_number_not_by_name",
        ),
    ),
    *in_file(
        "training/session.py",
        "unit/training/test_session.py",
        (
            "a killed stage starts anew",
            "resume_from_checkpoint=None if resumed is None else str(resumed)",
            "resume_from_checkpoint=None",
            "test_a_killed_stage_goes_on_from_its_newest_good_checkpoint_and_ends_where_it_would_have",
        ),
        (
            "steps behind the checkpoint stay in the metrics",
            "log.keep_through(0 if resumed is None else checkpoints.step_of(resumed))",
            "log.keep_through(10**9)",
            "test_a_killed_stage_goes_on_from_its_newest_good_checkpoint_and_ends_where_it_would_have",
        ),
        (
            "shares of other processes are gone on from",
            "if theirs != ours:",
            'if ours == "":',
            "test_shares_of_other_processes_are_not_gone_on_from",
        ),
    ),
    *in_file(
        "training/arguments.py",
        "unit/training/test_context.py",
        (
            "the bound of the gradients is a billion times as large",
            '"max_grad_norm": optim.max_grad_norm',
            '"max_grad_norm": 1e9 * optim.max_grad_norm',
            "test_every_setting_of_the_optimiser_reaches_the_trainer",
        ),
        (
            "weight decay is ignored",
            '"weight_decay": optim.weight_decay',
            '"weight_decay": 0.0',
            "test_every_setting_of_the_optimiser_reaches_the_trainer",
        ),
    ),
    *in_file(
        "training/sharding.py",
        "unit/training/test_layouts.py",
        (
            "FSDP keeps weights on the device",
            '{"cpu_offload": offload is Offload.weights}',
            '{"cpu_offload": False}',
            "test_fsdp_is_told_whether_weights_are_offloaded",
        ),
        (
            "shares lie as whole weights do",
            "WHOLE if sharding is Sharding.none else",
            "WHOLE if sharding is not None else",
            "test_a_layout_names_the_processes_and_how_they_share",
        ),
    ),
    *in_file(
        "training/sharding.py",
        "distributed/test_sharding.py",
        (
            "the optimiser's state is not offloaded",
            'told["zero_optimization"]["offload_optimizer"]',
            'told["zero_optimization"]["offload_nothing"]',
            "test_deepspeed_is_told_what_to_offload",
        ),
        (
            "weights are offloaded with the optimiser's state alone asked for",
            "if offload is Offload.weights:\n        told",
            "if offload is not Offload.none:\n        told",
            "test_deepspeed_is_told_what_to_offload",
        ),
    ),
]
