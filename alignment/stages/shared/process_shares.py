"""Work that the processes of a stage divide, and work that the main process does for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from alignment.training.context import StageContext
from alignment.training.sharding import own_of_all, shared

T = TypeVar("T")
V = TypeVar("V")


def in_shares(context: StageContext, items: Sequence[T], values_of: Callable[[Sequence[T]], list[V]]) -> list[V]:
    """The values of all items, in order, on every process; every process must call this.

    ``values_of`` gives the values of some consecutive items, as many of each as there are. It is called once on each
    process whose share has items.
    The value of an item must not depend on the other items, so that it does not depend on the number of processes.
    If it fails on one process, all raise its error.
    """
    first, end = (len(items) * number // context.world_size for number in (context.rank, context.rank + 1))
    share = items[first:end]
    return [value for values in shared(lambda: values_of(share) if share else []) for value in values]


def on_main(context: StageContext, make: Callable[[], T]) -> T | None:
    """What the main process makes; None on the others, which wait for it. Every process must call this.

    If it fails, all raise its error.
    """
    return own_of_all(lambda: make() if context.is_main else None)


def from_main(context: StageContext, make: Callable[[], T]) -> T:
    """What the main process makes, on every process; otherwise like ``on_main``."""
    return shared(lambda: [make()] if context.is_main else [])[0][0]
