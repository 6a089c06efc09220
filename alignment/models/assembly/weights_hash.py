"""A hash of a model's weights, as a cache key for results computed from them."""

from __future__ import annotations

import hashlib
import json

from alignment.models.assembly.load import Lineage


def weights_sha256(lineage: Lineage) -> str:
    """SHA-256 of the files of a policy's base and adapters, and of how each adapter is applied."""
    stood = [(saved.merged, saved.nf4) for saved in lineage.adapters]
    sha = hashlib.sha256(json.dumps(stood).encode())
    for folder in (lineage.base, *(saved.path for saved in lineage.adapters)):
        for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]):
            sha.update(file.name.encode())
            with file.open("rb") as handle:
                sha.update(hashlib.file_digest(handle, "sha256").digest())
    return sha.hexdigest()
