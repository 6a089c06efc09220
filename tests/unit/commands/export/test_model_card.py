"""A card says what manifests and evaluation say, and nothing of the machine it was written on."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignment.commands.export.model_card import model_card
from alignment.commands.export.provenance import provenance, value_without_folders
from alignment.core.artifacts import Manifest, publish, read_manifest

OPTIM = {"lr": 2e-4, "batch_size": 8, "epochs": 1, "max_steps": None}
CONFIGS: dict[str, dict[str, Any]] = {
    "sft": {"kind": "sft", "adapter": {"kind": "lora", "rank": 16}, "optim": OPTIM, "max_length": 512},
    "reward": {"kind": "reward", "adapter": {"kind": "full", "master_weights": True}, "optim": OPTIM},
    "ppo": {
        "kind": "ppo",
        "adapter": {"kind": "prefix", "virtual_tokens": 8},
        "kl": {"coefficient": 0.05},
        "empty": [],
    },
}
INPUTS = {"sft": {}, "reward": {"init": "sft"}, "ppo": {"init": "sft", "reward": "reward"}}


def _fingerprint(stage: str) -> str:
    return stage.encode().hex().ljust(64, "0")


def identity_of(stage: str, config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    base = {"content": "files-sha256:b", "dtype": "float32"}
    return {"kind": config["kind"], "config": config, "data": f"data-of-{stage}", "seed": 42, "base": base, **changes}


class Store:
    """Artifacts of a chain, an evaluation and the run that made them, with nothing in their folders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for stage in CONFIGS:
            self.publish(stage, kind="reward" if stage == "reward" else "policy", config=CONFIGS[stage])
        self.record("mine", self.evaluate("evaluate", brevity=0.625))

    def publish(self, stage: str, *, kind: str, config: dict[str, Any], **changes: Any) -> Path:
        content = self.root / "content"
        content.mkdir(exist_ok=True)
        (content / "metrics.jsonl").touch()
        fields = {
            "stage": stage,
            "kind": kind,
            "fingerprint": _fingerprint(stage),
            "identity": identity_of(stage, config),
            "inputs": {name: _fingerprint(other) for name, other in INPUTS.get(stage, {}).items()},
            "base": {"source": f"path:{self.root}/base", "path": str(self.root / "base"), "content": None},
            "metrics": {"loss": 0.34567, "rows": 270.0},
            "versions": {"torch": "2.9.0"},
            "created": "2026-03-14T09:40:11Z",
            "git_commit": "4f2c9d1e0b7a",
        }
        folder = self.root / "artifacts" / stage
        publish(content, folder, Manifest(**{**fields, **changes}))
        return folder

    def evaluate(self, name: str, *, brevity: float, arm: str = "stage:ppo", of: str = "ppo") -> Path:
        content = self.root / "content"
        content.mkdir()
        metrics = {"brevity": {"mean": brevity, "low": 0.5, "high": 0.75}, "errors": {"mean": 0.5625}}
        row = {"name": arm, "label": "ppo", "metrics": metrics, "words": {"mean": 21.5}, "loss": None, "seconds": 3.0}
        pair = {"arm": arm, "against": "stage:sft", "difference": 0.11, "low": 0.02, "high": 0.2, "real": True}
        verdict = {"arm": arm, "against": "stage:sft", "win_rate": {"mean": 0.7, "low": 0.6, "high": 0.8}}
        verdict |= {"wins": 7, "ties": 0, "losses": 3}
        row["win_rate"] = verdict["win_rate"]
        judge = {"name": "the metric", "pairs": [verdict, verdict | {"arm": "base"}]}
        evaluation = {
            "metrics": [{"name": "brevity"}, {"name": "errors", "higher_is_better": False}],
            "primary": "brevity",
        }
        other = pair | {"arm": "stage:sft", "against": "base"}
        evaluation |= {"num_prompts": 102, "arms": [row | {"name": "base"}, row], "comparisons": [pair, other]}
        evaluation |= {"judge": judge}
        (content / "evaluation.json").write_text(json.dumps(evaluation))
        identity = {"arms": {arm: _fingerprint(of)}}
        inputs = {arm: _fingerprint(of)}
        changes = {"identity": identity, "inputs": inputs, "created": name}
        return self.publish(name, kind="evaluation", config={"kind": "evaluate"}, **changes)

    def forget(self, **changes: Any) -> None:
        content = self.root / "content"
        content.mkdir()
        row = {"name": "stage:ppo", "rise": {"mean": 16.39, "low": 14.0, "high": 19.0}}
        row |= {"drop": {"mean": 0.05, "low": -0.01, "high": 0.11}, "passed": False}
        row |= {"reasons": ["perplexity is higher"]}
        limits = {"perplexity_rise": 0.2, "ability_drop": None}
        (content / "forgetting.json").write_text(json.dumps({"limits": limits, "arms": [row], **changes}))
        identity, inputs = {"arms": {"stage:ppo": ""}}, {"stage:ppo": _fingerprint("ppo")}
        config = {"kind": "forgetting"}
        self.publish("forgetting", kind="forgetting", config=config, identity=identity, inputs=inputs)

    def record(self, run: str, evaluation: Path) -> None:
        folder = self.root / "runs" / run
        folder.mkdir(parents=True)
        stages = {stage: {"artifact": str(self.root / "artifacts" / stage)} for stage in CONFIGS}
        stages["evaluate"] = {"artifact": str(evaluation)}
        sources = {"sft": "hub:org/chats@0123", "reward": f"path:{self.root}/pairs.jsonl", "ppo": "bundled:x"}
        config = {"stages": {stage: {"data": {"source": source}} for stage, source in sources.items()}}
        overrides = [f"stages.sft.data.source=path:{self.root}/a.jsonl", f"output={self.root}", "launch=ddp", "seed=7"]
        overrides += [
            "stages.evaluate.judge.kind=endpoint",
            "++stages.evaluate.judge.endpoint={base_url: 'http://judge.example:8000/v1', model: m}",
        ]
        run_record = {"recipe": f"{self.root}/mine.yaml", "overrides": overrides, "config": config, "stages": stages}
        (folder / "run.json").write_text(json.dumps({**run_record, "started": run}))

    def card(self, stage: str = "ppo", *, run: str | None = None, form: str = "model") -> str:
        folder = self.root / "artifacts" / stage
        manifest = read_manifest(folder)
        assert manifest is not None
        return model_card(manifest, provenance(folder, manifest, run), form=form, turn_end=None, notes=["a note"])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


CARD = """\
# ppo

A policy trained by the stage `ppo` (ppo) of alignment-pipeline. Its base is `path:base`.

Licence: the licences of the base and of the training data apply; they are not recorded here.

- a note

## What was measured

At the end of training:

| metric | value |
|---|---|
| loss | 0.3457 |
| rows | 270 |

As an arm of an evaluation on 102 held-out prompts (`6576616c`):

| metric | mean | 95 % interval |
|---|---|---|
| brevity (more is better) | 0.625 | 0.5 to 0.75 |
| errors (less is better) | 0.5625 |  |
| words | 21.5 |  |
| win rate against sft, by the metric | 0.7 | 0.6 to 0.8 |

- ppo against sft: +0.110 (+0.020 to +0.200) in brevity, better

Compared with its base, in a measurement of forgetting (`666f7267`):

| change | mean | 95 % interval | limit |
|---|---|---|---|
| rise of the perplexity of general text | +1639.0% | +1400.0% to +1900.0% | +20.0% |
| drop of the share of right answers | +5.0% | -1.0% to +11.0% | none |

It forgot too much: perplexity is higher.

## Intended use and limits

- Answering prompts of the kind that it was trained on. Other uses were not tested.
- Its answers were not checked for truth, safety, bias or memorised text, beyond the values above.
- It has the limits of its base; see the base's own card.

## Where it comes from

base → sft (sft) → reward (reward) → ppo (ppo)

- **sft** (sft), fingerprint `7366740000000000000000000000000000000000000000000000000000000000`
  - takes the base; base content `files-sha256:b`, computed in float32
  - data: `hub:org/chats@0123`; content `data-of-sft`
  - adapter: kind lora, rank 16
  - optimiser: lr 0.0002, batch_size 8, epochs 1
  - settings: max_length 512; seed 42
- **reward** (reward), fingerprint `7265776172640000000000000000000000000000000000000000000000000000`
  - takes init `736674000000`; base content `files-sha256:b`, computed in float32
  - data: `path:pairs.jsonl`; content `data-of-reward`
  - adapter: kind full, master_weights true
  - optimiser: lr 0.0002, batch_size 8, epochs 1
  - settings: ; seed 42
- **ppo** (ppo), fingerprint `70706f0000000000000000000000000000000000000000000000000000000000`
  - takes init `736674000000`, reward `726577617264`; base content `files-sha256:b`, computed in float32
  - data: `bundled:x`; content `data-of-ppo`
  - adapter: kind prefix, virtual_tokens 8
  - settings: kl.coefficient 0.05; seed 42
- adapters, bottom first: none
- tokenizer ``, chat template ``
- all settings: `lineage.json`

## How to reproduce it

```console
$ align run mine.yaml stages.sft.data.source=path:a.jsonl seed=7
```

- made 2026-03-14T09:40:11Z at commit 4f2c9d1e0b7a
- torch 2.9.0
"""


def test_it_says_what_is_known_without_folders_of_the_machine(store: Store) -> None:
    store.forget()
    _, header, text = store.card().split("---\n", 2)
    assert re.sub(r"```python\n.*?```\n\n", "", text.lstrip(), flags=re.DOTALL) == CARD
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "of-base-and-data",
        "datasets": ["org/chats"],  # a folder is no name on a hub, so there is no base_model
        "tags": ["alignment-pipeline", "sft", "reward", "ppo"],
    }
    other = store.card("reward")
    assert yaml.safe_load(other.split("---")[1])["pipeline_tag"] == "text-classification"
    assert "general text" not in other + store.card("sft")


def test_it_says_how_many_prompts_have_a_grade(store: Store) -> None:
    """Prompts without a grade in every arm do not count."""
    file = store.root / "artifacts" / "evaluate" / "evaluation.json"
    gradings = [{"metric": "errors", "num_prompts": 80}, {"metric": "brevity", "num_prompts": 60}]
    file.write_text(json.dumps({**json.loads(file.read_text()), "gradings": gradings}))
    assert "on 102 held-out prompts, 60 of them graded in every arm (`" in store.card()


def test_without_limits_it_is_not_said_to_have_passed(store: Store) -> None:
    store.forget(limits={"perplexity_rise": None, "ability_drop": None})
    assert "It was not judged: no limits were set." in store.card()


def test_the_tables_of_a_benchmark_have_the_column_of_this_policy(store: Store) -> None:
    content = store.root / "content"
    content.mkdir()
    values = {"capitals/acc": {"value": 0.55, "stderr": 0.114}}
    task = {"name": "capitals", "num_fewshot": 2, "num_rows": 20, "all_rows": 20, "metrics": [{"name": "acc"}]}
    arms = [{"name": "base", "values": {"capitals/acc": {"value": 0.25}}}, {"name": "stage:ppo", "values": values}]
    benchmark = {"harness": "0.4.13", "tasks": [task], "arms": arms}
    (content / "benchmark.json").write_text(json.dumps(benchmark))
    identity = {"kind": "benchmark", "arms": {"stage:ppo": _fingerprint("ppo")}}
    inputs = {"stage:ppo": _fingerprint("ppo")}
    store.publish("asked", kind="benchmark", config={"kind": "benchmark"}, identity=identity, inputs=inputs)
    card = store.card()
    assert "In `asked` (`" in card
    assert "|  | examples | rows | value |\n|---|---|---|---|\n| capitals/acc | 2 | 20 | 0.550 ± 0.114 |" in card
    assert "0.250" not in card
    assert "capitals" not in store.card("sft")


def test_a_smoke_run_is_said_to_be_one(store: Store) -> None:
    path = store.root / "runs" / "mine" / "run.json"
    run_record = json.loads(path.read_text())
    for profile, sentence in (("smoke", "It comes from a smoke run"), ("mine", "under the profile `mine`")):
        path.write_text(json.dumps({**run_record, "profile": profile}))
        assert sentence in store.card()


def test_rows_that_a_stage_made_and_options_of_the_template_are_in_it(store: Store) -> None:
    """Rows of another stage have no content of their own; a server must be given the options."""
    for stage in ("sft", "ppo"):
        shutil.rmtree(store.root / "artifacts" / stage)
    store.publish("sft", kind="policy", config=CONFIGS["sft"], identity=identity_of("sft", CONFIGS["sft"], data=None))
    base = {"content": None, "dtype": "float32", "template_options": {"enable_thinking": False}}
    store.publish("ppo", kind="policy", config=CONFIGS["ppo"], identity=identity_of("ppo", CONFIGS["ppo"], base=base))
    card = store.card()
    assert "data: `hub:org/chats@0123`\n" in card
    assert "--chat-template-kwargs '{\"enable_thinking\": false}'`" in card


@pytest.mark.parametrize(
    ("value", "shortened"),
    [
        ("path:/home/Jane Doe/acme, inc/pairs.jsonl", "path:pairs.jsonl"),
        ("stages.sft.data.source=path:~/my data/a b.jsonl", "stages.sft.data.source=path:a b.jsonl"),
        (
            "stages.sft.data.mix=[{source: path:/a b/c.jsonl, count: 1}, {source: 'path:/d e/f.jsonl'}]",
            "stages.sft.data.mix=[{source: path:c.jsonl, count: 1}, {source: 'path:f.jsonl'}]",
        ),
        ("../my recipes/mine.yaml", "mine.yaml"),
        ("/a.jsonl", "a.jsonl"),
        ("hub:org/name@1", "hub:org/name@1"),
        ("path:my data/x.jsonl", "path:my data/x.jsonl"),
        ("yes / no / 3/4 </think> <answer></answer>", "yes / no / 3/4 </think> <answer></answer>"),
    ],
)
def test_folders_with_spaces_are_left_out_of_values(value: str, shortened: str) -> None:
    assert value_without_folders(value) == shortened


def test_the_evaluation_of_the_run_that_is_named_counts(store: Store) -> None:
    other = store.evaluate("evaluate-later", brevity=0.25)
    store.record("other", other)
    assert "| brevity (more is better) | 0.625 |" in store.card(run="mine")
    assert "| brevity (more is better) | 0.25 |" in store.card(run="other")


def test_what_is_not_known_is_said_and_damage_beside_it_does_not_matter(store: Store) -> None:
    for path in ("artifacts/reward/manifest.json", "runs/mine/run.json", "artifacts/evaluate/evaluation.json"):
        (store.root / path).write_text("{")
    for stage in ("sft", "ppo"):
        card = store.card(stage)
        assert "No evaluation of it is recorded." in card
        assert "whether it is better than its base is unknown" in card
        assert "The command that made it is not recorded." in card
        assert "data: a source whose name is not recorded" in card
    assert f"artifacts not found, so not described here: reward of ppo, `{_fingerprint('reward')[:8]}`" in card
