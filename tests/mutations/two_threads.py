"""Rows and chunks that are computed on two threads."""

from __future__ import annotations

from tests.mutations.mutation import in_file

PASSES = "unit/models/test_side_by_side.py"
ROWS = "unit/models/test_divided_rows.py"
GRADIENTS = "test_values_and_gradients_are_those_of_the_plain_forward"
SETTINGS = "test_threads_that_start_later_compute_as_this_one_does"
MODES = "test_parts_have_the_modes_of_the_caller"
THREADS = "unit/models/test_two_threads.py"

MUTATIONS = [
    *in_file(
        "models/forward/side_by_side.py",
        PASSES,
        (
            "states stay in the order of the parts",
            "return torch.cat([states.detach() for states in ctx.states]).index_select(0, division.source)",
            "return torch.cat([states.detach() for states in ctx.states])[: len(division.source)]",
            GRADIENTS,
        ),
        ("gradients of the second part are lost", "return first + second", "return first", GRADIENTS),
        (
            "models with dropout are divided",
            "isinstance(module, nn.Dropout) and module.p > 0",
            "False",
            "test_some_models_are_never_divided",
        ),
        (
            "dropout without a module is overlooked",
            "name.endswith(_RANDOM)",
            "False",
            "test_some_models_are_never_divided",
        ),
        (
            "frequencies are chosen by each part",
            '"longrope" in',
            '"unknown" in',
            "test_frequencies_that_a_pass_chooses_are_not_divided",
        ),
        (
            "weights that exist for a call are used by two",
            "module._forward_pre_hooks or ",
            "",
            "test_some_models_are_never_divided",
        ),
        (
            "each part converts all weights",
            " or products_dtype(weight) is not weight.dtype",
            "",
            "test_weights_that_each_part_would_convert_are_not_divided",
        ),
        (
            "everything trained is held twice",
            "trained <= FEW * weights",
            "trained <= weights",
            "test_some_models_are_never_divided",
        ),
    ),
    *in_file(
        "models/forward/two_threads.py",
        PASSES,
        (
            "autocast is forgotten in the parts",
            'torch.autocast("cpu", dtype, enabled=is_cast)',
            'torch.autocast("cpu", dtype, enabled=False)',
            MODES,
        ),
        (
            "threads that start later compute alone",
            "    torch.set_num_threads(threads)  # threads that start later take the number that was set last\n",
            "",
            SETTINGS,
        ),
        (
            "Python switches threads as rarely as before",
            "    sys.setswitchinterval(_SWITCH_SECONDS)\n",
            "",
            MODES,
        ),
        (
            "processes that share weights divide rows",
            "is_alone = not torch.distributed.is_initialized()",
            "is_alone = True",
            "test_several_processes_do_not_divide",
        ),
        (
            "gradients are recorded where the caller wants none",
            "torch.set_grad_enabled(has_grad)",
            "torch.set_grad_enabled(True)",
            MODES,
        ),
    ),
    *in_file(
        "models/forward/divided_rows.py",
        ROWS,
        (
            "rows with a common beginning are separated",
            "        if twice[row]:\n            continue\n",
            "        continue\n",
            "test_pairs_of_one_prompt_stay_together",
        ),
        (
            "attention of long rows costs nothing",
            "* (TOKEN + length) for segment",
            "* TOKEN for segment",
            "test_long_rows_count_for_more_than_their_tokens",
        ),
        (
            "no common beginning is computed twice",
            "(0, *sorted(set(shared) - {0}))",
            "(0,)",
            "test_a_turn_that_all_rows_share_is_computed_in_both_parts",
        ),
    ),
    *in_file(
        "models/forward/two_threads.py",
        THREADS,
        (
            "parts share every operation as before",
            "        torch.get_num_threads()  # else",
            "        # else",
            "test_a_part_computes_alone_and_is_not_divided_again",
        ),
        (
            "results come in the order of the threads",
            "[of_index[index] for index in range(len(inputs))]",
            "list(of_index.values())",
            "test_results_come_in_order_from_two_threads",
        ),
        (
            "one thread has most of the work",
            "<= LARGEST * sum(costs)",
            "<= sum(costs)",
            "test_work_is_shared_unless_one_thread_would_have_most_of_it",
        ),
        (
            "a signal leaves the parts computing",
            "            wait(futures)\n            raise\n",
            "            raise\n",
            "test_a_signal_waits_for_both_parts",
        ),
        (
            "what a failed part held stays",
            "        del futures  # a future that failed, its error and this frame would hold each other\n",
            "        pass\n",
            "test_what_a_failed_part_held_is_free_at_once",
        ),
        (
            "a fork waits for threads that it does not have",
            "_part_threads(os.getpid())",
            "_part_threads(0)",
            "test_a_forked_process_has_threads_of_its_own",
        ),
    ),
    *in_file(
        "models/forward/shared_prompts.py",
        "unit/models/test_reading.py",
        (
            "one thread reads all prompts",
            "    if can_divide(model.base_model):\n",
            "    if False:\n",
            "test_two_threads_read_and_score_about_half_of_the_tokens_each",
        ),
        (
            "few tokens are read by one thread",
            "next_multiple(count, THREADS)",
            "count",
            "test_few_tokens_are_divided_between_two_threads_too",
        ),
        (
            "a thread reads more at once than its share of the limit",
            "READ_TOKENS // THREADS",
            "READ_TOKENS",
            "test_two_threads_together_read_no_more_than_the_limit_at_once",
        ),
        (
            "uneven prompts are read in two passes by all threads",
            "return [function(span) for span in by_tokens(lengths, READ_TOKENS)]",
            "return [function(span) for span in by_tokens(lengths, READ_TOKENS // THREADS)]",
            "test_what_cannot_be_divided_evenly_is_read_in_one_pass",
        ),
    ),
]
