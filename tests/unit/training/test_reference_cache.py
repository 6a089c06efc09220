"""A reference computed beforehand trains the same policy, is computed once, and is forgotten when anything changes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignment.config.model import AdapterConfig, AdapterKind, Dtype, ModelConfig
from alignment.records.training import MetricsLog
from alignment.stages.dpo import run as dpo
from alignment.stages.dpo.kind import DpoConfig
from alignment.stages.shared import reference
from alignment.stages.shared.reference import OwnRows
from alignment.training.context import StageContext
from tests.chained import PREFIX
from tests.tiny import BASE_SOURCE, save_tiny_model, tiny_spec
from tests.unit.training.test_micro_batches import ADAPTER, OPTIM, trained_weights, write_rows

FULL = AdapterConfig(kind=AdapterKind.full)


def _train(folder: Path, config: DpoConfig, *, below: float = 0.69, **changes: Any) -> torch.Tensor:
    context = StageContext(spec=tiny_spec(folder, config, **changes), rank=0, world_size=1)
    torch.manual_seed(0)
    dpo.run(config, context)
    assert MetricsLog(context.content / "metrics.jsonl").last()["loss"] < below
    weights = trained_weights(context.content)
    for part in (context.content, context.checkpoints):
        for file in sorted(part.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
    return weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "base")
    write_rows(tmp_path / "data.jsonl", pairs=True)
    return tmp_path


@pytest.mark.parametrize("adapter", [ADAPTER, FULL], ids=["lora", "full"])
def test_live_and_precomputed_references_train_the_same_policy(folder: Path, adapter: AdapterConfig) -> None:
    config = DpoConfig(optim=OPTIM, adapter=adapter)
    live = _train(folder, config)
    precomputed = _train(folder, replace(config, precompute_reference=True))
    assert float((live - precomputed).norm() / live.norm()) < 1e-4


@pytest.mark.parametrize("adapter", [ADAPTER, FULL, replace(FULL, master_weights=False)], ids=["lora", "full", "bare"])
def test_a_live_reference_computes_in_the_format_of_the_policy(folder: Path, adapter: AdapterConfig) -> None:
    """Else the first loss would be ln 2 but for the rounding of bfloat16, and every later one would carry it on."""
    config = DpoConfig(optim=OPTIM, adapter=adapter)
    half = ModelConfig(source=BASE_SOURCE, dtype=Dtype.bfloat16)
    context = StageContext(spec=tiny_spec(folder, config, model=half), rank=0, world_size=1)
    dpo.run(config, context)
    first = MetricsLog(context.content / "metrics.jsonl").rows()[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_reference_is_computed_once_and_again_when_something_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    sums = OwnRows.sums

    def noted(self: OwnRows, answer: str, *, micro_batches: int | None = None) -> torch.Tensor:
        if micro_batches is None:
            computed.append(len(self.rows))
        return sums(self, answer, micro_batches=micro_batches)

    monkeypatch.setattr(OwnRows, "sums", noted)
    config = DpoConfig(optim=OPTIM, adapter=ADAPTER, precompute_reference=True)
    _train(folder, config)
    assert computed == [12, 12]
    _train(folder, replace(config, beta=0.5))
    assert computed == [12, 12]
    write_rows(folder / "data.jsonl", pairs=True, rows=10)
    _train(folder, config)
    assert computed == [12, 12, 10, 10]
    save_tiny_model(folder / "base", seed=1)
    _train(folder, config)
    assert computed == [12, 12, 10, 10, 10, 10]
    monkeypatch.setattr(reference, "_device_name", lambda device: f"not {device.type}")
    _train(folder, config)
    assert computed == [12, 12, 10, 10, 10, 10, 10, 10]


def test_a_file_with_the_numbers_of_another_policy_is_computed_again(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In bfloat16, another processor's numbers differ, too."""
    config = DpoConfig(optim=OPTIM, adapter=ADAPTER, precompute_reference=True)
    weights = _train(folder, config)
    (file,) = folder.rglob("reference-*.safetensors")
    whole = load_file(file)
    save_file({**whole, "rejected": whole["rejected"] - 0.3}, file)
    assert torch.equal(_train(folder, config), weights)
    assert "computed again" in caplog.text
    assert torch.equal(load_file(file)["rejected"], whole["rejected"])


def test_weights_in_another_format_have_a_reference_of_their_own(folder: Path) -> None:
    half = ModelConfig(source=BASE_SOURCE, dtype=Dtype.bfloat16)
    for adapter in (ADAPTER, FULL, replace(FULL, master_weights=False)):
        config = DpoConfig(optim=OPTIM, adapter=adapter, precompute_reference=True)
        _train(folder, config, model=half)
    assert len(list((folder / "artifacts/cache").glob("reference-*"))) == 2, "frozen and bare weights are both bfloat16"


def test_each_length_of_a_prefix_has_a_reference_of_its_own(folder: Path) -> None:
    """A new prefix changes the policy at once, because its keys take a share of the attention."""
    for adapter in (ADAPTER, PREFIX, replace(PREFIX, virtual_tokens=8)):
        _train(folder, DpoConfig(optim=OPTIM, adapter=adapter, precompute_reference=True), below=0.7)
    assert len(list((folder / "artifacts/cache").glob("reference-*"))) == 3


@pytest.mark.parametrize("damage", [b"", b"\x08", None], ids=["empty", "cut", "too short"])
def test_a_damaged_reference_is_computed_anew_and_put_right(
    folder: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    config = DpoConfig(optim=OPTIM, adapter=ADAPTER, precompute_reference=True)
    weights = _train(folder, config)
    (file,) = folder.rglob("reference-*.safetensors")
    whole = file.read_bytes()
    if damage is None:
        save_file({"chosen": torch.zeros(1), "rejected": torch.zeros(1)}, file)
    else:
        file.write_bytes(damage)
    assert torch.equal(_train(folder, config), weights)
    assert file.read_bytes() == whole
    assert ("is damaged" in caplog.text) is (damage is not None)
