"""Speculative decoding with a draft of ours by transformers: whose answers they are, and how fast they are made."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from alignment.commands.export.model_card import model_card
from alignment.commands.export.provenance import provenance
from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.config.model import Dtype, ModelConfig
from alignment.core.artifacts import verify
from alignment.core.errors import ConfigError, ModelError, StageError
from alignment.job import StageInput
from alignment.models.assembly.first_layers import keep_first_layers
from alignment.models.assembly.load import Lineage
from alignment.models.forward.distilled import refuse_other_heads
from alignment.records.distillation import Assisted, Distillation, StudentFigures, Timing
from alignment.records.interval import Interval
from alignment.stages.distil import assisted
from alignment.stages.distil.assisted import Greedy, gaps_at_differences, timing
from alignment.stages.registry import doubts, lines_of, tables_of
from alignment.training.context import StageContext
from tests.distilled import BASE, distil_spec, distilled
from tests.oracles import distillation as oracle
from tests.oracles.chi_square import p_value
from tests.tiny import BASE_SOURCE, save_tiny_model, tiny_model, tiny_tokenizer

VOCABULARY, STEPS, SAMPLES = 5, 3, 1000
PROMPT = [3, 4]


# ---- exactness -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speculated() -> tuple[Counter[tuple[int, ...]], PreTrainedModel, PreTrainedModel]:
    """Counts of sampled answers of three tokens, the target and its draft."""
    target = tiny_model("llama", vocab_size=VOCABULARY)
    draft = keep_first_layers(tiny_model("llama", vocab_size=VOCABULARY), 1)
    for model in (target, draft):
        model.generation_config = GenerationConfig()
    draft.generation_config.num_assistant_tokens = 2
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    settings = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=STEPS, pad_token_id=0, eos_token_id=None)
    counts: Counter[tuple[int, ...]] = Counter()
    ids = torch.tensor([PROMPT])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(SAMPLES):
            sampled = target.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=settings, assistant_model=draft
            )
            counts[tuple(sampled[0, len(PROMPT) :].tolist())] += 1
    return counts, target, draft


@torch.no_grad()
def distribution(model: PreTrainedModel) -> dict[tuple[int, ...], float]:
    """The probability of every answer."""
    answers = list(itertools.product(range(VOCABULARY), repeat=STEPS))
    logits = model(torch.tensor([[*PROMPT, *answer] for answer in answers])).logits.double().log_softmax(-1)
    probabilities = {}
    for row, answer in enumerate(answers):
        steps = [float(logits[row, len(PROMPT) - 1 + at, token]) for at, token in enumerate(answer)]
        probabilities[answer] = torch.tensor(sum(steps), dtype=torch.float64).exp().item()
    assert sum(probabilities.values()) == pytest.approx(1.0)
    return probabilities


def test_speculative_sampling_with_a_draft_samples_the_targets_distribution(
    speculated: tuple[Counter[tuple[int, ...]], PreTrainedModel, PreTrainedModel],
) -> None:
    counts, target, draft = speculated
    assert sum(counts.values()) == SAMPLES
    assert p_value(counts, distribution(target)) > 0.01
    assert p_value(counts, distribution(draft)) < 1e-6, "the test would see the draft's"


# ---- greedy answers and their time -----------------------------------------------------------------------------------


@pytest.fixture
def greedy() -> Greedy:
    return Greedy(max_new_tokens=12, end_ids=[2], pad_id=2)


def whole_and_draft(*, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedModel]:
    return tiny_model(seed=seed), keep_first_layers(tiny_model(seed=seed), 1)


def test_greedy_answers_with_a_draft_are_those_without_it(greedy: Greedy) -> None:
    model, draft = whole_and_draft()
    prompts = [[5, 6, 7], [8, 9], [10] * 20, [3]]
    alone = greedy.answered(model, prompts)
    helped = greedy.answered(model, prompts, draft=assisted._drafting(draft, 3))
    assert alone.answers == helped.answers
    assert all(1 <= len(answer) <= 12 for answer in alone.answers)
    assert alone.seconds > 0
    assert gaps_at_differences(model, prompts, alone.answers, helped.answers) == []


def test_a_draft_drafts_gamma_tokens_in_every_step(greedy: Greedy) -> None:
    """Passes of the target: with a perfect draft of γ tokens, one for every γ + 1 tokens."""
    model, draft = tiny_model(), tiny_model()
    passes: list[int] = []
    forward = model.forward
    model.forward = lambda *args, **kwargs: (passes.append(1), forward(*args, **kwargs))[1]  # type: ignore[method-assign]
    endless = Greedy(max_new_tokens=12, end_ids=[127], pad_id=2)
    (answer,) = endless.answered(model, [[5, 6, 7]], draft=assisted._drafting(draft, 3)).answers
    assert len(answer) == 12
    assert len(passes) == 2 * 3, "of the answer that warms up, and of the one that is timed"


def test_an_answer_of_a_set_length_ignores_its_end() -> None:
    model = tiny_model()
    (first,) = Greedy(max_new_tokens=1, end_ids=[2], pad_id=2).answered(model, [[5, 6, 7]]).answers
    ends_at_once = Greedy(max_new_tokens=9, end_ids=first, pad_id=2)
    assert ends_at_once.answered(model, [[5, 6, 7]]).answers == [first]
    assert [len(answer) for answer in ends_at_once.answered(model, [[5, 6, 7]], lengths=[4]).answers] == [4]


def test_the_gap_of_a_difference_is_that_of_the_targets_logits_at_the_first_one() -> None:
    model = tiny_model()
    prompts, alone = [[5, 6], [7]], [[8, 9, 10], [11, 2]]
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 8]])).logits[0, -1]
    gap = float((logits[9] - logits[12]).abs())
    assert gaps_at_differences(model, prompts, alone, [[8, 12, 13], [11, 2]]) == [pytest.approx(gap)]
    assert gaps_at_differences(model, prompts, alone, [[8, 9], [11, 2]]) == [float("inf")]


@pytest.fixture
def _unlike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Assisted answers have another last token."""
    right = Greedy._answer

    def wrong(self: Greedy, model: Any, prompt: Any, *, draft: Any, exact: Any) -> list[int]:
        answer = right(self, model, prompt, draft=draft, exact=exact)
        return [*answer[:-1], (answer[-1] + 1) % 100] if draft is not None else answer

    monkeypatch.setattr(Greedy, "_answer", wrong)


@pytest.mark.usefixtures("_unlike")
def test_in_float32_other_answers_with_a_draft_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"2 of 2 greedy answers with a draft differ from those without it") as caught:
        distilled(tmp_path, timed_prompts=2)
    assert caught.value.where == "stages.distil.timed_prompts"


@pytest.mark.usefixtures("_unlike")
def test_in_bfloat16_other_answers_are_reported(tmp_path: Path) -> None:
    spec = distil_spec(tmp_path, timed_prompts=2)
    spec = replace(spec, model=ModelConfig(source=BASE_SOURCE, dtype=Dtype.bfloat16))
    times = timed(StageContext(spec=spec, rank=0, world_size=1))
    assert (times.before.differing, times.after.differing) == (2, 2)
    assert times.after.widest_gap > 1e-3


def timed(context: StageContext) -> Timing:
    """Of the base as its own teacher and draft, with acceptances that are known."""
    config: Any = context.spec.config
    base = Lineage(source=BASE_SOURCE, base=context.spec.base_path, adapters=())
    students = [(base, figures(0.5, 0.25)), (base, figures(0.75, 0.5))]
    return timing(config, context, tiny_tokenizer(), base, [[5, 6, 7], [8, 9]], students)


def figures(acceptance: float, same_top: float) -> StudentFigures:
    return StudentFigures(
        acceptance=Interval(mean=acceptance, low=acceptance - 0.1, high=acceptance + 0.1),
        same_top=Interval(mean=same_top, low=same_top - 0.1, high=same_top + 0.1),
        divergence=Interval(mean=1.0),
        tokens_per_step=Interval(mean=oracle.tokens_per_step(acceptance, 4)),
    )


def test_expected_speed_ups_follow_from_acceptance_and_the_measured_cost_of_a_pass(tmp_path: Path) -> None:
    context = StageContext(spec=distil_spec(tmp_path, gamma=3), rank=0, world_size=1)
    times = timed(context)
    assert times.prompts == 2
    assert times.cost_ratio > 0
    for student, same_top, acceptance in ((times.before, 0.25, 0.5), (times.after, 0.5, 0.75)):
        assert student.expected.mean == pytest.approx(oracle.speed_up(same_top, 3, times.cost_ratio))
        assert student.expected.low == pytest.approx(oracle.speed_up(same_top - 0.1, 3, times.cost_ratio))
        assert student.expected_sampling.mean == pytest.approx(oracle.speed_up(acceptance, 3, times.cost_ratio))
        assert (student.differing, student.widest_gap) == (0, 0.0)
        assert times.speed_up(student) == times.seconds / student.seconds


def test_the_time_is_measured_for_both_students_and_shown(tmp_path: Path) -> None:
    artifact = distilled(tmp_path, timed_prompts=2)
    times = Distillation.read(artifact).timing
    assert times is not None
    assert times.prompts == 2
    first, second = lines_of("distil", artifact)
    assert "before and" in first
    assert "all 2 answers are the same as without a draft" in second
    (table,) = tables_of("distil", artifact)
    assert list(table.columns)[-1] == "measured"
    assert [label for label, _ in table.rows] == ["before", "after"]
    assert [len(cells) for _, cells in table.rows] == [7, 7]
    assert table.rows[1][1][-1].text == f"{times.speed_up(times.after):.2f}"


# ---- what is said of a record ----------------------------------------------------------------------------------------


def test_lines_and_table_name_before_and_after(tmp_path: Path) -> None:
    helped = Assisted(seconds=2.0, expected=Interval(mean=0.9), expected_sampling=Interval(mean=1.1))
    after = Assisted(
        seconds=1.0, expected=Interval(mean=1.9), expected_sampling=Interval(mean=2.1), differing=1, widest_gap=0.0625
    )
    Distillation(
        method="tokens",
        layers=8,
        temperature=1.0,
        gamma=4,
        prompts=30,
        tokens=900,
        before=figures(0.25, 0.125),
        after=figures(0.75, 0.5),
        timing=Timing(prompts=8, tokens=200, seconds=1.5, cost_ratio=0.3, before=helped, after=after),
    ).write(tmp_path)
    first, second = lines_of("distil", tmp_path)
    assert first.endswith(
        "acceptance of drafted tokens 0.250 (0.150 to 0.350) before and 0.750 (0.650 to 0.850) after, on 30 held-out "
        "prompts"
    )
    assert second.endswith(
        "greedy answers are made 0.75 times as fast with the draft before training and 1.50 times as fast after it; "
        "1 of 16 "
        "answers differ from those without a draft, first at a token where the logits differ by at most 0.062"
    )
    (table,) = tables_of("distil", tmp_path)
    assert "The student, the first 8 layers, on 900 tokens" in table.note
    assert "A token of the draft takes 0.30 of the teacher's time" in table.note
    texts = {label: [cell.text for cell in cells] for label, cells in table.rows}
    assert texts["before"] == ["0.250", "1.332", "0.125", "1.000", "1.100", "0.900", "0.75"]
    assert texts["after"] == ["0.750", "3.051", "0.500", "1.000", "2.100", "1.900", "1.50"]


def test_a_draft_that_is_no_better_than_before_is_doubted() -> None:
    assert doubts("distil", {"eval_acceptance_before": 0.3, "eval_acceptance": 0.6}) == []
    assert doubts("distil", {"loss": 1.0}) == []
    (doubt,) = doubts("distil", {"eval_acceptance_before": 0.31, "eval_acceptance": 0.3})
    assert "not accepted more often after distillation (30.0%) than before (31.0%)" in doubt


# ---- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [2, 3])
def test_as_many_layers_as_the_model_has_are_refused(tmp_path: Path, layers: int) -> None:
    with pytest.raises(ConfigError, match=rf"{layers}, but base has 2 layers.*choose at most 1") as caught:
        distilled(tmp_path, layers=layers)
    assert caught.value.where == "stages.distil.layers"
    assert not list(tmp_path.rglob("part-*"))


def test_a_student_with_another_tokenizer_or_template_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    other = save_tiny_model(tmp_path / "other", tokenizer=tokenizer)
    inputs = {"init": StageInput(ref="path:other", path=other), "teacher": BASE}
    with pytest.raises(ModelError, match="has a different tokenizer or chat template than the teacher") as caught:
        distilled(tmp_path, inputs=inputs, layers=None)
    assert caught.value.where == "stages.distil.init"


def test_heads_of_other_sizes_or_with_scaled_logits_are_refused() -> None:
    with pytest.raises(ModelError, match="the student's head has 64 tokens and the teacher's 128"):
        refuse_other_heads(tiny_model(vocab_size=64), tiny_model(), where="stages.distil.init")
    scaled = tiny_model()
    scaled.config.final_logit_softcapping = 30.0
    with pytest.raises(ModelError, match="the teacher, a LlamaForCausalLM, scales or caps its logits"):
        refuse_other_heads(tiny_model(), scaled, where="")


def test_a_teacher_with_a_prefix_is_compared_but_not_timed(tmp_path: Path) -> None:
    prefixed = distilled(
        tmp_path,
        layers=1,
        adapter=AdapterConfig(kind=AdapterKind.prefix, virtual_tokens=4),
        optim={"epochs": 1.0},
    )
    inputs = {"init": BASE, "teacher": StageInput(ref="path:prefixed", path=prefixed)}
    distilled(tmp_path / "compared", inputs=inputs, layers=None)
    with pytest.raises(ConfigError, match="not timed with a teacher that has a prefix; use 0"):
        distilled(tmp_path / "timed", inputs=inputs, layers=None, timed_prompts=1)


def test_a_model_card_has_the_table_of_the_student(tmp_path: Path) -> None:
    artifact = distilled(tmp_path)
    manifest = verify(artifact, content=True)
    manifest = replace(manifest, identity={"kind": "distil"})
    card = model_card(manifest, provenance(artifact, manifest), form="model", turn_end=None, notes=[])
    acceptance = Distillation.read(artifact).after.acceptance.mean
    assert "Compared with its teacher: The student, the first layer, on 24 tokens of the teacher's answers" in card
    assert f"| after | {acceptance:.3f} " in card
