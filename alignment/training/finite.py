"""Numbers that end a stage: a loss, a gradient or a weight that is not finite, and a training that diverged.

A loss can stay finite while a model breaks: where its activations overflow, a normalisation makes zeros of them, the
answer is a uniform guess, and no gradient is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignment.core.errors import NonFiniteError, StageError
from alignment.training.sharding import everyones

LEARNED = 1e-3
"""A loss below this may have no gradient left: there is nothing more to learn."""
LAST_ROWS = 5
"""Logged steps at the end whose median loss is judged; of a short training the last third."""
MARGIN = 1.1
"""A loss counts as risen where it is higher by this factor."""
KEPT = "the last checkpoint is kept"
LOWER = "lower the learning rate, or look at the rows of this step"


class FiniteSteps(TrainerCallback):
    """Stops before anything is kept of a step on NaN or infinity; the last good checkpoint stays.

    A trainer of ours says what a step's loss was (``step_loss``). The norm of the gradients is read as the trainer
    takes it, before it scales them: by a norm that overflowed, all of them become zero and look well.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._norm: float | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Listens to the trainer's own function for the norm."""
        own = self._trainer._get_grad_norm

        def noted(model: Any, grad_norm: Any = None) -> Any:
            norm = own(model, grad_norm=grad_norm)
            self._norm = _number(norm)
            return norm

        self._trainer._get_grad_norm = noted

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Gradients are already summed over processes here, so all of them see the same fault; a loss is a process's
        own, and the launcher ends the others."""
        step = state.global_step + 1
        loss = _number(getattr(self._trainer, "step_loss", None))
        engine = getattr(self._trainer, "deepspeed", None)
        # DeepSpeed has taken the step by now, and keeps of its gradients the norm alone.
        norm = self._norm if engine is None else _number(engine.get_global_grad_norm())
        if norm is None or not math.isfinite(norm):
            self._refuse_gradients(model, norm, step)  # first, because all processes meet there
        if loss is not None and not math.isfinite(loss):
            raise NonFiniteError(f"the loss is {loss} at step {step}", remedy=f"{LOWER}; {KEPT}")
        if loss is not None and loss > LEARNED and norm == 0.0:
            raise StageError(
                f"no gradient is left at step {step}, at a loss of {loss:.4g}: the training diverged before",
                remedy="lower the learning rate",
            )

    def _refuse_gradients(self, model: Any, norm: float | None, step: int) -> None:
        # A norm that is NaN has made NaN of every gradient by now, so no name would say anything.
        fault = None if norm is not None and math.isnan(norm) else _first_fault(model)
        if norm is None and fault is None:
            return
        raise NonFiniteError(
            f"a gradient is not finite at step {step}{fault or f' (their norm is {norm})'}", remedy=f"{LOWER}; {KEPT}"
        )


def refuse_figures(figures: Mapping[str, Any], *, step: int) -> None:
    """Ends a stage whose loss or norm of gradients, as logged, is not finite.

    Raises:
        NonFiniteError: one is not.
    """
    for name, value in figures.items():
        watched = name in ("loss", "grad_norm") or name.startswith("loss/")
        if watched and isinstance(value, float) and not math.isfinite(value):
            raise NonFiniteError(f"{name} is {value} at step {step}", remedy=f"{LOWER}; {KEPT}")


def refuse_divergence(losses: Sequence[float], *, ceiling: float) -> None:
    """Ends a stage whose loss rose, and above ``ceiling``, which a model that knows nothing would stay below.

    Raises:
        StageError: it did.
    """
    if not losses:
        return
    judged = sorted(losses[-max(1, min(LAST_ROWS, len(losses) // 3)) :])
    last = judged[(len(judged) - 1) // 2]
    if last > MARGIN * max(ceiling, losses[0]):
        raise StageError(
            f"the training diverged: its loss went from {losses[0]:.4g} to {last:.4g}, above the {ceiling:.4g} of a "
            "model that knows nothing",
            remedy="lower the learning rate; nothing was kept as a result",
        )


def refuse_weights(named: Iterable[tuple[str, Tensor]]) -> None:
    """Ends a stage whose trained weights are not all finite; all processes must call this.

    Raises:
        NonFiniteError: one is not; the last step may have done it, after which no loss is computed.
    """
    fault = _first_not_finite(named)
    name = next((name for name in everyones(fault) if name is not None), None)
    if name is not None:
        raise NonFiniteError(
            f"a weight is not finite ({name})", remedy="lower the learning rate; nothing of this step was kept"
        )


def _first_not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of a tensor with NaN or infinity in this process's share of it."""
    pairs = list(named)
    # Read together: each reading by itself would have the host wait for the device.
    finite = torch.stack([_own(held).isfinite().all() for _, held in pairs]).tolist() if pairs else []
    return next((name for (name, _), good in zip(pairs, finite, strict=True) if not good), None)


def refuse_results(figures: Mapping[str, float]) -> None:
    """Ends a stage with a figure about its result that is not finite.

    Raises:
        NonFiniteError: one is not.
    """
    for name, value in figures.items():
        if not math.isfinite(value):
            raise NonFiniteError(f"{name} is {value} after the last step", remedy="lower the learning rate")


def _number(value: Any) -> float | None:
    """A float of what a trainer or an engine gives, which may be shared out."""
    if value is None:
        return None
    return float(value.full_tensor() if isinstance(value, DTensor) else value)


def _own(held: Tensor) -> Tensor:
    """This process's share, where a tensor is sharded."""
    if hasattr(held, "ds_tensor"):
        share, whole = held.ds_tensor.flatten(), getattr(held, "ds_numel")  # noqa: B009 - DeepSpeed adds both
        # What follows on the last processes only fills up their shares, with whatever the memory held.
        return share[: max(0, whole - torch.distributed.get_rank() * share.numel())]
    return held.to_local() if isinstance(held, DTensor) else held


def _first_fault(model: Any) -> str | None:
    """Where a gradient is not finite, in brackets; of shares, all processes say so if one has it in its own."""
    grads = [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]
    name = _first_not_finite(grads)
    if any(isinstance(grad, DTensor) for _, grad in grads):
        name = next((name for name in everyones(name) if name is not None), None)
    return None if name is None else f" ({name})"
