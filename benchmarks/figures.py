"""From single measurements to medians, ratios, and the share of the hardware's peak. Pure maths, no torch.

Useful work (shared by all contestants of a work): N linear weights, E head weights; a LoRA step takes 4N a token and
4E a scored token, full training 6N and 6E, a forward pass alone 2N and 2E. Nothing that is computed twice counts twice:
no recomputation, no padding, no beginning that rows have in common.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.setting import PPO_EPOCHS, SAME_LOSS

FORWARD = 2
TRAINED = {"lora": 4, "full": 6}
PHASES = {"rollouts": "rollout", "scoring": "score", "learning": "train"}
"""Of a PPO update: what our stage calls their seconds (``time/…``), and what they are called here."""
UPDATES = ("ppo", "grpo")
"""Kinds of work whose steps are updates: answers are sampled, scored and learned from."""

Figures = dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharing:
    """What an update need not do: ``completions`` answers to a prompt, policy and value in ``one_pass``, or no critic.

    Without a ``critic`` there is no reward model either. ``epochs`` is how often an answer is learned from.
    """

    completions: int = 1
    one_pass: bool = False
    critic: bool = True
    epochs: int = PPO_EPOCHS


def useful_flop(
    kind: str, adapter: str, model: Mapping[str, int], counts: Mapping[str, float], sharing: Sharing | None = None
) -> float:
    """FLOP of one step (PPO: update; sampling: all answers of a measurement).

    ``counts`` holds ``trunk_tokens`` and ``scored_tokens``; KTO also ``mismatched_tokens`` and ``reference_tokens``, of
    prompts with mismatched answers, and with these and the answers. PPO and sampling take ``prompt_tokens`` and
    ``answer_tokens``.
    """
    linear, head = model["linear"], model["head"]
    if kind == "sampling":
        return FORWARD * (linear * (counts["prompt_tokens"] + counts["answer_tokens"]) + head * counts["answer_tokens"])
    if kind in UPDATES:
        return sum(phase_flop(adapter, model, counts, sharing or Sharing()).values())
    trained = TRAINED[adapter]
    once = linear * counts["trunk_tokens"] + head * counts["scored_tokens"]
    if kind == "kto":  # the policy looks at mismatched answers, and the reference at these and at the answers
        looked_at = counts["mismatched_tokens"] + counts["reference_tokens"]
        return trained * once + FORWARD * (linear * looked_at + head * 3 * counts["scored_tokens"])
    reference = FORWARD * once if kind == "dpo" else 0
    return trained * once + reference


def phase_flop(
    adapter: str, model: Mapping[str, int], counts: Mapping[str, float], sharing: Sharing
) -> dict[str, float]:
    """FLOP of each phase of an update; ``counts`` has ``prompt_tokens``, one for each answer, and ``answer_tokens``.

    The policy looks at its answers while it samples them; reference, reward and value look once; policy and value
    learn in each epoch. In one pass the value costs nothing, and answers of one prompt share it. Without a critic only
    the reference looks, and only the policy learns.
    """
    trunk = model["linear"] * (counts["prompt_tokens"] / sharing.completions + counts["answer_tokens"])
    head = model["head"] * counts["answer_tokens"]
    passes = 1 if sharing.one_pass or not sharing.critic else 2
    looks = 1 + passes if sharing.critic else 1
    return {
        "rollout": FORWARD * (trunk + head),
        "score": FORWARD * (looks * trunk + head),
        "train": TRAINED[adapter] * sharing.epochs * (passes * trunk + head),
    }


def figures_of(
    kind: str,
    adapter: str,
    model: Mapping[str, int],
    steps: Sequence[Mapping[str, float]],
    result: Mapping[str, Any],
    sharing: Sharing | None = None,
    *,
    peak: float,
    warm_up: int = 1,
) -> Figures:
    """One measurement: ``seconds_per_step`` (or ``…_update``), ``tokens_per_second``, ``mfu``, ``peak_memory`` in
    bytes, and for training the losses of the first and the last step. Of our PPO also each phase's seconds, its floor
    (its FLOP at the peak), and how many copies of the base were held.

    ``peak`` is the hardware's, in FLOP/s. ``steps`` has the counts of each step's rows, from the start again where a
    contestant takes more steps. The first ``warm_up`` steps have no seconds. Sampling has one entry, the prompts.
    """
    figures: Figures = {"peak_memory": float(result["peak_memory"])}
    seconds = sum(result["seconds"])
    measured = [steps[(warm_up + step) % len(steps)] for step in range(len(result["seconds"]))]
    if kind == "sampling":
        lengths = [length for answers in result["lengths"] for length in answers]
        prompt_tokens = steps[0]["prompt_tokens"] * len(result["lengths"])
        counted: list[Mapping[str, float]] = [{"prompt_tokens": prompt_tokens, "answer_tokens": sum(lengths)}]
        figures |= {"tokens_per_second": sum(lengths) / seconds, "mean_length": sum(lengths) / len(lengths)}
    elif kind in UPDATES:
        counted = [{**counts, "answer_tokens": result["answer_tokens"]} for counts in measured]
        figures |= {
            "seconds_per_update": seconds / len(counted),
            "answer_tokens": float(result["answer_tokens"]),
        }
        floors: Figures = {}
        for phases in (phase_flop(adapter, model, counts, sharing or Sharing()) for counts in counted):
            for name, flop in phases.items():
                floors[name] = floors.get(name, 0.0) + flop / (len(counted) * peak)
        figures |= _phases(result["updates"][-len(counted) :], floors)
    else:
        counted = list(measured)
        figures |= {
            "seconds_per_step": seconds / len(counted),
            "tokens_per_second": sum(counts["tokens"] for counts in counted) / seconds,
        }
    useful = sum(useful_flop(kind, adapter, model, counts, sharing) for counts in counted)
    figures["mfu"] = useful / (seconds * peak)
    if result["losses"]:
        figures |= {"first_loss": result["losses"][0], "last_loss": result["losses"][-1]}
    return figures


def highest_peaks(peaks: Sequence[tuple[str, float]]) -> dict[str, float]:
    """The highest of the peaks that were measured in each number format.

    A measurement lasts half a second, and in some of them one of two cores was busy with something else.
    """
    highest: dict[str, float] = {}
    for dtype, peak in peaks:
        highest[dtype] = max(peak, highest.get(dtype, 0.0))
    return highest


def _phases(updates: Sequence[Mapping[str, float]], floors: Mapping[str, float]) -> Figures:
    """``updates`` are what was logged; a rival's does not tell its phases apart."""
    figures: Figures = {}
    for logged, name in PHASES.items():
        seconds = [update[f"time/{logged}"] for update in updates if f"time/{logged}" in update]
        if seconds:
            figures |= {f"{name}_seconds": median(seconds), f"{name}_floor": floors[name]}
    copies = [update["memory/base_copies"] for update in updates if "memory/base_copies" in update]
    return figures | ({"base_copies": max(copies)} if copies else {})


def medians(measured: Sequence[Figures]) -> Figures:
    """Each figure's median over repetitions."""
    return {name: median(repetition[name] for repetition in measured) for name in measured[0]}


def ratios(ours: Mapping[int, Figures], rival: Mapping[int, Figures], quantity: str) -> dict[str, float | list[float]]:
    """Ours divided by the rival's, of ``quantity`` and of peak memory.

    A ratio is that of medians over the repetitions (the keys) that both have. ``…_range`` divides repetition by
    repetition, where both had the same rows, and gives the extremes.

    Raises:
        ValueError: no repetition in common.
    """
    common = sorted(set(ours) & set(rival))
    if not common:
        raise ValueError("no repetition was measured for both")
    divided: dict[str, float | list[float]] = {}
    for name in (quantity, "peak_memory"):
        divided[name] = median(ours[i][name] for i in common) / median(rival[i][name] for i in common)
        each = [ours[i][name] / rival[i][name] for i in common]
        divided[f"{name}_range"] = [min(each), max(each)]
    return divided


def loss_differences(ours: Mapping[int, Figures], rival: Mapping[int, Figures]) -> dict[str, float | bool]:
    """How far the losses of the first and of the last step are apart at most, relative to ours.

    ``same_losses`` says whether both are within ``SAME_LOSS``.
    """
    common = sorted(set(ours) & set(rival))
    apart = {
        f"{name}_difference": max(abs(rival[i][name] - ours[i][name]) / abs(ours[i][name]) for i in common)
        for name in ("first_loss", "last_loss")
    }
    return {**apart, "same_losses": max(apart.values()) <= SAME_LOSS}


def at_its_best(
    ours: Mapping[int, Figures], rivals: Mapping[str, Mapping[int, Figures]], quantity: str
) -> dict[str, dict[str, Any]]:
    """Ours beside one library: by ``quantity`` beside its fastest contestant, by memory beside its leanest.

    ``rivals`` are the library's contestants. Which of them is the fastest and which the leanest is decided by medians
    of what was measured here, and not by the search.
    """
    sign = -1 if quantity == "tokens_per_second" else 1
    middle = {name: medians(list(measured.values())) for name, measured in rivals.items()}
    fastest = min(middle, key=lambda name: sign * middle[name][quantity])
    leanest = min(middle, key=lambda name: middle[name]["peak_memory"])
    picked = {}
    for goal, name, figure in (("fastest", fastest, quantity), ("leanest", leanest, "peak_memory")):
        divided = ratios(ours, rivals[name], quantity)
        picked[goal] = {"contestant": name, figure: divided[figure], f"{figure}_range": divided[f"{figure}_range"]}
    return picked
