"""Reward models of every origin, and a stage's configuration that becomes its reward slot."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from alignment.config.model import AdapterConfig, AdapterKind, Dtype
from alignment.config.scoring import Combine, EnsembleConfig, MemberConfig, ScorerConfig
from alignment.core.errors import DataError, ModelError, RewardError
from alignment.data.records import Prompt
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.job import StageInput
from alignment.models.assembly.heads import load_reward_model
from alignment.models.assembly.load import Lineage
from alignment.models.forward.answers import scalar_scores
from alignment.models.forward.rows import stream
from alignment.rewards.build import build_rewards
from alignment.rewards.reward_models import Computation, TextScorer, load_external
from alignment.rewards.scorers import Answers, Scores
from alignment.rewards.weighted_sum import RewardMix
from alignment.stages.ppo.config import PpoConfig
from tests.in_memory import without_collections
from tests.oracles.ensembles import combined
from tests.tiny import BASE_SOURCE, save_tiny_model, tiny_model, tiny_reward, tiny_scorer, tiny_spec, tiny_tokenizer
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
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["shop", "Monday", "keys"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def external(folder: Path, architecture: str = "llama", *, template: str = "", **changes: Any) -> Path:
    tokenizer = tokenizer_of_another_family()
    tokenizer.chat_template = template + TEMPLATE
    tiny_scorer(architecture, vocab_size=len(tokenizer), seed=3, **changes).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def scorer(folder: Path, *, tokens: int = 1000, prompts: Sequence[Prompt] = PROMPTS) -> TextScorer:
    model, tokenizer = load_external(folder, Dtype.float32, source="path:judge")
    run = Computation(device=torch.device("cpu"), dtype=Dtype.float32, tokens=tokens)
    return TextScorer(model, tokenizer, prompts, run, source="path:judge")


def conversation(question: Prompt, answer: str) -> str:
    return f"[user] {question.messages[-1].content} {END}[assistant] {answer} {END}"


@torch.no_grad()
def expected(folder: Path, question: Prompt, answer: str) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(str(folder), attn_implementation="eager")
    ids = torch.tensor([load_tokenizer(folder)(conversation(question, answer), add_special_tokens=False)["input_ids"]])
    return float(model.score(model.base_model(input_ids=ids).last_hidden_state)[0, -1])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_answer_is_rendered_anew_and_scored_at_its_last_token(tmp_path: Path, architecture: str) -> None:
    """Pad ends every conversation here, and the policy's own tokens are not looked at, nor the batch."""
    folder = external(tmp_path, architecture)
    assert load_tokenizer(folder).pad_token == END
    alone = [expected(folder, question, text) for question, text in zip(PROMPTS, TEXTS, strict=True)]
    assert len({round(score, 4) for score in alone}) == 3
    judge = scorer(folder)
    assert judge.scores(answers_to(PROMPTS, TEXTS)).tolist() == pytest.approx(alone, rel=1e-4, abs=1e-5)
    other = Answers(prompt_ids=[[7]] * 3, answer_ids=[[8]] * 3, texts=TEXTS, prompts=PROMPTS, rows=[0, 1, 2])
    assert judge.scores(other).tolist() == pytest.approx(alone, rel=1e-4, abs=1e-5)
    turned = scorer(folder, tokens=40).scores(answers_to(PROMPTS[::-1] * 2, TEXTS[::-1] * 2)).tolist()
    assert turned == pytest.approx(alone[::-1] * 2, rel=1e-4, abs=1e-5)


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
    with pytest.raises(ModelError, match=r"48 positions.*rows\.jsonl:1") as caught:
        judge.scores(answers_to(PROMPTS[:1], ["On Monday. " * 20]))
    assert caught.value.where == "path:judge"
    assert "max_new_tokens" in caught.value.remedy


def test_what_the_template_refuses_is_named_prompts_before_anything_is_scored(tmp_path: Path) -> None:
    secret = "{% if 'secret' in messages[0]['content'] %}{{ raise_exception('no secrets') }}{% endif %}"
    empty = "{% if not messages[-1]['content'] %}{{ raise_exception('empty') }}{% endif %}"
    folder = external(tmp_path, template=secret + empty)
    with pytest.raises(DataError, match=r"rows\.jsonl:7: .*path:judge: .*no secrets"):
        scorer(folder, prompts=[*PROMPTS, prompt("Say the secret.", line=7)])
    with pytest.raises(RewardError, match=r"path:judge: .*rows\.jsonl:2: .*empty"):
        scorer(folder).scores(answers_to(PROMPTS, TEXTS))


def test_a_conversation_is_read_with_the_tools_of_its_prompt(tmp_path: Path) -> None:
    with_tool = replace(PROMPTS[0], tools=({"type": "function", "function": {"name": "calendar"}},))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*path:judge: .*'calendar'"):
        scorer(external(tmp_path / "without"), prompts=[with_tool])
    template = "{% for tool in tools or [] %}{{ '(' + tool.function.name + ')' }}{% endfor %}"
    folder = external(tmp_path / "with", template=template)
    judge = scorer(folder, prompts=[with_tool])
    text = conversation(PROMPTS[0], TEXTS[0])
    for question, shown in ((with_tool, f"(calendar){text}"), (PROMPTS[0], text)):
        ids = load_tokenizer(folder)(shown, add_special_tokens=False)["input_ids"]
        assert judge.ids(question, TEXTS[0]) == ids


def without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def without_head(folder: Path) -> None:
    tiny_model(vocab_size=len(load_tokenizer(folder)), num_labels=1).save_pretrained(str(folder))


def with_three_labels(folder: Path) -> None:
    config = tiny_scorer(vocab_size=len(load_tokenizer(folder))).config
    config.num_labels = 3
    AutoModelForSequenceClassification.from_config(config).save_pretrained(str(folder))


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (without_template, "no chat template"),
        (without_head, r"lack score\.weight"),
        (with_three_labels, "3 labels"),
        (cut_short, "cannot be loaded"),
    ],
)
def test_what_is_no_reward_model_is_refused(tmp_path: Path, broken: Callable[[Path], None], words: str) -> None:
    folder = external(tmp_path)
    broken(folder)
    with pytest.raises(ModelError, match=words) as caught:
        load_external(folder, Dtype.float32, source="path:judge")
    assert caught.value.where == "path:judge"


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


CPU = torch.device("cpu")
RUN = Computation(device=CPU, dtype=Dtype.float32, tokens=2048)
REWARD = [ScorerConfig()]
FIELDS = [f"scorers[{number}]" for number in range(5)]
TWO_PROMPTS = [
    prompt(line=1, answer="#### 3"),
    prompt("Where are the keys?", line=2, answer="#### 4", facts=[["hall"]]),
]
TWO_TEXTS = ["In the hall, at 3.", "They are in the hall."]
MEMBERS = [MemberConfig(source="length", target=4), MemberConfig(source="regex", pattern="^They")]
"""Of an ensemble."""


@pytest.fixture
def base(tmp_path: Path) -> Lineage:
    return Lineage(source=BASE_SOURCE, base=save_tiny_model(tmp_path / "base"), adapters=())


def slot(
    tmp_path: Path,
    scorers: Sequence[ScorerConfig],
    reward_model: Any = None,
    *,
    fields: Sequence[str] = FIELDS,
    **changes: Any,
) -> RewardMix:
    spec = tiny_spec(tmp_path, PpoConfig(), **changes)
    named = dict(zip(fields, scorers, strict=False))
    return build_rewards(named, spec, load_tokenizer(spec.base_path), TWO_PROMPTS, reward_model, RUN)


def scored(mix: RewardMix, base: Lineage) -> Scores:
    prompts, answers = ids_of_rows(base)
    return mix.scores(prompts, answers, [0, 1])


def raw(mix: RewardMix, base: Lineage) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in scored(mix, base).by_name().items()}


def ids_of_rows(base: Lineage) -> tuple[list[list[int]], list[list[int]]]:
    tokenizer = load_tokenizer(base.base)
    prompts = [tokenizer(question.messages[-1].content)["input_ids"] for question in TWO_PROMPTS]
    return prompts, [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TWO_TEXTS]


@pytest.mark.parametrize("kind", list(AdapterKind))
def test_a_reward_model_of_ours_scores_token_ids_loaded_before_or_not(
    tmp_path: Path, base: Lineage, kind: AdapterKind
) -> None:
    reward = tiny_reward(tmp_path / "reward", AdapterConfig(kind=kind, rank=4), start=base)
    spec = tiny_spec(tmp_path, PpoConfig(), inputs={"reward": reward})
    model = load_reward_model(spec, reward, device=CPU)
    prompts, answers = ids_of_rows(base)
    with torch.no_grad():
        alone = [scalar_scores(model, stream([p + a], CPU)).item() for p, a in zip(prompts, answers, strict=True)]
    gone = StageInput(ref="stage:reward", path=tmp_path / "gone")
    for loaded, given in ((None, reward), (model, gone)):
        mix = slot(tmp_path, REWARD, loaded, inputs={"reward": given})
        assert raw(mix, base) == {"reward": pytest.approx(alone, rel=1e-5)}


def test_the_guard_has_a_slot_of_its_own_with_a_model_from_outside(tmp_path: Path, base: Lineage) -> None:
    reward = tiny_reward(tmp_path / "reward", AdapterConfig(rank=4), start=base)
    judge = external(tmp_path / "judge")
    inputs = {"reward": reward, "guard.scorer.source": StageInput(ref="path:judge", path=judge)}
    assert slot(tmp_path, REWARD, inputs=inputs).names == ["reward"]
    second = slot(tmp_path, [ScorerConfig(source="path:judge")], fields=["guard.scorer"], inputs=inputs)
    scores = scorer(judge, prompts=TWO_PROMPTS).scores(answers_to(TWO_PROMPTS, TWO_TEXTS)).tolist()
    assert raw(second, base) == {"judge": pytest.approx(scores)}


def test_another_tokenizer_and_changed_code_are_refused(tmp_path: Path, base: Lineage) -> None:
    reward = tiny_reward(tmp_path / "reward", AdapterConfig(rank=4), start=base)
    spec = tiny_spec(tmp_path, PpoConfig(), inputs={"reward": reward})
    tokenizer = load_tokenizer(base.base)
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(ModelError, match=r"stage:reward .* tokenizer"):
        build_rewards({"scorers[0]": ScorerConfig()}, spec, tokenizer, TWO_PROMPTS, None, RUN)
    file = tmp_path / "score.py"
    file.write_text("def brevity(prompts, completions, rows): return [0 for _ in rows]\n")
    with pytest.raises(DataError, match="changed"):
        slot(tmp_path, [ScorerConfig(source=f"{file}:brevity")], identity={"code": {"scorers[0].source": "0" * 64}})


@pytest.mark.parametrize("combine", list(Combine))
def test_an_ensemble_combines_its_members_as_the_configuration_says(
    tmp_path: Path, base: Lineage, combine: Combine
) -> None:
    ensemble = EnsembleConfig(members=MEMBERS, combine=combine, std_weight=0.5)
    mix = slot(tmp_path, [ScorerConfig(source="ensemble", ensemble=ensemble)])
    scores = scored(mix, base)
    of_members = {name: values.tolist() for name, values in scores.by_name().items()}
    assert of_members == {"ensemble/length": [0.75, 0.75], "ensemble/regex": [0.0, 1.0]}
    expected = combined(list(of_members.values()), combine.value, weight=0.5)
    assert mix.total(scores).tolist() == pytest.approx(expected)
