"""``metrics.jsonl`` holds every step once, and the figures of an update are sums over what they say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from alignment.records.step_log import MetricsLog
from alignment.training.rl.step_metrics import UpdateMetrics
from tests.oracles.close import close
from tests.waits import Waits


def _steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def _filled(path: Path, steps: int) -> MetricsLog:
    log = MetricsLog(path)
    for step in range(1, steps + 1):
        log.append(step, {"loss": 1.0 / step})
    return log


def test_a_step_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).append(3, {"loss": 2.0123456789, "lr": 1e-4, "note": "x", "count": 7})
    assert path.read_text() == '{"step": 3, "loss": 2.01235, "lr": 0.0001, "note": "x", "count": 7}\n'


def test_numbers_that_are_not_finite_stay_visible(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(1, {"loss": float("nan"), "grad_norm": float("inf")})
    assert math.isnan(log.last()["loss"])
    assert log.last()["grad_norm"] == math.inf


@pytest.mark.parametrize(
    ("through", "remaining"), [(0, []), (3, [1, 2, 3]), (5, [1, 2, 3, 4, 5]), (9, [1, 2, 3, 4, 5])]
)
def test_a_resume_drops_the_lines_after_its_checkpoint(tmp_path: Path, through: int, remaining: list[int]) -> None:
    path = tmp_path / "metrics.jsonl"
    _filled(path, 5).keep_through(through)
    assert _steps(path) == remaining


@pytest.mark.parametrize(
    "half", ['{"step": 6, "lo', '{"loss": 1.0}', "", "\0\0\0\0", "7", "[6]", '{"step": null}', '{"step": "six"}']
)
def test_a_line_that_is_no_step_is_dropped(tmp_path: Path, half: str) -> None:
    path = tmp_path / "metrics.jsonl"
    log = _filled(path, 5)
    with path.open("a") as stream:
        stream.write(half)
    log.keep_through(10)
    log.append(6, {"loss": 0.1})
    assert _steps(path) == [1, 2, 3, 4, 5, 6]


def test_a_line_cut_inside_a_character_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = _filled(path, 2)
    with path.open("ab") as stream:
        stream.write('{"step": 3, "note": "é'.encode()[:-1])
    log.keep_through(10)
    assert _steps(path) == [1, 2]


def test_a_line_ends_where_it_was_ended_and_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"step": 1, "answer": "one\u2028two\x85"}\n', encoding="utf-8")
    log = MetricsLog(path)
    log.keep_through(1)
    assert log.rows() == [{"step": 1, "answer": "one\u2028two\x85"}]


def test_dropping_from_a_file_that_is_not_there_does_nothing(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.keep_through(3)
    assert log.last() == {}
    assert list(tmp_path.iterdir()) == []


def test_the_last_step_is_the_newest(tmp_path: Path) -> None:
    assert _filled(tmp_path / "metrics.jsonl", 4).last() == {"step": 4, "loss": 0.25}


# ---- the figures of a PPO update ------------------------------------------------------------------------------------


def _alone(values: Tensor) -> Tensor:
    return values[None]


def _two_equal_processes(values: Tensor) -> Tensor:
    return torch.stack([values, values])


def _beside_a_higher_one(values: Tensor) -> Tensor:
    return torch.stack([values, values + 10.0])


@pytest.mark.parametrize("processes", [_alone, _two_equal_processes])
def test_means_are_over_counted_tokens_of_all_processes(processes: object) -> None:
    figures = UpdateMetrics(processes)
    values, mask = torch.tensor([[1.0, 5.0, 99.0], [3.0, 99.0, 99.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    figures.add_means({"x": values, "y": -values}, mask)
    close(figures.values["x"], 3.0)
    close(figures.values["y"], -3.0)


def test_shares_of_micro_batches_add_up_and_are_averaged_over_steps() -> None:
    figures = UpdateMetrics(_alone)
    for micro_batches in ([0.25, 0.5], [0.125, 0.125]):
        for share in micro_batches:
            figures.add_share({"loss": torch.tensor(share)})
        figures.step_done()
    close(figures.result()["loss"], 0.5)


def test_shares_and_maxima_of_all_minibatches_are_read_together() -> None:
    figures = UpdateMetrics(_alone)
    shares = {str(number): torch.tensor(float(number)) for number in range(5)} | {"policy/approxkl": torch.zeros(())}
    with Waits() as waits:
        for worst in (3.0, 7.0, 5.0):
            figures.add_share(shares)
            figures.add_maximum("worst", torch.tensor(worst))
            figures.step_done()
    assert waits.number == 0
    assert [figures.result()[str(number)] for number in range(5)] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert figures.result()["worst"] == 7.0


def test_the_approximate_kl_is_that_of_the_last_minibatch_whenever_it_is_read() -> None:
    figures = UpdateMetrics(_alone)
    for shares, read in (([0.5, 0.25], True), ([0.125], False), ([2.0, 1.0], True)):
        for share in shares:
            figures.add_share({"policy/approxkl": torch.tensor(share)})
        figures.step_done()
        if read:
            assert figures.approximate_kl() == figures.approximate_kl() == sum(shares)


def test_shares_add_up_over_processes() -> None:
    figures = UpdateMetrics(_two_equal_processes)
    figures.add_share({"loss": torch.tensor(0.25)})
    figures.step_done()
    close(figures.result()["loss"], 0.5)


def test_the_approximate_kl_of_the_first_step_is_kept_apart() -> None:
    figures = UpdateMetrics(_two_equal_processes)
    for kl in (0.125, 0.5, 0.125):
        figures.add_share({"policy/approxkl": torch.tensor(kl)})
        figures.step_done()
    averages = figures.result()
    assert averages["policy/approxkl_first"] == 0.25, "of all processes"
    close(averages["policy/approxkl"], 0.5)


def test_maxima_and_seconds_gather_over_an_update_and_end_with_it() -> None:
    figures = UpdateMetrics(_beside_a_higher_one)
    for value in (-3.0, -1.0, -2.0):
        figures.add_maximum("worst", torch.tensor(value))
        figures.add_seconds("learning", 0.5)
    figures.add_share({"loss": torch.tensor(1.0)})
    figures.step_done()
    assert figures.result()["worst"] == 9.0
    assert figures.result()["time/learning"] == 1.5
    figures.clear()
    figures.add_share({"loss": torch.tensor(1.0)})
    figures.step_done()
    assert not {"worst", "time/learning"} & set(figures.result())
