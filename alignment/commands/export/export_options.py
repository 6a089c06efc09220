"""The options of an export, which ``align export`` hands to its worker."""

from __future__ import annotations

from dataclasses import dataclass

GGUF, VLLM = "gguf", "vllm"
FORMS = ("model", "adapter", GGUF, VLLM)
GGUF_TYPES = ("f16", "bf16", "q8_0", "f32")
"""Types of the weights in a GGUF file; the first is the default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """``max_gap`` is a mean KL per token in nats; ``engine_python`` is the interpreter that has vLLM, for that form
    alone. The options below it are those of a GGUF file alone: ``llama_python`` is an interpreter with
    llama-cpp-python, by which the file is read too, and ``has_modelfile`` asks for Ollama's Modelfile."""

    form: str = "model"
    max_gap: float = 0.01
    engine_python: str | None = None
    dtype: str | None = None
    llama_python: str | None = None
    has_modelfile: bool = True
