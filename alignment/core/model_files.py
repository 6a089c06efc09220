"""What the files of a model say without loading it: positions, architecture, vocabulary, shapes of weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from alignment.core.errors import ModelError
from alignment.core.files import parse_json


def refuse_weights_elsewhere(folder: Path, *, where: str = "") -> None:
    """Checks that every index of the folder names files inside it; they may be links, as in a hub's cache. Raises
    ModelError: an index names a file outside the folder, or is damaged."""
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


def refuse_cut_weights(folder: Path, *, where: str = "") -> None:
    """Compares the size of every weights file of the folder with the size that its header gives; reads no weights.
    Raises ModelError: a file has another size, as after a download that was cut off, or its header cannot be read."""
    for file in sorted(folder.glob("*.safetensors")):
        size, header = file.stat().st_size, _header(file)
        if header is None:
            problem = "its header cannot be read"
        elif size != header.file_size:
            problem = f"it has {size:,} bytes, and its header describes {header.file_size:,}"
        else:
            continue
        raise ModelError(
            f"{file.name} is damaged or cut short: {problem}",
            where=where or str(folder),
            remedy=f"fetch the model again, after you deleted {file}",
        )


_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length")
"""Names in configurations for the longest sequence that a model reads."""
_FIRST_POSITIONS = "original_max_position_embeddings"
BEFORE_LONGER = " before LongRoPE changes its frequencies"
"""What errors say after the number of positions of a model with LongRoPE."""


def positions_in(folder: Path) -> int | None:
    """The longest sequence that the model in a folder reads; None if its configuration does not say. With LongRoPE they
    are those before its frequencies change, as of a loaded model (models/assembly/prefix.py). Raises ModelError: the
    configuration cannot be read."""
    groups = _configurations(folder)
    sizes = [group.get(name) for group in groups for name in _POSITIONS]
    longest = [size for size in sizes if isinstance(size, int)][:1]
    return min([*longest, *before_longer_frequencies(groups)], default=None)


def reason_of_positions(folder: Path) -> str:
    """What an error says after ``positions_in``: ``BEFORE_LONGER``, or nothing. Raises ModelError: the configuration
    cannot be read."""
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
    ``groups`` are configurations, of which only the settings of rotary positions are read."""
    sizes = [group.get(_FIRST_POSITIONS, rope.get(_FIRST_POSITIONS)) for group in groups for rope in _long_ropes(group)]
    return [size for size in sizes if isinstance(size, int)]


def _long_ropes(group: dict[str, Any]) -> list[dict[str, Any]]:
    ropes = [group[name] for name in ("rope_parameters", "rope_scaling") if isinstance(group.get(name), dict)]
    of_layers = [*ropes, *(own for rope in ropes for own in rope.values() if isinstance(own, dict))]
    return [rope for rope in of_layers if any(rope.get(name) in ("longrope", "su") for name in ("rope_type", "type"))]


def architecture_in(folder: Path) -> str:
    """The architecture of the model in a folder, as transformers names it; "" if its configuration does not say. Raises
    ModelError: the configuration cannot be read."""
    return str(_configurations(folder)[0].get("model_type") or "")


def vocabulary_in(folder: Path) -> int | None:
    """The number of token ids of the model in a folder; None if there is no configuration, or it does not say. Of a
    model beside whose text there is more, its configuration may say two numbers; then the larger one. Raises
    ModelError: the configuration cannot be read."""
    groups = _configurations(folder) if (folder / "config.json").is_file() else []
    return max((size for group in groups if isinstance(size := group.get("vocab_size"), int)), default=None)


def _configurations(folder: Path) -> list[dict[str, Any]]:
    file = folder / "config.json"
    try:
        config = parse_json(file.read_text(encoding="utf-8"))
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
    """The number formats of a model's weights on disk, as safetensors names them: ``{"BF16"}``. Files whose header
    cannot be read are left out; whoever loads them reports them."""
    headers = [_header(file) for file in folder.glob("*.safetensors")]
    return {str(entry["dtype"]) for header in headers if header is not None for entry in header.tensors.values()}


def shapes_of_weights(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a folder's safetensors files, by name; headers that cannot be read are left out."""
    return {
        name: tuple(entry["shape"])
        for file in sorted(folder.glob("*.safetensors"))
        if (header := _header(file)) is not None
        for name, entry in header.tensors.items()
        if fits(entry.get("shape"), list[int])
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Header:
    tensors: dict[str, dict[str, Any]]
    file_size: int


def _header(file: Path) -> _Header | None:
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length > file.stat().st_size:
            return None
        try:
            entries = parse_json(handle.read(length))
            tensors = {name: entry for name, entry in entries.items() if name != "__metadata__"}
            ends = [int(entry["data_offsets"][1]) for entry in tensors.values() if entry["dtype"]]
        except (ValueError, LookupError, TypeError, AttributeError):
            return None
    return _Header(tensors=tensors, file_size=8 + length + max(ends, default=0))


def _weight_map(index: Path, *, where: str) -> dict[str, Any]:
    try:
        content = parse_json(index.read_text(encoding="utf-8"))
        weight_map = content["weight_map"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = f"{index.name} is damaged: {type(error).__name__}: {error!s:.80}"
        raise ModelError(reason, where=where, remedy="fetch the model again") from error
    if not isinstance(weight_map, dict):
        raise ModelError(f"{index.name} is damaged: its weight_map is not an object", where=where)
    return weight_map


def fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` and everything in it has the type ``hint``, such as ``dict[str, int]``. A float may be None."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is dict:
        key, item = arguments
        return isinstance(value, dict) and all(fits(k, key) and fits(v, item) for k, v in value.items())
    if origin is list:
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return value is None or isinstance(value, (int, float))
    return isinstance(value, hint)
