"""Exports a result for other libraries: ``worker ARTIFACT --base FOLDER --to FOLDER --as model|adapter``.

``align export`` calls it. Adapters are merged into the weights that they were trained on, after dequantising weights in
four bits. The difference that rounding the sum makes is measured and limited. The written folder is then loaded by
plain transformers or PEFT, and must give the expected outputs before the export is complete.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from alignment.commands.export.model_card import model_card
from alignment.commands.export.provenance import provenance, without_folders
from alignment.config.model import Dtype
from alignment.core.artifacts import REWARD_MODEL, Manifest, readable, verify
from alignment.core.errors import AlignmentError, ModelError
from alignment.core.files import explained
from alignment.core.streams import make_unfailing
from alignment.core.terminal import complain
from alignment.data.tokens.tokenize import STOPS, end_ids
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.models.assembly.adapters import is_prefix, put_back
from alignment.models.assembly.load import (
    DTYPES,
    Lineage,
    load_policy,
    load_scalar,
    load_scalar_head,
    products_in,
    saved_adapters,
)
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.flat import trunk_states, use_flat_attention
from alignment.models.forward.rows import stream
from alignment.models.kernels.nf4 import quantize_trunk

CPU = torch.device("cpu")
TEXTS = (
    "The shop is closed on Monday. The keys are with the caretaker in the hall.",
    "Write one sentence about the sea.",
    "def area(width, height):\n    return width * height\n",
    "1, 1, 2, 3, 5, 8, 13,",
    "Die Bahn nach Basel fährt um 9 Uhr 40 von Gleis 7.",
    '{"name": "tea", "price": 3.5}',
    "Q: Which is larger, a lake or a pond?\nA: A lake.",
    "The meeting was moved from Tuesday to Thursday because two people were ill, and nobody told the third.",
)
"""Rows on which a written model must give the outputs of the one in memory."""

RELOADED = 1e-4
"""Maximum difference of log-probabilities after a reload: equal weights, but computed by other code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """The effect of merging on the fixed rows: mean KL per token from the unmerged policy, and the largest change of a
    log-probability, both in nats."""

    mean_kl: float
    largest: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit code 0, or that of the error."""
    parser = argparse.ArgumentParser(prog="python -m alignment.commands.export.worker", description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument(
        "--base", type=Path, help="the folder of the base model; not needed if the artifact contains a model"
    )
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--as", dest="form", choices=("model", "adapter"), required=True)
    parser.add_argument("--run", help="the run whose evaluation the card describes, if several runs have this artifact")
    parser.add_argument("--max-gap", type=float, required=True, help="largest mean KL per token that merging may cause")
    options = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with explained(options.to.parent):
            print(
                export(
                    options.artifact,
                    options.base,
                    options.to,
                    form=options.form,
                    max_gap=options.max_gap,
                    run=options.run,
                )
            )
    except AlignmentError as error:
        complain(error)
        return error.exit_code
    return 0


def export(artifact: Path, base: Path | None, to: Path, *, form: str, max_gap: float, run: str | None = None) -> str:
    """Writes the folder ``to`` in one rename; returns notes about it.

    Raises:
        ModelError: the result cannot have this form, merging changed more than ``max_gap``, or the written model gives
            other outputs when it is loaded.
    """
    manifest = verify(artifact, content=True)
    own = manifest.base["source"] == "self"
    folder = artifact / "model" if own or base is None else base
    lineage = Lineage(source=manifest.base["source"], base=folder, adapters=saved_adapters(artifact, manifest))
    partial = to.with_name(f".{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer = load_tokenizer(artifact / "tokenizer", model=folder)
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    try:
        if form == "adapter" and manifest.kind == REWARD_MODEL:
            raise ModelError(
                "an adapter cannot hold the head of a reward model and its offset", remedy="export it as a model"
            )
        if form == "adapter":
            notes = _write_adapter(lineage, partial, rows)
        elif manifest.kind == REWARD_MODEL:
            notes = _write_reward(artifact, manifest, lineage, partial, rows, tokenizer)
        else:
            notes = _write_policy(manifest, lineage, partial, rows, tokenizer, max_gap=max_gap)
        tokenizer.save_pretrained(str(partial))
        _describe(artifact, manifest, partial, form=form, notes=notes, run=run)
        readable(partial)
        partial.rename(to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return "\n".join(notes)


def _describe(
    artifact: Path, manifest: Manifest, folder: Path, *, form: str, notes: Sequence[str], run: str | None
) -> None:
    """Writes the card and the manifests of all stages on the way, without folders of this machine."""
    origin = provenance(artifact, manifest, run)
    card = model_card(manifest, origin, form=form, notes=notes)
    (folder / "README.md").write_text(card, encoding="utf-8")
    steps = [_lineage(step.manifest) for step in origin.steps]
    (folder / "lineage.json").write_text(
        json.dumps({**steps[-1], "made_from": steps[:-1]}, indent=1, ensure_ascii=False), encoding="utf-8"
    )


def _lineage(manifest: Manifest) -> dict[str, Any]:
    record = {name: value for name, value in dataclasses.asdict(manifest).items() if name != "files"}
    record["base"] = {
        name: without_folders(str(value)) if name == "source" else value
        for name, value in manifest.base.items()
        if name != "path"
    }
    return record


# ---- policies -------------------------------------------------------------------------------------------------------


def _write_policy(
    manifest: Manifest, lineage: Lineage, folder: Path, rows: Sequence[list[int]], tokenizer: Any, *, max_gap: float
) -> list[str]:
    _refuse_prefix(lineage)
    dtype = Dtype(manifest.identity["base"]["dtype"])
    merged = load_policy(lineage, DTYPES[dtype])
    notes = []
    expected = _logprobs(merged, rows)
    if lineage.adapters:
        gap = gap_between(_logprobs(_as_trained(lineage, dtype), rows, dtype), expected)
        notes.append(
            f"merging changed log-probabilities by at most {gap.largest:.3g}, {gap.mean_kl:.2g} nats of KL per token"
        )
        if gap.mean_kl > max_gap:
            raise ModelError(
                f"{notes[0]}, more than {max_gap:g}",
                where=str(lineage.adapters[-1].path),
                remedy="export it as an adapter, or allow more by --max-gap",
            )
    merged.config.use_cache = True
    merged.generation_config.eos_token_id = _stops(tokenizer)
    merged.save_pretrained(str(folder))
    again = AutoModelForCausalLM.from_pretrained(str(folder), dtype=DTYPES[dtype], use_safetensors=True).eval()
    _refuse_differences(_logprobs(again, rows), expected, folder)
    return [*notes, "loaded by transformers, it gives the same outputs on the fixed rows"]


def _stops(tokenizer: Any) -> list[int]:
    """The tokens that end an answer here, so that ``generate`` stops at them too."""
    if not tokenizer.chat_template:
        return sorted({tokenizer.eos_token_id, *getattr(tokenizer, STOPS)})
    return sorted(end_ids(tokenizer))


def _as_trained(lineage: Lineage, dtype: Dtype) -> PeftModel:
    """The policy with its topmost adapters beside the weights, as in training."""
    model = load_policy(lineage.weights, DTYPES[dtype])
    if lineage.adapters[-1].nf4:
        quantize_trunk(model, CPU)
    return put_back(model, [adapter.path for adapter in lineage.beside], trainable=False)


def _write_adapter(lineage: Lineage, folder: Path, rows: Sequence[list[int]]) -> list[str]:
    """Copies the adapter's folder as PEFT wrote it; it must be the only difference between the base and the policy."""
    if len(lineage.adapters) != 1 or lineage.source == "self":
        stack = " on ".join(adapter.path.name for adapter in reversed(lineage.adapters)) or "no adapter"
        raise ModelError(
            f"it is not a single adapter on a public base, but {stack} on {lineage.source}",
            remedy="export it as a model",
        )
    shutil.copytree(lineage.adapters[0].path, folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    of_hub = lineage.source.partition(":")[2].partition("@")[0]
    config["base_model_name_or_path"] = str(lineage.base) if lineage.source.startswith("path:") else of_hub
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    original = put_back(load_policy(lineage.weights, torch.float32), [lineage.adapters[0].path], trainable=False)
    expected = _stream_logprobs(original.get_base_model(), rows)
    again = PeftModel.from_pretrained(load_policy(lineage.weights, torch.float32), str(folder)).eval()
    _refuse_differences(_logprobs(again, rows), expected, folder)
    notes = ["loaded by PEFT on its base, it gives the same outputs on the fixed rows"]
    if lineage.adapters[0].nf4:
        notes.append("it was trained on weights in four bits (NF4, double quantisation): load its base in the same way")
    return notes


# ---- reward models --------------------------------------------------------------------------------------------------


def _write_reward(
    artifact: Path, manifest: Manifest, lineage: Lineage, folder: Path, rows: Sequence[list[int]], tokenizer: Any
) -> list[str]:
    """Writes a sequence classifier, whose score lacks our offset, because it has no field for it."""
    _refuse_prefix(lineage)
    dtype = DTYPES[Dtype(manifest.identity["base"]["dtype"])]
    model = load_scalar(lineage, dtype)
    load_scalar_head(model, artifact / "head.safetensors")
    offset = float(model.score_offset)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = True
    expected = _scores(model, rows)
    model.save_pretrained(str(folder))
    again = AutoModelForSequenceClassification.from_pretrained(str(folder), dtype=dtype, use_safetensors=True).eval()
    again.score.float()
    _refuse_differences(_scores(again, rows), expected, folder)
    return [
        f"its scores are those of training plus {offset:.4f}, the offset that makes chosen answers score 0",
        "loaded by transformers, it gives the same outputs on the fixed rows, one row at a time",
    ]


@torch.no_grad()
def _scores(model: PreTrainedModel, rows: Sequence[list[int]]) -> Tensor:
    """``[rows]``; row by row, because transformers finds a row's end by its pad id, which may be a real token here."""
    states = [model.base_model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
    scores: Tensor = model.score(torch.stack(states).to(model.score.weight.dtype))
    return scores.float().squeeze(-1)


# ---- comparing ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _logprobs(model: Any, rows: Sequence[list[int]], dtype: Dtype | None = None) -> Tensor:
    """``[tokens, vocabulary]`` of concatenated rows; ``dtype`` is that of products with float32 factors."""
    logprobs = []
    for row in rows:
        if dtype is None:
            logits = model(input_ids=torch.tensor([row])).logits[0]
        else:
            with products_in(dtype, CPU):
                logits = unwrapped(model)(input_ids=torch.tensor([row])).logits[0]
        logprobs.append(logits.float().log_softmax(-1))
    return torch.cat(logprobs)


@torch.no_grad()
def _stream_logprobs(model: PreTrainedModel, rows: Sequence[list[int]]) -> Tensor:
    """The same by the flat forward, which supports a prefix."""
    use_flat_attention(model)
    states = [trunk_states(model.base_model, stream([row], CPU)) for row in rows]
    logits: Tensor = model.get_output_embeddings()(torch.cat(states))
    return logits.float().log_softmax(-1)


def _refuse_prefix(lineage: Lineage) -> None:
    if any(is_prefix(adapter.path) for adapter in lineage.adapters):
        raise ModelError("a prefix cannot be merged into weights", remedy="export it as an adapter (--as adapter)")


def gap_between(before: Tensor, after: Tensor) -> Gap:
    """The gap between ``[tokens, vocabulary]`` log-probabilities."""
    kl = (before.exp() * (before - after)).sum(-1)
    return Gap(mean_kl=float(kl.mean()), largest=float((before - after).abs().max()))


def _refuse_differences(actual: Tensor, expected: Tensor, folder: Path) -> None:
    worst = float((actual - expected).abs().max())
    if worst > RELOADED:
        raise ModelError(
            f"the written model's outputs differ by {worst:.3g} from the expected ones; nothing was exported",
            where=str(folder),
        )


if __name__ == "__main__":
    make_unfailing()
    sys.exit(main())
