"""All rules, by the name that recipes give as a ``source``."""

from __future__ import annotations

from alignment.config.scoring import ScoreSourceConfig
from alignment.rewards.rules import instructions, json_schema, similarity
from alignment.rewards.rules.json_schema import JsonSchema
from alignment.rewards.rules.rule_kind import Rule, RuleKind
from alignment.rewards.rules.similarity import ANSWER, ExactAnswer
from alignment.rewards.rules.texts import FACTS, KeyFacts, Length, OfOneTurn, Refusal, Regex


def _regex(config: ScoreSourceConfig) -> Rule:
    assert config.pattern is not None, "the plan refuses a regex without its pattern"
    return Regex(config.pattern)


def _length(config: ScoreSourceConfig) -> Rule:
    assert config.target is not None, "the plan refuses a length without its target"
    return Length(config.target)


def _schema_fault(config: ScoreSourceConfig) -> str:
    return "" if config.schema is None else json_schema.schema_problem(config.schema)


RULES: dict[str, RuleKind] = {
    "exact_answer": RuleKind(build=lambda _: ExactAnswer(), reads=ANSWER),
    "regex": RuleKind(build=_regex, needs="pattern"),
    "length": RuleKind(build=_length, needs="target"),
    "key_facts": RuleKind(build=lambda _: KeyFacts(), reads=FACTS),
    "refusal": RuleKind(build=lambda _: Refusal()),
    "json_schema": RuleKind(
        build=lambda config: JsonSchema(config.schema),
        takes="schema",
        reads=json_schema.SCHEMA,
        package=json_schema.PACKAGE,
        fault=_schema_fault,
    ),
    "rouge_l": RuleKind(build=lambda _: similarity.RougeL(), reads=similarity.REFERENCE, package=similarity.ROUGE),
    "chrf": RuleKind(build=lambda _: similarity.ChrF(), reads=similarity.REFERENCE, package=similarity.CHRF),
    "instructions_strict": RuleKind(
        build=lambda _: instructions.Instructions(loose=False), reads=instructions.IDS, package=instructions.PACKAGE
    ),
    "instructions_loose": RuleKind(
        build=lambda _: instructions.Instructions(loose=True), reads=instructions.IDS, package=instructions.PACKAGE
    ),
}


def rule_of(config: ScoreSourceConfig) -> Rule | None:
    """The rule that ``source`` names; None for a source of another form."""
    kind = RULES.get(config.source)
    if kind is None:
        return None
    rule = kind.build(config)
    return rule if kind.reads is None else OfOneTurn(rule=rule, source=config.source, field=kind.reads)
