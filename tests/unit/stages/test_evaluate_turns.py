"""Held-out rows of several turns on tiny models: every later question is asked after the arm's own answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignment import worker
from alignment.config.evaluating import AnswersConfig, FewShotConfig, JudgeConfig, JudgeKind, PairConfig
from alignment.config.sampling_engine import Engine
from alignment.config.scoring import MetricConfig
from alignment.core.errors import DataError, ModelError
from alignment.data.reading import iterate
from alignment.data.records import HeldOutPrompt
from alignment.data.tokens.tokenize import answer_ids, prompt_ids
from alignment.data.turns import Message, tagged
from alignment.evaluation.arms import Answered
from alignment.evaluation.few_shot import with_system_prompt
from alignment.job import StageInput, StageSpec
from alignment.models.assembly.load import lineage
from alignment.models.assembly.reward_head import load_reward_model
from alignment.pipeline.plan.scorer_checks import row_checks
from alignment.records.evaluation import ArmResult, Evaluation, Sample, read_samples
from alignment.stages.evaluate import answer_cache, answering, metric_scores
from alignment.stages.evaluate.config import EvaluateConfig
from alignment.stages.evaluate.turn_prompts import TurnPrompts, first_turn, later_turn
from alignment.training.context import StageContext
from tests.chained import DATA, LORA, Chained
from tests.judge_server import Response, serving
from tests.oracles import logprobs as oracle
from tests.oracles.close import close
from tests.real_templates import QWEN, dressed, text_of
from tests.tiny import CHAT_TEMPLATE, save_tiny_model, tiny_bpe, tiny_model, tiny_tokenizer

ROWS: list[dict[str, Any]] = [
    {"id": "lift", "turns": ["Write that the lift is out of order.", "Now in five words."]},
    {"id": "sum", "turns": ["What is 12 times 12?", "And half of that?"], "reference": ["144", "72"]},
    {"id": "once", "turns": ["When is it open?"], "reference": ["On Monday."]},
]
SCORE = """
def words_before(prompts, completions, rows):
    return [sum(len(turn["content"]) for turn in prompt if turn["role"] == "assistant") for prompt in prompts]


def letters(prompts, completions, rows):
    return [len(text) for text in completions]
"""
CONFIG = EvaluateConfig(
    arms=["base", "base+prompt", "base+few-shot", "stage:sft", "path:other"],
    system_prompt="Be brief.",
    max_new_tokens=4,
    bootstrap_samples=50,
    few_shot=FewShotConfig(count=1),
    reward="stage:reward",
)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chained:
    """A base, an sft and a reward model on it, a model with other tokens, and rows of one turn and of two."""
    chain = Chained(tmp_path_factory.mktemp("turns"))
    chain.run("sft", LORA)
    chain.run("reward", LORA, init="sft")
    other = tiny_tokenizer()
    other._tokenizer = tiny_bpe(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|odd|>"])
    other.chat_template = CHAT_TEMPLATE.replace("You are tiny.", "You are other.")
    save_tiny_model(chain.folder / "other", tokenizer=other, seed=3)
    (chain.folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (chain.folder / "score.py").write_text(SCORE)
    return chain


def metrics(chain: Chained) -> list[MetricConfig]:
    names = ("letters", "words_before")
    functions = [MetricConfig(name=name, source=f"{chain.folder}/score.py:{name}") for name in names]
    return [*functions, MetricConfig(name="by_reward", source="reward")]


def spec_of(chain: Chained, config: EvaluateConfig, fingerprint: str) -> StageSpec:
    artifact = chain.folder / "artifacts" / f"evaluate-{fingerprint}"
    inputs = {"reference": chain.inputs["sft"], "reward": chain.inputs["reward"]}
    folders = {"stage:sft": chain.inputs["sft"].path}
    folders |= {f"path:{name}": chain.folder / name for name in ("other", "short")}
    run_folder = chain.folder / "runs" / fingerprint
    run_folder.mkdir(parents=True, exist_ok=True)
    return replace(
        chain.spec("sft", LORA, config=config),
        stage="evaluate",
        inputs=inputs if config.reward else {"reference": inputs["reference"]},
        arms={arm: StageInput(ref=arm, path=folders.get(arm)) for arm in config.arms},
        data_path=chain.folder / "heldout.jsonl",
        extra_data={"few_shot.data": DATA / "conversations.jsonl"},
        artifact=artifact,
        work=artifact.with_name(f"{artifact.name}.work"),
        run_folder=run_folder,
    )


def evaluate(chain: Chained, config: EvaluateConfig, fingerprint: str) -> tuple[Evaluation, list[Sample]]:
    spec = spec_of(chain, config, fingerprint)
    worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    return Evaluation.read(spec.artifact), list(read_samples(spec.artifact))


@pytest.fixture(scope="module")
def evaluated(chain: Chained) -> tuple[Evaluation, list[Sample]]:
    return evaluate(chain, replace(CONFIG, metrics=metrics(chain)), "first")


def arm_of(evaluation: Evaluation, name: str) -> ArmResult:
    arm = evaluation.arm(name)
    assert arm is not None
    return arm


def conversation(row: dict[str, Any], answers: Sequence[str]) -> list[Message]:
    """The row's first question and, after each answer, the next one."""
    turns = [Message(role="user", content=row["turns"][0])]
    for number, answer in enumerate(answers, start=1):
        turns += [Message(role="assistant", content=answer), Message(role="user", content=row["turns"][number])]
    return turns


@torch.no_grad()
def greedy(model: Any, ids: list[int], *, ends: tuple[int, ...]) -> list[int]:
    """Four likeliest tokens, one whole forward pass each."""
    answer: list[int] = []
    while len(answer) < 4 and not (answer and answer[-1] in ends):
        answer.append(int(model(torch.tensor([[*ids, *answer]])).logits[0, -1].argmax()))
    return answer


@torch.no_grad()
def logprob(model: Any, prompt: list[int], answer: list[int]) -> float:
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0].tolist()
    return sum(oracle.log_softmax(logits[len(prompt) - 1 + step])[token] for step, token in enumerate(answer))


def test_the_second_question_is_asked_after_the_arms_own_first_answer(
    chain: Chained, evaluated: tuple[Evaluation, list[Sample]]
) -> None:
    """Each answer by a plain loop over forward passes, with that arm's first answer before the second question."""
    tokenizer = tiny_tokenizer()
    shown = {
        "base": lambda turns: turns,
        "base+prompt": lambda turns: with_system_prompt(turns, "Be brief."),
        "stage:sft": lambda turns: turns,
    }
    base = AutoModelForCausalLM.from_pretrained(chain.base, dtype=torch.float32)
    policies = {"base": base, "base+prompt": base, "stage:sft": chain.policy("sft")}
    ends = (tokenizer.eos_token_id, answer_ids(tokenizer, [Message(role="user", content="Hi.")], "Hello.")[-1])
    for name, show in shown.items():
        for row, sample in zip(ROWS, evaluated[1], strict=True):
            answers: list[str] = []
            for _ in row["turns"]:
                ids = greedy(policies[name], prompt_ids(tokenizer, show(conversation(row, answers))), ends=ends)
                answers.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
            answer = sample.answers[name]
            turns = [turn.text for turn in answer.turns] or [answer.text]
            assert turns == answers, name
    assert [sample.later_turns for sample in evaluated[1]] == [row["turns"][1:] for row in ROWS]


def test_scorers_see_the_conversation_and_a_row_scores_the_mean_of_its_turns(
    evaluated: tuple[Evaluation, list[Sample]],
) -> None:
    evaluation, samples = evaluated
    for name in CONFIG.arms:
        letters = []
        for sample in samples:
            answer = sample.answers[name]
            texts = [turn.text for turn in answer.turns] or [answer.text]
            counts = [len(text) for text in texts]
            assert answer.scores["letters"] == sum(counts) / len(counts)
            assert [turn.scores["letters"] for turn in answer.turns] == (counts if len(counts) > 1 else [])
            before = [turn.scores["words_before"] for turn in answer.turns]
            assert before == ([0.0, float(counts[0])] if len(counts) > 1 else [])
            letters.append(answer.scores["letters"])
        arm = arm_of(evaluation, name)
        assert arm.metrics["letters"].mean == pytest.approx(sum(letters) / 3)
        assert len(arm.by_turn) == 2
        second = [sample.answers[name].turns[1].scores["letters"] for sample in samples[:2]]
        assert arm.by_turn[1]["letters"].mean == pytest.approx(sum(second) / 2)
        assert arm.reward is not None
        assert arm.metrics["by_reward"].mean == pytest.approx(arm.reward.mean)


def test_rewards_and_log_ratios_of_later_turns_are_those_of_the_own_conversation(
    chain: Chained, evaluated: tuple[Evaluation, list[Sample]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    answered: dict[str, Answered] = {}
    to_score = metric_scores.answers_to_score

    def noted(*arguments: Any) -> Any:
        answered.update(arguments[3])
        return to_score(*arguments)

    monkeypatch.setattr("alignment.stages.evaluate.run.answers_to_score", noted)
    evaluation, _ = evaluate(chain, replace(CONFIG, arms=["base", "stage:sft"]), "by-value")
    base = AutoModelForCausalLM.from_pretrained(chain.base, dtype=torch.float32)
    sft = chain.policy("sft")
    reward = load_reward_model(chain.spec("sft", LORA), chain.inputs["reward"], device=torch.device("cpu"))
    ratios, rewards = [], []
    answers = iter(answered["base"].answers)
    for row in ROWS:
        texts: list[str] = []
        ratio, scores = 0.0, []
        for _ in row["turns"]:
            answer = next(answers)
            prompt = prompt_ids(tokenizer, conversation(row, texts))
            ratio += logprob(base, prompt, answer.ids) - logprob(sft, prompt, answer.ids)
            ids = torch.tensor([[*prompt, *answer.ids]])
            scores.append(float(reward(input_ids=ids, attention_mask=torch.ones_like(ids)).logits))
            texts.append(answer.text)
        ratios.append(ratio)
        rewards.append(sum(scores) / len(scores))
    arm = arm_of(evaluation, "base")
    assert arm.greedy_log_ratio is not None
    assert arm.reward is not None
    close([arm.greedy_log_ratio.mean], [sum(ratios) / 3], rtol=1e-4, atol=1e-4)
    close([arm.reward.mean], [sum(rewards) / 3], rtol=1e-4, atol=1e-4)
    own = arm_of(evaluation, "stage:sft").greedy_log_ratio
    assert own is not None
    assert own.mean == 0.0
    others = ("base+prompt", "base+few-shot", "path:other")
    assert all(arm_of(evaluated[0], name).greedy_log_ratio is None for name in others)


def test_a_later_reference_is_read_after_the_references_before_it(
    chain: Chained, evaluated: tuple[Evaluation, list[Sample]]
) -> None:
    """So the loss is that of one text for every arm, not of references behind whatever an arm said."""
    tokenizer = tiny_tokenizer()
    for name, show in (
        ("base", lambda turns: turns),
        ("base+prompt", lambda turns: with_system_prompt(turns, "Be brief.")),
    ):
        base = AutoModelForCausalLM.from_pretrained(chain.base, dtype=torch.float32)
        total, tokens = 0.0, 0
        for row in ROWS:
            references = row.get("reference", [])
            for number, reference in enumerate(references):
                messages = show(conversation(row, references[:number]))
                answer = answer_ids(tokenizer, messages, reference)
                total -= logprob(base, prompt_ids(tokenizer, messages), answer)
                tokens += len(answer)
        loss = arm_of(evaluated[0], name).loss
        assert loss is not None
        close([loss.mean], [total / tokens], rtol=1e-4)
    assert arm_of(evaluated[0], "path:other").loss is None


def test_a_reference_behind_a_missing_one_has_no_loss(chain: Chained, tmp_path: Path) -> None:
    rows = [{"turns": ["C?", "B?"], "reference": ["", "Late."]}, {"turns": ["A?", "B?"], "reference": ["First.", ""]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(CONFIG, arms=["base"], reward=None)
    spec = replace(spec_of(chain, config, "gaps"), data_path=tmp_path / "rows.jsonl")
    worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    base = AutoModelForCausalLM.from_pretrained(chain.base, dtype=torch.float32)
    messages = [Message(role="user", content="A?")]
    answer = answer_ids(tiny_tokenizer(), messages, "First.")
    loss = arm_of(Evaluation.read(spec.artifact), "base").loss
    assert loss is not None
    close([loss.mean], [-logprob(base, prompt_ids(tiny_tokenizer(), messages), answer) / len(answer)], rtol=1e-4)


def test_each_sample_goes_on_with_its_own_answer_and_every_turn_has_its_own_cache(
    chain: Chained, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    answer = answering.answer_and_score
    tokenizer = tiny_tokenizer()

    def noted(model: Any, prompts: list[list[int]], *arguments: Any, **named: Any) -> Any:
        asked.append([tokenizer.decode(prompt) for prompt in prompts])
        return answer(model, prompts, *arguments, **named)

    monkeypatch.setattr(answering, "answer_and_score", noted)
    config = replace(
        CONFIG,
        arms=["base"],
        metrics=metrics(chain)[:1],
        reward=None,
        answers=AnswersConfig(per_prompt=3, temperature=1.0),
    )
    evaluation, samples = evaluate(chain, config, "sampled")
    assert [len(prompts) for prompts in asked] == [9, 6]
    for sample, prompts in zip(samples[:2], (asked[1][:3], asked[1][3:]), strict=True):
        first, second = sample.answers["base"].turns
        texts = [first.text, *first.further]
        assert len(set(texts)) == 3
        for text, prompt in zip(texts, prompts, strict=True):
            assert f"<|im_start|>assistant\n{text}<|im_end|>" in prompt
        assert len(second.further) == 2
    again, _ = evaluate(chain, config, "sampled-again")
    assert len(asked) == 2
    assert again.arms[0].metrics == evaluation.arms[0].metrics
    assert again.arms[0].kl == evaluation.arms[0].kl is not None


def test_later_turns_draw_other_random_numbers(chain: Chained, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[torch.Tensor] = []
    answer = answering.answer_and_score

    def noted(model: Any, prompts: list[list[int]], *arguments: Any, **named: Any) -> Any:
        drawn.append(named["sampling"].uniforms)
        return answer(model, prompts, *arguments, **named)

    monkeypatch.setattr(answering, "answer_and_score", noted)
    sampled = AnswersConfig(per_prompt=2, temperature=1.0)
    config = replace(CONFIG, arms=["base", "stage:sft"], reward=None, answers=sampled)
    evaluate(chain, config, "drawn")
    assert [len(uniforms) for uniforms in drawn] == [6, 4, 6, 4]
    assert torch.equal(drawn[1], drawn[3]), "the same for every arm"
    assert not torch.isclose(drawn[0][:4], drawn[1]).any()


def test_samples_of_a_later_turn_are_cached_with_the_rows_whose_random_numbers_they_drew(chain: Chained) -> None:
    """The same conversation at another place in the data draws other numbers there."""
    spec = spec_of(chain, CONFIG, "places")
    context = StageContext(spec=spec, rank=0, world_size=1)
    asked = [TurnPrompts(number=1, rows=[row], prompts=[[5, 6]], references=[None]) for row in (0, 1)]

    def file(turn: TurnPrompts, temperature: float, engine: Engine = Engine.own) -> Path:
        answers, policy = AnswersConfig(temperature=temperature), lineage(spec, spec.inputs["reference"])
        limits = {"max_new_tokens": 4, "ends": [2], "with_logprobs": False}
        return answer_cache.file_of(context, policy, turn, answers, **limits, engine=engine)

    assert file(asked[0], 1.0) != file(asked[1], 1.0)
    assert file(asked[0], 0.0) == file(asked[1], 0.0)
    assert file(asked[0], 0.0) != file(asked[0], 0.0, Engine.vllm)


@pytest.mark.parametrize("thinks", [True, False])
def test_a_reference_has_its_thought_only_where_it_can_follow_the_prompt(thinks: bool) -> None:
    """With ``enable_thinking: false`` the prompt of Qwen3's template ends the thought, so the answer follows alone."""
    template = text_of("qwen3")
    assert template is not None
    tokenizer = dressed(QWEN, template, {"enable_thinking": thinks})
    references = [tagged("Two and two.", "4."), tagged("Four, three times.", "12.")]
    row = HeldOutPrompt(
        messages=(Message(role="user", content="2 + 2?"),),
        reference=references[0],
        later_turns=("Times 3?",),
        later_references=(references[1],),
    )
    first = first_turn(tokenizer, [row], lambda row: row.messages, with_references=True)
    later = later_turn(tokenizer, [row], lambda row: row.messages, [[["4."]]], number=1, with_references=True)
    rendered = [f"{text}<|im_end|>" for text in (references if thinks else ["4.", "12."])]
    assert [reference and reference.ids for reference in (*first.references, *later.references)] == [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered
    ]


def test_a_judge_sees_both_whole_conversations(chain: Chained) -> None:
    asked: list[str] = []

    def judge(prompt: str, _: int) -> Response:
        asked.append(prompt)
        return Response(text="[[A]]")

    with serving(judge) as served:
        pairs = [PairConfig(arm="base", against="stage:sft")]
        config = JudgeConfig(kind=JudgeKind.endpoint, endpoint=served.config(), pairs=pairs)
        evaluation, samples = evaluate(chain, replace(CONFIG, arms=["base", "stage:sft"], judge=config), "judged")
    assert evaluation.judge is not None
    assert evaluation.judge.pairs[0].position_bias == 1.0
    for number, sample in enumerate(samples):
        first, _ = asked[2 * number : 2 * number + 2]
        for letter, name in zip("AB", ("base", "stage:sft"), strict=True):
            answer = sample.answers[name]
            if not answer.turns:
                assert f"<<<answer {letter}>>>\n{answer.text}\n" in first
                continue
            for turn, shown in enumerate(answer.turns, start=1):
                assert f"<<<answer {turn} of {letter}>>>\n{shown.text}\n<<<end" in first
            assert f"<<<turn 2 of the user to {letter}>>>\n{sample.later_turns[0]}\n<<<end" in first


def test_a_row_of_several_turns_has_no_exact_answer(chain: Chained, tmp_path: Path) -> None:
    rows = [row | {"answer": "#### 144"} for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(CONFIG, arms=["base"], reward=None, metrics=[MetricConfig(name="right", source="exact_answer")])
    spec = replace(spec_of(chain, config, "exact"), data_path=tmp_path / "rows.jsonl")
    (check,) = row_checks(config)
    prompts = list(iterate(spec.data_path, HeldOutPrompt, config.data))
    check(prompts[2])
    for refused in (
        lambda: check(prompts[0]),
        lambda: worker._run(spec, StageContext(spec=spec, rank=0, world_size=1)),
    ):
        with pytest.raises(DataError, match=r"rows\.jsonl:1: 'exact_answer' compares every answer .* several turns"):
            refused()


def test_a_conversation_beyond_the_positions_is_refused_before_its_turn(chain: Chained) -> None:
    rows = [HeldOutPrompt(messages=(Message(role="user", content=ROWS[0]["turns"][0]),))]
    first = len(prompt_ids(tiny_tokenizer(), rows[0].messages))
    model = tiny_model(vocab_size=len(tiny_tokenizer()), max_position_embeddings=first + 6)
    model.save_pretrained(chain.folder / "short")
    tiny_tokenizer().save_pretrained(chain.folder / "short")
    with pytest.raises(ModelError, match=r"path:short has \d+ positions, but .* needs \d+ in turn 2"):
        evaluate(chain, replace(CONFIG, arms=["path:short"], reward=None), "short")
