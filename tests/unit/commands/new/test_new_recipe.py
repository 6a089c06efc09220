"""A recipe that `align new` writes fits its data and passes a plan, and it guesses nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignment import cli
from alignment.commands.new import base_model, verb, worker
from alignment.commands.new.verb import Options, comment_lines, flow, group_lines, new_recipe
from alignment.commands.new.worker import measured
from alignment.commands.schema import recipe_schema
from alignment.config import yaml_file
from alignment.config.new_recipe import Circumstances, NewStage, Reasoned, common_length
from alignment.core.errors import AlignmentError, ConfigError, DataError
from alignment.data.formats import FORMATS
from alignment.data.records import PlainText
from alignment.pipeline.backends import processes
from alignment.stages import registry
from alignment.stages.base import Proposals
from tests.e2e.test_outside_kind import OUTSIDE
from tests.hub import WRITTEN
from tests.tiny import save_tiny_model

BOTH = {"from-pairs": "both", "first": "learn"}
DIRECTLY = {"from-pairs": "directly"}
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


class New:
    """Writes a recipe for files, plans it, and returns what is in it; collects what is printed."""

    def __init__(self, model: Path) -> None:
        self._model = f"path:{model}"
        self._screen = io.StringIO()

    def __call__(self, *files: str, out: str = "recipe.yaml", ask: Any = None, **options: Any) -> Recipe:
        console = Console(file=self._screen, width=200)
        given = Options(**{"model": self._model, **options})
        asking = {} if ask is None else {"ask": ask}
        assert new_recipe(console, files, out=out, options=given, **asking) == 0
        recipe: Recipe = yaml_file.read(Path(out))
        return recipe

    @property
    def printed(self) -> str:
        return self._screen.getvalue()


@pytest.fixture
def new(model: Path, monkeypatch: pytest.MonkeyPatch) -> New:
    monkeypatch.setattr(processes, "call", lambda argv: worker.main(argv[3:]))
    return New(model)


def write(name: str, rows: Sequence[Any]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def rows_like(name: str, number: int = 60) -> list[Any]:
    marks = {"2": "{} and 2", "Hi": "Hi {}", "Summarise": "Sum up {}", "haiku": "haiku {}"}
    rows = []
    for each in range(number):
        text = FORMATS[name].row
        for word, another in marks.items():
            text = text.replace(word, another.format(each))
        row = json.loads(text)
        rows.append(row | {"label": each % 2 == 0} if "label" in row else row)
    return rows


def pairs(number: int) -> list[Any]:
    return [{"prompt": f"What is {n} + 1?", "chosen": f"{n + 1}.", "rejected": f"It is {n}."} for n in range(number)]


def talk(number: int, answer: str = "Yes.", question: str = "Is it {}?") -> list[Any]:
    turns = [("user", question), ("assistant", answer)]
    return [{"messages": [{"role": role, "content": text.format(n)} for role, text in turns]} for n in range(number)]


def lines_of(file: str) -> list[Any]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").split("\n")[:-1]]


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@functools.cache
def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema", reason="the extra 'metrics' has jsonschema")
    return jsonschema.Draft7Validator(recipe_schema())


def stages_of(recipe: Recipe) -> list[str]:
    assert [fault.message for fault in validator().iter_errors(recipe)] == []
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
def test_a_recipe_for_each_format_passes_a_plan(name: str, new: New) -> None:
    recipe = new(
        write("rows.jsonl", rows_like(name)), answers=ANSWERS.get(name, BOTH if "reward" in EXPECTED[name] else {})
    )
    assert stages_of(recipe) == EXPECTED[name]
    assert f"{len(EXPECTED[name])} to run, 0 reused" in new.printed


@pytest.mark.parametrize("file", sorted(WRITTEN.iterdir()), ids=lambda file: file.stem)
def test_a_recipe_for_each_written_file_passes_a_plan(file: Path, new: New) -> None:
    for answers in ({}, {"first": "skip"}, {"scorer": SCORER}, BOTH):
        with contextlib.suppress(ConfigError):  # of the answers only those fit that its rows ask for
            recipe = new(f"path:{file}", answers=answers)
            break
    assert stages_of(recipe)[-1] == "report"
    if file.stem == "toolcalls":
        assert "3 records cannot be rendered, such as toolcalls.json: row " in new.printed


@pytest.mark.parametrize(("name", "heldout"), [("kto", False), ("preference", True)])
def test_columns_of_other_names_are_mapped(name: str, heldout: bool, new: New) -> None:
    own = {"label": "good"} if name == "kto" else {"prompt": "asked", "chosen": "better", "rejected": "worse"}
    file = write("rows.jsonl", [{own.get(key, key): value for key, value in row.items()} for row in rows_like(name)])
    written = f"{{{', '.join(f'{key}: {column}' for key, column in own.items())}}}"
    prompts = write("asked.jsonl", rows_like("prompt", 40)) if heldout else None
    recipe = new(file, answers=ANSWERS[name], columns=written, heldout=prompts)
    assert stages_of(recipe) == EXPECTED[name]
    assert recipe["stages"]["kto" if name == "kto" else "dpo"]["data"]["columns"] == own


def test_a_kind_of_another_package_takes_part(new: New, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(OUTSIDE))
    toy = importlib.import_module("toy_stage.kind").KIND

    def stage(circumstances: Circumstances) -> NewStage:
        rows = circumstances.rows[PlainText]
        return NewStage(why="Backwards.", settings={"data": dict(rows.settings), "max_length": 32}, reads=rows)

    kind = dataclasses.replace(toy, proposals=Proposals(stage=stage))
    known = {**registry.registered(), "toy": registry.Registered(name="toy", origin="toy-stage", kind=kind)}
    monkeypatch.setattr(registry, "registered", lambda: known)
    recipe = new(write("texts.jsonl", [{"text": f"The shop is closed on day {n}."} for n in range(9)]))
    assert list(recipe["stages"]) == ["cpt", "report", "toy"]
    own = {"kind": "toy", "adapter": "lora"}
    assert recipe["stages"]["toy"] == {**own, "data": {"source": "path:texts.jsonl"}, "max_length": 32}
    assert "3 to run, 0 reused" in new.printed


def test_a_scorer_is_used_beside_a_reward_model_and_only_a_metric_where_nothing_asks_for_ppo(new: New) -> None:
    """Pairs that are learned from directly are for dpo alone, whatever scores the evaluation."""
    file = write("pairs.jsonl", pairs(60))
    scored = {"first": "skip", "scorer": SCORER}
    recipe = new(file, out="reward.yaml", answers={"from-pairs": "reward-model", **scored})
    assert stages_of(recipe) == ["reward", "ppo", "evaluate", "report"]
    assert recipe["stages"]["ppo"]["scorers"] == [{"source": "reward"}, {"source": SCORER}]
    assert recipe["stages"]["reward"]["init"] == recipe["stages"]["ppo"]["init"] == "base"
    recipe = new(file, answers={**DIRECTLY, **scored})
    assert stages_of(recipe) == ["dpo", "evaluate", "report"]
    assert recipe["stages"]["evaluate"]["metrics"] == [{"name": "score", "source": SCORER}]
    assert "also what is trained on" not in Path("recipe.yaml").read_text()
    recipe = new(write("talk.jsonl", talk(60)), out="talk.yaml", answers={"scorer": SCORER})
    assert stages_of(recipe) == ["sft", "evaluate", "report"]
    prompts = write("prompts.jsonl", rows_like("prompt"))
    recipe = new(file, prompts, out="both.yaml", answers={**DIRECTLY, **scored})
    assert stages_of(recipe) == ["dpo", "ppo", "evaluate", "report"], "the prompts without answers ask for it"
    assert "also what is trained on" in Path("both.yaml").read_text()


def test_values_follow_from_the_data(new: New) -> None:
    file = write("talk.jsonl", talk(400, answer="Yes, it is {} today."))
    recipe = new(file, write("pairs.jsonl", pairs(240)), answers=DIRECTLY)
    assert stages_of(recipe) == ["sft", "dpo", "evaluate", "report"]
    sft, dpo, evaluate, _ = recipe["stages"].values()
    assert sft["data"] == {"source": f"path:{file}"}
    assert sft["optim"] == {"lr": "2e-4", "batch_size": 8, "epochs": 3}  # 400 rows / 8 = 50 steps, / 16 only 25
    assert sft["validation"] == {"share": 0.1, "every": 13, "keep_best": True}  # 135 steps of 360 rows
    assert dpo["data"] == {"source": "path:recipe-pairs-train.jsonl"}
    assert dpo["optim"]["batch_size"] == 4  # 216 rows / 4 = 54 steps, / 8 only 27
    assert evaluate["arms"] == ["base", "stage:sft", "stage:dpo"]
    assert (evaluate["reference"], evaluate["reward"]) == ("stage:sft", None)
    files = [(file, "Conversation"), ("recipe-pairs-train.jsonl", "PreferencePair")]
    asked = {
        "folder": recipe["model"]["source"].partition(":")[2],
        "template": None,
        "files": [{"path": path, "record": record, "columns": {}} for path, record in files],
    }
    lengths = measured(asked)
    for stage, of_file in zip((sft, dpo), lengths, strict=True):
        longest = max(of_file.rows)
        assert stage["max_length"] - 16 < longest <= stage["max_length"]
    assert evaluate["max_new_tokens"] - 16 < max(lengths[1].answers) <= evaluate["max_new_tokens"]


def test_few_prompts_are_all_learned_and_faulty_rows_left_out(new: New) -> None:
    file = write("talk.jsonl", [*talk(18), {"messages": []}, {"messages": []}])
    recipe = new(file)
    assert stages_of(recipe) == ["sft", "report"]
    assert recipe["stages"]["report"] == {"evaluation": None}
    assert "validation" not in recipe["stages"]["sft"]
    assert "no evaluation: it needs 50 different prompts" in new.printed
    assert recipe["stages"]["sft"]["data"] == {"source": f"path:{file}", "on_error": "skip", "max_skipped": 0.1}
    assert "2 faulty rows are left out (align doctor talk.jsonl lists them)" in new.printed


def test_a_single_long_row_is_counted_and_files_of_one_kind_are_learned_together(new: New) -> None:
    long = write("a.jsonl", [*talk(25), *talk(1, answer="Yes, it is. " * 400)])
    sft = new(long, write("b.jsonl", rows_like("alpaca", 10)))["stages"]["sft"]
    assert sft["data"] == {"source": "path:a.jsonl", "mix": [{"source": "path:b.jsonl"}]}
    assert sft["max_length"] < 200
    text = " ".join(Path("recipe.yaml").read_text().replace("#", " ").split())
    assert "tokens; 1 row is longer than this and left out" in text


@pytest.mark.parametrize(
    ("lengths", "length"),
    [
        ([], 0),
        ([10] * 99 + [20], 20),
        ([10] * 99 + [21], 10),
        ([10] * 25 + [9_000], 10),
        ([10] * 24 + [9_000] * 2, 9_000),
        ([10] * 19 + [20], 20),
        ([10] * 18 + [90], 90),
    ],
)
def test_one_long_row_in_a_hundred_or_in_a_small_file_sets_no_limit(lengths: list[int], length: int) -> None:
    assert common_length(lengths) == length


def test_a_model_without_a_template_gets_one(new: New, here: Path) -> None:
    folder = save_tiny_model(here / "plain")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    recipe = new(write("pairs.jsonl", pairs(20)), model="path:plain", answers=DIRECTLY)
    assert recipe["model"] == {"source": "path:plain", "chat_template": "chatml"}
    assert stages_of(recipe) == ["sft", "dpo", "report"], "it learns answers first"


def test_adapters_follow_from_the_memory(new: New, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "_number_of_weights", lambda _: 7_000_000_000)
    file = write("talk.jsonl", talk(20))
    assert new(file)["adapter"] == "lora"
    monkeypatch.setattr(base_model.hardware, "free_memory", lambda: 16e9)
    recipe = new(file, out="small.yaml")
    assert recipe["adapter"] == "qlora"
    assert "8.3 GB with qlora" in Path("small.yaml").read_text()
    new(file, out="gpu.yaml", device="h100")
    assert "of a h100" in Path("gpu.yaml").read_text()
    monkeypatch.setattr(base_model.hardware, "count_devices", lambda: 1)
    with pytest.raises(ConfigError, match="what GPU does this machine have"):
        new(file, out="other.yaml")


@pytest.mark.parametrize(("has_bfloat16", "adapter", "size"), [(True, "lora", "14.0 GB"), (False, "qlora", "5.6 GB")])
def test_weights_in_float32_take_twice_as_much(
    monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool, adapter: str, size: str
) -> None:
    """1.5 times two or four bytes for each of 4,000 million weights, and 2 GB: 14 or 26 GB, of which 16 are free."""
    monkeypatch.setattr(base_model.hardware, "has_bfloat16", lambda: has_bfloat16)
    big = base_model.BaseModel(
        source="path:big", folder=Path(), positions=4096, has_template=True, weights=4_000_000_000
    )
    chosen = base_model.adapter_for(big, (16e9, "free on this machine"), base_model.dtype_for(None))
    assert chosen.value == adapter
    assert f"take about {size} with {adapter}" in chosen.why


def test_held_out_prompts_are_learned_from_nowhere(new: New) -> None:
    """Nor is a faulty row."""
    asked = [f"What is {n} + 1?" for n in range(60)]
    answered = [{"prompt": text.upper(), "completion": "A number."} for text in asked]
    faulty = {"prompt": "Which?", "chosen": "This.", "rejected": 3}
    rows = [*pairs(60), *pairs(60), faulty]
    new(write("talk.jsonl", answered), write("pairs.jsonl", rows), answers=DIRECTLY)
    held_out, learned, answers = (
        [row["prompt"].lower() for row in lines_of(f"recipe-{name}.jsonl")]
        for name in ("heldout", "pairs-train", "talk-train")
    )
    assert (len(held_out), len(set(held_out)), len(learned), len(answers)) == (6, 6, 2 * 54, 54)
    assert not set(held_out) & {*learned, *answers}
    assert {*held_out, *learned} == {text.lower() for text in asked}
    assert "1 faulty row is left out (align doctor pairs.jsonl lists it)" in new.printed


def test_the_same_prompts_are_held_out_whatever_the_order(new: New) -> None:
    """JSON does not escape the line separator of Unicode, and Python would end a line there."""
    rows = talk(80, question="Is it {}?\u2028Really?")
    new(write("a.jsonl", rows), out="a.yaml")
    new(write("b.jsonl", rows[::-1]), out="b.yaml")
    first, second = (
        sorted(row["messages"][0]["content"] for row in lines_of(f"{name}-heldout.jsonl")) for name in "ab"
    )
    assert first == second
    assert all("\u2028" in text for text in first)


def test_a_bad_answer_is_no_reference(new: New) -> None:
    rows = [{"prompt": f"{n}?", "completion": "Bad.", "label": n % 2 == 0} for n in range(60)]
    recipe = new(write("labelled.jsonl", rows), answers={"first": "skip"})
    assert "Bad." not in Path("recipe-heldout.jsonl").read_text()
    assert stages_of(recipe) == ["kto", "evaluate", "report"]
    assert recipe["stages"]["kto"]["init"] == "base"


def test_prompts_of_the_user_are_held_out_with_rows_that_resemble_them_unless_most_do(new: New) -> None:
    recipe = new(write("talk.jsonl", talk(20)), heldout=write("own.jsonl", [{"prompt": "Is it 3?"}]))
    assert recipe["stages"]["evaluate"]["data"] == {"source": "path:own.jsonl"}
    assert len(lines_of("recipe-talk-train.jsonl")) == 19
    assert len(lines_of("talk.jsonl")) == 20
    words = "the note says that the shop in the hall is closed on Monday"
    own = write("own.jsonl", [{"prompt": f"Please say in a sentence: {words}."}])
    alike = [{"prompt": f"Tell me, {words}, {n}?", "completion": "Closed."} for n in range(2)]
    others = [{"prompt": f"Is it {n}?", "completion": "Yes."} for n in range(18)]
    new(write("few.jsonl", [*alike, *others]), heldout=own, out="few.yaml")
    assert len(lines_of("few-few-train.jsonl")) == 18
    new(write("most.jsonl", [*alike, *others[:4]]), heldout=own, out="most.yaml")
    assert not Path("most-most-train.jsonl").exists()


def test_nothing_is_guessed_without_a_terminal(new: New, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    file = write("pairs.jsonl", pairs(60))
    with pytest.raises(ConfigError) as refused:
        new(file)
    assert "--first: The files have no conversations" in str(refused.value)
    assert "--from-pairs: How should the model learn from pairs?\n    directly: it learns" in str(refused.value)
    with pytest.raises(ConfigError, match="--scorer: What scores the answers"):
        new(write("prompts.jsonl", rows_like("prompt")))
    assert files_in(here) == ["pairs.jsonl", "prompts.jsonl"]
    assert stages_of(new(write("talk.jsonl", talk(20)))) == ["sft", "report"], "nothing is to be asked"


def test_a_terminal_is_asked_until_the_answer_is_one(new: New) -> None:
    file, shown = write("pairs.jsonl", pairs(60)), []
    answers: Iterator[str] = iter(["skip", "", "direct", "directly"])

    def ask(text: str) -> str:
        shown.append(text)
        return next(answers)

    assert stages_of(new(file, out="a.yaml", ask=ask)) == ["dpo", "evaluate", "report"]
    assert sum("How should the model learn from pairs?" in text for text in shown) == 1
    assert any("did you mean 'directly'?" in text for text in shown)

    def end(_: str) -> str:
        raise EOFError

    with pytest.raises(ConfigError, match="no answer"):
        new(file, out="b.yaml", ask=end)


FILES = {
    "talk.jsonl": talk(60),
    "pairs.jsonl": pairs(60),
    "prompts.jsonl": rows_like("prompt"),
    "texts.jsonl": [{"text": "The shop is closed."}] * 3,
    "broken.jsonl": [{"prompt": ""}] * 3,
    "labelled.jsonl": rows_like("kto"),
}


@pytest.mark.parametrize(
    ("files", "options", "error", "message"),
    [
        (["talk"], {"answers": {"first": "skip"}}, ConfigError, "--first: 'skip' has no effect"),
        (["talk", "pairs", "prompts"], {"answers": DIRECTLY}, ConfigError, "jsonl: no stage uses it"),
        (["texts"], {"answers": {"scorer": "s.py:f"}}, ConfigError, r"--scorer: 's\.py:f' has no effect"),
        (["talk", "talk"], {}, ConfigError, "is named twice"),
        (["labelled"], {"columns": "{lable: good}"}, ConfigError, "did you mean 'label'"),
        (["labelled"], {"columns": "{label: good}"}, DataError, "'good', which no row has"),
        (["broken"], {}, DataError, "broken.jsonl"),
        (["absent"], {}, DataError, "no file"),
        (["talk"], {"heldout": "texts.jsonl"}, DataError, "no row has a prompt"),
        (["talk"], {"out": "a b.yaml"}, ConfigError, "cannot name a recipe"),
        (["talk"], {"out": "there.yaml"}, ConfigError, "exists already"),
        (["talk"], {"out": "nowhere/a.yaml"}, ConfigError, "a folder that does not exist"),
    ],
)
def test_what_cannot_be_a_recipe_is_refused_and_nothing_written(
    new: New, here: Path, files: list[str], options: dict[str, Any], error: type[AlignmentError], message: str
) -> None:
    for name, rows in FILES.items():
        write(name, rows)
    for name in ("there.yaml", "there-part-talk-train.jsonl"):
        Path(name).write_text("mine")
    before = files_in(here)
    with pytest.raises(error, match=message):
        new(*(f"{name}.jsonl" for name in files), **options)
    assert files_in(here) == before
    assert Path("there.yaml").read_text() == Path("there-part-talk-train.jsonl").read_text() == "mine"


def test_a_recipe_whose_plan_is_refused_leaves_no_file(new: New, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(recipe: str, overrides: Sequence[str]) -> None:
        assert Path(recipe).is_file()
        assert Path("recipe-heldout.jsonl").is_file()
        raise ConfigError("not allowed", where="launch")

    monkeypatch.setattr(verb, "make_plan", refused)
    with pytest.raises(ConfigError, match="launch: not allowed"):
        new(write("talk.jsonl", talk(60)))
    assert files_in(here) == ["talk.jsonl"]
    assert "wrote" not in new.printed


def test_the_command_counts_tokens_in_a_process_of_its_own(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    file = write("talk.jsonl", talk(60))
    assert cli.main(["new", file, "--model", f"path:{model}"]) == 0
    assert "3 to run, 0 reused" in capsys.readouterr().out


def test_an_error_of_that_process_is_the_commands(
    model: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder without weights is refused before it."""
    file = write("talk.jsonl", talk(60))
    for folder, absent in (("broken", "tokenizer.json"), ("shapes", "model.safetensors")):
        shutil.copytree(model, here / folder, ignore=shutil.ignore_patterns(absent))
    monkeypatch.setattr(processes, "call", lambda argv: worker.main(argv[3:]))
    assert cli.main(["new", file, "--model", "path:broken"]) == 4
    assert "the tokenizer cannot be used" in capsys.readouterr().err
    monkeypatch.setattr(processes, "call", lambda argv: -9)
    assert cli.main(["new", file, "--model", f"path:{model}"]) == 5
    assert "ended with -9" in capsys.readouterr().err
    assert cli.main(["new", file, "--model", "path:shapes"]) == 4
    shown = capsys.readouterr()
    assert f"--model: {here / 'shapes'} has no *.safetensors file" in shown.err
    assert "wrote" not in shown.out
    assert files_in(here) == ["broken", "shapes", "talk.jsonl"]


def test_values_and_comments_are_written_as_people_write_them() -> None:
    values = {2e-4: "2e-4", 0.1: "0.1", 10.0: "10.0", 3: "3", None: "null", "a: b": "'a: b'"}
    assert {value: flow(value) for value in values} == values
    assert (flow(True), flow([5e-5, "b"])) == ("true", "[5e-5, b]")
    group = {"a": {"b": Reasoned(value=1, why="why " * 40), "c": Reasoned(value=2, why="so")}}
    lines = list(group_lines(group, depth=1))
    assert lines[0] == "  a:"
    assert lines[1].startswith("    # why why")
    assert lines[-2:] == ["    b: 1", "    c: 2  # so"]
    assert max(map(len, lines)) <= 120
    assert comment_lines("a\nb: 1\x1b") == ["# a b: 1\\x1b"]


def test_a_file_cannot_write_into_the_recipe(new: New) -> None:
    file = write("a\nseed: 7\nb.jsonl", talk(20))
    recipe = new(f"path:{file}")
    assert "seed" not in recipe
    assert recipe["stages"]["sft"]["data"]["source"] == f"path:{file}"
