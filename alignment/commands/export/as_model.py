"""``--as model``: whole weights for plain transformers, of a policy or a reward model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from alignment.commands.export.comparing import logprobs, refuse_differences
from alignment.commands.export.exported import ExportedResult, merged_policy, refuse_prefix
from alignment.commands.shared.generation_settings import generation_settings
from alignment.models.assembly.load import DTYPES, load_scalar, load_scalar_head


def write_policy(result: ExportedResult, folder: Path, *, max_gap: float) -> list[str]:
    """Writes a causal language model with the adapters merged; returns notes about it.

    Raises:
        ModelError: see ``merged_policy``; or it gives other outputs when it is loaded.
    """
    dtype = DTYPES[result.dtype]
    merged, expected, notes = merged_policy(result, dtype, max_gap=max_gap)
    merged.config.use_cache = True
    # So that `generate` stops where it stopped here, and the base's own settings change no answer.
    merged.generation_config = generation_settings(result.stops, result.tokenizer.pad_token_id)
    merged.save_pretrained(str(folder))
    again = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, use_safetensors=True).eval()
    refuse_differences(logprobs(again, result.rows), expected, folder)
    return [*notes, "loaded by transformers, it gives the same outputs on the test texts as before it was saved"]


def write_reward(result: ExportedResult, folder: Path) -> list[str]:
    """Writes a sequence classifier, whose score lacks our offset, because it has no field for it.

    Raises:
        ModelError: an adapter is a prefix, or the classifier gives other scores when it is loaded.
    """
    refuse_prefix(result.lineage)
    dtype = DTYPES[result.dtype]
    model = load_scalar(result.lineage, dtype)
    load_scalar_head(model, result.artifact / "head.safetensors")
    offset = float(model.score_offset)
    model.config.pad_token_id = result.tokenizer.pad_token_id
    model.config.use_cache = True
    expected = _scores(model, result.rows)
    model.save_pretrained(str(folder))
    again = AutoModelForSequenceClassification.from_pretrained(str(folder), dtype=dtype, use_safetensors=True).eval()
    again.score.float()
    refuse_differences(_scores(again, result.rows), expected, folder)
    return [
        f"its scores are the scores in training plus {offset:.4f}, the offset that makes chosen answers score 0",
        "loaded by transformers, it gives the same outputs on the test texts, one row at a time",
    ]


@torch.no_grad()
def _scores(model: PreTrainedModel, rows: Sequence[list[int]]) -> Tensor:
    """``[rows]``; row by row, because transformers finds a row's end by its pad id, which may be a real token here."""
    states = [model.base_model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
    scores: Tensor = model.score(torch.stack(states).to(model.score.weight.dtype))
    return scores.float().squeeze(-1)
