"""A mean with its 95 % interval, in the form that all result files use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean with its 95 % interval: ``Interval(mean=0.71, low=0.66, high=0.75)``.

    The bounds are None if only a mean was recorded; either both are known or neither."""

    mean: float
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.low is None or self.high is None:
            object.__setattr__(self, "low", None)
            object.__setattr__(self, "high", None)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Both bounds, or None if only a mean is known."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def excludes_zero(self) -> bool:
        """Whether a difference of this size is unlikely to be chance; False if the bounds are not known."""
        return self.bounds is not None and (self.bounds[0] > 0.0 or self.bounds[1] < 0.0)

    def through(self, function: Callable[[float], float]) -> Interval:
        """The interval of an increasing function of the figure."""
        bounds = (None, None) if self.bounds is None else tuple(map(function, self.bounds))
        return Interval(mean=function(self.mean), low=bounds[0], high=bounds[1])
