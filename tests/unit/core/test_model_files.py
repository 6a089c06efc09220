"""A model's index cannot have weights read that lie elsewhere; its configuration says how long rows may be."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from alignment.commands.add_tokens.worker import _read
from alignment.config.model import Dtype
from alignment.core.errors import ModelError
from alignment.core.model_files import formats_of_weights, positions_in
from alignment.models.assembly.load import Lineage, load_policy
from alignment.pipeline.sources.model_sources import refuse_policy, resolve, resolve_shapes
from alignment.rewards.reward_models import load_external
from tests.tiny import save_tiny_model, tiny_tokenizer

READERS: dict[str, Callable[[Path], Any]] = {
    "a plan": lambda folder: resolve(f"path:{folder}", where="model.source"),
    "a stage": lambda folder: load_policy(Lineage(source="x", base=folder, adapters=()), torch.float32),
    "a scorer": lambda folder: load_external(folder, Dtype.float32, source="path:x"),
    "add-tokens": _read,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "model")
    tiny_tokenizer().save_pretrained(str(tmp_path / "model"))
    os.rename(tmp_path / "model/model.safetensors", tmp_path / "elsewhere.safetensors")
    (tmp_path / "model/other.safetensors").write_bytes(b"")
    return tmp_path / "model"


def _index(folder: Path, name: Any) -> None:
    keys = ["model.embed_tokens.weight"]
    content = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(keys, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/elsewhere.safetensors", 7])
def test_an_index_that_leads_out_of_its_folder_is_refused(reader: str, name: Any, folder: Path) -> None:
    _index(folder, name)
    with pytest.raises(ModelError, match=r"names a weights file outside the folder: .*(\.\.|/etc|7)"):
        READERS[reader](folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', "[" * 100_000, "\udcff"])
def test_a_damaged_index_is_a_clear_error(text: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json is damaged"):
        READERS["a plan"](folder)


def test_weights_in_several_files_are_read_also_where_these_are_links(folder: Path, tmp_path: Path) -> None:
    """So they lie in a hub's cache."""
    (folder / "other.safetensors").unlink()
    (folder / "model-00001.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    _index(folder, "model-00001.safetensors")
    assert READERS["a plan"](folder).ready
    assert READERS["a stage"](folder).num_parameters() > 0


def test_the_formats_of_weights_are_read_from_the_headers_of_all_files(tmp_path: Path) -> None:
    assert formats_of_weights(tmp_path) == set()
    save_file({"a": torch.zeros(2, dtype=torch.bfloat16), "b": torch.zeros(1)}, tmp_path / "1.safetensors")
    save_file({"c": torch.zeros(1, dtype=torch.float16)}, tmp_path / "2.safetensors", metadata={"format": "pt"})
    assert formats_of_weights(tmp_path) == {"BF16", "F32", "F16"}


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-5], lambda data: data + b"more", lambda data: data[:40], lambda data: b""]
)
def test_weights_that_were_cut_short_are_refused_before_anything_reads_them(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    save_tiny_model(tmp_path / "model")
    save_file({"more": torch.ones(3)}, tmp_path / "model/more.safetensors")
    assert READERS["a plan"](tmp_path / "model").ready
    file = tmp_path / "model/more.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    for find in (resolve, resolve_shapes):
        with pytest.raises(ModelError, match=r"more\.safetensors is damaged or cut short") as refused:
            find(f"path:{tmp_path / 'model'}", where="model.source")
        assert refused.value.where == "model.source"


LONG = {"max_position_embeddings": 131072}
FIRST = {"original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("settings", "positions"),
    [
        ({}, None),
        ({"text_config": LONG}, 131072),
        ({**LONG, **FIRST, "rope_scaling": {"type": "longrope"}}, 4096),
        ({**LONG, "rope_parameters": {"rope_type": "longrope", **FIRST}}, 4096),
        ({"text_config": {**LONG, "rope_parameters": {"full_attention": {"rope_type": "longrope", **FIRST}}}}, 4096),
        ({**LONG, "rope_scaling": {"rope_type": "yarn", **FIRST}}, 131072),
    ],
)
def test_a_model_with_longrope_reads_no_more_than_before_its_frequencies_change(
    tmp_path: Path, settings: dict[str, Any], positions: int | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert positions_in(tmp_path) == positions


def test_a_configuration_that_is_nested_too_deeply_is_a_clear_error(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    (tmp_path / "model/config.json").write_text("[" * 100_000)
    for read in (positions_in, lambda folder: refuse_policy(READERS["a plan"](folder), where="", advice="")):
        with pytest.raises(ModelError, match="not JSON"):
            read(tmp_path / "model")
