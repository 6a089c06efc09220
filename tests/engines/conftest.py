"""Skips what needs an environment that is not here, and says how to build it; and the shipped model's own answers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignment.commands.export.verb import LLAMA_PYTHON
from alignment.core.errors import ConfigError
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.engines.engine_environment import engines_folder, interpreter
from alignment.pipeline.sources import bundled_model
from tests.engines.greedy import held_out_prompts, our_answers


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


@pytest.fixture(scope="session")
def smollm() -> tuple[Any, Any]:
    """The shipped model in float32, and its tokenizer."""
    entry = bundled_model.lookup("smollm2-135m")
    if not bundled_model.is_ready(entry):
        pytest.skip("the shipped model is not on this machine; `make model` fetches it")
    folder = bundled_model.folder(entry)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), load_tokenizer(folder)


@pytest.fixture(scope="session")
def prompts(smollm: tuple[Any, Any]) -> list[list[int]]:
    """Held-out prompts, as token ids."""
    return held_out_prompts(smollm[1])


@pytest.fixture(scope="session")
def ours(smollm: tuple[Any, Any], prompts: list[list[int]]) -> list[list[int]]:
    """Our greedy answers to them."""
    return our_answers(*smollm, prompts)
