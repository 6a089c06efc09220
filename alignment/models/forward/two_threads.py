"""Two independent pieces of work on a CPU side by side, each on a thread of its own. When two threads share every
operation, each of some ten thousand operations of a pass ends with one waiting for the other, and on a virtual machine
waking a thread takes as long as a small operation. Here each thread computes operations of its own, and they meet once.
More than two threads were not measured (docs/design/0058-two-threads.md)."""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from torch import Tensor

from alignment.config.launch import DIVIDE_ROWS
from alignment.core.errors import ConfigError
from alignment.costs.recorder import on_shadows

THREADS = 2
LARGEST = 0.6
"""The larger share of the work from which two threads are no faster than before: a pass takes a fifth less time if the
shares are equal (docs/LOG.md, 2026-11-29), so what one of them gets more is lost beyond .6."""
_SWITCH_SECONDS = 0.0005
"""How soon a thread that runs Python lets the other one run it; by default ten times as long."""
_Input = TypeVar("_Input")
_Output = TypeVar("_Output")


def has_two_threads(tensor: Tensor) -> bool:
    """Whether two threads of this CPU, and of this process alone, would share an operation on the tensor. In a part it
    is false, since its thread computes alone. So nothing is divided twice. Raises ConfigError: the variable of
    ``launch.divide_rows`` is neither 0 nor 1."""
    is_alone = not torch.distributed.is_initialized()  # else weights may be gathered for each module, in an order
    is_on_two = tensor.device.type == "cpu" and torch.get_num_threads() == THREADS
    return is_on_two and is_alone and not on_shadows() and _is_wanted()


def _is_wanted() -> bool:
    value = os.environ.get(DIVIDE_ROWS, "1")
    if value not in ("0", "1"):
        raise ConfigError(f"{value!r} is not allowed; allowed: 0, 1", where=DIVIDE_ROWS, remedy="correct or unset it")
    return value == "1"


def in_two_threads(function: Callable[[_Input], _Output], inputs: Sequence[_Input]) -> list[_Output]:
    """The function of both inputs, under this thread's settings of gradients and autocast, and no other modes. An error
    is raised when both have ended, so nobody computes with what the caller then puts back. If both fail, it is that of
    the first."""
    futures = [_part_threads(os.getpid()).submit(_in_same_mode(function), argument) for argument in inputs]
    try:
        try:
            wait(futures)
        except BaseException:  # a signal's
            wait(futures)
            raise
        return list(map(Future.result, futures))
    finally:
        del futures  # a future that failed, its error and this frame would hold each other


def balanced(costs: Sequence[int]) -> tuple[list[int], list[int]]:
    """The indices of pieces of work for each thread: largest first, to the one with less work (Graham 1969)."""
    shares: tuple[list[int], list[int]] = ([], [])
    work = [0, 0]
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        less = int(work[1] < work[0])
        shares[less].append(index)
        work[less] += costs[index]
    return sorted(shares[0]), sorted(shares[1])


def can_share(costs: Sequence[int]) -> bool:
    """Whether none of two threads would have most of the work, so that they gain by sharing it."""
    largest = max(sum(costs[index] for index in share) for share in balanced(costs))
    return len(costs) >= THREADS and largest <= LARGEST * sum(costs)


def each_of(inputs: Sequence[_Input], function: Callable[[_Input], _Output], costs: Sequence[int]) -> list[_Output]:
    """The function of each input, in order, on two threads; ``can_share`` says whether that is faster."""
    shares = balanced(costs)
    outputs = in_two_threads(lambda share: [function(inputs[index]) for index in share], shares)
    of_index = {
        index: output
        for share, some in zip(shares, outputs, strict=True)
        for index, output in zip(share, some, strict=True)
    }
    return [of_index[index] for index in range(len(inputs))]


def _in_same_mode(function: Callable[[_Input], _Output]) -> Callable[[_Input], _Output]:
    """The function under this thread's settings of gradients and autocast, which other threads do not have."""
    has_grad = torch.is_grad_enabled()
    is_cast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    @functools.wraps(function)
    def in_same_mode(argument: _Input) -> _Output:
        with torch.set_grad_enabled(has_grad), torch.autocast("cpu", dtype, enabled=is_cast):
            return function(argument)

    return in_same_mode


@functools.lru_cache(maxsize=1)
def _part_threads(process: int) -> ThreadPoolExecutor:
    """Two threads that compute alone; ``process`` is this process's number, since a fork has none of the threads."""
    threads = torch.get_num_threads()
    ready = threading.Barrier(THREADS + 1)

    def begin() -> None:
        torch.get_num_threads()  # else PyTorch would take the number that was set last at the first operation
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="part", initializer=begin)
    try:
        for _ in range(THREADS):
            pool.submit(int)
        ready.wait()
    except BaseException:
        ready.abort()  # else a thread would wait forever, and the process for it
        raise
    torch.set_num_threads(threads)  # threads that start later take the number that was set last
    sys.setswitchinterval(_SWITCH_SECONDS)
    return pool
