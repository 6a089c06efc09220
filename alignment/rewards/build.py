"""Builds the scorers of a stage from their configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    builder = _Builder(
        spec=spec, tokenizer=tokenizer, prompts=prompts, reward_model=reward_model, run=run, asking=asking
    )
    return RewardMix([builder.part(field, scorer) for field, scorer in scorers.items()], tokenizer, prompts)


def build_scorer(
    field: str,
    scorer: ScoreSourceConfig,
    spec: StageSpec,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    run: Computation,
    asking: Asking | None = None,
) -> Scorer:
    """The scorer at a ``field`` of the configuration; arguments and exceptions as in ``build_rewards``."""
    builder = _Builder(spec=spec, tokenizer=tokenizer, prompts=prompts, reward_model=None, run=run, asking=asking)
    return builder.scorer(field, scorer)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Builder:
    spec: StageSpec
    tokenizer: Any
    prompts: Sequence[Prompt]
    reward_model: PreTrainedModel | PeftModel | None
    run: Computation
    asking: Asking | None

    def part(self, field: str, scorer: ScorerConfig) -> Part | Ensemble:
        if scorer.source != ENSEMBLE:
            return self._column(field, scorer, weight=scorer.weight)
        assert scorer.ensemble is not None, "the plan refuses an ensemble without members"
        members = enumerate(scorer.ensemble.members)
        return Ensemble(
            source=ENSEMBLE,
            members=[self._column(member_field(field, number), member) for number, member in members],
            combine=_COMBINING[scorer.ensemble.combine](scorer.ensemble),
            weight=scorer.weight,
            normalize=scorer.normalize,
            clip=scorer.clip,
        )

    def _column(self, field: str, scorer: MemberConfig, *, weight: float = 1.0) -> Part:
        return Part(
            source=str(function_of(scorer.source) or scorer.source),
            scorer=self.scorer(field, scorer),
            weight=weight,
            normalize=scorer.normalize,
            clip=scorer.clip,
        )

    def scorer(self, field: str, scorer: ScoreSourceConfig) -> Scorer:
        function = function_of(scorer.source)
        if function is not None:
            planned = self.spec.identity.get("code", {}).get(source_field(field))
            return FunctionScorer(function, load_function(function, planned=planned))
        rule = rule_of(scorer)
        if rule is not None:
            return RuleScorer(rule, self.prompts)
        if scorer.server is not None:
            assert self.asking is not None
            return ServerScorer(scorer.server, field, self.asking)
        if isinstance(scorer, MemberConfig) and scorer.grader is not None:
            assert self.asking is not None
            return GradeScorer(scorer.grader, field, self.asking)
        name = input_field(field, scorer.source)
        assert name is not None, f"the plan refuses the source {scorer.source!r}"
        return self._model(name, source=scorer.source)

    def _model(self, name: str, *, source: str) -> Scorer:
        if name == REWARD and self.reward_model is not None:
            return TokenScorer(self.reward_model, self.run)
        model_input = self.spec.inputs[name]
        assert model_input.path is not None, "the plan refuses 'base' in a reward slot"
        if read_manifest(model_input.path) is not None:
            refuse_other_tokenizer(self.spec, model_input, self.tokenizer)
            own_model = load_reward_model(self.spec, model_input, device=self.run.device)
            return TokenScorer(own_model.to(self.run.device), self.run)
        model, tokenizer = load_external(model_input.path, self.run.dtype, source=model_input.ref)
        return TextScorer(model.to(self.run.device), tokenizer, self.prompts, self.run, source=model_input.ref)
