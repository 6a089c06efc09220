"""What every form of an export needs: the result, its lineage and tokenizer, and fixed rows to compare outputs on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from alignment.commands.export.comparing import gap_between, logprobs
from alignment.config.model import Dtype
from alignment.core.artifacts import TOKENIZER, Manifest
from alignment.core.errors import ModelError
from alignment.data.tokens.rendering import turn_end_token
from alignment.data.tokens.tokenize import STOPS, end_ids
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.models.assembly.adapters import is_prefix, put_back
from alignment.models.assembly.load import DTYPES, Lineage, load_policy, saved_adapters
from alignment.models.kernels.nf4 import quantize_trunk

CPU = torch.device("cpu")
TEXTS = (
    "The shop is closed on Monday. The keys are with the caretaker in the hall.",
    "Write one sentence about the sea.",
    "def area(width, height):\n    return width * height\n",
    "1, 1, 2, 3, 5, 8, 13,",
    "Die Bahn nach Basel fährt um 9 Uhr 40 von Gleis 7.",
    '{"name": "tea", "price": 3.5}',
    "Q: Which is larger, a lake or a pond?\nA: A lake.",
    "The meeting was moved from Tuesday to Thursday because two people were ill, and nobody told the third.",
)
"""Texts of the rows on which a written model must give the outputs of the one in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedResult:
    """An artifact that was verified; ``rows`` are the token ids of ``TEXTS``."""

    artifact: Path
    manifest: Manifest
    lineage: Lineage
    tokenizer: Any
    rows: list[list[int]]

    @property
    def dtype(self) -> Dtype:
        """The dtype in which the result was computed."""
        return Dtype(self.manifest.identity["base"]["dtype"])

    @property
    def turn_end(self) -> str | None:
        """The token that ends a turn; None without a chat template."""
        return turn_end_token(self.tokenizer) if self.tokenizer.chat_template else None

    @property
    def stops(self) -> list[int]:
        """The tokens that end an answer here.

        Raises:
            DataError: the chat template never ends a turn.
        """
        return sorted(end_ids(self.tokenizer)) if self.tokenizer.chat_template else self.text_ends

    @property
    def text_ends(self) -> list[int]:
        """The tokens that end a text without turns: EOS, and those that generation_config.json names."""
        return sorted({self.tokenizer.eos_token_id, *getattr(self.tokenizer, STOPS)})


def exported_result(artifact: Path, manifest: Manifest, base: Path | None) -> ExportedResult:
    """Finds the result's base, adapters and tokenizer; ``base`` is None if the artifact contains a model."""
    own = manifest.base["source"] == "self"
    folder = artifact / "model" if own or base is None else base
    tokenizer = load_tokenizer(artifact / TOKENIZER, model=folder)
    return ExportedResult(
        artifact=artifact,
        manifest=manifest,
        lineage=Lineage(source=manifest.base["source"], base=folder, adapters=saved_adapters(artifact, manifest)),
        tokenizer=tokenizer,
        rows=[tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS],
    )


def merged_policy(
    result: ExportedResult, dtype: torch.dtype, *, max_gap: float
) -> tuple[PreTrainedModel, torch.Tensor, list[str]]:
    """The policy with its adapters merged into weights of ``dtype``, its log-probabilities, and a note on merging.

    Raises:
        ModelError: an adapter is a prefix, or merging changed more than ``max_gap``.
    """
    refuse_prefix(result.lineage)
    merged = load_policy(result.lineage, dtype)
    expected = logprobs(merged, result.rows)
    if not result.lineage.adapters:
        return merged, expected, []
    gap = gap_between(_logprobs_as_trained(result), expected)
    widened = ", and computing in float32 where training computed in bfloat16," if dtype != DTYPES[result.dtype] else ""
    note = (
        f"merging{widened} changed log-probabilities by at most {gap.largest:.3g}, {gap.mean_kl:.2g} nats of KL per "
        "token"
    )
    if gap.mean_kl > max_gap:
        raise ModelError(
            f"{note}; --max-gap allows {max_gap:g}",
            where=str(result.lineage.adapters[-1].path),
            remedy="export it as an adapter, or allow more with --max-gap",
        )
    return merged, expected, [f"{note} (--max-gap allows {max_gap:g})"]


def _logprobs_as_trained(result: ExportedResult) -> torch.Tensor:
    """Those of the policy with its topmost adapters beside the weights, as in training."""
    lineage = result.lineage
    model = load_policy(lineage.weights, DTYPES[result.dtype])
    if lineage.adapters[-1].nf4:
        quantize_trunk(model, CPU)
    policy = put_back(model, [adapter.path for adapter in lineage.beside], trainable=False)
    return logprobs(policy, result.rows, result.dtype)


def refuse_prefix(lineage: Lineage) -> None:
    """A prefix is keys and values in front of a text, which no weight can hold.

    Raises:
        ModelError: an adapter is a prefix.
    """
    if any(is_prefix(adapter.path) for adapter in lineage.adapters):
        raise ModelError("a prefix cannot be merged into weights", remedy="export it as an adapter (--as adapter)")
