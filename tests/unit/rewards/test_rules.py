"""Rules say of an answer's text what a reader would say."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from decimal import Decimal
from fractions import Fraction
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
from alignment.rewards.rules import numbers
from alignment.rewards.rules.all_rules import rule_of
from alignment.rewards.rules.numbers import ExactAnswer
from alignment.rewards.rules.rule_kind import Rule
from alignment.rewards.rules.similarity import first_reference
from alignment.rewards.scorers import RuleScorer
from tests.public import PUBLIC, WRITTEN, needs_public_data
from tests.unit.rewards.conftest import answers_to, prompt

# ---- exact_answer ---------------------------------------------------------------------------------------------------

RIGHT = [
    ("The answer is 18.", "18"),
    ("#### 18", "18"),
    ("first 3, then 18", "18"),
    ("She pays $18.00!", "18"),
    ("18", "18.0"),
    ("€1,080", "1080"),
    ("1,234,567.50", "1234567.5"),
    ("It is 0018.", "18"),
    ("half of it, .5", "0.5"),
    ("so −5", "-5"),
    ("so -5", "-5"),
    ("= -5", "-5"),
    ("a loss of -$5", "-5"),
    ("a loss of $-5", "-5"),
    ("8-3=5", "5"),
    ("8-3", "3"),
    ("pages 8–3", "3"),
    ("(2)-3", "3"),
    ("x = 3 - 8", "8"),
    ("**18**", "18"),
    ("\\boxed{18}", "18"),
    ("\\boxed{1{,}080}", "1080"),
    ("1{,}234{,}567.5", "1234567.5"),
    ("1,\\!080", "1080"),
    ("\\$1,080", "1080"),
    ("-\\$5", "-5"),
    ("\\$-5", "-5"),
    ("\\boxed{-5}", "-5"),
    ("x^{2}-5", "5"),
    ("\\{1{,}2\\}", "2"),
    ("$18$", "18"),
    ("18%", "18"),
    ("18 apples", "18"),
    ("on the 2nd", "2"),
    ("12,5", "5"),
    ("1,2345", "2345"),
    ("3/4", "4"),
    ("1\n2\n", "2"),
]
WRONG = [
    ("", "0"),
    ("eighteen", "18"),
    ("18, not 17", "18"),
    ("180", "18"),
    ("1.8", "18"),
    ("18.01", "18"),
    ("-18", "18"),
    ("18", "-18"),
    ("1,08", "108"),
    ("18e", "180"),
]


@pytest.mark.parametrize(("completion", "expected"), RIGHT)
def test_the_last_number_of_an_answer_is_read_as_a_reader_would(completion: str, expected: str) -> None:
    assert numbers.exact_answer(completion, Decimal(expected)) == 1.0
    assert Decimal(numbers.final_number(completion)) == Decimal(expected)


@pytest.mark.parametrize(("completion", "expected"), WRONG)
def test_any_other_number_is_wrong(completion: str, expected: str) -> None:
    assert numbers.exact_answer(completion, Decimal(expected)) == 0.0


def _written(value: Fraction, rng: random.Random) -> str:
    """A number with two decimals as somebody may write it, digit by digit."""
    cents = abs(value.numerator * 100 // value.denominator)
    whole, decimals = str(cents // 100), f"{cents % 100:02d}"
    if rng.random() < 0.5:
        groups = []
        while len(whole) > 3:
            groups.insert(0, whole[-3:])
            whole = whole[:-3]
        whole = ",".join([whole, *groups])
    if decimals == "00" and rng.random() < 0.5:
        text = whole
    elif decimals.endswith("0") and rng.random() < 0.5:
        text = f"{whole}.{decimals[0]}"
    else:
        text = f"{whole}.{decimals}{'0' * rng.randrange(3)}"
    currency = rng.choice(["", "", "$", "€", "£"])
    minus = rng.choice(["-", "−"]) if value < 0 else ""
    return minus + currency + text if rng.random() < 0.5 or not currency else currency + minus + text


def test_however_a_number_is_written_it_is_the_same_number() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        value = Fraction(rng.choice([rng.randrange(-(10**9), 10**9), rng.randrange(-5000, 5000) * 100]), 100)
        before = rng.choice(["The answer is ", "3 + 4 = 7, so ", "(", "#### ", ""])
        completion = before + _written(value, rng) + rng.choice([".", "", " apples.", "!", "\n", ")", "%"])
        expected = Decimal(value.numerator) / Decimal(value.denominator)
        assert numbers.exact_answer(completion, expected) == 1.0, completion
        assert numbers.exact_answer(completion, expected + 1) == 0.0, completion


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("3 * 6 = 18\n#### 18", "18"),
        ("#### 5\n#### 1,080", "1080"),
        ("#### $18.50 each", "18.5"),
        ("#### \\$1{,}080", "1080"),
        ("-1,\\!080", "-1080"),
        ("#### -3", "-3"),
        ("18", "18"),
        (" $1,080. ", "1080"),
        (18, "18"),
        (-1.5, "-1.5"),
    ],
)
def test_a_row_s_number_stands_behind_the_mark_or_alone(answer: Any, expected: str) -> None:
    assert numbers.expected_answer({"answer": answer}, where="x:1") == Decimal(expected)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "rows.jsonl:7: 'answer' is missing"),
        ({"answer": None}, "rows.jsonl:7: 'answer' contains no number to check against; it is None"),
        ({"answer": "3 + 4 = 7"}, "rows.jsonl:7: 'answer' contains no number to check against; it is '3 + 4 = 7'"),
        (
            {"answer": "7 #### seven"},
            "rows.jsonl:7: 'answer' contains no number to check against; it is '7 #### seven'",
        ),
        (
            {"answer": "half of it #### 3/4"},
            "rows.jsonl:7: 'answer' has several numbers after ####, so it is not clear which one is meant: ' 3/4'",
        ),
        ({"answer": True}, "rows.jsonl:7: 'answer' contains no number to check against; it is True"),
        ({"answer": float("nan")}, "rows.jsonl:7: 'answer' contains no number to check against; it is 'nan'"),
        ({"answer": ["18"]}, "rows.jsonl:7: 'answer' contains no number to check against; it is ['18']"),
    ],
)
def test_a_row_without_a_number_to_check_against_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        RuleScorer(ExactAnswer(), [prompt(answer="#### 1"), prompt(line=7, **row)])
    assert str(caught.value).splitlines()[0] == message


def test_each_answer_is_held_against_its_own_row() -> None:
    prompts = [prompt(answer="#### 1"), prompt(answer="#### 2"), prompt(answer="#### 3")]
    scorer = RuleScorer(ExactAnswer(), prompts)
    assert scorer.scores(answers_to(prompts, ["1", "1", "3"])).tolist() == [1.0, 0.0, 1.0]


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
        assert published is not None
        published_numbers.append(Decimal(published[1].replace(",", "")))
        expected = numbers.expected_answer(row, where="test.jsonl")
        assert expected == published_numbers[-1], row["answer"]
        assert numbers.exact_answer(row["answer"], expected) == 1.0, row["answer"]
    for row, other in zip(rows, [*published_numbers[1:], published_numbers[0]], strict=True):
        same = numbers.expected_answer(row, where="test.jsonl") == other
        assert numbers.exact_answer(row["answer"], other) == float(same)


# ---- the other rules ------------------------------------------------------------------------------------------------


def rule(source: str, **settings: Any) -> Rule:
    built = rule_of(MetricConfig(name="it", source=source, **settings))
    assert built is not None
    return built


def scored(the_rule: Rule, text: str, **row: Any) -> float:
    return the_rule.score(text, the_rule.expected(prompt(**row)))


def refused(the_rule: Rule, **row: Any) -> str:
    with pytest.raises(DataError) as caught:
        the_rule.expected(prompt(line=7, **row))
    return str(caught.value).splitlines()[0]


@pytest.mark.parametrize(
    ("pattern", "completion", "expected"),
    [
        (r"^<answer>.*</answer>$", "<answer>4</answer>", 1.0),
        (r"^<answer>.*</answer>$", "well, <answer>4</answer>", 0.0),
        (r"\bfour\b", "it is four.", 1.0),
        (r"(?i)FOUR", "it is four.", 1.0),
        (r"four", "", 0.0),
    ],
)
def test_a_pattern_is_found_or_not(pattern: str, completion: str, expected: float) -> None:
    assert scored(rule("regex", pattern=pattern), completion) == expected


def test_length_is_best_at_the_target_and_nothing_beyond_twice_it() -> None:
    length = rule("length", target=4)
    scores = [scored(length, " ".join(["word"] * number)) for number in range(11)]
    assert scores == [0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]
    assert scored(length, "a  b\nc\td") == 1.0
    assert scored(length, "今天休息") == 1.0, "in a script without spaces each character is a word"
    assert scored(length, "今天，休息。") == 1.0
    assert scored(length, "Café 休息 geöffnet") == 1.0


def test_a_refusal_is_a_phrase_of_the_list() -> None:
    assert scored(rule("refusal"), "I’m unable to help with that.") == 1.0
    assert scored(rule("refusal"), "I cannot come on Monday.") == 0.0


@pytest.mark.parametrize(
    ("facts", "answer", "expected"),
    [
        (["21 March", "noon"], "On 21 March, at noon.", 1.0),
        (["21 March", "noon"], "On the 21st of March at NOON", 0.5),
        ([["noon", "12 p.m."]], "It opens at 12 p.m.", 1.0),
        (["art"], "They start.", 0.0),
        (["1,080 euros"], "It costs 1,080 euros.", 1.0),
        (["80 euros"], "It costs 1,080 euros.", 0.0),
        (["3.5"], "13.5", 0.0),
        (["Zürich"], "in zürich!", 1.0),
        (["ﬁve"], "five of them", 1.0),
        (["by train"], "by\n  train", 1.0),
        (["खुला"], "दुकान खाली है।", 0.0),  # the same consonants
        (["ताब"], "यह किताब है।", 0.0),
        (["किताब"], "यह किताब है।", 1.0),
        (["क्षमा"], "वह क्\u200dषमा माँगता है।", 1.0),  # an invisible character joins the letters
        (["istanbul"], "In İstanbul.", 1.0),
        (["İSTANBUL"], "In Istanbul.", 1.0),
        (["ที่นี่"], "ปิด ที่นี่ วันนี้", 1.0),
        (["นี่"], "ปิด ที่นี่ วันนี้", 0.0),
        (["noon"], "", 0.0),
    ],
)
def test_key_facts_are_the_share_that_stands_in_the_answer(facts: list[Any], answer: str, expected: float) -> None:
    assert scored(rule("key_facts"), answer, facts=facts) == expected


@pytest.mark.parametrize("facts", [None, [], "noon", [""], [["noon", ""]], [[]], [3], ["…"]])
def test_a_row_without_usable_facts_is_named(facts: Any) -> None:
    assert refused(rule("key_facts"), facts=facts).startswith("rows.jsonl:7: 'facts' ")


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
        ('{"name": "Ada", "age": 36}', 1.0),
        (' {"age": 36, "name": "Ada"}\n', 1.0),
        ('{"name": "Ada"}', 0.0),
        ('{"name": "Ada", "age": -1}', 0.0),
        ('{"name": "Ada", "age": 36.5}', 0.0),
        ('{"name": "Ada", "age": 36, "more": 1}', 0.0),
        ('{"name": "Ada", "age": NaN}', 0.0),
        ('```json\n{"name": "Ada", "age": 36}\n```', 0.0),
        ('Here: {"name": "Ada", "age": 36}', 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_an_answer_is_json_that_the_schema_accepts(answer: str, expected: float) -> None:
    assert scored(rule("json_schema", schema=PERSON), answer) == expected
    assert scored(rule("json_schema"), answer, schema=PERSON) == expected
    assert scored(rule("json_schema"), answer, schema=json.dumps(PERSON)) == expected


@pytest.mark.parametrize("answer", ["1e999", "1" + "0" * 400])
def test_a_number_too_large_to_check_is_not_accepted(answer: str) -> None:
    assert scored(rule("json_schema", schema={"type": "number", "multipleOf": 0.01}), answer) == 0.0


def test_references_are_followed_within_a_schema() -> None:
    inner = {"$id": "urn:inner", "$ref": "#/$defs/size", "$defs": {"size": {"type": "integer"}}}
    for schema in (
        {"$ref": "#/$defs/size", "$defs": {"size": {"type": "integer"}}},
        {"$ref": "#size", "$defs": {"size": {"$anchor": "size", "type": "integer"}}},
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "$ref": "#/definitions/size",
            "definitions": {"size": {"type": "integer"}},
        },
        {"allOf": [inner]},
    ):
        assert scored(rule("json_schema"), "3", schema=schema) == 1.0
        assert scored(rule("json_schema"), '"3"', schema=schema) == 0.0


@pytest.mark.parametrize("answer", ["NaN", "Infinity", "-Infinity"])
def test_what_python_reads_as_a_number_and_json_does_not_have_is_refused(answer: str) -> None:
    assert scored(rule("json_schema", schema={}), answer) == 0.0
    assert scored(rule("json_schema", schema={}), "1.5") == 1.0


def test_a_row_s_own_schema_comes_before_the_metric_s() -> None:
    text = rule("json_schema", schema={"type": "string"})
    assert scored(text, "5") == 0.0
    assert scored(text, "5", schema={"type": "integer"}) == 1.0


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (None, "'schema' is missing"),
        ("{", "'schema' has the wrong form; it is '{'"),
        ([], "'schema' has the wrong form; it is []"),
        ({"type": "text"}, "'schema' is not a JSON schema: 'text' is not valid"),
        (
            {"$ref": "http://127.0.0.1:9/x.json"},
            "'schema' refers to 'http://127.0.0.1:9/x.json', but nothing is fetched",
        ),
        (
            {"$dynamicRef": "http://127.0.0.1:9/x.json#a"},
            "'schema' refers to 'http://127.0.0.1:9/x.json#a', but nothing",
        ),
        ({"$ref": "#/$defs/size"}, "'schema' refers to '#/$defs/size', which it does not contain"),
        ({"properties": {"age": {"$ref": "#size"}}}, "'schema' refers to '#size', which it does not contain"),
        ({"$schema": "http://127.0.0.1:9/draft"}, "'schema' has the $schema 'http://127.0.0.1:9/draft', which is no"),
    ],
)
def test_a_row_without_a_usable_schema_is_named(schema: Any, message: str) -> None:
    assert refused(rule("json_schema"), schema=schema).startswith(f"rows.jsonl:7: {message}")


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    """Lin (2004), section 3: of "police killed the gunman" the answers share 3 and 2 words in order."""
    rouge = rule("rouge_l")
    reference = "police killed the gunman"
    assert scored(rouge, "Police kill the gunman.", reference=reference) == pytest.approx(3 / 4)
    assert scored(rouge, "the gunman kill police", reference=reference) == pytest.approx(2 / 4)
    assert scored(rouge, "the gunman", reference=reference) == pytest.approx(2 * 1.0 * 0.5 / 1.5)
    assert scored(rouge, "", reference=reference) == 0.0
    assert scored(rouge, "the gunman", reference=[reference, "the gunman"]) == 1.0


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("Магазин закрыт в понедельник.", "магазин закрыт в субботу", 3 / 4),
        ("商店星期一关门。", "商店星期六关门", 6 / 7),
        ("ร้านปิด", "ร้านปิด!", 1.0),
        ("दुकान बंद है।", "दुकान खुली है", 2 / 3),
        ("Das Café ist geöffnet.", "das cafe\u0301 ist zu", 3 / 4),
        ("المتجر مغلق اليوم", "المتجر مفتوح اليوم", 2 / 3),
        ("GPU显卡 16GB", "gpu显卡 8gb", 3 / 4),
    ],
)
def test_rouge_l_knows_the_letters_of_every_script(answer: str, reference: str, score: float) -> None:
    """In scripts without spaces each character is a word."""
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
    for reference in (None, "", " ", [], ["a", ""], 3):
        assert refused(compared, reference=reference).startswith("rows.jsonl:7: 'reference' ")


ENDED = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "No."}]


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        ({"prompt": "?", "reference": "Yes."}, "Yes."),
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


def test_a_later_turn_is_not_shown_the_reference_of_the_first() -> None:
    row = {"turns": ["?", "Really?"], "reference": "Yes."}
    (record,) = HeldOutPrompt.of(FORMATS["turns"].read(Fields(row, where="", example="")))
    assert first_reference(continued(record, ["Yes."])) == ""


# ---- IFEval's instructions ------------------------------------------------------------------------------------------

FOLLOWED = [
    ("punctuation:no_comma", {}, "No commas here.", "One, two."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n* b", "* a\n* b\n* c"),
    ("keywords:existence", {"keywords": ["noon", "shop"]}, "The shop opens at noon.", "The shop opens."),
    ("length_constraints:number_words", {"relation": "at least", "num_words": 3}, "one two three", "one two"),
    ("detectable_format:json_format", {}, '{"a": 1}', "a: 1"),
    ("startend:quotation", {}, '"quoted"', "quoted"),
    ("change_case:english_lowercase", {}, "all of this is written in small letters", "Not all of This is Small."),
]


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), FOLLOWED, ids=[row[0] for row in FOLLOWED])
def test_an_instruction_is_followed_or_not(name: str, arguments: dict[str, Any], good: str, bad: str) -> None:
    strict = rule("instructions_strict")
    row = {"instruction_id_list": [name], "kwargs": [{**arguments, "unused": None}]}
    assert scored(strict, good, **row) == 1.0
    assert scored(strict, bad, **row) == 0.0


def test_all_instructions_of_a_row_have_to_be_followed() -> None:
    row = {
        "instruction_id_list": ["punctuation:no_comma", "keywords:existence"],
        "kwargs": [{}, {"keywords": ["noon"]}],
    }
    assert scored(rule("instructions_strict"), "At noon.", **row) == 1.0
    assert scored(rule("instructions_strict"), "Today, at noon.", **row) == 0.0
    assert scored(rule("instructions_strict"), "Today.", **row) == 0.0


def test_the_loose_rule_forgives_a_first_line_and_asterisks() -> None:
    row = {"instruction_id_list": ["detectable_format:json_format"], "kwargs": [{}]}
    introduced = 'Here it is:\n{"a": 1}'
    assert scored(rule("instructions_strict"), introduced, **row) == 0.0
    assert scored(rule("instructions_loose"), introduced, **row) == 1.0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "'instruction_id_list' is missing"),
        ({"instruction_id_list": ["punctuation:no_comma"]}, "'kwargs' is missing"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "'kwargs' has the wrong form; it is []"),
        (
            {"instruction_id_list": ["punctuation:no_coma"], "kwargs": [{}]},
            "'instruction_id_list' has 'punctuation:no_coma', which is not an instruction; did you mean "
            "'punctuation:no_comma'?",
        ),
        (
            {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"relation": "at least"}]},
            "'instruction_id_list' has length_constraints:number_words without its argument 'num_words'",
        ),
        (
            {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": 3}]},
            "'instruction_id_list' has punctuation:no_comma with arguments that it does not accept",
        ),
    ],
)
def test_a_row_whose_instructions_cannot_be_checked_is_named(row: dict[str, Any], message: str) -> None:
    assert refused(rule("instructions_strict"), **row).startswith(f"rows.jsonl:7: {message}")


def test_checks_of_instructions_leave_others_random_numbers_alone() -> None:
    random.seed(5)
    expected = random.random()
    random.seed(5)
    row = {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"relation": "at least"}]}
    refused(rule("instructions_strict"), **row)
    assert random.random() == expected
