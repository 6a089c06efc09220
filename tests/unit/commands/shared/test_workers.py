"""Commands whose work a process does: one that is killed says so; new tokens survive; a tracker gets what it lacks."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment import cli
from alignment.commands.add_tokens.worker import add_tokens, main
from alignment.commands.export.export_options import ExportOptions
from alignment.commands.export.worker import export
from alignment.commands.shared.arguments import run_worker
from alignment.commands.track import worker
from alignment.commands.track.verb import track
from alignment.commands.track.worker import send, send_run
from alignment.config.model import NEW_TOKENS, AdapterConfig
from alignment.config.run import TrackingConfig
from alignment.core.artifacts import Manifest, publish
from alignment.core.deadline import KILLED_BY
from alignment.core.errors import Busy, ConfigError, ModelError, StageError
from alignment.core.locks import held
from alignment.data.records import Conversation, PlainText
from alignment.data.tokens.row_kinds import CONVERSATIONS, TEXTS, Limits, tokenized
from alignment.data.turns import Message
from alignment.records.run import RunRecord, StageEntry
from alignment.records.training import METRICS, MetricsLog
from alignment.stages.sft.kind import SftConfig
from tests.chained import Chained
from tests.hub import weights_file
from tests.oracles.close import close
from tests.tiny import save_tiny_model, tiny_model, tiny_spec, tiny_tokenizer
from tests.unit.training.read_back import curves_of

KILLED = """\
#!/bin/sh
mkdir .out.partial
echo weights > .out.partial/model.safetensors
kill -9 $$
"""
COMMANDS = {
    "export": ["sft", "--to", "out"],
    "add-tokens": ["path:base", "<|think|>", "--to", "out"],
    "chat": ["sft"],
    "track": ["mine", "--to", "tensorboard"],
}
WRITERS = ("export", "add-tokens")


def ends_by(number: int) -> list[str]:
    return [sys.executable, "-c", f"import os; os.kill(os.getpid(), {number})"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a base model, a policy, a run, and an interpreter that is killed."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "content", "runs/mine"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "base/config.json").write_text("{}")
    (tmp_path / "base/model.safetensors").write_bytes(weights_file())
    (tmp_path / "content/metrics.jsonl").touch()
    base = {"source": "path:base", "path": str(tmp_path / "base"), "content": None}
    identity = {"kind": "sft", "base": {"dtype": "float32"}}
    manifest = Manifest(stage="sft", kind="policy", fingerprint="0" * 64, identity=identity, base=base)
    publish(tmp_path / "content", tmp_path / "sft", manifest)
    RunRecord(name="mine").write(tmp_path / "runs/mine")
    python = tmp_path / "python"
    python.write_text(KILLED)
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    return tmp_path


@pytest.mark.parametrize("verb", COMMANDS)
def test_a_command_whose_process_is_killed_says_so(folder: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert cli.main([verb, *COMMANDS[verb]]) == 5
    assert capsys.readouterr().err == (
        f"error: {verb}: its process was ended by signal 9\n"
        "  → run it again; signal 9 often means that the machine ran out of memory\n"
    )
    assert not (folder / "out").exists()
    assert (folder / ".out.partial").exists() == (verb not in WRITERS), "it removes what its own worker wrote"


def test_a_template_that_never_ends_is_named_and_other_exit_codes_are_the_worker_s() -> None:
    with pytest.raises(ModelError, match="preview: the chat template ran for more than 30 s in one step"):
        run_worker(ends_by(KILLED_BY), verb="preview")
    assert run_worker([sys.executable, "-c", "import sys; sys.exit(4)"], verb="chat") == 4
    with pytest.raises(StageError, match=f"chat: its process was ended by signal {int(signal.SIGTERM)}"):
        run_worker(ends_by(signal.SIGTERM), verb="chat")


TOKENS = ["<|think|>", "<|/think|>"]
TEXT = "The shop <|think|>is closed<|/think|> on Monday."


def untied(folder: Path) -> Path:
    """Embeddings and head apart, and more rows than the tokenizer has tokens."""
    tokenizer = tiny_tokenizer()
    tiny_model("qwen2", vocab_size=len(tokenizer) + 8).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("make", [save_tiny_model, untied], ids=["tied", "untied, spare rows"])
def test_a_new_token_is_one_id_and_old_ones_keep_their_logits(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    base = make(tmp_path / "base")
    before = len(tiny_tokenizer())
    add_tokens(base, tmp_path / "more", TOKENS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "more")
    assert [tokenizer.convert_tokens_to_ids(token) for token in TOKENS] == [before, before + 1]
    assert tokenizer.decode(tokenizer(TEXT, add_special_tokens=False)["input_ids"]) == TEXT
    assert TOKENS[0] not in tokenizer.decode(tokenizer(TEXT)["input_ids"], skip_special_tokens=True)
    old, new = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base, tmp_path / "more"))
    ids = torch.tensor([[5, 6, 7, 8, 2]])
    with torch.no_grad():
        logits, expected = new(ids).logits, old(ids).logits
    close(logits[..., :before], expected[..., :before])
    close(logits[..., before], expected[..., :before].mean(-1), atol=1e-5)
    close(new.get_input_embeddings().weight[before], old.get_input_embeddings().weight[:before].mean(0), atol=1e-6)
    assert new.get_input_embeddings().weight.shape[0] >= before + 2
    assert json.loads((tmp_path / "more" / NEW_TOKENS).read_text()) == TOKENS, "for who trains them"
    add_tokens(tmp_path / "more", tmp_path / "most", ["<|last|>"])
    assert json.loads((tmp_path / "most" / NEW_TOKENS).read_text()) == [*TOKENS, "<|last|>"]


@pytest.mark.parametrize("in_text", [False, True])
def test_the_text_of_rows_has_new_tokens_only_if_they_are_added_for_it(tmp_path: Path, in_text: bool) -> None:
    """Control tokens stay text in a message, so that nobody can write the template's."""
    options = ["--in-text"] if in_text else []
    base = save_tiny_model(tmp_path / "base")
    assert main([str(base), "--to", str(tmp_path / "more"), *options, "--", *TOKENS]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "more")
    new = tokenizer.convert_tokens_to_ids(TOKENS)
    for text in (TEXT, f"{TEXT} The tag <|im_end|> is text."):
        turns = (Message(role="user", content="Hi"), Message(role="assistant", content=text))
        (conversation,) = tokenized(tokenizer, CONVERSATIONS, [Conversation(messages=turns)], Limits(row=1_000))
        (plain,) = tokenized(tokenizer, TEXTS, [PlainText(text=text)], Limits(row=1_000))
        for record in (conversation, plain):
            (row,) = record.rows
            learned = [number for number in row["labels"] if number >= 0]
            assert [number for number in learned if number in new] == (new if in_text else [])
            assert text in tokenizer.decode(learned)


def test_they_survive_training_by_adapter_and_export(tmp_path: Path) -> None:
    chained = Chained(tmp_path)
    base = tmp_path / "more"
    add_tokens(chained.base, base, TOKENS)
    adapter = AdapterConfig(rank=4, modules_to_save=["embed_tokens"])
    changes = {"base_path": base, "identity": {"kind": "sft", "base": {"dtype": "float32"}}}
    chained.run("sft", adapter, **changes)
    artifact = chained.inputs["sft"].path
    tokenizer = AutoTokenizer.from_pretrained(artifact / "tokenizer")
    (token,) = tokenizer(TOKENS[0], add_special_tokens=False)["input_ids"]
    (saved,) = artifact.glob("adapters/*")
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(saved))
    export(artifact, base, tmp_path / "out", ExportOptions())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TOKENS[0], add_special_tokens=False)["input_ids"] == [token]
    asked = torch.tensor([[5, token, 7, 2]])
    with torch.no_grad():
        close(plain(asked).logits, trained(asked).logits, atol=1e-4)
        started = AutoModelForCausalLM.from_pretrained(base)(asked).logits
        assert float((plain(asked).logits - started).abs().max()) > 1e-2
    chained.run("dpo", AdapterConfig(rank=4), init="sft", **changes)
    later = chained.inputs["dpo"].path
    assert later is not None
    assert AutoTokenizer.from_pretrained(later / "tokenizer").get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("tokens", "why"),
    [
        (["<|im_end|>"], "<|im_end|>: is already a token"),
        (["<|a|>", "<|a|>"], "<|a|>: is given twice"),
        ([" "], "' ' is empty"),
    ],
)
def test_a_token_that_cannot_be_new_is_refused_and_nothing_written(
    tmp_path: Path, tokens: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny_model(tmp_path / "base")
    assert main([str(base), "--to", str(tmp_path / "more"), "--", *tokens]) == 2
    assert why in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


@pytest.mark.parametrize(
    ("run", "to", "url", "words"),
    [
        ("quickstrat", "tensorboard", "", r"^quickstrat: no run .*; did you mean 'quickstart'\?"),
        ("quickstart", "mlflow", "http://me:s3cret@x", r"--url: not an address of a server; allowed: http"),
        ("quickstart", "mlflow", "", r"tracking.mlflow_url: no server is named"),
    ],
)
def test_what_cannot_be_sent_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str, to: str, url: str, words: str
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "runs/quickstart").mkdir(parents=True)
    RunRecord(name="quickstart").write(tmp_path / "runs/quickstart")
    with pytest.raises(ConfigError, match=words) as caught:
        track(Console(), run, to=to, url=url, output=tmp_path)
    assert "s3cret" not in str(caught.value)


def test_a_result_of_another_run_is_not_sent_as_this_run_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, sent = tmp_path / "runs/mine", list[Path]()
    monkeypatch.setattr(worker, "send", lambda spec, label: (sent.append(spec.artifact), f"{spec.stage}: sent")[1])
    spec = tiny_spec(tmp_path, SftConfig())
    (folder / "sft").mkdir(parents=True)
    (folder / "sft/stage.yaml").touch()
    monkeypatch.setattr(worker, "read_spec", lambda file: spec)
    entries = {
        "sft": StageEntry(kind="sft", state="reused", artifact=str(spec.artifact)),
        "report": StageEntry(kind="report", state="done", artifact="report-1"),
    }
    RunRecord(name="mine", stages=entries).write(folder)
    send_run(folder, "tensorboard", "")
    assert capsys.readouterr().out.splitlines() == ["sft: sent", "TensorBoard already has everything from mine"]
    assert sent == [spec.artifact]
    entries |= {
        "sft": StageEntry(kind="sft", state="reused", artifact="artifacts/sft-another"),
        "dpo": StageEntry(kind="dpo", state="reused", artifact="artifacts/dpo-another"),
        "ppo": StageEntry(kind="ppo", state="waiting", artifact="artifacts/ppo-later"),
    }
    RunRecord(name="mine", stages=entries).write(folder)
    send_run(folder, "tensorboard", "")
    assert capsys.readouterr().out.splitlines() == [
        f"sft: not sent, because {folder / 'sft/stage.yaml'} has other settings than its result",
        "dpo: not sent, because another run made its result",
    ]
    assert sent == [spec.artifact]
    spec.artifact.mkdir(parents=True)
    moved = tmp_path / "moved"
    moved.mkdir()
    for part in ("runs", "artifacts"):
        (tmp_path / part).rename(moved / part)
    entries = {"sft": StageEntry(kind="sft", state="done", artifact=str(spec.artifact))}
    RunRecord(name="mine", stages=entries).write(moved / "runs/mine")
    send_run(moved / "runs/mine", "tensorboard", "")
    assert sent[1:] == [moved / "artifacts" / spec.artifact.name]


def test_a_stage_that_was_stopped_is_sent_and_one_that_is_running_is_not(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    spec = tiny_spec(tmp_path, SftConfig(), tracking=TrackingConfig(tensorboard=True))
    log = MetricsLog(spec.work / "content" / METRICS)
    for step in (1, 2):
        log.append(step, {"loss": 1 / step})
    with held(spec.work / "worker.lock", wait=False), pytest.raises(Busy):
        send(spec, "TensorBoard")
    for _ in range(2):
        assert send(spec, "TensorBoard") == "sft: TensorBoard has 2 steps"
        assert curves_of("tensorboard", spec) == {("loss", 1): [1.0], ("loss", 2): [0.5]}
