"""Distillation as the stage computes it, against the papers' formulas, and what its draft is worth to transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import TaskType
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alignment import worker
from alignment.commands.export.model_card import model_card
from alignment.commands.export.provenance import provenance
from alignment.config.model import AdapterConfig, AdapterKind, Dtype, ModelConfig
from alignment.core.artifacts import verify
from alignment.core.errors import ConfigError, ModelError, StageError
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.evaluation.statistics import Intervals
from alignment.job import StageInput, StageSpec
from alignment.models.assembly.load import Lineage, lineage, load_policy
from alignment.models.assembly.modules import keep_first_layers
from alignment.models.forward.divergence import refuse_other_heads
from alignment.models.forward.generate import Sampling, generate
from alignment.records.interval import Interval
from alignment.records.stages import Assisted, Distillation, StudentFigures, Timing
from alignment.stages.distil import run as distil
from alignment.stages.distil import student_comparison
from alignment.stages.distil.kind import Method
from alignment.stages.distil.student import DistilTrainer, HeldOutAnswers, student_of
from alignment.stages.distil.student_comparison import (
    Greedy,
    figures_of,
    frozen_model,
    gaps_at_differences,
    timing,
)
from alignment.stages.registry import doubts, kind_named, lines_of, tables_of
from alignment.stages.shared import answer_sampling
from alignment.stages.shared.policies import asked_tokenizer
from alignment.stages.shared.result import initial_model
from alignment.training.callbacks import Checkpoints
from alignment.training.context import StageContext
from tests.chained import LORA
from tests.generating import BASE, FULL, distil_spec, distilled
from tests.in_memory import others_at_each_load, without_collections
from tests.oracles import distillation as oracle
from tests.oracles.close import close
from tests.oracles.logprobs import log_softmax
from tests.tiny import BASE_SOURCE, save_tiny_model, tiny_model, tiny_tokenizer

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
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    assert len(trainer._micro_batches(batch)) > 1
    _, tokens = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    return float(trainer.training_step(trainer.model, batch, tokens))


def answer_logits(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
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


def test_a_student_equal_to_its_teacher_has_a_loss_of_zero_and_learns_nothing(tmp_path: Path) -> None:
    artifact = distilled(tmp_path, layers=None, adapter=LORA)
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
    assert kind_named("distil").display.lines(artifact) == []


Taught = tuple[list[tuple[list[int], list[int]]], HeldOutAnswers]


@pytest.fixture
def taught(monkeypatch: pytest.MonkeyPatch) -> list[Taught]:
    made: list[Taught] = []
    right = distil.taught_rows

    def noted(*args: Any) -> tuple[Dataset, HeldOutAnswers]:
        rows, held_out = right(*args)
        pairs = []
        for row in rows:
            start = next(index for index, label in enumerate(row["labels"]) if label != -100)
            assert row["labels"][start:] == row["input_ids"][start:]
            pairs.append((row["input_ids"][:start], row["input_ids"][start:]))
        made.append((pairs, held_out))
        return rows, held_out

    monkeypatch.setattr(distil, "taught_rows", noted)
    return made


def test_the_teacher_answers_and_no_prompt_is_both_learned_and_held_out(tmp_path: Path, taught: list[Taught]) -> None:
    other = save_tiny_model(tmp_path / "other", seed=1)
    inputs = {"init": BASE, "teacher": StageInput(ref="path:other", path=other)}
    spec = distil_spec(tmp_path, inputs=inputs, completions_per_prompt=2, temperature=0.9, layers=None)
    context = StageContext(spec=spec, rank=0, world_size=1)
    worker._run(spec, context)
    ((learned, held_out),) = taught
    assert (len(learned), len(held_out.answers)) == (18, 6)
    assert held_out.groups == [0, 0, 1, 1, 2, 2]
    assert not {tuple(prompt) for prompt, _ in learned} & {tuple(prompt) for prompt in held_out.prompts}
    by_prompt: dict[tuple[int, ...], list[list[int]]] = {}
    for prompt, answer in [*learned, *zip(held_out.prompts, held_out.answers, strict=True)]:
        by_prompt.setdefault(tuple(prompt), []).append(list(answer))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(str(other)), load_tokenizer(other)
    prompts = [json.loads(line)["messages"] for line in spec.data_path.read_text().splitlines()[:12]]
    for number, messages in enumerate(prompts):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        uniforms = torch.rand(2, 8, generator=context.generator("answers", number), dtype=torch.float64)
        sampling = Sampling(temperature=0.9, uniforms=uniforms)
        expected = generate(model, [ids, ids], max_new_tokens=8, end_ids=[2], batch_size=2, sampling=sampling)
        assert by_prompt[tuple(ids)] == expected


def test_sequence_level_distillation_learns_the_answers_alone(tmp_path: Path, taught: list[Taught]) -> None:
    artifact = distilled(tmp_path, method=Method.sequence, optim={"batch_size": 9})
    student = keep_first(AutoModelForCausalLM.from_pretrained(str(tmp_path / "base")))
    logprobs = []
    for prompt, answer in taught[0][0]:
        with torch.no_grad():
            logits = answer_logits(student, prompt, answer).tolist()
        logprobs += [log_softmax(row)[token] for row, token in zip(logits, answer, strict=True)]
    (line,) = lines(artifact)
    assert line["loss"] == pytest.approx(-math.fsum(logprobs) / len(logprobs), rel=1e-4)
    assert "acceptance" not in line


def keep_first(model: Any) -> Any:
    model.model.layers = model.model.layers[:1]
    return model.eval()


def test_what_has_learned_is_freed_before_other_models_are_loaded_and_both_students_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other model than a teacher is in memory at each load; a trainer and its callbacks hold each other."""
    others = others_at_each_load(monkeypatch)
    with without_collections():
        artifact = distilled(tmp_path, timed_prompts=2)
    assert max(others) == 1
    times = Distillation.read(artifact).timing
    assert times.prompts == 2
    _, second = lines_of("distil", artifact)
    assert "all 2 answers are the same as without a draft" in second
    (table,) = tables_of("distil", artifact)
    assert list(table.columns)[-1] == "measured"
    assert table.rows[1][1][-1].text == f"{times.speed_up(times.after):.2f}"


def test_the_record_is_of_the_student_before_and_as_it_was_saved(tmp_path: Path, taught: list[Taught]) -> None:
    changes = {"optim": {"epochs": 6.0}, "temperature": 1.3, "completions_per_prompt": 2, "gamma": 3}
    artifact = distilled(tmp_path, **changes)
    record, manifest = Distillation.read(artifact), verify(artifact, content=True)
    metrics = manifest.metrics
    teacher = AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"))
    before = keep_first(AutoModelForCausalLM.from_pretrained(str(tmp_path / "base")))
    after = AutoModelForCausalLM.from_pretrained(str(artifact / "model"))
    for student, figures, ending in ((before, record.before, "_before"), (after, record.after, "")):
        pairs = []
        for prompt, answer in zip(taught[0][1].prompts, taught[0][1].answers, strict=True):
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
        names = ("acceptance", "same_top", "divergence")
        assert all(metrics[f"eval_{name}{ending}"] == getattr(figures, name).mean for name in names)
    assert (record.prompts, record.tokens, record.layers, record.timing) == (3, len(pairs), 1, None)
    assert (metrics["eval_prompts"], metrics["eval_tokens"]) == (3, len(pairs))
    assert record.after.divergence.mean != record.before.divergence.mean
    kind = kind_named("distil")
    assert set(kind.metrics(distil_spec(tmp_path / "same").config).names) == metrics.keys()
    drawn = {key for chart in kind.display.curves({"method": "tokens"}) for key in chart.keys}
    assert all(drawn <= line.keys() for line in lines(artifact))
    manifest = replace(manifest, identity={"kind": "distil"})
    card = model_card(manifest, provenance(artifact, manifest), form="model", turn_end=None, notes=[])
    assert f"The student, the first layer, on {len(pairs)} tokens of the teacher's answers" in card
    assert f"| after | {record.after.acceptance.mean:.3f} " in card


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


class Killed(BaseException):
    pass


def killed_after(function: Callable[..., Any], number: int, *, before_it_ends: bool = True) -> Callable[..., Any]:
    calls: list[int] = []

    def called(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == number and before_it_ends:
            raise Killed
        result = function(*args, **kwargs)
        if len(calls) == number:
            raise Killed
        return result

    return called


def results(artifact: Path) -> list[Any]:
    metrics = [{**line, "seconds": 0.0} for line in lines(artifact)]
    weights = {file.relative_to(artifact): file.read_bytes() for file in sorted(artifact.rglob("*.safetensors"))}
    return [metrics, weights, (artifact / "distillation.json").read_bytes(), verify(artifact, content=True).metrics]


KILLS: dict[str, tuple[Any, str, int, bool]] = {
    "sampling": (answer_sampling, "generate", 2, True),
    "before": (student_comparison, "figures_of", 1, True),
    "checkpoint": (Checkpoints, "on_save", 3, False),
    "after": (student_comparison, "figures_of", 2, True),
}


def test_a_killed_stage_ends_as_an_undisturbed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"optim": {"epochs": 2.0, "batch_size": 2}}
    straight = results(distilled(tmp_path / "straight", **changes))
    for name, (owner, function, number, before_it_ends) in KILLS.items():
        with monkeypatch.context() as patch:
            killing = killed_after(getattr(owner, function), number, before_it_ends=before_it_ends)
            patch.setattr(owner, function, killing)
            with pytest.raises(Killed):
                distilled(tmp_path / name, **changes)
        assert results(distilled(tmp_path / name, **changes)) == straight, name


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


def test_greedy_answers_with_a_draft_are_those_without_it_and_their_differences_are_measured() -> None:
    model, draft = tiny_model(), keep_first_layers(tiny_model(), 1)
    greedy, prompts = Greedy(max_new_tokens=12, end_ids=[2], pad_id=2), [[5, 6, 7], [8, 9], [10] * 20, [3]]
    alone, seconds = greedy.answered(model, prompts)
    helped, _ = greedy.answered(model, prompts, draft=student_comparison._drafting(draft, 3))
    assert alone == helped
    assert all(1 <= len(answer) <= 12 for answer in alone)
    assert seconds > 0
    assert gaps_at_differences(model, prompts, alone, helped) == []
    model, draft = tiny_model(), tiny_model()
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    endless = Greedy(max_new_tokens=12, end_ids=[127], pad_id=2)
    ((answer,), _) = endless.answered(model, [[5, 6, 7]], draft=student_comparison._drafting(draft, 3))
    assert len(answer) == 12
    assert len(passes) == 2 * 3, "of the answer that warms up, and of the one that is timed"
    model = tiny_model()
    ((first,), _) = Greedy(max_new_tokens=1, end_ids=[2], pad_id=2).answered(model, [[5, 6, 7]])
    ends_at_once = Greedy(max_new_tokens=9, end_ids=first, pad_id=2)
    assert ends_at_once.answered(model, [[5, 6, 7]])[0] == [first]
    assert [len(answer) for answer in ends_at_once.answered(model, [[5, 6, 7]], lengths=[4])[0]] == [4]
    model = tiny_model()
    prompts, alone = [[5, 6], [7]], [[8, 9, 10], [11, 2]]
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 8]])).logits[0, -1]
    gap = float((logits[9] - logits[12]).abs())
    assert gaps_at_differences(model, prompts, alone, [[8, 12, 13], [11, 2]]) == [pytest.approx(gap)]
    assert gaps_at_differences(model, prompts, alone, [[8, 9], [11, 2]]) == [float("inf")]


def timed(spec: StageSpec) -> Timing:
    config: Any = spec.config
    base = Lineage(source=BASE_SOURCE, base=spec.base_path, adapters=())
    students = [(base, figures_with(0.5, 0.25)), (base, figures_with(0.75, 0.5))]
    context = StageContext(spec=spec, rank=0, world_size=1)
    return timing(config, context, tiny_tokenizer(), base, [[5, 6, 7], [8, 9]], students)


def figures_with(acceptance: float, same_top: float) -> StudentFigures:
    return StudentFigures(
        acceptance=Interval(mean=acceptance, low=acceptance - 0.1, high=acceptance + 0.1),
        same_top=Interval(mean=same_top, low=same_top - 0.1, high=same_top + 0.1),
        divergence=Interval(mean=1.0),
        tokens_per_step=Interval(mean=oracle.tokens_per_step(acceptance, 4)),
    )


def test_other_answers_with_a_draft_are_an_error_in_float32_and_reported_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Assisted answers have another last token."""
    right = Greedy._answer

    def wrong(self: Greedy, model: Any, prompt: Any, *, draft: Any, exact: Any) -> list[int]:
        answer = right(self, model, prompt, draft=draft, exact=exact)
        return [*answer[:-1], (answer[-1] + 1) % 100] if draft is not None else answer

    monkeypatch.setattr(Greedy, "_answer", wrong)
    spec = distil_spec(tmp_path, timed_prompts=2)
    with pytest.raises(StageError, match="2 of 2 greedy answers with a draft differ") as caught:
        timed(spec)
    assert caught.value.where == "stages.distil.timed_prompts"
    times = timed(replace(spec, model=ModelConfig(source=BASE_SOURCE, dtype=Dtype.bfloat16)))
    assert (times.before.differing, times.after.differing) == (2, 2)
    assert times.after.widest_gap > 1e-3


def test_expected_speed_ups_follow_from_acceptance_and_the_measured_cost_of_a_pass(tmp_path: Path) -> None:
    times = timed(distil_spec(tmp_path, gamma=3))
    assert times.prompts == 2
    assert times.cost_ratio > 0
    for student, same_top, acceptance in ((times.before, 0.25, 0.5), (times.after, 0.5, 0.75)):
        assert student.expected.mean == pytest.approx(oracle.speed_up(same_top, 3, times.cost_ratio))
        assert student.expected.low == pytest.approx(oracle.speed_up(same_top - 0.1, 3, times.cost_ratio))
        assert student.expected_sampling.mean == pytest.approx(oracle.speed_up(acceptance, 3, times.cost_ratio))
        assert (student.differing, student.widest_gap) == (0, 0.0)
        assert times.speed_up(student) == times.seconds / student.seconds


def test_lines_and_table_name_before_and_after(tmp_path: Path) -> None:
    speed = {"expected": Interval(mean=0.9), "expected_sampling": Interval(mean=1.1)}
    helped = Assisted(seconds=2.0, **speed)
    later = {"expected": Interval(mean=1.9), "expected_sampling": Interval(mean=2.1)}
    after = Assisted(seconds=1.0, differing=1, widest_gap=0.0625, **later)
    Distillation(
        method="tokens",
        layers=8,
        temperature=1.0,
        gamma=4,
        prompts=30,
        tokens=900,
        before=figures_with(0.25, 0.125),
        after=figures_with(0.75, 0.5),
        timing=Timing(prompts=8, tokens=200, seconds=1.5, cost_ratio=0.3, before=helped, after=after),
    ).write(tmp_path)
    first, second = lines_of("distil", tmp_path)
    assert "0.250 (0.150 to 0.350) before and 0.750 (0.650 to 0.850) after, on 30 held-out prompts" in first
    assert "0.75 times as fast with the draft before training and 1.50 times as fast after it; 1 of 16 " in second
    assert second.endswith("by at most 0.062")
    (table,) = tables_of("distil", tmp_path)
    assert "The student, the first 8 layers, on 900 tokens" in table.note
    assert "A token of the draft takes 0.30 of the teacher's time" in table.note
    texts = {label: [cell.text for cell in cells] for label, cells in table.rows}
    assert texts["before"] == ["0.250", "1.332", "0.125", "1.000", "1.100", "0.900", "0.75"]
    assert texts["after"] == ["0.750", "3.051", "0.500", "1.000", "2.100", "1.900", "1.50"]
    assert doubts("distil", {"eval_acceptance_before": 0.3, "eval_acceptance": 0.6}) == []
    assert doubts("distil", {"loss": 1.0}) == []
    (doubt,) = doubts("distil", {"eval_acceptance_before": 0.31, "eval_acceptance": 0.3})
    assert "(30.0%) than before (31.0%)" in doubt


def test_a_student_that_does_not_fit_its_teacher_is_refused(tmp_path: Path) -> None:
    for layers in (2, 3):
        with pytest.raises(ConfigError, match=rf"{layers}, but base has 2 layers.*choose at most 1") as caught:
            distilled(tmp_path / str(layers), layers=layers)
        assert caught.value.where == "stages.distil.layers"
        assert not list((tmp_path / str(layers)).rglob("part-*"))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    other = save_tiny_model(tmp_path / "other", tokenizer=tokenizer)
    inputs = {"init": StageInput(ref="path:other", path=other), "teacher": BASE}
    with pytest.raises(ModelError, match="different tokenizer or chat template") as refused:
        distilled(tmp_path, inputs=inputs, layers=None)
    assert refused.value.where == "stages.distil.init"
    with pytest.raises(ModelError, match="the student's head has 64 tokens and the teacher's 128"):
        refuse_other_heads(tiny_model(vocab_size=64), tiny_model(), where="stages.distil.init")
    scaled = tiny_model()
    scaled.config.final_logit_softcapping = 30.0
    with pytest.raises(ModelError, match="the teacher, a LlamaForCausalLM, scales or caps its logits"):
        refuse_other_heads(tiny_model(), scaled, where="")


def test_a_teacher_with_a_prefix_is_compared_but_not_timed(tmp_path: Path) -> None:
    prefix = AdapterConfig(kind=AdapterKind.prefix, virtual_tokens=4)
    prefixed = distilled(tmp_path, layers=1, adapter=prefix, optim={"epochs": 1.0})
    inputs = {"init": BASE, "teacher": StageInput(ref="path:prefixed", path=prefixed)}
    distilled(tmp_path / "compared", inputs=inputs, layers=None)
    with pytest.raises(ConfigError, match="not timed with a teacher that has a prefix"):
        distilled(tmp_path / "timed", inputs=inputs, layers=None, timed_prompts=1)
