"""Talking to policies: what they hear, what reaches the terminal, and how it is ended."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import TaskType

from alignment.commands.chat import worker as chat
from alignment.commands.chat.chat_session import ChatSession, GenerationOptions, load_session
from alignment.commands.chat.worker import Screen, converse
from alignment.config.adapter import AdapterConfig
from alignment.config.model import Dtype, TemplateChoice
from alignment.core.errors import DataError
from alignment.data.tokens.tokenize import prompt_ids
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.data.turns import Message
from alignment.models.assembly.load import Lineage
from alignment.models.assembly.start import load_start
from alignment.models.forward.generate import generate
from alignment.stages.sft.config import SftConfig
from tests.tiny import BASE_SOURCE, liven, publish_tiny, save_tiny_model, tiny_spec


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("chat") / "base")


@pytest.fixture
def session_with(base: Path) -> Callable[..., ChatSession]:
    def make(**changes: object) -> ChatSession:
        options = GenerationOptions(**{"max_new_tokens": 12, **changes})
        return load_session("base", None, base, Dtype.float32, options=options, template=TemplateChoice(), engine=None)

    return make


def _say(session: ChatSession, words: str) -> tuple[str, list[str]]:
    pieces: list[str] = []
    notes: list[str] = []
    session.answer(words, on_text=pieces.append, note=notes.append)
    return "".join(pieces), notes


def test_it_hears_the_conversation_so_far(session_with: Callable[..., ChatSession], base: Path) -> None:
    session = session_with(system="You are brief.")
    first, _ = _say(session, "The shop?")
    second, _ = _say(session, "And the keys?")
    turns = [Message(role="system", content="You are brief."), Message(role="user", content="The shop?")]
    turns += [Message(role="assistant", content=first), Message(role="user", content="And the keys?")]
    tokenizer = load_tokenizer(base)
    (ids,) = generate(
        session.answerer.model,
        [prompt_ids(tokenizer, turns)],
        max_new_tokens=12,
        end_ids=sorted(session.ends),
        batch_size=1,
    )
    assert second == tokenizer.decode(ids, skip_special_tokens=True).lstrip()
    session.forget()
    assert _say(session, "The shop?")[0] == first, "a new conversation"


@pytest.mark.parametrize("trained", [False, True])
def test_an_answer_ends_where_the_models_own_generation_config_says(tmp_path: Path, trained: bool) -> None:
    """Beside EOS and the end of a turn, which are one token here; a stage's result stands on its base."""
    base = save_tiny_model(tmp_path / "base")
    artifact = None
    if trained:
        lineage = Lineage(source=BASE_SOURCE, base=base, adapters=())
        adapter = AdapterConfig(rank=4)
        model = load_start(lineage, adapter, Dtype.float32, task=TaskType.CAUSAL_LM, device=torch.device("cpu"))
        identity = {"kind": "sft", "base": {"content": None, "dtype": "float32"}}
        spec = tiny_spec(tmp_path, SftConfig(adapter=adapter), base_path=base, identity=identity)
        artifact = publish_tiny(spec, model, lineage).path

    def answer() -> list[int]:
        session = load_session(
            "x",
            artifact,
            base,
            Dtype.float32,
            options=GenerationOptions(max_new_tokens=12),
            template=TemplateChoice(),
            engine=None,
        )
        prompt = prompt_ids(session.tokenizer, [Message(role="user", content="The shop?")])
        return generate(
            session.answerer.model, [prompt], max_new_tokens=12, end_ids=sorted(session.ends), batch_size=1
        )[0]

    before = answer()
    stop = next(token for token in before[1:] if token not in (before[0], 2))
    file = base / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [2, stop]}))
    assert answer() == before[: before.index(stop) + 1]


def test_draws_come_from_the_seed(session_with: Callable[..., ChatSession]) -> None:
    once, again, other = (session_with(temperature=1.0, seed=seed) for seed in (0, 0, 1))
    answers = [[_say(session, "Hi.")[0] for _ in range(2)] for session in (once, again, other)]
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


def test_an_answer_of_any_length_leaves_room_for_the_conversation(session_with: Callable[..., ChatSession]) -> None:
    session = session_with(max_new_tokens=1_000_000)
    session.answerer.model.config.max_position_embeddings = 400
    before = [Message(role="user", content="Hi."), Message(role="assistant", content="Yes.")]
    session.history += before
    assert _say(session, "Hi again.")[1] == []
    assert session.history[:2] == before


def test_the_oldest_exchanges_are_dropped_and_that_is_said(session_with: Callable[..., ChatSession]) -> None:
    session = session_with()
    session.answerer.model.config.max_position_embeddings = 180
    notes = [_say(session, f"The note says that the shop is closed, {number}.")[1] for number in range(5)]
    assert notes[0] == []
    assert any(
        "the oldest exchange was dropped, because the model reads at most 180 tokens" in n
        for turn_notes in notes
        for n in turn_notes
    )
    assert len(session.history) < 10
    assert session.history[0].role == "user"
    before = list(session.history)
    with pytest.raises(DataError, match=r"tokens, but base has room for 180, including its answer\n.*write less"):
        _say(session, "word " * 300)
    assert session.history == before, "nothing was said"


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(session_with: Callable[..., ChatSession]) -> None:
    session = session_with(max_new_tokens=200)
    pieces: list[str] = []

    def stop(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.answer("Hi.", on_text=stop, note=pieces.append)
    assert [turn.content for turn in session.history] == ["Hi.", "".join(pieces)]


def test_a_model_without_a_template_is_refused_at_once(session_with: Callable[..., ChatSession]) -> None:
    session = session_with()
    session.tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        ChatSession(name="bare", answerer=session.answerer, tokenizer=session.tokenizer, options=GenerationOptions())


class _Echo:
    """Says what it is told, or raises it."""

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


def test_a_pipe_is_a_conversation(piped: Callable[..., str]) -> None:
    sessions = [_Echo("sft"), _Echo("dpo")]
    lines = piped(sessions, "one\n\nstop\nlong\n/reset\ntwo\n/exit\nthree\n").splitlines()
    assert lines[:2] == ["sft: one \\x1b[2J", "dpo: one \\x1b[2J"]
    assert lines[2:4] == ["sft: stop \\x1b[2J [stopped]", "dpo: stop \\x1b[2J [stopped]"], "the other one still speaks"
    assert lines[4] == "sft: long \\x1b[2J[too long]"
    assert lines[6:] == ["a new conversation", "sft: two \\x1b[2J", "dpo: two \\x1b[2J"]
    assert sessions[0].heard == ["two"]


def test_a_closed_input_is_an_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    sessions = [_Echo("sft")]
    converse(sessions, Screen())
    assert sessions[0].heard == []


def test_a_terminal_is_asked_if_python_has_no_readline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python may be built without it; then the arrow keys do nothing."""

    class Typed(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    monkeypatch.setitem(sys.modules, "readline", None)
    monkeypatch.setattr(sys, "stdin", Typed(io.BytesIO(b"one\ntwo\n")))
    assert list(Screen().lines()) == ["one", "two"]


def test_nobody_is_answered_who_has_gone(piped: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An endless pipe in, and ``head`` behind it."""
    sessions = [_Echo("sft")]
    monkeypatch.setattr(Screen, "is_gone", property(lambda _: bool(sessions[0].heard)))
    piped(sessions, "one\ntwo\nthree\n")
    assert sessions[0].heard == ["one"]


def test_two_stand_beside_each_other_where_there_is_room(piped: Callable[..., str]) -> None:
    printed = piped([_Echo("sft"), _Echo("dpo")], "one [bold]\n", wide=True)
    (line,) = [line for line in printed.splitlines() if "one" in line]
    assert line.count("one [bold] \\x1b[2J") == 2
    assert "sft is thinking" in printed


def test_the_command_talks_to_a_stage_and_to_its_base(tmp_path: Path, base: Path) -> None:
    """From the command line to the answer, through a pipe."""
    lineage = Lineage(source=BASE_SOURCE, base=base, adapters=())
    model = load_start(
        lineage, AdapterConfig(rank=4), Dtype.float32, task=TaskType.CAUSAL_LM, device=torch.device("cpu")
    )
    liven(model)
    identity = {"kind": "sft", "base": {"content": None, "dtype": "float32"}}
    spec = tiny_spec(tmp_path, SftConfig(adapter=AdapterConfig(rank=4)), base_path=base, identity=identity)
    saved = publish_tiny(spec, model, lineage)
    record = {
        "config": {"model": {"source": f"path:{base}", "dtype": "float32"}},
        "stages": {"sft": {"kind": "sft", "artifact": str(saved.path)}},
    }
    (tmp_path / "runs" / "test" / "run.json").write_text(json.dumps(record))
    argv = [sys.executable, "-m", "alignment.cli", "chat", "test", "--arm", "sft", "--arm", "base"]
    argv += ["--output", str(tmp_path), "--max-new-tokens", "8", "--temperature", "1"]
    done = subprocess.run(argv, input="Hi.\nHi again.\n", capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    answers = [line for line in done.stdout.splitlines() if line.startswith(("sft: ", "base: "))]
    assert [line.partition(":")[0] for line in answers if "…" not in line] == ["sft", "base", "sft", "base"]
    assert done.stderr == ""


def test_a_fault_while_loading_has_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    policy = {"name": "x", "described": "x", "artifact": str(tmp_path), "base": None, "dtype": "float32"}
    file = tmp_path / "chat.json"
    session = {**policy, "chat_template": None, "template_options": {}}
    file.write_text(json.dumps({"sessions": [session], "options": {}, "engine": None}))
    assert chat.main([str(file)]) == 7
    assert "no complete artifact here" in capsys.readouterr().err
