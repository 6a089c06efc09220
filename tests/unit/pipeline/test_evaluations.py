"""Evaluations as a plan sees them: metrics, judges, votes, examples and cards; and what the terminal shows of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignment.commands.doctor import show_diagnosis
from alignment.config.data import SourceConfig
from alignment.core.errors import AlignmentError, ConfigError, DataError
from alignment.core.fingerprint import file_sha256
from alignment.data.reading import iterate, start
from alignment.data.records import PreferencePair
from alignment.pipeline.backends.feasibility import why_not_here
from alignment.pipeline.execute import notes
from alignment.pipeline.execute.summary import show_card, show_evaluation
from alignment.pipeline.plan.compose import compose
from alignment.pipeline.plan.plan import PlannedStage, make_plan
from alignment.pipeline.plan.references import slots
from alignment.records.evaluation import (
    ArmResult,
    Comparison,
    Evaluation,
    Grading,
    Judge,
    JudgedByPeople,
    JudgedPair,
    Metric,
)
from alignment.records.interval import Interval
from alignment.records.reward_card import Baseline, RewardCard
from alignment.records.votes import TIE, append_vote
from tests.hub import weights_file
from tests.judged import DPO, SFT, pair, vote
from tests.unit.pipeline.conftest import ROWS, TURN, MakePlan, leave_artifact, stage_of, write, write_rows
from tests.unit.pipeline.worker import INTERVAL

METRICS = "stages.evaluate.metrics"
JUDGE = "stages.evaluate.judge"
GRADER = "stages.evaluate.grader"
ENDPOINT = "endpoint={base_url: 'http://localhost:8000/v1', model: m}"
GRADED = (f"{METRICS}=[{{name: helpful, source: grade}}]", "stages.evaluate.primary=helpful", f"{GRADER}.{ENDPOINT}")
JUDGED = (f"{JUDGE}.kind=endpoint", f"{JUDGE}.{ENDPOINT}")
Evaluated = Callable[..., PlannedStage]


@pytest.fixture
def evaluated(plan: MakePlan) -> Evaluated:
    """Plans the evaluation with more overrides."""
    return lambda *overrides: stage_of(plan(*overrides), "evaluate")


@pytest.fixture
def fingerprint(evaluated: Evaluated) -> Callable[..., str]:
    return lambda *overrides: evaluated(*overrides).fingerprint


# ---- metrics --------------------------------------------------------------------------------------------------------


def test_any_prompts_do_and_rows_are_held_against_what_a_rule_looks_at(plan: MakePlan, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "heldout.jsonl", {"messages": [TURN], "answer": "#### 21"}, {"messages": [TURN]})
    plan(f"{METRICS}=[]")
    right = f"{METRICS}=[{{name: right, source: exact_answer}}]"
    plan(right, "stages.evaluate.data.limit=1")
    with pytest.raises(DataError, match=rf"{file}:2: 'answer' is missing"):
        plan(right)
    write(tmp_path / "heldout.jsonl", "")
    with pytest.raises(DataError, match="contains no rows"):
        plan()


def test_the_code_of_a_metric_counts_by_its_content_alone(evaluated: Evaluated, tmp_path: Path) -> None:
    def metric(file: str) -> str:
        return f"{METRICS}=[{{name: brevity, source: '{file}:brevity'}}]"

    text = "def brevity(prompts, completions, rows): return [-len(text) for text in completions]\n"
    file, moved = write(tmp_path / "score.py", text), write(tmp_path / "moved.py", text)
    first = evaluated(metric(file))
    assert first.identity["code"] == {"metrics[0].source": file_sha256(Path(file))}
    assert evaluated(metric(moved)).fingerprint == first.fingerprint
    write(tmp_path / "score.py", text.replace("-len", "-2 * len"))
    assert evaluated(metric(file)).fingerprint != first.fingerprint


TWO_ARMS = "stages.evaluate.arms=[base, 'stage:sft']"


@pytest.mark.parametrize(
    ("settings", "same", "different"),
    [
        (
            [TWO_ARMS],
            ["stages.evaluate.primary=style_and_facts", "stages.evaluate.system_prompt=Be brief."],
            ["stages.evaluate.primary=style", f"{METRICS}.1.higher_is_better=false", f"{METRICS}.1.name=manner"],
        ),
        ([], [], ["stages.evaluate.system_prompt=Be brief."]),
        (
            GRADED,
            [f"{GRADER}.endpoint.timeout=30", f"{GRADER}.endpoint.api_key_env=KEY"],
            [f"{GRADER}.{text}" for text in ("rubric=short", "highest=5", "show_reference=true", "endpoint.model=n")]
            + [f"{METRICS}=[{{name: helpful, source: grade, rubric: short}}]"],
        ),
        (
            JUDGED,
            [f"{JUDGE}.endpoint.{text}" for text in ("timeout=3", "retries=0", "concurrency=9", "api_key_env=PATH")],
            [f"{JUDGE}.endpoint.{text}" for text in ("model=n", "criteria=Short.", "base_url='http://localhost:1'")],
        ),
    ],
    ids=["metrics", "a system prompt", "a grader", "a judge"],
)
def test_what_counts_of_an_evaluation_s_settings(
    fingerprint: Callable[..., str], settings: list[str], same: list[str], different: list[str]
) -> None:
    first = fingerprint(*settings)
    assert {first, *(fingerprint(*settings, change) for change in same)} == {first}
    assert len({first, *(fingerprint(*settings, change) for change in different)}) == len(different) + 1


def test_a_metric_may_be_a_reward_model_of_its_own(evaluated: Evaluated, tmp_path: Path) -> None:
    stage = evaluated(f"{METRICS}=[{{name: liked, source: 'stage:reward'}}]", "stages.evaluate.reward=null")
    assert (stage.inputs["metrics[0].source"].ref, "reward" in stage.inputs) == ("stage:reward", False)
    with pytest.raises(AlignmentError, match="nowhere"):
        evaluated(f"{METRICS}=[{{name: liked, source: 'path:{tmp_path}/nowhere'}}]")


def test_a_recipe_that_samples_runs_as_smoke(tmp_path: Path) -> None:
    recipe = write(
        tmp_path / "sampled.yaml",
        "defaults: [base, stage@stages.evaluate: evaluate, _self_]\nsummary: samples\nstages:\n  evaluate:\n"
        "    arms: [base]\n    reference: base\n    reward: null\n"
        "    answers: {per_prompt: 4, temperature: 1.0}\n    gate: [{arm: base, against: base}]\n"
        "    metrics: [{name: p, source: length, target: 9, aggregate: pass@4}]\n",
    )
    tree = compose(recipe, ["profile=smoke"]).tree["stages"]["evaluate"]
    assert (tree["answers"], tree["gate"]) == ({"per_prompt": 4, "temperature": 1.0}, [])


# ---- judges, examples and other models ------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "part"), [(JUDGED, f"{JUDGE}.endpoint"), (GRADED, f"{GRADER}.endpoint")])
def test_a_missing_client_and_a_missing_key_are_named(
    plan: MakePlan, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...], part: str
) -> None:
    monkeypatch.delenv("A_KEY", raising=False)
    planned = plan(*settings, f"{part}.api_key_env=A_KEY")
    assert f"{part}.api_key_env: the environment variable A_KEY is not set" in why_not_here(planned)
    monkeypatch.setenv("A_KEY", "sk-canary")
    assert why_not_here(planned) == ""
    assert "canary" not in repr(planned)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openai" else find(name))
    with pytest.raises(ConfigError, match=r"pip install 'openai>=3,<4'"):
        plan(*settings)
    plan(f"{JUDGE}.kind=metric")


def test_examples_count_where_there_is_an_arm_for_them(evaluated: Evaluated, tmp_path: Path) -> None:
    arms, file = "stages.evaluate.arms=[base,base+few-shot]", tmp_path / "conversations.jsonl"
    source = f"stages.evaluate.few_shot.data.source=path:{file}"
    before = evaluated(arms, source)
    assert before.extra_data == {"few_shot.data": file}
    assert evaluated(arms, source, "stages.evaluate.few_shot.count=5").fingerprint != before.fingerprint
    assert evaluated(source).extra_data == {}
    write_rows(file, {"messages": [TURN, {"role": "assistant", "content": "On 22 March."}]})
    assert evaluated(arms, source).fingerprint != before.fingerprint
    write(file, "{}\n")
    with pytest.raises(DataError):
        evaluated(arms, source)


def test_a_model_from_outside_may_be_an_arm(plan: MakePlan, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write(other / "config.json", "{}")
    (other / "model.safetensors").write_bytes(weights_file(b"others"))
    planned = plan(f"stages.evaluate.arms=['path:{other}','hub:org/name@main']")
    assert stage_of(planned, "evaluate").arms[f"path:{other}"].path == other
    assert not planned.sources["hub:org/name@main"].ready, "a run downloads it"


def test_labelled_rows_that_the_judging_metric_cannot_read_are_refused(evaluated: Evaluated, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "pairs.jsonl", {"prompt": "2 + 2?", "chosen": "4.", "rejected": "5."})
    by_facts = [f"{JUDGE}.kind=metric", "stages.evaluate.primary=facts"]
    labelled, metric = f"{JUDGE}.labelled.data.source='path:{file}'", f"{METRICS}=[{{name: facts, source: %s}}]"
    without = evaluated(*by_facts, metric % "refusal")
    assert evaluated(*by_facts, labelled, metric % "refusal").fingerprint != without.fingerprint
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: 'facts' is missing"):
        evaluated(*by_facts, labelled, metric % "key_facts")


# ---- votes ----------------------------------------------------------------------------------------------------------

PEOPLE = f"{JUDGE}.kind=people"


def votes_in(path: Path, *, ties: int = 3, first_prompt: str = "") -> Path:
    """Thirty votes on different prompts, the first ones ties."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for index in range(30):
        about = pair(index)
        if first_prompt and index == 29:
            turns = [{"role": "user", "content": first_prompt}]
            about = type(about)(key=about.key, messages=turns, answers=about.answers)
        append_vote(path, vote(about, TIE if index < ties else DPO if index % 2 else SFT))
    return path


@pytest.fixture
def own_votes(tmp_path: Path) -> Path:
    """Where the run of these tests looks for votes."""
    return tmp_path / "out/runs/quickstart/evaluate/votes.jsonl"


def test_the_content_of_the_votes_counts_and_their_place_does_not(
    evaluated: Evaluated, own_votes: Path, tmp_path: Path
) -> None:
    without = evaluated(PEOPLE)
    assert "files" not in without.identity
    leave_artifact(without)
    votes_in(own_votes)
    with_votes = evaluated(PEOPLE)
    assert with_votes.extra_data["judge.votes"] == own_votes
    assert with_votes.reason.startswith("judge.votes changed (nearest: evaluate-")
    copy = write(tmp_path / "copy.jsonl", own_votes.read_text())
    assert evaluated(PEOPLE, f"{JUDGE}.votes={copy}").fingerprint == with_votes.fingerprint
    append_vote(own_votes, vote(pair(99)))
    assert len({stage.fingerprint for stage in (without, with_votes, evaluated(PEOPLE))}) == 3
    assert evaluated().fingerprint == evaluated("name=other").fingerprint, "who judges by nobody reads none"
    write(own_votes, own_votes.read_text().replace("It is 5 from dpo.", "It is 6 from dpo."))
    with pytest.raises(DataError, match=r"votes\.jsonl:6: the prompt or an answer differs"):
        evaluated(PEOPLE)


def test_the_plan_names_the_command_that_collects_votes_until_there_are_some(
    plan: MakePlan, own_votes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")

    def vote_notes(*more: str) -> list[str]:
        return [note for note in notes.of_plan(plan(*more)) if "voted" in note]

    command = "collect votes with `align judge quickstart --stage evaluate"
    pairs, elsewhere = f"{JUDGE}.pairs=[{{arm: 'stage:dpo', against: 'stage:sft'}}]", tmp_path / "none yet.jsonl"
    elsewhere.touch()
    for settings, options in (
        ((), "--arm ARM --arm ARM"),
        ((pairs,), "--arm stage:dpo --arm stage:sft"),
        ((f"{JUDGE}.votes='{elsewhere}'",), f"--arm ARM --arm ARM --votes '{elsewhere}'"),
        (("stages.evaluate.arms=[base,stage:sft]", "stages.evaluate.reference=base"), ""),
    ):
        (note,) = vote_notes(PEOPLE, *settings)
        assert f"{command} {options}".rstrip() + "`" in note
    monkeypatch.chdir(tmp_path)
    assert f"--output {tmp_path}/out" in vote_notes(PEOPLE)[0]
    leave_artifact(stage_of(plan(PEOPLE), "evaluate"))
    assert vote_notes(PEOPLE), "a result that is reused has no win rate either"
    votes_in(own_votes)
    assert vote_notes(PEOPLE) == vote_notes() == []


def test_what_people_judge_has_one_turn_and_a_library(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "turns.jsonl", {"turns": ["One?"]}, {"turns": ["One?", "Two?"]})
    source = [f"stages.evaluate.data.source=path:{rows}", f"{METRICS}=[]"]
    plan(*source)
    with pytest.raises(DataError, match=r"turns.jsonl:2: 'turns' asks 2 turns, but people judge single answers"):
        plan(PEOPLE, *source)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "krippendorff" else find(name))
    with pytest.raises(ConfigError, match=r"pip install 'krippendorff>=0\.9,<0\.10'"):
        plan(PEOPLE)


def test_votes_are_pairs_and_ties_are_set_aside(tmp_path: Path) -> None:
    path = votes_in(tmp_path / "votes.jsonl")
    reading = start(path, SourceConfig())
    pairs = list(iterate(path, PreferencePair, SourceConfig(), reading=reading))
    assert (reading.format.name, len(pairs), reading.set_aside.count) == ("votes", 27, 3)
    about = pair(4)
    read = next(preference for preference in pairs if preference.id == "p4")
    assert (read.chosen, read.rejected, read.task) == (about.answers[SFT], about.answers[DPO], "counting")
    assert [turn.as_dict() for turn in read.messages] == about.messages
    console = Console(width=300, record=True)
    assert show_diagnosis(console, SourceConfig(source=str(path))) == 0
    printed = console.export_text()
    ties = "'preferred' says that the answers are tied (votes.jsonl:1, votes.jsonl:2, votes.jsonl:3)"
    for words in ("votes: two answers", "27 pairs", "3 rows, in", ties, f"stages.dpo.data.source=path:{path}"):
        assert words in printed


@pytest.mark.parametrize(
    ("answers", "preferred", "words"),
    [
        ({"a": "x", "b": "y"}, "c", "'preferred' must be one of a, b, tie"),
        ({"a": "x", "b": "x"}, "b", "is the same as 'chosen'"),
        ({"a": "x", "b": ""}, "a", "'answers.b' is empty"),
    ],
)
def test_a_row_of_votes_that_is_no_pair_says_why(
    tmp_path: Path, answers: dict[str, str], preferred: str, words: str
) -> None:
    file = write_rows(tmp_path / "votes.jsonl", {"prompt": "?", "answers": answers, "preferred": preferred})
    with pytest.raises(DataError) as caught:
        list(iterate(Path(file), PreferencePair, SourceConfig()))
    assert words in str(caught.value)


def test_the_plan_counts_ties_and_warns_of_prompts_that_are_evaluated_too(plan: MakePlan, tmp_path: Path) -> None:
    def noted(path: Path) -> list[str]:
        sources = [f"stages.{stage}.data.source=path:{path}" for stage in ("reward", "dpo")]
        every = notes.of_plan(plan(*sources))
        return [note for note in every if "dpo" in note and ("left out" in note or "resemble" in note)]

    ties, resembles = noted(votes_in(tmp_path / "votes.jsonl", first_prompt=TURN["content"]))
    if "resemble" in ties:
        ties, resembles = resembles, ties
    assert ties.startswith("stages.reward.data and stages.dpo.data: 3 rows are left out")
    assert resembles.startswith("1 row that reward and dpo may learn from resembles prompts of evaluate")
    assert noted(votes_in(tmp_path / "others.jsonl", ties=0)) == []


# ---- reward cards ---------------------------------------------------------------------------------------------------


@pytest.fixture
def card(tmp_path: Path, overrides: list[str]) -> Evaluated:
    """Plans the reward card of its recipe with more overrides."""
    for name in ("learned", "judged", "others"):
        write_rows(tmp_path / f"{name}.jsonl", {**ROWS["preferences"], "id": name})
    given = [override for override in overrides if not override.startswith("stages.")]
    given += [f"stages.reward.data.source=path:{tmp_path}/learned.jsonl"]
    given += [f"stages.card.data.source=path:{tmp_path}/judged.jsonl"]
    return lambda *more: stage_of(make_plan("reward_card", [*given, *more]), "card")


def test_the_pairs_of_the_reward_stage_are_those_that_were_learned_unless_others_are_named(
    card: Evaluated, tmp_path: Path
) -> None:
    mix = f"stages.reward.data.mix=[{{source: 'path:{tmp_path}/others.jsonl', count: 1}}]"
    planned = card("stages.reward.data.limit=7", "stages.reward.data.fraction=0.5", mix)
    learned = planned.config.learned  # type: ignore[attr-defined]
    assert (learned.limit, learned.fraction, learned.mix) == (7, 0.5, [])
    assert planned.extra_data == {"learned": tmp_path / "learned.jsonl"}
    others = card(f"stages.card.learned.source=path:{tmp_path}/others.jsonl", "stages.card.learned.limit=1")
    assert others.extra_data == {"learned": tmp_path / "others.jsonl"}


def test_other_learned_pairs_and_another_rule_make_another_card(card: Evaluated, tmp_path: Path) -> None:
    cards = [card(), card(f"stages.card.learned.source=path:{tmp_path}/others.jsonl"), card("stages.card.rule=null")]
    assert len({planned.fingerprint for planned in cards}) == 3
    assert card("stages.card.micro_batch_tokens=99").fingerprint == cards[0].fingerprint
    assert (list(cards[0].identity["code"]), "code" in cards[2].identity) == (["rule.source"], False)


def test_of_a_model_from_elsewhere_nothing_is_known(card: Evaluated, tmp_path: Path) -> None:
    judge = tmp_path / "judge"
    write(judge / "config.json", '{"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}')
    (judge / "model.safetensors").write_bytes(weights_file())
    planned = card("~stages.reward", f"stages.card.reward=path:{judge}")
    assert (planned.extra_data, planned.inputs["reward"].path) == ({}, judge)
    (slot,) = slots(planned.config)
    assert slot.external


# ---- what the terminal shows ----------------------------------------------------------------------------------------

ARM = ArmResult(
    name="stage:dpo",
    label="dpo",
    metrics={"brevity": Interval(**INTERVAL), "tone": Interval(mean=0.25)},
    words=Interval(mean=21.4),
    loss=Interval(mean=1.234),
)
BREVITY = Metric(name="brevity")
EVALUATION = Evaluation(num_prompts=30, metrics=[BREVITY, Metric(name="tone")], primary="brevity", arms=[ARM])
LESS = Comparison(arm="stage:dpo", against="stage:sft", difference=-0.1, low=-0.2, high=-0.05)
WINS = JudgedPair(
    arm="stage:dpo", against="stage:sft", wins=8, ties=5, losses=3,
    win_rate=Interval(mean=0.66, low=0.52, high=0.79), verdict="better",
)  # fmt: skip
OF_VOTES = replace(
    WINS, prompts=17, metric_agreement=4 / 13, metric_kappa=-0.2, metric_prompts=13,
    people=JudgedByPeople(judged=13, same_answers=3, annotators=2, votes=20, alpha=0.612),
)  # fmt: skip
INVALID = replace(WINS, invalid=0.4, win_rate=None, verdict="nothing can be concluded")


def printed(*, width: int = 200, reference: str | None = None, **changes: Any) -> str:
    console = Console(width=width, record=True)
    show_evaluation(console, replace(EVALUATION, **changes), reference=reference)
    return console.export_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"judge": Judge(name="m", pairs=[WINS])}, "by m, dpo wins 0.66 (0.52 to 0.79) against sft: better\n"),
        (
            {"judge": Judge(name="m", pairs=[WINS, INVALID])},
            "by m, dpo against sft: nothing can be concluded (40% of the verdicts are invalid)",
        ),
        (  # a win rate over sixteen prompts, of which people judged thirteen, names both numbers
            {"judge": Judge(kind="people", name="people", num_prompts=13, pairs=[OF_VOTES])},
            "by people, dpo wins 0.66 (0.52 to 0.79) against sft: better (over 16 of 17 prompts: 13 judged, "
            "3 with identical answers; 20 votes, annotators: 2, Krippendorff's α 0.61); brevity prefers the same arm "
            "on 31% of 13 prompts with different answers (κ -0.20)\n",
        ),
        (
            {"comparisons": [replace(LESS, adjusted_p=0.38)]},
            "dpo against sft: -0.100 (-0.200 to -0.050), adjusted p 0.38, no real difference",
        ),
        (
            {"gradings": [Grading(metric="brevity", model="m", num_prompts=2, invalid={"stage:dpo": 0.4},
                                  left_out=["stage:dpo"])]},
            "By brevity, nothing can be concluded about dpo (40%): ",
        ),
        (
            {"gradings": [Grading(metric="brevity", model="m", num_prompts=2)]},
            "brevity covers 2 of 30 prompts; ",
        ),
        (
            {"arms": [replace(ARM, greedy_log_ratio=Interval(mean=3.5))], "reference": "stage:sft"},
            "log-ratio of greedy answers to the reference (sft), in nats per sequence\n",
        ),
        (
            {"arms": [replace(ARM, kl=Interval(mean=2.25))]},
            "KL from the reference on sampled answers, in nats per sequence\n",
        ),
        ({"metrics": [], "primary": None}, "no metric, so no arm is called better"),
    ],
)  # fmt: skip
def test_the_terminal_says_what_the_figures_are_of(changes: dict[str, Any], words: str) -> None:
    assert words in printed(**changes)


def test_the_primary_metric_has_its_interval_and_says_which_way_is_better() -> None:
    for higher, verdict, better in ((True, "worse", "more"), (False, "better", "less")):
        metrics = [replace(BREVITY, higher_is_better=higher), Metric(name="tone")]
        text = printed(metrics=metrics, comparisons=[LESS])
        assert text.split()[:7] == ["arm", "brevity", "95", "%", "tone", "words", "loss"], "what no arm has is left out"
        assert "0.500  0.400–0.600  0.25   21.4" in text
        assert f"dpo against sft: -0.100 (-0.200 to -0.050), {verdict}" in text
        assert f"30 held-out prompts; brevity: {better} is better\n" in text
    columns = printed(arms=[replace(ARM, greedy_log_ratio=Interval(mean=3.5), kl=Interval(mean=2.25))])
    assert {"3.50", "2.25", "1.23"} <= set(columns.split())
    assert printed(metrics=[], primary=None).split()[:4] == ["arm", "words", "loss", "dpo"]


def test_no_figure_is_cut_where_the_terminal_is_narrow() -> None:
    names = [f"a_metric_with_a_long_name_{number}" for number in range(4)]
    arm = replace(ARM, metrics={name: Interval(mean=0.125 * number) for number, name in enumerate(names)})
    changes = {"metrics": [Metric(name=name) for name in names], "primary": names[0], "arms": [arm]}
    wide, narrow = (printed(width=width, **changes) for width in (200, 60))
    assert "…" not in narrow
    table = [line.split() for line in wide.splitlines()[1:3]]
    assert [line.split() for line in narrow.splitlines()[1:3]] == table
    assert {"0.12", "0.25", "0.38"} <= set(table[1])


def test_the_screen_says_how_often_a_reward_model_is_right_and_what_to_know_before() -> None:
    def interval(mean: float) -> Interval:
        return Interval(mean=mean, low=mean - 0.04, high=mean + 0.04)

    words = Baseline(name="bag of words", accuracy=interval(0.6), difference=interval(0.05))
    longer = Baseline(name="longer answer", accuracy=Interval(mean=0.4), difference=Interval(mean=0.25))
    card = RewardCard(accuracy=interval(0.65), num_pairs=500, baselines=[words, longer], warnings=["[b]Beware.[/b]"])
    console = Console(width=40, record=True)
    show_card(console, "card", card)
    assert console.export_text().splitlines() == [
        "card: right on 0.650 (0.610–0.690) of 500 pairs; bag of words 0.600 (0.560–0.640), difference +0.050 "
        "(+0.010 to +0.090); longer answer 0.400, difference +0.250",
        "  [b]Beware.[/b]",
    ]
