"""Public data files beside the checkout, where they are there; they are not part of the project."""

from __future__ import annotations

from pathlib import Path

import pytest

PUBLIC = Path(__file__).parents[2] / "shared/data"
needs_public_data = pytest.mark.skipif(not PUBLIC.is_dir(), reason="no public data in ../shared/data")
