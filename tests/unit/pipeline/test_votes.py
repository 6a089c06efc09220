"""Votes of people in a plan: as a judge's, whose content counts, and as pairs to learn from."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from alignment.commands.doctor import show_diagnosis
from alignment.config.data import SourceConfig
from alignment.core.errors import ConfigError, DataError
from alignment.data.reading import iterate, start
from alignment.data.records import PreferencePair
from alignment.pipeline.execute import notes
from alignment.pipeline.plan.plan import Plan, PlannedStage
from alignment.records.votes import TIE, append_vote
from tests.judged import DPO, SFT, pair, vote
from tests.unit.pipeline.conftest import TURN, MakePlan, leave_artifact

PEOPLE = "stages.evaluate.judge.kind=people"
TIES = 3


def votes_in(path: Path, *, number: int = 30, ties: int = TIES, first_prompt: str = "") -> Path:
    """As many votes on different prompts, the first ones ties."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        about = pair(index)
        if first_prompt and index == number - 1:
            turns = [{"role": "user", "content": first_prompt}]
            about = type(about)(key=about.key, messages=turns, answers=about.answers)
        append_vote(path, vote(about, TIE if index < ties else DPO if index % 2 else SFT))
    return path


def stage_of(plan: Plan, name: str = "evaluate") -> PlannedStage:
    return next(stage for stage in plan.stages if stage.name == name)


def test_the_content_of_the_votes_counts_and_their_place_does_not(plan: MakePlan, tmp_path: Path) -> None:
    without = stage_of(plan(PEOPLE))
    assert "files" not in without.identity
    own = votes_in(tmp_path / "out" / "runs" / "quickstart" / "evaluate" / "votes.jsonl")
    with_votes = stage_of(plan(PEOPLE))
    assert with_votes.extra_data["judge.votes"] == own
    assert with_votes.fingerprint != without.fingerprint
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(own.read_bytes())
    assert stage_of(plan(PEOPLE, f"stages.evaluate.judge.votes={copy}")).fingerprint == with_votes.fingerprint
    append_vote(own, vote(pair(99)))
    assert stage_of(plan(PEOPLE)).fingerprint != with_votes.fingerprint
    assert stage_of(plan()).fingerprint == stage_of(plan("name=other")).fingerprint, "who judges by nobody reads none"


def test_the_plan_names_the_command_that_collects_votes_until_there_are_some(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    command = "align judge quickstart --stage evaluate"

    def vote_notes(*more: str) -> list[str]:
        return [note for note in notes.of_plan(plan(*more)) if "voted" in note]

    assert vote_notes(PEOPLE) == [
        f"evaluate: nobody has voted yet, so there is no win rate; after the run, collect votes with `{command} "
        "--arm ARM --arm ARM`, and run the recipe again to count them"
    ]
    pairs = "stages.evaluate.judge.pairs=[{arm: 'stage:dpo', against: 'stage:sft'}]"
    assert f"`{command} --arm stage:dpo --arm stage:sft`" in vote_notes(PEOPLE, pairs)[0]
    (tmp_path / "none yet.jsonl").touch()
    elsewhere = f"stages.evaluate.judge.votes='{tmp_path}/none yet.jsonl'"
    assert f"--votes '{tmp_path}/none yet.jsonl'`" in vote_notes(PEOPLE, elsewhere)[0]
    monkeypatch.chdir(tmp_path)
    two = ("stages.evaluate.arms=[base,stage:sft]", "stages.evaluate.reference=base")
    assert f"`{command} --output {tmp_path}/out`" in vote_notes(PEOPLE, *two)[0]
    leave_artifact(stage_of(plan(PEOPLE)))
    assert vote_notes(PEOPLE), "a result that is reused has no win rate either"
    votes_in(tmp_path / "out" / "runs" / "quickstart" / "evaluate" / "votes.jsonl")
    assert vote_notes(PEOPLE) == vote_notes() == []


def test_the_plan_says_that_votes_are_why_the_stage_runs_again(plan: MakePlan, tmp_path: Path) -> None:
    leave_artifact(stage_of(plan(PEOPLE)))
    votes_in(tmp_path / "out" / "runs" / "quickstart" / "evaluate" / "votes.jsonl")
    assert stage_of(plan(PEOPLE)).reason.startswith("judge.votes changed (nearest: evaluate-")


def test_a_file_that_is_missing_or_damaged_stops_the_plan(plan: MakePlan, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"stages\.evaluate\.judge\.votes: no file"):
        plan(PEOPLE, "stages.evaluate.judge.votes=none.jsonl")
    own = votes_in(tmp_path / "out" / "runs" / "quickstart" / "evaluate" / "votes.jsonl")
    own.write_text(own.read_text().replace("It is 5 from dpo.", "It is 6 from dpo."))
    with pytest.raises(DataError, match=r"votes\.jsonl:6: the prompt or an answer differs from what was voted on"):
        plan(PEOPLE)


def test_rows_of_several_turns_are_refused_where_people_judge(plan: MakePlan, tmp_path: Path) -> None:
    rows = tmp_path / "turns.jsonl"
    rows.write_text('{"turns": ["One?"]}\n{"turns": ["One?", "Two?"]}\n')
    source = [f"stages.evaluate.data.source=path:{rows}", "stages.evaluate.metrics=[]"]
    plan(*source)
    with pytest.raises(DataError, match=r"turns.jsonl:2: 'turns' asks 2 turns, but people judge single answers"):
        plan(PEOPLE, *source)


def test_without_its_library_people_are_refused_with_what_to_install(
    plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "krippendorff" else find(name))
    with pytest.raises(ConfigError, match=r"pip install 'krippendorff>=0\.9,<0\.10'"):
        plan(PEOPLE)


def test_votes_are_pairs_and_ties_are_set_aside(tmp_path: Path) -> None:
    path = votes_in(tmp_path / "votes.jsonl")
    reading = start(path, SourceConfig())
    pairs = list(iterate(path, PreferencePair, SourceConfig(), reading=reading))
    assert reading.format.name == "votes"
    assert (len(pairs), reading.set_aside.count) == (30 - TIES, TIES)
    about = pair(4)
    read = next(preference for preference in pairs if preference.id == "p4")
    assert (read.chosen, read.rejected) == (about.answers[SFT], about.answers[DPO])
    assert [turn.as_dict() for turn in read.messages] == about.messages
    assert read.task == "counting"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "?", "answers": {"a": "x", "b": "y"}, "preferred": "c"}', "'preferred' must be one of a, b, tie"),
        ('{"prompt": "?", "answers": {"a": "x", "b": "x"}, "preferred": "b"}', "is the same as 'chosen'"),
        ('{"prompt": "?", "answers": {"a": "x", "b": ""}, "preferred": "a"}', "'answers.b' is empty"),
    ],
)
def test_a_row_of_votes_that_is_no_pair_says_why(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "votes.jsonl").write_text(line + "\n")
    with pytest.raises(DataError) as caught:
        list(iterate(tmp_path / "votes.jsonl", PreferencePair, SourceConfig()))
    assert words in str(caught.value)


def noted(plan: MakePlan, path: Path) -> Sequence[str]:
    sources = [f"stages.{stage}.data.source=path:{path}" for stage in ("reward", "dpo")]
    return notes.of_plan(plan(*sources))


def test_the_plan_counts_ties_and_warns_of_prompts_that_are_evaluated_too(plan: MakePlan, tmp_path: Path) -> None:
    path = votes_in(tmp_path / "votes.jsonl", first_prompt=TURN["content"])
    plan_notes = noted(plan, path)
    (ties,) = [note for note in plan_notes if "left out" in note]
    assert ties == (
        "stages.reward.data and stages.dpo.data: 3 rows are left out: 'preferred' says that the answers are tied"
    )
    assert any(
        note.startswith("1 row that reward and dpo may learn from resembles prompts of evaluate") for note in plan_notes
    ), plan_notes
    others = noted(plan, votes_in(tmp_path / "others.jsonl", ties=0))
    assert not any("dpo" in note and ("left out" in note or "resemble" in note) for note in others)


def test_doctor_says_what_votes_are_and_how_many_tie(tmp_path: Path) -> None:
    path = votes_in(tmp_path / "votes.jsonl")
    console = Console(width=300, record=True)
    assert show_diagnosis(console, SourceConfig(source=str(path))) == 0
    printed = console.export_text()
    assert "votes: two answers by the names of their arms" in printed
    assert "reward, dpo" in printed
    assert "27 pairs" in printed
    assert "3 rows, in" in printed
    assert "'preferred' says that the answers are tied (votes.jsonl:1, votes.jsonl:2, votes.jsonl:3)" in printed
    assert f"stages.dpo.data.source=path:{path}" in printed
