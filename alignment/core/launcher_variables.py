"""Variables by which a launcher tells a process which of several it is and where the others are."""

from __future__ import annotations

from collections.abc import Mapping

RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def without_ranks(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables for a process that is none of the caller's group.

    A launcher, or a cluster in each of its containers, sets ``RANKS`` for the caller. A process that inherited them
    would wait for others that nobody starts.
    """
    return {name: value for name, value in variables.items() if name not in RANKS}
