"""A reward card knows the pairs that the run's reward model learns from, and its slots and settings are checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from alignment.core.errors import ConfigError, DataError, ModelError
from alignment.pipeline.execute.summary import show_card
from alignment.pipeline.plan.plan import Plan, PlannedStage, make_plan
from alignment.pipeline.plan.references import slots
from alignment.records.interval import Interval
from alignment.records.reward_card import Baseline, RewardCard
from alignment.stages.reward_card.config import RewardCardConfig
from tests.weights_files import weights_file

TURN = [{"role": "user", "content": "When is the training?"}]
PAIR = {"messages": TURN, "chosen": "On 21 March.", "rejected": "Great question!"}
MakePlan = Callable[..., Plan]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakePlan:
    """Plans the recipe on a model folder and pairs of its own, with more overrides."""
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(weights_file())
    for name in ("learned", "judged", "others"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({**PAIR, "id": name}) + "\n")
    common_overrides = [f"output={tmp_path / 'out'}", f"model.source=path:{model}"]
    common_overrides += [f"stages.reward.data.source=path:{tmp_path}/learned.jsonl"]
    common_overrides += [f"stages.card.data.source=path:{tmp_path}/judged.jsonl"]
    return lambda *more: make_plan("reward_card", [*common_overrides, *more])


def card_in(plan: Plan) -> PlannedStage:
    return next(stage for stage in plan.stages if stage.name == "card")


def test_the_pairs_of_the_reward_stage_are_those_that_were_learned(plan: MakePlan, tmp_path: Path) -> None:
    mix = f"stages.reward.data.mix=[{{source: 'path:{tmp_path}/others.jsonl', count: 1}}]"
    card = card_in(plan("stages.reward.data.limit=7", "stages.reward.data.fraction=0.5", mix))
    assert isinstance(card.config, RewardCardConfig)
    assert (card.config.learned.limit, card.config.learned.fraction, card.config.learned.mix) == (7, 0.5, [])
    assert card.extra_data == {"learned": tmp_path / "learned.jsonl"}


def test_other_pairs_may_be_named(plan: MakePlan, tmp_path: Path) -> None:
    card = card_in(plan(f"stages.card.learned.source=path:{tmp_path}/others.jsonl", "stages.card.learned.limit=1"))
    assert card.extra_data == {"learned": tmp_path / "others.jsonl"}


def test_other_learned_pairs_and_another_rule_make_another_card(plan: MakePlan, tmp_path: Path) -> None:
    cards = [
        card_in(plan()),
        card_in(plan(f"stages.card.learned.source=path:{tmp_path}/others.jsonl")),
        card_in(plan("stages.card.rule=null")),
    ]
    assert len({card.fingerprint for card in cards}) == 3
    assert card_in(plan("stages.card.micro_batch_tokens=99")).fingerprint == cards[0].fingerprint
    assert list(cards[0].identity["code"]) == ["rule.source"]
    assert "code" not in cards[2].identity


def test_of_a_model_from_elsewhere_nothing_is_known(plan: MakePlan, tmp_path: Path) -> None:
    judge = tmp_path / "judge"
    judge.mkdir()
    (judge / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}')
    (judge / "model.safetensors").write_bytes(weights_file())
    planned = plan("~stages.reward", f"stages.card.reward=path:{judge}")
    card = card_in(planned)
    assert card.extra_data == {}
    assert card.inputs["reward"].path == judge
    (slot,) = slots(card.config)
    assert slot.external


@pytest.mark.parametrize(
    ("override", "kind", "message"),
    [
        ("stages.card.reward=base", ConfigError, r"stages.card.reward: 'base' is a language model; this slot takes a"),
        (
            "stages.card.reward=stage:card",
            ConfigError,
            r"'stage:card' is a reward card; this slot takes a reward model",
        ),
        ("stages.card.learned.limit=3", ConfigError, r"stages.card.learned.source: missing, so the other settings"),
        (
            "stages.card.rule=house_style",
            ConfigError,
            r"stages.card.rule: .*'house_style' is no longer a rule of the package; write 'bundled:quickstart/house_st",
        ),
        (
            "stages.card.rule.source=lenght",
            ConfigError,
            r"card.rule.source: 'lenght' is not a scorer; did you mean 'len",
        ),
        (
            "stages.card.rule={source: regex}",
            ConfigError,
            r"card.rule.pattern: missing; 'regex' needs it",
        ),
        (
            "stages.card.rule={source: exact_answer}",
            DataError,
            r"judged.jsonl:1: 'answer' is missing",
        ),
        (
            "stages.card.rule={source: 'stage:reward'}",
            ConfigError,
            r"card.rule.source: 'stage:reward' is a reward model; a rule is FILE.py:FUNCTION or one of: exact_answer, ",
        ),
        (
            "stages.card.data.source=bundled:quickstart/heldout",
            DataError,
            r"heldout.jsonl:1 and 19 other rows: 'chosen' is missing",
        ),
        ("stages.card.learned.source=path:nowhere.jsonl", DataError, r"no file .*nowhere.jsonl"),
        ("stages.report.evaluation=stage:card", ConfigError, r"'stage:card' is a reward card; this slot takes an eval"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_anything_starts(
    plan: MakePlan, override: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        plan(override)


def test_a_policy_in_the_slot_is_refused(plan: MakePlan, tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    policy.mkdir()
    (policy / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (policy / "model.safetensors").write_bytes(weights_file())
    with pytest.raises(ModelError, match="this slot takes a reward model"):
        plan(f"stages.card.reward=path:{policy}")


def test_the_screen_says_how_often_the_model_is_right_and_what_to_know_before() -> None:
    def interval(mean: float) -> Interval:
        return Interval(mean=mean, low=mean - 0.04, high=mean + 0.04)

    words = Baseline(name="bag of words", accuracy=interval(0.6), difference=interval(0.05))
    longer = Baseline(name="longer answer", accuracy=Interval(mean=0.4), difference=Interval(mean=0.25))
    card = RewardCard(accuracy=interval(0.65), num_pairs=500, baselines=[words, longer], warnings=["[b]Beware.[/b]"])
    screen = StringIO()
    show_card(Console(file=screen, width=40), "card", card)
    assert screen.getvalue().splitlines() == [
        "card: right on 0.650 (0.610–0.690) of 500 pairs; bag of words 0.600 (0.560–0.640), difference +0.050 "
        "(+0.010 to +0.090); longer answer 0.400, difference +0.250",
        "  [b]Beware.[/b]",
    ]
