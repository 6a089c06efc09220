"""An evaluation as the worker runs it, on a tiny base, stages that are trained on it, and models from outside."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignment import worker
from alignment.job import StageInput, StageSpec
from alignment.stages.evaluate.config import EvaluateConfig
from alignment.training.context import StageContext
from tests.chained import DATA, LORA, Chained
from tests.tiny import CHAT_TEMPLATE, save_tiny_model, tiny_bpe, tiny_tokenizer

BASE = StageInput(ref="base", path=None)


def evaluation_chain(folder: Path, rows: Iterable[Mapping[str, Any]], *, reward: bool = True) -> Chained:
    """``sft`` and ``reward`` on a base; ``path:near`` has other weights, ``path:other`` other tokens and turns too."""
    chain = Chained(folder)
    chain.run("sft", LORA)
    if reward:
        chain.run("reward", LORA, init="sft")
    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer = tiny_bpe(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|odd|>"])
    tokenizer.chat_template = CHAT_TEMPLATE.replace("You are tiny.", "You are other.")
    save_tiny_model(folder / "other", tokenizer=tokenizer, seed=3)
    save_tiny_model(folder / "near", seed=4)
    write_rows(folder / "heldout.jsonl", rows)
    return chain


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """JSON Lines; returns the file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The rows of JSON Lines."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def evaluation_spec(chain: Chained, config: EvaluateConfig, name: str, **changes: Any) -> StageSpec:
    """An evaluation called ``name``; an arm ``path:NAME`` is a folder of the chain. ``changes`` replace fields."""
    artifact, run_folder = chain.folder / "artifacts" / f"evaluate-{name}", chain.folder / "runs" / name
    run_folder.mkdir(parents=True, exist_ok=True)
    scorers = [f"metrics[{n}].source" for n, metric in enumerate(config.metrics) if metric.source == "stage:reward"]
    scorers += [] if config.reward is None else ["reward"]
    reward = chain.inputs.get("reward", BASE)
    fields: dict[str, Any] = {
        "stage": "evaluate",
        "inputs": {"reference": chain.inputs.get("sft", BASE), **dict.fromkeys(scorers, reward)},
        "arms": {arm: _arm(chain, arm) for arm in config.arms},
        "data_path": chain.folder / "heldout.jsonl",
        "extra_data": {"few_shot.data": DATA / "conversations.jsonl"},
        "artifact": artifact,
        "work": artifact.with_name(f"{artifact.name}.work"),
        "run_folder": run_folder,
    }
    return replace(chain.spec("sft", LORA, config=config), **{**fields, **changes})


def _arm(chain: Chained, arm: str) -> StageInput:
    kind, _, name = arm.partition(":")
    path = {"stage": lambda: chain.inputs[name].path, "path": lambda: chain.folder / name}.get(kind, lambda: None)()
    return StageInput(ref=arm, path=path)


def evaluation_of(chain: Chained, config: EvaluateConfig, name: str, **changes: Any) -> Path:
    """The artifact of an evaluation as the worker runs it; arguments as for ``evaluation_spec``."""
    spec = evaluation_spec(chain, config, name, **changes)
    worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    return spec.artifact
