"""What a plan counts in its rows, which sizes it refuses, and what is worth a word though nothing is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignment import cli
from alignment.config.data import DataConfig, MixedConfig, ValidationConfig
from alignment.config.optim import OptimConfig
from alignment.config.scoring import GuardConfig
from alignment.config.stage import StageConfig
from alignment.core import hardware
from alignment.core.errors import ConfigError
from alignment.pipeline.backends.feasibility import refuse_sizes
from alignment.pipeline.execute.notes import advice, of_plan, on_a_plan
from alignment.pipeline.execute.record import RunRecorder
from alignment.pipeline.execute.summary import show_doubts
from alignment.pipeline.plan.plan import Plan, make_plan
from alignment.pipeline.plan.row_counts import Seen, faults
from alignment.report.run_page.run_files import read_run
from alignment.stages.cpt.kind import CptConfig
from alignment.stages.dpo.kind import DpoConfig
from alignment.stages.ppo.config import PpoConfig
from alignment.stages.reward.kind import RewardConfig
from alignment.stages.sft.kind import SftConfig
from tests.unit.pipeline.conftest import ROWS, TURN, MakePlan, faulty_keys, screened, stage_of, write, write_rows

FOUR_STEPS = "stages.sft.optim.max_steps=4"
VALIDATION = "stages.s.validation"
WARM_UP = "stages.s.optim.warmup_ratio"
Expected = tuple[str, str] | None
"""The key of a fault, and a word of it."""


def optim(**changes: Any) -> OptimConfig:
    return OptimConfig(**{"lr": 1e-4, "batch_size": 8, "warmup_ratio": 0.1, **changes})


SHORT = optim(warmup_ratio=0.6, max_steps=2)
ALL_STEPS = (WARM_UP, "(2); set stages.s.optim.warmup_ratio=0, or stages.s.optim.max_steps=3 or more")


def guard(**changes: Any) -> PpoConfig:
    return PpoConfig(guard=GuardConfig(every=1, prompts=64), **changes)


def validated(validation: ValidationConfig, **changes: Any) -> DpoConfig:
    return DpoConfig(validation=validation, optim=OptimConfig(**{"lr": 1e-4, "batch_size": 8, **changes}))


def held_out(share: float, every: int, **more: Any) -> ValidationConfig:
    return ValidationConfig(share=share, every=every, **more)


FAULTS: list[tuple[StageConfig, dict[str, Any], Expected]] = [
    (guard(), {"rows": 90, "prompts": 64}, ("stages.s.guard.prompts", "64 prompts cannot be held out of 64;")),
    (guard(data=DataConfig(fraction=0.5)), {"rows": 120}, ("stages.s.guard.prompts", "held out of 60;")),
    (guard(), {"rows": 65}, None),
    (RewardConfig(eval_fraction=0.1, optim=optim(epochs=2)), {"rows": 9, "prompts": 4},
     ("stages.s.eval_fraction", "4 prompts are too few to hold out a share of 0.1;")),
    (RewardConfig(eval_fraction=0.1, optim=optim()), {"rows": 9}, None),
    (SftConfig(optim=optim()), {"rows": 7}, (WARM_UP, "(1 for 7 rows in batches of 8); set")),
    (SftConfig(optim=optim(epochs=2)), {"rows": 7}, None),
    (SftConfig(optim=optim(), packing=True), {"rows": 7}, None),
    (SftConfig(optim=optim()), {"rows": 7, "whole": False}, None),
    (SftConfig(optim=optim(), data=DataConfig(mix=[MixedConfig(count=50)])), {"rows": 7}, None),
    (CptConfig(optim=optim()), {"rows": 1}, None),
    (DpoConfig(optim=SHORT), {"rows": 100}, ALL_STEPS),
    (DpoConfig(optim=SHORT), {"rows": 5000, "whole": False}, ALL_STEPS),
    (SftConfig(optim=SHORT, data=DataConfig(mix=[MixedConfig(count=50)])), {"rows": 100}, ALL_STEPS),
    (validated(held_out(0.01, 1)), {}, (f"{VALIDATION}.share", "40 prompts are too few to hold out a share of 0.01;")),
    (validated(held_out(0.85, 1), warmup_ratio=0.0), {}, (f"{VALIDATION}.share", "at most 6 of 40 rows")),
    (validated(held_out(0.2, 5)), {}, (f"{VALIDATION}.every", "the 4 optimiser steps of the stage; choose at most 4")),
    (validated(held_out(0.2, 11), max_steps=10), {}, (f"{VALIDATION}.every", "choose at most 10")),
    (validated(held_out(0.2, 4, patience=3), max_steps=10), {}, (f"{VALIDATION}.patience", "3 validations, at most 2")),
    (validated(held_out(0.2, 4, patience=2), max_steps=10), {}, None),
]  # fmt: skip


@pytest.mark.parametrize(("config", "amount", "expected"), FAULTS)
def test_too_few_rows_or_steps_are_refused(config: StageConfig, amount: dict[str, Any], expected: Expected) -> None:
    rows = amount.get("rows", 40)
    seen = Seen(**{"rows": rows, "prompts": rows, "whole": True, "openings": frozenset(range(rows)), **amount})
    problems = list(faults(config, {"data": seen}, where="stages.s"))
    assert [fault.where for fault in problems] == ([] if expected is None else [expected[0]])
    assert all(expected is not None and expected[1] in fault.message for fault in problems)


def test_a_plan_counts_rows_and_different_prompts(plan: MakePlan, tmp_path: Path) -> None:
    rows = [{**ROWS["preferences"], "chosen": f"On {day} March."} for day in range(21, 25)]
    other = {**ROWS["preferences"], "messages": [{"role": "user", "content": "And the exam?"}]}
    write_rows(tmp_path / "preferences.jsonl", *rows, other)
    planned = plan("stages.dpo.data.limit=3")
    for name, counts in (("reward", (5, 2, True)), ("dpo", (3, 1)), ("ppo", (5, 2, True))):
        seen = stage_of(planned, name).seen["data"]
        assert (seen.rows, seen.prompts, seen.whole)[: len(counts)] == counts


def test_impossible_sizes_are_refused(plan: MakePlan, overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What the first stage could have trained for hours before the last one said so."""
    settings = "stages.ppo.guard={every: 1, prompts: 64, scorer: {source: 'bundled:quickstart/house_style.py:style'}}"
    wrong = ("stages.ppo.completions_per_prompt=3", settings, "stages.dpo.data.limit=7")
    with pytest.raises(ConfigError) as caught:
        refuse_sizes(plan(*wrong))
    assert faulty_keys(caught.value) == [
        "stages.dpo.optim.warmup_ratio",
        "stages.ppo.completions_per_prompt",
        "stages.ppo.guard.prompts",
    ]
    assert cli.main(["plan", "quickstart", *overrides, *wrong]) == 2
    assert "32 episodes cannot be divided into groups of 3 completions" in capsys.readouterr().err
    settings = ("advantage=rloo", "critic=none", "prompt_baseline=false", "gae_lambda=0.95", "value_clip=0.2")
    rloo = [f"stages.ppo.{each}" for each in (*settings, "optim.critic_lr=null")]
    refuse_sizes(plan(*rloo))
    with pytest.raises(ConfigError, match="'rloo' compares the answers to a prompt; choose 2 or more"):
        refuse_sizes(plan(*rloo, "stages.ppo.completions_per_prompt=1"))


def test_held_out_prompts_that_are_learned_from_are_refused(plan: MakePlan, tmp_path: Path) -> None:
    def planned(*questions: str) -> Plan:
        answer = {"role": "assistant", "content": "On 21 March."}
        rows = [{"messages": [{**TURN, "content": question}, answer]} for question in questions]
        file = write_rows(tmp_path / "own.jsonl", *rows)
        return plan(f"stages.sft.validation={{every: 1, data: {{source: 'path:{file}'}}}}", FOUR_STEPS)

    with pytest.raises(ConfigError) as caught:
        refuse_sizes(planned(TURN["content"], "Where is it?"))
    assert caught.value.where == "stages.sft.validation.data.source"
    assert "1 of its 2 different prompts" in caught.value.message
    near, other = planned("when is the training", "Where is it?"), planned("Where is it?")
    refuse_sizes(near)
    noted = [[note for note in of_plan(each) if "its validation rows" in note] for each in (near, other)]
    assert [len(of_one) for of_one in noted] == [1, 0]
    assert noted[0][0].startswith("8 possible training rows of sft resemble")
    without = plan(FOUR_STEPS)
    assert len({stage_of(each, "sft").fingerprint for each in (near, other, without)}) == 3


@pytest.fixture
def kto(tmp_path: Path, overrides: list[str]) -> Callable[..., Plan]:
    def planned(labels: Sequence[bool | None], *more: str) -> Plan:
        rows = [
            {"messages": [{**TURN, "content": f"When is {day}?"}], "completion": "On 21 March."}
            | ({} if label is None else {"label": label})
            for day, label in enumerate(labels)
        ]
        given = [entry for entry in overrides if not entry.startswith(("stages.reward", "stages.dpo", "stages.ppo"))]
        source = f"stages.kto.data.source=path:{write_rows(tmp_path / 'labelled.jsonl', *rows)}"
        return make_plan("kto", [*given, source, *more])

    return planned


def noted(planned: Plan) -> list[str]:
    return [note.removeprefix("kto: ") for note in of_plan(planned) if note.startswith("kto: ")]


WEIGHTS = ("stages.kto.desirable_weight=1", "stages.kto.undesirable_weight=1")


@pytest.mark.parametrize(
    ("labels", "weights", "ratio", "warned"),
    [((10, 10), "1 and 1", "1", ""), ((5, 20), "4 and 1", "1", "0.25"), ((20, 5), "1 and 3", "1.33", "4")],
)
def test_a_plan_says_which_weights_follow_from_the_labels_and_warns_of_others(
    kto: Callable[..., Plan], labels: tuple[int, int], weights: str, ratio: str, warned: str
) -> None:
    rows = [True] * labels[0] + [False] * labels[1]
    assert noted(kto(rows)) == [
        f"{labels[0]} desirable and {labels[1]} undesirable rows, with weights of {weights}: in total, the "
        f"desirable ones count {ratio} times as much"
    ]
    cautions = [note.partition("ones ")[2] for note in noted(kto(rows, *WEIGHTS))]
    assert [caution.partition(",")[0] for caution in cautions] == [f"count {warned} times as much"] * bool(warned)


HALF = "stages.kto.data.fraction=0.5"


@pytest.mark.parametrize(("label", "more", "missing"), [(False, (), "desirable"), (True, (HALF,), "undesirable")])
def test_rows_of_one_label_are_refused(
    kto: Callable[..., Plan], label: bool, more: tuple[str, ...], missing: str
) -> None:
    planned = kto([label] * 20, *more)
    with pytest.raises(ConfigError, match=rf"stages\.kto\.data: none of the 20 rows is {missing}"):
        refuse_sizes(planned)
    assert noted(planned) == []


def test_labels_that_only_the_stage_will_know_are_not_judged(kto: Callable[..., Plan], tmp_path: Path) -> None:
    """Those that are mixed in, and those of a fraction that is drawn at random."""
    planned = kto([True] * 20, f"stages.kto.data.mix=[{{source: 'path:{tmp_path}/labelled.jsonl', share: 0.5}}]")
    refuse_sizes(planned)
    assert noted(planned) == noted(kto([True] * 30 + [False] * 10, HALF)) == []


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["stages.kto.optim.batch_size=1"], "1, but the KL divergence"),
        (["stages.kto.optim.batch_size=2", "launch=ddp", "launch.num_processes=2"], "2 leaves one row for each of 2"),
    ],
)
def test_a_batch_that_holds_no_other_answer_is_refused(kto: Callable[..., Plan], more: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        refuse_sizes(kto([True, False] * 10, *more))
    assert caught.value.where == "stages.kto.optim.batch_size"
    refuse_sizes(kto([True, False] * 10, *more, "stages.kto.loss=apo_zero_unpaired"))


LONG = "Dear all, the training on fire safety is on 21 March at nine in room four, and lunch is at noon."


def asks(folder: Path, content: str) -> None:
    write_rows(folder / "heldout.jsonl", {**ROWS["heldout"], "messages": [{**TURN, "content": content}]})


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, overrides: list[str]) -> None:
    asks(tmp_path, "Where do we meet?")
    write_rows(tmp_path / "conversations.jsonl", *[ROWS["conversations"]] * 8)


def test_a_run_without_evaluations_and_a_trial_need_no_report(plan: MakePlan) -> None:
    assert advice(plan("~stages.report", "~stages.evaluate", "~stages.evaluate_sft")) == []
    assert of_plan(plan("~stages.report")) == [], "a sweep's trials do not repeat the advice"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("stages.dpo.optim.lr=0.01", "name=mine-smoke"), []),
        (("stages.dpo.optim.lr=0.02",), ["stages.dpo.optim.lr is 0.02: above 0.01"]),
        (("stages.dpo.optim.batch_size=32",), ["stages.dpo.optim.batch_size is 32, but there are only 24 rows"]),
        (("profile=smoke",), ["this is a smoke run"]),
    ],
)
def test_what_is_odd_is_noted(plan: MakePlan, settings: tuple[str, ...], words: list[str]) -> None:
    notes = of_plan(plan(*settings))
    assert [note[: len(word)] for note, word in zip(notes, words, strict=True)] == words


def test_a_processor_without_bfloat16_is_named(plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "has_bfloat16", lambda: False)
    monkeypatch.setattr(hardware, "count_devices", lambda: 0)
    (note,) = of_plan(plan())
    assert note.endswith("model.dtype=float32 is faster here")
    assert of_plan(plan("model.dtype=float32")) == []
    monkeypatch.setattr(hardware, "count_devices", lambda: 1)
    assert of_plan(plan()) == []


def test_a_smoke_run_says_so_however_it_is_written(plan: MakePlan) -> None:
    for override in ("profile=smoke", "+profile=smoke", 'profile="smoke"', "++profile=smoke"):
        (note,) = of_plan(planned := plan(override))
    planned.run_folder.mkdir(parents=True)
    screen = StringIO()
    show_doubts(Console(file=screen, width=400), planned.run_folder, RunRecorder(planned).record)
    assert (f"note: {note}" in screen.getvalue(), read_run(planned.run_folder).record.profile) == (True, "smoke")


def test_prompts_that_are_learned_and_evaluated_are_named(plan: MakePlan, tmp_path: Path) -> None:
    asks(tmp_path, LONG)
    pairs = tmp_path / "preferences.jsonl"
    longer = {**ROWS["preferences"], "messages": [{**TURN, "content": f"Shorten this. {LONG}"}]}
    write_rows(tmp_path / "longer.jsonl", longer)
    pairs.write_text(pairs.read_text() + (tmp_path / "longer.jsonl").read_text())
    planned = plan()
    (note,) = of_plan(planned)
    assert note == (
        f"1 row that reward, dpo and ppo may learn from resembles prompts of evaluate: {pairs}:25 has "
        f"100% of the eight-word sequences of {tmp_path}/heldout.jsonl:1"
    )
    assert f"note: {note}" in screened(planned, width=400)


def test_a_primary_metric_that_a_stage_optimises_is_named_and_recorded(plan: MakePlan) -> None:
    metrics = "stages.evaluate.metrics=[{name: brevity, source: length, target: 20}, {name: liked, source: reward}]"
    scorers = "stages.ppo.scorers=[{source: reward}, {source: length, target: 20, weight: 0.5}]"
    caution = "evaluate judges by brevity, which ppo optimises (scorers[1]): a better score may only exploit gaps"
    planned = plan(metrics, scorers)
    (note,) = of_plan(planned)
    assert note.startswith(caution)
    planned.run_folder.mkdir(parents=True)
    RunRecorder(planned)
    assert read_run(planned.run_folder).record.cautions == [note]
    liked, only_length = "stages.evaluate.primary=liked", "stages.ppo.scorers=[{source: length, target: 20}]"
    assert of_plan(plan(metrics, liked)) == [note.replace("brevity", "liked").replace("scorers[1]", "scorers[0]")]
    guard = ("stages.ppo.guard.every=1", "stages.ppo.guard.scorer={source: length, target: 20}")
    assert of_plan(plan(metrics, *guard)) == [note.replace("scorers[1]", "guard.scorer")]
    assert of_plan(plan(metrics, scorers.replace("target: 20", "target: 30"))) == []
    assert of_plan(plan(metrics, liked, only_length, "stages.ppo.reward=null")) == []


def test_a_plan_says_what_its_jobs_do_not_ask_slurm_for(plan: MakePlan) -> None:
    gpus, time = "launch.backend.gpus=2", "launch.backend.time='1:00:00'"
    for settings, asked in (((), "no GPU and no time, "), ((gpus,), "no time, "), ((gpus, time), "")):
        notes = [line for line in screened(plan("launch/backend=slurm", *settings)) if "ask Slurm" in line]
        assert (len(notes), asked in "".join(notes)) == (bool(asked), True)


def test_a_plan_says_which_models_its_run_would_download(plan: MakePlan) -> None:
    missing = ["stages.evaluate.arms=['hub:org/name@main']", "model.source=hub:org/base@main"]
    notes = [line for line in screened(plan(*missing)) if "download the model" in line]
    assert notes == [f"note: the run will download the model hub:org/{name}@main" for name in ("base", "name")]
    assert not [line for line in screened(plan()) if "download the model" in line]


def test_rows_of_a_validation_are_not_learned_from_but_may_choose_a_step(plan: MakePlan, tmp_path: Path) -> None:
    asks(tmp_path, LONG)
    turns = [{**TURN, "content": LONG}, {"role": "assistant", "content": "On 21 March."}]
    own = write_rows(tmp_path / "own.jsonl", {**ROWS["conversations"], "messages": turns})
    validation = f"every: 1, data: {{source: 'path:{own}'}}"
    assert of_plan(plan(FOUR_STEPS, f"stages.sft.validation={{{validation}}}")) == []
    (note,) = of_plan(plan(FOUR_STEPS, f"stages.sft.validation={{{validation}, keep_best: true}}"))
    assert note.startswith(f"1 row by which sft chooses its step resembles prompts of evaluate: {own}:1 has 100% ")


def test_a_file_that_a_shipped_one_goes_before_is_named(overrides: list[str], tmp_path: Path) -> None:
    recipe = write(tmp_path / "mine.yaml", "defaults: [quickstart, _self_]\n")
    before = on_a_plan(make_plan(recipe, overrides))
    unrelated = write(tmp_path / "base.yaml", "hello: 1\n")
    (note,) = set(on_a_plan(make_plan(recipe, overrides))) - set(before)
    assert unrelated in note
