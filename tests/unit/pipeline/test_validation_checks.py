"""Validation that a plan knows to be impossible is refused, and one that is absent is no part of a fingerprint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignment.config.data import DataConfig
from alignment.config.optim import OptimConfig
from alignment.config.run import RunConfig
from alignment.config.store import conf_folder
from alignment.config.validation import ValidationConfig
from alignment.core.errors import ConfigError
from alignment.core.fingerprint import canonical
from alignment.pipeline.backends.feasibility import refuse_sizes
from alignment.pipeline.execute.notes import of_plan
from alignment.pipeline.plan import profile
from alignment.pipeline.plan.row_counts import Seen, faults
from alignment.pipeline.plan.validation_checks import settings_faults
from alignment.stages.cpt.config import CptConfig
from alignment.stages.dpo.config import DpoConfig
from alignment.stages.registry import kind_of
from alignment.stages.sft.config import SftConfig
from alignment.training.looks import Looks
from tests.unit.pipeline.conftest import ROWS, TURN, MakePlan

DPO, WHERE = "stages.dpo.validation", "stages.s.validation"
UNREAD = f"has no effect; only validation ({WHERE}.every above 0) uses it; leave it at"


OWN = DataConfig(source="path:own.jsonl")


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        (
            ValidationConfig(share=0.1, every=5, data=OWN),
            f"{WHERE}.share: 0.1 of the stage's own prompts, but {WHERE}.data also names validation rows; remove "
            f"one of the two",
        ),
        (
            ValidationConfig(every=5),
            f"{WHERE}.every: 5, but there are no validation rows; set {WHERE}.share=0.05, or {WHERE}.data.source",
        ),
        (ValidationConfig(keep_best=True), f"{WHERE}.keep_best: True {UNREAD} False"),
        (ValidationConfig(patience=3), f"{WHERE}.patience: 3 {UNREAD} None"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(validation: ValidationConfig, message: str) -> None:
    assert [str(fault) for fault in settings_faults(validation, WHERE)] == [message]


def test_a_plan_refuses_them_with_all_other_faults(plan: MakePlan) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(f"{DPO}={{keep_best: true, data: {{source: 'bundled:quickstart/preferences', format: sharegpd}}}}")
    for part in ("validation.keep_best: True has no effect", "validation.data.format: 'sharegpd' is not a format"):
        assert f"stages.dpo.{part}" in str(caught.value)


def test_a_share_of_texts_is_refused() -> None:
    config = CptConfig(validation=ValidationConfig(share=0.1, every=2))
    (fault,) = kind_of(config).faults(config, RunConfig(name="r"), "stages.cpt")
    assert str(fault).startswith("stages.cpt.validation.share: a text becomes several rows")


def fault_messages(validation: ValidationConfig, *, rows: int = 40, **optim: object) -> list[str]:
    """The faults of DPO on so many rows, each with a prompt of its own."""
    config = DpoConfig(validation=validation, optim=OptimConfig(**{"lr": 1e-4, "batch_size": 8, **optim}))  # type: ignore[arg-type]
    seen = Seen(rows=rows, prompts=rows, whole=True, openings=frozenset(range(rows)))
    return [str(fault) for fault in faults(config, {"data": seen}, where="stages.s")]


@pytest.mark.parametrize(
    ("validation", "settings", "message"),
    [
        (
            ValidationConfig(share=0.01, every=1),
            {},
            f"{WHERE}.share: 40 prompts are too few to hold out a share of 0.01; choose another share, add rows, or "
            f"name separate rows in {WHERE}.data",
        ),
        (
            ValidationConfig(share=0.85, every=1),
            {"warmup_ratio": 0.0},
            f"{WHERE}.share: 0.85 leaves at most 6 of 40 rows to learn from, less than one batch of 8; choose a "
            "smaller share or smaller batches, or add rows",
        ),
        (
            ValidationConfig(share=0.2, every=5),
            {},
            f"{WHERE}.every: 5 is more than the 4 optimiser steps of the stage; choose at most 4",
        ),
        (
            ValidationConfig(share=0.2, every=11),
            {"max_steps": 10},
            f"{WHERE}.every: 11 is more than the 10 optimiser steps of the stage; choose at most 10",
        ),
        (
            ValidationConfig(share=0.2, every=4, patience=3),
            {"max_steps": 10},
            f"{WHERE}.patience: 3 has no effect: of 3 validations, at most 2 can follow the best one; choose less, "
            f"or validate more often",
        ),
    ],
)
def test_too_few_rows_or_steps_are_named_exactly(
    validation: ValidationConfig, settings: dict[str, object], message: str
) -> None:
    assert fault_messages(validation, **settings) == [message]


def test_enough_rows_and_steps_are_not_refused() -> None:
    assert fault_messages(ValidationConfig(share=0.2, every=4)) == []
    assert fault_messages(ValidationConfig(share=0.2, every=4, patience=2), max_steps=10) == []


def _own(tmp_path: Path, *questions: str) -> str:
    file = tmp_path / "own.jsonl"
    file.write_text(
        "".join(json.dumps({**ROWS["conversations"], "messages": _asked(question)}) + "\n" for question in questions)
    )
    return f"stages.sft.validation={{every: 1, data: {{source: 'path:{file}'}}}}"


def _asked(question: str) -> list[dict[str, str]]:
    return [{**TURN, "content": question}, {"role": "assistant", "content": "On 21 March."}]


def test_held_out_prompts_that_are_learned_from_are_refused_and_near_ones_are_named(
    plan: MakePlan, tmp_path: Path
) -> None:
    steps = ("stages.sft.optim.max_steps=4",)
    same = plan(_own(tmp_path, TURN["content"], "Where is it?"), *steps)
    with pytest.raises(ConfigError) as caught:
        refuse_sizes(same)
    assert str(caught.value).startswith(
        "stages.sft.validation.data.source: 1 of its 2 different prompts are also training prompts"
    )
    near = plan(_own(tmp_path, "when is the training", "Where is it?"), *steps)
    refuse_sizes(near)
    assert any("1 possible training row of sft resembles its validation rows" in note for note in of_plan(near))
    other = plan(_own(tmp_path, "Where is it?"), *steps)
    assert not any("resembles its validation rows" in note for note in of_plan(other))


def _fingerprint(plan: MakePlan, *overrides: str) -> str:
    return next(stage.fingerprint for stage in plan(*overrides).stages if stage.name == "sft")


def test_held_out_rows_of_their_own_count_by_their_content(plan: MakePlan, tmp_path: Path) -> None:
    base = _fingerprint(plan)
    held_out = _fingerprint(plan, _own(tmp_path, "Where is it?"))
    other = _fingerprint(plan, _own(tmp_path, "Who is it?"))
    assert len({base, held_out, other}) == 3


def test_settings_at_their_defaults_are_no_part_of_a_fingerprint() -> None:
    assert "validation" not in canonical(SftConfig())
    assert canonical(SftConfig(validation=ValidationConfig(share=0.1, every=5)))["validation"]["every"] == 5


def test_a_smoke_run_does_not_look() -> None:
    looks = {"share": 0.5, "data": {"source": "path:own.jsonl"}, "every": 100, "keep_best": True, "patience": 2}
    stages = {kind: {"kind": kind, "validation": looks} for kind in ("cpt", "sft", "reward", "dpo")}
    smoke = profile.read(conf_folder() / "profile/smoke.yaml").applied_to({"stages": stages})["stages"]
    for stage in smoke.values():
        assert ValidationConfig(**{**stage["validation"], "data": DataConfig(**stage["validation"]["data"])}) == (
            ValidationConfig()
        )


def test_looks_count_from_the_last_improvement() -> None:
    looks = Looks()
    losses = [3.0, 2.0, 2.0, 1.5, 1.6, 1.7]
    improved = [looks.add(step, loss, patience=2) for step, loss in enumerate(losses, start=1)]
    assert improved == [True, True, False, True, False, False]
    assert (looks.best_step, looks.best_loss, looks.last_loss, looks.out_of_patience) == (4, 1.5, 1.7, True)
    assert not Looks().add(1, float("inf"), patience=None)
