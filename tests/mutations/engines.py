"""Engines that sample: what is asked of them, what is refused, how weights follow, and how a difference is treated."""

from __future__ import annotations

from tests.mutations.mutation import in_file

REPLIES = "unit/engines/test_completions.py"
SESSION = "unit/engines/test_engine_session.py"
SERVER = "unit/engines/test_vllm_server.py"
SERVED = "unit/training/test_ppo_served.py"
OBJECTIVE = "unit/training/test_importance_objective.py"
PLAN = "unit/stages/test_ppo_engine.py"
WEIGHTS = "test_weights_are_the_smaller_of_ratio_and_cap"
WRONG = "test_a_wrong_reply_is_refused"
PAPER = "test_a_step_on_an_engines_answers_is_what_the_paper_says"
MEASURED = "test_a_gap_is_measured_on_answer_tokens_alone"
AGES = "test_answers_that_are_too_old_or_too_new_are_refused"
AHEAD = "test_answers_sampled_ahead_are_those_of_the_policy_before_and_are_corrected"
FOLLOW = "test_weights_follow_after_each_update_and_old_ones_are_removed"
ASKED = "test_a_call_asks_for_tokens_as_they_were_sampled"
CUT = "test_long_groups_are_cut_in_calls_whose_seeds_go_on"
DIES = "test_a_server_that_dies_is_started_again_with_the_weights_that_it_had"
WHOLE = "test_whole_weights_are_replaced_and_their_version_is_asked_for"

MUTATIONS = [
    *in_file(
        "algos/importance.py",
        "unit/algos/test_importance.py",
        (
            "importance is the engine's over the policy's",
            "change = (logprobs - sampled_logprobs)",
            "change = (sampled_logprobs - logprobs)",
            WEIGHTS,
        ),
        (
            "importance of an answer counts what stands behind its end",
            "- sampled_logprobs) * response_mask",
            "- sampled_logprobs)",
            WEIGHTS,
        ),
        ("importance is not truncated", "change.clamp(max=math.log(cap)).exp()", "change.exp()", WEIGHTS),
        ("importance is truncated from below", "change.clamp(max=", "change.clamp(min=", WEIGHTS),
        ("importance is truncated at its logarithm", "math.log(cap)", "cap", WEIGHTS),
        ("importance is always that of tokens", "if whole_answers:", "if False:", WEIGHTS),
        ("importance reaches behind an answer's end", ".exp() * response_mask", ".exp()", WEIGHTS),
    ),
    *in_file(
        "training/rl/policy_objective.py",
        OBJECTIVE,
        (
            "importance weighs nothing",
            "weights = weights * importance",
            "weights = weights * importance.sign()",
            "test_the_loss_and_its_gradient_are_weighted_by_the_truncated_ratio",
        ),
        (
            "importance divides",
            "weights = weights * importance",
            "weights = weights / importance.clamp(min=1e-6)",
            "test_the_loss_and_its_gradient_are_weighted_by_the_truncated_ratio",
        ),
        (
            "importance weighs an answer once for each token",
            "importance = None if importance is None else importance[:, :1]",
            "importance = None if importance is None else importance.sum(-1, keepdim=True)",
            "test_the_loss_and_its_gradient_are_weighted_by_the_truncated_ratio",
        ),
        (
            "importance weighs the KL in the loss",
            "kl = (k3(logprobs, sampled.reference_logprobs) * self._weights(mask)).sum() / divisor",
            "kl = (k3(logprobs, sampled.reference_logprobs) * self._weights(mask) "
            "* (1.0 if sampled.importance is None else sampled.importance)).sum() / divisor",
            "test_the_kl_in_the_loss_is_not_weighted",
        ),
    ),
    *in_file(
        "stages/ppo/learn.py",
        SERVED,
        (
            "importance is not learned with",
            "importance=None if experience.importance is None else experience.importance[rows, :width]",
            "importance=None",
            PAPER,
        ),
    ),
    *in_file(
        "stages/ppo/trainer.py",
        SERVED,
        (
            "importance does not reach the experience",
            "advantages, importance=importance,",
            "advantages, importance=None,",
            PAPER,
        ),
        (
            "a stage with an engine goes on in silence",
            "                log.warning(SAMPLES_DIFFER)\n",
            "                pass\n",
            "test_a_stage_that_goes_on_says_that_answers_may_differ_if_an_engine_samples",
        ),
        (
            "a stage without an engine says that answers may differ",
            "if self.config.sampling.engine is not Engine.own and self.context.is_main:",
            "if self.context.is_main:",
            "test_a_stage_that_goes_on_says_that_answers_may_differ_if_an_engine_samples",
        ),
        (
            "answers are never sampled ahead",
            "            self.rollouts.sample_ahead(update + 1)\n",
            "            pass\n",
            AHEAD,
        ),
        (
            "answers are sampled ahead without being asked for",
            "if self.config.sampling.max_staleness and update + 1",
            "if update + 1",
            FOLLOW,
        ),
        (
            "answers are sampled ahead after the last update",
            "self.config.sampling.max_staleness and update + 1 < self.config.updates",
            "self.config.sampling.max_staleness",
            AHEAD,
        ),
    ),
    *in_file(
        "stages/ppo/collect.py",
        SERVED,
        (
            "the engine's log-probabilities are the policy's",
            "sampled_logprobs=None if sampled is None else stack(sampled, mask)",
            "sampled_logprobs=None if sampled is None else stack(rollout.logprobs, mask)",
            "test_an_engine_that_is_off_changes_neither_the_ratio_nor_the_kl_at_step_0",
        ),
        (
            "the old policy is the engine",
            "            logprobs=logprobs,\n",
            "            logprobs=logprobs if sampled is None else stack(sampled, mask),\n",
            "test_an_engine_that_is_off_changes_neither_the_ratio_nor_the_kl_at_step_0",
        ),
    ),
    *in_file(
        "stages/ppo/engine_gap.py",
        SERVED,
        (
            "the age of answers is not looked at",
            "if not 0 <= staleness <= self._config.max_staleness:",
            "if False:",
            AGES,
        ),
        (
            "answers of the future are accepted",
            "if not 0 <= staleness <= self._config.max_staleness:",
            "if not staleness <= self._config.max_staleness:",
            AGES,
        ),
        ("the newest answer counts for all", "staleness = update - min(", "staleness = update - max(", AGES),
        (
            "other weights are learned from",
            "metrics.values[GAP] > OTHER_WEIGHTS:",
            "metrics.values[GAP] > 1e9:",
            "test_a_gap_that_no_rounding_explains_is_other_weights_unless_the_policy_moved_on",
        ),
        (
            "a policy that moved on is other weights",
            "if staleness == 0 and metrics.values[GAP]",
            "if metrics.values[GAP]",
            "test_a_gap_that_no_rounding_explains_is_other_weights_unless_the_policy_moved_on",
        ),
        ("gaps cancel", "gap = (batch.logprobs - sampled).abs()", "gap = (batch.logprobs - sampled)", MEASURED),
        ("the bound of a gap is ignored", "(gap > self._config.gap_bound)", "(gap > 0.0)", MEASURED),
        ("the largest gap is the mean", "float(gap.max())", "float(gap.mean())", MEASURED),
        ("no weight is ever at the cap", "weights >= cap * (1 - 1e-6)", "weights > cap * (1 + 1e-6)", MEASURED),
        (
            "a gap is corrected without a cap",
            "        if cap is None:\n            return None\n",
            "        cap = cap or 2.0\n",
            "test_without_a_cap_a_gap_is_measured_and_not_corrected",
        ),
        (
            "an answer's importance is that of its tokens",
            "whole_answers=self._whole_answers,",
            "whole_answers=False,",
            PAPER,
        ),
    ),
    *in_file(
        "training/rl/rollouts.py",
        SERVED,
        (
            "the weights never follow",
            "        self._engine.follow(version)\n",
            "        self._engine.follow(0)\n",
            "test_the_engine_answers_with_the_policy_as_it_is",
        ),
    ),
    *in_file(
        "training/rl/rollouts.py",
        "distributed/test_engine.py",
        (
            "weights are replaced while another process samples",
            "own_of_all(lambda: wait(self._ahead.values()))",
            "wait(self._ahead.values())",
            "test_weights_stay_until_every_process_has_its_answers",
        ),
    ),
    *in_file(
        "training/rl/served_engine.py",
        SERVED,
        (
            "weights that the engine has are loaded again",
            "if self._weights.folder is not None and version == self.version:",
            "if False:",
            "test_a_guard_samples_from_the_policy_as_it_is_even_if_answers_come_ahead",
        ),
        (
            "old weights stay on the disk",
            "            shutil.rmtree(before.folder)\n",
            "            pass\n",
            FOLLOW,
        ),
        (
            "answers are those of no version",
            "            version=self.version,\n",
            "            version=0,\n",
            "test_the_engine_answers_with_the_policy_as_it_is",
        ),
        (
            "all prompts are sampled with one seed",
            "(uniforms[:, 0] * SEEDS).long().tolist()",
            "(uniforms[:, 0] * 0).long().tolist()",
            "test_one_call_for_each_prompt_and_seeds_of_its_own",
        ),
    ),
    *in_file(
        "stages/ppo/served_sampling.py",
        SERVED,
        (
            "an engine samples at temperature 1 whatever is asked for",
            "temperature=config.temperature,",
            "temperature=1.0,",
            "test_the_engine_answers_with_the_policy_as_it_is",
        ),
        (
            "an engine does not know where answers end",
            "end_ids=sorted(end_ids)",
            "end_ids=()",
            "test_one_call_for_each_prompt_and_seeds_of_its_own",
        ),
    ),
    *in_file(
        "models/assembly/engine_weights.py",
        SERVED,
        (
            "the head is not written",
            "    config.tie_word_embeddings = False\n",
            "    config.tie_word_embeddings = True\n",
            "test_full_training_writes_the_head_apart",
        ),
    ),
    *in_file(
        "engines/completions.py",
        REPLIES,
        ("a reply of other weights is taken", 'if reply["model"] != model:', "if False:", WRONG),
        (
            "a reply may have fewer answers",
            "if len(choices) != asked.answers:",
            "if len(choices) > asked.answers:",
            WRONG,
        ),
        (
            "answers to another prompt are taken",
            'choice["prompt_token_ids"] != list(asked.prompt)',
            'choice["prompt_token_ids"] == []',
            WRONG,
        ),
        ("an empty answer is taken", "if not 1 <= len(ids) <=", "if not 0 <= len(ids) <=", WRONG),
        ("log-probabilities may be missing", "or len(logprobs) != len(ids)", "or len(logprobs) > len(ids)", WRONG),
        ("an answer may go on behind its end", "any(token in ends for token in ids[:-1])", "False", WRONG),
        ("an answer may end without an end", "and ids[-1] not in ends", "and False", WRONG),
        ("a log-probability may be none", "math.isfinite(value)", "value == value", WRONG),
        ("a probability may be above 1", "and value < 1e-3", "and value < 1e3", WRONG),
        ("tokens may be negative", "isinstance(token, int) and token >= 0", "isinstance(token, int)", WRONG),
        (
            "answers stand as they came",
            'choices = sorted(reply["choices"], key=lambda choice: choice["index"])',
            'choices = list(reply["choices"])',
            "test_answers_are_those_of_the_reply_in_their_order",
        ),
        ("the parts of a group have one seed", "seed=whole.seed + first", "seed=whole.seed", CUT),
        (
            "a group is never cut",
            "TOKENS_A_REPLY // (generation.max_new_tokens + len(asked.prompt))",
            "TOKENS_A_REPLY",
            CUT,
        ),
        ("the rest of a group is too long", "answers=min(size, whole.answers - first)", "answers=size", CUT),
        ("a model's own end is an end", '"ignore_eos": True,', '"ignore_eos": False,', ASKED),
        ("log-probabilities are not asked for", '"logprobs": 0,', '"logprobs": None,', ASKED),
        (
            "an engine is called once at a time",
            "ThreadPoolExecutor(self._concurrency)",
            "ThreadPoolExecutor(1)",
            "test_as_many_calls_are_under_way_at_once_as_the_setting_says",
        ),
        (
            "an engine is asked through a proxy",
            "where=where, direct=True)",
            "where=where)",
            "test_a_proxy_of_the_environment_is_not_asked",
        ),
    ),
    *in_file(
        "engines/completions.py",
        SESSION,
        (
            "what was computed with other weights is used again",
            "        self.reset_prefix_cache()\n",
            "",
            WHOLE,
        ),
    ),
    *in_file(
        "engines/engine_session.py",
        SESSION,
        (
            "an old adapter stays loaded",
            "            self._try(lambda: self._forget(before))\n",
            "            pass\n",
            "test_answers_are_those_of_the_weights_that_were_loaded_last_and_others_are_forgotten",
        ),
        (
            "an adapter whose reply was lost ends the stage",
            "if weights.name not in self._asked().models():",
            "if True:",
            "test_an_adapter_that_was_loaded_although_the_reply_was_lost_is_used",
        ),
        (
            "an adapter is forgotten that a new server never had",
            "        if weights.name in self._asked().models():\n",
            "        if True:\n",
            "test_a_server_that_dies_between_two_adapters_goes_on_with_the_new_one",
        ),
        (
            "a server that ended is started again without its weights",
            "self._try(lambda: self._load(weights))\n        self._weights",
            "self._weights",
            DIES,
        ),
        ("a server that ended is not started again", "RESTARTS = 2", "RESTARTS = 0", DIES),
        (
            "a server is started again for ever",
            "        self._restarts -= 1\n",
            "",
            "test_a_server_that_always_dies_is_given_up",
        ),
        (
            "the version of whole weights is not asked for",
            "        if not weights.whole:\n            return\n",
            "        return\n",
            WHOLE,
        ),
        (
            "the version of whole weights is asked for only before the answers",
            "            self._refuse_other_version(weights)\n            return answers\n",
            "            return answers\n",
            "test_weights_that_are_replaced_while_answers_are_sampled_are_noticed",
        ),
        (
            "any server will do",
            "        if BASE not in names:\n",
            "        if False:\n",
            "test_a_server_with_another_model_is_refused",
        ),
        (
            "two stages name their weights alike",
            'return f"{name}-{self._id}"',
            "return name",
            "test_names_of_two_sessions_differ",
        ),
        (
            "a server of the user keeps the last adapter",
            "                self._forget(self._weights)\n",
            "                pass\n",
            "test_a_server_of_the_user_has_no_adapter_of_ours_left",
        ),
        (
            "a server that failed is asked again at the end",
            "        self._fail()\n        if self._has_ended():",
            "        if self._has_ended():",
            "test_a_server_that_failed_is_not_waited_for_again_at_the_end",
        ),
        (
            "the log of a process that was killed stays",
            'return self._given_log or self._own_keeper().folder / "server.log"',
            "return self._saved_log",
            "test_a_log_of_its_own_stays_only_after_a_failure",
        ),
        (
            "the log of a failed start is removed",
            "            self._fail()\n            raise",
            "            raise",
            "test_a_log_of_its_own_stays_only_after_a_failure",
        ),
        (
            "the end waits for a server that hangs",
            "            self._asked().limit(_GOODBYE_SECONDS)\n",
            "",
            "test_the_end_does_not_wait_for_a_server_that_hangs",
        ),
        (
            "connections stay open",
            "            self._client.close()\n        self._client = EngineClient",
            "            pass\n        self._client = EngineClient",
            "test_a_session_closes_its_connections",
        ),
    ),
    *in_file(
        "engines/vllm_server.py",
        SERVER,
        (
            "anybody may replace weights",
            "    if options.replaceable:\n",
            "    if True:\n",
            "test_endpoints_without_a_key_are_open_only_where_all_weights_are_replaced",
        ),
        (
            "a server is prepared for a rank below",
            "if possible >= rank)",
            "if possible > rank // 2)",
            "test_a_server_is_prepared_for_the_rank_above",
        ),
        (
            "a model's own generation config applies",
            '"--generation-config", "vllm"',
            '"--generation-config", "auto"',
            "test_a_server_on_a_cpu",
        ),
    ),
    *in_file(
        "stages/ppo/engine_checks.py",
        PLAN,
        (
            "stale answers need no cap",
            "if sampling.max_staleness and sampling.importance_cap is None:",
            "if False:",
            "test_what_vllm_does_not_take_is_refused",
        ),
        (
            "any rank will do",
            "config.adapter.rank > RANKS[-1]",
            "config.adapter.rank > 10 * RANKS[-1]",
            "test_what_vllm_does_not_take_is_refused",
        ),
        (
            "a gap is doubted though it is corrected",
            "<= WORRYING or CAPPED in metrics:",
            "<= WORRYING:",
            "test_a_gap_that_nothing_corrects_is_doubted",
        ),
        (
            "no gap is doubted",
            "if metrics.get(GAP, 0.0) <= WORRYING",
            "if metrics.get(GAP, 0.0) <= 1e9",
            "test_a_gap_that_nothing_corrects_is_doubted",
        ),
        (
            "weights at the cap are reported without a cap",
            "if name != CAPPED or sampling.importance_cap is not None",
            "if True",
            "test_metrics_of_an_engine_are_reported_where_there_are_any",
        ),
    ),
    *in_file(
        "stages/shared/sampling_checks.py",
        PLAN,
        (
            "an engine is on one of several machines",
            "launch.backend.num_machines > 1",
            "launch.backend.num_machines > 9",
            "test_several_machines_are_refused",
        ),
        (
            "a missing environment is noticed by the stage",
            "if sampling.engine is Engine.vllm and sampling.url is None:",
            "if False:",
            "test_an_environment_that_is_missing_is_named",
        ),
    ),
    *in_file(
        "stages/shared/served_policies.py",
        "unit/stages/test_served_policies.py",
        (
            "an engine is asked for more positions than its model has",
            "            if longest > positions:\n",
            "            if False:\n",
            "test_more_positions_than_the_model_has_are_refused_before_a_server_is_used",
        ),
    ),
    *in_file(
        "stages/shared/served_policies.py",
        "unit/stages/test_served_policies.py",
        (
            "an engine's log-probabilities count as those at temperature 1",
            "if generation.temperature not in (0.0, 1.0):",
            "if False:",
            "test_answers_at_any_temperature_are_known_as_the_policys_own",
        ),
    ),
]
