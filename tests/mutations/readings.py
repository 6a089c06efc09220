"""Faults in how rows become tokens, in what an estimate reads, and in what stops or continues a run or a sweep."""

from __future__ import annotations

from tests.mutations.mutation import in_file

WHOLE_TEXT = "test_the_whole_text_of_an_example_in_another_column_is_no_prompt"
IDS = "test_a_template_gets_the_ids_of_calls_and_what_their_results_answer"
MIXED = "test_what_is_mixed_in_shrinks_with_the_stages_own_rows"
RETRIED = "test_failed_trials_are_tried_again_when_they_are_asked_for"

MUTATIONS = [
    *in_file(
        "data/formats/plain.py",
        "unit/data/test_formats.py",
        ("an instruction is read from any column", "asked(fields, prompt)", "asked(fields)", WHOLE_TEXT),
    ),
    *in_file(
        "data/formats/conversations.py",
        "unit/data/test_formats.py",
        ("a conversation is read from any column", "asked(fields, column)", "asked(fields)", WHOLE_TEXT),
    ),
    *in_file(
        "data/records.py",
        "unit/data/test_formats.py",
        (
            "a call behind a labelled answer is lost",
            "        if last.tool_calls:\n",
            "        if False:\n",
            "test_a_labelled_answer_that_ends_with_a_tool_call_is_refused",
        ),
    ),
    *in_file(
        "data/turns.py",
        "unit/data/test_templates.py",
        ("results do not say which call they answer", "**calls, **answered}", "**calls}", IDS),
    ),
    *in_file(
        "data/turns.py",
        "unit/data/test_formats.py",
        (
            "ids of calls are lost",
            "return {**own_id, ",
            "return {",
            "test_tools_calls_and_their_results_are_kept_in_both_forms",
        ),
    ),
    *in_file(
        "data/overlap.py",
        "unit/data/test_overlap.py",
        (
            "a clause without spaces is one word",
            'rf"[{WITHOUT_SPACES}]|{spaced_word()}"',
            'r"\\w+"',
            "test_scripts_without_spaces_are_compared_by_their_characters",
        ),
    ),
    *in_file(
        "data/tokens/tokenize.py",
        "unit/data/test_text_beginnings.py",
        (
            "every part of a row begins with a space",
            "    if not _changes_beginnings(tokenizer):\n",
            "    if True:\n",
            "test_a_row_has_the_tokens_of_its_text_in_one_piece",
        ),
    ),
    *in_file(
        "data/tokens/row_kinds.py",
        "unit/data/test_text_beginnings.py",
        (
            "answers begin as if no prompt were before them",
            "return prompt[-1].text if prompt else",
            'return "" if prompt else',
            "test_a_prompt_and_its_answers_are_the_row",
        ),
    ),
    *in_file(
        "data/first_records.py",
        "unit/data/test_first_records.py",
        (
            "lines are taken for records",
            "times = lines / reading.rows",
            "times = lines / records",
            "test_records_are_counted_and_not_lines",
        ),
        ("all that is mixed in is read", "count=math.ceil(part.count / times)", "count=part.count", MIXED),
    ),
    *in_file(
        "core/artifacts.py",
        "unit/core/test_artifacts.py",
        (
            "what a newer version added is ignored",
            "    if newer:\n",
            "    if False:\n",
            "test_a_manifest_of_a_newer_version_is_not_called_damaged",
        ),
    ),
    *in_file(
        "pipeline/plan/reasons.py",
        "unit/pipeline/test_plan.py",
        (
            "a damaged result stops plans that do not need it",
            "with suppress(ArtifactError):",
            "with suppress(KeyError):",
            "test_a_result_that_the_plan_does_not_need_may_be_unreadable",
        ),
    ),
    *in_file(
        "pipeline/execute/signals.py",
        "unit/pipeline/test_run.py",
        (
            "a second request interrupts the saving",
            "            signal.signal(each, signal.SIG_IGN)\n",
            "            pass\n",
            "test_a_second_request_does_not_cut_short_what_the_first_began",
        ),
    ),
    *in_file(
        "pipeline/execute/run.py",
        "unit/pipeline/test_run.py",
        (
            "a run that met another one is left as running",
            "                recorder.end()  # another",
            "                pass  # another",
            "test_a_result_that_another_run_works_on_is_left_alone",
        ),
    ),
    *in_file(
        "pipeline/sources/hub.py",
        "unit/pipeline/test_hub_data.py",
        (
            "a full disk is the hub's fault",
            "raise disk_error(error, folder=Path(HF_HUB_CACHE)) or _failed(",
            "raise _failed(",
            "test_a_full_disk_is_no_fault_of_the_hub",
        ),
    ),
    *in_file(
        "pipeline/sweeps/study.py",
        "unit/pipeline/sweeps/test_sweep.py",
        (
            "a trial that was queued again still counts as failed",
            " or trial.number in self._retried\n",
            "\n",
            RETRIED,
        ),
    ),
    *in_file(
        "pipeline/sweeps/study.py",
        "unit/pipeline/sweeps/test_sweep.py",
        (
            "half a line of a full disk stays in the journal",
            "        cut_unfinished_line(self._journal)\n        self._study.tell",
            "        self._study.tell",
            "test_half_a_line_that_a_full_disk_leaves_is_cut_before_the_next",
        ),
    ),
    *in_file(
        "records/evaluation.py",
        "unit/report/test_verdict.py",
        (
            "a difference on too few prompts is real",
            "        if num_prompts is not None and num_prompts < FEWEST_PROMPTS:\n            return TOO_FEW\n",
            "",
            "test_too_few_prompts_give_no_verdict",
        ),
    ),
    *in_file(
        "evaluation/conclusions.py",
        "unit/evaluation/test_conclusions.py",
        (
            "too few prompts show a difference",
            "comparisons and num_prompts < FEWEST_PROMPTS:",
            "comparisons and num_prompts < 0:",
            "test_too_few_prompts_show_nothing",
        ),
    ),
    *in_file(
        "report/run_page/run_files.py",
        "unit/report/test_verdict.py",
        (
            "nobody is told which evaluation a page shows",
            "    if not evaluated or not others:",
            "    if True:",
            "test_a_run_with_several_evaluations_says_which_one_is_shown",
        ),
    ),
    *in_file(
        "commands/shared/policy_finder.py",
        "unit/commands/chat/test_driver.py",
        (
            "the base of a result has no template of the run",
            "    if replaced is None:\n        return TemplateChoice(options=options)\n",
            "    return TemplateChoice()\n",
            "test_the_base_of_a_result_has_the_template_of_its_run",
        ),
        (
            "options are put before a template that has them",
            'TemplateChoice(source=f"{PATH}{folder / TOKENIZER / TEMPLATE_FILE}")',
            'TemplateChoice(source=f"{PATH}{folder / TOKENIZER / TEMPLATE_FILE}", options=options)',
            "test_the_base_of_a_result_has_the_template_of_its_run",
        ),
    ),
    *in_file(
        "commands/compare/driver.py",
        "unit/commands/compare/test_driver.py",
        (
            "values are cut on a narrow terminal",
            "        table.add_row(escape(key), *map(escape, values))\n    print_whole(console, table)",
            "        table.add_row(escape(key), *map(escape, values))\n    console.print(table)",
            "test_values_are_whole_on_a_narrow_terminal",
        ),
    ),
    *in_file(
        "commands/export/provenance.py",
        "unit/commands/export/test_model_card.py",
        (
            "folders with spaces stay in a value",
            '_FOLDERS.sub("", _MARKED.sub("", _WHOLE.sub(r"\\1", value)))',
            '_FOLDERS.sub("", value)',
            "test_folders_with_spaces_are_left_out_of_values",
        ),
    ),
    *in_file(
        "core/streams.py",
        "unit/core/test_streams.py",
        (
            "a character that the terminal lacks ends a command",
            'stream.reconfigure(errors="backslashreplace")',
            "pass",
            "test_characters_that_the_terminal_lacks_are_printed_as_numbers",
        ),
    ),
    *in_file(
        "commands/serve/transformers_app.py",
        "unit/commands/serve/test_transformers_app.py",
        (
            "a page of any name may ask the server",
            "[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False)]",
            "[]",
            "test_a_page_that_points_its_own_name_at_this_machine_is_refused",
        ),
    ),
    *in_file(
        "pipeline/sweeps/sweep_file.py",
        "unit/pipeline/sweeps/test_sweep.py",
        (
            "only what the first values name is part of a study",
            "if stage.name in judged] for plan in plans]",
            "if stage.name in judged] for plan in plans[:1]]",
            "test_what_any_of_the_values_names_counts_not_only_the_first",
        ),
        (
            "only the first values are checked",
            "    for plan in plans:\n        refuse(",
            "    for plan in plans[:1]:\n        refuse(",
            "test_a_sweep_that_cannot_be_right_starts_nothing",
        ),
    ),
    *in_file(
        "rewards/rules/numbers.py",
        "unit/rewards/test_rules.py",
        (
            "the first of several numbers is the right answer",
            "if number and exact_answer(number.string, _value(number)):",
            "if number:",
            "test_a_row_without_a_number_to_check_against_is_named",
        ),
    ),
    *in_file(
        "stages/sample/selection.py",
        "unit/stages/test_selection.py",
        (
            "a score at the mean is labelled by its rounding",
            "if not _is_at(score, mean)}",
            "if score != mean}",
            "test_labels_are_above_the_threshold_or_the_mean",
        ),
    ),
    *in_file(
        "models/assembly/start.py",
        "unit/models/test_start.py",
        (
            "an adapter of four bits stays beside whole weights",
            "    _refuse_whole_weights(beside, adapter)\n    model = load",
            "    model = load",
            "test_what_was_trained_on_four_bits_does_not_stay_beside_whole_weights",
        ),
    ),
    *in_file(
        "models/assembly/adapters.py",
        "unit/models/test_start.py",
        (
            "an adapter is continued with other target modules than are asked for",
            "if config.target_modules != [_ALL_LINEAR] and",
            "if False and",
            "test_an_adapter_keeps_its_shape_when_it_is_continued",
        ),
    ),
    *in_file(
        "pipeline/plan/chain_checks.py",
        "unit/pipeline/test_settings.py",
        (
            "a plan puts an adapter of four bits beside whole weights",
            "before is not None and before.kind is AdapterKind.qlora:",
            "False:",
            "test_adapters_that_cannot_stand_on_one_another_are_refused",
        ),
    ),
    *in_file(
        "estimate.py",
        "unit/costs/test_ways.py",
        (
            "DDP's buckets take no room",
            "        parts[DDP] = recorder.trained_bytes  #",
            "        pass  #",
            "test_processes_divide_what_their_launch_divides",
        ),
        (
            "what is offloaded stays on the GPU",
            "if part in DIVIDED[spec.sharding]] if timer.is_gpu else []",
            "if not part]",
            "test_what_is_offloaded_is_on_the_host",
        ),
        (
            "what is offloaded is nowhere",
            "*(phase.peak for phase in on_host), *offloaded]",
            "*(phase.peak for phase in on_host)]",
            "test_what_is_offloaded_is_on_the_host",
        ),
    ),
    *in_file(
        "pipeline/plan/plan.py",
        "unit/pipeline/test_loss_settings.py",
        (
            "a plan refuses rows that the stage will skip",
            "            if file.data.on_error is not OnError.skip:\n                raise\n",
            "            raise\n",
            "test_a_row_whose_scores_are_of_no_use_is_named",
        ),
        (
            "a plan lets any number of rows be skipped",
            "        refuse_faults_of(reading, _first_rows(file.data))\n",
            "        pass\n",
            "test_a_margin_needs_rows_with_scores_which_columns_may_name",
        ),
    ),
    *in_file(
        "stages/shared/by_prompt.py",
        "unit/stages/test_validation.py",
        (
            "texts that end alike are the same ones",
            "    return [first[row] if whole else prompts[row] for row, whole in enumerate(learned_at_once)]",
            "    return prompts",
            "test_texts_that_only_end_alike_are_different_ones",
        ),
    ),
    *in_file(
        "data/tokens/rendering.py",
        "unit/evaluation/test_general.py",
        (
            "what a template writes before an answer is scored",
            '    opening = opening.rstrip(" ")\n',
            '    opening = ""\n',
            "test_only_the_choice_s_own_text_counts",
        ),
        (
            "what ends a turn is scored",
            "text[len(opening) : len(text) - len(ending)]",
            "text[len(opening) :]",
            "test_only_the_choice_s_own_text_counts",
        ),
    ),
    *in_file(
        "training/callbacks.py",
        "unit/training/test_session.py",
        (
            "a stage that goes on saves as often as it was asked to before",
            "        state.logging_steps, state.save_steps = int(args.logging_steps), int(args.save_steps)\n",
            "        pass\n",
            "test_a_stage_that_goes_on_logs_and_saves_as_often_as_it_is_asked_to_now",
        ),
    ),
    *in_file(
        "training/micro_batches.py",
        "unit/training/test_micro_batches.py",
        (
            "figures of some processes are left out of a last batch",
            "with reused_norms(model), outside_of_data_loaders(self.accelerator):",
            "with reused_norms(model):",
            "test_figures_of_a_last_batch_that_is_not_full_are_gathered_whole",
        ),
    ),
    *in_file(
        "core/scripts.py",
        "unit/data/test_near_duplicates.py",
        (
            "near duplicates in scripts without spaces are not found",
            "if text.isascii() else _PIECE.findall(text)",
            "if True else _PIECE.findall(text)",
            "test_a_character_is_a_word_in_scripts_without_spaces",
        ),
    ),
    *in_file(
        "evaluation/bag_of_words.py",
        "unit/evaluation/test_bag_of_words.py",
        (
            "a clause without spaces is one word of the bag",
            'rf"[{WITHOUT_SPACES}]|{word}',
            'rf"\\w+',
            "test_scripts_without_spaces_have_a_word_for_each_character",
        ),
    ),
    *in_file(
        "pipeline/plan/overrides.py",
        "unit/pipeline/test_compose.py",
        (
            "a comma in a file's name makes several values",
            "if parsed.is_sweep_override() and",
            "if False and",
            "test_letters_of_every_language_need_no_quotes",
        ),
    ),
    *in_file(
        "pipeline/backends/machines.py",
        "unit/pipeline/test_machines.py",
        (
            "a machine ends while the first one uploads",
            "                _wait_for_uploads(plan)\n",
            "                pass\n",
            "test_with_a_store_other_machines_wait_until_the_first_has_uploaded",
        ),
        (
            "a machine waits for ever for one that is gone",
            'in ("running", "") and not signs.are_missing(limit):',
            'in ("running", ""):',
            "test_with_a_store_other_machines_wait_until_the_first_has_uploaded",
        ),
        (
            "the first machine shows life once",
            "            if is_over.wait(_POLL_SECONDS):\n                return\n",
            "            return\n",
            "test_the_first_machine_lives_whatever_it_does",
        ),
    ),
    *in_file(
        "pipeline/execute/inputs.py",
        "unit/pipeline/test_hub_data.py",
        (
            "an input made from a branch that is not here counts as missing",
            "    if _may_be_here(plan, _missing(plan, only)):\n",
            "    if False:\n",
            "test_an_input_made_from_a_branch_that_is_no_longer_here_does_not_count_as_missing",
        ),
        (
            "models are downloaded only to refuse a stage",
            "    if _may_be_here(plan, _missing(plan, only)):\n",
            "    if _missing(plan, only):\n",
            "test_nothing_is_downloaded_for_a_stage_whose_inputs_cannot_be_here",
        ),
        (
            "only what the stage itself reads is downloaded",
            "        names += [",
            "        [",
            "test_an_input_made_from_a_branch_that_is_no_longer_here_does_not_count_as_missing",
        ),
    ),
    *in_file(
        "engines/keeper_process.py",
        "unit/engines/test_server_process.py",
        (
            "a server takes itself for one of its owner's group",
            "env=without_ranks(os.environ) |",
            "env=os.environ |",
            "test_a_server_is_not_one_of_its_owner_s_group",
        ),
    ),
    *in_file(
        "training/looks.py",
        "unit/stages/test_validation.py",
        (
            "a look's phase goes on",
            '        self._context.progress("training", state.global_step, state.max_steps)\n',
            "",
            "test_what_comes_after_a_look_is_training",
        ),
    ),
    *in_file(
        "training/longest_batch.py",
        "unit/training/test_longest_batch.py",
        (
            "the trial's phase goes on",
            '        self._context.progress("training", state.global_step, state.max_steps)\n',
            "",
            "test_what_comes_after_it_is_training",
        ),
    ),
    *in_file(
        "core/scripts.py",
        "unit/data/test_overlap.py",
        (
            "vowel signs divide words",
            'if unicodedata.category(char)[0] == "M")',
            'if char == "\\u0300")',
            "test_words_that_differ_only_in_their_vowel_signs_are_different",
        ),
    ),
    *in_file(
        "data/reading.py",
        "unit/data/test_reading.py",
        (
            "a column has to be in one of the first rows",
            "while known and missing and (row := next(later, None)) is not None:",
            "while not known and (row := next(later, None)) is not None:",
            "test_a_column_may_appear_for_the_first_time_after_many_rows",
        ),
    ),
]
