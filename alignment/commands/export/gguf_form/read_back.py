"""Reads a written GGUF file by code that is not ours: metadata by ``gguf``, weights by transformers."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from torch import Tensor
from transformers import AutoModelForCausalLM

from alignment.commands.export.comparing import Gap, gap_between, logprobs, refuse_differences
from alignment.commands.export.gguf_form.architectures import Metadata
from alignment.core.errors import ModelError


def refuse_other_metadata(file: Path, metadata: Metadata) -> None:
    """The file must hold what was meant to be written.

    Raises:
        ModelError: a value is missing or another one.
    """
    fields = GGUFReader(file).fields
    for key, value in metadata.items():
        expected = float(np.float32(value)) if isinstance(value, float) else value
        if key not in fields or fields[key].contents() != expected:
            raise ModelError(f"the written file has a different {key}; nothing was exported", where=str(file))


def gap_of_file(file: Path, rows: Sequence[list[int]], expected: Tensor, *, dtype: str, max_gap: float) -> Gap:
    """How far the file's model is from ``expected [tokens, vocabulary]`` log-probabilities, computed in float32.

    Raises:
        ModelError: in f32 it gives other outputs; in another type the gap is larger than ``max_gap``.
    """
    with contextlib.redirect_stderr(io.StringIO()):  # transformers draws its progress whatever its settings are
        model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32).eval()
    actual = logprobs(model, rows)
    if dtype == "f32":
        refuse_differences(actual, expected, file)
    gap = gap_between(expected, actual)
    if not gap.mean_kl <= max_gap:  # NaN too
        raise ModelError(
            f"{dtype} costs {gap.mean_kl:.2g} nats of KL per token, more than {max_gap:g}; nothing was exported",
            where=str(file),
            remedy="choose a wider --dtype, or allow more with --max-gap",
        )
    return gap
