"""Rows and chunks that are computed on two threads."""

from __future__ import annotations

from tests.mutations.mutation import in_file

PASSES = "unit/models/test_side_by_side.py"
ROWS = "unit/models/test_divided_rows.py"
GRADIENTS = "test_values_and_gradients_are_those_of_the_plain_forward"
SETTINGS = "test_this_process_keeps_its_settings"

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
            "isinstance(module, nn.Dropout) and module.p",
            "isinstance(module, nn.Dropout) and False",
            "test_some_models_are_never_divided",
        ),
        (
            "processes that share weights divide rows",
            "torch.distributed.get_world_size() > 1",
            "torch.distributed.get_world_size() > 2",
            "test_several_processes_do_not_divide",
        ),
    ),
    *in_file(
        "models/forward/two_threads.py",
        PASSES,
        (
            "autocast is forgotten in the parts",
            'torch.autocast("cpu", dtype, enabled=is_cast)',
            'torch.autocast("cpu", dtype, enabled=False)',
            "test_autocast_holds_in_both_parts",
        ),
        (
            "threads that start later compute alone",
            "    torch.set_num_threads(threads)  # threads that start later take the number that was set last\n",
            "",
            SETTINGS,
        ),
        (
            "Python goes on switching threads often",
            "        sys.setswitchinterval(before)\n",
            "        pass\n",
            SETTINGS,
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
]
