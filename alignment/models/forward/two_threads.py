"""Two independent pieces of work on a CPU side by side, each on a thread of its own.

When two threads share every operation, each of some ten thousand operations of a pass ends with one waiting for the
other, and on a virtual machine waking a thread takes as long as a small operation. If another process needs a core,
both threads wait for the one that it slows down. Here each thread computes operations of its own, and they meet once.
More than two threads were not measured (docs/design/0058-two-threads.md).
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from alignment.costs.recorder import on_shadows

THREADS = 2

_SWITCH_SECONDS = 0.0005
"""How soon a thread that runs Python lets the other one run it; by default ten times as long."""

_Input = TypeVar("_Input")
_Output = TypeVar("_Output")


def has_two_threads(tensor: Tensor) -> bool:
    """Whether operations on the tensor would run on exactly two threads of this CPU."""
    return tensor.device.type == "cpu" and not on_shadows() and torch.get_num_threads() == THREADS


def in_two_threads(function: Callable[[_Input], _Output], inputs: Sequence[_Input]) -> list[_Output]:
    """The function of both inputs, under this thread's settings of gradients and autocast.

    If it fails, it has ended for both before the error is raised. Where both fail, that of the first is raised.
    """
    with _switching_soon():
        futures = [_pool(os.getpid()).submit(_in_same_mode(function), argument) for argument in inputs]
        wait(futures)
    return [future.result() for future in futures]


def _in_same_mode(function: Callable[[_Input], _Output]) -> Callable[[_Input], _Output]:
    """The function under this thread's settings of gradients and autocast, which other threads do not have."""
    has_grad = torch.is_grad_enabled()
    is_cast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    @functools.wraps(function)
    def in_same_mode(argument: _Input) -> _Output:
        with torch.set_grad_enabled(has_grad), torch.autocast("cpu", dtype, enabled=is_cast):
            return function(argument)

    return in_same_mode


@contextmanager
def _switching_soon() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@functools.lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """Two threads that compute alone; ``process`` is this process's number, since a fork has none of the threads."""
    threads = torch.get_num_threads()
    ready = threading.Barrier(THREADS + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="part", initializer=begin)
    for _ in range(THREADS):
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(threads)  # threads that start later take the number that was set last
    return pool
