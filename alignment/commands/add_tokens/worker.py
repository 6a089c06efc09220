"""Adds tokens to a model, for ``align add-tokens``: ``worker FOLDER --to FOLDER [--in-text] TOKEN…``.

A new token's row, in the embeddings and in the head, is the mean of all other rows. The model then gives it about the
probability of an average token, and changes that of other tokens little (Hewitt 2021, "Initializing new word embeddings
for pretrained language models").

A control token in a message stays text (``data/tokens/rendering.py``), so only a chat template can write new ones. With
``--in-text`` they are ordinary added tokens, which stay tokens in every text.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

from alignment.commands.shared.worker_process import reported, run_as_program, silence_libraries
from alignment.config.model import NEW_TOKENS
from alignment.core.artifacts import readable, write_json
from alignment.core.errors import ConfigError, ModelError
from alignment.core.files import explained, parse_json, partial_folder
from alignment.core.model_files import refuse_weights_elsewhere


@reported
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit code 0, or that of the error."""
    parser = argparse.ArgumentParser(prog="python -m alignment.commands.add_tokens.worker", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--in-text", action="store_true")
    parser.add_argument("tokens", nargs="+")
    options = parser.parse_args(arguments)
    silence_libraries()
    with explained(options.to.parent):
        print(add_tokens(options.folder, options.to, options.tokens, in_text=options.in_text))
    return 0


def add_tokens(folder: Path, to: Path, tokens: Sequence[str], *, in_text: bool = False) -> str:
    """Writes the folder ``to`` in one rename; returns a message about it. ``in_text``: texts may contain the tokens.
    Raises ConfigError, ModelError."""
    partial = partial_folder(to)
    shutil.rmtree(partial, ignore_errors=True)
    earlier = _added_before(folder)
    model, tokenizer = _read(folder)
    _refuse_known(tokenizer, tokens)
    before = len(tokenizer)
    special = not in_text
    added = [AddedToken(token, special=special, normalized=False) for token in tokens]
    tokenizer.add_tokens(added, special_tokens=special)
    rows = max(len(tokenizer), model.get_input_embeddings().weight.shape[0])
    model.resize_token_embeddings(rows, mean_resizing=False)
    for matrix in (model.get_input_embeddings(), model.get_output_embeddings()):
        _give_mean(matrix, before, len(tokenizer))
    try:
        model.save_pretrained(str(partial))
        tokenizer.save_pretrained(str(partial))
        write_json(partial / NEW_TOKENS, [*earlier, *tokens])
        _refuse_lost(partial, tokens, rows)
        readable(partial)
        partial.rename(to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return f"new tokens: {len(tokens)}, with ids from {before}; the model has {rows} rows of embeddings"


def _added_before(folder: Path) -> list[str]:
    """The tokens that earlier calls added, so that a plan can warn of their rows too."""
    file = folder / NEW_TOKENS
    try:
        return list(map(str, parse_json(file.read_text(encoding="utf-8")))) if file.is_file() else []
    except (ValueError, TypeError) as error:
        raise ModelError(f"is no list of tokens: {error}", where=str(file), remedy="delete it") from error


def _read(folder: Path) -> tuple[Any, Any]:
    refuse_weights_elsewhere(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype="auto", trust_remote_code=False, use_safetensors=True
        )
        return model, AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"the model cannot be loaded: {error}", where=str(folder)) from error


def _refuse_known(tokenizer: Any, tokens: Sequence[str]) -> None:
    known = tokenizer.get_vocab()
    for index, token in enumerate(tokens):
        if token in known or token in tokens[:index] or not token.strip():
            why = "is already a token" if token in known else "is given twice" if token.strip() else "is empty"
            raise ConfigError(f"{token!r} {why}", where=token.strip(), remedy="name others")


@torch.no_grad()
def _give_mean(matrix: nn.Module, start: int, end: int) -> None:
    """Sets new rows to the mean of the others. It is called twice for tied embeddings, which changes nothing."""
    weight: Any = matrix.weight
    weight[start:end] = weight[:start].float().mean(0).to(weight.dtype)


def _refuse_lost(folder: Path, tokens: Sequence[str], rows: int) -> None:
    model, tokenizer = _read(folder)
    ids = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in tokens]
    if any(len(token_ids) != 1 for token_ids in ids) or model.get_input_embeddings().weight.shape[0] != rows:
        raise ModelError("the written model does not contain its new tokens and was deleted", where=str(folder))


if __name__ == "__main__":
    run_as_program(main)
