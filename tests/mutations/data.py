"""What is learned of a row, which rows are taken, and what scores an answer."""

from __future__ import annotations

from tests.mutations.mutation import in_file

BY_TEMPLATE = "test_every_conversation_is_what_the_template_renders"
LOOKS_INSIDE = "test_a_template_that_may_look_inside_a_content_is_left_to_itself"
GOES_ON = "test_an_interrupted_table_goes_on_where_it_was_saved"
SPLITS = "test_every_split_and_subset_of_a_hub_data_set_has_a_table_of_its_own"
FEW_FAULTS = "test_faulty_rows_may_be_skipped_up_to_a_share_and_are_listed"

MUTATIONS = [
    *in_file(
        "rewards/rules/similarity.py",
        "unit/rewards/test_rules.py",
        (
            "other scripts than Latin have no words",
            'RougeScorer(["rougeL"], tokenizer=_Words())',
            'RougeScorer(["rougeL"])',
            "test_rouge_l_knows_the_letters_of_every_script",
        ),
        (
            "a grader sees the last answer instead of the references",
            'if getattr(prompt, "later_turns", ()):',
            'if getattr(prompt, "later_turns", ()) or own:',
            "test_what_is_shown_of_several_references_is_the_first",
        ),
    ),
    *in_file(
        "data/repeated_records.py",
        "unit/data/test_doctor.py",
        (
            "a row repeats an earlier one if any of its pairs does",
            "if all(earlier) or",
            "if any(earlier) or",
            "test_a_row_of_several_pairs_repeats_an_earlier_one_only_with_all_of_them",
        ),
    ),
    *in_file(
        "data/filled_fields.py",
        "unit/data/test_reading.py",
        (
            "tools have the parameters of all others",
            "for name, item in value.items() if item is not None}",
            "for name, item in value.items()}",
            "test_tools_and_calls_have_the_fields_that_they_were_written_with",
        ),
        (
            "columns for scorers lose their nulls",
            'if "name" in value and not _OF_FUNCTIONS.isdisjoint(value):',
            'if "name" in value:',
            "test_tools_and_calls_have_the_fields_that_they_were_written_with",
        ),
        (
            "a row with a name is a function",
            "return {column: _without_filled(value) for column, value in row.items()}",
            "return _without_filled(dict(row))",
            "test_columns_that_are_called_like_the_fields_of_a_function_keep_their_nulls",
        ),
    ),
    *in_file(
        "data/list_texts.py",
        "unit/data/test_reading.py",
        (
            "all references of a CSV are the first turn's",
            'if "turns" in lists:',
            "if not lists:",
            "test_references_to_the_turns_of_a_csv_are_a_list_like_them",
        ),
    ),
    *in_file(
        "data/tokens/tokenizer.py",
        "unit/data/test_chat_template.py",
        (
            "a saved template has another hash",
            'and list(templates) == ["default"]:',
            "and not templates:",
            "test_a_default_template_without_others_is_hashed_like_its_text",
        ),
    ),
    *in_file(
        "data/records.py",
        "unit/data/test_records.py",
        (
            "a bad answer is a reference",
            'if example.good is False:\n        return ""',
            'if example.good is None:\n        return ""',
            "test_an_answer_that_is_labelled_as_bad_is_no_reference",
        ),
    ),
    *in_file(
        "data/tokens/tokenize.py",
        "unit/data/test_tokenize.py",
        (
            "every token is learned",
            "row.learned.extend([segment.learned] * len(ids))",
            "row.learned.extend([True] * len(ids))",
            "test_exactly_the_assistants_turns_and_their_ends_are_learned",
        ),
        (
            "a control token that somebody wrote is one",
            "split_special_tokens=True",
            "split_special_tokens=False",
            "test_a_control_token_that_somebody_wrote_stays_text",
        ),
        (
            "an answer ends with EOS alone",
            "frozenset({turn_end_id(tokenizer), tokenizer.eos_token_id,",
            "frozenset({tokenizer.eos_token_id,",
            "test_answers_end_with_the_token_that_ends_a_turn",
        ),
        (
            "the model's own ends of answers are ignored",
            "tokenizer.eos_token_id, *getattr(tokenizer, STOPS, ())})",
            "tokenizer.eos_token_id})",
            "test_an_answer_is_over_where_the_models_generation_config_says",
        ),
    ),
    *in_file(
        "data/tokens/tokenize.py",
        "unit/data/test_token_table.py",
        (
            "tokens that are not learned have labels",
            "return [IGNORED] * len(self.ids)",
            "return list(self.ids)",
            "test_rows_are_those_of_the_records_in_their_order",
        ),
    ),
    *in_file(
        "data/tokens/skeletons.py",
        "unit/data/test_skeletons.py",
        ("blanks behind a content are lost", "(False, True): str.lstrip", "(False, True): str.strip", BY_TEMPLATE),
        ("a content that is false is put together", 'and content != "" and not content.isspace()', "", BY_TEMPLATE),
        ("a prompt is rendered as a conversation", "key = answering, tuple", "key = False, tuple", BY_TEMPLATE),
    ),
    *in_file(
        "data/template_flow.py",
        "unit/data/test_skeletons.py",
        (
            "a template may strip any letters",
            'expression.name == "trim" and not _arguments(expression)',
            'expression.name == "trim"',
            LOOKS_INSIDE,
        ),
        (
            "a template may compare contents",
            "        self._plain(expression.expr, *(operand.expr for operand in expression.ops))\n",
            "",
            LOOKS_INSIDE,
        ),
        (
            "a content in a namespace is not followed",
            'name = f"{target.name}.{target.attr}"',
            "return",
            LOOKS_INSIDE,
        ),
    ),
    *in_file(
        "data/tokens/table_files.py",
        "unit/data/test_token_table.py",
        ("what was written after the last save stays", "os.truncate(folder / name, size)", "pass", GOES_ON),
        ("counts begin anew", '(Counts(**stored["counts"]), sizes)', "(Counts(), sizes)", GOES_ON),
    ),
    *in_file(
        "data/tokens/token_table.py",
        "unit/data/test_token_table.py",
        ("rows that were read are read again", "before.read, None)", "0, None)", GOES_ON),
        ("a limit counts what is left alone", "data.limit - before.records", "data.limit", GOES_ON),
        (
            "splits of a data set share a table",
            "[str(path), data.split, data.subset]",
            "[str(path), data.subset]",
            SPLITS,
        ),
        (
            "subsets of a data set share a table",
            "[str(path), data.split, data.subset]",
            "[str(path), data.split]",
            SPLITS,
        ),
    ),
    *in_file(
        "data/key_set.py",
        "unit/data/test_key_set.py",
        (
            "only the last keys are known",
            "unknown &= run[at] != keys",
            "unknown = run[at] != keys",
            "test_keys_are_new_once_whatever_the_batches",
        ),
    ),
    *in_file(
        "commands/doctor/driver.py",
        "unit/data/test_doctor.py",
        (
            "a file whose every row is set aside is a good one",
            "diagnosis.num_faults or diagnosis.is_useless or",
            "diagnosis.num_faults or",
            "test_a_file_of_which_every_row_is_set_aside_is_of_no_use",
        ),
        (
            "pairs that are read as prompts are good ones",
            " or diagnosis.misspelt_format is not None\n",
            "\n",
            "test_a_column_that_is_misspelt_in_every_row_counts_if_it_changes_the_format",
        ),
    ),
    *in_file(
        "data/objections.py",
        "unit/data/test_doctor.py",
        (
            "every faulty row is held in memory",
            "if len(rows.first) < self._held:",
            "if True:",
            "test_memory_grows_by_a_few_bytes_a_row",
        ),
    ),
    *in_file(
        "data/reading.py",
        "unit/data/test_reading.py",
        (
            "every row that is left out is held in memory",
            "if len(self.first) < NAMED:",
            "if True:",
            FEW_FAULTS,
        ),
    ),
    *in_file(
        "data/tokens/tokenize.py",
        "unit/data/test_templates.py",
        (
            "special tokens are put around rendered text",
            "encode_batch_fast(texts, add_special_tokens=False",
            "encode_batch_fast(texts, add_special_tokens=True",
            "test_a_row_begins_with_the_one_bos_that_it_has",
        ),
    ),
    *in_file(
        "data/tokens/rendering.py",
        "unit/data/test_tokenize.py",
        (
            "a turn of weight 0 is learned",
            "Segment(text=answer, learned=learned)",
            "Segment(text=answer, learned=True)",
            "test_a_turn_that_is_not_to_be_learned_is_context",
        ),
        (
            "what follows the end of a turn is learned",
            "opened_once(before, text[: _turn_end(tokenizer, text)])",
            "opened_once(before, text)",
            "test_the_line_break_after_a_turn_is_never_learned",
        ),
        (
            "tools that a template drops are not missed",
            "    _refuse_lost_tools(text, messages, tools)\n    return text",
            "    return text",
            "test_a_template_that_leaves_tools_or_calls_out_is_refused",
        ),
    ),
    *in_file(
        "data/tokens/limits.py",
        "unit/data/test_limits.py",
        (
            "any share of rows may be lost",
            "(dropped + cut) / records <= share and",
            "(dropped + cut) / records <= 1 and",
            "test_few_lost_rows_are_allowed_and_many_are_not",
        ),
        (
            "prompts are cut at the wrong end",
            "if side is Side.left:",
            "if side is not Side.left:",
            "test_an_answer_loses_its_end_and_the_prompt_its_side",
        ),
    ),
    *in_file(
        "data/reading.py",
        "unit/data/test_reading.py",
        (
            "any share of rows may be faulty",
            "if not stopped and count / rows > data.max_skipped:",
            "if not stopped and count > rows:",
            "test_faulty_rows_may_be_skipped_up_to_a_share_and_are_listed",
        ),
        (
            "faulty rows are skipped without being asked to",
            "if data.on_error is OnError.fail:",
            "if data.on_error is None:",
            "test_a_fault_of_many_rows_is_told_once",
        ),
    ),
    *in_file(
        "data/mix.py",
        "unit/data/test_mix.py",
        (
            "a mixed source gives its first rows",
            "first + _drawn(others, wanted, generator)",
            "first + np.arange(wanted)",
            "test_the_seed_decides_which_rows_and_in_which_order",
        ),
        (
            "a share is of the own rows",
            "total = (own + sum(counts)) / rest",
            "total = own + sum(counts)",
            "test_shares_are_of_the_whole_and_every_own_row_is_there_once",
        ),
    ),
    *in_file(
        "data/hub_rows.py",
        "unit/data/test_hub.py",
        (
            "a repository may name files of this machine",
            "        if not any(Path(normpath(file)).is_relative_to(root) for root in (folder, folder.resolve())):",
            "        if not file:",
            "test_a_description_that_names_files_of_other_places_is_refused",
        ),
        (
            "the split that was asked for is ignored",
            "as_streaming_dataset(split=split)",
            "as_streaming_dataset(split=next(iter(files)))",
            "test_the_description_says_which_files_make_which_split_of_which_subset",
        ),
    ),
    *in_file(
        "stages/shared/stage_rows.py",
        "unit/stages/test_rows.py",
        (
            "a part of the rows is drawn by the stage's name",
            'context.run_generator(f"{DRAWN_AS.get(field, field)}.fraction")',
            'context.generator(f"{DRAWN_AS.get(field, field)}.fraction")',
            "test_parts_are_nested_whatever_the_stage_is_called",
        ),
    ),
    *in_file(
        "rewards/weighted_sum.py",
        "unit/rewards/test_mix.py",
        (
            "weights of scorers are ignored",
            "part.weight * self._rescaled(name, self._own(name, by_name))",
            "self._rescaled(name, self._own(name, by_name))",
            "test_the_total_is_the_weighted_sum_of_clipped_scores",
        ),
        (
            "scores are never clipped",
            "scores = scores.clamp(-part.clip, part.clip)",
            "scores = scores.clamp(-1e9 * part.clip, 1e9 * part.clip)",
            "test_the_total_is_the_weighted_sum_of_clipped_scores",
        ),
        (
            "the guard's look changes running means",
            "        summands = [",
            "        self.observe(scores)\n        summands = [",
            "test_looking_without_learning_changes_nothing",
        ),
        (
            "a scorer sees the rows in the data's order",
            "prompts=[self._prompts[row] for row in rows]",
            "prompts=[self._prompts[row] for row in range(len(rows))]",
            "test_a_scorer_sees_text_without_special_tokens_and_the_row_of_each_prompt",
        ),
    ),
    *in_file(
        "rewards/scorers.py",
        "unit/rewards/test_functions.py",
        (
            "a score may be missing",
            "if len(given) != count:",
            "if len(given) > count:",
            "test_what_is_no_score_is_refused_by_function_row_and_value",
        ),
        (
            "a score may be infinite",
            "if not math.isfinite(number):",
            "if number is None:",
            "test_what_is_no_score_is_refused_by_function_row_and_value",
        ),
        (
            "a score may be of any size",
            "if abs(number) > LARGEST:",
            "if abs(number) > math.inf:",
            "test_what_is_no_score_is_refused_by_function_row_and_value",
        ),
    ),
    *in_file(
        "data/records.py",
        "unit/data/test_records.py",
        (
            "the chosen answer of a pair is the right choice, always the first",
            'has_choices = isinstance(fields.row.get("choices"), list) and len(ranks) > 1',
            "has_choices = len(ranks) > 1",
            "test_answers_that_people_ranked_are_no_choices",
        ),
    ),
    *in_file(
        "rewards/rules/texts.py",
        "unit/rewards/test_rules.py",
        (
            "a key fact may be part of a word",
            'f" {wording} " in answer',
            "wording in answer",
            "test_key_facts_are_the_share_that_stands_in_the_answer",
        ),
    ),
    *in_file(
        "rewards/rules/json_schema.py",
        "unit/rewards/test_rules.py",
        (
            "NaN is JSON",
            "json.loads(text, parse_constant=_refuse_constant)",
            "json.loads(text)",
            "test_what_python_reads_as_a_number_and_json_does_not_have_is_refused",
        ),
        (
            "the metric's schema comes before the row's",
            "if schema is None and self._default is not None:",
            "if self._default is not None:",
            "test_a_row_s_own_schema_comes_before_the_metric_s",
        ),
        (
            "an answer's number that is too large ends the stage",
            "except (ValueError, OverflowError, RecursionError):",
            "except (ValueError, RecursionError):",
            "test_a_number_too_large_to_check_is_not_accepted",
        ),
    ),
    *in_file(
        "rewards/rules/instructions.py",
        "unit/rewards/test_rules.py",
        (
            "an argument that a row leaves open is drawn",
            "    if drawn:\n",
            "    if not name:\n",
            "test_a_row_whose_instructions_cannot_be_checked_is_named",
        ),
    ),
    *in_file(
        "rewards/scorers.py",
        "unit/rewards/test_rules.py",
        (
            "every answer is held against the first row",
            "self._rule.score(text, self._expected[row])",
            "self._rule.score(text, self._expected[0])",
            "test_each_answer_is_held_against_its_own_row",
        ),
    ),
    *in_file(
        "rewards/functions.py",
        "unit/rewards/test_functions.py",
        (
            "a function's file may change after the plan",
            "if planned is not None and sha256 != planned:",
            "if planned is None and sha256 != planned:",
            "test_a_file_that_changed_since_the_plan_is_refused",
        ),
        (
            "a function may change the rows of others",
            "copy.deepcopy(dict(prompt.row))",
            "prompt.row",
            "test_what_a_function_changes_in_its_arguments_changes_nothing_else",
        ),
    ),
    *in_file(
        "rewards/reward_models.py",
        "unit/rewards/test_models.py",
        (
            "a policy ends its turn in the reward model's words",
            "content=_without(self._control, answer)",
            "content=answer",
            "test_a_policy_cannot_end_its_own_turn_in_the_reward_model_s_words",
        ),
        (
            "a language model is given a random head",
            'if report["missing_keys"]:',
            'if report["missing_keys"] is None:',
            "test_a_language_model_is_refused_rather_than_given_a_random_head",
        ),
    ),
    *in_file(
        "stages/ppo/scorers_in_use.py",
        "unit/stages/test_ppo_guard.py",
        (
            "the guard's scorer is maximised too",
            "return in_list(config.scorers)",
            "return in_list(config.scorers) | {GUARD: config.guard.scorer}",
            "test_the_guard_asks_its_own_scorer_and_the_stage_its_own",
        ),
    ),
    *in_file(
        "data/reading.py",
        "unit/data/test_reading.py",
        (
            "JSON of turns is what a user says",
            "_filled(with_lists(_renamed(row, data)), data.placeholders)",
            "_filled(_renamed(row, data), data.placeholders)",
            "test_a_list_may_be_the_text_of_its_json",
        ),
    ),
    *in_file(
        "data/formats/plain.py",
        "unit/data/test_formats.py",
        (
            "an infinite score is a score",
            "if score is None:",
            "if False:",
            "test_answers_are_not_compared_by_what_is_no_finite_number",
        ),
        (
            "an index in a CSV is none",
            "texts = choices if text in choices else [str(index) for index in range(len(choices))]",
            "texts = choices",
            "test_the_index_of_a_choice_may_be_text_that_is_no_choice_itself",
        ),
    ),
    *in_file(
        "data/formats/pairs.py",
        "unit/data/test_formats.py",
        (
            "what comes before two conversations is dropped",
            "turns = _with_prompt(fields, turns)",
            "pass",
            "test_what_comes_before_two_conversations_is_part_of_their_prompt",
        ),
    ),
    *in_file(
        "data/row_files.py",
        "unit/data/test_reading.py",
        (
            "encoded surrogates are read",
            "_DECODER.decode(text.decode(json.detect_encoding(text)))",
            "json.loads(text)",
            "test_surrogates_that_are_encoded_like_characters_are_not_utf8",
        ),
        (
            "one value of Parquet ends the reading",
            "_UNUSABLE = (ValueError, OverflowError, LookupError)",
            "_UNUSABLE = (TypeError,)",
            "test_values_of_parquet_that_python_cannot_hold_are_faults_of_their_rows",
        ),
    ),
    *in_file(
        "data/records.py",
        "unit/data/test_records.py",
        (
            "a reference of 4.5 is dropped",
            'fields.answer("reference")',
            'fields.label("reference")',
            "test_a_held_out_prompt_may_have_a_reference_in_a_column_or_as_its_last_turn",
        ),
    ),
    *in_file(
        "data/mix.py",
        "unit/data/test_mix.py",
        (
            "a source without share and count gives one row",
            "wanted = (source.count or others) if",
            "wanted = (source.count or 1) if",
            "test_a_source_without_share_and_count_is_mixed_in_whole",
        ),
    ),
    *in_file(
        "commands/new/held_out_split.py",
        "unit/commands/new/test_new_recipe.py",
        (
            "U+2028 ends a line",
            '.partition("\\n")[0]',
            ".splitlines()[0]",
            "test_a_held_out_row_may_have_a_line_separator_of_unicode",
        ),
    ),
]
