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
from alignment.config.model import Dtype
from alignment.data.tokens.tokenize import turn_end_id
from alignment.models.assembly.load import DTYPES, load_scalar, load_scalar_head
from alignment.models.assembly.reward_head import AT_TURN_END, HEAD


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

    The file keeps the head in float32. A reader in bfloat16 rounds it, so the expected scores are rounded alike.

    Raises:
        ModelError: an adapter is a prefix, or the classifier gives other scores when it is loaded.
    """
    refuse_prefix(result.lineage)
    dtype = DTYPES[result.dtype]
    model = load_scalar(result.lineage, dtype)
    load_scalar_head(model, result.artifact / HEAD)
    padding = _set_padding(model, result)
    setattr(model.config, AT_TURN_END, True)
    model.config.use_cache = True
    model.save_pretrained(str(folder))
    rows = [[*row, turn_end_id(result.tokenizer)] for row in result.rows]
    exact = _scores_at_ends(model, rows)
    model.score.to(dtype)
    expected = _scores_at_ends(model, rows)
    again = AutoModelForSequenceClassification.from_pretrained(str(folder), dtype=dtype, use_safetensors=True).eval()
    refuse_differences(_scores(again, rows), expected, folder)
    return [
        f"its scores are the scores in training plus {float(model.score_offset):.4f}, the offset that makes chosen "
        "answers score 0",
        *_rounding(result.dtype, float((expected - exact).abs().max())),
        padding,
        "loaded by transformers, it gives the same scores at the end of the test texts as before it was saved",
    ]


def _set_padding(model: PreTrainedModel, result: ExportedResult) -> str:
    """Keeps the padding token, or chooses another if it ends turns; returns a note about it.

    transformers scores the last token that is not padding. In training, padding is often EOS, which often ends turns.
    """
    tokenizer, size = result.tokenizer, model.get_input_embeddings().num_embeddings
    turn_end, before = turn_end_id(tokenizer), tokenizer.pad_token
    control = [token for token, content in sorted(tokenizer.added_tokens_decoder.items()) if content.special]
    known = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id, *control]
    usable = [token for token in known if token is not None and token != turn_end and token < size]
    model.config.get_text_config().pad_token_id = usable[0] if usable else None
    if not usable:
        return "its only special token ends turns, so it cannot be padding: score one conversation at a time"
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(usable[0])
    if tokenizer.pad_token == before:
        return f"its padding token is {before}"
    return f"its padding token is {tokenizer.pad_token}, because {before} ends turns, and padding would hide their ends"


def _rounding(dtype: Dtype, change: float) -> list[str]:
    if dtype is Dtype.float32:
        return []
    return [
        f"loaded in {dtype.value}, its head and scores are rounded, which changed scores by at most {change:.2g} on "
        'the test texts; loaded with dtype="float32", they are not'
    ]


@torch.no_grad()
def _scores(model: PreTrainedModel, rows: Sequence[list[int]]) -> Tensor:
    """``[rows]``, where transformers finds the ends of the rows."""
    return torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in rows]).float()


@torch.no_grad()
def _scores_at_ends(model: PreTrainedModel, rows: Sequence[list[int]]) -> Tensor:
    """``[rows]`` at the last token of each, as in training."""
    states = [model.base_model(torch.tensor([row])).last_hidden_state for row in rows]
    return torch.cat([model.score(of_row.to(model.score.weight.dtype))[0, -1] for of_row in states]).float()
