"""``optim.micro_batch_tokens=auto``: the stage that runs is the one with the chosen number, which is remembered."""

from __future__ import annotations

import json
import random
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from alignment import worker
from alignment.config.data import DataConfig
from alignment.config.model import AdapterConfig
from alignment.config.optim import Automatic, with_tokens
from alignment.config.scoring import ScorerConfig
from alignment.core.artifacts import read_manifest
from alignment.core.errors import StageError
from alignment.job import StageInput, StageSpec, memory_key
from alignment.records import training
from alignment.records.training import OWN_FILE
from alignment.stages.sft.kind import SftConfig
from alignment.stages.shared import automatic_size
from alignment.stages.shared.automatic_size import with_chosen_size
from alignment.training import size_search
from alignment.training.context import StageContext
from alignment.training.size_search import Choice, SizeChosen, SizeSearch
from tests.chained import DATA, FULL, LORA, Chained, config_of
from tests.generating import distil_spec
from tests.tiny import tiny_spec


def automatic(config: Any, **changes: Any) -> Any:
    return replace(config, optim=replace(config.optim, micro_batch_tokens=Automatic.auto), **changes)


def context_of(spec: StageSpec) -> StageContext:
    return StageContext(spec=spec, rank=0, world_size=1)


def outcome(artifact: Path) -> dict[str, Any]:
    manifest = read_manifest(artifact)
    lines = [json.loads(line) for line in (artifact / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "time/")
    return {
        "weights": {str(file.relative_to(artifact)): file.read_bytes() for file in artifact.rglob("*.safetensors")},
        "lines": [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines],
        "metrics": manifest.metrics,
    }


def chained(kind: str, adapter: AdapterConfig, **changes: Any) -> Callable[[Path], StageSpec]:
    config = config_of(kind, adapter, data=DataConfig(source=str(DATA), limit=4), **changes)
    return lambda folder: Chained(folder).spec(kind, adapter, config=config)


def student(folder: Path) -> StageSpec:
    return distil_spec(folder, optim={"max_steps": 2})


STAGES = {
    "dpo": chained("dpo", FULL, precompute_reference=True),
    "ppo": chained("ppo", LORA, reward=None, scorers=[ScorerConfig(source="length", target=5)]),
    "distil": student,
}


def run(spec: StageSpec) -> dict[str, Any]:
    worker._run(spec, context_of(spec))
    manifest = read_manifest(spec.artifact)
    return outcome(spec.artifact) | {"usage": manifest.usage}


@pytest.mark.parametrize("kind", STAGES)
def test_it_is_the_stage_with_the_chosen_number(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte, although models were trained to choose it. No size is fast enough here, so the smallest is chosen,
    which is another than the default that the search computes with."""
    monkeypatch.setattr(size_search, "FASTER", 1e9)
    spec = STAGES[kind](tmp_path / "auto")
    chose = run(replace(spec, config=automatic(spec.config)))
    tokens = int(chose.pop("usage")["micro_batch_tokens"])
    assert 0 < tokens < 2048
    by_hand = STAGES[kind](tmp_path / "by-hand")
    usage = run(replace(by_hand, config=with_tokens(by_hand.config, tokens))).pop("usage")
    assert "micro_batch_tokens" not in usage, "nothing was chosen"
    assert outcome(spec.artifact) == outcome(by_hand.artifact)
    (file,) = (spec.artifact.parent / "cache").glob("micro-batch-*.json")
    (size,) = json.loads(file.read_text())["sizes"]
    assert size["tokens"] == tokens == size["tried"][0]["tokens"], "the longest row alone"
    assert [tried["fits"] for tried in size["tried"]] == [True, True]


def test_a_stage_whose_longest_row_does_not_fit_ends_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(automatic_size, "attainable", lambda device: 1e6)
    spec = chained("sft", LORA)(tmp_path)
    with pytest.raises(StageError, match=r"not even the longest row, of \d+ tokens, fits") as raised:
        run(replace(spec, config=automatic(spec.config)))
    assert raised.value.where == "stages.sft.optim.micro_batch_tokens"
    assert not (spec.work / "content/metrics.jsonl").exists()


def test_a_whole_batch_is_chosen_if_it_fits_and_nothing_of_the_search_stays_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of labelled answers, because a trial may have none of one label."""
    models: list[weakref.ref[Any]] = []
    own = SizeSearch.run

    def search(self: SizeSearch, trainer: Any, trials: Any) -> NoReturn:
        models.append(weakref.ref(trainer.model))
        own(self, trainer, trials)

    monkeypatch.setattr(SizeSearch, "run", search)
    monkeypatch.setattr(size_search, "FASTER", 0.0)
    spec = chained("kto", LORA)(tmp_path)
    context = context_of(replace(spec, config=automatic(spec.config)))
    sized = with_chosen_size(context, worker.function_of(worker.kind_of(spec.config)))
    assert [model() for model in models] == [None]
    (size,) = training.remembered(spec.work / OWN_FILE, memory_key(context.spec.config, {}, spec.inputs))
    assert sized.chosen_tokens == size.tokens == max(tried.limit for tried in size.tried), "a whole batch fits"
    assert size.tried[-1].tokens <= size.tokens < 2 * size.tried[-1].tokens


# ---- what is remembered ---------------------------------------------------------------------------------------------


class Search:
    """A stage that chooses ``tokens`` and counts how often it was asked; it draws random numbers meanwhile."""

    def __init__(self, tokens: int = 640) -> None:
        self.times = 0
        self.tokens = tokens

    def __call__(self, config: Any, context: StageContext) -> None:
        assert config.optim.micro_batch_tokens == 2048, "a number where the stage computes before its first step"
        assert context.search is not None
        self.times += 1
        random.random()
        np.random.random()
        torch.rand(1)
        raise SizeChosen(Choice(tokens=self.tokens, tried=()))


def spec_of(folder: Path, config: Any = None, **changes: Any) -> StageSpec:
    return tiny_spec(folder, automatic(SftConfig() if config is None else config), **changes)


def tokens_of(spec: StageSpec, search: Search) -> int:
    sized = with_chosen_size(context_of(spec), search)
    config: Any = sized.spec.config
    assert config.optim.micro_batch_tokens == sized.chosen_tokens
    return int(config.optim.micro_batch_tokens)


def test_a_size_is_chosen_once_for_all_stages_that_need_as_much_memory(tmp_path: Path) -> None:
    search = Search()
    assert tokens_of(spec_of(tmp_path), search) == 640
    (file,) = (tmp_path / "artifacts/cache").iterdir()
    (size,) = json.loads(file.read_text())["sizes"]
    assert size["launch"] == "1 process"
    assert size["machine"].startswith("CPU, ")
    (tmp_path / "artifacts/sft-0123abcd.work" / OWN_FILE).unlink()
    config = SftConfig()
    config = replace(config, optim=replace(config.optim, lr=1e-3, max_steps=7), log_every=9)
    assert tokens_of(spec_of(tmp_path, config, seed=5), search) == 640
    assert search.times == 1


@pytest.mark.parametrize(
    "change",
    [
        {"config": replace(SftConfig(), max_length=77)},
        {"identity": {"base": "another model"}},
        {"inputs": {"init": "a model of another shape"}},
    ],
    ids=str,
)
def test_what_needs_other_memory_has_a_size_of_its_own(tmp_path: Path, change: dict[str, Any]) -> None:
    config = change.pop("config", None)
    if "inputs" in change:
        (tmp_path / "init/model").mkdir(parents=True)
        (tmp_path / "init/model/config.json").write_text('{"hidden_size": 99}')
        change["inputs"] = {"init": StageInput(ref="stage:cpt", path=tmp_path / "init")}
    first, second = Search(), Search(80)
    assert tokens_of(spec_of(tmp_path), first) == 640
    assert tokens_of(spec_of(tmp_path, config, **change), second) == 80
    assert (first.times, second.times) == (1, 1)


def test_weights_and_folders_of_a_model_do_not_count(tmp_path: Path) -> None:
    keys = set()
    for name in ("one", "other"):
        folder = tmp_path / name / "adapters/0-sft"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "base_model_name_or_path": name}))
        (folder / "adapter_model.safetensors").write_text(name)
        inputs = {"init": StageInput(ref="stage:sft", path=tmp_path / name)}
        keys.add(memory_key(SftConfig(), {}, inputs))
    assert len(keys) == 1
    (tmp_path / "other/adapters/0-sft/adapter_config.json").write_text('{"r": 8}')
    assert memory_key(SftConfig(), {}, inputs) not in keys


def test_another_machine_has_a_size_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Search(), Search(80)
    spec = spec_of(tmp_path)
    assert tokens_of(spec, first) == 640
    monkeypatch.setattr(automatic_size, "machine_of", lambda device: "NVIDIA A, 80 GB")
    assert tokens_of(spec, second) == 640, "a stage goes on with the size that it began with, so that its bytes stay"
    (spec.work / OWN_FILE).unlink()
    assert tokens_of(spec, second) == 80
    monkeypatch.undo()
    (spec.work / OWN_FILE).unlink()
    assert tokens_of(spec, second) == 640
    assert (first.times, second.times) == (1, 1)


@pytest.mark.parametrize("damage", ["{", "[]", '{"key": 3}', '{"key": "KEY", "sizes": [{"tokens": "many"}]}'])
def test_a_damaged_file_is_named_in_the_log_and_written_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    spec = spec_of(tmp_path)
    file = training.cache_file(tmp_path / "artifacts", memory_key(spec.config, spec.identity, spec.inputs))
    for damaged in (file, spec.work / OWN_FILE):
        damaged.parent.mkdir(parents=True, exist_ok=True)
        damaged.write_text(damage)
    search = Search()
    assert tokens_of(spec, search) == 640
    assert f"cannot be used, so it will be chosen again: {file}" in caplog.text
    assert tokens_of(spec, search) == 640
    assert search.times == 1, "both files are whole again"
    for whole, no_size in ((file, "-5"), (spec.work / OWN_FILE, "0")):
        whole.write_text(whole.read_text().replace("640", no_size))
    assert tokens_of(spec, Search(80)) == 80


def test_random_numbers_are_as_before(tmp_path: Path) -> None:
    drawn = []
    for searches in (True, False):
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)
        if searches:
            tokens_of(spec_of(tmp_path), Search())
        drawn.append((random.random(), float(np.random.random()), float(torch.rand(1))))
    assert drawn[0] == drawn[1]


def test_a_stage_that_does_not_train_as_ours_do_is_refused_and_one_with_a_number_left_alone(tmp_path: Path) -> None:
    context = context_of(tiny_spec(tmp_path, SftConfig()))
    assert with_chosen_size(context, Search()) is context
    with pytest.raises(StageError, match="auto needs a stage that trains with") as raised:
        with_chosen_size(context_of(spec_of(tmp_path)), lambda config, context: None)
    assert raised.value.remedy == "set a number"
