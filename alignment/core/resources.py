"""Folders that ship beside the code: conf, launch, recipes and data.

In a checkout they are at its root, where a reader looks for them; the built package contains copies.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
CODE_ROOT = _PACKAGE.parent
"""The folder that ``alignment`` is imported from: the checkout, or where packages are installed."""


def shipped(name: str) -> Path:
    """The folder ``conf``, ``launch``, ``recipes`` or ``data``."""
    packaged = _PACKAGE / "_shipped" / name
    return packaged if packaged.is_dir() else _PACKAGE.parent / name
