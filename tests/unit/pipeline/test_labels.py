"""A plan counts the labels of a stage's rows, says which weights follow, and refuses rows of one label."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from alignment import cli
from alignment.core.errors import ConfigError, DataError
from alignment.pipeline.backends.feasibility import refuse_sizes
from alignment.pipeline.execute.notes import of_plan
from alignment.pipeline.plan.plan import Plan, make_plan
from tests.unit.pipeline.conftest import TURN


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the stage's rows are."""
    return tmp_path / "labelled.jsonl"


def write(file: Path, labels: Sequence[bool | None]) -> None:
    rows = [
        {"messages": [{**TURN, "content": f"When is {day}?"}], "completion": "On 21 March."}
        | ({} if label is None else {"label": label})
        for day, label in enumerate(labels)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings(overrides: list[str], file: Path, *more: str) -> list[str]:
    """Those of the recipe ``kto`` on the rows of the file."""
    own = [entry for entry in overrides if not entry.startswith(("stages.reward", "stages.dpo", "stages.ppo"))]
    return [*own, f"stages.kto.data.source=path:{file}", *more]


def planned(overrides: list[str], file: Path, *more: str) -> Plan:
    return make_plan("kto", settings(overrides, file, *more))


def notes(overrides: list[str], file: Path, *more: str) -> list[str]:
    """What a plan says of the labels, without the name of the stage."""
    every = of_plan(planned(overrides, file, *more))
    return [note.removeprefix("kto: ") for note in every if note.startswith("kto: ")]


@pytest.mark.parametrize(
    ("labels", "weights", "ratio"),
    [((10, 10), "1 and 1", "1"), ((5, 20), "4 and 1", "1"), ((20, 5), "1 and 3", "1.33")],
)
def test_a_plan_says_which_weights_follow_from_the_labels(
    overrides: list[str], file: Path, labels: tuple[int, int], weights: str, ratio: str
) -> None:
    write(file, [True] * labels[0] + [False] * labels[1])
    assert notes(overrides, file) == [
        f"{labels[0]} desirable and {labels[1]} undesirable rows, with weights of {weights}: in total, the "
        f"desirable ones count {ratio} times as much"
    ]


@pytest.mark.parametrize(("labels", "ratio"), [((10, 10), ""), ((5, 20), "0.25"), ((20, 5), "4")])
def test_a_plan_warns_of_weights_outside_of_the_paper_s_bounds(
    overrides: list[str], file: Path, labels: tuple[int, int], ratio: str
) -> None:
    write(file, [True] * labels[0] + [False] * labels[1])
    cautions = notes(overrides, file, "stages.kto.desirable_weight=1", "stages.kto.undesirable_weight=1")
    expected = f"count {ratio} times as much, but the paper recommends 1 to 4/3; set one of the weights to null"
    assert [note.partition("ones ")[2] for note in cautions] == ([expected] if ratio else [])


@pytest.mark.parametrize(("label", "missing"), [(True, "undesirable"), (False, "desirable")])
def test_rows_of_one_label_are_refused_before_anything_is_trained(
    overrides: list[str], file: Path, label: bool, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(file, [label] * 20)
    message = f"stages.kto.data: none of the 20 rows is {missing}, but KTO learns from the difference between both"
    with pytest.raises(ConfigError) as caught:
        refuse_sizes(planned(overrides, file))
    assert message in str(caught.value)
    assert cli.main(["plan", "kto", *settings(overrides, file)]) == 2
    assert message in capsys.readouterr().err
    assert notes(overrides, file) == []


def test_rows_without_a_label_are_refused(overrides: list[str], file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(file, [None] * 20)
    with pytest.raises(DataError, match="'label' is missing: the row has no label"):
        planned(overrides, file)
    assert cli.main(["plan", "kto", *settings(overrides, file)]) == 3
    assert "label" in capsys.readouterr().err


def test_labels_that_only_the_stage_will_know_are_not_judged(overrides: list[str], file: Path) -> None:
    write(file, [True] * 20)
    mixed = f"stages.kto.data.mix=[{{source: 'path:{file}', share: 0.5}}]"
    assert notes(overrides, file, mixed) == []
    refuse_sizes(planned(overrides, file, mixed))


def test_labels_of_a_fraction_are_not_counted_but_one_label_alone_is_refused(overrides: list[str], file: Path) -> None:
    """The fraction is drawn at random, and its labels would be those of other rows."""
    half = "stages.kto.data.fraction=0.5"
    write(file, [True] * 30 + [False] * 10)
    assert len(notes(overrides, file)) == 1
    assert notes(overrides, file, half) == []
    write(file, [True] * 40)
    with pytest.raises(ConfigError, match="none of the 40 rows is undesirable"):
        refuse_sizes(planned(overrides, file, half))


def test_a_smoke_run_reads_both_labels_of_a_file_that_begins_with_one(overrides: list[str], file: Path) -> None:
    write(file, [True] * 10 + [False] * 10)
    refuse_sizes(planned(overrides, file, "profile=smoke"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["stages.kto.optim.batch_size=1"],
            "1, but the KL divergence is estimated from the other answers in the batch",
        ),
        (["stages.kto.optim.batch_size=2", "launch=ddp", "launch.num_processes=2"], "2 leaves one row for each of 2"),
    ],
)
def test_a_batch_that_holds_no_other_answer_is_refused(
    overrides: list[str], file: Path, more: list[str], message: str
) -> None:
    write(file, [True, False] * 10)
    with pytest.raises(ConfigError, match=message) as caught:
        refuse_sizes(planned(overrides, file, *more))
    assert "stages.kto.optim.batch_size" in str(caught.value)
    refuse_sizes(planned(overrides, file, *more, "stages.kto.loss=apo_zero_unpaired"))


def test_labels_are_read_from_answers_that_a_stage_samples(overrides: list[str], file: Path) -> None:
    """And rows that it would make as pairs are one good and one bad answer each."""
    sampling = [
        "+stages.sample={kind: sample, reward: null, scorers: [{source: length, target: 3}], select: labels}",
        f"+stages.sample.data.source=path:{file}",
        "stages.kto.data.source=stage:sample",
    ]
    write(file, [True, False] * 10)
    plan = planned(overrides, file, *sampling)
    (stage,) = (stage for stage in plan.stages if stage.name == "kto")
    assert stage.unmade == ("sample",)
    with pytest.raises(ConfigError, match="'label' is missing"):
        planned(overrides, file, *sampling, "stages.sample.select=best")
