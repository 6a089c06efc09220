"""Skips what needs an environment that is not here, and says how to build it."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignment.core.errors import ConfigError
from alignment.engines.engine_environment import interpreter


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The interpreter of the environment with vLLM."""
    try:
        return interpreter(None, package="vllm", where="ALIGNMENT_ENGINE_PYTHON")
    except ConfigError as error:
        pytest.skip(f"no environment with vLLM here ({error.message}); build it with `make engine`")
