"""All rules, by the name that recipes give as a ``source``."""

from __future__ import annotations

from alignment.config.scoring import ScoreSourceConfig
from alignment.rewards.rules import instructions, json_schema, similarity, texts
from alignment.rewards.rules.json_schema import JsonSchema
from alignment.rewards.rules.rule_kind import Rule, RuleKind
from alignment.rewards.rules.similarity import ANSWER, ExactAnswer

RULES: dict[str, RuleKind] = {
    "exact_answer": RuleKind(build=lambda _: ExactAnswer(), reads=ANSWER),
    "regex": RuleKind(build=texts.regex, needs="pattern"),
    "length": RuleKind(build=texts.length, needs="target"),
    "key_facts": RuleKind(build=lambda _: texts.KeyFacts(), reads=texts.FACTS),
    "refusal": RuleKind(build=lambda _: texts.REFUSAL),
    "json_schema": RuleKind(
        build=lambda config: JsonSchema(config.schema),
        takes="schema",
        reads=json_schema.SCHEMA,
        package=json_schema.PACKAGE,
        fault=lambda config: "" if config.schema is None else json_schema.schema_problem(config.schema),
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
    return rule if kind.reads is None else texts.OfOneTurn(rule=rule, source=config.source, field=kind.reads)
