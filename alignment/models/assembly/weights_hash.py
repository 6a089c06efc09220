"""What a model's weights are, as a hash: the name under which something computed from them can be kept."""

from __future__ import annotations

import hashlib
import json

from alignment.models.assembly.load import Lineage


def weights_sha256(found: Lineage) -> str:
    """Of a policy's base and adapters by their files' content, and of how each adapter stood."""
    stood = [(saved.merged, saved.nf4) for saved in found.adapters]
    sha = hashlib.sha256(json.dumps(stood).encode())
    for folder in (found.base, *(saved.path for saved in found.adapters)):
        for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]):
            sha.update(file.name.encode())
            with file.open("rb") as handle:
                sha.update(hashlib.file_digest(handle, "sha256").digest())
    return sha.hexdigest()
