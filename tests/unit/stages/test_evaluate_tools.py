"""Held-out rows with tools: arms are asked with them as in training, and so is whatever judges their answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from alignment import worker
from alignment.config.evaluating import ChatEndpointConfig, JudgeConfig, JudgeKind, PairConfig
from alignment.config.grader import GraderConfig
from alignment.config.scoring import MetricConfig
from alignment.core.errors import DataError
from alignment.data.records import HeldOutPrompt
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.data.turns import Message
from alignment.evaluation.arms import Answer, Answered
from alignment.job import StageInput
from alignment.models.assembly.load import Lineage
from alignment.stages.evaluate.arm_prompts import ArmPrompts
from alignment.stages.evaluate.config import EvaluateConfig
from alignment.stages.evaluate.metric_scores import answers_to_score
from alignment.stages.evaluate.turn_prompts import first_turn, later_turn
from alignment.training.context import StageContext
from tests.chained import LORA, Chained
from tests.judge_server import Response, serving
from tests.templates import styled_tokenizer
from tests.tiny import CHAT_TEMPLATE

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
ROW = HeldOutPrompt(
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


def shown(row: HeldOutPrompt) -> tuple[Message, ...]:
    return row.messages


def test_every_turn_is_asked_with_the_tools_of_its_row(tokenizer: Any) -> None:
    first = first_turn(tokenizer, [ROW], shown, with_references=True)
    assert first.prompts == [prompt_with_tool(tokenizer, "2 + 2?")]
    assert [reference and reference.ids for reference in first.references] == [ids_of(tokenizer, f"4.{END}")]
    later = later_turn(tokenizer, [ROW], shown, [[["Four."]]], number=1, with_references=True)
    assert later.prompts == [prompt_with_tool(tokenizer, "2 + 2?", "Four.", "Times 3?")]
    (reference,) = later.references
    assert reference is not None
    assert reference.prompt == prompt_with_tool(tokenizer, "2 + 2?", "4.", "Times 3?")
    assert reference.ids == ids_of(tokenizer, f"12.{END}")


def test_what_is_scored_has_the_tools_of_its_row(tokenizer: Any) -> None:
    answers = [Answer(ids=[1], text=text, ended=True) for text in ("Four.", "12.")]
    arm = Answered(answers=answers, logprobs=None, references=[None, None], seconds=0.0, turns=[2])
    prompts = ArmPrompts(
        policy=Lineage(source="path:other", base=Path("other"), adapters=()),
        tokenizer=tokenizer,
        first=first_turn(tokenizer, [ROW], shown, with_references=False),
        shown=shown,
        plain=True,
        own_tokens=True,  # so its answers are rendered once more, in the run's tokens
    )
    scored = answers_to_score(tokenizer, [ROW], {"path:other": prompts}, {"path:other": arm})["path:other"]
    assert scored.prompt_ids == [
        prompt_with_tool(tokenizer, "2 + 2?"),
        prompt_with_tool(tokenizer, "2 + 2?", "Four.", "Times 3?"),
    ]
    assert scored.answer_ids == [ids_of(tokenizer, f"{text}{END}") for text in ("Four.", "12.")]


def test_a_template_that_leaves_out_the_tools_of_a_row_ends_the_evaluation() -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:7: the chat template leaves out the tool 'add'"):
        first_turn(styled_tokenizer("chatml"), [ROW], shown, with_references=False)


@pytest.fixture
def chain(tmp_path: Path) -> Chained:
    """A base whose template names its tools, and rows of one turn and of two."""
    chain = Chained(tmp_path)
    tokenizer = load_tokenizer(chain.base)
    tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}" + CHAT_TEMPLATE
    tokenizer.save_pretrained(str(chain.base))
    rows = [{"turns": ["2 + 2?"], "tools": [TOOL]}, {"turns": ["2 + 2?", "Times 3?"], "tools": [TOOL]}]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return chain


def test_judge_and_grader_see_the_tools_of_every_row(chain: Chained) -> None:
    def reply(prompt: str, _: int) -> Response:
        return Response(text="[[7]]" if prompt.startswith("You grade") else "[[A]]")

    with serving(reply) as served:
        endpoint = served.config()
        grader = ChatEndpointConfig(base_url=served.url, model="grader", retries=0, concurrency=1)
        config = EvaluateConfig(
            arms=["base", "base+prompt"],
            system_prompt="Be brief.",
            max_new_tokens=2,
            bootstrap_samples=50,
            reward=None,
            metrics=[MetricConfig(name="helpful", source="grade")],
            grader=GraderConfig(endpoint=grader),
            judge=JudgeConfig(
                kind=JudgeKind.endpoint, endpoint=endpoint, pairs=[PairConfig(arm="base+prompt", against="base")]
            ),
        )
        base = StageInput(ref="base", path=None)
        spec = replace(
            chain.spec("sft", LORA, config=config, data_path=chain.folder / "heldout.jsonl"),
            stage="evaluate",
            inputs={"reference": base},
            arms=dict.fromkeys(config.arms, base),
            artifact=chain.folder / "artifacts" / "evaluate-tools",
            work=chain.folder / "artifacts" / "evaluate-tools.work",
            run_folder=chain.folder,
        )
        worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
        prompts = [request["messages"][0]["content"] for request in served.requests]
    judged = [prompt for prompt in prompts if not prompt.startswith("You grade")]
    assert any("two assistants" in prompt for prompt in judged)
    assert any("two answers" in prompt for prompt in judged)
    assert len(prompts) > len(judged)
    assert all('{"name": "add", "parameters": {"type": "object"}}' in prompt for prompt in prompts)
