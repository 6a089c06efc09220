"""Stages that measure, as the worker runs them, on tiny models in one folder, or on a chain and models from outside."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignment import worker
from alignment.config.data import DataConfig
from alignment.config.evaluating import AnswersConfig
from alignment.config.model import AdapterConfig
from alignment.config.scoring import MetricConfig, ScoreSourceConfig
from alignment.config.stage import StageConfig
from alignment.job import StageInput, StageSpec
from alignment.models.assembly.load import Lineage
from alignment.stages.evaluate.config import EvaluateConfig
from alignment.stages.forgetting.kind import ForgettingConfig
from alignment.stages.reward_card.kind import RewardCardConfig
from alignment.training.context import StageContext
from tests.chained import DATA, LORA, Chained
from tests.tiny import BASE_SOURCE, CHAT_TEMPLATE, save_tiny_model, tiny_bpe, tiny_reward, tiny_spec, tiny_tokenizer

GENERAL = DATA.parent / "general"
DAYS = ("Monday", "Tuesday", "Friday", "Sunday")
SEEDS = {"other": 3, "third": 4}
SAMPLED = AnswersConfig(per_prompt=3, temperature=1.0)


class Measuring:
    """A base, two other policies and a reward model; each stage has folders of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = save_tiny_model(folder / "base")
        self.policies = {f"path:{name}": save_tiny_model(folder / name, seed=seed) for name, seed in SEEDS.items()}
        lineage = Lineage(source=BASE_SOURCE, base=self.base, adapters=())
        self.reward = tiny_reward(
            folder / "made", AdapterConfig(rank=4), start=lineage, base_path=self.base, identity={"seed": 0}
        )

    def spec(self, name: str, config: StageConfig, data: Path, **changes: Any) -> StageSpec:
        arms = {arm: StageInput(ref=arm, path=self.policies.get(arm)) for arm in getattr(config, "arms", ())}
        fields = {"base_path": self.base, "data_path": data, "arms": arms, **changes}
        return tiny_spec(self.folder / name, config, **fields)

    def evaluate(self, name: str, rows: int, **changes: Any) -> StageSpec:
        """Three arms before a rule and two reward models, by default in parts of four answers."""
        file = self.folder / f"{rows}.jsonl"
        file.write_text("".join(json.dumps(conversation(number)) + "\n" for number in range(rows)))
        metrics = [
            MetricConfig(name="short", source="length", target=2),
            MetricConfig(name="liked", source="reward"),
            MetricConfig(name="liked_too", source="stage:reward"),
        ]
        settings: dict[str, Any] = {
            "arms": ["base", *self.policies],
            "reference": "base",
            "metrics": metrics,
            "max_new_tokens": 5,
            "batch_size": 4,
            "bootstrap_samples": 20,
        }
        inputs = {"reference": StageInput(ref="base", path=None)}
        inputs |= dict.fromkeys(("reward", "metrics[2].source"), self.reward)
        return self.spec(name, EvaluateConfig(**{**settings, **changes}), file, inputs=inputs)

    def choices(self, name: str) -> StageSpec:
        """The same arms before the questions of which they choose an answer."""
        config = EvaluateConfig(
            arms=["base", *self.policies],
            reference="base",
            reward=None,
            metrics=[MetricConfig(name="mmlu", source="choice")],
            data=DataConfig(source="path:questions"),
            max_new_tokens=1,
            bootstrap_samples=20,
        )
        inputs = {"reference": StageInput(ref="base", path=None)}
        return self.spec(name, config, GENERAL / "questions.jsonl", inputs=inputs)

    def forgetting(self, name: str, texts: int) -> StageSpec:
        """Two policies on the first of the shipped texts, and on all questions."""
        config = ForgettingConfig(
            arms=list(self.policies), data=DataConfig(source="path:texts", limit=texts), bootstrap_samples=20
        )
        return self.spec(name, config, GENERAL / "texts.jsonl", extra_data={"questions": GENERAL / "questions.jsonl"})

    def reward_card(self, name: str, pairs: int, **changes: Any) -> StageSpec:
        """Some of the shipped pairs, judged by the reward model and by a rule."""
        settings: dict[str, Any] = {
            "reward": "stage:reward",
            "data": DataConfig(source="path:pairs", limit=pairs),
            "rule": ScoreSourceConfig(source="length", target=20),
            "max_length": 4096,
            "invariance_pairs": 2,
            "bootstrap_samples": 20,
        }
        config = RewardCardConfig(**{**settings, **changes})
        return self.spec(name, config, DATA / "preferences.jsonl", inputs={"reward": self.reward})


def conversation(number: int) -> dict[str, Any]:
    """A long question; every other row asks a second one. Each turn has a reference."""
    day = DAYS[number % len(DAYS)]
    asked = f"Shop {number} is closed on {day}" + " and so are its neighbours" * (10 + 15 * (number % 3)) + ". When?"
    turns, references = [asked, "And why?"], [f"On {day}.", "Nobody knows."]
    count = 1 + number % 2
    return {"id": f"q{number}", "turns": turns[:count], "reference": references[:count]}


def files(artifact: Path) -> dict[str, bytes]:
    """The content of a result, without its manifest and the times of arms."""
    content = {file.name: file.read_bytes() for file in artifact.iterdir() if file.name != "manifest.json"}
    if "evaluation.json" in content:
        evaluation = json.loads(content["evaluation.json"])
        for arm in evaluation["arms"]:
            del arm["seconds"]
        content["evaluation.json"] = json.dumps(evaluation).encode()
    return content


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
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read_lines(file: Path) -> list[dict[str, Any]]:
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
    spec = evaluation_spec(chain, config, name, **changes)
    worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    return spec.artifact
