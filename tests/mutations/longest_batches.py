"""Faults of the trial before the first step, and of activations that PPO computes again."""

from __future__ import annotations

from tests.mutations.mutation import in_file

TRIAL = "unit/training/test_longest_batch.py"
ROWS, STAYS = "test_it_has_the_longest_row_and_what_fits_beside_it", "test_nothing_of_it_stays"
NAMED, FITS = (
    "test_a_row_that_is_too_long_alone_is_named_with_its_origin",
    "test_the_error_names_a_limit_that_was_seen_to_fit",
)
SEQUENCE, BEYOND = (
    "test_a_sequence_is_a_prompt_with_one_answer",
    "test_a_row_beyond_the_positions_stops_a_stage_before_it_learns",
)

MUTATIONS = [
    *in_file(
        "training/longest_batch.py",
        TRIAL,
        ("it begins with the shortest row", "[int(order[-1])], limit", "[int(order[0])], limit", ROWS),
        ("rows are added that do not fit", 'ascending, left, side="right"', 'ascending, left + 2, side="right"', ROWS),
        ("a row is added twice", "min(end, int(np.search", "min(len(order), int(np.search", ROWS),
        ("padded rows are the longest", "    if padded:\n", "    if False:\n", ROWS),
        ("there is no room for moments", "_memory_for_moments(self._trainer.optimizer)", "[]", STAYS),
        ("moments are reserved once", "(2 * each * parameter.numel(),)", "(each * parameter.numel(),)", STAYS),
        (
            "every training is tried",
            "> SHARE * coming",
            "> 1e9 * coming",
            "test_a_short_training_meets_its_longest_batch_soon_enough",
        ),
        ("another row is named", "self._trainer.row_origin(rows[0])}),", "self._trainer.row_origin(0)}),", NAMED),
        (
            "a limit is named that was not tried",
            "if self._fits(rows):\n                return f",
            "if True:\n                return f",
            FITS,
        ),
    ),
    *in_file(
        "training/row_lengths.py",
        "unit/training/test_row_lengths.py",
        (
            "labels count as tokens",
            '_NOT_TOKENS = {"labels", ',
            "_NOT_TOKENS = {",
            "test_tokens_are_counted_in_the_columns_that_hold_tokens",
        ),
        ("a sequence has every answer", "np.max(others, axis=0)", "np.sum(others, axis=0)", SEQUENCE),
        ("packed rows are one sequence", "if _PACKED in rows.column_names:", "if False:", SEQUENCE),
        ("the first row is checked", "int(tokens.argmax())", "0", BEYOND),
    ),
    *in_file(
        "training/session.py",
        "unit/training/test_row_lengths.py",
        (
            "rows are checked in the step that meets them",
            "    if isinstance(trainer, MicroBatches):\n",
            "    if False:\n",
            BEYOND,
        ),
    ),
    *in_file(
        "training/looks.py",
        "unit/training/test_row_lengths.py",
        (
            "held-out rows are checked at the first look",
            "        refuse_long_rows(trainer.model",
            "        lambda *_: (trainer.model",
            "test_held_out_rows_are_checked_before_training_too",
        ),
    ),
    *in_file(
        "stages/dpo/run.py",
        "unit/training/test_row_lengths.py",
        (
            "a reference reads rows that are too long",
            "    refuse_long_rows(policy, pairs, origin_of)",
            "    (policy, pairs, origin_of)",
            "test_a_reference_does_not_read_rows_that_are_too_long",
        ),
    ),
    *in_file(
        "stages/ppo/run.py",
        "unit/training/test_row_lengths.py",
        (
            "prompts are checked in the update that samples them",
            "    refuse_long_prompts(config, roles.policy, prompts, rows)\n",
            "",
            BEYOND,
        ),
    ),
    *in_file(
        "training/micro_batches.py",
        TRIAL,
        ("the trial's gradients stay", "            self.model_wrapped.zero_grad(set_to_none=True)\n", "", STAYS),
        ("the trial's metrics stay", '            self._metrics["train"].clear()\n', "", STAYS),
        (
            "the trial draws random numbers",
            "with torch.random.fork_rng(devices):",
            "with contextlib.nullcontext():",
            STAYS,
        ),
        (
            "the trial's tokens are counted",
            "self.state.num_input_tokens_seen, self.step_loss = True, tokens_seen, None",
            "_, self.step_loss = True, tokens_seen, None",
            STAYS,
        ),
    ),
    *in_file(
        "models/assembly/recomputing.py",
        "unit/training/test_ppo.py",
        (
            "PPO stores all activations",
            "            module.training = True\n",
            "            pass\n",
            "test_computing_activations_again_changes_no_weight",
        ),
    ),
]
