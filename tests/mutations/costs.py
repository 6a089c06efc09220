"""What a plan proposes for a stage that does not fit."""

from __future__ import annotations

from tests.mutations.mutation import in_file

REMEDIES = "unit/costs/test_remedies.py"
PROPOSALS = "unit/costs/test_proposals.py"

MUTATIONS = [
    *in_file(
        "costs/storing.py",
        "unit/costs/test_ways.py",
        (
            "a disk is as fast as for a part of what is written",
            "/ (PIECE_BYTES * PIECES)",
            "/ PIECE_BYTES",
            "test_the_seconds_of_a_byte_are_those_in_which_a_file_is_written_and_read_again",
        ),
    ),
    *in_file(
        "costs/devices.py",
        "unit/costs/test_devices.py",
        (
            "the faster of products and memory counts",
            "return max(flop",
            "return min(flop",
            "test_an_operation_takes_as_long_as_the_slower_of_its_products_and_its_memory",
        ),
    ),
    *in_file(
        "costs/remedies.py",
        REMEDIES,
        (
            "a proposal keeps every setting that was tried on the way",
            "        levels[choice] = bisect_left(range(depths[choice]), True, key=is_enough)\n"
            "    return needed(tuple(levels), fits)\n",
            "    return tuple(levels)\n",
            "test_every_setting_of_a_proposal_is_needed",
        ),
        (
            "a setting that takes memory makes another one seem needed",
            "    return needed(tuple(levels), fits)\n",
            "    return tuple(levels)\n",
            "test_whatever_a_choice_takes_or_frees_each_that_is_chosen_is_needed",
        ),
        (
            "smaller activations are tried where the states alone do not fit",
            "if levels != self._none and self._least(levels) > self._memory:",
            "if False:",
            "test_settings_that_free_too_little_are_not_estimated",
        ),
        (
            "a copy that goes counts as memory that stays",
            "weights / 2 if without_copy else weights",
            "weights",
            "test_settings_that_cost_least_come_first",
        ),
    ),
    *in_file(
        "costs/remedies.py",
        PROPOSALS,
        (
            "a proposal keeps settings of a real stage that it does not need",
            "        levels[choice] = bisect_left(range(depths[choice]), True, key=is_enough)\n"
            "    return needed(tuple(levels), fits)\n",
            "    return tuple(levels)\n",
            "test_without_any_setting_of_a_proposal_the_stage_does_not_fit",
        ),
    ),
    *in_file(
        "pipeline/plan/variants.py",
        "unit/pipeline/test_variants.py",
        (
            "a reference that is computed beforehand is never proposed",
            "    if has_copy and not",
            "    if False and not",
            "test_a_reference_is_computed_beforehand_where_it_is_a_copy",
        ),
    ),
    *in_file(
        "pipeline/execute/estimates.py",
        "unit/pipeline/test_estimates.py",
        (
            "a setting that the plan refuses is tried",
            "    if offered and not allows(*offered):",
            "    if False:",
            "test_every_way_has_the_choices_that_a_plan_allows",
        ),
    ),
    *in_file(
        "stages/shared/reference_cache.py",
        PROPOSALS,
        (
            "the reference of an estimate is stored for later",
            "context.search is None and not on_shadows()",
            "context.search is None",
            "test_a_reference_that_is_computed_beforehand_leaves_no_copy",
        ),
        (
            "an estimate reads the weights",
            '"" if on_shadows() else weights_sha256(start)',
            "weights_sha256(start)",
            "test_a_reference_that_is_computed_beforehand_leaves_no_copy",
        ),
    ),
]
