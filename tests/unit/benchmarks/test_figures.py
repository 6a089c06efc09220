"""The maths behind a published number, with invented measurements; nothing is timed here."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.counts import counts_of
from benchmarks.figures import (
    Sharing,
    at_its_best,
    figures_of,
    loss_differences,
    medians,
    phase_flop,
    ratios,
    useful_flop,
)
from benchmarks.summary import summarise, table
from benchmarks.works import WORKS

MODEL = {"linear": 100, "head": 10}
GRPO = WORKS["grpo_lora"].contestants["ours"].sharing
"""It reads with the reference alone and learns without a critic."""
COUNTS = {"tokens": 50, "trunk_tokens": 40, "scored_tokens": 20}


@pytest.mark.parametrize(
    ("kind", "adapter", "counts", "flop"),
    [
        ("sft", "lora", COUNTS, 4 * (100 * 40 + 10 * 20)),
        ("reward", "lora", {**COUNTS, "scored_tokens": 0}, 4 * 100 * 40),
        ("dpo", "lora", COUNTS, (4 + 2) * (100 * 40 + 10 * 20)),
        (
            "kto",
            "lora",
            {**COUNTS, "mismatched_tokens": 41, "reference_tokens": 55},
            4 * (100 * 40 + 10 * 20) + 2 * 100 * (41 + 55) + 2 * 10 * 60,
        ),
        ("sampling", "none", {"prompt_tokens": 30, "answer_tokens": 5}, 2 * 100 * 35 + 2 * 10 * 5),
        ("ppo", "lora", {"prompt_tokens": 30, "answer_tokens": 5}, 40 * 100 * 35 + 20 * 10 * 5),
    ],
)
def test_useful_work_is_that_of_the_table_in_the_readme(
    kind: str, adapter: str, counts: dict[str, float], flop: float
) -> None:
    assert useful_flop(kind, adapter, MODEL, counts) == flop


def test_beginnings_that_sequences_have_in_common_have_to_be_computed_once() -> None:
    rows_of_sft = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in ([1, 2, 3], [1, 2, 4, 5], [9], [1, 2, 3])]
    assert counts_of("sft", rows_of_sft) == {"tokens": 11, "trunk_tokens": 3 + 2 + 1, "scored_tokens": 2 + 3 + 0 + 2}
    pairs = [{"prompt": [1, 2], "chosen": [3, 4], "rejected": [3]}, {"prompt": [1, 7], "chosen": [3], "rejected": [5]}]
    assert counts_of("dpo", pairs) == {"tokens": 13, "trunk_tokens": 4 + 3, "scored_tokens": 5}
    assert counts_of("reward", pairs)["scored_tokens"] == 0
    labelled = [
        {"prompt": [1, 2], "completion": [3, 4], "KL_completion": [3], "label": True},
        {"prompt": [1, 7], "completion": [3], "KL_completion": [3, 4], "label": False},
    ]
    assert counts_of("kto", labelled) == {
        "tokens": 7,
        "trunk_tokens": 6,
        "scored_tokens": 3,
        "mismatched_tokens": 6,
        "reference_tokens": 7,
    }
    assert counts_of("sampling", [[1, 2, 3], [1, 2]]) == {"prompt_tokens": 3}


@pytest.mark.parametrize(
    ("adapter", "sharing", "flop"),
    [
        ("lora", Sharing(), (2 * 3500 + 2 * 50, 6 * 3500 + 2 * 50, 32 * 3500 + 16 * 50)),
        ("full", Sharing(), (2 * 3500 + 2 * 50, 6 * 3500 + 2 * 50, 48 * 3500 + 24 * 50)),
        ("lora", Sharing(one_pass=True), (2 * 3500 + 2 * 50, 4 * 3500 + 2 * 50, 16 * 3500 + 16 * 50)),
        ("lora", GRPO, (2 * 3500 + 2 * 50, 2 * 3500 + 2 * 50, 4 * 3500 + 4 * 50)),
        ("lora", Sharing(completions=3), (2 * 1500 + 2 * 50, 6 * 1500 + 2 * 50, 32 * 1500 + 16 * 50)),
    ],
)
def test_a_phase_of_ppo_needs_what_it_cannot_share(
    adapter: str, sharing: Sharing, flop: tuple[float, float, float]
) -> None:
    counts = {"prompt_tokens": 30, "answer_tokens": 5}
    assert phase_flop(adapter, MODEL, counts, sharing) == dict(zip(("rollout", "score", "train"), flop, strict=True))


def test_each_measured_step_counts_its_own_rows_and_the_warm_up_none() -> None:
    """MFU divides useful work by what the peak would have done in that time."""
    steps = [{"tokens": tokens, "trunk_tokens": tokens - 1, "scored_tokens": 3} for tokens in (900, 10, 40)]
    result = {"seconds": [1.0, 4.0], "peak_memory": 7, "losses": [1.5, 1.2, 1.0]}
    figures = figures_of("sft", "lora", MODEL, steps, result, peak=1000.0)
    assert (figures["tokens_per_second"], figures["seconds_per_step"]) == (50 / 5.0, 2.5)
    assert figures["mfu"] == pytest.approx(4 * (100 * (9 + 39) + 10 * 6) / 5000.0)
    assert (figures["first_loss"], figures["last_loss"]) == (1.5, 1.0)
    first = figures_of("sft", "lora", MODEL, steps, {**result, "seconds": [3.0]}, peak=1000.0, warm_up=0)
    assert first["tokens_per_second"] == 300.0
    same = figures_of("sft", "lora", MODEL, [COUNTS], {**result, "seconds": [2.0, 4.0]}, peak=1000.0)
    assert same["mfu"] == pytest.approx(16_800 / (3.0 * 1000.0)), "one count stands for every step"
    assert medians([{"mfu": value} for value in (0.2, 0.3, 0.01, 0.25, 0.22)]) == {"mfu": 0.22}


def test_updates_count_the_prompts_of_those_that_were_measured() -> None:
    steps = [{"prompt_tokens": tokens} for tokens in (1000, 30, 50)]
    logged = [{"time/rollouts": seconds} for seconds in (99.0, 1.0, 3.0)]
    result = {"seconds": [2.0, 6.0], "peak_memory": 7, "losses": [], "answer_tokens": 5.0}
    figures = figures_of("ppo", "lora", MODEL, steps, {**result, "updates": logged}, peak=1e5)
    useful = 40 * 100 * (30 + 5 + 50 + 5) + 20 * 10 * 10
    assert figures["mfu"] == pytest.approx(useful / (8.0 * 1e5))
    assert (figures["seconds_per_update"], figures["rollout_seconds"]) == (4.0, 2.0)
    assert figures["rollout_floor"] == pytest.approx((2 * 100 * (35 + 55) + 2 * 10 * 10) / (2 * 1e5))


def test_sampling_counts_real_tokens_over_all_seeds() -> None:
    result = {"seconds": [1.0, 3.0], "lengths": [[2, 4], [1, 5]], "peak_memory": 7, "losses": []}
    figures = figures_of("sampling", "none", MODEL, [{"prompt_tokens": 6}], result, peak=100.0)
    assert (figures["tokens_per_second"], figures["mean_length"]) == (3.0, 3.0)
    assert figures["mfu"] == pytest.approx((200 * (12 + 12) + 20 * 12) / (4.0 * 100.0))


def test_ratios_are_ours_divided_by_the_rivals_over_repetitions_that_both_have() -> None:
    ours = _figures([100.0, 120.0, 400.0], [2.0, 2.0, 2.0])
    rival = _figures([50.0, 40.0], [8.0, 5.0])
    assert ratios(ours, rival, "tokens_per_second") == {
        "tokens_per_second": pytest.approx(110.0 / 45.0),
        "tokens_per_second_range": [2.0, 3.0],
        "peak_memory": pytest.approx(2.0 / 6.5),
        "peak_memory_range": [0.25, 0.4],
    }
    with pytest.raises(ValueError, match="no repetition"):
        ratios({0: ours[0]}, {1: rival[1]}, "tokens_per_second")


def _figures(speeds: list[float], memory: list[float]) -> dict[int, dict[str, float]]:
    pairs = zip(speeds, memory, strict=True)
    return {i: {"tokens_per_second": speed, "peak_memory": size} for i, (speed, size) in enumerate(pairs)}


def test_a_library_at_its_best_is_its_fastest_row_in_speed_and_its_leanest_in_memory() -> None:
    ours = _figures([100.0, 120.0, 140.0], [2.0, 2.0, 2.0])
    rivals = {
        "trl_default": _figures([30.0, 60.0, 60.0], [9.0, 9.0, 9.0]),
        "trl_fastest": _figures([90.0, 40.0, 40.0], [6.0, 6.0, 6.0]),
        "trl_leanest": _figures([20.0, 20.0, 20.0], [4.0, 5.0, 4.0]),
    }
    assert at_its_best(ours, rivals, "tokens_per_second") == {
        "fastest": {
            "contestant": "trl_default",
            "tokens_per_second": 2.0,
            "tokens_per_second_range": [2.0, pytest.approx(10 / 3)],
        },
        "leanest": {"contestant": "trl_leanest", "peak_memory": 0.5, "peak_memory_range": [0.4, 0.5]},
    }
    seconds = {name: {0: {"seconds_per_update": s, "peak_memory": 1.0}} for name, s in (("slow", 9.0), ("fast", 3.0))}
    best = at_its_best({0: {"seconds_per_update": 1.5, "peak_memory": 1.0}}, seconds, "seconds_per_update")
    assert (best["fastest"]["contestant"], best["fastest"]["seconds_per_update"]) == ("fast", 0.5)


def test_the_share_of_the_peak_is_that_of_the_highest_peak_in_a_number_format() -> None:
    """One peak was measured while another process ran; rivals are compared with ours in their own format."""
    inputs = {"models": {"base": MODEL}, "repetitions": [{"steps": [{"prompt_tokens": 6}]}] * 2}
    measured = {
        "ours": (2, 200.0, 400.0),
        "vllm": (1, 200.0, 300.0),
        "ours_float32": (6, 50.0, 100.0),
        "generate_float32": (2, 50.0, 100.0),
    }
    measurements = [
        {
            "contestant": name,
            "repetition": i,
            "result": {"seconds": [1.0], "lengths": [[size]], "matmul_peak": peak, "peak_memory": 1, "losses": []},
        }
        for name, (size, *both) in measured.items()
        for i, peak in enumerate(both)
    ]
    content = summarise("sampling", WORKS["sampling"], inputs, measurements, {})
    useful = {size: 2 * 100 * (6 + size) + 2 * 10 * size for size in (1, 2, 6)}
    assert content["peaks"] == {"bfloat16": 400.0, "float32": 100.0}
    assert content["ours"]["mfu"] == pytest.approx(useful[2] / 400.0)
    assert content["rivals"]["vllm"]["mfu"] == pytest.approx(useful[1] / 400.0)
    assert content["other_variants_of_ours"]["ours_float32"]["mfu"] == pytest.approx(useful[6] / 100.0)
    assert [content["ratios"][name]["tokens_per_second"] for name in ("vllm", "generate_float32")] == [2.0, 3.0]


@pytest.mark.parametrize(("first", "last", "same"), [(2.01, 1.79, True), (2.4, 1.8, False), (2.0, 1.85, False)])
def test_a_rival_that_learns_something_else_is_seen_in_its_first_or_last_loss(
    first: float, last: float, same: bool
) -> None:
    ours = {0: {"first_loss": 2.0, "last_loss": 1.8}}
    difference = loss_differences(ours, {0: {"first_loss": first, "last_loss": last}})
    assert difference["same_losses"] is same
    assert difference["first_loss_difference"] == pytest.approx((first - 2.0) / 2.0)
    assert difference["last_loss_difference"] == pytest.approx(abs(last - 1.8) / 1.8)


def _result(speed: float, loss: float) -> dict[str, Any]:
    return {
        "seconds": [50 / speed] * 2,
        "matmul_peak": 1e5,
        "peak_memory": 2_000_000_000,
        "losses": [loss, loss - 0.1],
        "versions": {},
    }


def test_the_json_has_ours_rivals_ratios_and_every_measurement() -> None:
    inputs = {"models": {"base": MODEL}, "repetitions": [{"steps": [COUNTS]}, {"steps": [COUNTS]}]}
    measurements = [
        {"contestant": name, "repetition": i, "result": _result(speed, 2.0)}
        for i in range(2)
        for name, speed in (("ours", 400.0), ("stock_fastest", 100.0))
    ]
    measurements.append({"contestant": "trl_default", "repetition": 0, "error": "exit code 1: it broke"})
    content = summarise("sft_lora", WORKS["sft_lora"], inputs, measurements, {"trl_fastest": "no environment"})
    assert content["ours"]["tokens_per_second"] == pytest.approx(400.0)
    assert content["ratios"] == {
        "stock_fastest": {
            "tokens_per_second": pytest.approx(4.0),
            "tokens_per_second_range": [pytest.approx(4.0)] * 2,
            "peak_memory": 1.0,
            "peak_memory_range": [1.0, 1.0],
        }
    }
    assert content["at_their_best"]["stock"]["leanest"]["contestant"] == "stock_fastest"
    assert content["counts_of_steps"] == [[COUNTS], [COUNTS]]
    assert content["rivals"]["trl_default"] == {"failed": "exit code 1: it broke"}
    assert content["failures"]["trl_fastest"] == "no environment"
    assert content["learning"]["stock_fastest"]["same_losses"] is True
    assert content["measurements"] == measurements
    text = table(content)
    assert "| stock_fastest | 100 | 2.00 GB |" in text
    assert "4.00 (4.00–4.00) | 1.00 (1.00–1.00) |" in text
    assert "- **stock at its best**: ours ÷ its fastest (stock_fastest) 4.00 (4.00–4.00) in tok/s, " in text
    assert "- trl_default failed: exit code 1: it broke" in text


def test_ppo_is_compared_by_seconds_an_update_and_each_variant_with_every_rival() -> None:
    inputs = {"models": {"base": MODEL}, "repetitions": [{"steps": [{"prompt_tokens": 30}]}]}
    seconds = {"ours": 3.0, "ours_shared": 2.0, "ours_shared_4": 1.0, "trl_fastest": 12.0, "trl_default": 6.0}
    phases = {"time/rollouts": 0.5, "time/scoring": 0.25, "time/learning": 2.0, "memory/base_copies": 1.0}
    logged = {"ours": [{"time/rollouts": 99.0}, phases, {**phases, "time/learning": 4.0}]}
    measurements = [
        {
            "contestant": name,
            "repetition": 0,
            "result": {**_result(50 / taken, 0.0), "losses": [], "answer_tokens": 5.0, "updates": logged.get(name, [])},
        }
        for name, taken in seconds.items()
    ]
    content = summarise("ppo_lora", WORKS["ppo_lora"], inputs, measurements, {})
    assert content["ratios"]["trl_fastest"]["seconds_per_update"] == pytest.approx(0.25)
    variants = content["ratios_of_variants"]
    assert variants["ours_shared_4"]["trl_fastest"]["seconds_per_update"] == pytest.approx(1 / 12)
    assert content["ours"]["train_seconds"] == 3.0, "the warm-up does not count"
    assert content["ours"]["train_floor"] == pytest.approx((32 * 100 * 35 + 16 * 10 * 5) / 1e5)
    text = table(content)
    assert "s an update" in text
    assert "- ours: rollout 0.5 s (0.1), score 0.2 s (0.2), train 3.0 s (1.1)" in text
    assert "- ours_shared ÷ trl_fastest: 0.17 (0.17–0.17) in s an update, 1.00 (1.00–1.00) in memory" in text
    cells = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    assert [(row[0].strip(), row[-1].strip()) for row in cells[1:]] == [
        ("ours", ""),
        ("trl_fastest", ""),
        ("trl_leanest", ""),
        ("trl_default", "its critic is trained whole"),
        ("ours_shared", "policy and value in one pass"),
        ("ours_shared_4", "both of these"),
    ]
    like_for_like = content["at_their_best"]["trl"]["fastest"]
    assert like_for_like["contestant"] == "trl_fastest", "a rival that trains other parts is not the one to beat"
