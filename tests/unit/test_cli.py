"""The command as a user types it."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from alignment import __version__, cli
from alignment.commands.export.export_options import ExportOptions
from alignment.commands.new.verb import Options as NewOptions
from alignment.commands.serve.verb import Options as ServeOptions
from alignment.commands.shared.arguments import runs_of
from alignment.config.data import SourceConfig
from alignment.config.run import recipe_names
from alignment.stages.registry import config_classes
from tests.living import is_living, kill_each

STAGES = config_classes()

Captured = pytest.CaptureFixture[str]


def test_version_and_listings(capsys: Captured) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"align {__version__}\n"
    assert cli.main(["recipes"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == recipe_names()
    assert cli.main(["stages"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(STAGES)


def test_a_folder_that_is_gone_is_told(capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert cli.main(["status"]) == 2
    assert capsys.readouterr().err == (
        "configuration: the current folder no longer exists\n  → change to a folder that exists\n"
    )


@pytest.mark.parametrize("verb", ["plan", "doctor", "new"])
def test_a_file_whose_name_looks_like_an_option_is_refused_with_the_way_to_write_it(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-mine.yaml").write_text("")
    with pytest.raises(SystemExit, match="2"):
        cli.main([verb, "-mine.yaml"])
    assert "./-mine.yaml" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main([verb, "-other.yaml"])
    assert "./" not in capsys.readouterr().err


HERE = Path.cwd()
CHAT = {"system": "be brief", "max_new_tokens": 8, "temperature": 0.5, "seed": 3}
REACHED: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = [
    (
        "run quickstart --stage dpo seed=1 --wait",
        "alignment.pipeline.execute.run.run",
        ("quickstart", ["seed=1"]),
        {"only": "dpo", "wait": True, "verified": False},
    ),
    (
        "plan ./mine.yaml seed=1 name=x",
        "alignment.commands.plan.show",
        ("./mine.yaml", ["seed=1", "name=x"]),
        {"cost": False, "device": "this", "trade": False, "scripts": None, "verified": False},
    ),
    (
        "plan ./mine.yaml --device h100 --trade --scripts jobs",
        "alignment.commands.plan.show",
        ("./mine.yaml", []),
        {"cost": False, "device": "h100", "trade": True, "scripts": "jobs", "verified": False},
    ),
    (
        "preview quickstart --html page.html --rows 3",
        "alignment.commands.preview.verb.show_preview",
        ("quickstart", []),
        {"stage": None, "rows": 3, "html": "page.html"},
    ),
    (
        "sweep quickstart dpo_beta --at-once 2 seed=1",
        "alignment.pipeline.sweeps.run.sweep",
        ("quickstart", "dpo_beta", ["seed=1"]),
        {"at_once": 2, "retry_failed": False},
    ),
    (
        "track mine --to mlflow --url http://127.0.0.1:5000",
        "alignment.commands.track.verb.track",
        ("mine",),
        {"to": "mlflow", "url": "http://127.0.0.1:5000", "output": HERE},
    ),
    ("status mine", "alignment.commands.status.show_status", (HERE, "mine"), {}),
    ("status mine --follow", "alignment.commands.status.follow", (HERE, "mine"), {}),
    (
        "watch --port 8001 --until-done",
        "alignment.commands.watch.verb.watch",
        (None,),
        {"port": 8001, "until_done": True, "opens_browser": False, "output": HERE},
    ),
    (
        "compare a b --output out",
        "alignment.commands.compare.compare",
        (HERE / "out", ["a", "b"]),
        {"html": None},
    ),
    (
        "doctor rows.csv --split test columns={prompt:q} --format prompt --against other.csv placeholders.who=me",
        "alignment.commands.doctor.show_diagnosis",
        (
            SourceConfig(
                source="rows.csv", format="prompt", split="test", columns={"prompt": "q"}, placeholders={"who": "me"}
            ),
        ),
        {"against": SourceConfig(source="other.csv")},
    ),
    (
        "doctor rows.csv --against hub:org/name --against-split test --against-subset short",
        "alignment.commands.doctor.show_diagnosis",
        (SourceConfig(source="rows.csv"),),
        {"against": SourceConfig(source="hub:org/name", split="test", subset="short")},
    ),
    ("schema sweep --beside .", "alignment.commands.schema.show_schema", ("sweep",), {"beside": "."}),
    (
        "new a.jsonl b.csv --model path:m --out r.yaml --heldout c.jsonl --from-pairs both --first skip "
        "--scorer s.py:f --device h100 --columns '{label: good}'",
        "alignment.commands.new.verb.new_recipe",
        (["a.jsonl", "b.csv"],),
        {
            "out": "r.yaml",
            "options": NewOptions(
                model="path:m",
                heldout="c.jsonl",
                device="h100",
                columns="{label: good}",
                answers={"from-pairs": "both", "first": "skip", "scorer": "s.py:f"},
            ),
        },
    ),
    (
        "export mine/dpo --to there --as adapter --max-gap 0.5",
        "alignment.commands.export.verb.export",
        ("mine/dpo",),
        {"to": "there", "options": ExportOptions(form="adapter", max_gap=0.5), "output": HERE},
    ),
    (
        "chat mine --arm sft --arm base --system 'be brief' --max-new-tokens 8 --temperature 0.5 --seed 3",
        "alignment.commands.chat.verb.chat",
        ("mine", ["sft", "base"]),
        {"options": CHAT, "engine": None, "output": HERE},
    ),
    (
        "chat mine --max-new-tokens 8 --temperature 0.5 --seed 3 --system 'be brief' --engine vllm --engine-python p",
        "alignment.commands.chat.verb.chat",
        ("mine", []),
        {"options": CHAT, "engine": {"engine": "vllm", "python": "p"}, "output": HERE},
    ),
    (
        "serve mine --arm sft --engine vllm --port 0 --engine-python p --api-key-env K --tool-parser mistral",
        "alignment.commands.serve.verb.serve",
        ("mine", ["sft"]),
        {
            "options": ServeOptions(engine="vllm", port=0, engine_python="p", api_key_env="K", tool_parser="mistral"),
            "output": HERE,
        },
    ),
    (
        "judge mine --arm sft --arm dpo --stage evaluate --annotator ada --votes v.jsonl --port 8000 --open",
        "alignment.commands.judge.verb.judge",
        ("mine", ["sft", "dpo"]),
        {
            "stage": "evaluate",
            "annotator": "ada",
            "votes": "v.jsonl",
            "port": 8000,
            "opens_browser": True,
            "output": HERE,
        },
    ),
    (
        "push model --to me/mine --public --replace",
        "alignment.commands.push.push",
        ("model",),
        {"to": "me/mine", "public": True, "replace": True},
    ),
    (
        "add-tokens bundled:smollm2-135m '<|a|>' '<|b|>' --to there",
        "alignment.commands.add_tokens.verb.add_tokens",
        ("bundled:smollm2-135m", ["<|a|>", "<|b|>"]),
        {"to": "there", "in_text": False},
    ),
    (
        "add-tokens bundled:smollm2-135m '<|a|>' --to there --in-text",
        "alignment.commands.add_tokens.verb.add_tokens",
        ("bundled:smollm2-135m", ["<|a|>"]),
        {"to": "there", "in_text": True},
    ),
]
"""What a user types, and what it calls, with which values beside the console."""


@pytest.mark.parametrize(("line", "function", "values", "named"), REACHED)
def test_a_verb_hands_its_arguments_to_what_does_it(
    monkeypatch: pytest.MonkeyPatch, line: str, function: str, values: tuple[Any, ...], named: dict[str, Any]
) -> None:
    code, calls = called(monkeypatch, line, function)
    assert calls == [(values, named)]
    assert code == (0 if line.split()[0] in ("plan", "status", "compare", "push") else 9)


def called(
    monkeypatch: pytest.MonkeyPatch, line: str, function: str
) -> tuple[int, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The exit code of a command, and the calls of a function that it makes, without their console."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(*arguments: Any, **options: Any) -> int:
        consoles = [value for value in (*arguments, options.pop("console", None)) if isinstance(value, Console)]
        assert len(consoles) == 1
        calls.append((tuple(value for value in arguments if not isinstance(value, Console)), options))
        return 9

    monkeypatch.setattr(function, note)
    return cli.main(shlex.split(line)), calls


OF_A_RUN: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = [
    *(row for row in REACHED if row[0].split()[1].partition("/")[0] == "mine"),
    (
        "watch mine",
        "alignment.commands.watch.verb.watch",
        ("mine",),
        {"port": 0, "opens_browser": False, "until_done": False, "output": HERE},
    ),
    ("compare mine b", "alignment.commands.compare.compare", (HERE, ["mine", "b"]), {"html": None}),
]


@pytest.mark.parametrize(("line", "function", "values", "named"), OF_A_RUN)
def test_a_run_can_be_named_by_its_recipe(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    line: str,
    function: str,
    values: tuple[Any, ...],
    named: dict[str, Any],
) -> None:
    recipe = tmp_path / "first.yaml"
    recipe.write_text("defaults: [quickstart, _self_]\nname: mine\n")
    _, calls = called(monkeypatch, line.replace(" mine", f" {recipe}", 1), function)
    assert calls == [(values, named)]


@pytest.mark.parametrize(
    ("argument", "run"),
    [
        ("./mine.yaml", "mine"),
        ("mine.yaml/dpo", "mine/dpo"),
        ("heir.yaml", "family"),
        ("absent.yaml", "absent.yaml"),
        ("mine", "mine"),
        ("mine.yaml.old", "mine.yaml.old"),
    ],
)
def test_a_recipe_names_its_run_as_align_run_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, argument: str, run: str
) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [quickstart, _self_]\n")
    (tmp_path / "parent.yaml").write_text("defaults: [quickstart, _self_]\nname: family\n")
    (tmp_path / "heir.yaml").write_text("defaults: [parent, _self_]\n")
    monkeypatch.chdir(tmp_path)
    assert runs_of(Namespace(output=None), argument) == (tmp_path, [run])


@pytest.mark.parametrize(
    ("line", "folder", "runs"),
    [
        ("compare mine.yaml other", "elsewhere", ["mine", "other"]),
        ("compare mine.yaml/dpo too.yaml", "elsewhere", ["mine/dpo", "too"]),
        ("compare mine.yaml other --output given", "given", ["mine", "other"]),
        ("compare mine.yaml third.yaml --output given", "given", ["mine", "third"]),
        ("compare here.yaml other", ".", ["here", "other"]),
    ],
)
def test_a_run_is_looked_for_where_its_recipe_puts_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, folder: str, runs: list[str]
) -> None:
    recipes_with_outputs(monkeypatch, tmp_path)
    _, calls = called(monkeypatch, line, "alignment.commands.compare.compare")
    assert calls == [(((tmp_path / folder).absolute(), runs), {"html": None})]


def test_recipes_that_put_their_runs_in_different_folders_are_refused(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipes_with_outputs(monkeypatch, tmp_path)
    assert cli.main(["compare", "mine.yaml", "third.yaml"]) == 2
    message = f"mine.yaml, third.yaml: the recipes have different output folders: {tmp_path / 'elsewhere'}, "
    assert message in capsys.readouterr().err
    assert cli.main(["compare", "mine.yaml", "here.yaml"]) == 2
    assert f"the recipes have different output folders: {tmp_path}, " in capsys.readouterr().err


def recipes_with_outputs(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for name, output in (("mine", "elsewhere"), ("too", folder / "elsewhere"), ("third", "third")):
        (folder / f"{name}.yaml").write_text(f"defaults: [quickstart, _self_]\noutput: {output}\n")
    (folder / "here.yaml").write_text("defaults: [quickstart, _self_]\n")
    monkeypatch.chdir(folder)


def test_a_recipe_that_was_not_run_is_refused_with_the_runs_that_exist(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [quickstart, _self_]\n")
    monkeypatch.chdir(tmp_path)
    for name in ("mine-smoke", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text("{}")
    assert cli.main(["status", "./mine.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("configuration: mine: ")
    assert str(tmp_path / "runs") in error
    assert "one of: mine-smoke, other" in error


def test_every_verb_has_its_module_and_every_module_its_verb() -> None:
    commands = Path(cli.__file__).parent / "commands"
    modules = {file.parent.name for file in commands.glob("*/verb.py")} | {
        file.stem for file in commands.glob("[!_]*.py")
    }
    assert {name.replace("_", "-") for name in modules} == set(cli.VERBS)
    assert {line.split()[0] for line, *_ in REACHED} == set(cli.VERBS) - {"recipes", "stages"}


@pytest.mark.parametrize(
    ("verb", "hint"),
    [
        ("rnu", "did you mean 'run'?"),
        ("add_tokens", "did you mean 'add-tokens'?"),
        ("qqq", "one of: run, plan, "),
        ("train", "use: align run RECIPE"),
        ("eval", "use: align run RECIPE, with a stage of kind evaluate"),
        ("merge", "use: align export "),
        ("dpo", "it is a kind of stage; use: align run RECIPE --stage dpo"),
    ],
)
def test_a_verb_that_is_not_there_is_named_with_the_nearest(capsys: Captured, verb: str, hint: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main([verb, "quickstart"])
    assert f"align: error: no verb '{verb}'; {hint}" in capsys.readouterr().err


def test_help_groups_the_verbs_and_lists_every_exit_code(capsys: Captured) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    verbs, _, listed = capsys.readouterr().out.partition("exit codes:")
    lines = verbs.splitlines()
    for title, names in cli.VERB_GROUPS.items():
        first = lines.index(f"{title}:") + 1
        assert [line.split()[0] for line in lines[first : first + len(names)]] == list(names)
    assert [int(number) for number in re.findall(r"\d+", listed)] == [*range(13), 75, 130]


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_misspellings_are_listed_together_and_nothing_is_started(capsys: Captured, tmp_path: Path, verb: str) -> None:
    code = cli.main([verb, "quickstart", f"output={tmp_path}", "stages.sft.pakcing=true", "stages.dpo.bata=0.1"])
    assert code == 2
    assert capsys.readouterr().err == (
        "configuration: 2 faults in the configuration:\n"
        "  stages.sft.pakcing: unknown key; did you mean 'packing'?\n"
        "  stages.dpo.bata: unknown key; did you mean 'beta'?\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run"], 2, f"configuration: which recipe? shipped: {', '.join(recipe_names())}"),
        (["run", "quikstart"], 2, "configuration: quikstart: no recipe of this name; did you mean 'quickstart'?"),
        (["plan", "quickstart", "stages.sft.data.source=path:/x"], 3, "data: stages.sft.data.source: no file /x"),
        (["plan", "quickstart", "model.source=path:/x"], 4, "model: model.source: no folder /x"),
    ],
)
def test_a_fault_has_its_exit_code(capsys: Captured, arguments: list[str], code: int, message: str) -> None:
    assert cli.main(arguments) == code
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize(
    ("line", "beginning", "fact"),
    [
        ("status nope", "configuration: nope: ", "HERE/runs; there are none"),
        ("status --follow", "configuration: HERE/runs: ", "no readable run"),
        ("watch nope", "configuration: nope: ", "no run"),
        ("track nope --to wandb", "configuration: nope: ", "no run"),
        ("judge nope", "configuration: nope: ", "no run"),
        ("compare a", "configuration: a: ", "two runs"),
        ("compare a a", "configuration: a: ", "is named twice"),
        ("compare a b", "configuration: a: ", "no run"),
        ("chat nope", "configuration: nope: ", "no such run"),
        ("chat quickstart --arm nope/dpo", "configuration: nope/dpo: ", "no such run"),
        ("chat hub:nope", "model: hub:nope: ", "model source"),
        ("serve nope", "configuration: nope: ", "no such run"),
        ("export nope --to out", "configuration: nope: ", "no such run"),
        ("push nope --to a/b", "configuration: nope: ", "README.md is missing"),
        ("add-tokens nope <a> --to out", "model: nope: ", "model source"),
        ("sweep quickstart nope", "configuration: nope: ", "dpo_beta"),
        ("sweep quickstart ./nope.yaml", "configuration: ./nope.yaml: ", "no such file"),
        ("plan nope", "configuration: nope: ", "quickstart"),
        ("plan dpo_beta", "configuration: dpo_beta: ", "is a sweep"),
        ("plan ./nope.yaml", "configuration: ./nope.yaml: ", "no file HERE/nope.yaml"),
        ("plan nope.csv.gz", "configuration: nope.csv.gz: ", "align new nope.csv.gz"),
        ("preview ./nope.jsonl", "configuration: ./nope.jsonl: ", "align new ./nope.jsonl"),
        ("new nope.jsonl", "data: nope.jsonl: ", "no file HERE/nope.jsonl"),
        ("new a.jsonl a.jsonl", "configuration: a.jsonl: ", "is named twice"),
        ("new hub:x", "data: hub:x: ", "data set"),
        ("new a.jsonl --columns {promt:a}", "configuration: --columns", ""),
        ("doctor nope.jsonl", "data: nope.jsonl: ", "no file HERE/nope.jsonl"),
        ("doctor a.jsonl limit=3", "configuration: limit: ", "no effect"),
        ("doctor a.jsonl --split x", "configuration: split: ", "no effect"),
        ("doctor a.jsonl --against hub:x", "data: --against: ", "'hub:x'"),
    ],
)
def test_an_error_begins_with_what_the_user_wrote(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, beginning: str, fact: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"prompt": "a"}\n')
    assert cli.main(line.split()) != 0
    error = capsys.readouterr().err.replace(str(tmp_path), "HERE")
    assert error.startswith(beginning)
    assert fact in error.removeprefix(beginning)


def test_another_distribution_of_the_same_package_is_refused(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    information = tmp_path / "alignment_handbook-0.4.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: alignment-handbook\nVersion: 0.4\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cli.main(["recipes"]) == 2
    assert "alignment-handbook 0.4 is installed in this environment" in capsys.readouterr().err


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("alignment.commands.export.verb.handle", interrupt)
    assert cli.main(["export", "out", "--to", "there"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("words", [["preview", "quickstart", "--rwos", "1"], ["status", "a", "b"]])
def test_words_that_nobody_knows_are_refused(words: list[str], capsys: Captured) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    assert f"align {words[0]}: error: unrecognized arguments" in capsys.readouterr().err


OF_A_VERB = """
import pathlib, sys
from types import SimpleNamespace
from alignment import cli
from alignment.pipeline.backends import processes
from alignment.pipeline.backends.command import Command

argv = (sys.executable, "-c", {child!r})

def handle(*_):
    {starts}

cli.load = lambda _: SimpleNamespace(add_arguments=lambda _: None, handle=handle)
sys.argv = ["align", "plan"]
cli.console_script()
"""
STARTS = {
    "in the background": (
        "return processes.execute(Command(argv=argv, environment={}), log=pathlib.Path('log.txt'), "
        "on_poll=lambda: None, grace_seconds=1.0)"
    ),
    "on this terminal": "return processes.call(argv)",
}
CHILD = """
import os, subprocess, sys, time
own = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
time.sleep(0.1)
with open("pids.new", "w") as file:
    file.write(f"{os.getpid()} {own.pid}")
os.replace("pids.new", "pids")
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("repeated", [0.0005, 60.0])
@pytest.mark.parametrize("starts", STARTS)
def test_a_verb_that_is_asked_to_stop_ends_the_processes_that_it_started(
    tmp_path: Path, starts: str, number: signal.Signals, repeated: float
) -> None:
    code = OF_A_VERB.format(child=CHILD, starts=STARTS[starts])
    verb = subprocess.Popen(
        [sys.executable, "-c", f"import signal\nsignal.signal({int(number)}, signal.SIG_DFL)\n{code}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
        stderr=subprocess.PIPE,
        text=True,
    )
    pids = tmp_path / "pids"
    while not pids.exists():
        assert verb.poll() is None, verb.communicate()
        time.sleep(0.05)
    time.sleep(0.7)  # the descendants of a process are looked for twice a second
    children = [psutil.Process(int(pid)) for pid in pids.read_text().split()]
    while verb.poll() is None:  # as schedulers that repeat theirs, also while Python is taken down
        verb.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            verb.wait(repeated)
    _, errors = verb.communicate(timeout=30)
    _, alive = psutil.wait_procs(children, timeout=10)
    left = [child for child in alive if is_living(child)]
    kill_each(left)
    assert not left
    assert (verb.returncode, errors) == (75, "stopped by a signal\n")
