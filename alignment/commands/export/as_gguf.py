"""``--as gguf``: one file for llama.cpp, and a Modelfile for Ollama."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig

from alignment.commands.export.export_options import GGUF_TYPES, ExportOptions
from alignment.commands.export.exported import ExportedResult, merged_policy
from alignment.commands.export.gguf_form.architectures import architecture_of, model_metadata
from alignment.commands.export.gguf_form.gguf_file import file_metadata, write_file
from alignment.commands.export.gguf_form.llama_cpp_check import check_by_llama
from alignment.commands.export.gguf_form.modelfile import modelfile
from alignment.commands.export.gguf_form.read_back import gap_of_file, refuse_other_metadata
from alignment.commands.export.gguf_form.vocabulary import vocabulary
from alignment.core.artifacts import REWARD_MODEL
from alignment.core.errors import ModelError


def write_gguf(result: ExportedResult, folder: Path, options: ExportOptions) -> list[str]:
    """Writes the file, and the Modelfile unless it is not wanted; returns notes about them.

    Adapters are merged in float32, so that a weight is rounded once, to the file's type.

    Raises:
        ModelError: the result cannot be a GGUF file, merging or the type changed more than ``options.max_gap``, or the
            file is read otherwise by transformers or llama.cpp.
    """
    if result.manifest.kind == REWARD_MODEL:
        raise ModelError(
            "a GGUF file has no field for the head of a reward model and its offset", remedy="export it as a model"
        )
    dtype = options.dtype or GGUF_TYPES[0]
    file = folder / f"model-{dtype}.gguf"
    architecture_of(AutoConfig.from_pretrained(str(result.lineage.base)))  # refused before anything is merged
    merged, expected, notes = merged_policy(result, torch.float32, max_gap=options.max_gap)
    words = vocabulary(result.tokenizer, merged.config.vocab_size, result.stops)
    notes += words.notes
    folder.mkdir()
    if options.has_modelfile:
        text, about = modelfile(
            file.name,
            result.tokenizer,
            stops=words.stops,
            context=merged.config.max_position_embeddings,
            adds_bos=words.adds_bos,
        )
        (folder / "Modelfile").write_text(text, encoding="utf-8")
        notes += about
    name = f"{result.manifest.stage}-{result.manifest.fingerprint[:8]}"
    metadata = {**model_metadata(merged.config), "general.name": name, **file_metadata(dtype), **words.metadata}
    notes += write_file(file, merged, metadata, dtype)
    del merged  # reading back needs the memory
    refuse_other_metadata(file, metadata)
    gap = gap_of_file(file, result.rows, expected, dtype=dtype, max_gap=options.max_gap)
    notes.append(
        f"{dtype} costs {gap.mean_kl:.2g} nats of KL per token on the test texts, read by transformers in float32; the "
        f"largest change of a log-probability is {gap.largest:.3g}"
    )
    if options.llama_python is None:
        return [*notes, "it was not tested in llama.cpp (--llama-python)"]
    return notes + check_by_llama(
        Path(options.llama_python), file, result, expected, adds_bos=words.adds_bos, max_gap=options.max_gap
    )
