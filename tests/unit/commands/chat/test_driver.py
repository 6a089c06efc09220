"""Whom ``align chat`` talks to, and what it refuses before anything is loaded."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignment.commands.chat.verb import chat
from alignment.core.artifacts import Manifest, publish
from alignment.core.errors import AlignmentError
from alignment.core.fingerprint import digest
from alignment.pipeline.sources import model_sources
from tests.weights_files import weights_file

OPTIONS = {"system": "", "max_new_tokens": 8, "temperature": 0.0, "seed": 0}


class Runs:
    """A run with results that have nothing in them, and whom a conversation was begun with."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.base = output / "base"
        self.base.mkdir()
        (self.base / "config.json").write_text("{}")
        (self.base / "model.safetensors").write_bytes(weights_file())
        self.request: dict[str, Any] = {}
        self.speakers: list[dict[str, Any]] = []
        self.ignored = False

    def add(self, run: str, **kinds: str | None) -> None:
        stages = {stage: {"kind": stage, "artifact": str(self.artifact(run, stage))} for stage in kinds}
        for stage, kind in kinds.items():
            if kind is not None:
                self.publish(self.artifact(run, stage), stage, kind)
        folder = self.output / "runs" / run
        folder.mkdir(parents=True)
        model = {"source": f"path:{self.base}", "dtype": "bfloat16", "chat_template": "chatml"}
        (folder / "run.json").write_text(json.dumps({"config": {"model": model}, "stages": stages}))

    def artifact(self, run: str, stage: str) -> Path:
        return self.output / "artifacts" / f"{stage}-{run}"

    def publish(
        self, folder: Path, stage: str, kind: str, template: dict[str, Any] | None = None, **base_record: Any
    ) -> None:
        content = self.output / "content"
        content.mkdir()
        (content / "metrics.jsonl").touch()
        base = {"source": f"path:{self.base}", "path": str(self.base), "content": None, **base_record}
        identity = {"kind": stage, "base": {"dtype": "float32", **(template or {})}}
        publish(content, folder, Manifest(stage=stage, kind=kind, fingerprint="0" * 64, identity=identity, base=base))

    def talk(self, result: str, *arms: str, **options: Any) -> list[str]:
        """The names of those who would speak."""
        chat(Console(), result, arms, options={**OPTIONS, **options}, engine=None, output=self.output)
        return [speaker["name"] for speaker in self.speakers]

    def refused(self, result: str, *arms: str, **options: Any) -> str:
        with pytest.raises(AlignmentError) as caught:
            self.talk(result, *arms, **options)
        return str(caught.value)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    run_folders = Runs(tmp_path)

    def hear(argv: list[str]) -> int:
        run_folders.request = json.loads(Path(argv[-1]).read_text())
        run_folders.speakers = run_folders.request["sessions"]
        run_folders.ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        return 0

    monkeypatch.setattr("alignment.pipeline.backends.processes.call", hear)
    run_folders.add("a", sft="policy", reward="reward", dpo="policy", ppo=None)
    return run_folders


def test_without_an_arm_the_last_policy_that_is_done_speaks(runs: Runs) -> None:
    before = signal.getsignal(signal.SIGINT)
    assert runs.talk("a") == ["dpo"]
    (speaker,) = runs.speakers
    assert speaker["artifact"] == str(runs.artifact("a", "dpo"))
    assert speaker["base"] == str(runs.base)
    assert speaker["dtype"] == "float32"
    assert runs.ignored, "Ctrl-C is the other process's"
    assert signal.getsignal(signal.SIGINT) is before


def test_options_and_the_engine_arrive_at_the_worker(runs: Runs) -> None:
    options = {**OPTIONS, "system": "Be brief.", "seed": 7, "temperature": 0.5, "max_new_tokens": 9}
    engine = {"engine": "vllm", "python": "/opt/vllm/bin/python"}
    chat(Console(), "a", (), options=options, engine=engine, output=runs.output)
    assert runs.request["options"] == options
    assert runs.request["engine"] == engine


@pytest.fixture
def arms_of(runs: Runs) -> Callable[..., list[str]]:
    runs.add("b", dpo="policy")
    return runs.talk


def test_arms_are_stages_the_base_or_other_results(runs: Runs, arms_of: Callable[..., list[str]]) -> None:
    assert arms_of("a", "stage:sft", "base") == ["sft", "base"]
    assert runs.speakers[1]["artifact"] is None
    assert (runs.speakers[1]["dtype"], runs.speakers[1]["chat_template"]) == ("bfloat16", "chatml")
    assert arms_of("a", "dpo", "b/dpo") == ["dpo", "b/dpo"]
    assert arms_of("a/sft") == ["a/sft"]
    assert arms_of(str(runs.artifact("a", "sft")), "base") == ["base"]


@pytest.mark.parametrize(
    ("template", "source", "options"),
    [
        ({}, None, {}),
        ({"template_options": {"enable_thinking": False}}, None, {"enable_thinking": False}),
        ({"chat_template": digest("chatml"), "template_options": {"a": 1}}, "chatml", {"a": 1}),
        (
            {"chat_template": digest("{{ a }}"), "template_options": {"a": 1}},
            "path:{folder}/tokenizer/chat_template.jinja",
            {},
        ),
    ],
)
def test_the_base_of_a_result_has_the_template_of_its_run(
    runs: Runs, template: dict[str, Any], source: str | None, options: dict[str, Any]
) -> None:
    folder = runs.artifact("b", "sft")
    runs.publish(folder, "sft", "policy", template)
    assert runs.talk(str(folder), str(folder), "base") == [folder.name, "base"]
    base = runs.speakers[1]
    assert base["chat_template"] == (source and source.format(folder=folder))
    assert base["template_options"] == options
    assert runs.speakers[0]["chat_template"] is None, "its own tokenizer has it"


def test_results_of_a_run_that_was_moved_are_found(runs: Runs, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for part in ("runs", "artifacts"):
        (runs.output / part).rename(moved / part)
    runs.output = moved
    for words in (("a",), ("a", "stage:dpo"), ("a/dpo",)):
        runs.talk(*words)
        assert [speaker["artifact"] for speaker in runs.speakers] == [str(moved / "artifacts/dpo-a")]


def test_a_base_is_looked_for_where_it_was(runs: Runs) -> None:
    """A relative path begins at the folder of the command, which is another one now."""
    identity = model_sources.resolve(f"path:{runs.base}", where="base").identity
    runs.add("b", sft=None)
    runs.publish(runs.artifact("b", "sft"), "sft", "policy", source="path:base", content=identity)
    file = runs.output / "runs/b/run.json"
    file.write_text(file.read_text().replace(f"path:{runs.base}", "path:base"))
    assert runs.talk("b", "sft", "base") == ["sft", "base"]
    assert [speaker["base"] for speaker in runs.speakers] == [str(runs.base), str(runs.base)]
    (runs.base / "model.safetensors").write_bytes(weights_file(b"others"))
    assert "no folder" in runs.refused("b", "sft")


def test_the_base_of_a_run_answers_beside_a_damaged_result(runs: Runs) -> None:
    (runs.artifact("a", "dpo") / "manifest.json").write_text("{")
    assert runs.talk("a", "base") == ["base"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("a", "dpp"), "run 'a' has no stage 'dpp'; did you mean 'dpo'?"),
        (("a", "reward"), "of kind reward; only a policy can answer prompts"),
        (("a", "ppo"), "no complete artifact here"),
        (("c",), "there is no run 'c'"),
        (("a", "sft", "dpo", "base"), "3 arms; at most two can be shown side by side"),
    ],
)
def test_what_cannot_talk_is_named(runs: Runs, words: tuple[str, ...], message: str) -> None:
    assert message in runs.refused(*words)


def test_a_folder_that_was_exported_is_not_taken_for_a_broken_result(runs: Runs, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "config.json").write_text("{}")
    assert "is a folder with a model, not the result of a stage" in runs.refused(str(exported))


def test_a_run_without_a_policy_and_limits_that_cannot_be_are_refused(runs: Runs) -> None:
    runs.add("young", sft=None)
    assert "no stage of this run has produced a policy yet" in runs.refused("young")
    assert "--max-new-tokens: 0 is not a valid length" in runs.refused("a", max_new_tokens=0)
    assert "--temperature: -1.0 is not a valid temperature" in runs.refused("a", temperature=-1.0)
    assert "nan is not a valid temperature" in runs.refused("a", temperature=float("nan"))
