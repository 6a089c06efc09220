"""What a schema of recipes refuses, and what a new recipe holds out."""

from __future__ import annotations

from tests.mutations.mutation import in_file

NEW_RECIPE = "unit/commands/new/test_new_recipe.py"

MUTATIONS = [
    *in_file(
        "config/class_schemas.py",
        "unit/commands/schema/test_recipe_schema.py",
        (
            "a schema accepts any key",
            '"additionalProperties": False})',
            '"additionalProperties": True})',
            "test_a_fault_is_reported_where_it_stands",
        ),
    ),
    *in_file(
        "commands/new/held_out_split.py",
        NEW_RECIPE,
        (
            "rows that ask a held-out prompt are learned",
            "            if row.key not in left_out and not row.faulty:\n",
            "            if not row.faulty:\n",
            "test_held_out_prompts_are_learned_from_nowhere",
        ),
        (
            "a file that exists is overwritten",
            'path.open("x", encoding="utf-8")',
            'path.open("w", encoding="utf-8")',
            "test_a_part_that_exists_is_not_overwritten_either",
        ),
    ),
    *in_file(
        "commands/new/stage_proposals.py",
        NEW_RECIPE,
        (
            "a file that no stage uses is left out without a word",
            "        if id(rows) not in read:\n",
            "        if False:\n",
            "test_answers_that_change_nothing_and_files_without_a_use_are_refused",
        ),
    ),
]
