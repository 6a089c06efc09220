"""The kinds of value model of a policy."""

from __future__ import annotations

from enum import Enum


class Critic(str, Enum):
    """``separate`` is a model of its own that starts from the reward model, ``shared`` a head on the policy's trunk.

    ``none``: there is no value model.
    """

    separate = "separate"
    shared = "shared"
    none = "none"
