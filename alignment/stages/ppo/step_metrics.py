"""The metrics of one update, collected during the update and reduced over processes at its end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

_KL = "policy/approxkl"


class UpdateMetrics:
    """``gather`` takes this process's ``[metrics]`` and returns ``[processes, metrics]``."""

    def __init__(self, gather: Callable[[Tensor], Tensor]) -> None:
        self._gather = gather
        self.clear()

    def clear(self) -> None:
        """Starts a new update."""
        self.values: dict[str, float] = {}
        self._shares: dict[str, float] = defaultdict(float)
        self._maxima: dict[str, float] = {}
        self._unread: list[list[tuple[str, Tensor, bool]]] = [[]]  # of each minibatch; the last one has not ended
        self._steps = 0
        self._steps_read = 0
        self._kl = 0.0
        self._first = 0.0

    def add_means(self, named: dict[str, Tensor], mask: Tensor) -> None:
        """Adds means over the elements that ``mask`` counts, on all processes; ``mask`` has the values' shape."""
        own = [mask.sum().float(), *((values * mask).sum() for values in named.values())]
        count, *sums = self._gather(torch.stack(own)).sum(0).tolist()
        for name, total in zip(named, sums, strict=True):
            self.values[name] = total / count

    def add_share(self, named: dict[str, Tensor]) -> None:
        """Adds a micro-batch's share of its minibatch's metrics: sums already divided by the minibatch's tokens. The
        scalars must not carry gradients."""
        self._unread[-1] += [(name, value, False) for name, value in named.items()]

    def add_maximum(self, name: str, value: Tensor) -> None:
        """Updates the largest value of the update; the scalar must not carry gradients."""
        self._unread[-1].append((name, value, True))

    def _read(self) -> None:
        """Reads the scalars of all minibatches that ended together, because each reading makes the host wait for the
        device."""
        *ended, going_on = self._unread
        self._unread = [going_on]
        scalars = [value for minibatch in ended for _, value, _ in minibatch]
        values = iter(torch.stack(scalars).tolist() if scalars else [])
        for minibatch in ended:
            before = self._shares.get(_KL, 0.0)
            for name, _, is_maximum in minibatch:
                value = next(values)
                if is_maximum:
                    self._maxima[name] = max(self._maxima.get(name, float("-inf")), value)
                else:
                    self._shares[name] += value
            self._kl = self._shares[_KL] - before
            if self._steps_read == 0:
                self._first = self._shares[_KL]
            self._steps_read += 1

    def add_seconds(self, name: str, seconds: float) -> None:
        """Adds time spent in a phase of the update."""
        self.values[f"time/{name}"] = self.values.get(f"time/{name}", 0.0) + seconds

    def step_done(self) -> None:
        """Ends a minibatch. Its scalars are read when somebody asks for them."""
        self._unread.append([])
        self._steps += 1
        self.values["policy/steps"] = float(self._steps)

    def approximate_kl(self) -> float:
        """This process's share of that of the last minibatch that ended. The first minibatch's must be zero, because
        nothing has been learned yet."""
        self._read()
        return self._kl

    def result(self) -> dict[str, float]:
        """All metrics; shares are summed over processes and averaged over the optimiser steps. All must call this."""
        self._read()
        if not self._shares:  # the update was only sampled
            return dict(self.values)
        own = torch.tensor([self._first, *self._shares.values()])
        first, *totals = self._gather(own).sum(0).tolist()
        shares = {name: total / self._steps for name, total in zip(self._shares, totals, strict=True)}
        if _KL in shares:
            shares[f"{_KL}_first"] = first
        highest = self._gather(torch.tensor(list(self._maxima.values()))).amax(0).tolist() if self._maxima else []
        return {**self.values, **dict(zip(self._maxima, highest, strict=True)), **shares}
