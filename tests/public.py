"""Data in the shapes of public files: rows of our own, and the files themselves where they lie beside the checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

WRITTEN = Path(__file__).parent / "data/written"
PUBLIC = Path(__file__).parents[2] / "shared/data"
needs_public_data = pytest.mark.skipif(not PUBLIC.is_dir(), reason="no public data in ../shared/data")
