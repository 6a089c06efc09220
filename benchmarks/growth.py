"""The points of the work ``growth``: ours alone, over tokens a row, rows, and model size."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A point of ``growth``: ``rows`` rows of exactly ``length`` tokens, on the base or on a random model.

    With ``one_question`` the rows answer one question of about three quarters of ``length``, each in its own words.
    """

    rows: int
    length: int
    one_question: bool = False
    model: str | None = None


_STEP_TOKENS, _LONG_STEP_TOKENS = 4096, 8192
"""Tokens a step, whatever the length of its rows. A row of 8,192 tokens is the least of which one fits into a step, so
the long series has that many: seconds a token are then compared between steps of equal work in everything but
attention."""
POINTS = {
    **{f"length_{n}": Point(rows=_STEP_TOKENS // n, length=n) for n in (128, 256, 512, 1024, 2048)},
    **{f"long_{n}": Point(rows=_LONG_STEP_TOKENS // n, length=n) for n in (2048, 4096, 8192)},
    **{f"rows_{n}": Point(rows=n, length=128) for n in (4, 8, 16)},
    **{f"completions_{n}": Point(rows=n, length=320, one_question=True) for n in (1, 2, 4, 6)},
    **{f"size_{name}": Point(rows=8, length=512, model=name) for name in ("10m", "30m")},
}
SERIES = {
    "tokens a row (4096 a step)": ("length_128", "length_256", "length_512", "length_1024", "length_2048"),
    "tokens a row (8192 a step)": ("long_2048", "long_4096", "long_8192"),
    "rows of 128 tokens": ("rows_4", "rows_8", "rows_16", "length_128"),
    "completions of one prompt": ("completions_1", "completions_2", "completions_4", "completions_6"),
    "parameters (8 rows of 512)": ("size_10m", "size_30m", "length_512"),
}
MODEL_SIZES = {
    "10m": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 14, "num_attention_heads": 2},
    "30m": {"hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 12, "num_attention_heads": 5},
}
"""Random Llama models on the base's tokenizer; the third size is the base itself."""
