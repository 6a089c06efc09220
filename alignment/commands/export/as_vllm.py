"""``--as vllm``: whole weights that a vLLM server was seen to load and to answer with."""

from __future__ import annotations

from pathlib import Path

import torch

from alignment.commands.export.as_model import write_policy
from alignment.commands.export.comparing import logprobs_of_answers
from alignment.commands.export.export_options import ExportOptions
from alignment.commands.export.exported import ExportedResult
from alignment.config.launch import Engine, SamplingConfig
from alignment.core.artifacts import REWARD_MODEL
from alignment.core.errors import ModelError
from alignment.engines.completions import OTHER_WEIGHTS, Asked, EngineAnswer, Generation
from alignment.engines.engine_environment import interpreter
from alignment.engines.engine_session import EngineSession, Weights
from alignment.engines.server_process import VllmOptions
from alignment.models.assembly.load import DTYPES, Lineage, load_policy
from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.generate import generate

TOKENS = 16
"""Tokens that are compared of each answer."""
_OF_FREE, _START_SECONDS = 0.9, 1800.0
"""Nothing else of the export is on the GPU, and a large model may be read from a slow disk. Chosen, not tuned."""


def write_for_vllm(result: ExportedResult, folder: Path, options: ExportOptions) -> list[str]:
    """Writes a causal language model as ``--as model`` does, and has a vLLM server answer with it.

    Raises:
        ConfigError: there is no environment with vLLM.
        ModelError: it is a reward model, see ``write_policy``, or vLLM gives other log-probabilities.
        StageError: vLLM does not load it.
    """
    if result.manifest.kind == REWARD_MODEL:
        raise ModelError("vLLM generates answers, and a reward model gives none", remedy="export it as a model")
    interpreter(options.engine_python, package="vllm", where="--engine-python")
    notes = write_policy(result, folder, max_gap=options.max_gap)
    generation = Generation(max_new_tokens=TOKENS, temperature=0.0, end_ids=result.stops)
    of_vllm = _vllm_answers(result, folder, generation, options)
    model = load_policy(Lineage(source="self", base=folder, adapters=()), DTYPES[result.dtype])
    under = logprobs_of_answers(model, result.rows, [answer.ids for answer in of_vllm])
    use_flat_attention(model)
    ours = generate(model, result.rows, max_new_tokens=TOKENS, end_ids=result.stops, batch_size=len(result.rows))
    differences = [
        abs(own - other)
        for own_row, answer in zip(under, of_vllm, strict=True)
        for own, other in zip(own_row, answer.logprobs, strict=True)
    ]
    gap = sum(differences) / len(differences)
    if gap > OTHER_WEIGHTS:
        raise ModelError(
            f"vLLM's log-probabilities differ from ours by {gap:.2f} nats per token; nothing was exported",
            where=str(folder),
            remedy="this version of vLLM computes the model differently; use --as model or --as gguf",
        )
    equal = sum(answer.ids == own for answer, own in zip(of_vllm, ours, strict=True))
    return [
        *notes,
        f"loaded by vLLM, {equal} of {len(ours)} greedy answers to the test texts begin with the same {TOKENS} tokens "
        f"as here, and its log-probabilities differ by {gap:.2g} nats per token on average",
    ]


def _gpu_share() -> float:
    """Most of what is free now; vLLM does not start if others have what it asks for. Without a GPU it has no effect."""
    if not torch.cuda.is_available():
        return SamplingConfig().gpu_share
    free, total = torch.cuda.mem_get_info()
    return _OF_FREE * free / total


def _vllm_answers(
    result: ExportedResult, folder: Path, generation: Generation, options: ExportOptions
) -> list[EngineAnswer]:
    config = SamplingConfig(
        engine=Engine.vllm, python=options.engine_python, gpu_share=_gpu_share(), start_timeout=_START_SECONDS
    )
    with EngineSession(config, where="--as vllm") as session:
        session.start(
            VllmOptions(
                model=folder,
                dtype=result.dtype.value,
                max_length=max(map(len, result.rows)) + generation.max_new_tokens,
                on_gpu=torch.cuda.is_available(),
            )
        )
        asked = [Asked(prompt=row, answers=1, seed=0) for row in result.rows]
        return [answers[0] for answers in session.answers(Weights(), asked, generation)]
