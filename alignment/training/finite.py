"""Ends a stage on a non-finite loss, gradient or weight, and on divergence. A loss can stay finite while a model
breaks: when its activations overflow, a normalisation turns them into zeros, the prediction becomes uniform, and no
gradient is left."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignment.core.errors import NonFiniteError, StageError
from alignment.records.training import LOSS as VALIDATION_LOSS
from alignment.training.sharding import everyones

LEARNED = 1e-3
"""A loss below this may have a gradient of zero, because there is nothing more to learn."""
LAST_STEPS = 5
"""Number of logged steps at the end whose median loss is judged; the last third if the training is short."""
MARGIN = 1.1
"""A loss has risen if it is higher by this factor."""
_CHECKPOINT_STAYS = "the last checkpoint is kept"
_LOWER_RATE = "lower the learning rate, or check the rows of this step"


class FiniteSteps(TrainerCallback):
    """Ends the stage on NaN or infinity before the optimiser's step; the last good checkpoint stays. The trainer
    provides the step's loss (``step_loss``). The norm of the gradients is that from before the trainer scales them: an
    overflowed norm scales all of them to zero, which would look fine. Both are read together, because each reading
    makes the host wait for the device."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._norm: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Wraps the trainer's function for the norm."""
        own = self._trainer._get_grad_norm

        def get_and_note_norm(model: Any, grad_norm: Any = None) -> Any:
            self._norm = own(model, grad_norm=grad_norm)
            return self._norm

        self._trainer._get_grad_norm = get_and_note_norm

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any) -> None:
        """Checks norm and loss. Gradients are summed over processes already, so all processes see the same fault. A
        loss belongs to one process; the launcher ends the others."""
        step = state.global_step + 1
        engine = getattr(self._trainer, "deepspeed", None)
        # DeepSpeed has taken the step by now, and only the norm of its gradients is left.
        norm, loss = _numbers(
            self._norm if engine is None else engine.get_global_grad_norm(), getattr(self._trainer, "step_loss", None)
        )
        if norm is None or not math.isfinite(norm):
            self._refuse_gradients(model, norm, step)  # first, because it is a collective operation
        if loss is not None and not math.isfinite(loss):
            raise NonFiniteError(
                f"the loss is {loss} at optimiser step {step}", remedy=f"{_LOWER_RATE}; {_CHECKPOINT_STAYS}"
            )
        if loss is not None and loss > LEARNED and norm == 0.0:
            raise StageError(
                f"all gradients are zero at optimiser step {step} with a loss of {loss:.4g}: training diverged earlier",
                remedy="lower the learning rate",
            )

    def _refuse_gradients(self, model: Any, norm: float | None, step: int) -> None:
        # By now a NaN norm has turned every gradient into NaN, so a name would be meaningless.
        fault = None if norm is not None and math.isnan(norm) else _first_fault(model)
        if norm is None and fault is None:
            return
        raise NonFiniteError(
            f"a gradient is not finite at optimiser step {step}{fault or f' (their norm is {norm})'}",
            remedy=f"{_LOWER_RATE}; {_CHECKPOINT_STAYS}",
        )


def refuse_metrics(metrics: Mapping[str, Any], *, step: int) -> None:
    """Ends a stage whose logged loss, held-out loss or gradient norm is not finite. Raises NonFiniteError: one of them
    is not."""
    for name, value in metrics.items():
        watched = name in ("loss", "grad_norm", VALIDATION_LOSS) or name.startswith("loss/")
        if watched and isinstance(value, float) and not math.isfinite(value):
            raise NonFiniteError(f"{name} is {value} at step {step}", remedy=f"{_LOWER_RATE}; {_CHECKPOINT_STAYS}")


def refuse_divergence(losses: Sequence[float], *, ceiling: float) -> None:
    """Ends a stage whose last losses are ``MARGIN`` times as high as both ``ceiling`` and its first loss. Raises
    StageError: they are; the error names the bound."""
    if not losses:
        return
    judged = sorted(losses[-max(1, min(LAST_STEPS, len(losses) // 3)) :])
    final = judged[(len(judged) - 1) // 2]
    bound = MARGIN * max(ceiling, losses[0])
    if final > bound:
        raise StageError(
            f"training diverged: its loss went from {losses[0]:.4g} to {final:.4g}, above the limit of "
            f"{bound:.4g} for this stage",
            remedy="lower the learning rate; no result was saved",
        )


def refuse_weights(named: Iterable[tuple[str, Tensor]]) -> None:
    """Ends a stage with a non-finite trained weight, such as after the last step, which no loss follows. All processes
    must call this. Raises NonFiniteError: a weight is not finite."""
    fault = _first_not_finite(named)
    name = next((name for name in everyones(fault) if name is not None), None)
    if name is not None:
        raise NonFiniteError(
            f"a weight is not finite ({name})", remedy="lower the learning rate; this step was not saved"
        )


def _first_not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    pairs = [(name, own) for name, held in named if (own := _own(held).detach()).numel()]
    # One number tells of all, because reading one of each would make the host wait for the device as often.
    if not pairs or math.isfinite(get_total_norm([own for _, own in pairs], math.inf)):
        return None
    return next(name for name, own in pairs if not bool(own.isfinite().all()))


def refuse_results(metrics: Mapping[str, float]) -> None:
    """Ends a stage with a non-finite metric of its result. Raises NonFiniteError: a metric is not finite."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise NonFiniteError(f"{name} is {value} after the last step", remedy="lower the learning rate")


def _numbers(*values: Any) -> list[float | None]:
    """Floats from a trainer's or an engine's values, of which some may be None or sharded tensors."""
    whole = [value.full_tensor() if isinstance(value, DTensor) else value for value in values]
    tensors = [value.detach().double().reshape(()) for value in whole if isinstance(value, Tensor)]
    read = iter(torch.stack([tensor.to(tensors[0].device) for tensor in tensors]).tolist() if tensors else [])
    return [next(read) if isinstance(value, Tensor) else None if value is None else float(value) for value in whole]


def _own(held: Tensor) -> Tensor:
    if hasattr(held, "ds_tensor"):
        share, whole = held.ds_tensor.flatten(), getattr(held, "ds_numel")  # noqa: B009 - DeepSpeed adds both
        # On the last processes the shard ends with padding of undefined content.
        return share[: max(0, whole - torch.distributed.get_rank() * share.numel())]
    return held.to_local() if isinstance(held, DTensor) else held


def _first_fault(model: Any) -> str | None:
    """The name of a non-finite gradient, in brackets; if gradients are sharded, all processes agree on one."""
    grads = [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]
    name = _first_not_finite(grads)
    if any(isinstance(grad, DTensor) for _, grad in grads):
        name = next((name for name in everyones(name) if name is not None), None)
    return None if name is None else f" ({name})"
