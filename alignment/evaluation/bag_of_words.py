"""Judges without a model: a classifier on words, and wins corrected for length."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from alignment.core.errors import DataError
from alignment.core.wording import WITHOUT_SPACES, spaced_word, unified
from alignment.records.interval import Interval

Vector = NDArray[np.float64]

PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Candidates; the one with the smallest cross-validation loss is used. Chosen, not tuned."""
FOLDS = 5
FEWEST = 2
"""A word is in the vocabulary if its count differs between the answers of at least this many pairs."""
_STEPS, _ROUNDS = 50, 1000
"""Most steps of Newton's method, and of conjugate gradients in each; about ten and some dozens are enough."""
_SMALL = 1e-8
"""The fit has converged once no component of the gradient is larger than this per pair."""
Texts = tuple[str, str]
"""A chosen and a rejected answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Differences:
    """``[pairs, words]`` features as a sparse matrix: the entries that are not 0, with their rows and columns."""

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    values: Vector
    shape: tuple[int, int]

    def times(self, weights: Vector) -> Vector:
        """``[pairs]``: the features times ``[words]`` weights."""
        return _sums(self.rows, self.values * weights[self.columns], self.shape[0])

    def back(self, factors: Vector) -> Vector:
        """``[words]``: the transposed features times ``[pairs]`` factors."""
        return _sums(self.columns, self.values * factors[self.rows], self.shape[1])

    def of(self, mask: NDArray[np.bool_]) -> Differences:
        """The features of the pairs where ``mask`` is true."""
        new_rows = np.cumsum(mask) - 1
        entries = mask[self.rows]
        return Differences(
            rows=new_rows[self.rows[entries]],
            columns=self.columns[entries],
            values=self.values[entries],
            shape=(int(mask.sum()), self.shape[1]),
        )


@dataclass(frozen=True, kw_only=True)
class BagOfWords:
    """``weights`` of words in the log-odds, and the ``penalty`` that they were fitted with."""

    words: tuple[str, ...]
    weights: Vector
    penalty: float

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        return {word: column for column, word in enumerate(self.words)}

    def margins(self, pairs: Sequence[Texts]) -> list[float]:
        """The log-odds that the first answer of each pair is the better one; 0 if no known word differs."""
        return differences(pairs, self._vocabulary).times(self.weights).tolist()

    def heaviest(self, count: int) -> tuple[list[str], list[str]]:
        """The words with the largest positive weights, and those with the largest negative ones."""
        order = np.argsort(self.weights, kind="stable")
        against = [self.words[column] for column in order[:count] if self.weights[column] < 0]
        return [self.words[column] for column in order[::-1][:count] if self.weights[column] > 0], against


def fit(pairs: Sequence[Texts], groups: Sequence[str], *, seed: int) -> BagOfWords:
    """Fits a model to ``pairs``; ``groups`` name the prompt of each pair, so that no prompt is in two folds. Raises
    DataError: no word differs between the answers of at least ``FEWEST`` pairs."""
    counts = Counter(word for pair in pairs for word in _differences_of(pair))
    words = tuple(sorted(word for word, count in counts.items() if count >= FEWEST))
    if not words:
        raise DataError(
            f"the bag of words has nothing to learn from: no word differs between the answers of at least {FEWEST} "
            f"of the {len(pairs)} pairs",
            remedy="give more pairs in 'learned'",
        )
    features = differences(pairs, {word: column for column, word in enumerate(words)})
    penalty = _best_penalty(features, groups, seed)
    return BagOfWords(words=words, weights=fitted(features, penalty), penalty=penalty)


@cache
def _word() -> re.Pattern[str]:
    """In scripts without spaces, each character is a word."""
    word = spaced_word()
    return re.compile(rf"[{WITHOUT_SPACES}]|{word}(?:['’]{word})?")


def words_of(text: str) -> Counter[str]:
    """The number of times that each word occurs in a text, ignoring case."""
    return Counter(word.replace("’", "'") for word in _word().findall(unified(text.lower())))


def differences(pairs: Sequence[Texts], vocabulary: Mapping[str, int]) -> Differences:
    """The features of pairs; words outside the vocabulary are ignored."""
    entries = [
        (row, vocabulary[word], value)
        for row, pair in enumerate(pairs)
        for word, value in _differences_of(pair).items()
        if word in vocabulary
    ]
    rows, columns, values = zip(*entries, strict=True) if entries else ((), (), ())
    return Differences(
        rows=np.array(rows, dtype=np.int64),
        columns=np.array(columns, dtype=np.int64),
        values=np.array(values, dtype=np.float64),
        shape=(len(pairs), len(vocabulary)),
    )


def _differences_of(pair: Texts) -> dict[str, float]:
    chosen, rejected = map(words_of, pair)
    by_word = {word: np.log1p(chosen[word]) - np.log1p(rejected[word]) for word in sorted(chosen | rejected)}
    return {word: float(value) for word, value in by_word.items() if value}


def loss(features: Differences, weights: Vector) -> float:
    """Mean −log σ(margin), in nats."""
    return float(np.logaddexp(0.0, -features.times(weights)).mean())


def slope(features: Differences, weights: Vector, penalty: float) -> Vector:
    """``[words]``: the gradient of Σ −log σ(margin) + penalty/2 · |weights|²."""
    return penalty * weights - features.back(sigmoid(-features.times(weights)))


def fitted(features: Differences, penalty: float) -> Vector:
    """The weights where the gradient is 0: Newton's method by conjugate gradients, steps halved until they descend."""
    weights: Vector = np.zeros(features.shape[1])
    height = _penalised(features, weights, penalty)
    for _ in range(_STEPS):
        downhill = -slope(features, weights, penalty)
        if np.abs(downhill).max() <= _SMALL * features.shape[0]:
            break
        shares = sigmoid(features.times(weights))
        step = _newton_step(features, shares * (1 - shares), penalty, downhill)
        lower = _penalised(features, weights + step, penalty)
        while lower > height and np.abs(step).max() > 1e-12:
            step = step / 2
            lower = _penalised(features, weights + step, penalty)
        weights, height = weights + step, lower
    return weights


def _newton_step(features: Differences, curvature: Vector, penalty: float, downhill: Vector) -> Vector:
    """The solution of (Xᵀ C X + penalty) step = downhill by conjugate gradients."""
    step, rest = np.zeros_like(downhill), downhill
    direction, size = rest, float(rest @ rest)
    enough = 1e-12 * size
    for _ in range(_ROUNDS):
        if size <= enough:
            break
        image = features.back(curvature * features.times(direction)) + penalty * direction
        length = size / float(direction @ image)
        step, rest = step + length * direction, rest - length * image
        before, size = size, float(rest @ rest)
        direction = rest + size / before * direction
    return step


def _penalised(features: Differences, weights: Vector, penalty: float) -> float:
    return features.shape[0] * loss(features, weights) + penalty / 2 * float(weights @ weights)


def _best_penalty(features: Differences, groups: Sequence[str], seed: int) -> float:
    """The penalty with the smallest cross-validation loss over groups; the middle one if there is a single group."""
    names = sorted(set(groups))
    if len(names) < 2:
        return PENALTIES[len(PENALTIES) // 2]
    order = np.random.default_rng(seed).permutation(len(names))
    folds = {names[index]: number % min(FOLDS, len(names)) for number, index in enumerate(order.tolist())}
    fold = np.array([folds[group] for group in groups])

    def left_out(penalty: float) -> float:
        total = 0.0
        for number in sorted(set(folds.values())):
            weights = fitted(features.of(fold != number), penalty)
            total += loss(features.of(fold == number), weights) * int((fold == number).sum())
        return total

    return min(PENALTIES, key=left_out)


def _sums(groups: NDArray[np.int64], values: Vector, count: int) -> Vector:
    """``[count]`` sums of the values by group, float64 even without any values."""
    return np.bincount(groups, values, minlength=count).astype(np.float64)


def sigmoid(values: Vector) -> Vector:
    """1 / (1 + e⁻ˣ), without overflow at either end."""
    return np.exp(-np.logaddexp(0.0, -values))


_PENALTY = 0.01
"""Keeps the fit finite where an arm wins every prompt, or where lengths alone separate wins from losses."""
_EACH_WAY = 0.05
"""The smallest share of prompts on which each arm has the longer answer."""
_LENGTH_STEPS = 50
_AT_ONCE = 250

Array = NDArray[np.float64]


def win_rate(points: Sequence[float], extra_length: Sequence[float], *, samples: int, seed: int) -> Interval | None:
    """The win rate at equal lengths with its 95 % interval, over resampled prompts; None if it cannot be told.
    ``points`` are 1, .5 or 0 a prompt; ``extra_length`` is by how much the arm's answer is longer. The model is logit
    P(win) = θ + φ · tanh(extra length / its standard deviation), and the win rate at equal lengths is σ(θ). The paper's
    term for the difficulty of a prompt is left out: it is estimated from many arms, and an evaluation has few. It
    cannot be told unless each arm has the longer answer on a share of ``_EACH_WAY`` of the prompts: otherwise nothing
    was seen near equal lengths, and length and arm are nearly the same thing."""
    won, lengths = np.asarray(points, dtype=np.float64), np.asarray(extra_length, dtype=np.float64)
    spread = lengths.std()
    if len(won) < 2 or min((lengths > 0.0).mean(), (lengths < 0.0).mean()) < _EACH_WAY:
        return None
    features = np.stack([np.ones_like(lengths), np.tanh(lengths / spread)], axis=1)
    mean = sigmoid(_fit(features, won, np.ones((1, len(won))))[0, 0])
    rng = np.random.default_rng(seed)
    rates = []
    for start in range(0, samples, _AT_ONCE):
        count = min(_AT_ONCE, samples - start)
        picks = rng.integers(0, len(won), size=(count, len(won)))
        weights = np.stack([np.bincount(pick, minlength=len(won)) for pick in picks]).astype(np.float64)
        rates.append(sigmoid(_fit(features, won, weights)[:, 0]))
    low, high = np.quantile(np.concatenate(rates), [0.025, 0.975])
    return Interval(mean=float(mean), low=float(low), high=float(high))


def _fit(features: Array, won: Array, weights: Array) -> Array:
    """``[resamples, 2]`` coefficients of a logistic regression with a slight ridge, by Newton's method. ``weights`` are
    ``[resamples, prompts]``: how often each prompt was drawn."""
    coefficients = np.zeros((len(weights), features.shape[1]))
    ridge = _PENALTY * np.eye(features.shape[1])
    for _ in range(_LENGTH_STEPS):
        chance = sigmoid(coefficients @ features.T)
        gradient = (weights * (won - chance)) @ features - _PENALTY * coefficients
        curvature = np.einsum("rn,ni,nj->rij", weights * chance * (1.0 - chance), features, features) + ridge
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        step = np.clip(step, -2.0, 2.0)  # far out the curvature is small, and a whole step would overshoot
        coefficients += step
        if np.abs(step).max() < 1e-9:
            break
    return coefficients
