"""A recipe that `align new` writes fits its data and passes a plan, and it guesses nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignment import cli
from alignment.commands.new import base_model, verb, worker
from alignment.commands.new.recipe_text import comment_lines, flow, group_lines
from alignment.commands.new.verb import Options, new_recipe
from alignment.commands.new.worker import measured
from alignment.commands.schema import recipe_schema
from alignment.config import yaml_file
from alignment.config.new_recipe import Circumstances, NewStage, Reasoned, common_length
from alignment.core.errors import ConfigError, DataError
from alignment.data.formats import FORMATS
from alignment.data.records import PlainText
from alignment.pipeline.backends import processes
from alignment.stages import registry
from alignment.stages.base import Proposals
from tests.e2e.test_outside_kind import OUTSIDE
from tests.public import PUBLIC, WRITTEN, needs_public_data
from tests.tiny import save_tiny_model

BOTH = {"from-pairs": "both", "first": "learn"}
SCORER = "bundled:quickstart/house_style.py:style"
Recipe = Mapping[str, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base_model.hardware, "count_devices", lambda: 0)
    monkeypatch.setattr(base_model.hardware, "free_memory", lambda: 64e9)
    monkeypatch.setattr(base_model.hardware, "has_bfloat16", lambda: True)
    return tmp_path


def write(name: str, rows: Sequence[Any]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def rows_like(row: str, number: int) -> list[Any]:
    """Different rows of the form of one; labels take turns."""
    rows = [json.loads(row.replace("2", f"{each} and 2").replace("Hi", f"Hi {each}")) for each in range(number)]
    rows = [
        json.loads(json.dumps(each).replace("Summarise", f"Sum up {n}").replace("haiku", f"haiku {n}"))
        for n, each in enumerate(rows)
    ]
    if "label" in rows[0]:
        rows = [each | {"label": number % 2 == 0} for number, each in enumerate(rows)]
    return rows


def pairs(number: int) -> list[Any]:
    return [{"prompt": f"What is {n} + 1?", "chosen": f"{n + 1}.", "rejected": f"It is {n}."} for n in range(number)]


def conversations(number: int, answer: str = "Yes.") -> list[Any]:
    turns = [("user", "Is it {}?"), ("assistant", answer)]
    return [{"messages": [{"role": role, "content": text.format(n)} for role, text in turns]} for n in range(number)]


@pytest.fixture
def new(model: Path) -> Callable[..., Recipe]:
    """Writes a recipe for files, plans it, and returns what is in it."""

    def call(*files: str, out: str = "recipe.yaml", **options: Any) -> Recipe:
        options.setdefault("model", f"path:{model}")
        console = Console(file=call.printed, width=200)  # type: ignore[attr-defined]
        assert new_recipe(console, files, out=out, options=Options(**options), measure=measured) == 0
        recipe: Recipe = yaml_file.read(Path(out))
        return recipe

    call.printed = io.StringIO()  # type: ignore[attr-defined]
    return call


def stages_of(recipe: Recipe) -> list[str]:
    return list(recipe["stages"])


PREFERENCES = ["sft", "reward", "dpo", "ppo", "evaluate", "report"]
EXPECTED = {
    **dict.fromkeys(("hh", "chosen_rejected", "preference", "stack_exchange", "chosen_messages"), PREFERENCES),
    **dict.fromkeys(("votes", "ranked", "choices"), PREFERENCES),
    "kto": ["sft", "kto", "evaluate", "report"],
    **{name: ["sft", "evaluate", "report"] for name in ("messages", "sharegpt", "prompt_completion", "alpaca")},
    "question_answer": ["sft", "evaluate", "report"],
    **{name: ["ppo", "evaluate", "report"] for name in ("turns", "prompt")},
    "text": ["cpt", "report"],
}
ANSWERS = {"preference": BOTH, "kto": {"first": "learn"}, "prompt": {"scorer": SCORER}, "turns": {"scorer": SCORER}}


@pytest.mark.parametrize("name", FORMATS)
def test_a_recipe_for_each_format_passes_a_plan(name: str, new: Callable[..., Recipe]) -> None:
    file = write("rows.jsonl", rows_like(FORMATS[name].row, 60))
    answers = ANSWERS.get(name, BOTH if "reward" in EXPECTED[name] else {})
    recipe = new(file, answers=answers)
    assert stages_of(recipe) == EXPECTED[name]
    assert f"{len(EXPECTED[name])} to run, 0 reused" in new.printed.getvalue()  # type: ignore[attr-defined]
    assert validated(recipe) == []


@pytest.mark.parametrize(("name", "heldout"), [("kto", True), ("kto", False), ("preference", True)])
def test_columns_of_other_names_are_mapped(name: str, heldout: bool, new: Callable[..., Recipe]) -> None:
    own = {"label": "good"} if name == "kto" else {"prompt": "asked", "chosen": "better", "rejected": "worse"}
    rows = [{own.get(key, key): value for key, value in row.items()} for row in rows_like(FORMATS[name].row, 60)]
    file = write("rows.jsonl", rows)
    written = f"{{{', '.join(f'{key}: {column}' for key, column in own.items())}}}"
    prompts = write("asked.jsonl", rows_like(FORMATS["prompt"].row, 40)) if heldout else None
    recipe = new(file, answers=ANSWERS[name], columns=written, heldout=prompts)
    assert stages_of(recipe) == EXPECTED[name]
    assert recipe["stages"]["kto" if name == "kto" else "dpo"]["data"]["columns"] == own
    assert validated(recipe) == []


def test_a_column_that_cannot_be_mapped_is_named(new: Callable[..., Recipe]) -> None:
    file = write("rows.jsonl", rows_like(FORMATS["kto"].row, 60))
    with pytest.raises(ConfigError, match="did you mean 'label'"):
        new(file, columns="{lable: good}")
    with pytest.raises(DataError, match="'good', which no row has"):
        new(file, columns="{label: good}")


def test_without_an_input_stream_nothing_is_asked(new: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    file = write("rows.jsonl", rows_like(FORMATS["messages"].row, 60))
    assert stages_of(new(file)) == EXPECTED["messages"]


@pytest.mark.parametrize("file", sorted(WRITTEN.iterdir()), ids=lambda file: file.stem)
def test_a_recipe_for_each_written_file_passes_a_plan(file: Path, new: Callable[..., Recipe]) -> None:
    for answers in ({}, {"first": "skip"}, {"scorer": SCORER}, BOTH):
        with contextlib.suppress(ConfigError):  # of the answers only those fit that its rows ask for
            recipe = new(f"path:{file}", answers=answers)
            break
    assert stages_of(recipe)[-1] == "report"
    assert validated(recipe) == []


@needs_public_data
def test_a_recipe_for_pairs_of_people_passes_a_plan(new: Callable[..., Recipe]) -> None:
    """Conversations of them are the beginnings of others, so some rows resemble what is held out."""
    recipe = new(str(PUBLIC / "oasst/pairs.jsonl"), answers=BOTH)
    assert stages_of(recipe) == PREFERENCES
    assert "resemble prompts of evaluate" not in new.printed.getvalue()  # type: ignore[attr-defined]


def validated(recipe: Recipe) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema", reason="the extra 'metrics' has jsonschema")
    return [fault.message for fault in jsonschema.Draft7Validator(recipe_schema()).iter_errors(recipe)]


def test_values_follow_from_the_data(new: Callable[..., Recipe]) -> None:
    talk = write("talk.jsonl", conversations(400, answer="Yes, it is {} today."))
    preferences = write("pairs.jsonl", pairs(240))
    recipe = new(talk, preferences, answers={"from-pairs": "directly"})
    assert stages_of(recipe) == ["sft", "dpo", "evaluate", "report"]
    sft, dpo, evaluate, _ = recipe["stages"].values()
    assert sft["data"] == {"source": f"path:{talk}"}
    assert sft["optim"] == {"lr": "2e-4", "batch_size": 8, "epochs": 3}  # 400 rows / 8 = 50 steps, / 16 only 25
    assert sft["validation"] == {"share": 0.1, "every": 13, "keep_best": True}  # 135 steps of 360 rows
    assert dpo["data"] == {"source": "path:recipe-pairs-train.jsonl"}
    assert dpo["optim"]["batch_size"] == 4  # 216 rows / 4 = 54 steps, / 8 only 27
    assert evaluate["arms"] == ["base", "stage:sft", "stage:dpo"]
    assert (evaluate["reference"], evaluate["reward"]) == ("stage:sft", None)
    files = [(talk, "Conversation"), ("recipe-pairs-train.jsonl", "PreferencePair")]
    folder = recipe["model"]["source"].partition(":")[2]
    asked = {
        "folder": folder,
        "template": None,
        "files": [{"path": file, "record": record, "columns": {}} for file, record in files],
    }
    lengths = measured(asked)
    for stage, of_file in zip((sft, dpo), lengths, strict=True):
        longest = max(of_file.rows)
        assert stage["max_length"] - 16 < longest <= stage["max_length"]
    assert evaluate["max_new_tokens"] - 16 < max(lengths[1].answers) <= evaluate["max_new_tokens"]


def test_held_out_prompts_are_learned_from_nowhere(new: Callable[..., Recipe]) -> None:
    asked = [f"What is {n} + 1?" for n in range(60)]
    talk = [{"prompt": text.upper(), "completion": "A number."} for text in asked]
    new(write("talk.jsonl", talk), write("pairs.jsonl", [*pairs(60), *pairs(60)]), answers={"from-pairs": "directly"})
    held_out, learned, talk_prompts = (
        [json.loads(line)["prompt"].lower() for line in Path(f"recipe-{name}.jsonl").read_text().splitlines()]
        for name in ("heldout", "pairs-train", "talk-train")
    )
    assert len(held_out) == len(set(held_out)) == 6
    assert len(learned) == 2 * 54
    assert len(talk_prompts) == 54
    assert not set(held_out) & {*learned, *talk_prompts}
    assert {*held_out, *learned} == {text.lower() for text in asked}


def test_a_held_out_row_may_have_a_line_separator_of_unicode(new: Callable[..., Recipe]) -> None:
    """JSON does not escape it, and Python would end a line there."""
    turns = [("user", "Is it {}?\u2028Really?"), ("assistant", "Yes.")]
    rows = [{"messages": [{"role": role, "content": text.format(n)} for role, text in turns]} for n in range(60)]
    recipe = new(write("talk.jsonl", rows))
    assert recipe["stages"]["evaluate"]["data"]["source"] == "path:recipe-heldout.jsonl"
    lines = Path("recipe-heldout.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert all("\u2028" in json.loads(line)["messages"][0]["content"] for line in lines)


def test_the_same_prompts_are_held_out_whatever_the_order(new: Callable[..., Recipe]) -> None:
    new(write("a.jsonl", conversations(80)), out="a.yaml")
    new(write("b.jsonl", conversations(80)[::-1]), out="b.yaml")
    first, second = (sorted(Path(f"{name}-heldout.jsonl").read_text().splitlines()) for name in "ab")
    assert first == second


def test_a_bad_answer_is_no_reference(new: Callable[..., Recipe]) -> None:
    rows = [{"prompt": f"{n}?", "completion": "Bad.", "label": n % 2 == 0} for n in range(60)]
    new(write("labelled.jsonl", rows), answers={"first": "skip"})
    assert "Bad." not in Path("recipe-heldout.jsonl").read_text()
    assert stages_of(yaml_file.read(Path("recipe.yaml"))) == ["kto", "evaluate", "report"]
    assert yaml_file.read(Path("recipe.yaml"))["stages"]["kto"]["init"] == "base"


def test_prompts_of_the_user_are_held_out_too(new: Callable[..., Recipe]) -> None:
    own = write("own.jsonl", [{"prompt": "Is it 3?"}])
    recipe = new(write("talk.jsonl", conversations(20)), heldout=own)
    assert recipe["stages"]["evaluate"]["data"] == {"source": "path:own.jsonl"}
    assert len(Path("recipe-talk-train.jsonl").read_text().splitlines()) == 19
    assert Path("talk.jsonl").read_text().count("\n") == 20


def test_rows_that_resemble_a_held_out_prompt_are_left_out_unless_most_do(new: Callable[..., Recipe]) -> None:
    words = "the note says that the shop in the hall is closed on Monday"
    own = write("own.jsonl", [{"prompt": f"Please say in a sentence: {words}."}])
    alike = [{"prompt": f"Tell me, {words}, {n}?", "completion": "Closed."} for n in range(2)]
    new(write("few.jsonl", [*alike, *answered_prompts(18)]), heldout=own, out="few.yaml")
    assert len(Path("few-few-train.jsonl").read_text().splitlines()) == 18
    new(write("most.jsonl", [*alike, *answered_prompts(4)]), heldout=own, out="most.yaml")
    assert not Path("most-most-train.jsonl").exists()


def answered_prompts(number: int) -> list[Any]:
    return [{"prompt": f"Is it {n}?", "completion": "Yes."} for n in range(number)]


def test_rows_that_the_template_cannot_render_are_counted(new: Callable[..., Recipe]) -> None:
    new(f"path:{WRITTEN / 'toolcalls.json'}")
    assert "3 records cannot be rendered, such as toolcalls.json: row " in new.printed.getvalue()  # type: ignore[attr-defined]


def test_a_kind_of_another_package_takes_part(new: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(OUTSIDE))
    toy = importlib.import_module("toy_stage.kind").KIND

    def stage(circumstances: Circumstances) -> NewStage:
        rows = circumstances.rows[PlainText]
        return NewStage(why="Backwards.", settings={"data": dict(rows.settings), "max_length": 32}, reads=rows)

    kind = dataclasses.replace(toy, proposals=Proposals(stage=stage))
    known = {**registry.registered(), "toy": registry.Registered(name="toy", origin="toy-stage", kind=kind)}
    monkeypatch.setattr(registry, "registered", lambda: known)
    recipe = new(write("texts.jsonl", [{"text": f"The shop is closed on day {n}."} for n in range(9)]))
    assert stages_of(recipe) == ["cpt", "report", "toy"]
    assert recipe["stages"]["toy"] == {"kind": "toy", "data": {"source": "path:texts.jsonl"}, "max_length": 32}
    assert "3 to run, 0 reused" in new.printed.getvalue()  # type: ignore[attr-defined]


def test_few_prompts_are_all_learned(new: Callable[..., Recipe]) -> None:
    recipe = new(write("talk.jsonl", conversations(20)))
    assert stages_of(recipe) == ["sft", "report"]
    assert recipe["stages"]["report"] == {"evaluation": None}
    assert "validation" not in recipe["stages"]["sft"]
    assert "no evaluation: it needs 50 different prompts" in new.printed.getvalue()  # type: ignore[attr-defined]


def test_faulty_rows_are_left_out_and_said(new: Callable[..., Recipe]) -> None:
    file = write("talk.jsonl", [*conversations(18), {"messages": []}, {"messages": []}])
    recipe = new(file)
    assert recipe["stages"]["sft"]["data"] == {"source": f"path:{file}", "on_error": "skip", "max_skipped": 0.1}
    assert "2 faulty rows are left out (align doctor talk.jsonl lists them)" in new.printed.getvalue()  # type: ignore[attr-defined]


def test_faulty_rows_are_not_in_a_file_that_is_written(new: Callable[..., Recipe]) -> None:
    faulty = {"prompt": "Which?", "chosen": "This.", "rejected": 3}
    file = write("pairs.jsonl", [*pairs(60), faulty])
    recipe = new(file, answers={"from-pairs": "directly", "first": "skip"})
    train = "recipe-pairs-train.jsonl"
    written = [json.loads(line) for line in Path(train).read_text().splitlines()]
    assert len(written) == 54
    assert faulty not in written
    assert recipe["stages"]["dpo"]["data"] == {"source": f"path:{train}"}
    assert "1 faulty row is left out (align doctor pairs.jsonl lists it)" in new.printed.getvalue()  # type: ignore[attr-defined]


def test_a_single_long_row_of_a_small_file_is_counted_and_sets_no_limit(new: Callable[..., Recipe]) -> None:
    rows = [*conversations(25), *conversations(1, answer="Yes, it is. " * 400)]
    recipe = new(write("talk.jsonl", rows))
    assert recipe["stages"]["sft"]["max_length"] < 200
    text = Path("recipe.yaml").read_text()
    assert "tokens; 1 row is longer than this and left out" in " ".join(text.replace("#", " ").split())


def test_files_of_one_kind_are_learned_together(new: Callable[..., Recipe]) -> None:
    recipe = new(write("a.jsonl", conversations(20)), write("b.jsonl", rows_like(FORMATS["alpaca"].row, 10)))
    data = recipe["stages"]["sft"]["data"]
    assert data == {"source": "path:a.jsonl", "mix": [{"source": "path:b.jsonl"}]}


def test_a_scorer_is_used_beside_a_reward_model(new: Callable[..., Recipe]) -> None:
    file = write("pairs.jsonl", pairs(20))
    recipe = new(file, answers={"from-pairs": "reward-model", "first": "skip", "scorer": SCORER})
    assert stages_of(recipe) == ["reward", "ppo", "report"]
    assert recipe["stages"]["ppo"]["scorers"] == [{"source": "reward"}, {"source": SCORER}]
    assert recipe["stages"]["reward"]["init"] == recipe["stages"]["ppo"]["init"] == "base"


def test_a_scorer_is_only_a_metric_where_nothing_asks_for_ppo(new: Callable[..., Recipe]) -> None:
    """Pairs that are learned from directly are for dpo alone, whatever scores the evaluation."""
    file = write("pairs.jsonl", pairs(60))
    recipe = new(file, answers={"from-pairs": "directly", "first": "skip", "scorer": SCORER})
    assert stages_of(recipe) == ["dpo", "evaluate", "report"]
    assert recipe["stages"]["evaluate"]["metrics"] == [{"name": "score", "source": SCORER}]
    assert "also what is trained on" not in Path("recipe.yaml").read_text()
    talk = new(write("talk.jsonl", conversations(60)), out="talk.yaml", answers={"scorer": SCORER})
    assert stages_of(talk) == ["sft", "evaluate", "report"]
    prompts = write("prompts.jsonl", rows_like(FORMATS["prompt"].row, 60))
    asked = new(file, prompts, out="both.yaml", answers={"from-pairs": "directly", "first": "skip", "scorer": SCORER})
    assert stages_of(asked) == ["dpo", "ppo", "evaluate", "report"], "the prompts without answers ask for it"
    assert "also what is trained on" in Path("both.yaml").read_text()


def test_a_model_without_a_template_gets_one_and_learns_answers_first(new: Callable[..., Recipe], here: Path) -> None:
    folder = save_tiny_model(here / "plain")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    recipe = new(write("pairs.jsonl", pairs(20)), model="path:plain", answers={"from-pairs": "directly"})
    assert recipe["model"] == {"source": "path:plain", "chat_template": "chatml"}
    assert stages_of(recipe) == ["sft", "dpo", "report"]


def test_adapters_follow_from_the_memory(new: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "_number_of_weights", lambda _: 7_000_000_000)
    file = write("talk.jsonl", conversations(20))
    assert new(file)["defaults"] == ["base", {"stage@stages.sft": "sft"}, {"stage@stages.report": "report"}, "_self_"]
    monkeypatch.setattr(base_model.hardware, "free_memory", lambda: 16e9)
    recipe = new(file, out="small.yaml")
    assert {"override /adapter@stages.sft.adapter": "qlora"} in recipe["defaults"]
    assert "8.3 GB with qlora" in Path("small.yaml").read_text()
    assert "of a h100" in (new(file, out="gpu.yaml", device="h100"), Path("gpu.yaml").read_text())[1]
    monkeypatch.setattr(base_model.hardware, "count_devices", lambda: 1)
    with pytest.raises(ConfigError, match="what GPU does this machine have"):
        new(file, out="other.yaml")


@pytest.mark.parametrize(("has_bfloat16", "adapter", "size"), [(True, "lora", "14.0 GB"), (False, "qlora", "5.6 GB")])
def test_weights_in_float32_take_twice_as_much(
    monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool, adapter: str, size: str
) -> None:
    """1.5 times two or four bytes for each of 4,000 million weights, and 2 GB: 14 or 26 GB, of which 16 are free."""
    monkeypatch.setattr(base_model.hardware, "has_bfloat16", lambda: has_bfloat16)
    model = base_model.BaseModel(
        source="path:big", folder=Path(), positions=4096, has_template=True, weights=4_000_000_000
    )
    chosen = base_model.adapter_for(model, (16e9, "free on this machine"), base_model.dtype_for(None))
    assert chosen.value == adapter
    assert f"take about {size} with {adapter}" in chosen.why


def test_nothing_is_guessed_without_a_terminal(new: Callable[..., Recipe], here: Path) -> None:
    file = write("pairs.jsonl", pairs(60))
    with pytest.raises(ConfigError) as refused:
        new(file)
    assert "--first: The files have no conversations" in str(refused.value)
    assert "--from-pairs: How should the model learn from pairs?\n    directly: it learns" in str(refused.value)
    with pytest.raises(ConfigError, match="--scorer: What scores the answers"):
        new(write("prompts.jsonl", rows_like(FORMATS["prompt"].row, 60)))
    assert sorted(path.name for path in here.iterdir()) == ["pairs.jsonl", "prompts.jsonl"]


def test_a_terminal_is_asked_until_the_answer_is_one(model: Path) -> None:
    file, shown = write("pairs.jsonl", pairs(60)), []
    answers: Iterator[str] = iter(["skip", "", "direct", "directly"])

    def ask(text: str) -> str:
        shown.append(text)
        return next(answers)

    options = Options(model=f"path:{model}")
    new_recipe(Console(file=io.StringIO()), [file], out="a.yaml", options=options, ask=ask, measure=measured)
    assert stages_of(yaml_file.read(Path("a.yaml"))) == ["dpo", "evaluate", "report"]
    assert sum("How should the model learn from pairs?" in text for text in shown) == 1
    assert any("did you mean 'directly'?" in text for text in shown)

    def end(_: str) -> str:
        raise EOFError

    with pytest.raises(ConfigError, match="no answer"):
        new_recipe(Console(file=io.StringIO()), [file], out="b.yaml", options=options, ask=end, measure=measured)


def test_answers_that_change_nothing_and_files_without_a_use_are_refused(
    new: Callable[..., Recipe], here: Path
) -> None:
    talk, preferences = write("talk.jsonl", conversations(60)), write("pairs.jsonl", pairs(60))
    with pytest.raises(ConfigError, match="--first: 'skip' has no effect"):
        new(talk, answers={"first": "skip"})
    prompts = write("prompts.jsonl", rows_like(FORMATS["prompt"].row, 60))
    with pytest.raises(ConfigError, match=r"no stage uses recipe-prompts-train\.jsonl"):
        new(talk, preferences, prompts, answers={"from-pairs": "directly"})
    with pytest.raises(ConfigError, match=r"--scorer: 'score\.py:f' has no effect"):
        new(write("texts.jsonl", [{"text": "The shop is closed."}] * 3), answers={"scorer": "score.py:f"})
    Path("texts.jsonl").unlink()
    with pytest.raises(ConfigError, match="is named twice"):
        new(talk, talk)
    assert sorted(path.name for path in here.iterdir()) == ["pairs.jsonl", "prompts.jsonl", "talk.jsonl"]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("talk.jsonl", "cannot name a recipe"),
        ("a b.yaml", "cannot name a recipe"),
        ("there.yaml", "exists already"),
        ("nowhere/a.yaml", "a folder that does not exist"),
    ],
)
def test_no_file_is_overwritten(new: Callable[..., Recipe], out: str, message: str) -> None:
    Path("there.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=message):
        new(write("talk.jsonl", conversations(60)), out=out)
    assert Path("there.yaml").read_text() == "mine"


def test_a_part_that_exists_is_not_overwritten_either(new: Callable[..., Recipe], here: Path) -> None:
    Path("recipe-talk-train.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        new(write("talk.jsonl", conversations(60)))
    assert Path("recipe-talk-train.jsonl").read_text() == "mine"
    assert sorted(path.name for path in here.iterdir()) == ["recipe-talk-train.jsonl", "talk.jsonl"]


def test_a_file_that_no_stage_can_use_is_refused(new: Callable[..., Recipe]) -> None:
    with pytest.raises(DataError):
        new(write("broken.jsonl", [{"prompt": ""}] * 3))
    with pytest.raises(DataError, match="no file"):
        new("absent.jsonl")
    with pytest.raises(DataError, match="no row has a prompt"):
        new(write("talk.jsonl", conversations(20)), heldout=write("texts.jsonl", [{"text": "The shop is closed."}] * 3))


def test_a_file_cannot_write_into_the_recipe(new: Callable[..., Recipe]) -> None:
    file = write("a\nseed: 7\nb.jsonl", conversations(20))
    recipe = new(f"path:{file}")
    assert "seed" not in recipe
    assert recipe["stages"]["sft"]["data"]["source"] == f"path:{file}"


def test_the_command_counts_tokens_in_a_process_of_its_own(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    file = write("talk.jsonl", conversations(60))
    assert cli.main(["new", file, "--model", f"path:{model}"]) == 0
    assert "3 to run, 0 reused" in capsys.readouterr().out
    assert cli.main(["new", file, "--model", f"path:{model}"]) == 2
    assert "'recipe.yaml' exists already" in capsys.readouterr().err


def test_an_error_of_that_process_is_the_commands(
    model: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write("talk.jsonl", conversations(60))
    shutil.copytree(model, here / "broken", ignore=lambda *_: ["tokenizer.json"])
    monkeypatch.setattr(processes, "call", lambda argv: worker.main(argv[3:]))
    assert cli.main(["new", file, "--model", "path:broken"]) == 4
    assert "the tokenizer cannot be used" in capsys.readouterr().err
    monkeypatch.setattr(processes, "call", lambda argv: -9)
    assert cli.main(["new", file, "--model", f"path:{model}"]) == 5
    assert "the process that counts tokens ended with -9" in capsys.readouterr().err
    assert sorted(path.name for path in here.iterdir()) == ["broken", "talk.jsonl"]


def test_a_folder_without_weights_is_refused_before_anything_is_written(
    model: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, here / "shapes", ignore=lambda *_: ["model.safetensors"])
    assert cli.main(["new", write("talk.jsonl", conversations(60)), "--model", "path:shapes"]) == 4
    shown = capsys.readouterr()
    assert f"--model: {here / 'shapes'} has no *.safetensors file" in shown.err
    assert "wrote" not in shown.out
    assert sorted(path.name for path in here.iterdir()) == ["shapes", "talk.jsonl"]


def test_a_recipe_whose_plan_is_refused_leaves_no_file(
    new: Callable[..., Recipe], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(recipe: str, overrides: Sequence[str]) -> None:
        assert Path(recipe).is_file()
        assert Path("recipe-heldout.jsonl").is_file()
        raise ConfigError("not allowed", where="launch")

    monkeypatch.setattr(verb, "make_plan", refused)
    with pytest.raises(ConfigError, match="launch: not allowed"):
        new(write("talk.jsonl", conversations(60)))
    assert sorted(path.name for path in here.iterdir()) == ["talk.jsonl"]
    assert "wrote" not in new.printed.getvalue()  # type: ignore[attr-defined]


def test_values_are_written_as_people_write_them() -> None:
    assert [flow(value) for value in (2e-4, 0.1, 10.0, 3, True, None, "a: b", [5e-5, "b"])] == [
        "2e-4", "0.1", "10.0", "3", "true", "null", "'a: b'", "[5e-5, b]",
    ]  # fmt: skip


def test_a_comment_that_is_too_long_stands_above_its_value() -> None:
    lines = list(
        group_lines({"a": {"b": Reasoned(value=1, why="why " * 40), "c": Reasoned(value=2, why="so")}}, depth=1)
    )
    assert lines[0] == "  a:"
    assert lines[1].startswith("    # why why")
    assert lines[-2:] == ["    b: 1", "    c: 2  # so"]
    assert max(map(len, lines)) <= 120
    assert comment_lines("a\nb: 1\x1b") == ["# a b: 1\\x1b"]


@pytest.mark.parametrize(
    ("lengths", "length"),
    [
        ([], 0),
        ([5], 5),
        ([10] * 99 + [20], 20),
        ([10] * 99 + [21], 10),
        ([10] * 9 + [90], 90),
        ([10] * 25 + [9_000], 10),
        ([10] * 24 + [9_000] * 2, 9_000),
        ([10] * 19 + [20], 20),
        ([10] * 18 + [90], 90),
    ],
)
def test_one_long_row_in_a_hundred_or_in_a_small_file_sets_no_limit(lengths: list[int], length: int) -> None:
    assert common_length(lengths) == length
