"""A model card written from an artifact's manifest: what it is, what it came from, and what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from alignment.artifacts import Manifest

_LIBRARY = {"model": "transformers", "adapter": "peft"}
_CLASS = {"policy": "AutoModelForCausalLM", "reward": "AutoModelForSequenceClassification"}


def model_card(manifest: Manifest, *, form: str, notes: Sequence[str]) -> str:
    """Markdown with the header that model hubs read; ``notes`` are sentences about this export."""
    identity, base = manifest.identity, manifest.base
    own_weights = base["source"] == "self"
    lines = [
        "---",
        f"library_name: {_LIBRARY[form]}",
        *([] if own_weights else [f"base_model: {base['source'].partition(':')[2].partition('@')[0]}"]),
        f"tags: [alignment-pipeline, {identity['kind']}]",
        "---",
        "",
        f"# {manifest.stage}",
        "",
        f"A {'reward model' if manifest.kind == 'reward' else 'policy'} trained by the stage `{manifest.stage}`"
        f" ({identity['kind']}) of alignment-pipeline. Its base is "
        + ("a model of its own, all weights of which were trained." if own_weights else f"`{base['source']}`.")
        + " The licence of the base and of the data apply to it.",
        "",
        "```python",
        *_usage(manifest, form),
        "```",
        "",
        *(f"- {note}" for note in notes),
        "",
        "## What was measured",
        "",
        "| figure | value |",
        "|---|---|",
        *(f"| {name} | {value:.4g} |" for name, value in manifest.metrics.items()),
        "",
        "## Where it comes from",
        "",
        f"- made {manifest.created or 'at an unknown time'}"
        + (f" at commit {manifest.git_commit}" if manifest.git_commit else ""),
        f"- fingerprint `{manifest.fingerprint}`; inputs "
        + (", ".join(f"{name} `{value}`" for name, value in manifest.inputs.items()) or "none"),
        f"- adapters, bottom first: {' → '.join(manifest.adapters) or 'none'}",
        "- " + ", ".join(f"{package} {version}" for package, version in manifest.versions.items()),
        "- all settings: `lineage.json`",
        "",
    ]
    return "\n".join(lines)


def _usage(manifest: Manifest, form: str) -> list[str]:
    if form == "adapter":
        return [
            "from peft import PeftModel",
            f"from transformers import {_CLASS[manifest.kind]}",
            "",
            f'base = {_CLASS[manifest.kind]}.from_pretrained("FOLDER_OF_THE_BASE")',
            'model = PeftModel.from_pretrained(base, "FOLDER")',
        ]
    return [
        f"from transformers import {_CLASS[manifest.kind]}, AutoTokenizer",
        "",
        f'model = {_CLASS[manifest.kind]}.from_pretrained("FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
    ]
