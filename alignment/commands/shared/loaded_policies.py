"""What a stored policy consists of, for the processes that load it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from alignment.config.model import TemplateChoice
from alignment.core.artifacts import TOKENIZER, verify
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.models.assembly.load import Lineage, saved_adapters


def parts_of(artifact: Path | None, base: Path | None, template: TemplateChoice) -> tuple[Lineage, Any]:
    """The lineage and the tokenizer of a stage's result on its base (None if it contains its own), or of a bare base.
    Raises ArtifactError, ModelError, DataError."""
    if artifact is None:
        assert base is not None, "without an artifact there must be a base"
        return Lineage(source="base", base=base, adapters=()), load_tokenizer(base, template)
    manifest = verify(artifact, content=True)
    lineage = Lineage(
        source=manifest.base["source"], base=base or artifact / "model", adapters=saved_adapters(artifact, manifest)
    )
    return lineage, load_tokenizer(artifact / TOKENIZER, model=lineage.base)


def generation_settings(end_ids: Iterable[int], pad_id: int | None) -> GenerationConfig:
    """Ends answers at ``end_ids``, and samples from the whole distribution at temperature 1, as training did, unless a
    client says otherwise."""
    return GenerationConfig(
        eos_token_id=sorted(end_ids), pad_token_id=pad_id, do_sample=True, temperature=1.0, top_p=1.0, top_k=0
    )
