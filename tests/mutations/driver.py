"""What a driver says and tries before the first stage."""

from __future__ import annotations

from tests.mutations.mutation import in_file

REHEARSAL = "unit/pipeline/test_rehearsal.py"

MUTATIONS = [
    *in_file(
        "rehearsal.py",
        REHEARSAL,
        (
            "faulty rows at the beginning end a run that skips such rows",
            " and (whole or data.on_error is OnError.fail):",
            ":",
            "test_rows_that_follow_faulty_ones_may_be_fine_where_faulty_ones_are_skipped",
        ),
    ),
    *in_file(
        "pipeline/rehearsal.py",
        REHEARSAL,
        (
            "a scorer that asks for its rank is refused",
            "else own | _RANKS",
            "else own",
            "test_a_scorer_finds_the_variables_that_its_launcher_sets",
        ),
        (
            "what went well is tried again",
            "            tried.remember(plan, stage, part=part)\n",
            "            pass\n",
            "test_what_went_well_is_not_tried_again",
        ),
        (
            "machines give up on one that tries",
            "        machines.show_life(plan.run_folder, plan.config.launch)\n",
            "",
            "test_other_machines_see_that_the_first_one_lives_while_it_tries",
        ),
    ),
    *in_file(
        "pipeline/tried.py",
        REHEARSAL,
        (
            "other lengths count as tried",
            '("data", "max_length", ',
            '("data", ',
            "test_what_went_well_is_not_tried_again",
        ),
    ),
]
