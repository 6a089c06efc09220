"""Fields of a stage that mean more than their value."""

from __future__ import annotations

from dataclasses import field


def reference_to(default: str, *artifact_kinds: str, external: bool = False) -> str:
    """A field that names another stage (``stage:NAME``), the base model (``base``) or a folder (``path:FOLDER``).

    It accepts artifacts of these kinds. The fingerprint covers what it points to, not its name. ``external``: a model
    that no stage made is accepted too, from a folder or a hub.
    """
    return field(default=default, metadata={"reference": artifact_kinds, "external": external, "identity": False})


def not_identity(default: int) -> int:
    """A field that does not change the result, and so is not part of the fingerprint."""
    return field(default=default, metadata={"identity": False})
