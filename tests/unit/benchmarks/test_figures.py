"""The maths behind a published number, with invented measurements; nothing is timed here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import rows
from benchmarks.figures import Sharing, figures_of, loss_differences, medians, phase_flop, ratios, useful_flop
from benchmarks.journal import Journal, OtherConditions
from benchmarks.machine import processor, scrubbed
from benchmarks.page import filled
from benchmarks.prepare import counts_of
from benchmarks.roofline import reached
from benchmarks.summary import summarise, table
from benchmarks.works import POINTS, SERIES, WORKS, works_named

MODEL = {"linear": 100, "head": 10}
COUNTS = {"tokens": 50, "trunk_tokens": 40, "scored_tokens": 20}


@pytest.mark.parametrize(
    ("kind", "adapter", "counts", "flop"),
    [
        ("sft", "lora", COUNTS, 4 * (100 * 40 + 10 * 20)),
        ("sft", "full", COUNTS, 6 * (100 * 40 + 10 * 20)),
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
        ("ppo", "full", {"prompt_tokens": 30, "answer_tokens": 5}, 56 * 100 * 35 + 28 * 10 * 5),
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


def test_the_roofline_refuses_what_another_machine_measured(tmp_path: Path) -> None:
    other = processor() | {"model": "Another"}
    (tmp_path / "dpo_lora.json").write_text(json.dumps({"conditions": {"processor": other}}), encoding="utf-8")
    assert reached("sft_lora", tmp_path) is None
    with pytest.raises(ValueError, match="dpo_lora was measured on Another; measure it here first"):
        reached("dpo_lora", tmp_path)


def test_tables_stand_between_the_markers_of_their_folder() -> None:
    page = "a\n<!-- tables:begin -->\nold\n<!-- tables:end -->\nb\n<!-- amx:begin -->\n<!-- amx:end -->\nc\n"
    found = filled(filled(page, "tables", ["one", "two"]), "amx", ["three"])
    assert found.split("\n") == [
        *("a", "<!-- tables:begin -->", "one", "", "two", "<!-- tables:end -->", "b"),
        *("<!-- amx:begin -->", "three", "<!-- amx:end -->", "c", ""),
    ]
    with pytest.raises(ValueError, match="one line <!-- arm:begin -->"):
        filled(page, "arm", [])


def test_the_table_names_a_rival_that_did_not_learn_the_same() -> None:
    inputs = {"models": {"base": MODEL}, "repetitions": [{"counts": COUNTS}]}
    losses = {"ours": 1.0, "trl_default": 1.019, "trl_tuned": 1.03}
    measurements = [
        {"contestant": name, "repetition": 0, "result": _result(100.0, 2.0) | {"losses": [loss, 1.0]}}
        for name, loss in losses.items()
    ]
    text = table(summarise("sft_lora", inputs, measurements, {}))
    assert "- trl_tuned: its first losses differ from ours by up to 3.0%" in text
    assert "- trl_default: its first" not in text


@pytest.mark.parametrize(
    ("adapter", "sharing", "flop"),
    [
        ("lora", Sharing(), (2 * 3500 + 2 * 50, 6 * 3500 + 2 * 50, 32 * 3500 + 16 * 50)),
        ("full", Sharing(), (2 * 3500 + 2 * 50, 6 * 3500 + 2 * 50, 48 * 3500 + 24 * 50)),
        ("lora", Sharing(one_pass=True), (2 * 3500 + 2 * 50, 4 * 3500 + 2 * 50, 16 * 3500 + 16 * 50)),
        ("lora", Sharing(completions=3), (2 * 1500 + 2 * 50, 6 * 1500 + 2 * 50, 32 * 1500 + 16 * 50)),
    ],
)
def test_a_phase_of_ppo_needs_what_it_cannot_share(
    adapter: str, sharing: Sharing, flop: tuple[float, float, float]
) -> None:
    counts = {"prompt_tokens": 30, "answer_tokens": 5}
    assert phase_flop(adapter, MODEL, counts, sharing) == dict(zip(("rollout", "score", "train"), flop, strict=True))


def test_mfu_divides_useful_work_by_what_the_peak_would_have_done_in_that_time() -> None:
    result = {"seconds": [2.0, 4.0], "matmul_peak": 1000.0, "peak_memory": 7, "losses": [1.5, 1.2, 1.0]}
    found = figures_of("sft", "lora", MODEL, COUNTS, result)
    assert found["mfu"] == pytest.approx(16_800 / (3.0 * 1000.0))
    assert found["tokens_per_second"] == pytest.approx(50 / 3.0)
    assert (found["first_loss"], found["second_loss"]) == (1.5, 1.2)


def test_grpo_reads_with_the_reference_alone_and_learns_without_a_critic() -> None:
    sharing = WORKS["grpo_lora"].contestants["ours"].sharing
    phases = phase_flop("lora", MODEL, {"prompt_tokens": 30, "answer_tokens": 5}, sharing)
    once = 100 * 35 + 10 * 5
    assert phases == {"rollout": 2 * once, "score": 2 * once, "train": 4 * once}


def test_sampling_counts_real_tokens_over_all_seeds() -> None:
    result = {
        "seconds": [1.0, 3.0],
        "lengths": [[2, 4], [1, 5]],
        "matmul_peak": 100.0,
        "peak_memory": 7,
        "losses": [],
    }
    found = figures_of("sampling", "none", MODEL, {"prompt_tokens": 6}, result)
    assert (found["tokens_per_second"], found["mean_length"]) == (3.0, 3.0)
    assert found["mfu"] == pytest.approx((200 * (12 + 12) + 20 * 12) / (4.0 * 100.0))


def test_ratios_are_ours_divided_by_the_rivals_over_repetitions_that_both_have() -> None:
    ours = {i: {"tokens_per_second": speed, "peak_memory": 2.0} for i, speed in enumerate([100.0, 120.0, 400.0])}
    rival = {i: {"tokens_per_second": speed, "peak_memory": 8.0} for i, speed in enumerate([50.0, 40.0])}
    assert ratios(ours, rival, "tokens_per_second") == {
        "tokens_per_second": pytest.approx(110.0 / 45.0),
        "peak_memory": 0.25,
        "tokens_per_second_range": [2.0, 3.0],
    }
    with pytest.raises(ValueError, match="no repetition"):
        ratios({0: ours[0]}, {1: rival[1]}, "tokens_per_second")


def test_a_median_ignores_one_slow_repetition() -> None:
    assert medians([{"mfu": value} for value in (0.2, 0.3, 0.01, 0.25, 0.22)]) == {"mfu": 0.22}


def test_a_rival_that_learns_something_else_is_seen_in_its_first_loss() -> None:
    ours = {0: {"first_loss": 2.0, "second_loss": 1.8}}
    same = loss_differences(ours, {0: {"first_loss": 2.01, "second_loss": 1.8}})
    other = loss_differences(ours, {0: {"first_loss": 2.4, "second_loss": 1.8}})
    assert (same["same_first_loss"], other["same_first_loss"]) == (True, False)
    assert other["first_loss_difference"] == pytest.approx(0.2)


def test_a_repetition_takes_the_same_rows_whoever_asks_and_no_others() -> None:
    every = list(range(100))
    assert [rows.taken(every, i, 8) for i in range(5)] == [list(range(8 * i, 8 * i + 8)) for i in range(5)]
    assert rows.taken(list(range(10)), 1, 8) == [8, 9, 0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="7 rows fit"):
        rows.taken(list(range(7)), 0, 8)


def test_public_data_and_shipped_data_become_the_same_kind_of_rows(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "alpaca_en_demo.json").write_text(
        json.dumps([{"instruction": "Add.", "input": "2 and 2", "output": "4"}])
    )
    (tmp_path / "dpo_en_demo.json").write_text(
        json.dumps(
            [
                {
                    "conversations": [{"from": "human", "value": "Hi"}],
                    "chosen": {"from": "gpt", "value": "Hello."},
                    "rejected": {"from": "gpt", "value": "No."},
                }
            ]
        )
    )
    question = {"role": "user", "content": "Add.\n2 and 2"}
    assert rows.conversations(tmp_path) == [{"messages": [question, {"role": "assistant", "content": "4"}]}]
    assert rows.prompts(tmp_path) == [{"messages": [question]}]
    assert rows.pairs(tmp_path) == [
        {"messages": [{"role": "user", "content": "Hi"}], "chosen": "Hello.", "rejected": "No."}
    ]
    assert len(rows.conversations(None)) > 40
    assert set(rows.pairs(None)[0]) == {"messages", "chosen", "rejected"}
    with pytest.raises(FileNotFoundError, match="dpo_en_demo"):
        rows.pairs(tmp_path / "deep")


def _result(speed: float, loss: float) -> dict[str, Any]:
    return {
        "seconds": [50 / speed] * 2,
        "matmul_peak": 1e5,
        "peak_memory": 2_000_000_000,
        "losses": [loss, loss - 0.1],
        "versions": {},
    }


def test_the_json_has_ours_rivals_ratios_and_every_measurement() -> None:
    inputs = {"models": {"base": MODEL}, "repetitions": [{"counts": COUNTS}, {"counts": COUNTS}]}
    measurements = [
        {"contestant": name, "repetition": i, "result": _result(speed, 2.0)}
        for i in range(2)
        for name, speed in (("ours", 400.0), ("stock_tuned", 100.0))
    ]
    measurements.append({"contestant": "trl_default", "repetition": 0, "error": "exit code 1: it broke"})
    content = summarise("sft_lora", inputs, measurements, {"trl_tuned": "no environment"})
    assert content["ours"]["tokens_per_second"] == pytest.approx(400.0)
    assert content["ratios"] == {
        "stock_tuned": {
            "tokens_per_second": pytest.approx(4.0),
            "peak_memory": 1.0,
            "tokens_per_second_range": [pytest.approx(4.0)] * 2,
        }
    }
    assert content["rivals"]["trl_default"] == {"failed": "exit code 1: it broke"}
    assert content["failures"]["trl_tuned"] == "no environment"
    assert content["learning"]["stock_tuned"]["same_first_loss"] is True
    assert content["measurements"] == measurements
    text = table(content)
    assert "| stock_tuned | 100 | 2.00 GB |" in text
    assert "4.00 (4.00–4.00) | 1.00 |" in text
    assert "- trl_default failed: exit code 1: it broke" in text


def test_ppo_is_compared_by_seconds_an_update_and_each_variant_with_every_rival() -> None:
    inputs = {"models": {"base": MODEL}, "repetitions": [{"counts": {"prompt_tokens": 30}}]}
    seconds = {"ours": 3.0, "ours_shared": 2.0, "ours_shared_4": 1.0, "trl_1_12_peft": 12.0}
    phases = {"time/rollouts": 0.5, "time/scoring": 0.25, "time/learning": 2.0, "memory/base_copies": 1.0}
    logged = {"ours": [{"time/rollouts": 99.0}, phases, {**phases, "time/learning": 4.0}], "trl_1_12_peft": [{}, {}]}
    measurements = [
        {
            "contestant": name,
            "repetition": 0,
            "result": {
                **_result(50 / taken, 0.0),
                "losses": [],
                "answer_tokens": 5.0,
                "updates": logged.get(name, []),
            },
        }
        for name, taken in seconds.items()
    ]
    content = summarise("ppo_lora", inputs, measurements, {})
    assert content["ratios"]["trl_1_12_peft"]["seconds_per_update"] == pytest.approx(0.25)
    variants = content["ratios_of_variants"]
    assert variants["ours_shared_4"]["trl_1_12_peft"]["seconds_per_update"] == pytest.approx(1 / 12)
    assert content["ours"]["train_seconds"] == 3.0, "the warm-up does not count"
    assert content["ours"]["train_floor"] == pytest.approx((32 * 100 * 35 + 16 * 10 * 5) / 1e5)
    text = table(content)
    assert "s an update" in text
    assert "- ours: rollout 0.5 s (0.1), score 0.2 s (0.2), train 3.0 s (1.1)" in text
    assert "- ours_shared ÷ trl_1_12_peft: 0.17 (0.17–0.17) in s an update, 1.00 in memory" in text


def test_float32_sampling_is_compared_with_ours_in_float32() -> None:
    inputs = {"models": {"base": MODEL}, "repetitions": [{"counts": {"prompt_tokens": 6}}]}
    speeds = {"ours": 8.0, "generate": 4.0, "ours_float32": 2.0, "generate_float32": 1.0}
    measurements = [
        {
            "contestant": name,
            "repetition": 0,
            "result": {"seconds": [1.0], "lengths": [[speed]], "matmul_peak": 1e5, "peak_memory": 1, "losses": []},
        }
        for name, speed in speeds.items()
    ]
    content = summarise("sampling", inputs, measurements, {})
    assert [content["ratios"][name]["tokens_per_second"] for name in ("generate", "generate_float32")] == [2.0, 2.0]
    assert content["other_variants_of_ours"]["ours_float32"]["tokens_per_second"] == 2.0


def test_growth_has_a_line_for_each_point_that_was_measured() -> None:
    points = {name: {"counts": COUNTS} for name in POINTS}
    inputs = {"models": {"base": MODEL, "10m": MODEL, "30m": MODEL}, "repetitions": [points]}
    measurements = [
        {"contestant": name, "repetition": 0, "result": _result(100.0, 2.0)} for name in ("length_128", "rows_4")
    ]
    content = summarise("growth", inputs, measurements, {})
    assert set(content["ours"]) == {"length_128", "rows_4"}
    assert content["series"]["rows of 128 tokens"] == ["rows_4", "length_128"]
    assert "| rows_4 | 100 |" in table(content)
    assert {name for names in SERIES.values() for name in names} == set(POINTS)


def test_an_interrupted_run_goes_on_with_what_is_missing_or_failed(tmp_path: Path) -> None:
    path, conditions = tmp_path / "work.jsonl", {"threads": 2}
    journal = Journal(path, conditions, resume=False)
    journal.add("ours", 0, result={"seconds": [1.0]})
    journal.add("rival", 0, error="killed")
    again = Journal(path, conditions, resume=True)
    assert again.is_done("ours", 0)
    assert not again.is_done("rival", 0)
    again.add("rival", 0, result={"seconds": [2.0]})
    assert [entry["contestant"] for entry in Journal(path, conditions, resume=True).entries] == ["ours", "rival"]
    with pytest.raises(OtherConditions, match="another threads"):
        Journal(path, {"threads": 1}, resume=True)
    assert Journal(path, {"threads": 1}, resume=False).entries == []


def test_names_and_aliases_choose_works_in_the_tables_order() -> None:
    assert works_named("ppo,sft") == ["sft_lora", "sft_full", "ppo_lora", "ppo_full"]
    assert works_named("all") == list(WORKS)
    with pytest.raises(ValueError, match="no work 'sfd'"):
        works_named("sfd")


def test_reasons_name_no_folder_and_no_address() -> None:
    text = "exit code 1: File '/some/where/deep/train.py' from https://host.example/simple (25 tok/s)"
    assert scrubbed(text) == "exit code 1: File 'train.py' from (address) (25 tok/s)"


def test_the_processor_is_read_with_its_bf16_instructions(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: Fast CPU\nflags\t\t: fpu avx2 amx_bf16\n")
    found = processor(cpuinfo)
    assert found["model"] == "Fast CPU"
    assert [found["isa"][flag] for flag in ("avx2", "amx_bf16", "avx512_bf16")] == [True, True, False]
