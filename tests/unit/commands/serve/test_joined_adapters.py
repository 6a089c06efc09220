"""The sum of adapters, against the matrices that they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignment.commands.serve.joined_adapters import write_sum
from alignment.core.errors import ModelError

Q, V = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.layers.0.self_attn.v_proj"
INPUTS, OUTPUTS = 6, 5


def saved(folder: Path, rank: int, modules: list[str], *, alpha: int, rslora: bool = False, seed: int) -> Path:
    """An adapter as PEFT writes it."""
    rng = torch.Generator().manual_seed(seed)
    factors = {}
    for module in modules:
        factors[f"{module}.lora_A.weight"] = torch.randn(rank, INPUTS, generator=rng)
        factors[f"{module}.lora_B.weight"] = torch.randn(OUTPUTS, rank, generator=rng)
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "use_rslora": rslora}
    names = [module.rpartition(".")[2] for module in modules]
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": names}))
    return folder


def change(folder: Path, module: str, scale: float) -> Tensor:
    """What an adapter adds to the weight of a module: ``[outputs, inputs]``, in float64 and entry by entry."""
    factors = load_file(folder / "adapter_model.safetensors")
    first, second = (factors[f"{module}.lora_{name}.weight"].double() for name in "AB")
    added = torch.zeros(OUTPUTS, INPUTS, dtype=torch.float64)
    for row in range(OUTPUTS):
        for column in range(INPUTS):
            for index in range(first.shape[0]):
                added[row, column] += scale * second[row, index] * first[index, column]
    return added


def test_the_sum_adds_to_each_weight_what_all_adapters_add(tmp_path: Path) -> None:
    first = saved(tmp_path / "first", 2, [Q, V], alpha=8, seed=1)
    second = saved(tmp_path / "second", 4, [Q], alpha=6, rslora=True, seed=2)
    write_sum([first, second], tmp_path / "deep" / "sum")
    config = json.loads((tmp_path / "deep/sum/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (6, 6, False)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    expected = {Q: change(first, Q, 8 / 2) + change(second, Q, 6 / 4**0.5), V: change(first, V, 8 / 2)}
    for module, added in expected.items():
        torch.testing.assert_close(change(tmp_path / "deep/sum", module, 6 / 6), added, rtol=1e-5, atol=1e-5)


def test_what_is_no_factor_is_refused(tmp_path: Path) -> None:
    first = saved(tmp_path / "first", 2, [Q], alpha=8, seed=1)
    save_file({f"{Q}.weight": torch.zeros(2, 2)}, first / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"holds .*q_proj\.weight, which is not a factor"):
        write_sum([first, first], tmp_path / "sum")
