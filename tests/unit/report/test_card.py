"""A reward model's card on the page: all figures, safe against hostile text, and nothing where it cannot be read."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest

from alignment.core.typed_json import to_json
from alignment.data.records import PreferencePair
from alignment.data.turns import Message
from alignment.evaluation.card_measures import Intervals, Judged, card_of, warnings
from alignment.records.reward_card import Change, Invariances, Learned, Rescored
from alignment.report.kit.render import build
from tests.unit.report.test_page import HOSTILE, Page, assert_harmless


def made_card(*, words: str = "plain", margins: float = 1.0) -> dict[str, Any]:
    """A card as a stage leaves it, about forty pairs; ``words`` stand wherever text of the data's does."""
    rng = random.Random(5)
    pairs = [
        Judged(
            pair=PreferencePair(
                messages=(Message(role="user", content=f"{words} {number}"),),
                chosen=f"Yes. {words}",
                rejected=f"No. {words}",
                id=f"{words}-{number}",
                subset=f"{words}-{number % 2}",
            ),
            scores=(rng.gauss(0.4, 1) * margins, 0.0),
            tokens=(rng.randint(20, 60), 40),
            words=rng.gauss(0.1, 1),
            rule=(1.0, 0.5 if number % 2 else 1.0),
        )
        for number in range(40)
    ]
    changes = {"alone": Change(largest=0.004, flips=1), "padded on the left": Change(largest=3e-6)}
    card = replace(
        card_of(pairs, intervals=Intervals(samples=50, seed=0), num_worst=3),
        reward=f"path:{words}",
        learned=Learned(num_pairs=100, judged_too=7, left_out=True, words=9, for_answer=[words], against=["no"]),
        invariances=Invariances(num_pairs=16, formats={"bfloat16": Rescored(spread=1.1, changes=changes)}),
    )
    return to_json(replace(card, warnings=[*warnings(card), words]))


def with_card(fake_run: Any, content: str) -> str:
    """The page of a run whose only judge is a card with this content."""
    del fake_run.run["stages"]["evaluate"]
    entry = {"kind": "reward_card", "inputs": {"reward": "stage:reward"}, "seconds": 9.0}
    fake_run.run["stages"]["card"] = {**entry, "state": "done", "reason": "", "artifact": "card-0123abcd"}
    fake_run.write()
    (fake_run.artifact("card") / "card.json").write_text(content, encoding="utf-8")
    build(fake_run.folder, fake_run.root / "card.html", num_samples=2)
    return (fake_run.root / "card.html").read_text(encoding="utf-8")


def test_a_card_is_shown_with_all_that_it_measured(fake_run: Any) -> None:
    fake_run.headlines["card"] = {"log_loss": 0.123}
    card = made_card()
    html = with_card(fake_run, json.dumps(card))
    assert_harmless(html)
    judges = html.split("<figcaption>Accuracy</figcaption>")[1].split("</figure>")[0]
    assert judges.count('class="guide"') == 3, "chance, behind each of the judges"
    page = Page(html).text
    accuracy = f"{card['accuracy']['mean']:.3f}"
    for text in (
        "The reward model",
        accuracy,
        "bag of words",
        "longer answer",
        "accuracy minus the accuracy of: bag of words",
        "expected calibration error",
        "prefers the longer answer",
        "agrees with the rule",
        "mean over subsets",
        "100 pairs; 7 judged pairs overlap with them and were left out",
        "plain-0",
        "padded on the left",
        "1 flipped",
        "rejected, preferred by the model",
    ):
        assert text in page, text
    assert "log_loss" not in page, "the card says it, so the table of costs does not"
    assert f"card: the reward model is right on {card['accuracy']['mean']:.2f} of 40 pairs" in page
    assert 'aria-label="Calibration: ' in html
    assert 'aria-label="Margins: ' in html
    assert html.count('class="column') == 20
    assert with_card_again(fake_run) == html, "the same files give the same bytes"


def with_card_again(fake_run: Any) -> str:
    build(fake_run.folder, fake_run.root / "again.html", num_samples=2)
    return (fake_run.root / "again.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_in_a_card_stays_text(fake_run: Any, hostile: str) -> None:
    html = with_card(fake_run, json.dumps(made_card(words=hostile)))
    assert_harmless(html)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"accuracy": {}}', '{"accuracy": {"mean": "high"}}', '{"accuracy": [1]}']
)
def test_a_card_that_cannot_be_read_is_said(fake_run: Any, content: str) -> None:
    html = with_card(fake_run, content)
    assert "The file card.json cannot be read." in Page(html).text
    assert 'id="reward-model"' not in html


def test_a_card_of_nothing_but_an_accuracy_is_shown(fake_run: Any) -> None:
    html = with_card(fake_run, '{"accuracy": {"mean": 0.7}, "margins": {"edges": [1, 2], "counts": ["x"]}, "worst": 3}')
    assert_harmless(html)
    assert "0.700" in Page(html).text


def test_scores_all_alike_are_drawn(fake_run: Any) -> None:
    assert_harmless(with_card(fake_run, json.dumps(made_card(margins=0.0))))


def test_a_run_without_a_card_has_no_such_section(fake_run: Any) -> None:
    assert "reward-model" not in fake_run.html()
