"""What would stop a later stage is tried before the first one: templates, lengths, and functions of the user's."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignment import rehearse as worker
from alignment.core import hardware
from alignment.core.errors import AlignmentError, DataError, RewardError, StageError
from alignment.data.tokens.rendering import LAST_STAND_IN
from alignment.pipeline.backends import processes
from alignment.pipeline.backends.command import Command
from alignment.pipeline.execute import worker_protocol
from alignment.pipeline.execute.rehearsal import rehearse
from alignment.pipeline.execute.run import run
from alignment.pipeline.plan.plan import Plan
from alignment.records.run import RunRecord
from alignment.records.worker import DONE, FAILED, Status
from tests.tiny import tiny_tokenizer
from tests.unit.pipeline.conftest import MakePlan, leave_artifact

SCORER = """import pathlib
def fine(prompts, completions, rows):
    pathlib.Path(__file__).with_name("asked.txt").write_text(repr((prompts, completions, rows[0]["chosen"])))
    return [0.5 for _ in rows]
def fine2(prompts, completions, rows): return [0.5]
def two(prompts, completions, rows): return [1, 2]
def raises(prompts, completions, rows): return rows[0]["level"]
def none(prompts, completions, rows): return [None]
def only_sums(prompts, completions, rows): return [None if row["label"] != "sum" else 1.0 for row in rows]
def no_words(prompts, completions, rows): return [{"sum": 1.0, "word": "x"}[row["label"]] for row in rows]
def no_lists(prompts, completions, rows): return [1 / ("list" not in row["checks"]) for row in rows]
def reference(prompts, completions, rows): return [len(row["reference"]) for row in rows]
"""
Commands = list[tuple[str, ...]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Commands:
    """What was started; it runs in this process."""
    commands: Commands = []

    def execute(command: Command, *, log: Path, **_: Any) -> int:
        commands.append(command.argv)
        log.write_text("")
        return worker.main(command.argv[3:])

    monkeypatch.setattr(processes, "execute", execute)
    return commands


@pytest.fixture
def tried(plan: MakePlan, tmp_path: Path, started: Commands) -> Callable[..., Plan]:
    """Plans, and tries what the run would train."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "score.py").write_text(SCORER)

    def run(*overrides: str, function: str = "fine", announced: list[str] | None = None) -> Plan:
        scorers = f"stages.ppo.scorers=[{{source: reward}}, {{source: '{tmp_path}/score.py:{function}'}}]"
        planned = plan(scorers, *overrides)
        rehearse(planned, planned.stages, announce=[].append if announced is None else announced.append)
        return planned

    return run


def stages_in(command: tuple[str, ...]) -> list[str]:
    return [Path(word).parent.name if word.endswith(".yaml") else word for word in command[4:]]


def test_later_stages_are_tried_and_nothing_is_left(
    tried: Callable[..., Plan], started: Commands, tmp_path: Path
) -> None:
    planned = tried()
    names = [
        "--rows",
        "reward",
        "dpo",
        "ppo",
        "--scorers",
        "ppo",
        "evaluate",
        "--model",
        "reward",
        "dpo",
        "ppo",
        "evaluate",
    ]
    assert [stages_in(command) for command in started] == [names]
    asked = (tmp_path / "asked.txt").read_text()
    assert asked == "([[{'role': 'user', 'content': 'When is the training?'}]], ['Yes.'], 'On 21 March.')"
    assert not any(planned.run_folder.iterdir())


def test_what_went_well_is_not_tried_again(tried: Callable[..., Plan], started: Commands) -> None:
    """Whatever else changes meanwhile; only what a trial looks at makes it anew, and only of those stages."""
    tried()
    tried()
    tried("seed=7", "stages.dpo.beta=0.3", "stages.sft.optim.lr=1e-3", "name=trial.2")
    assert len(started) == 1
    tried("stages.dpo.max_length=300")
    assert stages_in(started[1]) == ["--rows", "dpo", "--scorers", "--model"]
    tried("stages.dpo.data.on_error=skip")
    assert stages_in(started[2]) == ["--rows", "dpo", "--scorers", "--model", "dpo"]
    tried(function="fine2")
    assert stages_in(started[3]) == ["--rows", "--scorers", "ppo", "--model"]


@pytest.mark.parametrize(
    ("setting", "stage"),
    [
        ("stages.dpo.too_long.do=cut", "dpo"),
        ("stages.dpo.max_answer_length=200", "dpo"),
        ("stages.dpo.validation={every: 1, share: 0.5}", "dpo"),
        ("stages.ppo.max_prompt_length=100", "ppo"),
    ],
)
def test_a_setting_that_decides_which_rows_fit_is_tried_again(
    tried: Callable[..., Plan], started: Commands, setting: str, stage: str
) -> None:
    tried()
    tried(setting)
    assert [stages_in(command)[:3] for command in started[1:]] == [["--rows", stage, "--scorers"]]


def test_an_edited_function_is_tried_again(tried: Callable[..., Plan], started: Commands, tmp_path: Path) -> None:
    tried()
    (tmp_path / "score.py").write_text(SCORER.replace("0.5 for", "0.25 for"))
    tried()
    assert [stages_in(command) for command in started[1:]] == [["--rows", "--scorers", "ppo", "--model"]]


def test_rows_are_tried_again_with_another_tokenizer(
    tried: Callable[..., Plan], started: Commands, tmp_path: Path
) -> None:
    tried()
    template = tmp_path / "model/chat_template.jinja"
    template.write_text(template.read_text() + "{# edited #}")
    tried()
    names = ["--rows", "reward", "dpo", "ppo", "--scorers", "--model", "reward", "dpo", "ppo", "evaluate"]
    assert [stages_in(command) for command in started[1:]] == [names]


def test_what_failed_is_tried_again(tried: Callable[..., Plan], started: Commands) -> None:
    tried()
    for _ in range(2):
        with pytest.raises(RewardError):
            tried(function="two")
    assert [stages_in(command) for command in started[1:]] == [["--rows", "--scorers", "ppo", "--model"]] * 2


def test_what_is_tried_is_announced_by_name(plan: MakePlan, tried: Callable[..., Plan]) -> None:
    announced: list[str] = []
    tried()
    planned = plan("stages.dpo.max_length=300")
    rehearse(planned, planned.stages, announce=announced.append)
    rehearse(planned, planned.stages, announce=announced.append)
    planned = plan("stages.evaluate.max_new_tokens=100")
    rehearse(planned, planned.stages, announce=announced.append)
    assert announced == [
        f"checking {checked} before training (takes ten seconds or more, once for these settings and data)"
        for checked in ("rows of dpo", "requirements of evaluate")
    ]


def test_a_stage_that_runs_first_finds_out_by_itself(
    plan: MakePlan, tried: Callable[..., Plan], started: Commands, tmp_path: Path
) -> None:
    scorers = f"stages.ppo.scorers=[{{source: reward}}, {{source: '{tmp_path}/score.py:raises'}}]"
    for stage in plan(scorers).stages[:3]:
        leave_artifact(stage)
    tried("stages.evaluate.metrics=[]", function="raises")
    assert [stages_in(command) for command in started] == [["--rows", "--scorers", "--model", "evaluate"]]


def test_metrics_are_tried_before_anything_trains(tried: Callable[..., Plan], tmp_path: Path) -> None:
    with pytest.raises(RewardError) as caught:
        tried(f"stages.evaluate.metrics=[{{name: level, source: '{tmp_path}/score.py:raises'}}]")
    assert str(caught.value).startswith(f"stage evaluate, checked before any training: {tmp_path}/score.py:raises: ")
    assert f"; these rows have no 'level': {tmp_path}/heldout.jsonl:1;" in str(caught.value)


LABELLED = [
    {"prompt": f"What is {number}?", "label": label, "checks": checks, **({"reference": "It."} if number < 30 else {})}
    for number, (label, checks) in enumerate([("sum", ["json"])] * 30 + [("word", ["json", "list"])] * 5)
]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("only_sums", ""),
        ("no_words", "gave 'x' (str) for an answer to "),
        ("no_lists", "raised ZeroDivisionError"),
        ("reference", "these rows have no 'reference': "),
    ],
)
def test_a_metric_is_tried_on_a_row_of_each_class(
    tried: Callable[..., Plan], tmp_path: Path, function: str, message: str
) -> None:
    """The first thirty rows are alike."""
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LABELLED))
    metrics = f"stages.evaluate.metrics=[{{name: own, source: '{tmp_path}/score.py:{function}'}}]"
    with pytest.raises(RewardError) if message else nullcontext() as caught:
        tried(metrics, f"stages.evaluate.data.source=path:{tmp_path}/labelled.jsonl")
    if caught is not None:
        assert message in str(caught.value)
        assert f"{tmp_path}/labelled.jsonl:31" in str(caught.value)


def test_a_scorer_that_trains_must_score_every_row(tried: Callable[..., Plan]) -> None:
    with pytest.raises(RewardError, match="gave None"):
        tried(function="none")


@pytest.mark.parametrize(
    ("function", "settings", "kind", "message"),
    [
        ("two", (), RewardError, "score.py:two: gave 2 scores for 1 answers to "),
        ("raises", (), RewardError, "score.py:raises: raised KeyError: 'level' at line 7, called for answers to "),
        (
            "fine",
            ("stages.dpo.max_length=4",),
            DataError,
            "24 dropped of 24 rows because they are too long (the longest has",
        ),
        ("fine", ("stages.dpo.max_length=4", "stages.dpo.too_long.do=cut"), DataError, "because they are too long"),
        ("fine", ("stages.ppo.max_prompt_length=4",), DataError, "24 dropped of 24 rows because they are too long"),
    ],
)
def test_what_would_stop_a_later_stage_is_said_with_its_kind_of_error(
    tried: Callable[..., Plan], function: str, settings: tuple[str, ...], kind: type[AlignmentError], message: str
) -> None:
    with pytest.raises(kind) as caught:
        tried(*settings, function=function)
    assert message in str(caught.value)
    stage = "dpo" if "dpo" in str(settings) else "ppo"
    assert str(caught.value).startswith(f"stage {stage}, checked before any training: ")


def test_what_a_template_leaves_out_of_a_later_stage_is_announced(tried: Callable[..., Plan], tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}
    asked = {"role": "user", "content": "Is it open?"}
    rows = [{"prompt": [asked, answer, asked], "chosen": "Yes.", "rejected": "No."}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    announced: list[str] = []
    pairs = f"stages.dpo.data.source=path:{tmp_path}/pairs.jsonl"
    tried(pairs, "model.chat_template=trl:qwen3", announced=announced)
    notes = [line for line in announced if "leaves out" in line]
    assert notes == [
        f"dpo: {tmp_path}/pairs.jsonl: the chat template leaves out thoughts of earlier turns in 1 of 1 records"
    ]


def test_a_bug_in_a_trial_is_looked_for_in_the_packages_of_the_stages(
    plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(_: Command, *, log: Path, **__: Any) -> int:
        Status(state=FAILED, exit_code=1, error="KeyError: 'x'").write(log.parent)
        return 1

    monkeypatch.setattr(processes, "execute", execute)
    monkeypatch.setattr(worker_protocol, "origin_of", lambda kind: "alignment" if kind == "ppo" else f"their-{kind}")
    planned = plan()
    with pytest.raises(AlignmentError, match="KeyError: 'x'") as caught:
        rehearse(planned, planned.stages, announce=lambda _: None)
    assert "in their-dpo or their-evaluate or their-reward, which adds" in caught.value.remedy


def test_a_rehearsal_of_a_killed_driver_does_not_answer_for_a_later_one(
    plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []

    def execute(command: Command, *, log: Path, **_: Any) -> int:
        folders.append(Path(command.argv[3]))
        log.write_text("")
        if len(folders) == 1:
            raise KeyboardInterrupt
        Status(state=DONE, exit_code=0).write(folders[1])
        with suppress(OSError):
            Status(state=FAILED, exit_code=5, error="of the earlier one").write(folders[0])
        return 0

    monkeypatch.setattr(processes, "execute", execute)
    planned = plan()
    with pytest.raises(KeyboardInterrupt):
        rehearse(planned, planned.stages, announce=lambda _: None)
    rehearse(planned, planned.stages, announce=lambda _: None)
    assert not any(planned.run_folder.iterdir()), "nothing is left"


def test_a_tokenizer_without_a_template_is_named(tried: Callable[..., Plan], tmp_path: Path) -> None:
    (tmp_path / "model/chat_template.jinja").unlink(missing_ok=True)
    config = tmp_path / "model/tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": None}))
    with pytest.raises(DataError, match=r"stage reward, .*the tokenizer has no chat template"):
        tried()
    tried("model.chat_template=chatml")


def test_what_does_not_answer_in_time_is_ended(plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(command: Command, *, on_poll: Callable[[], None], **_: Any) -> int:
        on_poll()
        monkeypatch.setattr("alignment.pipeline.execute.rehearsal.time.monotonic", lambda: 1e9)
        on_poll()
        return 0

    monkeypatch.setattr(processes, "execute", execute)
    planned = plan("launch.hang_seconds=7")
    asked = r"launch\.hang_seconds: checking rows and .* before training did not finish within 7 seconds"
    with pytest.raises(StageError, match=asked):
        rehearse(planned, planned.stages, announce=lambda _: None)


@pytest.mark.parametrize(
    ("settings", "ranks"),
    [
        (("launch.kind=torchrun",), ("0", "0", "1")),
        (("launch=ddp", "launch.num_processes=2"), ("0", "0", "1")),
        ((), (None, None, None)),
    ],
)
def test_a_scorer_finds_the_variables_that_its_launcher_sets(
    plan: MakePlan, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...], ranks: tuple[str | None, ...]
) -> None:
    environments: list[dict[str, str]] = []

    def execute(command: Command, *, log: Path, **_: Any) -> int:
        environments.append(command.environment)
        return worker._write_status(log.parent, 0, "", "")

    monkeypatch.setattr(processes, "execute", execute)
    monkeypatch.setattr(hardware, "count_devices", lambda: 0)
    planned = plan(*settings)
    rehearse(planned, planned.stages, announce=lambda _: None)
    variables = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    assert {tuple(map(environment.get, variables)) for environment in environments} == {ranks}


@pytest.mark.parametrize(("on_error", "refused"), [("skip", False), ("fail", True)])
def test_rows_that_follow_faulty_ones_may_be_fine_where_faulty_ones_are_skipped(
    tried: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_error: str, refused: bool
) -> None:
    """No text can be rendered that holds a character which stands for a control token."""
    monkeypatch.setattr(worker, "NUM_RECORDS", 5)
    rows = (tmp_path / "preferences.jsonl").read_text().splitlines()
    spoilt = [row.replace("When is", f"{chr(LAST_STAND_IN)} When is") for row in rows[:5]]
    (tmp_path / "spoilt.jsonl").write_text("\n".join([*spoilt, *rows[5:]]))
    data = f"stages.dpo.data={{source: 'path:{tmp_path}/spoilt.jsonl', on_error: {on_error}, max_skipped: 0.5}}"
    with pytest.raises(DataError, match="private-use character") if refused else nullcontext():
        tried(data)


@pytest.mark.parametrize("mixed", [False, True])
def test_held_out_rows_of_their_own_are_tried_too(tried: Callable[..., Plan], tmp_path: Path, *, mixed: bool) -> None:
    rows = (tmp_path / "preferences.jsonl").read_text().splitlines()
    (tmp_path / "fine.jsonl").write_text("\n".join(row.replace("When is", "When was") for row in rows))
    (tmp_path / "own.jsonl").write_text("\n".join(row.replace("When is", f"{chr(LAST_STAND_IN)} When") for row in rows))
    spoilt = f"source: 'path:{tmp_path}/own.jsonl'"
    data = f"{{source: 'path:{tmp_path}/fine.jsonl', mix: [{{{spoilt}, count: 2}}]}}" if mixed else f"{{{spoilt}}}"
    with pytest.raises(DataError, match="private-use character"):
        tried(f"stages.dpo.validation={{every: 1, data: {data}}}")


def test_a_run_tries_before_its_first_stage(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise DataError("no row fits")

    monkeypatch.setattr("alignment.pipeline.execute.rehearsal.rehearse", refuse)
    monkeypatch.setattr("alignment.pipeline.execute.workers.fork_server", lambda *_: nullcontext())
    with pytest.raises(DataError, match="no row fits"):
        run("quickstart", overrides, console=Console(file=StringIO()))
    record = RunRecord.read(Path(overrides[0].removeprefix("output=")) / "runs/quickstart")
    assert record.state == "failed"
    assert {stage.state for stage in record.stages.values()} == {"waiting"}
