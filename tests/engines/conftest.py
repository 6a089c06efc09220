"""Skips what needs an environment that is not here, and says how to build it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from alignment.commands.export.driver import LLAMA_PYTHON
from alignment.core.errors import ConfigError
from alignment.engines.engine_environment import engines_folder, interpreter


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The interpreter of the environment with vLLM."""
    try:
        return interpreter(None, package="vllm", where="ALIGNMENT_ENGINE_PYTHON")
    except ConfigError as error:
        pytest.skip(f"no environment with vLLM here ({error.message}); build it with `make engine`")


@pytest.fixture(scope="session")
def llama_python() -> Path:
    """The interpreter of the environment with llama.cpp."""
    named = os.environ.get(LLAMA_PYTHON)
    python = Path(named) if named else engines_folder() / "llama-cpp" / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"no environment with llama.cpp here ({LLAMA_PYTHON}); build it with `make engine-llama`")
    return python
