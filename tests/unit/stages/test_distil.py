"""Distillation as the stage computes it, against the papers' formulas in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import TaskType
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alignment import worker
from alignment.config.adapter import AdapterConfig
from alignment.core.artifacts import verify
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.evaluation.bootstrap import Intervals
from alignment.job import StageInput
from alignment.models.assembly.load import lineage, load_policy
from alignment.models.forward.generate import Sampling, generate
from alignment.records.distillation import Distillation
from alignment.stages.distil import run as distil
from alignment.stages.distil import student_comparison
from alignment.stages.distil.config import Method
from alignment.stages.distil.distil_trainer import DistilTrainer
from alignment.stages.distil.student import student_of
from alignment.stages.distil.student_comparison import figures_of, frozen_model, sums_of_answers
from alignment.stages.distil.taught_rows import HeldOutAnswers
from alignment.stages.registry import kind_named
from alignment.stages.shared import answer_sampling
from alignment.stages.shared.arm_policies import asked_tokenizer
from alignment.stages.shared.initial import initial_model
from alignment.training.callbacks import Checkpoints
from alignment.training.context import StageContext
from tests.chained import LORA
from tests.distilled import BASE, FULL, distil_spec, distilled
from tests.in_memory import others_at_each_load, without_collections
from tests.oracles import distillation as oracle
from tests.oracles.close import close
from tests.oracles.logprobs import log_softmax
from tests.tiny import save_tiny_model

TEMPERATURE = 0.7
ROWS = [([3, 4, 5, 6], [7, 8, 2]), ([9] * 30, [10, 11]), ([12, 13], [14, 15, 16, 17, 2]), ([18] * 25, [19])]
"""Prompts and answers of unequal lengths, which are cut into several micro-batches."""


def lines(artifact: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (artifact / "metrics.jsonl").read_text().splitlines()]


def trainer_of(folder: Path, adapter: AdapterConfig = FULL, **changes: Any) -> DistilTrainer:
    """The trainer of a stage that is about to learn ``ROWS``, all in one batch."""
    spec = distil_spec(folder, adapter=adapter, loss_temperature=TEMPERATURE, **changes)
    context = StageContext(spec=spec, rank=0, world_size=1)
    config: Any = spec.config
    tokenizer = asked_tokenizer(context, field="teacher")
    start = student_of(config, context, tokenizer)
    teacher = frozen_model(context, lineage(spec, spec.inputs["teacher"]))
    policy = initial_model(context, start, TaskType.CAUSAL_LM, may_drop=False)
    rows = {
        "input_ids": [prompt + answer for prompt, answer in ROWS],
        "labels": [[-100] * len(prompt) + answer for prompt, answer in ROWS],
    }
    return distil.distil_trainer(config, context, policy, teacher, tokenizer, Dataset.from_dict(rows))


def step(trainer: DistilTrainer) -> float:
    """The loss of the batch of all rows, with its gradients in the model."""
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    assert len(trainer._micro_batches(batch)) > 1
    _, tokens = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    return float(trainer.training_step(trainer.model, batch, tokens))


def answer_logits(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """``[answer, vocabulary]`` in float64, from a plain pass over this row alone."""
    return model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()


@pytest.mark.parametrize("adapter", [FULL, LORA], ids=["full", "lora"])
def test_the_loss_and_its_gradient_are_those_of_the_papers(tmp_path: Path, adapter: AdapterConfig) -> None:
    """The mean over all answer tokens of the batch, whatever its micro-batches; the teacher has another layer."""
    trainer = trainer_of(tmp_path, adapter)
    teacher = AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"))
    student = trainer.model.get_base_model() if adapter is LORA else trainer.model
    flat = student.config._attn_implementation
    student.set_attn_implementation("eager")
    values, same, accepted, total = [], 0, 0.0, 0.0
    for prompt, answer in ROWS:
        with torch.no_grad():
            taught = answer_logits(teacher, prompt, answer).tolist()
        logits = answer_logits(student, prompt, answer)
        pairs = list(zip(taught, logits.tolist(), strict=True))
        values.append([oracle.forward_kl(*pair, TEMPERATURE) for pair in pairs])
        accepted += sum(oracle.acceptance(*pair, TEMPERATURE) for pair in pairs)
        same += sum(own.index(max(own)) == other.index(max(other)) for own, other in pairs)
        slopes = torch.tensor([oracle.slopes(*pair, TEMPERATURE) for pair in pairs], dtype=torch.float64)
        total = total + (slopes * logits).sum()
    tokens = sum(len(answer) for _, answer in ROWS)
    (total / tokens).backward()  # type: ignore[attr-defined]
    expected = gradients(trainer)
    trainer.model.zero_grad()
    student.set_attn_implementation(flat)
    close(step(trainer), oracle.mean_over_answers(values, [[True] * len(row) for row in values]), rtol=1e-4)
    close(gradients(trainer), expected, rtol=1e-4, atol=1e-6)
    assert float(expected.abs().max()) > 1e-3
    metrics = trainer._metrics["train"]
    close(metrics["acceptance"], [accepted / tokens], rtol=1e-4)
    assert metrics["same_top"] == [same / tokens]
    assert metrics["num_tokens"] == [sum(len(prompt) + len(answer) for prompt, answer in ROWS)]


def gradients(trainer: DistilTrainer) -> torch.Tensor:
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    return torch.cat([weight.grad.flatten().double() for weight in trained])


@pytest.mark.parametrize("adapter", [FULL, LORA], ids=["full", "lora"])
def test_a_student_equal_to_its_teacher_has_a_loss_of_zero_and_learns_nothing(
    tmp_path: Path, adapter: AdapterConfig
) -> None:
    artifact = distilled(tmp_path, layers=None, adapter=adapter)
    for line in lines(artifact):
        assert (line["loss"], line["grad_norm"], line["same_top"]) == (0.0, 0.0, 1.0)
        assert line["acceptance"] == pytest.approx(1.0, abs=1e-6)
    record = Distillation.read(artifact)
    for figures in (record.before, record.after):
        assert figures.divergence.mean == 0.0
        assert figures.acceptance.mean == pytest.approx(1.0, abs=1e-6)
        assert figures.tokens_per_step.mean == pytest.approx(5.0, abs=1e-5)


def test_what_is_learned_brings_the_student_nearer_to_its_teacher(tmp_path: Path) -> None:
    artifact = distilled(tmp_path, optim={"epochs": 25.0}, save_every=100, eval_fraction=0.0)
    first, *_, last = lines(artifact)
    assert last["loss"] < 0.4 * first["loss"]
    assert last["acceptance"] > first["acceptance"] + 0.1
    assert not (artifact / "distillation.json").exists()
    assert kind_named("distil").outcome.lines(artifact) == []


# ---- the teacher's answers -------------------------------------------------------------------------------------------


def taught(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Dataset, HeldOutAnswers]]:
    """The rows and held-out answers of stages from now on."""
    made: list[tuple[Dataset, HeldOutAnswers]] = []
    right = distil.taught_rows

    def noted(*args: Any) -> tuple[Dataset, HeldOutAnswers]:
        made.append(right(*args))
        return made[-1]

    monkeypatch.setattr(distil, "taught_rows", noted)
    return made


def answers_in(rows: Dataset) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of each row; only the answer is learned."""
    pairs = []
    for row in rows:
        start = next(index for index, label in enumerate(row["labels"]) if label != -100)
        assert row["labels"][start:] == row["input_ids"][start:]
        pairs.append((row["input_ids"][:start], row["input_ids"][start:]))
    return pairs


def test_the_teacher_answers_and_no_prompt_is_both_learned_and_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = taught(monkeypatch)
    other = save_tiny_model(tmp_path / "other", seed=1)
    inputs = {"init": BASE, "teacher": StageInput(ref="path:other", path=other)}
    spec = distil_spec(tmp_path, inputs=inputs, completions_per_prompt=2, temperature=0.9, layers=None)
    context = StageContext(spec=spec, rank=0, world_size=1)
    worker._run(spec, context)
    ((rows, held_out),) = made
    learned = answers_in(rows)
    assert (len(learned), len(held_out.answers)) == (18, 6)
    assert held_out.groups == [0, 0, 1, 1, 2, 2]
    assert not {tuple(prompt) for prompt, _ in learned} & {tuple(prompt) for prompt in held_out.prompts}
    every = [*learned, *zip(held_out.prompts, held_out.answers, strict=True)]
    by_prompt: dict[tuple[int, ...], list[list[int]]] = {}
    for prompt, answer in every:
        by_prompt.setdefault(tuple(prompt), []).append(list(answer))
    model = AutoModelForCausalLM.from_pretrained(str(other))
    tokenizer = load_tokenizer(other)
    prompts = [row["messages"] for row in map(json.loads, spec.data_path.read_text().splitlines()[:12])]
    for number, messages in enumerate(prompts):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        uniforms = torch.rand(2, 8, generator=context.generator("answers", number), dtype=torch.float64)
        expected = generate(
            model,
            [ids, ids],
            max_new_tokens=8,
            end_ids=[2],
            batch_size=2,
            sampling=Sampling(temperature=0.9, uniforms=uniforms),
        )
        assert by_prompt[tuple(ids)] == expected


def test_sequence_level_distillation_learns_the_answers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = taught(monkeypatch)
    artifact = distilled(tmp_path, method=Method.sequence, optim={"batch_size": 9})
    student = AutoModelForCausalLM.from_pretrained(str(artifact.parent.parent / "base"))
    distil_first = keep_first(student)
    logprobs = []
    for prompt, answer in answers_in(made[0][0]):
        with torch.no_grad():
            logits = answer_logits(distil_first, prompt, answer).tolist()
        logprobs += [log_softmax(row)[token] for row, token in zip(logits, answer, strict=True)]
    (line,) = lines(artifact)
    assert line["loss"] == pytest.approx(-math.fsum(logprobs) / len(logprobs), rel=1e-4)
    assert "acceptance" not in line


def keep_first(model: Any) -> Any:
    """The model with its first layer alone."""
    model.model.layers = model.model.layers[:1]
    return model.eval()


def test_what_has_learned_is_freed_before_other_models_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other model than a teacher is in memory at each load; a trainer and its callbacks hold each other."""
    others = others_at_each_load(monkeypatch)
    with without_collections():
        distilled(tmp_path, timed_prompts=1)
    assert max(others) == 1


# ---- what is reported ------------------------------------------------------------------------------------------------


def test_the_record_is_of_the_student_before_and_as_it_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = taught(monkeypatch)
    artifact = distilled(tmp_path, optim={"epochs": 6.0}, temperature=1.3, completions_per_prompt=2, gamma=3)
    record, metrics = Distillation.read(artifact), verify(artifact, content=True).metrics
    teacher = AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"))
    before = keep_first(AutoModelForCausalLM.from_pretrained(str(tmp_path / "base")))
    after = AutoModelForCausalLM.from_pretrained(str(artifact / "model"))
    for student, figures, ending in ((before, record.before, "_before"), (after, record.after, "")):
        pairs = []
        for prompt, answer in zip(made[0][1].prompts, made[0][1].answers, strict=True):
            with torch.no_grad():
                both = [answer_logits(model, list(prompt), list(answer)).tolist() for model in (teacher, student)]
            pairs += list(zip(*both, strict=True))
        acceptance = sum(oracle.acceptance(*pair, 1.3) for pair in pairs) / len(pairs)
        divergence = sum(oracle.forward_kl(*pair, 1.3) for pair in pairs) / len(pairs)
        same = sum(own.index(max(own)) == other.index(max(other)) for own, other in pairs) / len(pairs)
        assert figures.acceptance.mean == pytest.approx(acceptance, abs=1e-5)
        assert figures.divergence.mean == pytest.approx(divergence, abs=1e-5)
        assert figures.same_top.mean == pytest.approx(same)
        assert figures.tokens_per_step.mean == pytest.approx(oracle.tokens_per_step(acceptance, 3), abs=1e-4)
        assert metrics[f"eval_acceptance{ending}"] == figures.acceptance.mean
        assert metrics[f"eval_same_top{ending}"] == figures.same_top.mean
        assert metrics[f"eval_divergence{ending}"] == figures.divergence.mean
    assert (record.prompts, record.tokens, record.layers, record.timing) == (3, len(pairs), 1, None)
    assert (metrics["eval_prompts"], metrics["eval_tokens"]) == (3, len(pairs))
    assert record.after.divergence.mean != record.before.divergence.mean
    kind = kind_named("distil")
    config = distil_spec(tmp_path / "same").config
    assert set(kind.outcome.metrics(config).names) == metrics.keys()
    drawn = {key for chart in kind.curves({"method": "tokens"}) for key in chart.keys}
    assert all(drawn <= line.keys() for line in lines(artifact))


def test_whole_prompts_are_drawn_for_the_intervals_and_every_token_counts_alike() -> None:
    """Two answers to the first prompt, of which the second is long, and one to another."""
    sums = [[1.0, 1.0, 0.5, 2.0], [5.0, 3.0, 0.7, 6.0], [0.2, 0.0, 0.9, 1.0]]
    intervals = Intervals(samples=200, seed=0)
    figures = figures_of(sums, [0, 0, 1], intervals, gamma=2)
    assert figures.acceptance == intervals.of_ratio([6.0, 0.2], [8.0, 1.0])
    assert figures.same_top == intervals.of_ratio([4.0, 0.0], [8.0, 1.0])
    assert figures.divergence == intervals.of_ratio([1.2, 0.9], [8.0, 1.0])
    mean, low = figures.acceptance.mean, figures.acceptance.low
    assert low is not None
    assert figures.tokens_per_step.mean == pytest.approx(oracle.tokens_per_step(mean, 2))
    assert figures.tokens_per_step.low == pytest.approx(oracle.tokens_per_step(low, 2))


def test_figures_do_not_depend_on_what_is_compared_together(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    student, teacher = trainer.model, trainer.teacher
    prompts, answers = [prompt for prompt, _ in ROWS], [answer for _, answer in ROWS]
    every = [
        sums_of_answers(student, teacher, prompts, answers, temperature=1.0, tokens=tokens) for tokens in (1, 10_000)
    ]
    close(every[0], every[1], atol=1e-5)
    assert [row[-1] for row in every[0]] == [len(answer) for answer in answers]


# ---- interruptions ---------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ended."""


def results(artifact: Path) -> list[Any]:
    """All that a stage leaves, without the times."""
    metrics = [{**line, "seconds": 0.0} for line in lines(artifact)]
    weights = {file.relative_to(artifact): file.read_bytes() for file in sorted(artifact.rglob("*.safetensors"))}
    return [metrics, weights, (artifact / "distillation.json").read_bytes(), verify(artifact, content=True).metrics]


@pytest.mark.parametrize(
    ("killed_at", "adapter"),
    [("sampling", FULL), ("before", FULL), ("checkpoint", FULL), ("checkpoint", LORA), ("after", LORA)],
    ids=["sampling", "before", "checkpoint", "checkpoint-lora", "after-lora"],
)
def test_a_killed_stage_ends_as_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str, adapter: AdapterConfig
) -> None:
    changes: dict[str, Any] = {"adapter": adapter, "optim": {"epochs": 2.0, "batch_size": 2}}
    straight = results(distilled(tmp_path / "straight", **changes))
    with monkeypatch.context() as patch:
        if killed_at == "checkpoint":
            patch.setattr(Checkpoints, "on_save", then_killed(Checkpoints.on_save, step=3))
        elif killed_at == "sampling":
            patch.setattr(answer_sampling, "generate", killed_on_call(answer_sampling.generate, 2))
        else:
            calls = {"before": 1, "after": 2}[killed_at]
            patch.setattr(student_comparison, "figures_of", killed_on_call(student_comparison.figures_of, calls))
        with pytest.raises(Killed):
            distilled(tmp_path / "killed", **changes)
    assert results(distilled(tmp_path / "killed", **changes)) == straight


def then_killed(on_save: Any, *, step: int) -> Any:
    def callback(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_save(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise Killed

    return callback


def killed_on_call(function: Any, number: int) -> Any:
    calls: list[int] = []

    def called(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise Killed
        return function(*args, **kwargs)

    return called


# ---- the student as a policy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [FULL, LORA], ids=["full", "lora"])
def test_a_draft_is_a_policy_of_its_own_that_others_start_from(tmp_path: Path, adapter: AdapterConfig) -> None:
    spec = distil_spec(tmp_path, adapter=adapter)
    worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    manifest = verify(spec.artifact, content=True)
    assert manifest.base["source"] == "self"
    assert not spec.work.exists()
    own = json.loads((spec.artifact / "model/config.json").read_text())
    assert own["use_cache"] is True, "whoever generates with it would else compute every token again"
    if adapter is LORA:
        (config,) = spec.artifact.glob("adapters/*/adapter_config.json")
        assert json.loads(config.read_text())["base_model_name_or_path"] == str(spec.artifact / "model")
    saved = lineage(spec, StageInput(ref="stage:distil", path=spec.artifact))
    policy = load_policy(saved, torch.float32)
    assert len(policy.base_model.layers) == policy.config.num_hidden_layers == 1
    base = load_file(tmp_path / "base" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    moved = (policy.state_dict()[name] - base[name]).abs().max()
    assert 0 < float(moved) < 0.2
    draft = StageInput(ref="path:draft", path=spec.artifact)
    distilled(tmp_path / "next", layers=None, inputs={"init": draft, "teacher": BASE})
