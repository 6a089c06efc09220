"""Asks llama.cpp, in its own environment, whether it reads a written file as this project does."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignment.commands.export.exported import TEXTS, ExportedResult
from alignment.core.errors import ConfigError, ModelError
from alignment.data.tokens.rendering import prompt_text
from alignment.data.tokens.tokenize import encode
from alignment.data.turns import Message
from alignment.engines.engine_environment import build_command

SCRIPT = Path(__file__).with_name("llama_script.py")
SECONDS = 1800
"""How long a reply may take: loading, and reading some two hundred tokens."""
LEAST_SHARE = 0.9
"""Share of positions on which the likeliest tokens must be equal. Chosen: with weights in a wrong order, or another
rotation, fewer than half are; with eight bits of a small model, more than 0.95."""


def ask(python: Path, model: Path, **request: Any) -> dict[str, Any]:
    """The reply of ``llama_script.py``, run by ``python``, about a GGUF file. Raises ConfigError, ModelError."""
    complete = {"rows": [], "prompts": [], "texts": [], "stops": [], "max_new_tokens": 0, "wide_cache": True, **request}
    complete |= {"model": str(model), "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "request.json", Path(folder) / "reply.json"]
        files[0].write_text(json.dumps(complete), encoding="utf-8")
        try:
            done = subprocess.run(
                [str(python), str(SCRIPT), *map(str, files)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ModelError(f"llama.cpp did not answer within {SECONDS} s", where=str(model)) from error
        if done.returncode == 0:
            reply: dict[str, Any] = json.loads(files[1].read_text(encoding="utf-8"))
            return reply
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if "No module named 'llama_cpp'" in last:
        remedy = f"name bin/python of an environment that has it; `{build_command('llama-cpp')}` builds one"
        raise ConfigError("this interpreter has no llama-cpp-python", where=str(python), remedy=remedy)
    raise ModelError(f"llama.cpp cannot read the written file: {last}; nothing was exported", where=str(model))


def check_by_llama(
    python: Path, file: Path, result: ExportedResult, expected: Tensor, *, adds_bos: bool, max_gap: float
) -> list[str]:
    """Compares tokens, ends and the likeliest next tokens with ours; returns notes. ``expected`` is ``[tokens,
    vocabulary]``, the log-probabilities of the result's rows. A token that is at most ``max_gap`` nats less likely than
    the likeliest is no other prediction: a model in training may be nearly indifferent. It raises as ``ask``, and
    ModelError: llama.cpp cuts texts, or predicts tokens, otherwise."""
    texts = [*TEXTS]
    if result.tokenizer.chat_template:  # a text with control tokens, as a chat has them
        texts.append(prompt_text(result.tokenizer, [Message(role="user", content=TEXTS[1])]))
    reply = ask(python, file, rows=result.rows, texts=texts)
    for text, ids in zip(texts, reply["ids"], strict=True):
        if ids != encode(result.tokenizer, text):
            raise _differs(f"tokenizes {text!r} differently", file)
    if reply["adds_bos"] != adds_bos:
        raise _differs(f"{'puts' if reply['adds_bos'] else 'does not put'} BOS in front of texts", file)
    likeliest = torch.tensor([token for row in reply["likeliest"] for token in row])
    less_likely = expected.amax(-1) - expected.gather(-1, likeliest[:, None])[:, 0]
    if (agreed := float((less_likely <= max_gap).double().mean())) < LEAST_SHARE:
        raise _differs(
            f"predicts a token within {max_gap:g} nats of the likeliest at only {agreed:.1%} of the positions", file
        )
    share = float((likeliest == expected.argmax(-1)).double().mean())
    return [
        f"llama.cpp (llama-cpp-python {reply['version']}) tokenizes the test texts in the same way, and predicts "
        f"the same token at {share:.1%} of {len(expected)} positions",
        *_about_ends(result, reply["ends"]),
    ]


def _about_ends(result: ExportedResult, ends: Sequence[int]) -> list[str]:
    """llama.cpp also ends at tokens whose names it knows, and may lack one of ours, for which GGUF has no field."""
    notes = []
    for tokens, words in (
        (sorted(set(ends) - set(result.stops)), "llama.cpp also ends an answer at"),
        (sorted(set(result.stops) - set(ends)), "llama.cpp does not end an answer at"),
    ):
        if tokens:
            notes.append(f"{words} {', '.join(result.tokenizer.convert_ids_to_tokens(tokens))}")
    return notes


def _differs(how: str, file: Path) -> ModelError:
    return ModelError(f"llama.cpp {how}; nothing was exported", where=str(file))
