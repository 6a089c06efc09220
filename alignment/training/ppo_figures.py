"""The figures of one PPO update, gathered while it happens and summed over processes at its end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

Sum = Callable[..., tuple[Tensor, ...]]


class UpdateFigures:
    """``sum_over_processes`` takes scalars and returns each summed over all processes."""

    def __init__(self, sum_over_processes: Sum) -> None:
        self._sum = sum_over_processes
        self.clear()

    def clear(self) -> None:
        """A new update begins."""
        self.values: dict[str, float] = {}
        self._shares: dict[str, float] = defaultdict(float)
        self._steps = 0
        self._closed = 0.0

    def add_means(self, named: dict[str, Tensor], mask: Tensor) -> None:
        """Means over counted elements of all processes; ``mask`` has the values' shape."""
        sums = self._sum(mask.sum().float(), *((values * mask).sum() for values in named.values()))
        for name, total in zip(named, sums[1:], strict=True):
            self.values[name] = float(total / sums[0])

    def add_share(self, named: dict[str, Tensor]) -> None:
        """A micro-batch's share of its minibatch's figure: sums already divided by the minibatch's tokens."""
        for name, value in named.items():
            self._shares[name] += float(value)

    def add_maximum(self, name: str, value: Tensor) -> None:
        """The largest value seen in the update, on the process that logs."""
        self.values[name] = max(self.values.get(name, float("-inf")), float(value))

    def add_seconds(self, name: str, seconds: float) -> None:
        """Time spent in a phase of the update."""
        self.values[f"time/{name}"] = self.values.get(f"time/{name}", 0.0) + seconds

    def step_done(self) -> float:
        """Closes a minibatch; returns this process's share of its approximate KL.

        The first one's must be zero: nothing has been learned yet.
        """
        total = self._shares["policy/approxkl"]
        if self._steps == 0:
            self.values["policy/approxkl_first"] = total
        self._steps += 1
        self.values["policy/steps"] = float(self._steps)
        share, self._closed = total - self._closed, total
        return share

    def result(self) -> dict[str, float]:
        """All figures; shares are averaged over the update's optimiser steps. Every process must call this."""
        if not self._shares:  # the update was only sampled
            return dict(self.values)
        totals = self._sum(*(torch.tensor(total) for total in self._shares.values()))
        shares = {name: float(total) / self._steps for name, total in zip(self._shares, totals, strict=True)}
        return {**self.values, **shares}
