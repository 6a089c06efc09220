"""Whom ``align chat`` talks to, what policies hear, what reaches the terminal, and how a chat is ended."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignment import cli
from alignment.commands.chat import worker
from alignment.commands.chat.verb import chat
from alignment.commands.chat.worker import ChatSession, GenerationOptions, Screen, converse, load_session
from alignment.commands.shared.stored_policy import StoredPolicy
from alignment.core.artifacts import Manifest, publish
from alignment.core.errors import AlignmentError, DataError
from alignment.core.fingerprint import digest
from alignment.data.tokens.tokenize import prompt_ids
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.data.turns import Message
from alignment.models.assembly.load import Lineage
from alignment.models.forward.generate import generate
from alignment.pipeline.sources import model_sources
from tests.chained import trained_policy
from tests.hub import weights_file
from tests.tiny import BASE_SOURCE, save_tiny_model

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
        self.ignored = False

    @property
    def speakers(self) -> list[dict[str, Any]]:
        speakers: list[dict[str, Any]] = self.request["sessions"]
        return speakers

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

    def talk(self, result: str, *arms: str, engine: Any = None, **options: Any) -> list[str]:
        chat(Console(), result, arms, options={**OPTIONS, **options}, engine=engine, output=self.output)
        return [speaker["name"] for speaker in self.speakers]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    made = Runs(tmp_path)

    def hear(argv: list[str]) -> int:
        made.request = json.loads(Path(argv[-1]).read_text())
        made.ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        return 0

    monkeypatch.setattr("alignment.pipeline.backends.processes.call", hear)
    made.add("a", sft="policy", reward="reward", dpo="policy", ppo=None)
    made.add("young", sft=None)
    return made


def test_without_an_arm_the_last_policy_that_is_done_speaks(runs: Runs) -> None:
    before = signal.getsignal(signal.SIGINT)
    engine = {"engine": "vllm", "python": "/opt/vllm/bin/python"}
    options = {"system": "Be brief.", "seed": 7, "temperature": 0.5, "max_new_tokens": 9}
    assert runs.talk("a", engine=engine, **options) == ["dpo"]
    (speaker,) = runs.speakers
    assert (speaker["artifact"], speaker["base"]) == (str(runs.artifact("a", "dpo")), str(runs.base))
    assert speaker["dtype"] == "float32"
    assert (runs.request["options"], runs.request["engine"]) == (options, engine)
    assert runs.ignored, "Ctrl-C is the other process's"
    assert signal.getsignal(signal.SIGINT) is before


def test_arms_are_stages_the_base_or_other_results(runs: Runs) -> None:
    runs.add("b", dpo="policy")
    assert runs.talk("a", "stage:sft", "base") == ["sft", "base"]
    assert [runs.speakers[1][name] for name in ("artifact", "dtype", "chat_template")] == [None, "bfloat16", "chatml"]
    assert runs.talk("a", "dpo", "b/dpo") == ["dpo", "b/dpo"]
    assert runs.talk("a/sft") == ["a/sft"]
    assert runs.talk(str(runs.artifact("a", "sft")), "base") == ["base"]
    (runs.artifact("a", "dpo") / "manifest.json").write_text("{")
    assert runs.talk("a", "base") == ["base"], "beside a damaged result"


@pytest.mark.parametrize(
    ("template", "source", "options"),
    [
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
    own, base = runs.speakers
    assert base["chat_template"] == (source and source.format(folder=folder))
    assert base["template_options"] == options
    assert own["chat_template"] is None, "its own tokenizer has it"


def test_results_and_bases_are_found_where_they_are_now(runs: Runs, tmp_path: Path) -> None:
    """A run may be moved; the relative path of a base begins at the folder of the command, which is another one now."""
    identity = model_sources.resolve(f"path:{runs.base}", where="base").identity
    runs.add("b", sft=None)
    runs.publish(runs.artifact("b", "sft"), "sft", "policy", source="path:base", content=identity)
    file = runs.output / "runs/b/run.json"
    file.write_text(file.read_text().replace(f"path:{runs.base}", "path:base"))
    assert runs.talk("b", "sft", "base") == ["sft", "base"]
    assert [speaker["base"] for speaker in runs.speakers] == [str(runs.base), str(runs.base)]
    moved = tmp_path / "moved"
    moved.mkdir()
    for part in ("runs", "artifacts"):
        (runs.output / part).rename(moved / part)
    runs.output = moved
    for words in (("a",), ("a", "stage:dpo"), ("a/dpo",)):
        runs.talk(*words)
        assert [speaker["artifact"] for speaker in runs.speakers] == [str(moved / "artifacts/dpo-a")]
    (runs.base / "model.safetensors").write_bytes(weights_file(b"others"))
    with pytest.raises(AlignmentError, match="no folder"):
        runs.talk("b", "sft")


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (("a", "dpp"), {}, "did you mean 'dpo'?"),
        (("a", "reward"), {}, "of kind reward; only a policy can answer prompts"),
        (("a", "ppo"), {}, "no complete artifact here"),
        (("c",), {}, "c: is not a folder, and there is no such run"),
        (("a", "sft", "dpo", "base"), {}, "3 arms; at most two"),
        (("BASE",), {}, "is a folder with a model, not the result of a stage"),
        (("young",), {}, "no stage of this run has produced a policy yet"),
        (("a",), {"max_new_tokens": 0}, "--max-new-tokens: 0"),
        (("a",), {"temperature": -1.0}, "--temperature: -1.0"),
        (("a",), {"temperature": float("nan")}, "--temperature: nan"),
    ],
)
def test_what_cannot_talk_is_named(runs: Runs, words: tuple[str, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(AlignmentError) as caught:
        runs.talk(*(str(runs.base) if word == "BASE" else word for word in words), **options)
    assert message in str(caught.value)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("chat") / "base")


def _load(base: Path, artifact: Path | None = None, **changes: object) -> ChatSession:
    made = None if artifact is None else str(artifact)
    policy = StoredPolicy(name="base", described="", artifact=made, base=str(base), dtype="float32")
    return load_session(policy, options=GenerationOptions(**{"max_new_tokens": 12, **changes}))


def _greedy(session: ChatSession, turns: list[Message]) -> list[int]:
    prompt, ends = prompt_ids(session.tokenizer, turns), sorted(session.ends)
    (ids,) = generate(session.answerer.model, [prompt], max_new_tokens=12, end_ids=ends, batch_size=1)
    return ids


def _say(session: ChatSession, words: str) -> tuple[str, list[str]]:
    pieces: list[str] = []
    notes: list[str] = []
    session.answer(words, on_text=pieces.append, note=notes.append)
    return "".join(pieces), notes


def test_it_hears_the_conversation_so_far(base: Path) -> None:
    session = _load(base, system="You are brief.")
    first, _ = _say(session, "The shop?")
    second, _ = _say(session, "And the keys?")
    turns = [Message(role="system", content="You are brief."), Message(role="user", content="The shop?")]
    turns += [Message(role="assistant", content=first), Message(role="user", content="And the keys?")]
    ids = _greedy(session, turns)
    assert second == load_tokenizer(base).decode(ids, skip_special_tokens=True).lstrip()
    session.forget()
    assert _say(session, "The shop?")[0] == first, "a new conversation"


@pytest.mark.parametrize("trained", [False, True])
def test_an_answer_ends_where_the_models_own_generation_config_says(tmp_path: Path, trained: bool) -> None:
    """Beside EOS and the end of a turn, which are one token here; a stage's result stands on its base."""
    base = save_tiny_model(tmp_path / "base")
    start = Lineage(source=BASE_SOURCE, base=base, adapters=())
    artifact = trained_policy(tmp_path, start)[1].path if trained else None
    question = [Message(role="user", content="The shop?")]
    before = _greedy(_load(base, artifact), question)
    stop = next(token for token in before[1:] if token not in (before[0], 2))
    file = base / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [2, stop]}))
    assert _greedy(_load(base, artifact), question) == before[: before.index(stop) + 1]


def test_draws_come_from_the_seed(base: Path) -> None:
    sessions = [_load(base, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    once, again, other = ([_say(session, "Hi.")[0] for _ in range(2)] for session in sessions)
    assert once == again != other


def test_the_oldest_exchanges_are_dropped_and_that_is_said(base: Path) -> None:
    session = _load(base)
    session.answerer.model.config.max_position_embeddings = 180
    notes = [_say(session, f"The note says that the shop is closed, {number}.")[1] for number in range(5)]
    assert notes[0] == []
    dropped = "the oldest exchange was dropped, because the model reads at most 180 tokens"
    assert any(dropped in note for of_turn in notes for note in of_turn)
    assert len(session.history) < 10
    assert session.history[0].role == "user"
    before = list(session.history)
    with pytest.raises(DataError, match=r"base has room for 180.*\n.*write less"):
        _say(session, "word " * 300)
    assert session.history == before, "nothing was said"
    session = _load(base, max_new_tokens=1_000_000)
    session.answerer.model.config.max_position_embeddings = 400
    before = [Message(role="user", content="Hi."), Message(role="assistant", content="Yes.")]
    session.history += before
    assert _say(session, "Hi again.")[1] == []
    assert session.history[:2] == before, "an answer of any length leaves room for the conversation"


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(base: Path) -> None:
    session = _load(base, max_new_tokens=200)
    pieces: list[str] = []

    def stop(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.answer("Hi.", on_text=stop, note=pieces.append)
    assert [turn.content for turn in session.history] == ["Hi.", "".join(pieces)]
    session.tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        ChatSession(name="bare", answerer=session.answerer, tokenizer=session.tokenizer, options=GenerationOptions())


class _Echo:
    def __init__(self, name: str) -> None:
        self.name = name
        self.heard: list[str] = []

    def answer(self, words: str, *, on_text: Callable[[str], None], note: Callable[[str], None]) -> None:
        self.heard.append(words)
        on_text(f"{words} \x1b[2J")
        if words == "stop":
            raise KeyboardInterrupt
        if words == "long":
            raise DataError("too long")

    def forget(self) -> None:
        self.heard.clear()


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def talk(sessions: list[_Echo], lines: str, *, wide: bool = False) -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
        monkeypatch.setattr(Screen, "is_wide", wide)
        converse(sessions, Screen())
        return capsys.readouterr().out

    return talk


def test_a_pipe_is_a_conversation(piped: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = [_Echo("sft"), _Echo("dpo")]
    lines = piped(sessions, "one\n\nstop\nlong\n/reset\ntwo\n/exit\nthree\n").splitlines()
    assert lines[:2] == ["sft: one \\x1b[2J", "dpo: one \\x1b[2J"]
    assert lines[2:4] == ["sft: stop \\x1b[2J [stopped]", "dpo: stop \\x1b[2J [stopped]"], "the other one still speaks"
    assert lines[4] == "sft: long \\x1b[2J[too long]"
    assert lines[6:] == ["a new conversation", "sft: two \\x1b[2J", "dpo: two \\x1b[2J"]
    assert sessions[0].heard == ["two"]
    # an endless pipe in, and ``head`` behind it
    sessions = [_Echo("sft")]
    monkeypatch.setattr(Screen, "is_gone", property(lambda _: bool(sessions[0].heard)))
    piped(sessions, "one\ntwo\nthree\n")
    assert sessions[0].heard == ["one"]


def test_a_closed_input_is_an_empty_one_and_a_terminal_is_asked_without_readline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python may be built without it; then the arrow keys do nothing."""

    class Typed(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", None)
    assert list(Screen().lines()) == []
    monkeypatch.setitem(sys.modules, "readline", None)
    monkeypatch.setattr(sys, "stdin", Typed(io.BytesIO(b"one\ntwo\n")))
    assert list(Screen().lines()) == ["one", "two"]


def test_two_stand_beside_each_other_where_there_is_room(piped: Callable[..., str]) -> None:
    printed = piped([_Echo("sft"), _Echo("dpo")], "one [bold]\n", wide=True)
    (line,) = [line for line in printed.splitlines() if "one" in line]
    assert line.count("one [bold] \\x1b[2J") == 2
    assert "sft is thinking" in printed


def test_the_command_talks_to_a_stage_and_to_its_base(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line to the answer, through a pipe; a fault while loading has its exit code."""
    monkeypatch.setattr("alignment.pipeline.backends.processes.call", lambda argv: worker.main(argv[-1:]))
    _, saved = trained_policy(tmp_path, Lineage(source=BASE_SOURCE, base=base, adapters=()))
    record = {
        "config": {"model": {"source": f"path:{base}", "dtype": "float32"}},
        "stages": {"sft": {"kind": "sft", "artifact": str(saved.path)}},
    }
    (tmp_path / "runs" / "test" / "run.json").write_text(json.dumps(record))
    argv = ["chat", "test", "--arm", "sft", "--arm", "base", "--output", str(tmp_path)]
    argv += ["--max-new-tokens", "8", "--temperature", "1"]
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hi.\nHi again.\n")))
    assert cli.main(argv) == 0
    printed = capsys.readouterr()
    answers = [line for line in printed.out.splitlines() if line.startswith(("sft: ", "base: "))]
    assert [line.partition(":")[0] for line in answers if "…" not in line] == ["sft", "base", "sft", "base"]
    assert printed.err == ""
    (saved.path / "tokenizer/tokenizer.json").unlink()
    assert cli.main(argv) == 7
    assert "missing or cut short" in capsys.readouterr().err
