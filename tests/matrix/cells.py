"""One cell of the compatibility table: a stage under an adapter and a launcher, on a tiny model and a few rows. A cell
works when its run of two processes tells the losses of the run of one, and its artifact, read by transformers and PEFT
alone, holds the same weights, none of them empty, its scalar head included. The rows are of very unequal length and
micro-batches small, so that the two processes cut their shares into unequal numbers of pieces."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alignment.core.artifacts import verify
from tests.matrix.rows import CONVERSATIONS, PAIRS, TEXTS

STAGES = ("cpt", "sft", "reward", "dpo", "kto", "ppo", "grpo", "distil", "draft")
KINDS = {"grpo": "ppo", "draft": "distil"}
"""The kind of a stage that is not called after it."""
ADAPTERS = ("full", "lora", "dora", "qlora", "prefix")
LAUNCHERS = ("local", "ddp", "fsdp", "zero1", "zero2", "zero3")
IDS = torch.tensor([[5, 6, 7, 8, 2]])
MODELS = {"float32": "llama", "bfloat16": "qwen2"}
"""The architecture that is tried in each dtype; the attention of Qwen2 has biases."""
SAME = {"float32": 1e-4, "bfloat16": 0.25}
"""Of losses and other figures of a step, relative to 1 or their own size: sums over processes are rounded otherwise."""
LOGITS = {"float32": 1e-3, "bfloat16": 0.5}
"""Of a model that two runs trained: the optimiser divides small gradients by their own size."""
_RL = ("objective/score", "objective/kl", "loss/policy", "grad_norm")
FIGURES = {"ppo": (*_RL, "loss/value"), "grpo": (*_RL, "loss/kl", "objective/tied_prompts")}
LOSS = ("loss", "grad_norm")
_TEACHING = (
    "teacher=base",
    "layers=1",
    "completions_per_prompt=2",
    "max_prompt_length=4096",
    "max_new_tokens=6",
    "eval_fraction=0.34",  # 16 prompts of 24 are learned, so batches are whole
    "optim={batch_size: 8, micro_batch_tokens: 110, lr: 1e-3, warmup_ratio: 0.0, schedule: constant}",
)
_OPTIM = "optim={batch_size: 8, micro_batch_tokens: 110, lr: 1e-3, warmup_ratio: 0.0, schedule: constant}"
_ROLLOUTS = (
    "updates=2",
    "ppo_epochs=2",
    "num_minibatches=1",
    "max_prompt_length=4096",
    "max_new_tokens=6",
    "optim={batch_size: 8, micro_batch_tokens: 110, lr: 1e-3}",
)
_SETTINGS = {
    # As many steps as there are whole batches: processes repeat some rows of a partial one (docs/launching.md).
    "cpt": ("max_length=64", _OPTIM, "optim.micro_batch_tokens=90", "optim.max_steps=3"),
    "sft": ("max_length=4096", _OPTIM),
    "reward": ("max_length=4096", "eval_fraction=0.34", _OPTIM),
    "dpo": ("max_length=4096", _OPTIM),
    "kto": ("max_length=4096", _OPTIM),
    "ppo": _ROLLOUTS,
    "grpo": (
        *_ROLLOUTS,
        "advantage=grpo",
        "critic=none",
        "completions_per_prompt=2",
        "kl={coefficient: 0.04, apply_to: loss}",
        "clip_high=0.28",
        "drop_ties=true",
    ),
    "distil": (*_TEACHING, "method=sequence"),
    "draft": (*_TEACHING, "timed_prompts=0"),
}
_ROWS = {"cpt": TEXTS, "sft": CONVERSATIONS}
_ADAPTERS = {"full": (), "prefix": ("virtual_tokens=4",)}
_FACTORS = ("rank=4",)


class CellFailed(Exception):
    """A cell neither works nor was refused; the message says how."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    stage: str
    adapter: str
    launcher: str
    dtype: str

    @property
    def kind(self) -> str:
        return KINDS.get(self.stage, self.stage)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """``state`` is ``works``, ``refused`` or ``failed``; ``reason`` says why it does not work."""

    cell: Cell
    state: str
    reason: str = ""
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """Where cells run: ``folder`` holds their models and what they leave."""

    folder: Path

    def outcome(self, cell: Cell) -> Outcome:
        """Runs the cell; one of another launcher wants the cell of ``local`` to have run."""
        done = self._align(cell)
        printed = done.stdout + done.stderr
        if done.returncode == 2 and "Traceback" not in printed and self._reason(cell, printed):
            return Outcome(cell=cell, state="refused", reason=self._reason(cell, printed))
        try:
            if done.returncode:
                raise CellFailed(f"exit code {done.returncode}: {printed[-2000:]}")
            return Outcome(cell=cell, state="works", figures=self._compared(cell))
        except (CellFailed, KeyError, OSError, ValueError, RuntimeError) as error:
            return Outcome(cell=cell, state="failed", reason=f"{type(error).__name__}: {error}")

    def _align(self, cell: Cell) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "alignment.cli", "run", str(self._recipe(cell)), *self._overrides(cell)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "NETRC": os.devnull},
        )

    def _recipe(self, cell: Cell) -> Path:
        path = self.folder / f"{cell.stage}.yaml"
        path.write_text(
            f"defaults: [base, stage@stages.{cell.stage}: {cell.kind}, _self_]\nsummary: one cell\n", encoding="utf-8"
        )
        return path

    def _overrides(self, cell: Cell) -> list[str]:
        stage = f"stages.{cell.stage}"
        overrides = [f"output={self._output(cell)}", f"model.source=path:{self._model(cell)}"]
        overrides += [f"model.dtype={cell.dtype}"]
        overrides += [f"launch={cell.launcher}", "launch.threads=1"]
        overrides += [] if cell.launcher == "local" else ["launch.num_processes=2"]
        overrides += [f"adapter@{stage}.adapter={cell.adapter}"]
        overrides += [f"{stage}.adapter.{setting}" for setting in _ADAPTERS.get(cell.adapter, _FACTORS)]
        overrides += [f"{stage}.data.source=path:{self.folder / _ROWS.get(cell.stage, PAIRS)}"]
        overrides += [f"{stage}.init=base", *(f"{stage}.{setting}" for setting in _SETTINGS[cell.stage])]
        if cell.kind == "ppo":
            reward = replace(cell, stage="reward", launcher="local")
            overrides.append(f"{stage}.reward=path:{self.artifact(reward)}")
        return overrides

    def _output(self, cell: Cell) -> Path:
        return self.folder / cell.dtype / cell.launcher / cell.adapter

    def _model(self, cell: Cell) -> Path:
        return self.folder / cell.dtype / "model"

    def artifact(self, cell: Cell) -> Path:
        record = self._output(cell) / "runs" / cell.stage / "run.json"
        return Path(json.loads(record.read_text(encoding="utf-8"))["stages"][cell.stage]["artifact"])

    @staticmethod
    def _reason(cell: Cell, printed: str) -> str:
        """Why the driver says that the stage does not work so, or nothing."""
        match = re.search(r"does not work with (?:any launch|launch=\S+): (.*)", printed)
        return "" if match is None else match[1]

    def _compared(self, cell: Cell) -> dict[str, float]:
        alone = self.artifact(replace(cell, launcher="local"))
        own = self.artifact(cell)
        figures = {
            "figures": _furthest(_logged(own, cell), _logged(alone, cell)),
            "logits": _reread(self._model(cell), own, cell.stage, against=alone),
        }
        for name, limit in (("figures", SAME[cell.dtype]), ("logits", LOGITS[cell.dtype])):
            if not figures[name] <= limit:
                raise CellFailed(f"{name} differs by {figures[name]:.2g} from one process's, {limit:g} allowed")
        return figures


def _logged(artifact: Path, cell: Cell) -> list[float]:
    """In bfloat16, of the first step: later ones depend on what rounding did to it, and so do sampled answers."""
    lines = (artifact / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    names: tuple[str, ...] = FIGURES.get(cell.stage, LOSS)
    if cell.dtype == "bfloat16":
        lines, names = lines[:1], ("objective/kl",) if cell.kind == "ppo" else names
    return [float(json.loads(line)[name]) for line in lines for name in names]


def _furthest(own: list[float], alone: list[float]) -> float:
    if len(own) != len(alone) or not own:
        raise CellFailed(f"{len(own)} steps were logged, {len(alone)} by one process")
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(own, alone, strict=True))


def _reread(base: Path, own: Path, stage: str, *, against: Path) -> float:
    """The largest difference between what two artifacts say, both read by transformers and PEFT."""
    return float((_says(base, own, stage) - _says(base, against, stage)).abs().max())


@torch.no_grad()
def _says(base: Path, artifact: Path, stage: str) -> torch.Tensor:
    manifest = verify(artifact, content=True)
    for file in artifact.rglob("*.safetensors"):
        empty = [name for name, held in load_file(file).items() if not held.numel()]
        if empty:
            raise CellFailed(f"{file.name} holds {empty[0]} without a number in it")
    whole = artifact / "model" if manifest.base["source"] == "self" else base
    kind = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    more: dict[str, Any] = {"num_labels": 1} if stage == "reward" else {}
    model = kind.from_pretrained(str(whole), dtype=torch.float32, **more)
    for adapter in manifest.adapters:
        model = PeftModel.from_pretrained(model, str(artifact / adapter))
    if stage == "reward":
        head = load_file(artifact / "head.safetensors")["weight"]
        states = (model.get_base_model() if manifest.adapters else model).model(IDS).last_hidden_state
        return states @ head.T.float()
    return model(IDS).logits
