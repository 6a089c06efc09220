"""A stage's configuration becomes its reward slot, with reward models of every origin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.config.model import Dtype
from alignment.config.scoring import Combine, EnsembleConfig, MemberConfig, ScorerConfig
from alignment.core.errors import DataError, ModelError
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.job import StageInput
from alignment.models.assembly.load import Lineage
from alignment.models.assembly.reward_head import load_reward_model
from alignment.models.forward.answers import scalar_scores
from alignment.models.forward.rows import stream
from alignment.rewards.build import build_rewards
from alignment.rewards.reward_models import Computation
from alignment.rewards.scores import Scores
from alignment.rewards.weighted_sum import RewardMix
from alignment.stages.ppo.config import PpoConfig
from tests.oracles.ensembles import combined
from tests.tiny import BASE_SOURCE, save_tiny_model, tiny_reward, tiny_spec
from tests.unit.rewards.conftest import answers_to, prompt
from tests.unit.rewards.test_models import external, scorer

CPU = torch.device("cpu")
RUN = Computation(device=CPU, dtype=Dtype.float32, tokens=2048)
REWARD = [ScorerConfig()]
FIELDS = [f"scorers[{number}]" for number in range(5)]
PROMPTS = [prompt(line=1, answer="#### 3"), prompt("Where are the keys?", line=2, answer="#### 4", facts=[["hall"]])]
TEXTS = ["In the hall, at 3.", "They are in the hall."]
MEMBERS = [MemberConfig(source="length", target=4), MemberConfig(source="regex", pattern="^They")]
"""Of an ensemble."""


@pytest.fixture
def base(tmp_path: Path) -> Lineage:
    """A model folder as a run's base."""
    return Lineage(source=BASE_SOURCE, base=save_tiny_model(tmp_path / "base"), adapters=())


def slot(
    tmp_path: Path,
    scorers: Sequence[ScorerConfig],
    reward_model: Any = None,
    *,
    fields: Sequence[str] = FIELDS,
    **changes: Any,
) -> RewardMix:
    """The scorers at these fields of a stage as one reward."""
    spec = tiny_spec(tmp_path, PpoConfig(), **changes)
    named = dict(zip(fields, scorers, strict=False))
    return build_rewards(named, spec, load_tokenizer(spec.base_path), PROMPTS, reward_model, RUN)


def scored(mix: RewardMix, base: Lineage) -> Scores:
    prompts, answers = rows(base)
    return mix.scores(prompts, answers, [0, 1])


def raw(mix: RewardMix, base: Lineage) -> dict[str, list[float]]:
    """Each scorer's scores."""
    return {name: values.tolist() for name, values in scored(mix, base).by_name().items()}


def rows(base: Lineage) -> tuple[list[list[int]], list[list[int]]]:
    tokenizer = load_tokenizer(base.base)
    prompts = [tokenizer(question.messages[-1].content)["input_ids"] for question in PROMPTS]
    return prompts, [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]


def test_every_rule_and_a_function_stand_side_by_side(tmp_path: Path, base: Lineage) -> None:
    file = tmp_path / "score.py"
    file.write_text("def brevity(prompts, completions, rows): return [-len(text) for text in completions]\n")
    scorers = [
        ScorerConfig(source="exact_answer"),
        ScorerConfig(source="regex", pattern=r"at \d", weight=2.0),
        ScorerConfig(source="length", target=5),
        ScorerConfig(source=f"{file}:brevity", weight=0.1, clip=10.0),
        ScorerConfig(source="regex", pattern="^They"),
    ]
    mix = slot(tmp_path, scorers)
    scores = scored(mix, base)
    assert {name: values.tolist() for name, values in scores.by_name().items()} == {
        "exact_answer": [1.0, 0.0],
        "regex": [1.0, 0.0],
        "length": [1.0, 1.0],
        "brevity": [-18.0, -21.0],
        "regex#2": [0.0, 1.0],
    }
    assert mix.total(scores).tolist() == pytest.approx([1 + 2 + 1 - 1 + 0, 0 + 0 + 1 - 1 + 1])


@pytest.mark.parametrize("kind", list(AdapterKind))
def test_a_reward_model_of_ours_scores_token_ids_loaded_before_or_not(
    tmp_path: Path, base: Lineage, kind: AdapterKind
) -> None:
    reward = tiny_reward(tmp_path / "reward", AdapterConfig(kind=kind, rank=4), start=base)
    spec = tiny_spec(tmp_path, PpoConfig(), inputs={"reward": reward})
    model = load_reward_model(spec, reward, device=CPU)
    prompts, answers = rows(base)
    with torch.no_grad():
        alone = [scalar_scores(model, stream([p + a], CPU)).item() for p, a in zip(prompts, answers, strict=True)]
    for loaded in (None, model):
        mix = slot(tmp_path, REWARD, loaded, inputs={"reward": reward})
        assert raw(mix, base) == {"reward": pytest.approx(alone, rel=1e-5)}


def test_a_loaded_reward_model_is_not_loaded_again(tmp_path: Path, base: Lineage) -> None:
    reward = tiny_reward(tmp_path / "reward", AdapterConfig(rank=4), start=base)
    model = load_reward_model(tiny_spec(tmp_path, PpoConfig()), reward, device=CPU)
    gone = StageInput(ref="stage:reward", path=tmp_path / "gone")
    assert set(raw(slot(tmp_path, REWARD, model, inputs={"reward": gone}), base)) == {"reward"}


def test_a_reward_model_from_outside_scores_text(tmp_path: Path, base: Lineage) -> None:
    folder = external(tmp_path / "judge")
    reward = StageInput(ref="hub:org/judge", path=folder)
    scores = raw(slot(tmp_path, REWARD, inputs={"reward": reward}), base)
    assert scores["reward"] == pytest.approx(
        scorer(folder, prompts=PROMPTS).scores(answers_to(PROMPTS, TEXTS)).tolist()
    )


def test_the_guard_has_a_slot_of_its_own_with_a_model_of_its_own(tmp_path: Path, base: Lineage) -> None:
    reward = tiny_reward(tmp_path / "reward", AdapterConfig(rank=4), start=base)
    judge = StageInput(ref="path:judge", path=external(tmp_path / "judge"))
    inputs = {"reward": reward, "guard.scorer.source": judge}
    assert slot(tmp_path, REWARD, inputs=inputs).names == ["reward"]
    second = slot(tmp_path, [ScorerConfig(source="path:judge")], fields=["guard.scorer"], inputs=inputs)
    assert second.names == ["judge"]
    assert len(raw(second, base)["judge"]) == 2


def test_a_reward_model_of_ours_with_another_tokenizer_is_refused(tmp_path: Path, base: Lineage) -> None:
    reward = tiny_reward(tmp_path / "reward", AdapterConfig(rank=4), start=base)
    spec = tiny_spec(tmp_path, PpoConfig(), inputs={"reward": reward})
    tokenizer = load_tokenizer(base.base)
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(ModelError, match="stage:reward has a different tokenizer or chat template"):
        build_rewards({"scorers[0]": ScorerConfig()}, spec, tokenizer, PROMPTS, None, RUN)


def test_code_that_changed_since_the_plan_is_refused(tmp_path: Path, base: Lineage) -> None:
    file = tmp_path / "score.py"
    file.write_text("def brevity(prompts, completions, rows): return [0 for _ in rows]\n")
    scorers = [ScorerConfig(source=f"{file}:brevity")]
    with pytest.raises(DataError, match="changed since the run was planned"):
        slot(tmp_path, scorers, identity={"code": {"scorers[0].source": "0" * 64}})


def test_normalising_and_clipping_are_the_configuration_s(tmp_path: Path, base: Lineage) -> None:
    scorer_config = ScorerConfig(source="regex", pattern="^They", normalize=True, clip=0.75, weight=2.0)
    mix = slot(tmp_path, [scorer_config])
    scores = scored(mix, base)
    assert mix.total(scores).tolist() == [0.0, 1.5], "nothing is known yet"
    mix.observe(scores)
    assert mix.total(scores).tolist() == [-1.5, 1.5]
    assert mix.state()["regex"]["count"] == 2


@pytest.mark.parametrize("combine", list(Combine))
def test_an_ensemble_combines_its_members_as_the_configuration_says(
    tmp_path: Path, base: Lineage, combine: Combine
) -> None:
    ensemble = EnsembleConfig(members=MEMBERS, combine=combine, std_weight=0.5)
    mix = slot(tmp_path, [ScorerConfig(source="ensemble", ensemble=ensemble)])
    scores = scored(mix, base)
    of_members = {name: values.tolist() for name, values in scores.by_name().items()}
    assert of_members == {"ensemble/length": [0.75, 0.75], "ensemble/regex": [0.0, 1.0]}
    expected = combined(list(of_members.values()), combine.value, weight=0.5)
    assert mix.total(scores).tolist() == pytest.approx(expected)


def test_what_an_ensemble_combines_is_normalised_and_clipped_by_the_configuration(
    tmp_path: Path, base: Lineage
) -> None:
    ensemble = EnsembleConfig(members=MEMBERS)
    mix = slot(tmp_path, [ScorerConfig(source="ensemble", ensemble=ensemble, normalize=True, clip=0.5, weight=2.0)])
    scores = scored(mix, base)
    assert mix.total(scores).tolist() == [0.75, 1.0], "means of 0.375 and 0.875, and nothing is known yet"
    mix.observe(scores)
    assert mix.total(scores).tolist() == [-1.0, 1.0]
    assert mix.state()["ensemble"]["count"] == 2
