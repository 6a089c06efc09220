"""The evaluation's columns, judges and what the report says of them."""

from __future__ import annotations

from tests.mutations.mutation import in_file

EVALUATE = "unit/stages/test_evaluate.py"

TURNS = "unit/stages/test_evaluate_turns.py"
GRADING = "unit/stages/test_grading.py"
LABELLED = "unit/stages/test_labelled.py"
ENDPOINT = "unit/evaluation/test_endpoint.py"
PAGE = "unit/report/test_page.py"
SHOWN = "test_shown_samples_have_the_widest_gaps_of_their_tasks_and_stand_in_the_right_half"

MUTATIONS = [
    *in_file(
        "evaluation/grammar.py",
        "unit/evaluation/test_grammar.py",
        (
            "a judge does not see the calls of a request",
            'return "\\n".join([turn.content, *calls] if turn.content else calls)',
            "return turn.content",
            "test_a_judge_sees_the_tools_and_the_calls_of_a_request",
        ),
    ),
    *in_file(
        "stages/evaluate/turn_prompts.py",
        "unit/stages/test_evaluate_tools.py",
        (
            "a first question is asked without its tools",
            "prompt_ids(tokenizer, shown(row), row.tools)",
            "prompt_ids(tokenizer, shown(row))",
            "test_every_turn_is_asked_with_the_tools_of_its_row",
        ),
    ),
    *in_file(
        "stages/evaluate/labelled.py",
        LABELLED,
        (
            "a labelled pair is judged in one order twice",
            "for answers in ((pair.chosen, pair.rejected), (pair.rejected, pair.chosen))",
            "for answers in ((pair.chosen, pair.rejected), (pair.chosen, pair.rejected))",
            "test_a_judge_that_people_would_agree_with",
        ),
        (
            "a metric of which less is better judges labelled pairs the wrong way round",
            "point = points_of(rejected, chosen) if fewer_is_better else points_of(chosen, rejected)",
            "point = points_of(chosen, rejected)",
            "test_a_metric_judges_labelled_pairs_in_its_own_direction",
        ),
        (
            "both answers of a labelled pair are scored as the chosen one",
            "texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]",
            "texts = [text for pair in pairs for text in (pair.chosen, pair.chosen)]",
            "test_a_reward_model_judges_labelled_pairs_by_its_scores",
        ),
    ),
    *in_file(
        "evaluation/labelled_pairs.py",
        "unit/evaluation/test_labelled_pairs.py",
        (
            "a judge that may agree by chance is trusted",
            "return pair.verdict == BETTER",
            "return pair.verdict != WORSE",
            "test_a_judge_is_trusted_only_beyond_chance",
        ),
        (
            "pairs of one prompt are counted as independent",
            "return list(first.values())",
            "return list(pairs)",
            "test_a_prompt_is_judged_once",
        ),
    ),
    *in_file(
        "stages/evaluate/grading.py",
        GRADING,
        (
            "an arm with too many replies without a grade stays",
            "if share <= config.max_invalid]",
            "if share <= 1.0]",
            "test_an_answer_that_names_its_grade_does_not_get_it",
        ),
        (
            "a metric's own rubric is passed over",
            "rubric_of(config, metric.rubric)",
            "rubric_of(config)",
            "test_samples_are_graded_one_by_one_and_rubrics_are_metrics_of_their_own",
        ),
    ),
    *in_file(
        "evaluation/grades.py",
        "unit/evaluation/test_grades.py",
        (
            "a grade beyond the scale counts",
            "if grade is not None and self.lowest <= grade <= self.highest else None",
            "if grade is not None else None",
            "test_a_grade_is_the_last_line_and_nothing_else",
        ),
        (
            "a grade is searched for anywhere in the last line",
            "match = _GRADE.fullmatch(",
            "match = _GRADE.search(",
            "test_a_grade_is_the_last_line_and_nothing_else",
        ),
    ),
    *in_file(
        "evaluation/bounded_client.py",
        ENDPOINT,
        (
            "an encrypted answer has no limits",
            "return _Stream(self._stream.start_tls(ssl_context, server_hostname, timeout=within), self._allowance)",
            "return self._stream.start_tls(ssl_context, server_hostname, timeout=within)",
            "test_an_encrypted_connection_is_limited_in_bytes_and_in_time",
        ),
        (
            "an answer through a proxy has no limits",
            "in (client._transport, *client._mounts.values()):",
            "in (client._transport,):",
            "test_a_proxy_that_sends_a_byte_now_and_then_is_given_up_at_the_timeout",
        ),
    ),
    *in_file(
        "evaluation/exchanges.py",
        "unit/evaluation/test_exchanges.py",
        (
            "a later turn has the first one's reference",
            "reference=row.references[len(answers)])",
            "reference=row.reference)",
            "test_a_row_goes_on_with_the_answers_and_the_turns_behind_them",
        ),
    ),
    *in_file(
        "stages/evaluate/turn_prompts.py",
        TURNS,
        (
            "a later question is asked without the answers before it",
            "prompts = [continued(rows[index], answers) for index in asked for answers in earlier[index]]",
            "prompts = [rows[index] for index in asked for answers in earlier[index]]",
            "test_the_second_question_is_asked_after_the_arms_own_first_answer",
        ),
        (
            "every sample goes on with the first one's answer",
            "samples[turn.rows[number // per_prompt]][number % per_prompt].append(answer.text)",
            "samples[turn.rows[number // per_prompt]][number % per_prompt].append("
            "turn.answers[number - number % per_prompt].text)",
            "test_each_sample_goes_on_with_its_own_answer_and_every_turn_has_its_own_cache",
        ),
        (
            "a later reference is read behind the first question alone",
            "messages = shown(continued(row, before))",
            "messages = shown(row)",
            "test_a_later_reference_is_read_after_the_references_before_it",
        ),
        (
            "a later turn of base+prompt has no system prompt",
            "prompts=tokenize_rows(prompts, lambda prompt: prompt_ids(tokenizer, shown(prompt), prompt.tools)),",
            "prompts=tokenize_rows(prompts, lambda prompt: prompt_ids(tokenizer, prompt.messages)),",
            "test_the_second_question_is_asked_after_the_arms_own_first_answer",
        ),
    ),
    *in_file(
        "stages/evaluate/answer_cache.py",
        TURNS,
        (
            "later turns draw the first one's random numbers",
            'return ("answers", asked.number) if asked.number else ("answers",)',
            'return ("answers",)',
            "test_later_turns_draw_other_random_numbers",
        ),
        (
            "a cached later turn may be that of other rows, which drew other random numbers",
            "parts += [asked.rows] if asked.number else []",
            "parts += []",
            "test_samples_of_a_later_turn_are_cached_with_the_rows_whose_random_numbers_they_drew",
        ),
    ),
    *in_file(
        "stages/evaluate/metric_scores.py",
        TURNS,
        (
            "scorers read a later answer behind the first question",
            "prompt_ids=[next(later) if turn.turn > 0 else first[turn.row] for turn in turn_of_answer],",
            "prompt_ids=[first[turn.row] for turn in turn_of_answer],",
            "test_rewards_and_log_ratios_of_later_turns_are_those_of_the_own_conversation",
        ),
    ),
    *in_file(
        "evaluation/exchanges.py",
        "unit/evaluation/test_exchanges.py",
        (
            "a scored conversation has the first sample's answers",
            "earlier = [of_row[sample : turn * per_prompt : per_prompt] for sample in range(per_prompt)]",
            "earlier = [of_row[: turn * per_prompt : per_prompt] for sample in range(per_prompt)]",
            "test_every_answer_is_behind_its_own_conversation",
        ),
    ),
    *in_file(
        "evaluation/arms.py",
        "unit/evaluation/test_exchanges.py",
        (
            "a conversation's log-ratio is a mean over its turns",
            "return [sum(of_turns) for of_turns in self.by_prompt(self._of_turns(values))]",
            "return self.of_prompts(self._of_turns(values))",
            "test_a_row_scores_the_mean_of_its_turns_and_its_log_ratio_is_their_sum",
        ),
    ),
    *in_file(
        "stages/evaluate/judging.py",
        EVALUATE,
        (
            "a judge reads the answers to other prompts",
            "*(exchanges[name][index] for name in order)",
            "*(exchanges[name][index - 1] for name in order)",
            "test_a_judge_compares_the_first_answers_to_the_same_prompt",
        ),
    ),
    *in_file(
        "stages/evaluate/answer_cache.py",
        EVALUATE,
        (
            "samples of another seed are taken for this one's",
            "parts += [answers.per_prompt, answers.temperature, context.seed(*seed_of(asked))]",
            "parts += [answers.per_prompt, answers.temperature]",
            "test_another_seed_samples_other_answers",
        ),
    ),
    *in_file(
        "evaluation/repeated_answers.py",
        "unit/evaluation/test_repeated_answers.py",
        (
            "pass@k as if answers were drawn with replacement",
            "return 1.0 - math.comb(wrong, k) / math.comb(len(correct), k)",
            "return 1.0 - (wrong / len(correct)) ** k",
            "test_pass_at_k_is_the_share_of_all_choices_with_a_right_answer",
        ),
        (
            "an answer passes above its score only",
            "score >= passing_score",
            "score > passing_score",
            "test_an_answer_passes_at_a_score_of_ones_own",
        ),
    ),
    *in_file(
        "stages/evaluate/answering.py",
        EVALUATE,
        (
            "samples are drawn at temperature 1 whatever is asked for",
            "Sampling(temperature=config.answers.temperature, uniforms=of_rows)",
            "Sampling(temperature=1.0, uniforms=of_rows)",
            "test_a_low_temperature_samples_the_greedy_answer",
        ),
    ),
    *in_file(
        "stages/evaluate/metric_scores.py",
        EVALUATE,
        (
            "answers are scored for the prompts in turn",
            "prompts=asked,\n",
            "prompts=asked[::-1],\n",
            "test_each_answer_is_scored_for_its_own_prompt",
        ),
    ),
    *in_file(
        "records/evaluation.py",
        "unit/evaluation/test_comparisons.py",
        (
            "a difference is real by its p value alone, whatever the number of comparisons",
            "self.adjusted_p < LEVEL",
            "(self.p or 0.0) < LEVEL",
            "test_the_same_difference_is_real_alone_and_may_be_chance_among_many",
        ),
        (
            "more of any metric is better",
            "return BETTER if (difference > 0) == self.higher_is_better else WORSE",
            "return BETTER if difference > 0 else WORSE",
            "test_a_verdict_is_in_the_direction_of_its_metric",
        ),
    ),
    *in_file(
        "evaluation/significance.py",
        "unit/evaluation/test_significance.py",
        (
            "p values are not corrected for their number",
            "p_values[index] * (len(p_values) - rank)",
            "p_values[index]",
            "test_holm",
        ),
        (
            "a difference counts in one direction only",
            "(np.abs(signs @ differences) >= bound)",
            "((signs @ differences) >= bound)",
            "test_a_p_value_is_near_that_of_all_signs",
        ),
    ),
    *in_file(
        "evaluation/length_controlled.py",
        "unit/evaluation/test_length_controlled.py",
        (
            "the win rate at equal lengths does not look at lengths",
            "np.tanh(lengths / spread)",
            "0.0 * lengths",
            "test_an_equal_but_longer_arm_wins_only_while_length_counts",
        ),
    ),
    *in_file(
        "evaluation/tables.py",
        "unit/evaluation/test_pairwise.py",
        (
            "lengths of prompts with invalid verdicts move up",
            "longer = [extra_words[row] for row in counted]",
            "longer = list(extra_words[-len(counted) :])",
            "test_the_win_rate_at_equal_lengths_is_over_the_prompts_that_count",
        ),
        (
            "a judge of nine prompts gives a verdict",
            "if pair.counted < FEWEST_PROMPTS:",
            "if pair.counted < FEWEST_PROMPTS - 1:",
            "test_ten_valid_prompts_are_the_fewest_for_a_verdict",
        ),
    ),
    *in_file(
        "evaluation/contradictions.py",
        "unit/report/test_verdict.py",
        (
            "a reward model's difference that may be chance contradicts",
            "evaluation.is_real(gain) and gain.difference > 0",
            "gain.difference > 0",
            "test_a_reward_model_that_contradicts_is_in_the_headline_if_its_difference_is_real",
        ),
        (
            "a judge of another pair contradicts",
            " and {pair.arm, pair.against} == {better, worse}:",
            ":",
            "test_a_judge_that_does_not_contradict_is_not_in_the_headline",
        ),
    ),
    *in_file(
        "pipeline/execute/notes.py",
        "unit/pipeline/test_notes.py",
        (
            "rows of a validation count as learned from",
            " if not field.startswith(validation_checks.DATA)",
            "",
            "test_rows_of_a_validation_are_not_learned_from_but_may_choose_a_step",
        ),
        (
            "a rule with another target counts as the same metric",
            "source.pattern, source.target, source.schema",
            "source.pattern, source.schema",
            "test_a_primary_metric_that_a_stage_optimises_is_named_and_recorded",
        ),
    ),
    *in_file(
        "evaluation/multiple_choice.py",
        "unit/evaluation/test_multiple_choice.py",
        (
            "equally likely choices count as right",
            "1.0 / logprobs.count(highest)",
            "1.0",
            "test_the_likeliest_letters_share_the_point",
        ),
    ),
    *in_file(
        "stages/evaluate/run.py",
        EVALUATE,
        (
            "an arm chooses without its system prompt",
            "letter_rows(arm.tokenizer, rows, arm.shown)",
            "letter_rows(arm.tokenizer, rows, lambda row: row.messages)",
            "test_the_metric_choice_asks_every_arm_s_policy_behind_its_own_prompt",
        ),
    ),
    *in_file(
        "stages/evaluate/run.py",
        EVALUATE,
        (
            "the evaluation's log-ratio has the other sign",
            "[score - other for score, other in zip(own, reference_logprobs, strict=True)]",
            "[other - score for score, other in zip(own, reference_logprobs, strict=True)]",
            "test_log_ratios_and_rewards_of_every_arm_are_its_own_by_value",
        ),
        (
            "every arm has the reference's words on the first one",
            "reference_logprobs = under[index :: len(compared)]",
            "reference_logprobs = under[0 :: len(compared)]",
            "test_log_ratios_and_rewards_of_every_arm_are_its_own_by_value",
        ),
        (
            "figures that are no numbers are published",
            "        refuse_not_finite(name, arm, rewards=rewards[name], log_ratios=log_ratios[name])\n",
            "        pass\n",
            "test_a_reward_that_is_no_number_ends_the_evaluation",
        ),
    ),
    *in_file(
        "stages/evaluate/evaluation_record.py",
        EVALUATE,
        (
            "arms change their scores",
            "scores=scored.turn_scores[name],",
            "scores=scored.turn_scores[next(iter(scored.arms))],",
            "test_a_metric_is_the_mean_of_what_its_source_says_of_every_answer",
        ),
    ),
    *in_file(
        "stages/evaluate/shown_prompts.py",
        EVALUATE,
        (
            "base+prompt is asked as base is",
            "{PROMPTED: lambda row: with_system_prompt(row.messages, system_prompt)}",
            "{PROMPTED: lambda row: row.messages}",
            "test_the_prompted_arm_is_asked_behind_the_recipe_s_system_prompt",
        ),
    ),
    *in_file(
        "stages/evaluate/answering.py",
        EVALUATE,
        (
            "answers beyond a model's positions are asked for",
            "if longest > positions:",
            "if longest > 1000 * positions:",
            "test_an_arm_whose_positions_do_not_suffice_is_refused",
        ),
    ),
    *in_file(
        "stages/evaluate/answer_cache.py",
        EVALUATE,
        (
            "longer answers are taken from shorter ones",
            "        weights_sha256(policy),\n        max_new_tokens,",
            "        weights_sha256(policy),",
            "test_longer_answers_are_not_taken_from_shorter_ones",
        ),
    ),
    *in_file(
        "stages/evaluate/cache_file.py",
        EVALUATE,
        (
            "kept answers that are damaged are taken",
            "if hashlib.sha256(content.encode()).hexdigest() != sha:",
            "if not sha:",
            "test_kept_answers_that_are_damaged_are_made_anew_with_a_word",
        ),
    ),
    *in_file(
        "stages/evaluate/judging.py",
        EVALUATE,
        (
            "a judge sees one order twice",
            "for order in ((arm, against), (against, arm))",
            "for order in ((arm, against), (arm, against))",
            "test_a_completion_that_says_it_wins_does_not_win",
        ),
        (
            "the first order's verdict counts for both",
            "arm_second=verdicts[number + 1]",
            "arm_second=verdicts[number]",
            "test_a_completion_that_says_it_wins_does_not_win",
        ),
        (
            "all prompts are judged",
            "some(len(rows), config.max_prompts, ",
            "some(len(rows), len(rows), ",
            "test_at_most_so_many_prompts_are_judged",
        ),
    ),
    *in_file(
        "evaluation/grammar.py",
        "unit/evaluation/test_grammar.py",
        (
            "a verdict may stand on the first line",
            'reply.rstrip().rpartition("\\n")[2]',
            'reply.strip().partition("\\n")[0]',
            "test_a_verdict_is_the_last_line_and_nothing_else",
        ),
        (
            "an answer may write markers",
            "{disarmed(text)}",
            "{text}",
            "test_a_judge_that_repeats_what_it_is_shown_names_nobody",
        ),
    ),
    *in_file(
        "evaluation/pairwise.py",
        "unit/evaluation/test_pairwise.py",
        (
            "one order makes a win",
            "        if not self.agree:\n            return TIE\n",
            "",
            "test_a_win_needs_both_orders",
        ),
        (
            "equal scores are a loss",
            "LOSS if score < other else TIE",
            "LOSS",
            "test_scores_are_compared_and_equal_ones_tie",
        ),
    ),
    *in_file(
        "evaluation/endpoint.py",
        "unit/evaluation/test_endpoint.py",
        (
            "a judge is asked at temperature 1",
            "temperature=0,",
            "temperature=1,",
            "test_every_prompt_is_one_greedy_call_with_a_user_turn",
        ),
        (
            "replies of another model are taken",
            "return digest([self._config, prompt])",
            "return digest([prompt])",
            "test_what_was_answered_is_kept_by_who_was_asked",
        ),
    ),
    *in_file(
        "evaluation/endpoint_client.py",
        "unit/evaluation/test_endpoint.py",
        (
            "a key stands in an error",
            'line.replace(key, "***") if key else line',
            "line",
            "test_a_key_comes_from_its_variable_and_stands_nowhere_else",
        ),
    ),
    *in_file(
        "report/run_page/run_records.py",
        "unit/evaluation/test_record.py",
        (
            "runs differ really on any number of prompts",
            "return self.prompts >= FEWEST_PROMPTS and self.adjusted_p",
            "return self.adjusted_p",
            "test_a_difference_between_runs_is_real_beyond_chance_on_enough_prompts",
        ),
    ),
    *in_file(
        "pipeline/execute/run_differences.py",
        "unit/commands/compare/test_driver.py",
        (
            "runs that share an arm weaken the others' differences",
            "        if each and any(each):\n",
            "        if each:\n",
            "test_differences_are_corrected_for_the_number_of_runs_and_arms",
        ),
    ),
    *in_file(
        "evaluation/tables.py",
        "unit/evaluation/test_pairwise.py",
        (
            "pairs of a judge are not corrected",
            "holm([pairs[index].p or 0.0 for index in tested])",
            "[pairs[index].p or 0.0 for index in tested]",
            "test_the_pairs_of_a_judge_are_corrected_for_their_number",
        ),
        (
            "a judge's verdict needs no more than chance",
            "elif adjusted_p < LEVEL:",
            "elif pair.win_rate.mean != TIE:",
            "test_a_verdict_needs_more_than_chance_over_the_prompts_that_decide",
        ),
    ),
    *in_file(
        "evaluation/significance.py",
        "unit/evaluation/test_significance.py",
        (
            "signs are drawn for the series of one length alone",
            "seed=seed, comparisons=len(series))",
            "seed=seed)",
            "test_one_of_many_comparisons_can_be_real_whatever_the_lengths",
        ),
    ),
    *in_file(
        "report/run_page/verdict.py",
        "unit/report/test_verdict.py",
        (
            "preference training is held against every sft arm",
            "if teacher is not None and start == pair.against:",
            "if teacher is not None:",
            "test_preference_training_is_held_against_the_policy_that_it_started_from",
        ),
        (
            "a reward that is higher by chance is over-optimisation",
            "any(item.real and item.difference > 0 for",
            "any(item.difference > 0 for",
            "test_a_higher_reward_with_really_worse_metric_is_called_over_optimisation",
        ),
    ),
    *in_file(
        "stages/evaluate/held_out_prompts.py",
        "unit/stages/test_evaluate.py",
        (
            "a repeated prompt counts again",
            "return list(first.values())",
            "return rows",
            "test_a_repeated_prompt_counts_once",
        ),
    ),
    *in_file(
        "records/evaluation.py",
        "unit/evaluation/test_record.py",
        (
            "more is always better in an evaluation",
            "return BETTER if (difference > 0) == self.higher_is_better else WORSE",
            "return BETTER if difference > 0 else WORSE",
            "test_a_verdict_goes_by_the_direction",
        ),
        (
            "a comparison seen from the other arm keeps its sign",
            "difference=-self.difference,",
            "difference=self.difference,",
            "test_a_verdict_goes_by_the_direction",
        ),
    ),
    *in_file(
        "evaluation/tables.py",
        "unit/evaluation/test_tables.py",
        (
            "all answers are distinct",
            "return len(set(texts)) / len(texts)",
            "return len(texts) / len(texts)",
            "test_a_row_says_how_many_answers_differ_and_ended",
        ),
        (
            "a loss is a mean of means",
            "[float(sum(reference.tokens for reference in sums)) for sums in of_prompts]",
            "[1.0 for _ in of_prompts]",
            "test_the_loss_is_a_mean_over_all_reference_tokens_and_its_interval_over_prompts",
        ),
    ),
    *in_file(
        "evaluation/tables.py",
        "unit/evaluation/test_pairwise.py",
        (
            "a win rate is told whatever the share of invalid verdicts",
            "if valid and invalid <= max_invalid else None",
            "if valid else None",
            "test_too_many_invalid_verdicts_conclude_nothing",
        ),
    ),
    *in_file(
        "evaluation/forgetting_measures.py",
        "unit/evaluation/test_forgetting.py",
        (
            "a lost ability trips no limit",
            "drop.mean > limits.ability_drop",
            "drop.mean > 1e9 + limits.ability_drop",
            "test_a_drop_trips_beyond_its_limit_only",
        ),
        (
            "whoever finds all choices alike is right",
            "scores[question.right] > score for",
            "scores[question.right] >= score for",
            "test_who_finds_all_choices_alike_knows_nothing",
        ),
    ),
    *in_file(
        "evaluation/few_shot.py",
        "unit/evaluation/test_few_shot.py",
        (
            "an example may give an answer away",
            "if row.where not in near]",
            "if row.where is not None]",
            "test_no_example_gives_a_held_out_answer_away",
        ),
    ),
    *in_file(
        "report/doubts.py",
        "unit/report/test_doubts.py",
        (
            "a winner may repeat itself",
            " + winners_that_repeat_themselves(evaluation)\n",
            "\n",
            "test_a_winner_that_says_the_same_to_everybody_is_named",
        ),
        (
            "a judge without a verdict is not named",
            " + _judge_without_a_verdict(evaluation)",
            "",
            "test_a_judge_without_a_verdict_on_any_pair_is_named",
        ),
        (
            "a loser that repeats itself is doubted",
            "if verdict == BETTER else (item.against, item.arm)",
            "if verdict else (item.against, item.arm)",
            "test_few_distinct_answers_alone_are_no_reason",
        ),
    ),
    *in_file(
        "report/run_page/sample_rows.py",
        PAGE,
        (
            "samples on which arms agree are shown as those on which they differ",
            "key=lambda s: -gap(s)",
            "key=gap",
            SHOWN,
        ),
        ("the worse half is called the better one", "if mean > middle else", "if mean < middle else", SHOWN),
    ),
    *in_file(
        "report/run_page/evaluation_section.py",
        PAGE,
        (
            "more of any metric is better where samples are chosen",
            "merit=-score if score is not None and less_is_better else score,",
            "merit=score,",
            SHOWN,
        ),
    ),
    *in_file(
        "report/run_page/verdict.py",
        "unit/report/test_verdict.py",
        (
            "hurt is called help",
            "for item in group if evaluation.verdict(item) == BETTER]",
            "for item in group if item.real]",
            "test_the_lead_says_whether_preference_training_helped",
        ),
        (
            "over-optimisation is not named",
            "if evaluation.verdict(item) == WORSE and _liked_better(evaluation, item):",
            "if False:",
            "test_a_higher_reward_with_really_worse_metric_is_called_over_optimisation",
        ),
        (
            "equal answers to all prompts are not named",
            "if most is not None and repeats_itself(arm, most):",
            "if False:",
            "test_degenerate_arms_large_kl_and_endless_answers_are_named",
        ),
        (
            "an earlier policy is handed on without a word",
            "done is not None and best_update < done:",
            "done is not None and best_update < 0:",
            "test_an_earlier_policy_that_was_handed_on_is_named_with_both_opinions",
        ),
    ),
    *in_file(
        "stages/evaluate/labelled.py",
        "unit/stages/test_labelled.py",
        (
            "a server cannot judge labelled pairs",
            ", run, asking_of(context))",
            ", run)",
            "test_a_server_judges_labelled_pairs",
        ),
    ),
    *in_file(
        "stages/evaluate/shown_prompts.py",
        "unit/stages/test_evaluate_turns.py",
        (
            "a thought that cannot follow its prompt ends the evaluation",
            'if answer in ("", reference):',
            "if answer:",
            "test_a_reference_has_its_thought_only_where_it_can_follow_the_prompt",
        ),
    ),
    *in_file(
        "pipeline/execute/run_differences.py",
        "unit/commands/compare/test_driver.py",
        (
            "the last evaluation is compared as the report's",
            "shown=[own.get(stage) == run.shown for",
            "shown=[True for",
            "test_evaluations_of_one_run_are_compared_each_with_its_own",
        ),
        (
            "evaluations of two names are compared as the reports show them",
            " and all(other.shown == run.shown and first not in other.evaluations for other in same):",
            ":",
            "test_three_runs_are_compared_by_the_names_of_their_evaluations",
        ),
    ),
    *in_file(
        "records/evaluation.py",
        "unit/evaluation/test_record.py",
        (
            "choices do not tell prompts apart",
            "if self.choices or self.tools else []",
            "if self.tools else []",
            "test_one_question_with_other_choices_or_tools_is_another_prompt",
        ),
    ),
]
