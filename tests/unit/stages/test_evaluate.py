"""The evaluation stage on tiny models: its arms and their metrics, sampled answers, and what it keeps."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment import worker
from alignment.config.evaluating import AnswersConfig, FewShotConfig, JudgeConfig, JudgeKind
from alignment.config.scoring import MetricConfig
from alignment.core.errors import DataError, ModelError, NonFiniteError, RewardError
from alignment.core.wording import divided
from alignment.data.records import HeldOutPrompt
from alignment.data.tokens.tokenize import end_ids, prompt_ids
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.data.turns import Message
from alignment.evaluation.exchanges import LetterRows, letter_rows
from alignment.job import StageInput
from alignment.models.assembly.load import Lineage
from alignment.records.evaluation import Sample, read_samples
from alignment.stages.evaluate import answering, prompts
from alignment.stages.evaluate import run as stage
from alignment.stages.evaluate.kind import EvaluateConfig
from alignment.stages.shared import policies
from alignment.stages.shared.stage_rows import rows_of
from alignment.training.context import StageContext
from tests.chained import Chained
from tests.measuring import evaluation_chain, evaluation_of, evaluation_spec, read_lines, write_rows
from tests.tiny import save_tiny_model, tiny_model, tiny_tokenizer

ROWS = [
    {"messages": [{"role": "user", "content": f"The shop is closed on {day}. When?"}], "facts": [[day]], "id": day}
    for day in ("Monday", "Friday", "Sunday")
]
REFERENCES = {"Monday": "It is closed on Monday.", "Sunday": "Sunday."}
RULES = "bundled:quickstart/house_style.py"
SMALL = EvaluateConfig(
    arms=["base", "base+prompt", "base+few-shot", "stage:sft", "path:other"],
    metrics=[MetricConfig(name=name, source=f"{RULES}:{name}") for name in ("style_and_facts", "style", "facts")],
    system_prompt="Be brief.",
    max_new_tokens=4,
    bootstrap_samples=50,
    few_shot=FewShotConfig(count=1),
)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chained:
    rows = [row | ({"reference": REFERENCES[row["id"]]} if row["id"] in REFERENCES else {}) for row in ROWS]
    chain = evaluation_chain(tmp_path_factory.mktemp("evaluate"), rows)
    (chain.folder / "score.py").write_text(SCORE)
    return chain


def metric(name: str, source: str, **changes: Any) -> MetricConfig:
    return MetricConfig(name=name, source=source, **changes)


def evaluate(chain: Chained, config: EvaluateConfig, name: str, **changes: Any) -> dict[str, Any]:
    evaluation: dict[str, Any] = json.loads(
        (evaluation_of(chain, config, name, **changes) / "evaluation.json").read_text()
    )
    return evaluation


@pytest.fixture(scope="module")
def evaluated(chain: Chained) -> dict[str, Any]:
    return evaluate(chain, SMALL, "first")


def figures(evaluation: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """But for what float32 rounds: other arms stand in a batch with an arm's answers."""
    return {arm["name"]: rounded({key: arm[key] for key in arm if key != "seconds"}) for arm in evaluation["arms"]}


def rounded(nested: Any) -> Any:
    """Numbers to five places, however deep they stand."""
    if isinstance(nested, dict):
        return {key: rounded(value) for key, value in nested.items()}
    return round(nested, 5) if isinstance(nested, float) else nested


def test_every_arm_has_the_figures_that_can_be_compared(evaluated: dict[str, Any]) -> None:
    by_arm = figures(evaluated)
    assert list(by_arm) == SMALL.arms
    for name, arm in by_arm.items():
        assert list(arm["metrics"]) == ["style_and_facts", "style", "facts"]
        for figure in (*arm["metrics"].values(), *(arm[key] for key in ("words", "refusals", "ended", "reward"))):
            assert figure["low"] <= figure["mean"] <= figure["high"], name
    assert {name for name, arm in by_arm.items() if arm["greedy_log_ratio"] is None} == {
        "base+prompt",
        "base+few-shot",
        "path:other",
    }
    assert {name for name, arm in by_arm.items() if arm["loss"] is None} == {"path:other"}
    assert by_arm["stage:sft"]["greedy_log_ratio"]["mean"] == 0.0
    assert by_arm["path:other"]["label"] == "other"
    assert evaluated["judge"] is None
    assert evaluated["conclusions"][0].startswith("3 prompts, by style_and_facts: ")
    rewards = {arm["name"]: arm["reward"]["mean"] for arm in evaluated["arms"]}
    by_pair = {(pair["arm"], pair["against"]): pair for pair in evaluated["reward_comparisons"]}
    assert set(by_pair) == {(pair["arm"], pair["against"]) for pair in evaluated["comparisons"]}
    for (arm, against), pair in by_pair.items():
        assert pair["metric"] == "reward"
        assert pair["difference"] == pytest.approx(rewards[arm] - rewards[against], abs=1e-6)


def samples_of(chain: Chained, name: str) -> list[Sample]:
    return list(read_samples(chain.folder / f"artifacts/evaluate-{name}"))


SCORE = """
def letters(prompts, completions, rows):
    return [len(text) for text in completions]


def day(prompts, completions, rows):
    return [1.0 * (row["day"] in text) for text, row in zip(completions, rows)]


def initial(prompts, completions, rows):
    return [ord(row["facts"][0][0][0]) for row in rows]


def nothing(prompts, completions, rows):
    return [float("nan")] * len(rows)


def letters_of_some(prompts, completions, rows):
    return [None if row["id"] == "Monday" else len(text) for text, row in zip(completions, rows)]


def letters_of_none(prompts, completions, rows):
    return [None] * len(rows)
"""


def test_a_metric_is_the_mean_of_what_its_source_says_of_every_answer(chain: Chained) -> None:
    metrics = [
        metric("vowels", "regex", pattern="[aeiou]"),
        metric("short", "length", target=2),
        metric("letters", f"{chain.folder}/score.py:letters", higher_is_better=False),
        metric("by_reward", "reward"),
        metric("by_other", "stage:reward"),
    ]
    evaluation = evaluate(chain, replace(SMALL, metrics=metrics, primary="letters"), "sources")
    assert evaluation["primary"] == "letters"
    listed = [(entry["name"], entry["higher_is_better"]) for entry in evaluation["metrics"]]
    assert listed == [(each.name, each.name != "letters") for each in metrics]
    samples = samples_of(chain, "sources")
    letters = {}
    for arm in evaluation["arms"]:
        answers = [sample.answers[arm["name"]] for sample in samples]
        texts = [answer.text for answer in answers]
        means = {name: interval["mean"] for name, interval in arm["metrics"].items()}
        letters[arm["name"]] = means["letters"]
        assert means["vowels"] == sum(any(letter in "aeiou" for letter in text) for text in texts) / 3
        assert means["letters"] == sum(map(len, texts)) / 3
        assert means["by_reward"] == arm["reward"]["mean"]
        assert means["by_other"] == pytest.approx(means["by_reward"], abs=1e-5), "the same model, loaded for the metric"
        assert [answer.scores["letters"] for answer in answers] == list(map(len, texts))
    by_pair = {(pair["arm"], pair["against"]): pair["difference"] for pair in evaluation["comparisons"]}
    assert by_pair["stage:sft", "base"] == pytest.approx(letters["stage:sft"] - letters["base"])


def test_the_metric_choice_asks_every_arm_s_policy_behind_its_own_prompt(
    chain: Chained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``base+prompt`` and a model from outside see other turns and tokens than ``base``."""
    days = ["Monday", "Friday", "Sunday", "Tuesday"]
    questions = [{"question": f"Number {n}: when?", "choices": days, "answer": n % 4} for n in range(12)]
    heldout = write_rows(tmp_path / "heldout.jsonl", questions)
    config = replace(SMALL, arms=["base", "base+prompt", "path:other"], metrics=[metric("mmlu", "choice")])
    first_turns: list[str] = []

    def noted(tokenizer: Any, rows: Any, turns: Any) -> LetterRows:
        first_turns.append(turns(rows[0])[0].content)
        return letter_rows(tokenizer, rows, turns)

    monkeypatch.setattr(stage, "letter_rows", noted)
    evaluate(chain, config, "choice", data_path=heldout)
    assert first_turns == ["Number 0: when?", "Be brief.", "Number 0: when?"]
    other_tokenizer = AutoTokenizer.from_pretrained(chain.folder / "other")
    for arm, folder, tokenizer, system in (
        ("base", chain.base, tiny_tokenizer(), []),
        ("base+prompt", chain.base, tiny_tokenizer(), [{"role": "system", "content": "Be brief."}]),
        ("path:other", chain.folder / "other", other_tokenizer, []),
    ):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for question, sample in zip(questions, samples_of(chain, "choice"), strict=True):
            listed = "\n".join(f"{letter}. {day}" for letter, day in zip("ABCD", days, strict=True))
            turns = [*system, {"role": "user", "content": f"{question['question']}\n{listed}\nAnswer:"}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            logits = model(torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])).logits[0, -1]
            letters = logits[[tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "ABCD"]]
            assert sample.answers[arm].scores == {"mmlu": float(int(letters.argmax()) == question["answer"])}, arm


def test_without_metrics_no_arm_is_better_and_the_other_figures_stand(chain: Chained) -> None:
    evaluation = evaluate(chain, replace(SMALL, arms=["base", "stage:sft"], metrics=[], reward=None), "bare")
    empty = {"primary": None, "metrics": [], "comparisons": [], "reward_comparisons": [], "tasks": {}}
    assert {key: evaluation[key] for key in empty} == empty
    assert [(arm["metrics"], arm["reward"]) for arm in evaluation["arms"]] == [({}, None)] * 2
    assert all(arm["words"]["low"] <= arm["words"]["mean"] for arm in evaluation["arms"])
    (sentence,) = evaluation["conclusions"]
    assert "no arm is called better" in sentence


def test_a_metric_without_a_value_for_some_rows_is_measured_on_the_others(chain: Chained) -> None:
    names = ("letters_of_some", "letters", "letters_of_none")
    metrics = [metric(name, f"{chain.folder}/score.py:{name}") for name in names]
    arms = ["base", "base+prompt", "stage:sft", "path:near"]
    judge = JudgeConfig(kind=JudgeKind.metric)
    config = replace(SMALL, arms=arms, reward=None, judge=judge, metrics=metrics, primary="letters_of_some")
    evaluation = evaluate(chain, config, "of-some")
    others = [sample for sample in samples_of(chain, "of-some") if sample.id != "Monday"]
    assert len(others) == 2
    means = {}
    for arm in evaluation["arms"]:
        means[arm["name"]] = sum(len(sample.answers[arm["name"]].text) for sample in others) / 2
        assert arm["metrics"]["letters_of_some"]["mean"] == pytest.approx(means[arm["name"]])
        assert "letters_of_none" not in arm["metrics"]
    for pair in evaluation["comparisons"]:
        assert pair["difference"] == pytest.approx(means[pair["arm"]] - means[pair["against"]])
    assert evaluation["num_scored"] == {"letters_of_some": 2, "letters_of_none": 0}
    assert evaluation["judge"]["num_prompts"] == 2
    assert evaluation["judge"]["pairs"][0]["invalid"] == 0.0


def test_rows_and_arms_that_cannot_be_measured_are_refused(chain: Chained) -> None:
    heldout = chain.folder / "heldout.jsonl"
    for source, error, message in (
        (f"{chain.folder}/score.py:day", RewardError, f"have no 'day': {heldout}:1, {heldout}:2, {heldout}:3"),
        ("exact_answer", DataError, f"{heldout}:1"),
        (f"{chain.folder}/score.py:nothing", RewardError, "nan"),
    ):
        with pytest.raises(error, match=message):
            evaluate(chain, replace(SMALL, arms=["base"], metrics=[metric("day", source)]), "lacking")
    brief_model(chain.folder / "short", 16)
    bare = tiny_tokenizer()
    bare.chat_template = None
    save_tiny_model(chain.folder / "bare", tokenizer=bare)
    for arm, words in (
        ("path:short", "16 positions, but the longest prompt with its answer"),
        ("path:bare", "without a chat template"),
    ):
        with pytest.raises(ModelError, match=words):
            evaluate(chain, replace(SMALL, arms=[arm]), "refused")
    empty = write_rows(chain.folder / "empty.jsonl", [])
    with pytest.raises(DataError, match="contains no rows"):
        evaluate(chain, SMALL, "empty", data_path=empty)


def brief_model(folder: Path, positions: int) -> Path:
    """A model with few positions."""
    tiny_model(vocab_size=len(tiny_tokenizer()), max_position_embeddings=positions).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("columns", "read"),
    [
        (lambda asked, text: {"prompt": asked, "reference": text}, "a prompt with its reference answer"),
        (lambda asked, text: {"question": asked, "choices": [text, "y"], "answer": 0}, "a question with its choices"),
    ],
)
def test_what_an_arm_reads_beside_its_answers_is_refused_with_its_row_if_too_long(
    chain: Chained, tmp_path: Path, columns: Callable[..., dict[str, Any]], read: str
) -> None:
    heldout = write_rows(tmp_path / "heldout.jsonl", [columns("When?", "z"), columns("Where?", "z" * 60)])
    positions = len(prompt_ids(tiny_tokenizer(), [Message(role="user", content="Where?")])) + 12
    arms = {"path:brief": StageInput(ref="path:brief", path=brief_model(tmp_path / "brief", positions))}
    metrics = [metric("knows", "choice")] if "choices" in columns("", "") else []
    config = replace(SMALL, arms=["path:brief"], metrics=metrics)
    with pytest.raises(ModelError) as caught:
        evaluate(chain, config, f"brief-{len(metrics)}", arms=arms, data_path=heldout)
    assert str(caught.value).startswith(f"{heldout}:2: path:brief has {positions} positions")
    assert f"{read} needs " in str(caught.value)


def test_every_arm_is_asked_in_its_own_words_and_stops_at_its_own_ends(chain: Chained) -> None:
    context = StageContext(spec=evaluation_spec(chain, SMALL, "asked"), rank=0, world_size=1)
    asked = prompts.prompts_of_arms(SMALL, context, tiny_tokenizer(), rows_of(context, HeldOutPrompt, SMALL.data))
    shown = {name: arm.tokenizer.decode(arm.first.prompts[0]) for name, arm in asked.items()}
    question = "<|im_start|>user\nThe shop is closed on Monday. When?<|im_end|>\n<|im_start|>assistant\n"
    for name, words in {"base": "You are tiny.", "base+prompt": "Be brief.", "path:other": "You are other."}.items():
        assert shown[name] == f"<|im_start|>system\n{words}<|im_end|>\n{question}"
    few = shown["base+few-shot"]
    assert few.count("<|im_start|>assistant\n") == 2
    assert few.endswith(question)
    twin = save_tiny_model(chain.folder / "twin", seed=4)
    file = twin / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [2, 9]}))
    config = replace(SMALL, arms=["base", "path:twin"])
    spec = evaluation_spec(chain, config, "twin")
    context = StageContext(spec=spec, rank=0, world_size=1)
    rows = rows_of(context, HeldOutPrompt, config.data)
    asked = prompts._arm_prompts(context, spec.arms["path:twin"], load_tokenizer(chain.base), rows, None)
    assert not asked.own_tokens
    assert end_ids(asked.tokenizer) == {2, 9}


def cached(chain: Chained, content: str) -> list[Path]:
    return sorted((chain.folder / "artifacts/cache").glob(f"{content}-*.json"))


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts were answered by each arm that had to answer."""
    calls: list[int] = []
    answer = answering.answer_and_score

    def counted(model: Any, prompts: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        calls.append(len(prompts))
        return answer(model, prompts, *args, **kwargs)

    monkeypatch.setattr(answering, "answer_and_score", counted)
    return calls


def test_a_second_evaluation_answers_for_the_arm_that_changed_alone(
    chain: Chained, evaluated: dict[str, Any], generated: list[int]
) -> None:
    again = evaluate(chain, SMALL, "again")
    assert generated == []
    assert figures(again) == figures(evaluated)
    changed = evaluate(chain, replace(SMALL, few_shot=FewShotConfig(count=2)), "changed")
    assert generated == [3]
    after, before = figures(changed), figures(evaluated)
    assert after.pop("base+few-shot") != before.pop("base+few-shot")
    assert after == before
    evaluate(chain, replace(SMALL, arms=["base"], max_new_tokens=5), "longer")
    assert generated == [3, 3], "longer answers are not taken from shorter ones"


def test_what_a_judge_cannot_change_is_not_computed_again(
    chain: Chained, evaluated: dict[str, Any], generated: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After new votes the answers, log-ratios and rewards are what they were; no model is loaded for them."""

    def loaded(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    evaluate(chain, SMALL, "cached-first")  # the cache may have been emptied by another test
    generated.clear()
    with monkeypatch.context() as patch:
        patch.setattr(policies, "load_policy", loaded)
        patch.setattr(stage, "load_reward_model", loaded)
        again = evaluate(chain, SMALL, "cached-again")
    assert generated == []
    assert figures(again) == figures(evaluated)
    for file in cached(chain, "scores"):
        file.write_text(file.read_text().replace("[", "[9.0, ", 1))
    assert figures(evaluate(chain, SMALL, "scores-damaged")) == figures(evaluated)


def test_kept_answers_that_are_damaged_are_made_anew_with_a_word(
    chain: Chained, evaluated: dict[str, Any], generated: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    for index, file in enumerate(cached(chain, "answers")):
        file.write_text("" if index == 0 else file.read_text().replace("[", "[1, ", 1))
    config = replace(SMALL, arms=["base", "stage:sft"])
    with caplog.at_level(logging.WARNING):
        again = evaluate(chain, config, "damaged")
    assert len(generated) == 2
    assert "will be made again" in caplog.text
    before = figures(evaluated)
    assert figures(again) == {name: before[name] for name in config.arms}


@pytest.mark.parametrize("answers", [AnswersConfig(), AnswersConfig(per_prompt=3, temperature=1.0)])
def test_parts_make_what_one_batch_makes(chain: Chained, generated: list[int], answers: AnswersConfig) -> None:
    config = replace(SMALL, arms=["base", "stage:sft"], max_new_tokens=6, answers=answers)
    by_size, samples = [], []
    for batch_size in (128, 2):
        for file in cached(chain, "answers"):
            file.unlink()
        name = f"parts-{batch_size}-{answers.per_prompt}"
        by_size.append(figures(evaluate(chain, replace(config, batch_size=batch_size), name)))
        samples.append((chain.folder / f"artifacts/evaluate-{name}/samples.jsonl").read_bytes())
    of_arm = 3 * answers.per_prompt
    assert generated == [of_arm] * 2 + ([2, 1] if of_arm == 3 else [2, 2, 2, 2, 1]) * 2
    assert by_size[0] == by_size[1]
    assert samples[0] == samples[1]


@pytest.mark.parametrize(("processes", "rows", "expected"), [(1, 9, 1), (2, 13, 1), (8, 16, 2), (8, 20, 8)])
def test_so_many_arms_answer_at_once_that_all_processes_have_as_much_to_do(
    chain: Chained, processes: int, rows: int, expected: int
) -> None:
    """In parts of four answers, of which a prompt has one."""
    config = replace(SMALL, batch_size=4)
    context = StageContext(spec=evaluation_spec(chain, config, "waves"), rank=0, world_size=processes)
    answerer = answering.Answerer(config=config, context=context, policies=policies.Policies(context))
    assert answerer.arms_at_once(rows) == expected


def test_a_repeated_prompt_counts_once(chain: Chained, evaluated: dict[str, Any], tmp_path: Path) -> None:
    """Its answers are the same again, so that every interval would be too narrow."""
    rows = read_lines(chain.folder / "heldout.jsonl")
    again = rows[2] | {"reference": "Another answer that would do."}
    data = write_rows(tmp_path / "rows.jsonl", [*rows, rows[0], again])
    spec = evaluation_spec(chain, SMALL, "repeated", data_path=data)
    context = StageContext(spec=spec, rank=0, world_size=1)
    worker._run(spec, context)
    record = json.loads((spec.artifact / "evaluation.json").read_text())
    assert (record["num_prompts"], figures(record)) == (3, figures(evaluated))
    assert read_lines(spec.artifact / "left_out.jsonl") == [
        {"where": f"{data}:{row}", "reason": f"its prompt repeats that of {data}:{earlier}"}
        for row, earlier in ((4, 1), (5, 3))
    ]
    assert any(note.startswith("of 5 held-out rows, 2 ") for note in context.notes)


def test_a_reward_that_is_no_number_ends_the_evaluation(chain: Chained, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in cached(chain, "scores"):
        file.unlink()
    monkeypatch.setattr(stage, "reward_scores", lambda _, prompts, __: [math.nan] * len(prompts))
    with pytest.raises(NonFiniteError, match="the reward of base is nan on 3 of 3 answers"):
        evaluate(chain, SMALL, "nan")
    assert all("NaN" not in file.read_text() for file in cached(chain, "scores"))
    assert not (chain.folder / "artifacts/evaluate-nan/manifest.json").exists()


SAMPLED = replace(
    SMALL,
    arms=["base", "base+prompt", "stage:sft", "path:near"],
    metrics=[
        metric("closed", "regex", pattern="[aeiou]"),
        metric("once", "regex", pattern="[aeiou]", aggregate="pass@1"),
        metric("in_three", "regex", pattern="[aeiou]", aggregate="pass@3"),
        metric("reward", "reward"),
    ],
    answers=AnswersConfig(per_prompt=6, temperature=1.0),
)


@torch.no_grad()
def test_sampled_answers_estimate_the_kl_divergence(chain: Chained) -> None:
    """One token an answer, so that the exact divergence is a sum over the vocabulary."""
    number = 600
    config = replace(SAMPLED, metrics=[], max_new_tokens=1, answers=AnswersConfig(per_prompt=number, temperature=1.0))
    results = figures(evaluate(chain, config, "kl"))
    assert results["stage:sft"]["kl"]["mean"] == 0.0
    assert results["base+prompt"]["kl"] is None, "another prompt"
    reference = chain.policy("sft")
    for name, folder in (("base", chain.base), ("path:near", chain.folder / "near")):
        own = AutoModelForCausalLM.from_pretrained(folder)
        exact = variance = 0.0
        for row in ROWS:
            ids = torch.tensor([prompt_ids(tiny_tokenizer(), [Message(**turn) for turn in row["messages"]])])
            log_p, log_q = (torch.log_softmax(model(ids).logits[0, -1].double(), dim=-1) for model in (own, reference))
            k1 = log_p - log_q
            divergence = float((log_p.exp() * k1).sum())
            exact += divergence / 3
            variance += float((log_p.exp() * (k1 - divergence) ** 2).sum()) / 9 / number
        assert results[name]["kl"]["mean"] == pytest.approx(exact, abs=3 * math.sqrt(variance) + 1e-5)
        assert results[name]["greedy_log_ratio"] is None
    assert results["path:near"]["kl"]["mean"] > 0.3


def test_several_answers_to_a_prompt_make_one_score(chain: Chained) -> None:
    """A function that looks at the row alone scores all answers to it alike, whatever they say."""
    initial = metric("initial", f"{chain.folder}/score.py:initial")
    record = evaluate(chain, replace(SAMPLED, metrics=[*SAMPLED.metrics, initial]), "sampled")
    results, samples = figures(record), samples_of(chain, "sampled")
    for name in ("base", "stage:sft", "path:near"):
        answers = [[sample.answers[name].text, *sample.answers[name].further] for sample in samples]
        assert [len(of_prompt) for of_prompt in answers] == [6, 6, 6]
        right = [sum(any(letter in text for letter in "aeiou") for text in of_prompt) for of_prompt in answers]
        in_three = [1 - math.comb(6 - count, 3) / math.comb(6, 3) for count in right]
        metrics = results[name]["metrics"]
        assert metrics["closed"]["mean"] == metrics["once"]["mean"] == pytest.approx(sum(right) / 18, abs=1e-5)
        assert metrics["in_three"]["mean"] == pytest.approx(sum(in_three) / 3, abs=1e-5)
        assert [sample.answers[name].scores["in_three"] for sample in samples] == pytest.approx(in_three)
        assert [sample.answers[name].scores["initial"] for sample in samples] == [ord(row["id"][0]) for row in ROWS]
        assert results[name]["distinct"] == pytest.approx(len({texts[0] for texts in answers}) / 3, abs=1e-5)
        words = [sum(len(divided(text)) for text in of_prompt) / 6 for of_prompt in answers]
        assert results[name]["words"]["mean"] == pytest.approx(sum(words) / 3, abs=1e-5)
        assert metrics["reward"]["mean"] == results[name]["reward"]["mean"]
    assert any(sample.answers["base"].scores["closed"] % 1 > 0 for sample in samples), "mixed answers"
    assert {comparison["metric"] for comparison in record["comparisons"]} == {"closed"}


def test_sampled_answers_come_out_the_same_again_and_are_kept(chain: Chained, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluate(chain, SAMPLED, "sampled-once")
    loads: list[Lineage] = []
    with monkeypatch.context() as patch:
        patch.setattr(policies, "load_policy", lambda policy, dtype: loads.append(policy))
        evaluate(chain, SAMPLED, "sampled-again")
    assert loads == [], "the answers and what the reference says of them are cached"
    for file in cached(chain, "answers"):
        file.unlink()
    assert figures(evaluate(chain, SAMPLED, "sampled-anew")) == figures(first)
    evaluate(chain, replace(SAMPLED, metrics=[]), "seed", seed=1)
    once, other_seed = (
        [sample.answers["path:near"] for sample in samples_of(chain, name)] for name in ("sampled-once", "seed")
    )
    assert [(answer.text, answer.further) for answer in once] != [
        (answer.text, answer.further) for answer in other_seed
    ]


def test_a_low_temperature_samples_the_greedy_answer(chain: Chained) -> None:
    """At another temperature than one, nothing is said of the policy's KL divergence."""
    greedy = replace(SAMPLED, answers=AnswersConfig(), metrics=[])
    evaluate(chain, greedy, "greedy")
    cold = replace(greedy, answers=AnswersConfig(per_prompt=2, temperature=1e-4))
    for arm in evaluate(chain, cold, "cold")["arms"]:
        assert (arm["kl"], arm["greedy_log_ratio"]) == (None, None)
    for sample, again in zip(samples_of(chain, "greedy"), samples_of(chain, "cold"), strict=True):
        for name, answer in sample.answers.items():
            assert (answer.text, answer.further) == (again.answers[name].text, [])
            assert again.answers[name].further == [answer.text]
