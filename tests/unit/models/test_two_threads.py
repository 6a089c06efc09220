"""Work on two threads: who does what, in which order results come, and what happens if a part fails."""

from __future__ import annotations

import multiprocessing
import threading
import time
import weakref
from collections.abc import Callable

import pytest
import torch

from alignment.config.launch import DIVIDE_ROWS
from alignment.core.errors import ConfigError
from alignment.models.forward.two_threads import balanced, can_share, each_of, has_two_threads, in_two_threads


@pytest.fixture(autouse=True)
def _two_threads(_one_thread: None) -> None:
    torch.set_num_threads(2)


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ((5, 4, 3, 2, 1), ([0, 3, 4], [1, 2])),  # 5 + 2 + 1 and 4 + 3
        ((1, 9), ([1], [0])),
        ((7,), ([0], [])),
        ((2, 2, 2, 2), ([0, 2], [1, 3])),
    ],
)
def test_the_largest_goes_first_to_whom_has_less(costs: tuple[int, ...], expected: tuple[list[int], list[int]]) -> None:
    assert balanced(costs) == expected


def test_results_come_in_order_from_two_threads() -> None:
    threads = {}

    def work(number: int) -> int:
        threads[number] = threading.current_thread().name
        time.sleep(0.01)
        return number * number

    assert each_of([1, 2, 3, 4], work, [10, 20, 30, 10]) == [1, 4, 9, 16]
    assert threads[2] == threads[1] != threads[3]  # 30 and 20, then 10 each
    assert threads[3] == threads[4]


@pytest.mark.parametrize(
    ("costs", "shares"), [([10], False), ([70, 30], False), ([61, 39], False), ([60, 40], True), ([9, 8, 7, 6], True)]
)
def test_work_is_shared_unless_one_thread_would_have_most_of_it(costs: list[int], shares: bool) -> None:
    assert can_share(costs) is shares


def test_a_part_computes_alone_and_is_not_divided_again() -> None:
    states = torch.zeros(1)
    assert has_two_threads(states)
    assert in_two_threads(lambda _: has_two_threads(states), [0, 1]) == [False, False]


@pytest.mark.parametrize(("value", "divides"), [("0", False), ("1", True)])
def test_users_can_have_operations_shared(value: str, divides: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DIVIDE_ROWS, value)
    assert has_two_threads(torch.zeros(1)) is divides


def test_another_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DIVIDE_ROWS, "false")
    with pytest.raises(ConfigError, match="ALIGNMENT_DIVIDE_ROWS: 'false' is not allowed; allowed: 0, 1"):
        has_two_threads(torch.zeros(1))


def test_an_error_waits_for_the_other_part() -> None:
    ended = []

    def work(number: int) -> None:
        if number == 0:
            raise ValueError("the first part fails")
        time.sleep(0.1)
        ended.append(number)

    with pytest.raises(ValueError, match="the first part fails"):
        in_two_threads(work, [0, 1])
    assert ended == [1]


def test_a_signal_waits_for_both_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from alignment.models.forward import two_threads

    wait, calls, ended = two_threads.wait, [], []

    def interrupted(futures: list[object]) -> None:
        calls.append(len(futures))
        if len(calls) == 1:
            raise KeyboardInterrupt
        wait(futures)

    def work(number: int) -> None:
        time.sleep(0.1)
        ended.append(number)

    monkeypatch.setattr(two_threads, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        in_two_threads(work, [0, 1])
    assert sorted(ended) == [0, 1]


def test_what_a_failed_part_held_is_free_at_once() -> None:
    class Held:
        pass

    alive: list[weakref.ref[Held]] = []

    def work(number: int) -> Held:
        held = Held()
        alive.append(weakref.ref(held))
        if number == 1:
            raise ValueError("the second part fails")
        return held

    def fails() -> None:
        with pytest.raises(ValueError, match="second part"):
            in_two_threads(work, [0, 1])

    fails()
    assert [reference() for reference in alive] == [None, None]


def _in_a_fork(queue: multiprocessing.Queue[list[int]], work: Callable[[int], int]) -> None:
    queue.put(in_two_threads(work, [3, 4]))


def _doubled(number: int) -> int:
    return 2 * number


def test_a_forked_process_has_threads_of_its_own() -> None:
    assert in_two_threads(_doubled, [1, 2]) == [2, 4]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_a_fork, args=(queue, _doubled), daemon=True)
    child.start()
    assert queue.get(timeout=30) == [6, 8]
    child.join(30)
    assert child.exitcode == 0
