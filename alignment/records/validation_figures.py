"""The names of the figures of validation, and what they say in words about the model that a stage hands on.

Example: with ``{"validation/loss": 1.2, "validation/step": 20.0, "validation/last_step": 40.0, …}`` a stage trained for
40 steps and hands on its weights after step 20, with a held-out loss of 1.2.
"""

from __future__ import annotations

from collections.abc import Mapping

PREFIX = "validation/"
LOSS, ACCURACY = f"{PREFIX}loss", f"{PREFIX}accuracy"
"""The training objective on the held-out rows, and how often it is right there; in a manifest, of what is handed on."""
STEP = f"{PREFIX}step"
"""The optimiser step whose weights are handed on."""
LAST_STEP, LAST_LOSS = f"{PREFIX}last_step", f"{PREFIX}last_loss"
"""The last step, and the held-out loss there."""
PLANNED_STEPS = f"{PREFIX}planned_steps"
ROWS = f"{PREFIX}rows"
HELD_OUT = (LOSS, ACCURACY)
COUNTS = (STEP, LAST_STEP, LAST_LOSS, PLANNED_STEPS, ROWS)


def outcome(metrics: Mapping[str, float], *, patience: int | None) -> list[str]:
    """Sentences, without a full stop, on an earlier step that is handed on and on an early end; none without these."""
    if not all(name in metrics for name in (LOSS, STEP, LAST_STEP, LAST_LOSS, PLANNED_STEPS)):
        return []
    step, last, planned = (int(metrics[name]) for name in (STEP, LAST_STEP, PLANNED_STEPS))
    sentences = []
    if step < last:
        sentences.append(
            f"keeps step {step}, which had the lowest held-out loss: {metrics[LOSS]:.4g} ({metrics[LAST_LOSS]:.4g} "
            f"at step {last}); that loss is optimistic, because the step was chosen by it"
        )
    if last < planned:
        looks = "" if patience is None else f": no improvement in {patience} validation{'' if patience == 1 else 's'}"
        sentences.append(f"stopped at step {last} of {planned}{looks}")
    return sentences
