"""Faults of attention inside rows and of capped logits: windows, caps, and their gradients."""

from __future__ import annotations

from tests.mutations.mutation import in_file

ROWS, BY_LOOPS = "unit/models/test_row_attention.py", "test_values_and_gradients_are_those_of_the_definition"
VARLEN, KERNEL = "unit/models/test_varlen.py", "test_the_kernel_gets_the_rows_and_their_shared_beginnings"
MODELS, FLAT = "unit/models/test_architectures.py", "test_the_flat_forward_equals_the_padded_one"
SAMPLED = "test_capped_logits_are_what_is_sampled_and_scored"
HEAD, SLOPES = "unit/models/test_head.py", "test_gradients_equal_those_of_log_softmax"
STATISTICS = "test_statistics_equal_the_slow_loops"
CACHE, STEP = "unit/models/test_cache.py", "test_capped_scores_are_those_of_the_formula_in_float64"

MUTATIONS = [
    *in_file(
        "models/kernels/row_attention.py",
        ROWS,
        ("a window is one key wider", "columns <= last - window", "columns < last - window", BY_LOOPS),
        (
            "a window is nowhere",
            "    if window is not None:\n        unseen |=",
            "    if False:\n        unseen |=",
            BY_LOOPS,
        ),
        ("a span leaves out a key that is seen", "- start + 1 - window)", "- start + 2 - window)", BY_LOOPS),
        (
            "spans keep every key",
            "0 if window is None else max(",
            "0 if True else max(",
            "test_keys_before_a_window_are_left_out_of_a_long_rows_spans",
        ),
        ("long rows see all keys", "scores.window is not None or scores.cap is not None", "False", BY_LOOPS),
        ("scores are not capped", "if scores.cap is not None:\n        capped", "if False:\n        capped", BY_LOOPS),
        (
            "the cap has no slope",
            "    if scores.cap is not None:  # d c",
            "    if False:  # d c",
            BY_LOOPS,
        ),
        ("capped scores see later keys", "capped.view(shape).add_(hidden[:, :, None])", "pass", BY_LOOPS),
    ),
    *in_file(
        "models/forward/attention.py",
        VARLEN,
        ("the kernel's window is one wider", "else window - 1, 0)", "else window, 0)", KERNEL),
        ("the kernel has no window", "-1 if window is None else window - 1", "-1", KERNEL),
    ),
    *in_file(
        "models/forward/attention.py",
        MODELS,
        ("a layer's window is dropped", "window=sliding_window, cap=softcap)", "window=None, cap=softcap)", FLAT),
        ("a layer's cap is dropped", "window=sliding_window, cap=softcap)", "window=sliding_window)", FLAT),
        (
            "another window is not noticed",
            "* (sliding_window != window_of_layer(module))",
            "* False",
            "test_a_window_that_is_not_the_configurations_is_refused",
        ),
    ),
    *in_file(
        "models/forward/flat.py",
        MODELS,
        (
            "sinks are ignored",
            'any(hasattr(module, "sinks") for',
            "any(False for",
            "test_sinks_take_the_padded_path_and_say_so",
        ),
        (
            "a prefix is put before a window",
            "    if has_window(trunk):\n",
            "    if False:\n",
            "test_a_prefix_needs_full_attention",
        ),
    ),
    *in_file(
        "models/kernels/blocks.py",
        MODELS,
        ("a fused block drops the window", 'kwargs["sliding_window"] = window', "pass", FLAT),
    ),
    *in_file(
        "models/forward/shared_prompts.py",
        MODELS,
        (
            "the first token is drawn without the cap",
            "capped(head(batch.ends), logit_cap(model))",
            "head(batch.ends)",
            SAMPLED,
        ),
    ),
    *in_file(
        "models/forward/head.py",
        HEAD,
        (
            "logits are not capped",
            "[: len(labels)].copy_(products), cap)",
            "[: len(labels)].copy_(products), None)",
            STATISTICS,
        ),
        (
            "the mean is that of uncapped logits",
            "if cap is None else statistics.mean_logits",
            "if True else 0",
            STATISTICS,
        ),
        (
            "a capped logit has the slope of a free one",
            "slopes if cap is None else slopes",
            "slopes if True else slopes",
            SLOPES,
        ),
        (
            "the slope of a trained head's cap is left out",
            "            if ctx.cap is not None:\n",
            "            if False:\n",
            SLOPES,
        ),
    ),
    *in_file(
        "models/kernels/capped_attention.py",
        CACHE,
        ("the cap is twice as high", ".tanh() * cap", ".tanh() * (2 * cap)", STEP),
        ("a later column is seen", ".tril(columns - tokens)", ".tril(columns - tokens + 1)", STEP),
        ("a summand is read as it is", "mask if mask.dtype == torch.bool else mask == 0", "mask.bool()", STEP),
        (
            "a boolean mask is ignored",
            "scores.masked_fill(~seen[:, :, None]",
            "scores.masked_fill(seen[:, :, None] & False",
            STEP,
        ),
    ),
]
