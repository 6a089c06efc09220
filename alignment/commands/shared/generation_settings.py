"""The generation settings of policies that other programs sample from."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import GenerationConfig


def generation_settings(end_ids: Iterable[int], pad_id: int | None) -> GenerationConfig:
    """Ends answers at ``end_ids``, and samples from the whole distribution at temperature 1, as training did, unless a
    client says otherwise."""
    return GenerationConfig(
        eos_token_id=sorted(end_ids),
        pad_token_id=pad_id,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
    )
