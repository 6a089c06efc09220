"""Before the first stage it is tried whether the base model fits the later ones: its positions and its architecture."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from alignment.config.sampling_engine import Engine, SamplingConfig
from alignment.config.scoring import MetricConfig
from alignment.core.errors import DataError, ModelError
from alignment.job import StageInput
from alignment.pipeline.plan.plan import Plan
from alignment.stages.evaluate import arm_base as evaluate_check
from alignment.stages.evaluate.config import EvaluateConfig
from alignment.stages.forgetting.config import ForgettingConfig
from alignment.stages.registry import kind_of
from alignment.stages.sample.config import SampleConfig
from alignment.stages.sample.sampled_base import refuse_base
from alignment.training.context import StageContext
from tests.tiny import tiny_spec
from tests.unit.pipeline.conftest import NUM_PAIRS, MakePlan, leave_artifact
from tests.unit.pipeline.test_rehearsal import Commands, stages_in, started, tried

__all__ = ["started", "tried"]
CHECKED = "checked before any training: "
CACHING_A_STATE = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "layer_types": ["full_attention", "linear_attention"],
}
TINY = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "vocab_size": 64,
}
LONG = "z" * 2100
"""Not shorter in tokens."""


def write_config(folder: Path, **settings: object) -> None:
    (folder / "model/config.json").write_text(json.dumps(settings))


def write_rows(file: Path, *questions: str, answer: str = "") -> None:
    answers = [{"role": "assistant", "content": answer}] if answer else []
    rows = [{"messages": [{"role": "user", "content": question}, *answers]} for question in questions]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_held_out_prompts_that_are_too_long_are_refused_with_the_longest(
    tried: Callable[..., Plan], tmp_path: Path
) -> None:
    write_config(tmp_path, max_position_embeddings=2048)
    write_rows(tmp_path / "heldout.jsonl", "When?", f"When {LONG}?", f"When, when {LONG}?", "Where?")
    with pytest.raises(ModelError) as caught:
        tried("stages.evaluate.metrics=[]")
    assert str(caught.value).startswith(f"stage evaluate, {CHECKED}{tmp_path}/heldout.jsonl:3: ")
    assert "needs more than the 2048 positions of path:" in str(caught.value)
    assert "; 2 of 4 rows are too long\n" in str(caught.value)
    assert "leave out rows that are too long, or lower stages.evaluate.max_new_tokens" in str(caught.value)
    write_config(tmp_path, max_position_embeddings=4096)
    tried("stages.evaluate.metrics=[]")
    with pytest.raises(ModelError, match="an answer of up to 2000 tokens"):
        tried("stages.evaluate.metrics=[]", "stages.evaluate.max_new_tokens=2000")


def test_rows_that_a_stage_allows_but_the_model_cannot_read_are_refused(
    tried: Callable[..., Plan], tmp_path: Path
) -> None:
    """A later stage would otherwise find out after earlier ones have trained."""
    write_config(tmp_path, max_position_embeddings=2048)
    row = {"messages": [{"role": "user", "content": "When?"}], "chosen": LONG, "rejected": "Soon."}
    with (tmp_path / "preferences.jsonl").open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    tried("stages.evaluate.metrics=[]")
    with pytest.raises(ModelError) as caught:
        tried("stages.evaluate.metrics=[]", "stages.dpo.max_length=4096")
    assert str(caught.value).startswith(f"stage dpo, {CHECKED}{tmp_path}/preferences.jsonl:{NUM_PAIRS + 1}: a row of ")
    assert " is longer than the model's 2048 positions" in str(caught.value)
    tried(
        "stages.evaluate.metrics=[]", "stages.dpo.max_length=4096", "stages.dpo.data.fraction=0.9"
    )  # it may be left out
    with pytest.raises(ModelError, match=r"stage ppo, .*preferences.jsonl:1: a row of \d+ tokens is longer"):
        tried("stages.evaluate.metrics=[]", "stages.ppo.max_new_tokens=2040")


def test_held_out_prompts_are_tried_with_their_tools(tried: Callable[..., Plan], tmp_path: Path) -> None:
    """They count as tokens, and a template that leaves them out would end the evaluation."""
    write_config(tmp_path, max_position_embeddings=2048)
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    row = {"messages": [{"role": "user", "content": "2 + 2?"}], "tools": [tool]}
    (tmp_path / "heldout.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="the chat template leaves out"):
        tried("stages.evaluate.metrics=[]")


def test_held_out_prompts_are_refused_that_are_longer_than_before_longrope_changes_its_frequencies(
    tried: Callable[..., Plan], tmp_path: Path
) -> None:
    factors = {"short_factor": [1.0] * 64, "long_factor": [4.0] * 64}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 2048, **factors}
    write_config(tmp_path, model_type="llama", max_position_embeddings=131072, rope_parameters=rope)
    write_rows(tmp_path / "heldout.jsonl", f"When {LONG}?")
    with pytest.raises(ModelError, match=r"2048 positions of path:\S+ before LongRoPE changes its frequencies; 1 of 1"):
        tried("stages.evaluate.metrics=[]")


@pytest.mark.parametrize(
    "rows",
    [
        [
            {"messages": [{"role": "user", "content": "When?"}], "reference": "Soon."},
            {"messages": [{"role": "user", "content": "Where?"}], "reference": LONG},
        ],
        [
            {"turns": ["When?", "When then?"], "reference": ["Soon.", "Now."]},
            {"turns": ["Where?", "Where then?"], "reference": ["Here.", LONG]},
        ],
    ],
    ids=["first turn", "second turn"],
)
def test_reference_answers_that_are_too_long_are_refused_with_their_row(
    tried: Callable[..., Plan], tmp_path: Path, rows: list[dict[str, object]]
) -> None:
    """Every arm of the run reads them, although it answers in few tokens."""
    write_config(tmp_path, max_position_embeddings=2048)
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ModelError) as caught:
        tried("stages.evaluate.metrics=[]")
    beginning = f"stage evaluate, {CHECKED}{tmp_path}/heldout.jsonl:2: with its prompt and its reference answer of "
    assert str(caught.value).startswith(beginning)
    assert "needs more than the 2048 positions of path:" in str(caught.value)
    assert "; 1 of 2 rows are too long\n" in str(caught.value)
    write_config(tmp_path, max_position_embeddings=4096)
    tried("stages.evaluate.metrics=[]")


def test_choices_that_are_too_long_are_refused_where_a_metric_reads_them(
    tried: Callable[..., Plan], tmp_path: Path
) -> None:
    write_config(tmp_path, max_position_embeddings=2048)
    rows = [{"question": "When?", "choices": ["Soon.", last], "answer": 0} for last in ("Now.", LONG)]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tried("stages.evaluate.metrics=[]")
    with pytest.raises(ModelError) as caught:
        tried("stages.evaluate.metrics=[{name: knows, source: choice}]")
    beginning = f"stage evaluate, {CHECKED}{tmp_path}/heldout.jsonl:2: with its prompt and its choices of "
    assert str(caught.value).startswith(beginning)


def test_the_examples_before_a_prompt_count(tried: Callable[..., Plan], tmp_path: Path) -> None:
    write_config(tmp_path, max_position_embeddings=2048)
    write_rows(tmp_path / "examples.jsonl", "Why?", answer=LONG)
    tried("stages.evaluate.arms=[base, 'stage:sft']", "stages.evaluate.metrics=[]")
    with pytest.raises(ModelError, match=r"the arm 'base\+few-shot' needs more than the 2048 positions") as caught:
        tried(
            "stages.evaluate.arms=[base, base+few-shot, 'stage:sft']",
            "stages.evaluate.metrics=[]",
            "stages.evaluate.few_shot.count=1",
            f"stages.evaluate.few_shot.data.source=path:{tmp_path}/examples.jsonl",
        )
    assert "or lower stages.evaluate.max_new_tokens or stages.evaluate.few_shot.count" in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "adapter", "setting"),
    [
        ("mixtral", {"kind": "dora"}, "target_modules"),
        ("mixtral", {"kind": "dora", "target_modules": ["q_proj"]}, ""),
        ("mixtral", {"kind": "lora"}, ""),
        ("llama", {"kind": "dora"}, ""),
        ("llama", {"kind": "prefix"}, ""),
        ("llama", {"kind": "qlora", "target_modules": ["c_attn"]}, "target_modules"),
        ("llama", {"kind": "lora", "modules_to_save": ["wte"]}, "modules_to_save"),
    ],
)
def test_an_adapter_that_does_not_fit_the_base_is_refused_before_an_earlier_stage_trains(
    tried: Callable[..., Plan], tmp_path: Path, model_type: str, adapter: dict[str, object], setting: str
) -> None:
    write_config(tmp_path, **TINY, model_type=model_type)
    settings = [f"stages.dpo.adapter.{name}={value}" for name, value in adapter.items()]
    where = rf"^stage dpo, {CHECKED}adapter\.{setting}: "
    with pytest.raises(ModelError, match=where) if setting else nullcontext():
        tried("stages.evaluate.metrics=[]", *settings)


def test_a_base_without_scores_is_refused_where_a_reward_model_is_trained(
    tried: Callable[..., Plan], tmp_path: Path
) -> None:
    write_config(tmp_path, model_type="olmoe")
    with pytest.raises(ModelError, match=rf"^stage reward, {CHECKED}path:.* no model with a score .* 'olmoe'"):
        tried()


def test_a_base_without_scores_is_refused_only_with_a_critic_of_its_own(
    plan: MakePlan, tried: Callable[..., Plan], tmp_path: Path
) -> None:
    write_config(tmp_path, model_type="olmoe")
    for stage in plan().stages[:2]:
        leave_artifact(stage)
    tried("stages.ppo.critic=shared")
    with pytest.raises(ModelError, match=rf"^stage ppo, {CHECKED}path:.*\n.* PPO has critic=shared or none"):
        tried("stages.ppo.critic=separate")


def test_a_base_that_scales_its_logits_is_refused_where_its_log_probabilities_are_needed(
    plan: MakePlan, tried: Callable[..., Plan], tmp_path: Path
) -> None:
    write_config(tmp_path, model_type="llama", num_hidden_layers=1, output_multiplier=0.5)
    with pytest.raises(ModelError, match=rf"^stage ppo, {CHECKED}model\.source: LlamaForCausalLM scales its logits"):
        tried("stages.evaluate.metrics=[]")
    for stage in plan().stages[:3]:
        leave_artifact(stage)
    with pytest.raises(ModelError, match=rf"^stage evaluate, {CHECKED}model\.source: LlamaForCausalLM scales its"):
        tried("stages.evaluate.metrics=[]")


@pytest.mark.parametrize(
    ("row", "source", "refused"),
    [
        ({"messages": [{"role": "user", "content": "When?"}]}, "length", False),
        ({"messages": [{"role": "user", "content": "When?"}], "reference": "Soon."}, "length", True),
        ({"question": "When?", "choices": ["Soon.", "Now."], "answer": 0}, "choice", True),
    ],
)
def test_an_arm_without_another_to_compare_it_with_still_scores_references_and_choices(
    tmp_path: Path, row: dict[str, object], source: str, refused: bool
) -> None:
    (tmp_path / "model").mkdir()
    write_config(tmp_path, model_type="llama", num_hidden_layers=1, output_multiplier=0.5)
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    of_base = StageInput(ref="base", path=None)
    config = EvaluateConfig(arms=["base"], metrics=[MetricConfig(name="score", source=source)])
    parts = {"base_path": tmp_path / "model", "inputs": {"reference": of_base}, "arms": {"base": of_base}}
    context = StageContext(spec=tiny_spec(tmp_path, config, **parts), rank=1, world_size=2)
    with pytest.raises(ModelError, match="scales its logits") if refused else nullcontext():
        evaluate_check.refuse_base(config, context)


def test_a_base_that_scales_its_logits_is_refused_before_forgetting_is_measured(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    config = ForgettingConfig(arms=["stage:sft"])
    module, _, function = kind_of(config).rehearse.partition(":")
    check = getattr(importlib.import_module(module), function)
    for name, settings in (("plain", {}), ("scaled", {"output_multiplier": 0.5})):
        write_config(tmp_path, model_type="llama", num_hidden_layers=1, **settings)
        spec = tiny_spec(tmp_path / name, config, base_path=tmp_path / "model", inputs={})
        with pytest.raises(ModelError, match="LlamaForCausalLM scales its") if settings else nullcontext():
            check(config, StageContext(spec=spec, rank=0, world_size=1))


def test_a_base_that_caches_a_state_is_refused_where_it_is_sampled_from(
    tried: Callable[..., Plan], tmp_path: Path
) -> None:
    write_config(tmp_path, **CACHING_A_STATE)
    with pytest.raises(ModelError, match=rf"^stage ppo, {CHECKED}model\.source: generation does not support layers"):
        tried("stages.evaluate.metrics=[]")


def test_a_policy_that_caches_a_state_is_sampled_from_by_an_engine_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_config(tmp_path, **CACHING_A_STATE)
    for engine in Engine:
        config = SampleConfig(sampling=SamplingConfig(engine=engine))
        inputs = {"policy": StageInput(ref="base", path=None)}
        spec = tiny_spec(tmp_path / engine.value, config, base_path=tmp_path / "model", inputs=inputs)
        with pytest.raises(ModelError, match="that cache a Linear") if engine is Engine.own else nullcontext():
            refuse_base(config, StageContext(spec=spec, rank=0, world_size=1))


def test_policies_that_began_as_another_model_are_not_measured_by_the_base(
    tried: Callable[..., Plan], started: Commands, tmp_path: Path
) -> None:
    write_config(tmp_path, model_type="olmoe", max_position_embeddings=4)
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    tried(f"stages.sft.init=path:{tmp_path}/other")
    assert [stages_in(command) for command in started] == [["--rows", "--scorers", "ppo", "evaluate", "--model"]]
