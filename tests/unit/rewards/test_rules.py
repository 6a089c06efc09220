"""Rules say of an answer's text what a reader would say."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from rouge_score.rouge_scorer import RougeScorer

from alignment.config.scoring import MetricConfig
from alignment.core.errors import DataError
from alignment.data.fields import Fields
from alignment.data.formats import FORMATS
from alignment.data.records import HeldOutPrompt, Prompt
from alignment.evaluation.exchanges import continued
from alignment.rewards.rules import similarity
from alignment.rewards.rules.all_rules import rule_of
from alignment.rewards.rules.rule_kind import Rule
from alignment.rewards.rules.similarity import first_reference
from alignment.rewards.scorers import RuleScorer
from tests.hub import PUBLIC, WRITTEN, needs_public_data
from tests.unit.rewards.conftest import answers_to, prompt

RIGHT = [
    ("first 3, then 18", "18"),
    ("She pays $18.00!", "18"),
    ("1,234,567.50", "1234567.5"),
    ("half of it, .5", "0.5"),
    ("so −5", "-5"),
    ("a loss of -$5", "-5"),
    ("8-3", "3"),
    ("x = 3 - 8", "8"),
    ("\\boxed{-5}", "-5"),
    ("1{,}234{,}567.5", "1234567.5"),
    ("1,\\!080", "1080"),
    ("-\\$5", "-5"),
    ("x^{2}-5", "5"),
    ("\\{1{,}2\\}", "2"),
    ("on the 2nd", "2"),
    ("1,2345", "2345"),
    ("1\n2\n", "2"),
]


@pytest.mark.parametrize(("completion", "expected"), RIGHT)
def test_the_last_number_of_an_answer_is_read_as_a_reader_would(completion: str, expected: str) -> None:
    assert similarity.exact_answer(completion, Decimal(expected)) == 1.0
    assert similarity.exact_answer(completion, Decimal(expected) + Decimal("0.01")) == 0.0
    assert Decimal(similarity.final_number(completion)) == Decimal(expected)


def test_each_answer_is_held_against_its_own_row() -> None:
    prompts = [prompt(answer="#### 1"), prompt(answer="#### 2"), prompt(answer="#### 3")]
    scorer = RuleScorer(rule("exact_answer"), prompts)
    assert scorer.scores(answers_to(prompts, ["1", "1", "3"])).tolist() == [1.0, 0.0, 1.0]


REFERENCE = "police killed the gunman"


@pytest.mark.parametrize(
    ("source", "settings", "text", "expected"),
    [
        ("regex", {"pattern": r"^<answer>.*</answer>$"}, "<answer>4</answer>", 1.0),
        ("regex", {"pattern": r"^<answer>.*</answer>$"}, "well, <answer>4</answer>", 0.0),
        ("regex", {"pattern": r"\bfour\b"}, "it is four.", 1.0),
        *(("length", {"target": 4}, "word " * count, max(0.0, 1 - abs(count - 4) / 4)) for count in range(11)),
        ("length", {"target": 4}, "a  b\nc\td", 1.0),
        ("length", {"target": 4}, "今天，休息。", 1.0),  # in a script without spaces each character is a word
        ("length", {"target": 4}, "Café 休息 geöffnet", 1.0),
        ("refusal", {}, "I’m unable to help with that.", 1.0),
        ("refusal", {}, "I cannot come on Monday.", 0.0),
        ("json_schema", {"schema": {"type": "number", "multipleOf": 0.01}}, "1e999", 0.0),
        ("json_schema", {"schema": {"type": "number", "multipleOf": 0.01}}, "1" + "0" * 400, 0.0),
        ("json_schema", {"schema": {}}, "-Infinity", 0.0),
        ("json_schema", {"schema": {}}, "1.5", 1.0),
    ],
)
def test_a_rule_scores_a_text(source: str, settings: dict[str, Any], text: str, expected: float) -> None:
    assert scored(rule(source, **settings), text) == expected


@pytest.mark.parametrize(
    "file", [WRITTEN / "sums.jsonl", pytest.param(PUBLIC / "gsm8k/test.jsonl", marks=needs_public_data)]
)
def test_rows_agree_with_themselves_and_with_the_published_extraction(file: Path) -> None:
    """The data set's authors read ``#### (\\-?[0-9\\.\\,]+)`` and drop commas (openai/grade-school-math)."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= (6 if file.parent == WRITTEN else 100)
    published_numbers = []
    for row in rows:
        published = re.search(r"#### (\-?[0-9\.\,]+)", row["answer"])
        published_numbers.append(Decimal(published[1].replace(",", "")))
        expected = similarity.expected_answer(prompt(**row))
        assert expected == published_numbers[-1], row["answer"]
        assert similarity.exact_answer(row["answer"], expected) == 1.0, row["answer"]
    for row, other in zip(rows, [*published_numbers[1:], published_numbers[0]], strict=True):
        same = similarity.expected_answer(prompt(**row)) == other
        assert similarity.exact_answer(row["answer"], other) == float(same)


def rule(source: str, **settings: Any) -> Rule:
    built = rule_of(MetricConfig(name="it", source=source, **settings))
    assert built is not None
    return built


ARGUMENTLESS = {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"relation": "at least"}]}


NO_COMMA = {"instruction_id_list": ["punctuation:no_comma"]}


@pytest.mark.parametrize(
    ("source", "row", "words"),
    [
        ("exact_answer", {}, "'answer' is missing"),
        ("exact_answer", {"answer": "3 + 4 = 7"}, "no number"),
        ("exact_answer", {"answer": "half of it #### 3/4"}, "several numbers"),
        ("exact_answer", {"answer": float("nan")}, "no number"),
        ("json_schema", {}, "'schema' is missing"),
        ("json_schema", {"schema": "{"}, "'schema'"),
        ("json_schema", {"schema": {"type": "text"}}, "'text' is not valid"),
        ("json_schema", {"schema": {"$ref": "http://127.0.0.1:9/x.json"}}, "nothing is fetched"),
        ("json_schema", {"schema": {"$dynamicRef": "http://127.0.0.1:9/x.json#a"}}, "nothing is fetched"),
        ("json_schema", {"schema": {"properties": {"age": {"$ref": "#size"}}}}, "'#size'"),
        ("json_schema", {"schema": {"$schema": "http://127.0.0.1:9/draft"}}, "'http://127.0.0.1:9/draft'"),
        ("instructions_strict", {}, "'instruction_id_list' is missing"),
        ("instructions_strict", NO_COMMA, "'kwargs' is missing"),
        (
            "instructions_strict",
            {"instruction_id_list": ["punctuation:no_coma"], "kwargs": [{}]},
            "'punctuation:no_comma'",
        ),
        ("instructions_strict", ARGUMENTLESS, "'num_words'"),
        ("instructions_strict", {**NO_COMMA, "kwargs": [{"num_words": 3}]}, "punctuation:no_comma"),
        *(
            (source, {"reference": reference}, "'reference'")
            for source in ("rouge_l", "chrf")
            for reference in (None, " ", [], ["a", ""], 3)
        ),
    ],
)
def test_a_row_that_a_rule_cannot_use_is_named(source: str, row: dict[str, Any], words: str) -> None:
    good = {"answer": "#### 1", "schema": {}, "reference": "a", **NO_COMMA, "kwargs": [{}]}
    with pytest.raises(DataError) as caught:
        RuleScorer(rule(source), [prompt(**good), prompt(line=7, **row)])
    assert caught.value.where == "rows.jsonl:7"
    assert words in caught.value.message


def scored(the_rule: Rule, text: str, **row: Any) -> float:
    return the_rule.score(text, the_rule.expected(prompt(**row)))


@pytest.mark.parametrize(
    ("facts", "answer", "expected"),
    [
        (["21 March", "noon"], "On 21 March, at noon.", 1.0),
        (["21 March", "noon"], "On the 21st of March at NOON", 0.5),
        ([["noon", "12 p.m."]], "It opens at 12 p.m.", 1.0),
        (["art"], "They start.", 0.0),
        (["80 euros"], "It costs 1,080 euros.", 0.0),
        (["ﬁve"], "five of them", 1.0),
        (["by train"], "by\n  train", 1.0),
        (["खुला"], "दुकान खाली है।", 0.0),  # the same consonants
        (["क्षमा"], "वह क्\u200dषमा माँगता है।", 1.0),  # an invisible character joins the letters
        (["İSTANBUL"], "In Istanbul.", 1.0),
        (["นี่"], "ปิด ที่นี่ วันนี้", 0.0),
        (["noon"], "", 0.0),
    ],
)
def test_key_facts_are_the_share_that_stands_in_the_answer(facts: list[Any], answer: str, expected: float) -> None:
    assert scored(rule("key_facts"), answer, facts=facts) == expected


@pytest.mark.parametrize("facts", [None, [], "noon", [""], [["noon", ""]], [[]], [3], ["…"]])
def test_a_row_without_usable_facts_is_named(facts: Any) -> None:
    with pytest.raises(DataError) as caught:
        rule("key_facts").expected(prompt(line=7, facts=facts))
    assert caught.value.where == "rows.jsonl:7"
    assert "'facts'" in caught.value.message


PERSON = {
    "type": "object",
    "required": ["name", "age"],
    "properties": {"name": {"type": "string"}, "age": {"$ref": "#/$defs/age"}},
    "additionalProperties": False,
    "$defs": {"age": {"type": "integer", "minimum": 0}},
}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (' {"age": 36, "name": "Ada"}\n', 1.0),
        ('{"name": "Ada"}', 0.0),
        ('{"name": "Ada", "age": -1}', 0.0),
        ('{"name": "Ada", "age": 36, "more": 1}', 0.0),
        ('```json\n{"name": "Ada", "age": 36}\n```', 0.0),
        ('Here: {"name": "Ada", "age": 36}', 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_an_answer_is_json_that_the_schema_accepts(answer: str, expected: float) -> None:
    assert scored(rule("json_schema", schema=PERSON), answer) == expected
    assert scored(rule("json_schema", schema={"type": "string"}), answer, schema=PERSON) == expected, "the row's own"
    assert scored(rule("json_schema"), answer, schema=json.dumps(PERSON)) == expected


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("Police kill the gunman.", REFERENCE, 3 / 4),  # Lin (2004), section 3
        ("the gunman kill police", REFERENCE, 2 / 4),
        ("the gunman", REFERENCE, 2 * 1.0 * 0.5 / 1.5),
        ("", REFERENCE, 0.0),
        ("the gunman", [REFERENCE, "the gunman"], 1.0),
        ("Магазин закрыт в понедельник.", "магазин закрыт в субботу", 3 / 4),
        ("商店星期一关门。", "商店星期六关门", 6 / 7),  # in scripts without spaces each character is a word
        ("दुकान बंद है।", "दुकान खुली है", 2 / 3),
        ("GPU显卡 16GB", "gpu显卡 8gb", 3 / 4),
    ],
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence_of_words_in_any_script(
    answer: str, reference: Any, score: float
) -> None:
    assert scored(rule("rouge_l"), answer, reference=reference) == pytest.approx(score)


def test_rouge_l_of_ascii_is_that_of_rouge_score() -> None:
    scorer, drawn = RougeScorer(["rougeL"], use_stemmer=False), random.Random(0)
    letters = [chr(code) for code in range(128)]
    for _ in range(200):
        answer, reference = ("".join(drawn.choices([*letters, *"aab b "], k=40)) for _ in range(2))
        expected = scorer.score(reference, answer)["rougeL"].fmeasure
        assert scored(rule("rouge_l"), answer, reference=reference or "a") == expected


def test_chrf_is_the_f2_of_character_n_grams() -> None:
    """Popović (2015): precision and recall are means over n-grams of 1 to 6; white space does not count."""

    def grams(text: str, size: int) -> Counter[str]:
        bare = text.replace(" ", "")
        return Counter(bare[start : start + size] for start in range(len(bare) - size + 1))

    def by_hand(answer: str, reference: str) -> float:
        scores = []
        for size in range(1, 7):
            of_answer, of_reference = grams(answer, size), grams(reference, size)
            common = (of_answer & of_reference).total()
            precision, recall = common / of_answer.total(), common / of_reference.total()
            scores.append((precision, recall))
        precision = sum(first for first, _ in scores) / 6
        recall = sum(second for _, second in scores) / 6
        return 5 * precision * recall / (4 * precision + recall)

    chrf = rule("chrf")
    for answer in ("The shop is closed on Monday.", "On Monday the shop closes.", "shop closed"):
        reference = "The shop is closed on Mondays."
        assert scored(chrf, answer, reference=reference) == pytest.approx(by_hand(answer, reference), abs=1e-6)
    assert scored(chrf, "", reference="x") == 0.0


@pytest.mark.parametrize("source", ["rouge_l", "chrf"])
def test_a_reference_is_the_row_s_column_or_the_answer_that_ends_its_conversation(source: str) -> None:
    compared = rule(source)
    turns = [{"role": "user", "content": "When?"}, {"role": "assistant", "content": "On Monday."}]
    fields = Fields({"messages": turns}, where="rows.jsonl:7", example="")
    (record,) = HeldOutPrompt.of(FORMATS["messages"].read(fields))
    assert compared.score("On Monday.", compared.expected(record)) == pytest.approx(1.0)


ENDED = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "No."}]


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        ({"prompt": "?", "reference": ["Yes.", "It is."]}, "Yes."),
        ({"prompt": "?"}, ""),
        ({"turns": ["?", "Really?"], "reference": ["Yes.", ""]}, "Yes."),
        ({"messages": ENDED, "reference": ["Yes.", "It is."]}, "Yes."),
    ],
)
def test_what_is_shown_of_several_references_is_the_first(row: dict[str, Any], reference: str) -> None:
    (record,) = HeldOutPrompt.of(FORMATS[next(iter(row))].read(Fields(row, where="", example="")))
    assert first_reference(record) == reference
    assert first_reference(Prompt(messages=record.messages, row=row)) == ("" if "turns" in row else reference)
    if "turns" in row:
        assert first_reference(continued(record, ["Yes."])) == "", "a later turn is not shown that of the first"


def test_all_instructions_of_a_row_have_to_be_followed_and_the_loose_rule_forgives_a_first_line() -> None:
    names, json_form = ["punctuation:no_comma", "keywords:existence"], "detectable_format:json_format"
    row = {"instruction_id_list": names, "kwargs": [{}, {"keywords": ["noon"]}]}
    assert [scored(rule("instructions_strict"), text, **row) for text in ("At noon.", "Today, at noon.", "Today.")] == [
        1.0, 0.0, 0.0,
    ]  # fmt: skip
    row, introduced = {"instruction_id_list": [json_form], "kwargs": [{}]}, 'Here it is:\n{"a": 1}'
    assert [scored(rule(f"instructions_{name}"), introduced, **row) for name in ("strict", "loose")] == [0.0, 1.0]


FOLLOWED = [
    ("punctuation:no_comma", {}, "No commas here.", "One, two."),
    ("detectable_format:json_format", {}, '{"a": 1}', "a: 1"),
]


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), FOLLOWED, ids=[row[0] for row in FOLLOWED])
def test_an_instruction_is_followed_or_not(name: str, arguments: dict[str, Any], good: str, bad: str) -> None:
    strict = rule("instructions_strict")
    row = {"instruction_id_list": [name], "kwargs": [{**arguments, "unused": None}]}
    assert scored(strict, good, **row) == 1.0
    assert scored(strict, bad, **row) == 0.0
