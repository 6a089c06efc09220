"""What llama.cpp says of a file is believed: planted replies that differ are refused."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignment.commands.export.comparing import logprobs
from alignment.commands.export.exported import TEXTS, ExportedResult, exported_result
from alignment.commands.export.gguf_form import llama_cpp_check
from alignment.commands.export.gguf_form.llama_cpp_check import ask, check_by_llama
from alignment.core.artifacts import verify
from alignment.core.errors import ConfigError, ModelError
from alignment.data.tokens.rendering import prompt_text
from alignment.data.tokens.tokenize import encode
from alignment.data.turns import Message
from tests.exported import tiny_base, trained_policy

PROGRAM = """#!{python}
import json, sys
request = json.load(open(sys.argv[2]))
json.dump(request, open({request!r}, "w"))
open(sys.argv[3], "w").write({reply!r})
"""


def _interpreter(folder: Path, program: str) -> Path:
    """A program in place of the interpreter with llama.cpp."""
    path = folder / "python"
    path.write_text(program)
    path.chmod(0o755)
    return path


def _replying(folder: Path, reply: dict[str, Any]) -> Path:
    written = PROGRAM.format(python=sys.executable, request=str(folder / "request.json"), reply=json.dumps(reply))
    return _interpreter(folder, written)


@pytest.fixture
def case(tmp_path: Path) -> tuple[ExportedResult, Tensor, dict[str, Any]]:
    """A policy, its log-probabilities, and the reply of a llama.cpp that agrees."""
    base = tiny_base(tmp_path)
    model, saved = trained_policy(tmp_path, base)
    result = exported_result(saved.path, verify(saved.path, content=True), base.base)
    expected = logprobs(model, result.rows)
    prompt = prompt_text(result.tokenizer, [Message(role="user", content=TEXTS[1])])
    reply = {
        "version": "0.3.36",
        "ids": [encode(result.tokenizer, text) for text in (*TEXTS, prompt)],
        "likeliest": [expected.argmax(-1).tolist()],
        "ends": [2],
        "adds_bos": False,
    }
    return result, expected, reply


def test_a_file_that_is_read_alike_is_said_to_be(tmp_path: Path, case: Any) -> None:
    result, expected, reply = case
    notes = check_by_llama(
        _replying(tmp_path, reply), tmp_path / "m.gguf", result, expected, adds_bos=False, max_gap=0.0
    )
    assert notes == [
        "llama.cpp (llama-cpp-python 0.3.36) tokenizes the test texts in the same way, and predicts the same token "
        f"at 100.0% of {len(expected)} positions"
    ]
    request = json.loads((tmp_path / "request.json").read_text())
    assert request["model"] == str(tmp_path / "m.gguf")
    assert request["rows"] == result.rows
    assert request["wide_cache"] is True


def test_ends_that_differ_are_notes(tmp_path: Path, case: Any) -> None:
    result, expected, reply = case
    python = _replying(tmp_path, {**reply, "ends": [0]})
    notes = check_by_llama(python, tmp_path / "m.gguf", result, expected, adds_bos=False, max_gap=0.0)
    assert notes[1:] == [
        "llama.cpp also ends an answer at <|endoftext|>",
        "llama.cpp does not end an answer at <|im_end|>",
    ]


@pytest.mark.parametrize(
    ("change", "adds_bos", "message"),
    [
        (lambda reply: reply["ids"][0].pop(), False, r"tokenizes 'The shop is closed .* differently"),
        (lambda reply: reply["ids"][-1].pop(0), False, r"tokenizes '<\|im_start\|>system.* differently"),
        (lambda reply: reply.update(adds_bos=True), False, "puts BOS in front of texts"),
        (lambda reply: None, True, "does not put BOS in front of texts"),
    ],
)
def test_a_reply_that_differs_is_refused(tmp_path: Path, case: Any, change: Any, adds_bos: bool, message: str) -> None:
    result, expected, reply = case
    change(reply)
    with pytest.raises(ModelError, match=f"llama.cpp {message}; nothing was exported"):
        check_by_llama(
            _replying(tmp_path, reply), tmp_path / "m.gguf", result, expected, adds_bos=adds_bos, max_gap=0.0
        )


@pytest.mark.parametrize(
    ("wrong", "max_gap", "is_refused"), [(0.08, 0.0, False), (0.12, 0.0, True), (0.12, 0.1, True), (0.12, 3.0, False)]
)
def test_other_predictions_are_refused_from_a_tenth_on(
    tmp_path: Path, case: Any, wrong: float, max_gap: float, is_refused: bool
) -> None:
    result, _, reply = case
    expected = torch.zeros(len(reply["likeliest"][0]), 100)
    likeliest = torch.arange(len(expected)) % 90
    expected[torch.arange(len(expected)), likeliest] = 2.0  # nats more likely than the others
    reply["likeliest"] = [likeliest.tolist()]
    for index in range(int(wrong * len(expected))):
        reply["likeliest"][0][index] += 1
    check = partial(
        check_by_llama,
        _replying(tmp_path, reply),
        tmp_path / "m.gguf",
        result,
        expected.log_softmax(-1),
        adds_bos=False,
        max_gap=max_gap,
    )
    if is_refused:
        with pytest.raises(ModelError, match=r"at only 8\d\.\d% of the positions"):
            check()
    else:
        assert f" same token at {1 - int(wrong * len(expected)) / len(expected):.1%}" in check()[0]


def test_an_environment_without_llama_cpp_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no llama-cpp-python\n.*make engine-llama"):
        ask(Path(sys.executable), tmp_path / "m.gguf")


def test_a_file_that_llama_cpp_cannot_read_is_not_exported(tmp_path: Path) -> None:
    program = f"#!{sys.executable}\nraise ValueError('Failed to load model from file')\n"
    with pytest.raises(ModelError, match=r"cannot read the written file: ValueError: Failed to load .*; nothing was"):
        ask(_interpreter(tmp_path, program), tmp_path / "m.gguf")


def test_a_crash_without_words_is_named_by_its_code(tmp_path: Path) -> None:
    program = f"#!{sys.executable}\nimport os\nos.abort()\n"
    with pytest.raises(ModelError, match="cannot read the written file: exit code -6"):
        ask(_interpreter(tmp_path, program), tmp_path / "m.gguf")


def test_a_program_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp_check, "SECONDS", 0.5)
    program = f"#!{sys.executable}\nimport time\ntime.sleep(60)\n"
    with pytest.raises(ModelError, match=r"did not answer within 0\.5 s"):
        ask(_interpreter(tmp_path, program), tmp_path / "m.gguf")
