"""What would stop a later stage is tried before the first one: templates, lengths, functions, and the base itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignment import rehearse as worker
from alignment.core.errors import AlignmentError, DataError, ModelError, RewardError, StageError
from alignment.data.tokens.rendering import LAST_STAND_IN
from alignment.pipeline.backends import processes
from alignment.pipeline.backends.command import Command
from alignment.pipeline.execute import worker_protocol
from alignment.pipeline.execute.rehearsal import rehearse
from alignment.pipeline.execute.run import run
from alignment.pipeline.plan.plan import Plan
from alignment.records.run import RunRecord
from alignment.records.worker import FAILED, Status
from tests.tiny import tiny_tokenizer
from tests.unit.pipeline.conftest import NUM_PAIRS, MakePlan, leave_artifact, write_rows

SCORER = """import pathlib
def fine(prompts, completions, rows):
    pathlib.Path(__file__).with_name("asked.txt").write_text(repr((prompts, completions, rows[0]["chosen"])))
    return [0.5 for _ in rows]
def fine2(prompts, completions, rows): return [0.5]
def two(prompts, completions, rows): return [1, 2]
def raises(prompts, completions, rows): return rows[0]["level"]
def only_sums(prompts, completions, rows): return [None if row["label"] != "sum" else 1.0 for row in rows]
def no_lists(prompts, completions, rows): return [1 / ("list" not in row["checks"]) for row in rows]
def reference(prompts, completions, rows): return [len(row["reference"]) for row in rows]
"""
Commands = list[tuple[str, ...]]
Tried = Callable[..., Plan]
Execute = Callable[..., int]


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Execute], None]:
    return lambda execute: monkeypatch.setattr(processes, "execute", execute)


@pytest.fixture
def started(executed: Callable[[Execute], None]) -> Commands:
    commands: Commands = []

    def execute(command: Command, *, log: Path, **_: Any) -> int:
        commands.append(command.argv)
        log.write_text("")
        return worker.main(command.argv[3:])

    executed(execute)
    return commands


@pytest.fixture
def tried(plan: MakePlan, tmp_path: Path, started: Commands) -> Tried:
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "score.py").write_text(SCORER)

    def run(*overrides: str, function: str = "fine", announced: list[str] | None = None) -> Plan:
        scorers = f"stages.ppo.scorers=[{{source: reward}}, {{source: '{tmp_path}/score.py:{function}'}}]"
        planned = plan("~stages.evaluate_sft", scorers, *overrides)
        rehearse(planned, planned.stages, announce=[].append if announced is None else announced.append)
        return planned

    return run


def stages_in(command: tuple[str, ...]) -> list[str]:
    return [Path(word).parent.name if word.endswith(".yaml") else word for word in command[4:]]


NO_METRICS = "stages.evaluate.metrics=[]"
OF_MODEL = ["--model", "reward", "dpo", "ppo", "evaluate"]


def test_what_went_well_is_not_tried_again(tried: Tried, started: Commands, tmp_path: Path) -> None:
    """Whatever else changes meanwhile; only what a trial looks at makes it anew, and only of those stages."""

    def tries(*overrides: str, function: str = "fine") -> list[list[str]]:
        started.clear()
        tried(*overrides, function=function)
        return [stages_in(command) for command in started]

    everything = ["--rows", "reward", "dpo", "ppo", "--scorers", "ppo", "evaluate", *OF_MODEL]
    assert tries() == [everything]
    asked = (tmp_path / "asked.txt").read_text()
    assert asked == "([[{'role': 'user', 'content': 'When is the training?'}]], ['Yes.'], 'On 21 March.')"
    assert tries() == []
    assert tries("seed=7", "stages.dpo.beta=0.3", "stages.sft.optim.lr=1e-3", "name=trial.2") == []
    assert tries("stages.dpo.max_length=300") == [["--rows", "dpo", "--scorers", "--model"]]
    assert tries("stages.dpo.data.on_error=skip") == [["--rows", "dpo", "--scorers", "--model", "dpo"]]
    assert tries(function="fine2") == [["--rows", "--scorers", "ppo", "--model"]]
    for setting, stage in (("stages.dpo.too_long.do=cut", "dpo"), ("stages.ppo.max_prompt_length=100", "ppo")):
        assert [words[:3] for words in tries(setting)] == [["--rows", stage, "--scorers"]]
    (tmp_path / "score.py").write_text(SCORER.replace("0.5 for", "0.25 for"))
    assert tries() == [["--rows", "--scorers", "ppo", "--model"]], "an edited function"
    template = tmp_path / "model/chat_template.jinja"
    template.write_text(template.read_text() + "{# edited #}")
    assert tries() == [["--rows", "reward", "dpo", "ppo", "--scorers", *OF_MODEL]], "another tokenizer"
    for _ in range(2):
        with pytest.raises(RewardError):
            tries(function="two")
        assert [stages_in(command) for command in started] == [["--rows", "--scorers", "ppo", "--model"]]


LABELLED = [
    {"prompt": f"What is {number}?", "label": label, "checks": checks, **({"reference": "It."} if number < 30 else {})}
    for number, (label, checks) in enumerate([("sum", ["json"])] * 30 + [("word", ["json", "list"])] * 5)
]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("only_sums", ""),
        ("no_lists", "raised ZeroDivisionError"),
        ("reference", "these rows have no 'reference': "),
    ],
)
def test_a_metric_is_tried_on_a_row_of_each_class(tried: Tried, tmp_path: Path, function: str, message: str) -> None:
    """The first thirty rows are alike."""
    file = write_rows(tmp_path / "labelled.jsonl", *LABELLED)
    metrics = f"stages.evaluate.metrics=[{{name: own, source: '{tmp_path}/score.py:{function}'}}]"
    with pytest.raises(RewardError) if message else nullcontext() as caught:
        tried(metrics, f"stages.evaluate.data.source=path:{file}")
    if caught is not None:
        assert str(caught.value).startswith(f"stage evaluate, checked before any training: {tmp_path}/score.py:")
        assert (message in str(caught.value), f"{file}:31" in str(caught.value)) == (True, True)


TOO_LONG = "24 dropped of 24 rows because they are too long"


@pytest.mark.parametrize(
    ("function", "settings", "kind", "stage", "message"),
    [
        ("two", (), RewardError, "ppo", "score.py:two: gave 2 scores for 1 answers to "),
        ("raises", (), RewardError, "ppo", "score.py:raises: raised KeyError: 'level' at line 7"),
        ("fine", ("stages.dpo.max_length=4",), DataError, "dpo", TOO_LONG),
    ],
)
def test_what_would_stop_a_later_stage_is_said_with_its_kind_of_error(
    tried: Tried, function: str, settings: tuple[str, ...], kind: type[AlignmentError], stage: str, message: str
) -> None:
    with pytest.raises(kind) as caught:
        tried(*settings, function=function)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"stage {stage}, checked before any training: ")


def test_what_a_template_leaves_out_of_a_later_stage_is_announced(tried: Tried, tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}
    asked = {"role": "user", "content": "Is it open?"}
    file = write_rows(tmp_path / "own.jsonl", {"prompt": [asked, answer, asked], "chosen": "Yes.", "rejected": "No."})
    announced: list[str] = []
    tried(f"stages.dpo.data.source=path:{file}", "model.chat_template=trl:qwen3", announced=announced)
    (note,) = [line for line in announced if "leaves out" in line]
    assert note.startswith(f"dpo: {file}: the chat template leaves out thoughts of earlier turns in 1 of 1 ")


@pytest.mark.parametrize(
    ("setting", "is_refused"),
    [
        ("dpo.data={source: 'path:{}/five.jsonl', on_error: skip, max_skipped: 0.5}", False),
        ("dpo.validation={every: 1, data: {source: 'path:{}/all.jsonl'}}", True),
        ("dpo.validation={every: 1, data: {source: 'path:{}/none.jsonl', mix: [{source: 'path:{}/all.jsonl', "
         "count: 2}]}}", True),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_rendered_are_refused_unless_faulty_ones_are_skipped(
    tried: Tried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, is_refused: bool
) -> None:
    """No text can be rendered that holds a character which stands for a control token."""
    monkeypatch.setattr(worker, "NUM_RECORDS", 5)
    rows = (tmp_path / "preferences.jsonl").read_text().replace("When is", "When was").splitlines()
    for name, number in (("none", 0), ("five", 5), ("all", len(rows))):
        spoilt = [row.replace("When was", f"{chr(LAST_STAND_IN)} When is") for row in rows[:number]]
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*spoilt, *rows[number:]]))
    with pytest.raises(DataError, match="private-use character") if is_refused else nullcontext():
        tried(f"stages.{setting.replace('{}', str(tmp_path))}")


def test_a_bug_in_a_trial_is_looked_for_in_the_packages_of_the_stages(
    plan: MakePlan, executed: Callable[[Execute], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(_: Command, *, log: Path, **__: Any) -> int:
        Status(state=FAILED, exit_code=1, error="KeyError: 'x'").write(log.parent)
        return 1

    executed(execute)
    monkeypatch.setattr(worker_protocol, "origin_of", lambda kind: "alignment" if kind == "ppo" else f"their-{kind}")
    planned = plan()
    with pytest.raises(AlignmentError, match="KeyError: 'x'") as caught:
        rehearse(planned, planned.stages, announce=lambda _: None)
    assert "in their-dpo or their-evaluate or their-reward, which adds" in caught.value.remedy


def test_what_does_not_answer_in_time_is_ended(
    plan: MakePlan, executed: Callable[[Execute], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(command: Command, *, on_poll: Callable[[], None], **_: Any) -> int:
        on_poll()
        monkeypatch.setattr("alignment.pipeline.execute.rehearsal.time.monotonic", lambda: 1e9)
        on_poll()
        return 0

    executed(execute)
    planned = plan("launch.hang_seconds=7")
    with pytest.raises(StageError, match=r"launch\.hang_seconds: .* did not finish within 7 seconds"):
        rehearse(planned, planned.stages, announce=lambda _: None)


def test_a_run_tries_before_its_first_stage(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise DataError("no row fits")

    monkeypatch.setattr("alignment.pipeline.execute.rehearsal.rehearse", refuse)
    monkeypatch.setattr("alignment.pipeline.execute.workers.fork_server", lambda *_: nullcontext())
    with pytest.raises(DataError, match="no row fits"):
        run("quickstart", overrides, console=Console(file=StringIO()))
    record = RunRecord.read(Path(overrides[0].removeprefix("output=")) / "runs/quickstart")
    assert (record.state, {stage.state for stage in record.stages.values()}) == ("failed", {"waiting"})


CHECKED = "checked before any training: "
LONG = "z" * 2100
"""Not shorter in tokens."""


def write_config(folder: Path, **settings: object) -> None:
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model/config.json").write_text(json.dumps(settings))


def asks(question: str, **more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}], **more}


@pytest.fixture
def short_base(tmp_path: Path, tried: Tried) -> Path:
    write_config(tmp_path, max_position_embeddings=2048)
    return tmp_path / "heldout.jsonl"


def test_held_out_prompts_that_are_too_long_are_refused(tried: Tried, short_base: Path, tmp_path: Path) -> None:
    write_rows(short_base, *map(asks, ("When?", f"When {LONG}?", f"When, when {LONG}?", "Where?")))
    with pytest.raises(ModelError) as caught:
        tried(NO_METRICS)
    assert str(caught.value).startswith(f"stage evaluate, {CHECKED}{short_base}:3: ")
    assert "needs more than the 2048 positions of path:" in str(caught.value)
    assert "; 2 of 4 rows are too long\n" in str(caught.value)
    assert "stages.evaluate.max_new_tokens" in str(caught.value)
    write_config(tmp_path, max_position_embeddings=4096)
    tried(NO_METRICS)
    with pytest.raises(ModelError, match="an answer of up to 2000 tokens"):
        tried(NO_METRICS, "stages.evaluate.max_new_tokens=2000")
    factors = {"short_factor": [1.0] * 64, "long_factor": [4.0] * 64}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 2048, **factors}
    write_config(tmp_path, model_type="llama", max_position_embeddings=131072, rope_parameters=rope)
    with pytest.raises(ModelError, match=r"2048 positions of path:\S+ before LongRoPE changes its frequencies; 2 of 4"):
        tried(NO_METRICS)


def test_rows_that_the_model_cannot_read_are_refused(tried: Tried, short_base: Path, tmp_path: Path) -> None:
    """A later stage would otherwise find out after earlier ones have trained."""
    with (tmp_path / "preferences.jsonl").open("a") as stream:
        stream.write(json.dumps(asks("When?", chosen=LONG, rejected="Soon.")) + "\n")
    longer = "stages.dpo.max_length=4096"
    tried(NO_METRICS)
    with pytest.raises(ModelError) as caught:
        tried(NO_METRICS, longer)
    assert str(caught.value).startswith(f"stage dpo, {CHECKED}{tmp_path}/preferences.jsonl:{NUM_PAIRS + 1}: a row of ")
    assert " is longer than the model's 2048 positions" in str(caught.value)
    tried(NO_METRICS, longer, "stages.dpo.data.fraction=0.9")  # it may be left out
    with pytest.raises(ModelError, match=r"stage ppo, .*preferences.jsonl:1: a row of \d+ tokens is longer"):
        tried(NO_METRICS, "stages.ppo.max_new_tokens=2040")


CHOICE = {"question": "When?", "answer": 0}


@pytest.mark.parametrize(
    ("rows", "metrics", "words"),
    [
        (
            [{"turns": ["When?", "When then?"], "reference": ["Soon.", "Now."]},
             {"turns": ["Where?", "Where then?"], "reference": ["Here.", LONG]}],
            NO_METRICS,
            "its reference answer",
        ),
        (
            [{**CHOICE, "choices": ["Soon.", "Now."]}, {**CHOICE, "choices": ["Soon.", LONG]}],
            "stages.evaluate.metrics=[{name: knows, source: choice}]",
            "its choices",
        ),
    ],
    ids=["second turn", "choices"],
)  # fmt: skip
def test_references_and_choices_that_are_too_long_are_refused_with_their_row(
    tried: Tried, short_base: Path, rows: list[dict[str, object]], metrics: str, words: str
) -> None:
    """Every arm of the run reads them, although it answers in few tokens."""
    write_rows(short_base, *rows)
    with pytest.raises(ModelError) as caught:
        tried(metrics)
    beginning = f"stage evaluate, {CHECKED}{short_base}:2: with its prompt and {words} of "
    assert (str(caught.value).startswith(beginning), "; 1 of 2 rows" in str(caught.value)) == (True, True)
    write_config(short_base.parent, max_position_embeddings=4096)
    tried(metrics)


def test_the_examples_before_a_prompt_count(tried: Tried, short_base: Path, tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": LONG}
    file = write_rows(tmp_path / "examples.jsonl", {"messages": [{"role": "user", "content": "Why?"}, answer]})
    examples = f"stages.evaluate.few_shot={{count: 1, data: {{source: 'path:{file}'}}}}"
    tried("stages.evaluate.arms=[base, 'stage:sft']", NO_METRICS, examples)
    with pytest.raises(ModelError, match=r"the arm 'base\+few-shot' needs more than the 2048 positions") as caught:
        tried("stages.evaluate.arms=[base, base+few-shot, 'stage:sft']", NO_METRICS, examples)
    assert "stages.evaluate.few_shot.count" in str(caught.value)


TINY = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "vocab_size": 64,
}
SCALED = {"model_type": "llama", "num_hidden_layers": 1, "output_multiplier": 0.5}
FORGETTING = "+stages.forgetting={kind: forgetting, arms: ['stage:sft']}"
CACHING_A_STATE = {"model_type": "llama", "num_hidden_layers": 2, "layer_types": ["full_attention", "linear_attention"]}


@pytest.mark.parametrize(
    ("model_type", "adapter", "setting"),
    [
        ("mixtral", {"kind": "dora"}, "target_modules"),
        ("llama", {"kind": "qlora", "target_modules": ["c_attn"]}, "target_modules"),
        ("llama", {"kind": "lora", "modules_to_save": ["wte"]}, "modules_to_save"),
    ],
)
def test_an_adapter_that_does_not_fit_the_base_is_refused_before_an_earlier_stage_trains(
    tried: Tried, tmp_path: Path, model_type: str, adapter: dict[str, object], setting: str
) -> None:
    write_config(tmp_path, **TINY, model_type=model_type)
    settings = [f"stages.dpo.adapter.{name}={value}" for name, value in adapter.items()]
    with pytest.raises(ModelError, match=rf"^stage dpo, {CHECKED}adapter\.{setting}: "):
        tried(NO_METRICS, *settings)


@pytest.mark.parametrize(
    ("config", "num_results", "settings", "words"),
    [
        ({"model_type": "olmoe"}, 2, ["stages.ppo.critic=shared"], ""),
        ({"model_type": "olmoe"}, 2, ["stages.ppo.critic=separate"], r"ppo, .*path:.*\n.* PPO has critic=shared or"),
        (SCALED, 3, [NO_METRICS], r"evaluate, .*model\.source: LlamaForCausalLM scales its"),
        (
            SCALED,
            3,
            [FORGETTING, "~stages.evaluate", "~stages.report"],
            r"forgetting, .*model\.source: LlamaForCausalLM scales its",
        ),
        (CACHING_A_STATE, 0, [NO_METRICS], r"ppo, .*model\.source: generation does not support layers"),
    ],
)
def test_a_base_that_a_later_stage_cannot_use_is_refused(
    plan: MakePlan,
    tried: Tried,
    tmp_path: Path,
    config: dict[str, Any],
    num_results: int,
    settings: list[str],
    words: str,
) -> None:
    write_config(tmp_path, **config)
    for stage in plan("~stages.evaluate_sft").stages[:num_results]:
        leave_artifact(stage)
    with pytest.raises(ModelError, match=f"^stage {words}") if words else nullcontext() as caught:
        tried(*settings)
    assert caught is None or CHECKED in str(caught.value)


def test_held_out_prompts_are_tried_with_their_tools(tried: Tried, short_base: Path) -> None:
    """They count as tokens, and a template that leaves them out would end the evaluation."""
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    write_rows(short_base, asks("2 + 2?", tools=[tool]))
    with pytest.raises(DataError, match="the chat template leaves out"):
        tried(NO_METRICS)


@pytest.mark.parametrize(("settings", "ranks"), [(("launch.kind=torchrun",), ("0", "0", "1")), ((), (None,) * 3)])
def test_a_scorer_finds_the_variables_that_its_launcher_sets(
    plan: MakePlan, executed: Callable[[Execute], None], settings: tuple[str, ...], ranks: tuple[str | None, ...]
) -> None:
    environments: list[dict[str, str]] = []

    def execute(command: Command, *, log: Path, **_: Any) -> int:
        environments.append(command.environment)
        return worker._write_status(log.parent, 0, "", "")

    executed(execute)
    planned = plan(*settings)
    rehearse(planned, planned.stages, announce=lambda _: None)
    variables = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    assert {tuple(map(environment.get, variables)) for environment in environments} == {ranks}
