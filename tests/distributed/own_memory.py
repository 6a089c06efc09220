"""Watches what memory a process has for itself until its trainer takes the first step, and then ends the process.

Own memory is what the kernel calls anonymous: pages of a file do not count until the process writes into them.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

PERIOD = 0.001
_MMAP_THRESHOLD = -3
"""glibc's number of the parameter of ``mallopt``."""
_STATUS, _ROLLUP = Path("/proc/self/status"), Path("/proc/self/smaps_rollup")


def own_bytes() -> int:
    """The anonymous memory of this process that is resident."""
    return 1024 * int(re.search(r"^RssAnon:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE)[1])  # type: ignore[index]


def smaps() -> dict[str, int]:
    """Bytes by the kernel's names, such as ``Pss`` and ``Private_Dirty``."""
    lines = re.findall(r"^(\w+):\s*(\d+) kB", _ROLLUP.read_text(), re.MULTILINE)
    return {name: 1024 * int(size) for name, size in lines}


class OwnMemory(threading.Thread):
    """The highest own memory in each phase, above that at the start."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = own_bytes()
        self.peaks: dict[str, int] = {}
        self.phase = "loading"
        self.ended = False

    def run(self) -> None:
        while not self.ended:
            self.see()
            time.sleep(PERIOD)

    def see(self) -> None:
        self.peaks[self.phase] = max(own_bytes() - self.start_bytes, self.peaks.get(self.phase, 0))


def watch(folder: Path, rank: int, base: Path) -> None:
    """From now on; writes ``memory-RANK.json`` into the folder."""
    from transformers import Trainer

    from alignment.stages.shared import result
    from alignment.training import session
    from alignment.training.callbacks import StepLog

    # What is freed goes back to the system, so that memory is what the process holds and not what malloc keeps.
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 20)
    memory = OwnMemory()
    record: dict[str, Any] = {}
    load, train, begin = result.load_start, Trainer.train, StepLog.on_train_begin
    cut = session.cut_by_module

    def load_start(*args: Any, **settings: Any) -> Any:
        memory.start_bytes = own_bytes()
        memory.start()
        model = load(*args, **settings)
        record["after_loading"] = {"own": own_bytes() - memory.start_bytes} | smaps()
        return model

    def cut_by_module(*args: Any) -> Any:
        memory.phase = "cutting"
        return cut(*args)

    def trains(self: Any, *args: Any, **settings: Any) -> Any:
        record["trainer"] = self
        return train(self, *args, **settings)

    def on_train_begin(self: Any, *args: Any, **settings: Any) -> None:
        begin(self, *args, **settings)
        memory.see()
        record["cut"] = {"own": own_bytes() - memory.start_bytes} | smaps()
        memory.phase = "comparing"
        trainer = record.pop("trainer")
        record["wrong"] = _other_than_the_file(trainer.model, base)
        reference = getattr(trainer, "ref_model", None)
        if isinstance(reference, nn.Module):
            record["wrong"] += _other_than_the_file(getattr(reference, "module", reference), base)
        memory.ended = True
        torch.distributed.barrier()  # the other process may still be gathering
        (folder / f"memory-{rank}.json").write_text(json.dumps(record | {"peaks": memory.peaks}))
        os._exit(0)

    if importlib.util.find_spec("deepspeed") is not None:
        _end_with_cut_of_deepspeed(memory)
    result.load_start, Trainer.train, StepLog.on_train_begin = load_start, trains, on_train_begin
    session.cut_by_module = cut_by_module


def _end_with_cut_of_deepspeed(memory: OwnMemory) -> None:
    """Its engine goes on with copies of the shares for the optimiser, and the optimiser's state."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    begin = DeepSpeedZeRoOffload.__init__

    def begins(self: Any, *args: Any, **settings: Any) -> None:
        begin(self, *args, **settings)
        if memory.phase == "cutting":
            memory.phase = "optimiser"

    DeepSpeedZeRoOffload.__init__ = begins


def _other_than_the_file(model: nn.Module, base: Path) -> list[str]:
    """The names of weights that do not have the file's numbers, or that are no float32 though they are trained."""
    from alignment.training.sharding import whole

    stored = load_file(base / "model.safetensors")
    wrong = []
    for name, weight in model.named_parameters():
        held: Tensor = whole(weight).detach()
        original = stored.get(name.removeprefix("base_model.model.").replace(".base_layer", ""))
        if original is not None and not torch.equal(held.float(), original.float()):
            wrong.append(name)
        if weight.requires_grad and held.dtype is not torch.float32:
            wrong.append(f"{name} is {held.dtype}")
    return wrong
