"""Scorers behind HTTP, ensembles, and penalties for length."""

from __future__ import annotations

from tests.mutations.mutation import in_file

SHAPING, SERVED, APIS = (
    "unit/algos/test_score_shaping.py",
    "unit/rewards/test_served.py",
    "unit/rewards/test_server_apis.py",
)
MIX, PENALTIES = "unit/rewards/test_mix.py", "unit/training/test_ppo_penalties.py"
BUILD = "unit/rewards/test_build.py"
PLAN, ASKED = "unit/pipeline/test_served_scorers.py", "distributed/test_asked_servers.py"
PAPER, DAPO = "test_an_ensemble_gives_what_its_paper_says", "test_an_overlong_answer_loses_what_dapo_says"
SUBTRACTED = "test_length_is_subtracted_from_the_score_and_logged_by_itself"
KILLED = "test_a_stage_that_is_killed_in_a_batch_asks_nothing_twice_and_ends_alike"
FAILS = "test_a_call_that_fails_on_one_process_ends_both_and_none_waits"
COLUMNS = "test_members_have_columns_of_their_own_and_enter_the_total_as_one"
IN_TURN = "test_what_is_combined_is_normalised_and_clipped_in_its_turn"
COMBINES = "test_an_ensemble_combines_its_members_as_the_configuration_says"
RESCALED = "test_what_an_ensemble_combines_is_normalised_and_clipped_by_the_configuration"
FORM = "test_a_reply_of_another_form_is_no_score"
ASKED_AGAIN = "test_what_was_scored_is_asked_again_only_if_what_counts_has_changed"
REFUSED = "test_what_cannot_score_is_refused"

MUTATIONS = [
    *in_file(
        "algos/ensembles.py",
        SHAPING,
        ("disagreement is rewarded", "mean(scores) - weight * spread(scores)", "mean(scores) + weight * spread(scores)",
         PAPER),
        ("the weight of the deviation is ignored", "- weight * spread(scores)", "- spread(scores)", PAPER),
        ("the best member counts", "scores.amin(0)", "scores.amax(0)", PAPER),
        ("the median member counts in a mean", "return scores.mean(0)", "return scores.median(0).values", PAPER),
        ("deviations of members are those of a sample", "unbiased=False", "unbiased=True", PAPER),
        ("the deviation is that of answers", "scores.std(0,", "scores.std(1,", PAPER),
    ),
    *in_file(
        "algos/length_penalties.py",
        SHAPING,
        ("the overlong penalty goes on beyond the limit", ".clamp(0.0, 1.0)", ".clamp(0.0)", DAPO),
        ("short answers are paid", ".clamp(0.0, 1.0)", ".clamp(max=1.0)", DAPO),
        ("the buffer begins at the limit", "- (longest - buffer)", "- longest", DAPO),
        ("the overlong penalty rises by the limit", "/ buffer).clamp", "/ longest).clamp", DAPO),
        ("tokens are paid for", "return penalty * lengths", "return -penalty * lengths",
         "test_every_token_costs_the_same"),
    ),
    *in_file(
        "stages/ppo/penalties.py",
        PENALTIES,
        ("length is paid for", "left.double() - penalty", "left.double() + penalty", SUBTRACTED),
        ("the weight of the overlong penalty is ignored", "self.overlong.weight * share", "share", SUBTRACTED),
        ("the penalty for each token is not asked for", "per_token=config.length_penalty", "per_token=0.0", SUBTRACTED),
        ("the longest answer is one of the prompt's length", "longest=config.max_new_tokens",
         "longest=config.max_prompt_length", SUBTRACTED),
    ),
    *in_file(
        "stages/ppo/report.py",
        PENALTIES,
        ("penalties have no columns", "(by_scorer | dict(batch.parts))", "by_scorer", SUBTRACTED),
    ),
    *in_file(
        "rewards/weighted_sum.py",
        MIX,
        ("members are not normalised", "        for name in self._columns:\n            self._take_in",
         "        for name in self._parts.keys() & self._columns.keys():\n            self._take_in", COLUMNS),
        ("what is combined is never taken in", "            self._take_in(name, self._combined(name, by_name))",
         "            pass", IN_TURN),
        ("raw scores of members are combined",
         "torch.stack([self._rescaled(member, by_name[member].double()) for",
         "torch.stack([by_name[member].double() for", COLUMNS),
        ("running means of members are not saved", "moments.state() for name, moments in self._moments.items()}",
         "moments.state() for name, moments in self._moments.items() if '/' not in name}",
         "test_a_restored_ensemble_goes_on_as_the_straight_one"),
    ),
    *in_file(
        "rewards/build.py",
        BUILD,
        ("the worst member is the mean", "Combine.min: worst,", "Combine.min: mean,", COMBINES),
        ("the configured weight of the deviation is ignored", "weight=config.std_weight", "weight=1.0", COMBINES),
        ("what is combined is not normalised as configured",
         "            weight=scorer.weight,\n            normalize=scorer.normalize,\n",
         "            weight=scorer.weight,\n", RESCALED),
        ("what is combined is not clipped as configured",
         "            weight=scorer.weight,\n            normalize=scorer.normalize,\n            clip=scorer.clip,\n",
         "            weight=scorer.weight,\n            normalize=scorer.normalize,\n", RESCALED),
    ),
    *in_file(
        "rewards/server_apis.py",
        APIS,
        ("scores may come in any order", "order != list(range(count))", "sorted(order) != list(range(count))", FORM),
        ("a server may give fewer scores", "if len(entries) != count:", "if len(entries) > count:", FORM),
        ("the first of several classes counts", "if len(outputs) != 1:", "if not outputs:", FORM),
        ("a label is ignored", "return outputs[int(config.label)]", "return outputs[0]",
         "test_vllm_classifies_answers_and_a_label_is_the_number_of_a_class"),
        ("prompts and answers are exchanged", '"text_1": [item.asked for', '"text_1": [item.answer for',
         "test_vllm_scores_pairs_of_a_prompt_and_an_answer"),
        ("NaN of a row is sent", ", parse_constant=str)", ")", "test_values_that_json_lacks_are_sent_as_texts"),
        ("a reward is squashed", '{"use_activation": config.label is not None}', '{"use_activation": True}',
         "test_vllm_pools_one_conversation_by_its_own_template"),
        ("text-embeddings-inference squashes rewards", '"raw_scores": config.label is None', '"raw_scores": False',
         "test_text_embeddings_inference_predicts_answers_and_a_label_is_the_name_of_a_class"),
        ("the answer is left out of the conversation",
         'conversation = [*item.messages, {"role": "assistant", "content": item.answer}]',
         "conversation = item.messages", "test_vllm_pools_one_conversation_by_its_own_template"),
    ),
    *in_file(
        "rewards/served.py",
        SERVED,
        ("what is no number is a score", "checked_number(score, where=item.prompt.where, source=self._source)", "score",
         "test_what_is_no_score_is_refused_with_its_row_and_kept_nowhere"),
        ("an answer's score is kept for all answers", "digest([self._config, json.dumps(body, sort_keys=True)])",
         "digest([self._config])", ASKED_AGAIN),
        ("another model's scores are taken", "digest([self._config, json.dumps(body, sort_keys=True)])",
         'digest([json.dumps({**body, "model": ""}, sort_keys=True)])', ASKED_AGAIN),
        ("a reply without a grade has the score 0", "if self._ungraded is None:", "if False:",
         "test_a_reply_without_a_grade_ends_the_stage_unless_its_score_is_set"),
        ("calls have one answer each", "1 if self._api.single else self._config.batch_size", "1",
         "test_answers_are_scored_in_batches_at_once_and_in_order"),
        ("a stage that waits for grades looks stuck",
         "ask(prompts, lambda _: self._asking.progress())", "ask(prompts, lambda _: None)",
         "test_a_grade_is_the_score_and_is_asked_for_with_rubric_and_reference"),
        ("a failed call to a grader is no scorer's error", 'without="", failure=RewardError', 'without=""',
         "test_a_failed_call_to_a_grader_is_a_scorers_error"),
    ),
    *in_file(
        "evaluation/endpoint_calls.py",
        SERVED,
        ("failed calls are passed over", "        if errors:\n", "        if False:\n",
         "test_a_call_that_fails_ends_the_stage_by_name_and_the_other_scores_are_kept"),
        ("replies are not saved", "                    self._replies.save(key, value)\n",
         "                    self._replies._known[key] = value\n",
         "test_what_was_scored_is_asked_again_only_if_what_counts_has_changed"),
        ("a server that is down is asked to the end", "if in_a_row >= GIVE_UP:", "if False:",
         "test_a_server_that_is_down_is_named_after_some_calls"),
    ),
    *in_file(
        "evaluation/saved_replies.py",
        SERVED,
        ("a line goes on where the one before was cut off", '"\\n" + json.dumps(', 'json.dumps(',
         "test_a_line_that_was_cut_off_costs_one_call_and_no_other"),
        ("replies of other processes are not read", "for each in (*others, file)", "for each in (file,)",
         "test_every_process_writes_a_file_and_reads_all"),
    ),
    *in_file(
        "config/reward_server.py",
        PLAN,
        ("a server's address counts", 'field(default="", metadata={"identity": False})', 'field(default="")',
         "test_an_address_changes_no_fingerprint_and_what_scores_does"),
    ),
    *in_file(
        "pipeline/plan/scorer_groups.py",
        PLAN,
        ("a server without settings is planned", "if source == scorer.source and group is None:", "if False:", REFUSED),
        ("an ensemble of one is planned", "if len(ensemble.members) < 2:", "if False:", REFUSED),
        ("a missing key is not noticed", "        if scorer.server is not None:\n            api_key(",
         "        if False:\n            api_key(", "test_a_missing_key_and_a_missing_client_are_named"),
    ),
    *in_file(
        "rewards/scorer_sources.py",
        PLAN,
        ("members of ensembles are not looked at", "if scorer.source == ENSEMBLE and ensemble is not None:",
         "if False:", REFUSED),
    ),
    *in_file(
        "training/sharding.py",
        ASKED,
        ("a process that fails tells nobody", "    except AlignmentError as failed:\n        error = failed",
         "    except AlignmentError:\n        raise", FAILS),
    ),
    *in_file(
        "training/rl/guard.py",
        ASKED,
        ("every process asks for the guard",
         "(rollout.prompts, rollout.answers, rollout.rows) if self._context.is_main else ([], [], [])",
         "(rollout.prompts, rollout.answers, rollout.rows)",
         "test_two_processes_ask_each_their_share_and_the_main_one_for_the_guard"),
    ),
    *in_file(
        "stages/shared/asking_servers.py",
        ASKED,
        ("a stage forgets the replies of its attempts", 'folder = context.spec.work / REPLIES',
         'folder = context.spec.work / str(__import__("os").getpid())', KILLED),
    ),
    *in_file(
        "rewards/modules_beside.py",
        "unit/rewards/test_functions.py",
        (
            "a second file uses the modules of the first",
            "            sys.modules.pop(name, None)",
            "            pass",
            "test_files_of_different_folders_may_have_modules_of_the_same_name",
        ),
        (
            "a module is imported at every call",
            "    sys.modules.update(modules)\n",
            "",
            "test_a_module_beside_a_file_is_imported_once",
        ),
    ),
    *in_file(
        "rewards/modules_beside.py",
        "unit/rewards/test_functions.py",
        (
            "folders of other files stay on the path",
            "[*(entry for entry in path if entry not in others), own, *others]",
            "[*path, own]",
            "test_files_of_different_folders_may_have_modules_of_the_same_name",
        ),
    ),
    *in_file(
        "rewards/functions.py",
        "unit/rewards/test_functions.py",
        (
            "a function changes the tool calls of others",
            "copy.deepcopy(message.as_dict())",
            "message.as_dict()",
            "test_what_a_function_changes_in_a_tool_call_changes_nothing_else",
        ),
    ),
]  # fmt: skip
