"""Several scorers become one reward: named, normalised, clipped, weighted, and the same after a restart."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import partial
from statistics import fmean, pstdev

import pytest
import torch

from alignment.algos import preferences
from alignment.core.errors import RewardError
from alignment.rewards.scorers import Answers, Scores
from alignment.rewards.weighted_sum import Ensemble, Part, RewardMix
from tests.oracles import ensembles as ensembles_oracle
from tests.tiny import tiny_tokenizer
from tests.unit.rewards.conftest import prompt

TOKENIZER = tiny_tokenizer()
PROMPTS = [prompt(line=number + 1) for number in range(4)]


class FixedScorer:
    def __init__(self, scores: Sequence[float] = ()) -> None:
        self._scores = scores
        self.asked: list[Answers] = []

    def scores(self, answers: Answers) -> torch.Tensor:
        self.asked.append(answers)
        return torch.tensor(self._scores)


def mix(*parts: Part | Ensemble) -> RewardMix:
    return RewardMix(parts, TOKENIZER, PROMPTS)


def ids(text: str) -> list[int]:
    token_ids: list[int] = TOKENIZER(text)["input_ids"]
    return [*token_ids, TOKENIZER.eos_token_id]


def batches(count: int, size: int) -> list[list[float]]:
    rng = random.Random(1)
    return [[rng.gauss(1000.0, 3.0) for _ in range(size)] for _ in range(count)]


def scores_of(**scores: Sequence[float]) -> Scores:
    return Scores.of({name: torch.tensor(values) for name, values in scores.items()})


def learned(slot: RewardMix, scores: Scores) -> torch.Tensor:
    slot.observe(scores)
    return slot.total(scores)


def test_a_second_scorer_of_the_same_name_gets_a_number() -> None:
    sources = ["exact_answer", "regex", "regex", "/a/score.py:brevity", "/b/score.py:brevity", "stage:judge"]
    sources += ["path:/models/judge/", "hub:org/judge@v1/x"]
    slot = mix(*(Part(source=source, scorer=FixedScorer()) for source in sources))
    assert slot.names == ["exact_answer", "regex", "regex#2", "brevity", "brevity#2", "judge", "judge#2", "judge#3"]


def test_a_scorer_sees_text_without_special_tokens_and_the_row_of_each_prompt() -> None:
    scorer = FixedScorer([1.0, 2.0])
    answers = [[*ids(" It is  closed .\n")[:-1], 1, TOKENIZER.eos_token_id], ids("Yes.")]
    slot = mix(Part(source="x", scorer=scorer))
    assert slot.scores([[5], [6]], answers, [3, 0]).values.tolist() == [[1.0, 2.0]]
    assert slot.scores([], [], []).values.shape == (1, 0)
    (asked,) = scorer.asked  # without answers nobody is asked
    assert list(asked.texts) == [" It is  closed .\n", "Yes."]
    assert list(asked.prompts) == [PROMPTS[3], PROMPTS[0]]
    assert (asked.prompt_ids, asked.answer_ids, asked.rows) == ([[5], [6]], answers, [3, 0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -2e6])
def test_what_is_no_score_is_refused_whoever_gave_it(bad: float) -> None:
    slot = mix(
        Part(source="regex", scorer=FixedScorer([1.0, 1.0]), weight=0.0),
        Part(source="reward", scorer=FixedScorer([0.5, bad])),
    )
    with pytest.raises(RewardError, match=r"(nan|inf|-2000000.0) for an answer to rows\.jsonl:3") as caught:
        slot.scores([[5], [6]], [ids("a"), ids("b")], [0, 2])
    assert caught.value.where == "reward"


def test_the_total_is_the_weighted_sum_of_clipped_scores() -> None:
    slot = mix(
        Part(source="regex", scorer=FixedScorer(), weight=2.0),
        Part(source="length", scorer=FixedScorer(), weight=-0.5, clip=4.0),
        Part(source="a", scorer=FixedScorer(), weight=10.0, normalize=True, clip=0.5),
    )
    total = learned(slot, scores_of(regex=[1.0, 0.0, 1.0], length=[-7.0, 3.0, 9.0], a=[100.0, 300.0, 200.0]))
    assert total.tolist() == [2 + 2 - 5, 0 - 1.5 + 5, 2 - 2 + 0]
    assert total.dtype == torch.float32


def test_scores_are_normalised_by_all_scores_so_far_and_a_look_changes_nothing() -> None:
    slot = mix(
        Part(source="a", scorer=FixedScorer(), normalize=True), Part(source="b", scorer=FixedScorer(), weight=0.0)
    )
    assert slot.total(scores_of(a=[1.0, 3.0], b=[0.0, 0.0])).tolist() == [1.0, 3.0], "nothing is known yet"
    seen: list[float] = []
    for batch in [*batches(6, 5), *batches(2, 1)]:
        rounded = torch.tensor(batch).tolist()  # the scores as float32 has them
        seen += rounded
        expected = [(score - fmean(seen)) / pstdev(seen) for score in rounded]
        total = learned(slot, scores_of(a=batch, b=batch))
        assert total.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)
        before = slot.state()
        assert slot.total(scores_of(a=[7.0], b=[7.0])).tolist() == pytest.approx([(7 - fmean(seen)) / pstdev(seen)])
        assert slot.state() == before


@pytest.mark.parametrize("constant", [0.1, -3.7, 1e6, 0.0])
def test_constant_scores_become_zero_never_rounding_noise_and_small_scales_count(constant: float) -> None:
    slot = mix(Part(source="a", scorer=FixedScorer(), normalize=True))
    for size in (3, 7, 1, 5):
        assert learned(slot, scores_of(a=[constant] * size)).abs().max() < 1e-6
    apart = float(slot.total(scores_of(a=[constant + 1.0])))
    assert apart == pytest.approx(1.0, rel=1e-4), "one that differs is told apart, not divided by nothing"
    slot = mix(Part(source="a", scorer=FixedScorer(), normalize=True))
    nearly = [0.1, float(torch.nextafter(torch.tensor(0.1), torch.tensor(1.0)))]
    assert learned(slot, scores_of(a=nearly * 4)).abs().max() < 1e-6
    slot = mix(Part(source="a", scorer=FixedScorer(), normalize=True))
    assert learned(slot, scores_of(a=[1e-9, 3e-9])).tolist() == pytest.approx([-1.0, 1.0])


def test_a_restored_slot_goes_on_as_the_straight_one() -> None:
    def fresh() -> RewardMix:
        return mix(
            *(Part(source="regex", scorer=FixedScorer(), normalize=normalize) for normalize in (True, False, True))
        )

    raw_scores = [
        scores_of(**{"regex": batch, "regex#2": batch, "regex#3": [x * x for x in batch]}) for batch in batches(5, 4)
    ]
    straight, first, resumed = fresh(), fresh(), fresh()
    expected = [learned(straight, raw).tolist() for raw in raw_scores]
    actual = [learned(first, raw).tolist() for raw in raw_scores[:3]]
    resumed.restore(json.loads(json.dumps(first.state())))
    actual += [learned(resumed, raw).tolist() for raw in raw_scores[3:]]
    assert actual == expected
    assert resumed.state() == straight.state()


# ---- ensembles ------------------------------------------------------------------------------------------------------


def cautious(**changes: float | bool) -> RewardMix:
    members = [
        Part(source="stage:first", scorer=FixedScorer([5.0, 7.0]), normalize=True),
        Part(source="stage:second", scorer=FixedScorer([-9.0, 1.0]), clip=2.0, weight=100.0),
    ]
    combine = partial(preferences.mean_minus_std, weight=0.5)
    ensemble = Ensemble(source="ensemble", members=members, combine=combine, **{"weight": 2.0, **changes})
    return mix(Part(source="rule", scorer=FixedScorer([1.0, 0.0])), ensemble)


def lower_bound(first: Sequence[float], seen: Sequence[float], second: Sequence[float]) -> list[float]:
    members = [ensembles_oracle.standardised(first, seen), [max(-2.0, min(2.0, score)) for score in second]]
    return ensembles_oracle.combined(members, "mean_minus_std", weight=0.5)


def test_members_of_an_ensemble_enter_the_total_as_one_and_say_how_far_they_were_apart() -> None:
    slot = cautious()
    scores = slot.scores([[5], [6]], [ids("a"), ids("b")], [0, 1])
    assert slot.names == ["rule", "ensemble/first", "ensemble/second"] == list(scores.names)
    assert scores.values.tolist() == [[1.0, 0.0], [5.0, 7.0], [-9.0, 1.0]]
    bound = lower_bound([5.0, 7.0], [5.0, 7.0], [-9.0, 1.0])
    assert learned(slot, scores).tolist() == pytest.approx([1.0 + 2.0 * bound[0], 2.0 * bound[1]], rel=1e-6)
    slot = cautious()
    scores = slot.scores([[5], [6]], [ids("a"), ids("b")], [0, 1])
    slot.observe(scores)
    shown = slot.of_ensembles(scores)
    assert list(shown) == ["ensemble", "ensemble_std"]
    assert shown["ensemble"].tolist() == pytest.approx(lower_bound([5.0, 7.0], [5.0, 7.0], [-9.0, 1.0]), rel=1e-6)
    apart = [ensembles_oracle.deviation(pair) for pair in ([-1.0, -2.0], [1.0, 1.0])]
    assert shown["ensemble_std"].tolist() == pytest.approx(apart, abs=1e-6)
    assert mix(Part(source="a", scorer=FixedScorer())).of_ensembles(scores_of(a=[1.0])) == {}


def test_what_is_combined_is_normalised_and_clipped_in_its_turn() -> None:
    slot = cautious(normalize=True, clip=0.5)
    first, second, bounds = [], [], []
    for of_first, of_second in zip(batches(3, 4), [[float(n), -1.0, 0.5, 1.0] for n in range(3)], strict=True):
        of_first = torch.tensor(of_first).tolist()
        first, second = first + of_first, second + of_second
        bounds += lower_bound(of_first, first, of_second)
        scores = scores_of(**{"rule": [0.0] * 4, "ensemble/first": of_first, "ensemble/second": of_second})
        expected = [2.0 * max(-0.5, min(0.5, s)) for s in ensembles_oracle.standardised(bounds[-4:], bounds)]
        assert learned(slot, scores).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
