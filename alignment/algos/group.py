"""Advantages of whole answers from the scores of a group, the answers to one prompt; no critic is needed.

The answers of a group are consecutive rows. In every function ``scores`` is ``[rows]``, and so is the result.
"""

from __future__ import annotations

from torch import Tensor

STD_OFFSET = 1e-4
"""Added to a group's standard deviation, so that equal scores give advantages of 0. The usual value."""


def leave_one_out(scores: Tensor, group: int) -> Tensor:
    """Each score minus the mean score of the other answers to the same prompt.

    A baseline that does not depend on the answer leaves the gradient unbiased (Ahmadian et al. 2024, section 3).
    """
    grouped = scores.view(-1, group)
    others = (grouped.sum(-1, keepdim=True) - grouped) / (group - 1)
    return (grouped - others).view(-1)


def group_centered(scores: Tensor, group: int) -> Tensor:
    """Each score minus the mean score of its group (Dr. GRPO: Liu et al. 2025, section 3.2)."""
    grouped = scores.view(-1, group)
    return (grouped - grouped.mean(-1, keepdim=True)).view(-1)


def group_standardized(scores: Tensor, group: int) -> Tensor:
    """Each score minus its group's mean, divided by the group's standard deviation (Shao et al. 2024, section 4.1.2).

    The deviation is that of a sample, with ``group − 1`` in the denominator.
    """
    grouped = scores.view(-1, group)
    deviation = grouped.std(-1, keepdim=True) + STD_OFFSET
    return (group_centered(scores, group).view(-1, group) / deviation).view(-1)


def tied_groups(scores: Tensor, group: int) -> Tensor:
    """``[groups]`` bool: True where all answers of a group have exactly the same score."""
    grouped = scores.view(-1, group)
    return grouped.amax(-1) == grouped.amin(-1)
