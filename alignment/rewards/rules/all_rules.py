"""All rules, by the name that recipes give as a ``source``."""

from __future__ import annotations

from alignment.config.scoring import ScoreSourceConfig
from alignment.rewards.rules import instructions, json_schema, similarity, texts
from alignment.rewards.rules.rule_kind import Rule, RuleKind

RULES: dict[str, RuleKind] = {
    "exact_answer": RuleKind(
        build=lambda _: Rule(expected=similarity.expected_answer, score=similarity.exact_answer),
        reads=similarity.ANSWER,
    ),
    "regex": RuleKind(build=texts.regex, needs="pattern"),
    "length": RuleKind(build=texts.length, needs="target"),
    "key_facts": RuleKind(build=lambda _: texts.KEY_FACTS, reads=texts.FACTS),
    "refusal": RuleKind(build=lambda _: texts.REFUSAL),
    "json_schema": RuleKind(
        build=lambda config: json_schema.json_schema(config.schema),
        takes="schema",
        reads=json_schema.SCHEMA,
        package=json_schema.PACKAGE,
        fault=lambda config: "" if config.schema is None else json_schema.schema_problem(config.schema),
    ),
    "rouge_l": RuleKind(build=lambda _: similarity.rouge_l(), reads=similarity.REFERENCE, package=similarity.ROUGE),
    "chrf": RuleKind(build=lambda _: similarity.chrf(), reads=similarity.REFERENCE, package=similarity.CHRF),
    "instructions_strict": RuleKind(
        build=lambda _: instructions.instructions(loose=False), reads=instructions.IDS, package=instructions.PACKAGE
    ),
    "instructions_loose": RuleKind(
        build=lambda _: instructions.instructions(loose=True), reads=instructions.IDS, package=instructions.PACKAGE
    ),
}


def rule_of(config: ScoreSourceConfig) -> Rule | None:
    """The rule that ``source`` names; None for a source of another form."""
    kind = RULES.get(config.source)
    if kind is None:
        return None
    rule = kind.build(config)
    return rule if kind.reads is None else texts.of_one_turn(rule, source=config.source, field=kind.reads)
