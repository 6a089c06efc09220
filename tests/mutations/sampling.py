"""Answers that a stage samples, the rows that it makes of them, and stages that read rows of other stages."""

from __future__ import annotations

from tests.mutations.mutation import in_file

STAGE = "unit/stages/test_sample.py"
PARTS = "unit/stages/test_sample_parts.py"
SELECTION = "unit/stages/test_selection.py"
PLAN = "unit/pipeline/test_made_rows.py"
EXACT = "test_the_best_of_n_has_the_reward_and_the_divergence_of_the_exact_distribution"
STOPPED = "test_a_stage_that_is_stopped_in_the_middle_makes_the_same_bytes_and_nothing_twice"

MUTATIONS = [
    *in_file(
        "algos/best_of_n.py",
        "unit/algos/test_best_of_n.py",
        (
            "the best of n is drawn with replacement",
            "math.comb(below, size - 1) / choices * score for below, score in enumerate(sorted(scores))",
            "((below + 1) ** size - below**size) / len(scores) ** size * score "
            "for below, score in enumerate(sorted(scores))",
            "test_the_expected_best_is_the_mean_over_all_choices",
        ),
        (
            "the bound on the divergence of the best is log n",
            "return math.log(size) - (size - 1) / size",
            "return math.log(size)",
            "test_the_bound_is_nearly_reached_if_every_answer_is_unlikely_and_scores_differ",
        ),
    ),
    *in_file(
        "stages/shared/answer_sampling.py",
        STAGE,
        (
            "answers are sampled at temperature 1 whatever is asked for",
            "temperature=config.temperature, end_ids",
            "temperature=1.0, end_ids",
            EXACT,
        ),
        (
            "the answers to a prompt have the same random numbers",
            "    return torch.rand(*shape, generator=context.generator(SEED, row), dtype=torch.float64)",
            "    numbers = torch.rand(*shape, generator=context.generator(SEED, row), dtype=torch.float64)\n"
            "    return numbers[:1].expand(*shape)",
            EXACT,
        ),
    ),
    *in_file(
        "stages/sample/answer_scoring.py",
        STAGE,
        (
            "answers are scored for other prompts",
            "of_part = [(asked.rows[i], asked.ids[i], answer)",
            "of_part = [(asked.rows[-1 - i], asked.ids[-1 - i], answer)",
            "test_a_reward_model_scores_an_answer_after_its_own_prompt",
        ),
        (
            "scores are normalised by nothing",
            "    rewards.observe(scores)  # a normalised scorer is normalised over all answers\n",
            "",
            "test_a_total_is_the_weighted_sum_over_scorers_normalised_over_all_answers",
        ),
    ),
    *in_file(
        "stages/shared/answer_sampling.py",
        PARTS,
        (
            "only the prompts of a part are held to the policy's positions",
            "refuse_too_long(model.base_model, longest)",
            "refuse_too_long(model.base_model, 1)",
            "test_a_prompt_that_leaves_no_room_for_an_answer_is_refused_before_any_is_sampled",
        ),
        (
            "random numbers depend on the prompts that are left",
            "_uniforms(config, context, asked.rows[index])",
            "_uniforms(config, context, index - spans[number].start)",
            "test_answers_do_not_depend_on_what_is_sampled_beside_them",
        ),
    ),
    *in_file(
        "stages/shared/stored_parts.py",
        PARTS,
        (
            "parts are not stored",
            "            if context.is_main:\n                write_text(",
            "            if False:\n                write_text(",
            STOPPED,
        ),
        (
            "a damaged part is used",
            'if digest(json.dumps(value)) != content["sha256"]:',
            "if False:",
            "test_a_damaged_part_is_made_again_with_a_warning",
        ),
        (
            "a part of other prompts is used",
            "digest([context.spec.fingerprint, key])",
            "digest([context.spec.fingerprint])",
            "test_parts_of_another_size_are_not_used",
        ),
    ),
    *in_file(
        "stages/shared/stored_parts.py",
        "distributed/test_sample.py",
        (
            "every process makes the first part of a group",
            "shared(partial(make, group[context.rank]) if context.rank < len(group) else _nothing)",
            "shared(partial(make, group[0]))",
            "test_two_processes_make_what_one_makes",
        ),
    ),
    *in_file(
        "stages/shared/asked_prompts.py",
        STAGE,
        (
            "prompts of the evaluation are asked",
            "rows = [row for row in ids if row not in reasons]",
            "rows = [row for row in ids if row not in repeated]",
            "test_prompts_that_are_evaluated_or_repeated_are_left_out_and_listed",
        ),
        (
            "a prompt is asked twice",
            "        if tuple(prompt) in seen:\n            yield row\n",
            "",
            "test_prompts_that_are_evaluated_or_repeated_are_left_out_and_listed",
        ),
    ),
    *in_file(
        "stages/sample/selection.py",
        SELECTION,
        (
            "the last of equally good answers is the best",
            "key=lambda index: (scores[index], -index), default=None",
            "key=lambda index: (scores[index], index), default=None",
            "test_the_best_is_the_first_of_the_highest_scores",
        ),
        (
            "the worst answer is chosen",
            "order = sorted(scores, key=lambda index: (-scores[index], index))",
            "order = sorted(scores, key=lambda index: (scores[index], index))",
            "test_pairs_differ_by_the_margin_and_the_better_answer_is_first",
        ),
        (
            "equal scores are a pair",
            "if scores[high] > scores[low] and _reaches(",
            "if _reaches(",
            "test_equal_scores_are_no_pair_and_have_no_label",
        ),
        (
            "equal scores are labelled by the rounding of their mean",
            "if not scores or is_tied(scores):",
            "if not scores:",
            "test_equal_scores_are_no_pair_and_have_no_label",
        ),
        (
            "an answer at the threshold is bad",
            "return {index: _reaches(score, threshold) for",
            "return {index: score > threshold for",
            "test_labels_are_above_the_threshold_or_the_mean",
        ),
        (
            "answers without an end are learned",
            "elif ended_only and not candidate.ended:",
            "elif False:",
            "test_empty_unended_and_repeated_answers_are_left_out",
        ),
        (
            "answers that differ in spaces alone are a pair",
            "elif candidate.text.strip() in seen:",
            "elif candidate.text in seen:",
            "test_empty_unended_and_repeated_answers_are_left_out",
        ),
    ),
    *in_file(
        "stages/sample/row_making.py",
        SELECTION,
        (
            "earlier turns of the assistant are learned again",
            '{**turn.as_dict(), "weight": 0} if turn.role == "assistant" else turn.as_dict()',
            "turn.as_dict()",
            "test_earlier_turns_of_the_assistant_are_not_learned_again",
        ),
    ),
    *in_file(
        "stages/sample/run.py",
        STAGE,
        (
            "scores of another answer are written",
            "by_scorer.of_answer(len(lines))",
            "by_scorer.of_answer(number)",
            "test_every_answer_is_kept_with_its_score_its_seed_and_its_policy",
        ),
        (
            "a stage without any row succeeds",
            "    if not sampling.rows:\n        raise no_rows(config, context, candidates, made)\n",
            "",
            "test_answers_that_give_no_row_end_the_stage_with_the_reason_and_a_remedy",
        ),
    ),
    *in_file(
        "pipeline/plan/made_rows.py",
        PLAN,
        (
            "mixed-in rows of a stage are no reference",
            "            for number, part in enumerate(slot.data.mix if isinstance(slot.data, DataConfig) else ()):\n"
            '                yield replace(slot, field=f"{slot.field}.mix[{number}]", data=part)\n',
            "",
            "test_a_mixed_in_source_may_be_a_stage_too",
        ),
        (
            "what a scorer reads in rows of a stage is not checked",
            "yield replace(slot, checks=(*slot.checks, *of_scorers)) if own else slot",
            "yield slot",
            "test_rows_that_lack_what_a_scorer_reads_are_refused",
        ),
        (
            "a format that does not fit is accepted",
            'form = FORMATS.get(slot.data.format or "") or detect(',
            "form = detect(",
            "test_rows_that_cannot_be_used_are_refused_while_planning",
        ),
        (
            "the evaluation's prompts replace those that a stage names",
            "if not field or getattr(stage, field):",
            "if not field:",
            "test_the_evaluation_s_prompts_are_left_out_unless_others_are_named",
        ),
        (
            "the evaluation of a stage's rows is left out of them",
            "if part.source and stage_named(part.source) is None",
            "if part.source",
            "test_an_evaluation_of_made_rows_is_not_left_out_of_them",
        ),
    ),
    *in_file(
        "pipeline/plan/references.py",
        PLAN,
        (
            "rows of another stage are not an input",
            "    yield from made_rows.slots(stage)\n",
            "",
            "test_rounds_are_a_chain_that_the_run_records",
        ),
    ),
    *in_file(
        "pipeline/plan/plan.py",
        PLAN,
        (
            "rows that exist are not looked at",
            '                seen[file.field] = _read(file, path, where=f"stages.{name}.{file.field}")\n',
            "                pass\n",
            "test_rows_that_exist_are_read_while_planning",
        ),
    ),
    *in_file(
        "pipeline/execute/rehearsal.py",
        PLAN,
        (
            "rows that do not exist yet are tried",
            "    waiting = [stage for stage in waiting if not stage.unmade]  # there is nothing to try yet\n",
            "",
            "test_a_stage_is_not_rehearsed_on_rows_that_do_not_exist",
        ),
    ),
    *in_file(
        "worker.py",
        PLAN,
        (
            "rows that changed since they were made are learned",
            "        verify(made_by.path, content=True)\n",
            "        pass\n",
            "test_the_worker_refuses_rows_that_changed_since_they_were_made",
        ),
    ),
    *in_file(
        "stages/sample/selection.py",
        "unit/stages/test_selection.py",
        (
            "a rounded score does not reach its threshold",
            "_ROUNDING = 2.0**-22",
            "_ROUNDING = 0.0",
            "test_a_score_on_the_threshold_reaches_it_whatever_it_was_rounded_to",
        ),
    ),
]
