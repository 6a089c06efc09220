"""What a stored policy consists of, for the processes that load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignment.config.model import TemplateChoice
from alignment.core.artifacts import TOKENIZER, verify
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.models.assembly.load import Lineage, saved_adapters


def parts_of(artifact: Path | None, base: Path | None, template: TemplateChoice) -> tuple[Lineage, Any]:
    """The lineage and the tokenizer of a stage's result on its base (None if it contains its own), or of a bare base.

    Raises:
        ArtifactError: the artifact is missing or damaged.
        ModelError: there is no usable tokenizer.
        DataError: the chat template cannot be read.
    """
    if artifact is None:
        assert base is not None, "without an artifact there must be a base"
        return Lineage(source="base", base=base, adapters=()), load_tokenizer(base, template)
    manifest = verify(artifact, content=True)
    lineage = Lineage(
        source=manifest.base["source"],
        base=base or artifact / "model",
        adapters=saved_adapters(artifact, manifest),
    )
    return lineage, load_tokenizer(artifact / TOKENIZER, model=lineage.base)
