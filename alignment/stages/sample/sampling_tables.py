"""A result of sampling as lines for the terminal and as a table for pages and model cards."""

from __future__ import annotations

from pathlib import Path

from alignment.records.stages import SAMPLING_FILE, Sampling
from alignment.stages.base import Cell, ResultTable

_LEFT_OUT = {
    "prompts_evaluated": "prompts that are also evaluated",
    "prompts_repeated": "prompts asked already",
    "rows_too_long": "rows that are too long",
    "answers_repeated": "repeated answers",
    "answers_empty": "empty answers",
    "answers_without_end": "answers without an end",
}


def lines(artifact: Path) -> list[str]:
    """What was made, and what was left out; nothing without ``sampling.json``."""
    if not (artifact / SAMPLING_FILE).is_file():
        return []
    record = Sampling.read(artifact)
    made = (
        f"{artifact.name}: {record.rows} rows ({record.select}) of {record.answers} answers to {record.prompts} prompts"
    )
    counts = {words: getattr(record, name) for name, words in _LEFT_OUT.items()}
    left_out = ", ".join(f"{count} {words}" for words, count in counts.items() if count)
    return [f"{made}; left out: {left_out}" if left_out else made]


def tables(artifact: Path) -> list[ResultTable]:
    """What the best of several answers scores, and how far it can be from the policy."""
    record = Sampling.read(artifact)
    rows = [
        (f"best of {best.answers}", [Cell(text=f"{best.score:.3f}"), Cell(text=f"{best.kl_bound:.2f}")])
        for best in record.best_of
    ]
    note = (
        f"Of {record.answers} answers to {record.prompts} prompts, {record.rows} rows were made ({record.select}). The "
        "KL divergence of the best of n from the policy is at most log n − (n − 1)/n (Beirami et al. 2024). Scores are "
        "those that chose the rows, so judge a policy that learns from them by another metric."
    )
    columns = {"score": "mean score", "kl": "KL at most, nats"}
    return [ResultTable(title="Best of n", note=note, columns=columns, rows=rows)]
