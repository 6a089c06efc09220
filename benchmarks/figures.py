"""From single measurements to medians, ratios, and the share of the hardware's peak. Pure maths, no torch.

Useful work (shared by all contestants of a work): N linear weights, E head weights; a LoRA step takes 4N a token and
4E a scored token, full training 6N and 6E, a forward pass alone 2N and 2E. Nothing that is computed twice counts twice:
no recomputation, no padding, a pair's prompt once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.setting import PPO_EPOCHS

FORWARD = 2
TRAINED = {"lora": 4, "full": 6}
PPO_ROLES = 4
PPO_TRAINED = 2
SAME_LOSS = 0.02
"""Largest relative difference of first losses that bfloat16 products explain."""

Figures = dict[str, float]


def useful_flop(kind: str, adapter: str, model: Mapping[str, int], counts: Mapping[str, float]) -> float:
    """FLOP of one step (PPO: update; sampling: all answers of a measurement).

    ``counts`` holds ``trunk_tokens`` and ``scored_tokens``; PPO and sampling take ``prompt_tokens`` and
    ``answer_tokens``.
    """
    linear, head = model["linear"], model["head"]
    if kind == "sampling":
        return FORWARD * (linear * (counts["prompt_tokens"] + counts["answer_tokens"]) + head * counts["answer_tokens"])
    trained = TRAINED[adapter]
    if kind == "ppo":
        # Policy, reference, value and reward look once at the answers; policy and value learn from them in each epoch.
        trunk = FORWARD * PPO_ROLES + trained * PPO_TRAINED * PPO_EPOCHS
        scores = FORWARD * 2 + trained * PPO_EPOCHS
        return (
            linear * trunk * (counts["prompt_tokens"] + counts["answer_tokens"])
            + head * scores * (counts["answer_tokens"])
        )
    once = linear * counts["trunk_tokens"] + head * counts["scored_tokens"]
    reference = FORWARD * once if kind == "dpo" else 0
    return trained * once + reference


def figures_of(
    kind: str, adapter: str, model: Mapping[str, int], counts: Mapping[str, float], result: Mapping[str, Any]
) -> Figures:
    """One measurement: ``seconds_per_step`` (or ``…_update``), ``tokens_per_second``, ``mfu``, ``peak_memory`` in
    bytes, and for training the losses of the first two steps, which everyone takes."""
    found: Figures = {"peak_memory": float(result["peak_memory"])}
    seconds = median(result["seconds"])
    known = dict(counts)
    if kind == "sampling":
        lengths = [length for answers in result["lengths"] for length in answers]
        seconds = sum(result["seconds"])
        known = {"prompt_tokens": counts["prompt_tokens"] * len(result["lengths"]), "answer_tokens": sum(lengths)}
        found |= {"tokens_per_second": sum(lengths) / seconds, "mean_length": sum(lengths) / len(lengths)}
    elif kind == "ppo":
        known["answer_tokens"] = result["answer_tokens"]
        found |= {"seconds_per_update": seconds, "answer_tokens": float(result["answer_tokens"])}
    else:
        found |= {"seconds_per_step": seconds, "tokens_per_second": counts["tokens"] / seconds}
    found["mfu"] = useful_flop(kind, adapter, model, known) / (seconds * result["matmul_peak"])
    if result["losses"]:
        found |= {"first_loss": result["losses"][0], "second_loss": result["losses"][1]}
    return found


def medians(measured: Sequence[Figures]) -> Figures:
    """Each figure's median over repetitions."""
    return {name: median(one[name] for one in measured) for name in measured[0]}


def ratios(ours: Mapping[int, Figures], rival: Mapping[int, Figures], quantity: str) -> dict[str, float | list[float]]:
    """Ours divided by the rival's: medians over the repetitions (the keys) that both have.

    ``…_range`` divides repetition by repetition, where both had the same rows, and gives the extremes.

    Raises:
        ValueError: no repetition in common.
    """
    common = sorted(set(ours) & set(rival))
    if not common:
        raise ValueError("no repetition was measured for both")
    found: dict[str, float | list[float]] = {
        name: median(ours[i][name] for i in common) / median(rival[i][name] for i in common)
        for name in (quantity, "peak_memory")
    }
    each = [ours[i][quantity] / rival[i][quantity] for i in common]
    found[f"{quantity}_range"] = [min(each), max(each)]
    return found


def loss_differences(ours: Mapping[int, Figures], rival: Mapping[int, Figures]) -> dict[str, float | bool]:
    """How far losses are apart at most, relative to ours, and whether that of the first step is within bfloat16."""
    common = sorted(set(ours) & set(rival))
    found: dict[str, float | bool] = {
        f"{name}_difference": max(abs(rival[i][name] - ours[i][name]) / abs(ours[i][name]) for i in common)
        for name in ("first_loss", "second_loss")
    }
    found["same_first_loss"] = found["first_loss_difference"] <= SAME_LOSS
    return found
