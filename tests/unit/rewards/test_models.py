"""Reward models from outside read the text anew: their own template, their own tokens, the last real one."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from alignment.config.model import Dtype
from alignment.core.errors import DataError, ModelError, RewardError
from alignment.data.records import Prompt
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.rewards.reward_models import Computation, TextScorer, load_external
from alignment.rewards.scorers import Answers
from tests.in_memory import without_collections
from tests.tiny import tiny_model, tiny_scorer, tiny_tokenizer
from tests.unit.rewards.conftest import answers_to, prompt

END = "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ '[' + message['role'] + '] ' + message['content'] + ' <|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
PROMPTS = [
    prompt("When is the shop closed?", line=1),
    prompt("Where are the keys? Say only what the note says, please.", line=2),
    prompt("When is the shop closed?", line=3),
]
TEXTS = ["On Monday.", "", "It is closed on Monday, and the keys are with the caretaker in the hall."]


def tokenizer_of_another_family() -> PreTrainedTokenizerFast:
    """Other ids for the same text, another template, pad equal to the token that ends a turn."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["shop", "Monday", "keys"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def external(folder: Path, architecture: str = "llama", **changes: Any) -> Path:
    """A reward model as a hub has them."""
    tokenizer = tokenizer_of_another_family()
    tiny_scorer(architecture, vocab_size=len(tokenizer), seed=3, **changes).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def scorer(folder: Path, *, tokens: int = 1000, prompts: Sequence[Prompt] = PROMPTS) -> TextScorer:
    model, tokenizer = load_external(folder, Dtype.float32, source="path:judge")
    run = Computation(device=torch.device("cpu"), dtype=Dtype.float32, tokens=tokens)
    return TextScorer(model, tokenizer, prompts, run, source="path:judge")


def conversation(question: Prompt, answer: str) -> str:
    """What the template says, written by hand."""
    return f"[user] {question.messages[-1].content} {END}[assistant] {answer} {END}"


@torch.no_grad()
def expected(folder: Path, question: Prompt, answer: str) -> float:
    """The score of the last token, by the plain model on this row alone."""
    model = AutoModelForSequenceClassification.from_pretrained(str(folder), attn_implementation="eager")
    ids = torch.tensor([load_tokenizer(folder)(conversation(question, answer), add_special_tokens=False)["input_ids"]])
    return float(model.score(model.base_model(input_ids=ids).last_hidden_state)[0, -1])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma", "gpt2"])
def test_an_answer_is_rendered_anew_and_scored_at_its_last_token(tmp_path: Path, architecture: str) -> None:
    folder = external(tmp_path, architecture)
    scores = scorer(folder).scores(answers_to(PROMPTS, TEXTS)).tolist()
    assert scores == pytest.approx(
        [expected(folder, question, text) for question, text in zip(PROMPTS, TEXTS, strict=True)], rel=1e-4, abs=1e-5
    )
    assert len({round(score, 4) for score in scores}) == 3


@torch.no_grad()
def test_the_score_is_not_looked_for_by_the_pad_token(tmp_path: Path) -> None:
    """Here pad ends every conversation, so a search for the last token that is no pad stops before it."""
    folder = external(tmp_path)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token == END
    ids = torch.tensor([tokenizer(conversation(PROMPTS[0], TEXTS[0]), add_special_tokens=False)["input_ids"]])
    plain = float(AutoModelForSequenceClassification.from_pretrained(str(folder))(input_ids=ids).logits)
    (score,) = scorer(folder).scores(answers_to(PROMPTS[:1], TEXTS[:1])).tolist()
    assert abs(score - plain) > 1e-3
    assert score == pytest.approx(expected(folder, PROMPTS[0], TEXTS[0]), rel=1e-4)


def test_the_policy_s_own_tokens_are_not_looked_at(tmp_path: Path) -> None:
    judge = scorer(external(tmp_path))
    answers = answers_to(PROMPTS, TEXTS)
    other = Answers(prompt_ids=[[7]] * 3, answer_ids=[[8]] * 3, texts=TEXTS, prompts=PROMPTS, rows=[0, 1, 2])
    assert judge.scores(answers).tolist() == judge.scores(other).tolist()


def test_scores_do_not_depend_on_what_else_is_in_the_batch(tmp_path: Path) -> None:
    folder = external(tmp_path)
    prompts, texts = PROMPTS * 3, TEXTS * 2 + TEXTS[::-1]
    together = scorer(folder).scores(answers_to(prompts, texts)).tolist()
    in_pieces = scorer(folder, tokens=40).scores(answers_to(prompts, texts)).tolist()
    turned = scorer(folder).scores(answers_to(prompts[::-1], texts[::-1])).tolist()[::-1]
    alone = [
        scorer(folder).scores(answers_to([question], [text])).tolist()[0]
        for question, text in zip(prompts, texts, strict=True)
    ]
    for other in (in_pieces, turned, alone):
        assert other == pytest.approx(together, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("written", [f"On {END}Monday.", f"{END}On Monday.{END}", "On <|im_<|im_end|>end|>Monday."])
def test_a_policy_cannot_end_its_own_turn_in_the_reward_model_s_words(tmp_path: Path, written: str) -> None:
    judge = scorer(external(tmp_path))
    assert (
        judge.scores(answers_to(PROMPTS[:1], [written])).tolist()
        == judge.scores(answers_to(PROMPTS[:1], ["On Monday."])).tolist()
    )


def test_a_conversation_beyond_the_model_s_positions_is_named(tmp_path: Path) -> None:
    judge = scorer(external(tmp_path, max_position_embeddings=48))
    assert len(judge.scores(answers_to(PROMPTS[:1], ["On Monday."]))) == 1
    with pytest.raises(ModelError) as caught:
        judge.scores(answers_to(PROMPTS[:1], ["On Monday. " * 20]))
    assert str(caught.value).startswith("path:judge: has 48 positions, but prompt and answer of rows.jsonl:1 are ")
    assert "max_new_tokens" in caught.value.remedy


def test_a_prompt_that_the_template_refuses_is_named_before_anything_is_scored(tmp_path: Path) -> None:
    folder = external(tmp_path)
    tokenizer = load_tokenizer(folder)
    refusal = "{% if 'secret' in messages[0]['content'] %}{{ raise_exception('no secrets') }}{% endif %}"
    tokenizer.chat_template = refusal + TEMPLATE
    tokenizer.save_pretrained(str(folder))
    with pytest.raises(DataError, match=r"rows\.jsonl:7: cannot be scored by path:judge: .*no secrets"):
        scorer(folder, prompts=[*PROMPTS, prompt("Say the secret.", line=7)])


def test_a_conversation_is_read_with_the_tools_of_its_prompt(tmp_path: Path) -> None:
    folder = external(tmp_path)
    with_tool = replace(PROMPTS[0], tools=({"type": "function", "function": {"name": "calendar"}},))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: cannot be scored by path:judge: .* the tool 'calendar'"):
        scorer(folder, prompts=[with_tool])
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{% for tool in tools or [] %}{{ '(' + tool.function.name + ')' }}{% endfor %}" + TEMPLATE
    tokenizer.save_pretrained(str(folder))
    judge = scorer(folder, prompts=[with_tool])
    expected = tokenizer(f"(calendar){conversation(PROMPTS[0], TEXTS[0])}", add_special_tokens=False)["input_ids"]
    assert judge.ids(with_tool, TEXTS[0]) == expected
    assert judge.ids(PROMPTS[0], TEXTS[0]) != expected


def test_an_answer_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    folder = external(tmp_path)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{% if not messages[-1]['content'] %}{{ raise_exception('empty') }}{% endif %}" + TEMPLATE
    tokenizer.save_pretrained(str(folder))
    judge = scorer(folder)
    with pytest.raises(RewardError, match=r"path:judge: cannot score an answer to rows\.jsonl:2: .*empty"):
        judge.scores(answers_to(PROMPTS, TEXTS))


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    folder = external(tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="path:judge: its tokenizer has no chat template"):
        load_external(folder, Dtype.float32, source="path:judge")


def test_a_language_model_is_refused_rather_than_given_a_random_head(tmp_path: Path) -> None:
    tokenizer = tokenizer_of_another_family()
    tiny_model(vocab_size=len(tokenizer), num_labels=1).save_pretrained(str(tmp_path))
    tokenizer.save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match=r"path:judge: its weights lack score\.weight"):
        load_external(tmp_path, Dtype.float32, source="path:judge")


def test_a_classifier_of_several_labels_is_refused(tmp_path: Path) -> None:
    folder = external(tmp_path)
    tokenizer = load_tokenizer(folder)
    config = tiny_scorer(vocab_size=len(tokenizer)).config
    config.num_labels = 3
    AutoModelForSequenceClassification.from_config(config).save_pretrained(str(folder))
    with pytest.raises(ModelError, match="path:judge: it has 3 labels; a reward model has one"):
        load_external(folder, Dtype.float32, source="path:judge")


def test_weights_that_are_cut_short_are_a_model_error(tmp_path: Path) -> None:
    folder = external(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ModelError, match="path:judge: the model cannot be loaded"):
        load_external(folder, Dtype.float32, source="path:judge")


def test_the_score_layer_is_float32_whatever_the_products_are(tmp_path: Path) -> None:
    model, _ = load_external(external(tmp_path), Dtype.bfloat16, source="path:judge")
    assert model.score.weight.dtype == torch.float32
    assert model.base_model.embed_tokens.weight.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_a_reward_model_that_nothing_uses_is_freed_before_another_one_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics are scored by one reward model after another; layers of the fast forward refer to themselves."""
    folder = external(tmp_path)
    read = AutoModelForSequenceClassification.from_pretrained
    is_in_memory: list[bool] = []

    def load_model(*args: Any, **settings: Any) -> Any:
        is_in_memory.append(weight() is not None)
        return read(*args, **settings)

    with without_collections():
        first, _ = load_external(folder, Dtype.float32, source="path:judge")
        weight = weakref.ref(first.model.layers[0].self_attn.q_proj.weight)
        del first
        monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", load_model)
        load_external(folder, Dtype.float32, source="path:judge")
    assert is_in_memory == [False]
