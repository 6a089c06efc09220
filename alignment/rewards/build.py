"""Builds the scorers of a stage from their configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from alignment.algos.preferences import mean, mean_minus_std, worst
from alignment.config.scoring import Combine, EnsembleConfig, MemberConfig, ScorerConfig, ScoreSourceConfig
from alignment.core.artifacts import read_manifest
from alignment.data.records import Prompt
from alignment.job import StageSpec
from alignment.models.assembly.heads import load_reward_model
from alignment.models.assembly.load import refuse_other_tokenizer
from alignment.rewards.functions import FunctionScorer, load_function
from alignment.rewards.reward_models import Computation, TextScorer, TokenScorer, load_external
from alignment.rewards.rules.all_rules import rule_of
from alignment.rewards.scorer_sources import ENSEMBLE, REWARD, function_of, input_field, member_field, source_field
from alignment.rewards.scorers import RuleScorer, Scorer
from alignment.rewards.served import Asking, GradeScorer, ServerScorer
from alignment.rewards.weighted_sum import Ensemble, Part, RewardMix

_COMBINING: dict[Combine, Callable[[EnsembleConfig], Callable[[Tensor], Tensor]]] = {
    Combine.mean: lambda _: mean,
    Combine.min: lambda _: worst,
    Combine.mean_minus_std: lambda config: partial(mean_minus_std, weight=config.std_weight),
}
"""``[members, answers]`` → ``[answers]``."""


def build_rewards(
    scorers: Mapping[str, ScorerConfig],
    spec: StageSpec,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    reward_model: PreTrainedModel | PeftModel | None,
    run: Computation,
    asking: Asking | None = None,
) -> RewardMix:
    """The weighted sum of these scorers, each named by its field in the configuration. ``prompts`` are all rows of the
    stage's data (up to ``data.limit``), too long ones included, so that prompts can be looked up by the index of their
    row. ``tokenizer`` is the policy's. ``reward_model`` is the model of the source ``reward``, if a stage made it and
    it is already loaded; with None it is loaded here. ``asking`` is for scorers behind HTTP. Raises ConfigError: the
    key of a server is not set, or its client is not installed; DataError: a row lacks a field that a scorer needs, or a
    function's file changed since the run was planned; ModelError: a reward model cannot be loaded, or its tokenizer
    does not fit; RewardError: a function's file cannot be imported."""
    shared = (spec, tokenizer, prompts, run, asking, reward_model)

    def part(field: str, scorer: MemberConfig, *, weight: float = 1.0) -> Part:
        return Part(
            source=str(function_of(scorer.source) or scorer.source),
            scorer=build_scorer(field, scorer, *shared),
            weight=weight,
            normalize=scorer.normalize,
            clip=scorer.clip,
        )

    def ensemble(field: str, scorer: ScorerConfig) -> Ensemble:
        assert scorer.ensemble is not None, "the plan refuses an ensemble without members"
        members = enumerate(scorer.ensemble.members)
        return Ensemble(
            source=ENSEMBLE,
            members=[part(member_field(field, number), member) for number, member in members],
            combine=_COMBINING[scorer.ensemble.combine](scorer.ensemble),
            weight=scorer.weight,
            normalize=scorer.normalize,
            clip=scorer.clip,
        )

    parts = [
        ensemble(field, scorer) if scorer.source == ENSEMBLE else part(field, scorer, weight=scorer.weight)
        for field, scorer in scorers.items()
    ]
    return RewardMix(parts, tokenizer, prompts)


def build_scorer(
    field: str,
    scorer: ScoreSourceConfig,
    spec: StageSpec,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    run: Computation,
    asking: Asking | None = None,
    reward_model: PreTrainedModel | PeftModel | None = None,
) -> Scorer:
    """The scorer at a ``field`` of the configuration; arguments and exceptions as in ``build_rewards``."""
    function = function_of(scorer.source)
    if function is not None:
        planned = spec.identity.get("code", {}).get(source_field(field))
        return FunctionScorer(function, load_function(function, planned=planned))
    rule = rule_of(scorer)
    if rule is not None:
        return RuleScorer(rule, prompts)
    if scorer.server is not None:
        assert asking is not None
        return ServerScorer(scorer.server, field, asking)
    if isinstance(scorer, MemberConfig) and scorer.grader is not None:
        assert asking is not None
        return GradeScorer(scorer.grader, field, asking)
    name = input_field(field, scorer.source)
    assert name is not None, f"the plan refuses the source {scorer.source!r}"
    if name == REWARD and reward_model is not None:
        return TokenScorer(reward_model, run)
    model_input = spec.inputs[name]
    assert model_input.path is not None, "the plan refuses 'base' in a reward slot"
    if read_manifest(model_input.path) is not None:
        refuse_other_tokenizer(spec, model_input, tokenizer)
        return TokenScorer(load_reward_model(spec, model_input, device=run.device).to(run.device), run)
    model, own_tokenizer = load_external(model_input.path, run.dtype, source=model_input.ref)
    return TextScorer(model.to(run.device), own_tokenizer, prompts, run, source=model_input.ref)
