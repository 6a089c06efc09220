"""Reads and checks the files in a model's folder before transformers does.

Weights in several files come with an index that names them. A name outside the folder would load weights that its
fingerprint does not cover.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from alignment.core.errors import ModelError
from alignment.core.shapes import fits


def refuse_weights_elsewhere(folder: Path, *, where: str = "") -> None:
    """Checks that every index of the folder names files inside it; they may be links, as in a hub's cache.

    Raises:
        ModelError: an index names a file outside the folder, or is damaged.
    """
    for index in sorted(folder.glob("*.index.json")):
        for name in _weight_map(index, where=where or str(folder)).values():
            if not isinstance(name, str) or name in (".", "..") or Path(name).name != name:
                raise ModelError(
                    f"{index.name} names a weights file outside the folder: {name!r:.80}",
                    where=where or str(folder),
                    remedy="do not use this model; weights files must be in the folder of their index",
                )


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""The files of an adapter that PEFT saved."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter that PEFT saved, and not a whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length")
"""Names in configurations for the longest sequence that a model reads."""
_FIRST_POSITIONS = "original_max_position_embeddings"
BEFORE_LONGER = " before LongRoPE changes its frequencies"
"""What errors say after the number of positions of a model with LongRoPE."""


def positions_in(folder: Path) -> int | None:
    """The longest sequence that the model in a folder reads; None if its configuration does not say.

    With LongRoPE they are those before its frequencies change, as of a loaded model (models/assembly/prefix.py).

    Raises:
        ModelError: the configuration cannot be read.
    """
    groups = _configurations(folder)
    sizes = [group.get(name) for group in groups for name in _POSITIONS]
    longest = [size for size in sizes if isinstance(size, int)][:1]
    return min([*longest, *before_longer_frequencies(groups)], default=None)


def reason_of_positions(folder: Path) -> str:
    """What an error says after ``positions_in``: ``BEFORE_LONGER``, or nothing.

    Raises:
        ModelError: the configuration cannot be read.
    """
    return BEFORE_LONGER if before_longer_frequencies(_configurations(folder)) else ""


def row_too_long(tokens: int, positions: int, reason: str, *, where: str = "") -> ModelError:
    """The error for a row that a model cannot read; ``reason`` follows the number of its positions."""
    return ModelError(
        f"a row of {tokens} tokens is longer than the model's {positions} positions{reason}",
        where=where,
        remedy="lower max_length (or max_prompt_length and max_new_tokens)",
    )


def before_longer_frequencies(groups: Iterable[dict[str, Any]]) -> list[int]:
    """The positions up to which LongRoPE (Ding et al. 2024) has its short frequencies; empty for other models.

    ``groups`` are configurations, of which only the settings of rotary positions are read.
    """
    sizes = [group.get(_FIRST_POSITIONS, rope.get(_FIRST_POSITIONS)) for group in groups for rope in _long_ropes(group)]
    return [size for size in sizes if isinstance(size, int)]


def _long_ropes(group: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of LongRoPE in a configuration, of all layers or by their type."""
    ropes = [group[name] for name in ("rope_parameters", "rope_scaling") if isinstance(group.get(name), dict)]
    of_layers = [*ropes, *(own for rope in ropes for own in rope.values() if isinstance(own, dict))]
    return [rope for rope in of_layers if any(rope.get(name) in ("longrope", "su") for name in ("rope_type", "type"))]


def architecture_in(folder: Path) -> str:
    """The architecture of the model in a folder, as transformers names it; "" if its configuration does not say.

    Raises:
        ModelError: the configuration cannot be read.
    """
    return str(_configurations(folder)[0].get("model_type") or "")


def _configurations(folder: Path) -> list[dict[str, Any]]:
    """The model's configuration, and that of its language model if it has one of its own."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"not JSON: {error}", where=str(file)) from error
    if not isinstance(config, dict):
        raise ModelError("not a JSON object", where=str(file))
    text = config.get("text_config")
    return [config, text] if isinstance(text, dict) else [config]


def weights_size(folder: Path) -> int:
    """The bytes of a model's weights on disk."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def formats_of_weights(folder: Path) -> set[str]:
    """The number formats of a model's weights on disk, as safetensors names them: ``{"BF16"}``.

    Files whose header cannot be read are left out; whoever loads them reports them.
    """
    return {str(entry["dtype"]) for file in folder.glob("*.safetensors") for entry in _header(file).values()}


def shapes_of_weights(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a folder's safetensors files, by name; headers that cannot be read are left out."""
    return {
        name: tuple(entry["shape"])
        for file in sorted(folder.glob("*.safetensors"))
        for name, entry in _header(file).items()
        if fits(entry.get("shape"), list[int])
    }


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """A safetensors file's entries by the names of its tensors: eight bytes are the length of the JSON that follows."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length > file.stat().st_size:
            return {}
        try:
            entries = json.loads(handle.read(length))
        except (ValueError, RecursionError):
            return {}
    if not fits(entries, dict[str, dict[str, Any]]):
        return {}
    return {name: entry for name, entry in entries.items() if name != "__metadata__" and "dtype" in entry}


def _weight_map(index: Path, *, where: str) -> dict[str, Any]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        weight_map = content["weight_map"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError) as error:
        reason = f"{index.name} is damaged: {type(error).__name__}: {error!s:.80}"
        raise ModelError(reason, where=where, remedy="fetch the model again") from error
    if not isinstance(weight_map, dict):
        raise ModelError(f"{index.name} is damaged: its weight_map is not an object", where=where)
    return weight_map
