"""Arithmetic does not change without somebody deciding whether earlier results still stand."""

from __future__ import annotations

import ast

import pytest

from tests.architecture import record_sources

BEFORE = '''
"""A module."""
def mean(values):
    """Of values."""
    if not values:
        raise ValueError("nothing here")
    return sum(values) / len(values)  # floats
'''


def test_every_change_of_a_stage_was_decided_on() -> None:
    files = record_sources.undecided(record_sources.recorded())
    assert not files, (
        f"sources of {', '.join(files)} changed: {sorted(set().union(*files.values()))}. Do results of before stand "
        "for those of now? If not, raise the stage's revision in alignment/config/stage.py. Then run "
        "python -m tests.architecture.record_sources (--same-numbers for stages whose numbers stay), and commit "
        "tests/architecture/sources.json"
    )


def test_the_record_is_of_these_revisions() -> None:
    """A revision that was raised is recorded too, so that the next change is seen."""
    now = record_sources.today()
    assert record_sources.recorded() == now, "run python -m tests.architecture.record_sources"


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("sft", "alignment/models/kernels/products.py"),
        ("cpt", "alignment/data/tokens/chunks.py"),
        ("reward", "alignment/stages/reward/run.py"),
        ("dpo", "alignment/stages/shared/reference_cache.py"),
        ("ppo", "alignment/algos/gae.py"),
        ("ppo", "alignment/stages/ppo/trainer.py"),
        ("ppo", "alignment/rewards/weighted_sum.py"),
        ("evaluate", "alignment/evaluation/arms.py"),
        ("forgetting", "alignment/evaluation/general.py"),
        ("reward_card", "alignment/evaluation/bag_of_words.py"),
    ],
)
def test_a_stage_is_held_to_what_it_computes_with(kind: str, file: str) -> None:
    assert file in record_sources.sources_of(kind)


@pytest.mark.parametrize(
    ("old", "new", "counts"),
    [
        ("# floats", "# any numbers", False),
        ('"""Of values."""', '"""Their mean."""', False),
        ('"nothing here"', '"no values"', False),
        ("    return", "\n    return", False),
        ("/ len(values)", "/ (len(values) - 1)", True),
        ("not values", "values", True),
        ("ValueError", "TypeError", True),
    ],
)
def test_only_what_is_computed_counts(old: str, new: str, counts: bool) -> None:
    hashes = {record_sources.normal_hash(ast.parse(text)) for text in (BEFORE, BEFORE.replace(old, new))}
    assert (len(hashes) == 2) == counts


def test_a_change_is_named_with_its_stages_until_it_is_decided_on() -> None:
    record = record_sources.recorded()
    record["files"]["alignment/algos/gae.py"] = "another"
    assert record_sources.undecided(record) == {"ppo": ["alignment/algos/gae.py"]}
    record["revisions"]["ppo"] -= 1
    assert record_sources.undecided(record) == {}
