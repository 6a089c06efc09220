"""Rows of a decoding batch that are taken over by waiting prompts, and beginnings that they share."""

from __future__ import annotations

from tests.mutations.mutation import in_file

ROWS = "unit/models/test_decoding_rows.py"
FORWARD = "test_sampled_tokens_and_logprobs_are_those_of_a_padded_forward"
BOUNDED = "test_many_prompts_take_a_bounded_number_of_rows_and_columns"

MUTATIONS = [
    *in_file(
        "models/forward/decoding_rows.py",
        ROWS,
        (
            "a prompt that enters goes on with the steps of the answer before it",
            "        self.steps.index_fill_(0, at, 0)\n",
            "",
            FORWARD,
        ),
        (
            "a prompt that enters keeps the random numbers of the row before it",
            "self.uniforms = self.uniforms.index_copy(0, at, on_device(entrants.uniforms, device))",
            "pass",
            FORWARD,
        ),
        (
            "the position of a prompt's last token is one too high",
            "[[ahead + len(prompt) - 1] for prompt in prompts]",
            "[[ahead + len(prompt)] for prompt in prompts]",
            FORWARD,
        ),
        (
            "a prompt that enters has positions without the beginning",
            "        ahead = self.prefix + _tokens(self.beginning)\n",
            "        ahead = self.prefix\n",
            FORWARD,
        ),
        ("columns are dropped that rows still see", "self._drop(min(seen_from)", "self._drop(max(seen_from)", FORWARD),
        (
            "rows see columns as if none had been dropped",
            "[max(self.prefix, start - columns) for start in self.starts]",
            "list(self.starts)",
            FORWARD,
        ),
        ("no column is ever dropped", "        if columns < DROPPED:\n", "        if True:\n", BOUNDED),
    ),
    *in_file(
        "models/forward/generate.py",
        ROWS,
        ("no prompt takes over a row", "refilled=queue.waiting > 0)", "refilled=False)", BOUNDED),
        (
            "a prompt takes over the row of an answer that goes on",
            "if row not in unfinished]",
            "if row in unfinished]",
            FORWARD,
        ),
    ),
    *in_file(
        "models/forward/waiting_prompts.py",
        ROWS,
        (
            "equal prompts are parted",
            "return self.next(whole or count)",
            "return self.next(count)",
            "test_equal_prompts_leave_the_queue_together_unless_they_are_too_many",
        ),
    ),
    *in_file(
        "models/forward/rows.py",
        ROWS,
        (
            "prompts do not see the beginning that they share",
            "before=((-tokens, 0), *segment.before))",
            "before=segment.before)",
            FORWARD,
        ),
        (
            "prompts have positions without the beginning that they share",
            "position_ids=rows.position_ids + tokens,",
            "position_ids=rows.position_ids,",
            FORWARD,
        ),
    ),
    *in_file(
        "models/forward/shared_beginning.py",
        ROWS,
        (
            "a prompt may have no token of its own",
            "min(map(len, prompts)) - 1)",
            "min(map(len, prompts)))",
            "test_a_beginning_is_held_once_if_it_pays_and_attention_can",
        ),
        (
            "a window does not keep a beginning from being shared",
            "and not capped and not has_window(model)",
            "and not capped",
            "test_a_beginning_stays_with_each_row_where_attention_has_windows_or_caps",
        ),
    ),
    *in_file(
        "models/kernels/kv_cache.py",
        "unit/models/test_cache.py",
        (
            "dropped columns are not those behind the first",
            "for start in range(after, self.length, columns):",
            "for start in range(0, self.length, columns):",
            "test_dropped_columns_are_gone_and_the_others_move_up",
        ),
        (
            "a common beginning is attended to with scores of another scale",
            "common_keys.transpose(1, 2), alpha=scale)",
            "common_keys.transpose(1, 2))",
            "test_a_common_beginning_counts_as_if_each_row_held_it",
        ),
    ),
]
