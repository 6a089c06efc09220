"""Held-out rows of several turns and with tools: every later question is asked after the arm's own answers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from alignment.config.evaluating import (
    AnswersConfig,
    ChatEndpointConfig,
    FewShotConfig,
    GraderConfig,
    JudgeConfig,
    JudgeKind,
    PairConfig,
)
from alignment.config.launch import Engine, SamplingConfig
from alignment.config.scoring import MetricConfig
from alignment.core.errors import DataError, ModelError
from alignment.data.reading import iterate
from alignment.data.records import HeldOutPrompt
from alignment.data.tokens.tokenize import answer_ids, prompt_ids
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.data.turns import Message, tagged
from alignment.evaluation.arms import Answer, Answered
from alignment.evaluation.exchanges import with_system_prompt
from alignment.models.assembly.heads import load_reward_model
from alignment.models.assembly.load import Lineage, lineage
from alignment.pipeline.plan.scorer_checks import row_checks
from alignment.records.evaluation import ArmResult, Evaluation, Sample, read_samples
from alignment.stages.evaluate import answering, caches, metric_scores
from alignment.stages.evaluate.kind import EvaluateConfig
from alignment.stages.evaluate.metric_scores import answers_to_score
from alignment.stages.evaluate.prompts import ArmPrompts, TurnPrompts, first_turn, later_turn
from alignment.training.context import StageContext
from tests.chained import LORA, Chained
from tests.judge_server import Response, serving
from tests.measuring import evaluation_chain, evaluation_of, evaluation_spec, write_rows
from tests.oracles import logprobs as oracle
from tests.oracles.close import close
from tests.real_templates import QWEN, dressed, text_of
from tests.templates import styled_tokenizer
from tests.tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

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
    chain = evaluation_chain(tmp_path_factory.mktemp("turns"), ROWS)
    (chain.folder / "score.py").write_text(SCORE)
    return chain


def metrics(chain: Chained) -> list[MetricConfig]:
    names = ("letters", "words_before")
    functions = [MetricConfig(name=name, source=f"{chain.folder}/score.py:{name}") for name in names]
    return [*functions, MetricConfig(name="by_reward", source="reward")]


def evaluate(chain: Chained, config: EvaluateConfig, name: str, **changes: Any) -> tuple[Evaluation, list[Sample]]:
    artifact = evaluation_of(chain, config, name, **changes)
    return Evaluation.read(artifact), list(read_samples(artifact))


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


SHOWN: dict[str, Callable[[Sequence[Message]], Sequence[Message]]] = {
    "base": lambda turns: turns,
    "base+prompt": lambda turns: with_system_prompt(turns, "Be brief."),
    "stage:sft": lambda turns: turns,
}


def test_the_second_question_is_asked_after_the_arms_own_first_answer(
    chain: Chained, evaluated: tuple[Evaluation, list[Sample]]
) -> None:
    """Each answer by a plain loop over forward passes, with that arm's first answer before the second question."""
    tokenizer = tiny_tokenizer()
    base = AutoModelForCausalLM.from_pretrained(chain.base, dtype=torch.float32)
    policies = {"base": base, "base+prompt": base, "stage:sft": chain.policy("sft")}
    ends = (tokenizer.eos_token_id, answer_ids(tokenizer, [Message(role="user", content="Hi.")], "Hello.")[-1])
    for name, show in SHOWN.items():
        for row, sample in zip(ROWS, evaluated[1], strict=True):
            answers: list[str] = []
            for _ in row["turns"]:
                ids = greedy(policies[name], prompt_ids(tokenizer, show(conversation(row, answers))), ends=ends)
                answers.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
            answer = sample.answers[name]
            assert ([turn.text for turn in answer.turns] or [answer.text]) == answers, name
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
        assert arm.metrics["by_reward"].mean == pytest.approx(arm.reward.mean)


def test_rewards_and_log_ratios_are_those_of_the_own_conversation(
    chain: Chained, evaluated: tuple[Evaluation, list[Sample]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against plain forward passes, row by row, of each policy, of the reference (sft) and of the reward model."""
    tokenizer = tiny_tokenizer()
    answered: dict[str, Answered] = {}
    to_score = metric_scores.answers_to_score

    def noted(*arguments: Any) -> Any:
        answered.update(arguments[3])
        return to_score(*arguments)

    monkeypatch.setattr("alignment.stages.evaluate.metric_scores.answers_to_score", noted)
    arms = {"base": chain.base, "stage:sft": None, "path:near": chain.folder / "near"}
    evaluation, _ = evaluate(chain, replace(CONFIG, arms=list(arms)), "by-value")
    sft = chain.policy("sft")
    reward = load_reward_model(chain.spec("sft", LORA), chain.inputs["reward"], device=torch.device("cpu"))
    for name, folder in arms.items():
        policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) if folder else sft
        ratios, rewards = [], []
        answers = iter(answered[name].answers)
        for row in ROWS:
            texts: list[str] = []
            ratio, scores = 0.0, []
            for _ in row["turns"]:
                answer = next(answers)
                prompt = prompt_ids(tokenizer, conversation(row, texts))
                ratio += logprob(policy, prompt, answer.ids) - logprob(sft, prompt, answer.ids)
                ids = torch.tensor([[*prompt, *answer.ids]])
                scores.append(float(reward(input_ids=ids, attention_mask=torch.ones_like(ids)).logits))
                texts.append(answer.text)
            ratios.append(ratio)
            rewards.append(sum(scores) / len(scores))
        arm = arm_of(evaluation, name)
        close([arm.greedy_log_ratio.mean], [sum(ratios) / 3], rtol=1e-4, atol=1e-4)
        close([arm.reward.mean], [sum(rewards) / 3], rtol=1e-4, atol=1e-4)
        assert abs(arm.greedy_log_ratio.mean) > {"base": 0.01, "stage:sft": -1.0, "path:near": 1.0}[name]
    others = ("base+prompt", "base+few-shot", "path:other")
    assert all(arm_of(evaluated[0], name).greedy_log_ratio is None for name in others)


def loss_by_hand(chain: Chained, rows: list[dict[str, Any]], show: Callable[..., Sequence[Message]]) -> float:
    """Of the base, in nats per token: each reference behind those before it, up to the first that is missing."""
    base, tokenizer = AutoModelForCausalLM.from_pretrained(chain.base, dtype=torch.float32), tiny_tokenizer()
    total, tokens = 0.0, 0
    for row in rows:
        for number, reference in enumerate(itertools.takewhile(bool, row.get("reference", []))):
            messages = show(conversation(row, row["reference"][:number]))
            answer = answer_ids(tokenizer, messages, reference)
            total -= logprob(base, prompt_ids(tokenizer, messages), answer)
            tokens += len(answer)
    return total / tokens


def test_a_later_reference_is_read_after_the_references_before_it(
    chain: Chained, evaluated: tuple[Evaluation, list[Sample]], tmp_path: Path
) -> None:
    """So the loss is that of one text for every arm, not of references behind whatever an arm said; one behind a
    missing reference has none."""
    rows = [{"turns": ["C?", "B?"], "reference": ["", "Late."]}, {"turns": ["A?", "B?"], "reference": ["First.", ""]}]
    gaps = write_rows(tmp_path / "rows.jsonl", rows)
    with_gaps, _ = evaluate(chain, replace(CONFIG, arms=["base"], reward=None), "gaps", data_path=gaps)
    for evaluation, name, of_rows in (
        (evaluated[0], "base", ROWS),
        (evaluated[0], "base+prompt", ROWS),
        (with_gaps, "base", rows),
    ):
        arm, expected = arm_of(evaluation, name), loss_by_hand(chain, of_rows, SHOWN[name])
        close([arm.loss.mean, arm.perplexity.mean], [expected, math.exp(expected)], rtol=1e-4)
    assert arm_of(evaluated[0], "path:other").loss is None


class Asked(NamedTuple):
    """A call for the answers of an arm in a turn."""

    prompts: list[str]
    uniforms: torch.Tensor


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """From now on."""
    calls: list[Asked] = []
    answer, tokenizer = answering.answer_and_score, tiny_tokenizer()

    def noted(model: Any, prompts: list[list[int]], *arguments: Any, **named: Any) -> Any:
        calls.append(Asked([tokenizer.decode(prompt) for prompt in prompts], named["sampling"].uniforms))
        return answer(model, prompts, *arguments, **named)

    monkeypatch.setattr(answering, "answer_and_score", noted)
    return calls


def test_each_sample_goes_on_with_its_own_answer_and_every_turn_has_its_own_cache(
    chain: Chained, asked: list[Asked]
) -> None:
    """Later turns draw other random numbers, the same for every arm."""
    answers = AnswersConfig(per_prompt=3, temperature=1.0)
    config = replace(CONFIG, arms=["base", "stage:sft"], metrics=metrics(chain)[:1], reward=None, answers=answers)
    evaluation, samples = evaluate(chain, config, "sampled")
    assert [len(call.prompts) for call in asked] == [9, 6, 9, 6]
    later = asked[1].prompts
    for sample, prompts in zip(samples[:2], (later[:3], later[3:]), strict=True):
        first, second = sample.answers["base"].turns
        texts = [first.text, *first.further]
        assert len(set(texts)) == 3
        for text, prompt in zip(texts, prompts, strict=True):
            assert f"<|im_start|>assistant\n{text}<|im_end|>" in prompt
        assert len(second.further) == 2
    assert torch.equal(asked[1].uniforms, asked[3].uniforms)
    assert not torch.isclose(asked[0].uniforms[:6], asked[1].uniforms).any()
    again, _ = evaluate(chain, config, "sampled-again")
    assert len(asked) == 4
    assert again.arms[0].metrics == evaluation.arms[0].metrics
    assert again.arms[0].kl == evaluation.arms[0].kl is not None


def test_samples_of_a_later_turn_are_cached_with_the_rows_whose_random_numbers_they_drew(chain: Chained) -> None:
    """The same conversation at another place in the data draws other numbers there."""
    spec = evaluation_spec(chain, CONFIG, "places")
    context = StageContext(spec=spec, rank=0, world_size=1)

    def file(row: int, temperature: float, engine: Engine = Engine.own) -> Path:
        turn = TurnPrompts(number=1, rows=[row], prompts=[[5, 6]], references=[None])
        answers, policy = AnswersConfig(temperature=temperature), lineage(spec, spec.inputs["reference"])
        config = replace(CONFIG, answers=answers, sampling=SamplingConfig(engine=engine))
        return caches.answers_file(config, context, policy, turn, ends=[2], with_logprobs=False)

    assert file(0, 1.0) != file(1, 1.0)
    assert file(0, 0.0) == file(1, 0.0) != file(0, 0.0, Engine.vllm)


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
    arm = asked_arm(tokenizer, row)
    first, later = arm.first, later_turn(arm, [row], [[["4."]]], number=1)
    rendered = [f"{text}<|im_end|>" for text in (references if thinks else ["4.", "12."])]
    assert [reference and reference.ids for reference in (*first.references, *later.references)] == [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered
    ]


def test_a_judge_sees_both_whole_conversations(chain: Chained) -> None:
    with serving(lambda *_: Response(text="[[A]]")) as served:
        pairs = [PairConfig(arm="base", against="stage:sft")]
        config = JudgeConfig(kind=JudgeKind.endpoint, endpoint=served.config(), pairs=pairs)
        evaluation, samples = evaluate(chain, replace(CONFIG, arms=["base", "stage:sft"], judge=config), "judged")
        prompts = [request["messages"][0]["content"] for request in served.requests]
    assert evaluation.judge.pairs[0].position_bias == 1.0
    for first, sample in zip(prompts[::2], samples, strict=True):
        for letter, name in zip("AB", ("base", "stage:sft"), strict=True):
            answer = sample.answers[name]
            if not answer.turns:
                assert f"<<<answer {letter}>>>\n{answer.text}\n" in first
                continue
            for turn, shown in enumerate(answer.turns, start=1):
                assert f"<<<answer {turn} of {letter}>>>\n{shown.text}\n<<<end" in first
            assert f"<<<turn 2 of the user to {letter}>>>\n{sample.later_turns[0]}\n<<<end" in first


def test_exact_answers_of_several_turns_and_conversations_beyond_the_positions_are_refused(
    chain: Chained, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [row | {"answer": "#### 144"} for row in ROWS])
    config = replace(CONFIG, arms=["base"], reward=None, metrics=[MetricConfig(name="right", source="exact_answer")])
    (check,) = row_checks(config)
    prompts = list(iterate(file, HeldOutPrompt, config.data))
    check(prompts[2])
    for refused in (lambda: check(prompts[0]), lambda: evaluate(chain, config, "exact", data_path=file)):
        with pytest.raises(DataError, match=r"rows\.jsonl:1: 'exact_answer' .* several turns"):
            refused()
    first = len(prompt_ids(tiny_tokenizer(), conversation(ROWS[0], [])))
    model = tiny_model(vocab_size=len(tiny_tokenizer()), max_position_embeddings=first + 6)
    model.save_pretrained(chain.folder / "short")
    tiny_tokenizer().save_pretrained(chain.folder / "short")
    with pytest.raises(ModelError, match=r"path:short has \d+ positions, but .* needs \d+ in turn 2"):
        evaluate(chain, replace(CONFIG, arms=["path:short"], reward=None), "short")


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
ROW_WITH_TOOL = HeldOutPrompt(
    messages=(Message(role="user", content="2 + 2?"),),
    tools=(TOOL,),
    reference="4.",
    later_turns=("Times 3?",),
    later_references=("12.",),
    where="rows.jsonl:7",
)
END = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Its template knows tools."""
    return styled_tokenizer("qwen")


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def prompt_with_tool(tokenizer: Any, *texts: str) -> list[int]:
    """What the template makes of the user's and the assistant's texts in turn, with the tool."""
    turns = [{"role": ("user", "assistant")[number % 2], "content": content} for number, content in enumerate(texts)]
    text = tokenizer.apply_chat_template(turns, tools=[TOOL], tokenize=False, add_generation_prompt=True)
    assert '"name": "add"' in text
    return ids_of(tokenizer, text)


def asked_arm(tokenizer: Any, row: HeldOutPrompt, *, own_tokens: bool = False) -> ArmPrompts:
    def shown(row: HeldOutPrompt) -> tuple[Message, ...]:
        return row.messages

    return ArmPrompts(
        policy=Lineage(source="path:other", base=Path("other"), adapters=()),
        tokenizer=tokenizer,
        first=first_turn(tokenizer, [row], shown, with_references=not own_tokens),
        shown=shown,
        plain=True,
        own_tokens=own_tokens,
    )


def test_turns_and_scores_have_the_tools_of_their_row(tokenizer: Any) -> None:
    plain = asked_arm(tokenizer, ROW_WITH_TOOL)
    first, later = plain.first, later_turn(plain, [ROW_WITH_TOOL], [[["Four."]]], number=1)
    assert first.prompts == [prompt_with_tool(tokenizer, "2 + 2?")]
    assert [reference and reference.ids for reference in first.references] == [ids_of(tokenizer, f"4.{END}")]
    assert later.prompts == [prompt_with_tool(tokenizer, "2 + 2?", "Four.", "Times 3?")]
    (reference,) = later.references
    assert reference.prompt == prompt_with_tool(tokenizer, "2 + 2?", "4.", "Times 3?")
    assert reference.ids == ids_of(tokenizer, f"12.{END}")
    answers = [Answer(ids=[1], text=text, ended=True) for text in ("Four.", "12.")]
    arm = Answered(answers=answers, logprobs=None, references=[None, None], seconds=0.0, turns=[2])
    prompts = asked_arm(tokenizer, ROW_WITH_TOOL, own_tokens=True)  # its answers are rendered in the run's tokens
    scored = answers_to_score(tokenizer, [ROW_WITH_TOOL], {"path:other": prompts}, {"path:other": arm})["path:other"]
    assert scored.prompt_ids == [
        prompt_with_tool(tokenizer, "2 + 2?"),
        prompt_with_tool(tokenizer, "2 + 2?", "Four.", "Times 3?"),
    ]
    assert scored.answer_ids == [ids_of(tokenizer, f"{text}{END}") for text in ("Four.", "12.")]
    with pytest.raises(DataError, match=r"rows\.jsonl:7: the chat template leaves out the tool 'add'"):
        asked_arm(styled_tokenizer("chatml"), ROW_WITH_TOOL)


def test_judge_and_grader_see_the_tools_of_every_row(tmp_path: Path) -> None:
    """On a base whose template names its tools, for rows of one turn and of two."""
    chain = Chained(tmp_path)
    tokenizer = load_tokenizer(chain.base)
    tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}" + CHAT_TEMPLATE
    tokenizer.save_pretrained(str(chain.base))
    rows = [{"turns": ["2 + 2?"], "tools": [TOOL]}, {"turns": ["2 + 2?", "Times 3?"], "tools": [TOOL]}]
    write_rows(tmp_path / "heldout.jsonl", rows)

    def reply(prompt: str, _: int) -> Response:
        return Response(text="[[7]]" if prompt.startswith("You grade") else "[[A]]")

    pairs = [PairConfig(arm="base+prompt", against="base")]
    with serving(reply) as served:
        endpoint = ChatEndpointConfig(base_url=served.url, model="grader", retries=0, concurrency=1)
        config = replace(
            CONFIG,
            arms=["base", "base+prompt"],
            reward=None,
            metrics=[MetricConfig(name="helpful", source="grade")],
            grader=GraderConfig(endpoint=endpoint),
            judge=JudgeConfig(kind=JudgeKind.endpoint, endpoint=served.config(), pairs=pairs),
        )
        evaluate(chain, config, "tools")
        prompts = [request["messages"][0]["content"] for request in served.requests]
    judged = [prompt for prompt in prompts if not prompt.startswith("You grade")]
    assert any("two assistants" in prompt for prompt in judged)
    assert any("two answers" in prompt for prompt in judged)
    assert len(prompts) > len(judged)
    assert all('{"name": "add", "parameters": {"type": "object"}}' in prompt for prompt in prompts)
