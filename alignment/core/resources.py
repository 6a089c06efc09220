"""Folders that ship beside the code: conf, launch, recipes and data.

In a checkout they are at its root, where a reader looks for them; the built package contains copies.
"""

from __future__ import annotations

import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
CODE_ROOT = _PACKAGE.parent
"""The folder that ``alignment`` is imported from: the checkout, or where packages are installed."""
_COPIES = _PACKAGE / "_shipped"


def shipped(name: str) -> Path:
    """The folder ``conf``, ``launch``, ``recipes`` or ``data``."""
    return _COPIES / name if _COPIES.is_dir() else CODE_ROOT / name


def command_for(target: str, module: str, *arguments: str) -> str:
    """What a message advises: the target of make in a checkout, and the module it calls in an installed package."""
    if not _COPIES.is_dir():
        return f"make {target}"
    return " ".join([sys.executable, "-m", module, *arguments])
