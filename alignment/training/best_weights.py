"""The trained weights of the best model so far, on the main process, in its memory and in checkpoints."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignment.training.sharding import put, whole_state


class BestWeights:
    """Copies of a model's trained weights. ``file`` is their name in a checkpoint's folder.

    The main process holds one copy of all trained weights in its memory, whole; the other processes hold none.
    """

    def __init__(self, model: nn.Module, *, file: str) -> None:
        self._model = model
        self._file = file
        self._weights: dict[str, Tensor] = {}

    def record(self) -> None:
        """Copies the weights as they are now; every process must call this."""
        named = dict(self._model.named_parameters())  # holds a tied weight once, so that it is written once
        weights = whole_state(self._model, trained_only=True)
        self._weights = {name: held for name, held in weights.items() if name in named}

    def restore(self) -> None:
        """Puts the recorded weights into the model; every process must call this."""
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                put(parameter, self._weights.get(name))

    def save(self, folder: Path) -> None:
        """Writes them into a checkpoint that is not sealed yet; only the main process has any to write."""
        if self._weights:
            save_file({name: held.contiguous() for name, held in self._weights.items()}, folder / self._file)

    def load(self, folder: Path, *, main: bool) -> None:
        """Reads what ``save`` wrote; ``main`` says whether this is the main process."""
        self._weights = load_file(folder / self._file) if main else {}
