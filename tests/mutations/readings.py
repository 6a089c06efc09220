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
            'rf"[{_WITHOUT_SPACES}]|[^\\W{_WITHOUT_SPACES}]+"',
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
]
