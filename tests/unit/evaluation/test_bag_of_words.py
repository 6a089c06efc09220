"""A bag of words is fitted to where the loss is lowest, learns what words can tell, and nothing else."""

from __future__ import annotations

import random

import numpy as np
import pytest

from alignment.config.data import SourceConfig
from alignment.core.errors import DataError
from alignment.data.reading import read_records
from alignment.data.records import PreferencePair
from alignment.evaluation.bag_of_words import PENALTIES, differences, fit, fitted, loss, slope, words_of
from tests.public import PUBLIC, needs_public_data

WORDS = ("the", "note", "shop", "keys", "hall", "monday", "closed", "please", "sure", "sorry")


def random_pairs(count: int) -> list[tuple[str, str]]:
    rng = random.Random(3)
    return [tuple(" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) for _ in range(2)) for _ in range(count)]  # type: ignore[misc]


def slow_objective(pairs: list[tuple[str, str]], weights: dict[str, float], penalty: float) -> float:
    """Written from the definition, a word at a time."""
    total = penalty / 2 * sum(weight**2 for weight in weights.values())
    for chosen, rejected in pairs:
        margin = sum(
            weight * (np.log1p(chosen.split().count(word)) - np.log1p(rejected.split().count(word)))
            for word, weight in weights.items()
        )
        total += float(np.log1p(np.exp(-margin)))
    return total


def test_words_count_whatever_their_case_and_apostrophe() -> None:
    assert words_of("I'm sorry, I’m not. SORRY!") == {"i'm": 2, "sorry": 2, "not": 1}


def test_scripts_without_spaces_have_a_word_for_each_character() -> None:
    assert words_of("今天 天气。OK") == {"今": 1, "天": 2, "气": 1, "ok": 1}


def test_a_sign_belongs_to_the_letter_before_it() -> None:
    assert words_of("किताब, खुली किताब, İstanbul") == {"किताब": 2, "खुली": 1, "istanbul": 1}


@pytest.mark.parametrize("penalty", [0.3, 10.0])
def test_the_fit_lies_where_no_small_change_lowers_the_loss(penalty: float) -> None:
    pairs = random_pairs(60)
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    features = differences(pairs, vocabulary)
    weights = fitted(features, penalty)
    lowest = slow_objective(pairs, dict(zip(WORDS, weights, strict=True)), penalty)
    assert lowest == pytest.approx(60 * loss(features, weights) + penalty / 2 * float(weights @ weights), rel=1e-12)
    for index in range(len(WORDS)):
        for step in (-1e-3, 1e-3):
            moved = weights.copy()
            moved[index] += step
            assert slow_objective(pairs, dict(zip(WORDS, moved, strict=True)), penalty) > lowest
    assert np.abs(slope(features, weights, penalty)).max() < 1e-6


def test_a_word_that_tells_all_is_found_and_a_swapped_pair_has_the_opposite_margin() -> None:
    pairs = [(f"good {chosen}", rejected) for chosen, rejected in random_pairs(40)]
    groups = [str(number) for number in range(40)]
    bag = fit(pairs, groups, seed=0)
    assert bag.heaviest(3)[0][0] == "good"
    assert min(bag.margins(pairs)) > 0
    swapped = [(rejected, chosen) for chosen, rejected in pairs]
    assert bag.margins(swapped) == pytest.approx([-margin for margin in bag.margins(pairs)])
    assert bag.margins([("unheard of", "quite new"), ("good", "good")]) == [0.0, 0.0]
    assert fit(pairs, groups, seed=0).weights.tobytes() == bag.weights.tobytes()


def test_the_penalty_is_chosen_on_prompts_that_were_left_out() -> None:
    noise = random_pairs(40)
    assert fit(noise, [str(number) for number in range(40)], seed=0).penalty == max(PENALTIES), "nothing to learn"
    one_prompt = fit(noise, ["the same"] * 40, seed=0)
    assert one_prompt.penalty in PENALTIES


def test_pairs_without_a_common_word_are_refused() -> None:
    with pytest.raises(DataError, match="no word differs between the answers of at least 2 of the 1 pairs"):
        fit([("a b", "c")], ["0"], seed=0)


def test_pairs_whose_words_decide_by_chance_are_told_apart_as_well_as_chance_lets() -> None:
    """The chosen answer is drawn by Bradley and Terry from the words' true weights, so the best share is known."""
    rng = random.Random(5)
    true = {word: rng.gauss(0.0, 1.5) for word in WORDS}
    pairs, sure = [], []
    for first, second in random_pairs(1200):
        counts = [[np.log1p(text.split().count(word)) for word in WORDS] for text in (first, second)]
        margin = float((np.array(counts[0]) - np.array(counts[1])) @ np.array(list(true.values())))
        wins = 1.0 / (1.0 + np.exp(-margin))
        pairs.append((first, second) if rng.random() < wins else (second, first))
        sure.append(max(wins, 1.0 - wins))
    bag = fit(pairs[:600], [str(number) for number in range(600)], seed=0)
    right = float((np.array(bag.margins(pairs[600:])) > 0).mean())
    best = float(np.mean(sure[600:]))
    assert 0.6 < best < 0.9
    assert right == pytest.approx(best, abs=0.03)


@needs_public_data
@pytest.mark.parametrize(
    ("file", "learned", "share"), [("hh-rlhf/harmless_base.jsonl", 1000, 0.63), ("oasst/pairs.jsonl", 300, 0.60)]
)
def test_public_pairs_are_told_apart_as_well_as_words_can(file: str, learned: int, share: float) -> None:
    rows = read_records(PUBLIC / file, PreferencePair, SourceConfig())
    texts, prompts = [(row.chosen, row.rejected) for row in rows], [repr(row.messages) for row in rows]
    bag = fit(texts[:learned], prompts[:learned], seed=0)
    seen = set(prompts[:learned])
    others = [pair for pair, prompt in zip(texts, prompts, strict=True) if prompt not in seen]
    margins = np.array(bag.margins(others))
    assert float((margins > 0).mean()) == pytest.approx(share, abs=0.02)
