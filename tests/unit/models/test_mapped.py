"""Weights that stay in their file compute what copies of them compute, and become these copies when asked to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from alignment.models.assembly.load import Lineage, frozen_copy, load_policy
from alignment.models.assembly.mapped import copied_in_calls, copy_weights, is_mapped
from tests.tiny import save_tiny_model

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8]])


def stored(folder: Path, dtype: torch.dtype, architecture: str = "llama") -> Lineage:
    """A tiny model whose file has this dtype."""
    save_tiny_model(folder, architecture=architecture)
    model = load_policy(Lineage(source="self", base=folder, adapters=()), torch.float32)
    model.to(dtype).save_pretrained(str(folder))
    return Lineage(source="self", base=folder, adapters=())


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    scores: Tensor = model(IDS).logits
    return scores


@pytest.mark.parametrize(
    ("dtype", "architecture"),  # with tied heads and without
    [(torch.bfloat16, "llama"), (torch.float16, "qwen2"), (torch.float32, "llama")],
)
def test_calls_compute_with_copies_and_leave_nothing(tmp_path: Path, dtype: torch.dtype, architecture: str) -> None:
    lineage = stored(tmp_path / "base", dtype, architecture)
    whole, mapped = load_policy(lineage, torch.float32), load_policy(lineage, torch.float32, mapped=True)
    before = {name: (weight.data_ptr(), weight.dtype) for name, weight in mapped.named_parameters()}
    assert {held for _, held in before.values()} == {dtype}
    assert mapped.config.dtype is whole.config.dtype
    with copied_in_calls(mapped, CPU):
        assert torch.equal(logits(mapped), logits(whole))
        for weight in mapped.parameters():
            assert weight.isnan().all(), "no weight may be read outside of its module's call"
            assert weight.untyped_storage().nbytes() == 4
            assert weight.dtype is torch.float32
            assert not weight.requires_grad, "autocast would keep what it converts of a trained weight"
    assert {name: (weight.data_ptr(), weight.dtype) for name, weight in mapped.named_parameters()} == before
    assert all(weight.requires_grad for weight in mapped.parameters())


def test_copies_are_what_is_loaded_otherwise(tmp_path: Path) -> None:
    lineage = stored(tmp_path / "base", torch.bfloat16)
    whole, mapped = load_policy(lineage, torch.float32), load_policy(lineage, torch.float32, mapped=True)
    assert all(is_mapped(weight) for weight in mapped.parameters())
    copy_weights(mapped.parameters())
    assert not any(is_mapped(weight) for weight in mapped.parameters())
    for (name, copied), expected in zip(mapped.named_parameters(), whole.parameters(), strict=True):
        assert copied.dtype is torch.float32, name
        assert torch.equal(copied, expected), name


def test_a_copy_that_has_the_files_dtype_has_its_own_memory(tmp_path: Path) -> None:
    lineage = stored(tmp_path / "base", torch.float32)
    mapped = load_policy(lineage, torch.float32, mapped=True)
    before = {weight.data_ptr() for weight in mapped.parameters()}
    copy_weights(mapped.parameters())
    assert not before & {weight.data_ptr() for weight in mapped.parameters()}


def test_a_frozen_copy_stays_in_the_file_and_becomes_what_it_is_otherwise(tmp_path: Path) -> None:
    lineage = stored(tmp_path / "base", torch.float16)
    whole = frozen_copy(load_policy(lineage, torch.float32), torch.bfloat16)
    mapped = load_policy(lineage, torch.float32, mapped=True)
    reference = frozen_copy(mapped, torch.bfloat16)
    for weight, original in zip(reference.parameters(), mapped.parameters(), strict=True):
        assert weight is not original
        assert weight.data_ptr() == original.data_ptr()
        assert not weight.requires_grad
    copy_weights(reference.parameters())
    assert all(is_mapped(weight) for weight in mapped.parameters()), "the policy's are still to be copied"
    assert {weight.dtype for weight in reference.parameters()} == {torch.float32, torch.bfloat16}
    for (name, copied), expected in zip(reference.named_parameters(), whole.parameters(), strict=True):
        assert copied.dtype is expected.dtype, name
        assert torch.equal(copied, expected), name


def test_weights_in_several_formats_are_loaded_as_always(tmp_path: Path) -> None:
    lineage = stored(tmp_path / "base", torch.bfloat16)
    save_file({"another": torch.zeros(1)}, lineage.base / "another.safetensors")
    mapped = load_policy(lineage, torch.float32, mapped=True)
    assert not any(is_mapped(weight) for weight in mapped.parameters())
    assert {weight.dtype for weight in mapped.parameters()} == {torch.float32}
