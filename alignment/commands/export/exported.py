"""What every form of an export needs: the result, its lineage and tokenizer, and fixed rows to compare outputs on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignment.config.model import Dtype
from alignment.core.artifacts import TOKENIZER, Manifest
from alignment.core.errors import ModelError
from alignment.data.tokens.rendering import turn_end_token
from alignment.data.tokens.tokenize import STOPS, end_ids
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.models.assembly.adapters import is_prefix, put_back
from alignment.models.assembly.load import DTYPES, Lineage, load_policy, products_in, saved_adapters
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.flat import trunk_states, use_flat_attention
from alignment.models.forward.head import capped, logit_cap
from alignment.models.forward.rows import stream
from alignment.models.kernels.nf4 import quantize_trunk

CPU = torch.device("cpu")
TEXTS = (
    "The shop is closed on Monday. The keys are with the caretaker in the hall.",
    "Write one sentence about the sea.",
    "def area(width, height):\n    return width * height\n",
    "1, 1, 2, 3, 5, 8, 13,",
    "Die Bahn nach Basel fährt um 9 Uhr 40 von Gleis 7.",
    '{"name": "tea", "price": 3.5}',
    "Q: Which is larger, a lake or a pond?\nA: A lake.",
    "The meeting was moved from Tuesday to Thursday because two people were ill, and nobody told the third.",
)
"""Texts of the rows on which a written model must give the outputs of the one in memory."""

RELOADED = 1e-4
"""Maximum difference of log-probabilities after a reload: equal weights, but computed by other code."""


def gap_between(before: Tensor, after: Tensor) -> tuple[float, float]:
    """The mean KL per token and the largest change of ``[tokens, vocabulary]`` log-probabilities, in nats."""
    kl = (before.exp() * (before - after)).sum(-1)
    return float(kl.mean()), float((before - after).abs().max())


@torch.no_grad()
def logprobs(model: Any, rows: Sequence[list[int]], dtype: Dtype | None = None) -> Tensor:
    """``[tokens, vocabulary]`` of concatenated rows; ``dtype`` is that of products with float32 factors."""
    of_rows = []
    for row in rows:
        if dtype is None:
            logits = model(input_ids=torch.tensor([row])).logits[0]
        else:
            with products_in(dtype, CPU):
                logits = unwrapped(model)(input_ids=torch.tensor([row])).logits[0]
        of_rows.append(logits.float().log_softmax(-1))
    return torch.cat(of_rows)


def logprobs_of_answers(
    model: Any, prompts: Sequence[list[int]], answers: Sequence[Sequence[int]]
) -> list[list[float]]:
    """The log-probability of each token of each answer behind its prompt, in nats, by the model's own forward."""
    of_answers = []
    for prompt, answer in zip(prompts, answers, strict=True):
        of_row = logprobs(model, [[*prompt, *answer]])[len(prompt) - 1 : -1]
        of_answers.append(of_row.gather(1, torch.tensor(answer, dtype=torch.long)[:, None])[:, 0].tolist())
    return of_answers


@torch.no_grad()
def stream_logprobs(model: PreTrainedModel, rows: Sequence[list[int]]) -> Tensor:
    """The same by the flat forward, which supports a prefix."""
    use_flat_attention(model)
    states = [trunk_states(model.base_model, stream([row], CPU)) for row in rows]
    logits = capped(model.get_output_embeddings()(torch.cat(states)), logit_cap(model))
    return logits.float().log_softmax(-1)


def refuse_differences(actual: Tensor, expected: Tensor, folder: Path) -> None:
    """Outputs after a reload must be those from before. Raises ModelError: they differ by more than ``RELOADED``."""
    worst = float((actual - expected).abs().max())
    if worst > RELOADED:
        message = f"the outputs of the written model differ by {worst:.3g} from the expected ones; nothing was exported"
        raise ModelError(message, where=str(folder))


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedResult:
    """An artifact that was verified; ``rows`` are the token ids of ``TEXTS``."""

    artifact: Path
    manifest: Manifest
    lineage: Lineage
    tokenizer: Any
    rows: list[list[int]]

    @property
    def dtype(self) -> Dtype:
        """The dtype in which the result was computed."""
        return Dtype(self.manifest.identity["base"]["dtype"])

    @property
    def turn_end(self) -> str | None:
        """The token that ends a turn; None without a chat template."""
        return turn_end_token(self.tokenizer) if self.tokenizer.chat_template else None

    @property
    def stops(self) -> list[int]:
        """The tokens that end an answer here. Raises DataError: the chat template never ends a turn."""
        return sorted(end_ids(self.tokenizer)) if self.tokenizer.chat_template else self.text_ends

    @property
    def text_ends(self) -> list[int]:
        """The tokens that end a text without turns: EOS, and those that generation_config.json names."""
        return sorted({self.tokenizer.eos_token_id, *getattr(self.tokenizer, STOPS)})


def exported_result(artifact: Path, manifest: Manifest, base: Path | None) -> ExportedResult:
    """Finds the result's base, adapters and tokenizer; ``base`` is None if the artifact contains a model."""
    own = manifest.base["source"] == "self"
    folder = artifact / "model" if own or base is None else base
    tokenizer = load_tokenizer(artifact / TOKENIZER, model=folder)
    return ExportedResult(
        artifact=artifact,
        manifest=manifest,
        lineage=Lineage(source=manifest.base["source"], base=folder, adapters=saved_adapters(artifact, manifest)),
        tokenizer=tokenizer,
        rows=[tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS],
    )


def merged_policy(
    result: ExportedResult, dtype: torch.dtype, *, max_gap: float
) -> tuple[PreTrainedModel, torch.Tensor, list[str]]:
    """The policy with its adapters merged into weights of ``dtype``, its log-probabilities, and a note on merging.
    Raises ModelError: an adapter is a prefix, or merging changed more than ``max_gap``."""
    refuse_prefix(result.lineage)
    merged = load_policy(result.lineage, dtype)
    expected = logprobs(merged, result.rows)
    if not result.lineage.adapters:
        return merged, expected, []
    mean_kl, largest = gap_between(_logprobs_as_trained(result), expected)
    widened = ", and computing in float32 where training computed in bfloat16," if dtype != DTYPES[result.dtype] else ""
    note = f"merging{widened} changed log-probabilities by at most {largest:.3g}, {mean_kl:.2g} nats of KL per token"
    if mean_kl > max_gap:
        message = f"{note}; --max-gap allows {max_gap:g}"
        remedy = "export it as an adapter, or allow more with --max-gap"
        raise ModelError(message, where=str(result.lineage.adapters[-1].path), remedy=remedy)
    return merged, expected, [f"{note} (--max-gap allows {max_gap:g})"]


def _logprobs_as_trained(result: ExportedResult) -> torch.Tensor:
    """Those of the policy with its topmost adapters beside the weights, as in training."""
    lineage = result.lineage
    model = load_policy(lineage.weights, DTYPES[result.dtype])
    if lineage.adapters[-1].nf4:
        quantize_trunk(model, CPU)
    policy = put_back(model, [adapter.path for adapter in lineage.beside], trainable=False)
    return logprobs(policy, result.rows, result.dtype)


def refuse_prefix(lineage: Lineage) -> None:
    """A prefix is keys and values in front of a text, which no weight can hold. Raises ModelError."""
    if any(is_prefix(adapter.path) for adapter in lineage.adapters):
        raise ModelError("a prefix cannot be merged into weights", remedy="export it as an adapter (--as adapter)")
