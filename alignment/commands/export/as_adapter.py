"""``--as adapter``: the one adapter of a policy for PEFT, on its base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from peft import PeftModel

from alignment.commands.export.comparing import logprobs, refuse_differences, stream_logprobs
from alignment.commands.export.exported import ExportedResult
from alignment.commands.shared.generation_settings import generation_settings
from alignment.core.artifacts import REWARD_MODEL
from alignment.core.errors import DataError, ModelError
from alignment.models.assembly.adapters import put_back
from alignment.models.assembly.load import load_policy
from alignment.models.forward.head import scales_logits


def write_adapter(result: ExportedResult, folder: Path) -> list[str]:
    """Copies the adapter's folder as PEFT wrote it; it must be the only difference between the base and the policy.

    ``generation_config.json`` is that of the policy, as in the other forms.

    Raises:
        ModelError: the result is not one adapter on a public base, or it gives other outputs when PEFT loads it.
    """
    lineage = result.lineage
    if result.manifest.kind == REWARD_MODEL:
        raise ModelError(
            "an adapter cannot hold the head of a reward model and its offset", remedy="export it as a model"
        )
    if len(lineage.adapters) != 1 or lineage.source == "self":
        stack = " on ".join(adapter.path.name for adapter in reversed(lineage.adapters)) or "no adapter"
        raise ModelError(
            f"it is not a single adapter on a public base, but {stack} on {lineage.source}",
            remedy="export it as a model",
        )
    shutil.copytree(lineage.adapters[0].path, folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"], config["revision"] = _base_for_peft(result)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    # PEFT does not read it; the card's lines do, because the base ends answers and samples in its own way.
    generation_settings(_stops(result), result.tokenizer.pad_token_id).save_pretrained(str(folder))
    original = put_back(load_policy(lineage.weights, torch.float32), [lineage.adapters[0].path], trainable=False)
    policy = original.get_base_model()
    # The flat forward, which supports a prefix, leaves out what a model does to its logits.
    expected = logprobs(original, result.rows) if scales_logits(policy) else stream_logprobs(policy, result.rows)
    again = PeftModel.from_pretrained(load_policy(lineage.weights, torch.float32), str(folder)).eval()
    refuse_differences(logprobs(again, result.rows), expected, folder)
    notes = [
        "loaded by PEFT on its base, it gives the same outputs on the test texts as the policy of this run",
        f"whoever loads it needs the base: {lineage.base}",
    ]
    if lineage.adapters[0].nf4:
        notes.append(
            "it was trained on a base in four bits (NF4, double quantisation), so load the base in the same way"
        )
    return notes


def _stops(result: ExportedResult) -> list[int]:
    """The tokens that end an answer; the template ends no turn where none was learned, as in continued pretraining."""
    try:
        return result.stops
    except DataError:
        return result.text_ends


def _base_for_peft(result: ExportedResult) -> tuple[str, str | None]:
    """The base's name on the hub and its commit, or its folder; the revision in the recipe may be a branch."""
    source, content = result.lineage.source, result.manifest.base["content"]
    if not source.startswith("hub:"):
        return str(result.lineage.base), None
    name, _, revision = str(content or source).removeprefix("hub:").partition("@")
    return name, revision or None
