"""A model card: what a result is, what it came from, what was measured of it, and what is not known."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alignment.commands.export.provenance import Judged, Provenance, Remembered, Step, without_places
from alignment.core.artifacts import POLICY, REWARD_MODEL, Manifest
from alignment.pipeline.sources import bundled_model
from alignment.records.evaluation import Comparison, Evaluation
from alignment.records.interval import Interval

_LIBRARY = {"model": "transformers", "adapter": "peft"}
_CLASS = {POLICY: "AutoModelForCausalLM", REWARD_MODEL: "AutoModelForSequenceClassification"}
_TASK = {POLICY: "text-generation", REWARD_MODEL: "text-classification"}
_OF_OPTIM = ("lr", "batch_size", "epochs", "max_steps", "schedule", "warmup_ratio", "weight_decay", "max_grad_norm")
_OF_ADAPTER = {
    "full": ("kind", "master_weights"),
    "prefix": ("kind", "virtual_tokens", "chain"),
    "low-rank": ("kind", "rank", "alpha", "rslora", "dropout", "target_modules", "modules_to_save", "chain"),
}
_ELSEWHERE = ("kind", "adapter", "optim", "data")
"""Settings of a stage that are told apart from its others."""


def model_card(manifest: Manifest, found: Provenance, *, form: str, notes: Sequence[str]) -> str:
    """Markdown with the header that model hubs read; ``notes`` are sentences about this export."""
    parts = [
        _header(manifest, found, form),
        _opening(manifest, found),
        ["```python", *_usage(manifest, form), "```"],
        [f"- {note}" for note in notes],
        ["## What was measured", "", *_measured(manifest, found)],
        ["## Intended use and limits", "", *_limits(manifest, found)],
        ["## Where it comes from", "", *_chain(manifest, found)],
        ["## How to make it again", "", *_again(manifest, found)],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


# ---- what it is -----------------------------------------------------------------------------------------------------


def _header(manifest: Manifest, found: Provenance, form: str) -> list[str]:
    scheme, _, rest = str(manifest.base["source"]).partition(":")
    hubs = [
        one.removeprefix("hub:").partition("@")[0] for step in found.steps for one in step.data if one[:4] == "hub:"
    ]
    kinds = dict.fromkeys(step.manifest.identity["kind"] for step in found.steps)
    return [
        "---",
        f"library_name: {_LIBRARY[form]}",
        f"pipeline_tag: {_TASK[manifest.kind]}",
        "license: other",
        "license_name: of-base-and-data",
        *([f"base_model: {rest.partition('@')[0]}"] if scheme == "hub" else []),
        *([f"datasets: [{', '.join(dict.fromkeys(hubs))}]"] if hubs else []),
        f"tags: [alignment-pipeline, {', '.join(kinds)}]",
        "---",
    ]


def _opening(manifest: Manifest, found: Provenance) -> list[str]:
    kind = "reward model" if manifest.kind == REWARD_MODEL else "policy"
    own = manifest.base["source"] == "self"
    base = "All weights were trained." if own else f"Its base is `{_source(manifest)}`."
    scaled = f"The recipe was run under the profile `{found.profile}`, which changes its settings."
    if found.profile == "smoke":
        scaled = (
            "It comes from a smoke run (`profile=smoke`), which shows that the recipe runs; it is worth nothing else."
        )
    return [
        f"# {manifest.stage}",
        "",
        *([scaled, ""] if found.profile else []),
        f"A {kind} trained by the stage `{manifest.stage}` ({manifest.identity['kind']}) of alignment-pipeline. {base}",
        "",
        f"Licence: {_licence(manifest)}",
    ]


def _source(manifest: Manifest) -> str:
    return without_places(str(manifest.base["source"]))


def _licence(manifest: Manifest) -> str:
    """Only of a bundled base is the licence known here."""
    scheme, _, name = str(manifest.base["source"]).partition(":")
    if scheme == "bundled" and name in bundled_model.MODELS:
        base = f"that of the base ({bundled_model.MODELS[name].licence})"
        return f"{base} and of the data applies; that of the data is not recorded here."
    return "that of the base and of the data applies; neither is recorded here."


def _usage(manifest: Manifest, form: str) -> list[str]:
    kind = _CLASS[manifest.kind]
    if form == "adapter":
        return [
            "from peft import PeftModel",
            f"from transformers import {kind}, AutoTokenizer",
            "",
            f'base = {kind}.from_pretrained("FOLDER_OF_THE_BASE")',
            'model = PeftModel.from_pretrained(base, "FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        ]
    loaded = [
        f"from transformers import {kind}, AutoTokenizer",
        "",
        f'model = {kind}.from_pretrained("FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
    ]
    if manifest.kind != "policy":
        return loaded
    return [
        *loaded,
        'turns = [{"role": "user", "content": "…"}]',
        "prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)",
        'ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=256)[0]))",
    ]


# ---- what was measured ----------------------------------------------------------------------------------------------


def _measured(manifest: Manifest, found: Provenance) -> list[str]:
    lines = ["At the end of training:", "", "| figure | value |", "|---|---|"]
    lines += [f"| {name} | {value:.4g} |" for name, value in manifest.metrics.items()]
    if manifest.kind == REWARD_MODEL:
        return lines
    lines += ["", *_evaluated(found.evaluation)]
    return lines if found.forgetting is None else [*lines, "", *_forgot(found.forgetting)]


def _evaluated(judged: Judged | None) -> list[str]:
    if judged is None:
        return ["No evaluation of it is recorded beside it."]
    evaluation = judged.evaluation
    prompts = "" if evaluation.num_prompts is None else f" on {evaluation.num_prompts} held-out prompts"
    lines = [f"As an arm of an evaluation{prompts} (`{judged.manifest.fingerprint[:8]}`):", ""]
    lines += ["| figure | mean | 95 % interval |", "|---|---|---|"]
    lines += [f"| {name} | {value.mean:.4g} | {_bounds(value)} |" for name, value in _figures(judged)]
    return [*lines, "", *(_in_words(one, evaluation) for one in judged.comparisons)]


def _figures(judged: Judged) -> Iterator[tuple[str, Interval]]:
    """All that was measured, with the direction of each metric, and win rates that say by whom and against whom."""
    metrics = {metric.name: metric for metric in judged.evaluation.metrics}
    for name, value in judged.arm.figures.items():
        if name in metrics:
            yield f"{name} ({'more' if metrics[name].higher_is_better else 'less'} is better)", value
        elif name != "win_rate":
            yield name, value
    for pair in judged.verdicts:
        if pair.win_rate is not None and judged.evaluation.judge is not None:
            judge = without_places(judged.evaluation.judge.name)
            yield f"win rate against {_arm(pair.against)}, by {judge}", pair.win_rate


def _forgot(found: Remembered) -> list[str]:
    """What it lost of what the base could, and whether that is within the limits."""
    arm, limits = found.arm, found.limits
    lines = [
        f"Beside its base, in a measurement of forgetting (`{found.manifest.fingerprint[:8]}`):",
        "",
        "| figure | mean | 95 % interval | limit |",
        "|---|---|---|---|",
    ]
    for name, change, limit in (
        ("rise of the perplexity of general text", arm.rise, limits.perplexity_rise),
        ("drop of the share of right answers", arm.drop, limits.ability_drop),
    ):
        most = "none" if limit is None else f"{limit:+.1%}"
        lines.append(f"| {name} | {_change(change)} | {most} |")
    verdict = "It passed." if arm.passed else f"It forgot too much: {'; '.join(arm.reasons)}."
    return [*lines, "", verdict if limits.judge else "It was not judged: no limits were set."]


def _change(change: Interval | None) -> str:
    """The mean and its interval, as two cells of a table."""
    if change is None or change.bounds is None:
        return "– | –" if change is None else f"{change.mean:+.1%} | –"
    low, high = change.bounds
    return f"{change.mean:+.1%} | {low:+.1%} to {high:+.1%}"


def _bounds(figure: Interval) -> str:
    return "" if figure.bounds is None else f"{figure.bounds[0]:.4g} to {figure.bounds[1]:.4g}"


def _in_words(one: Comparison, evaluation: Evaluation) -> str:
    interval = f"{one.difference:+.3f} ({one.low:+.3f} to {one.high:+.3f}) in {evaluation.primary}"
    return f"- {_arm(one.arm)} against {_arm(one.against)}: {interval}, {evaluation.verdict(one)}"


def _arm(name: Any) -> str:
    return str(name).removeprefix("stage:")


# ---- limits, lineage, command ---------------------------------------------------------------------------------------


def _limits(manifest: Manifest, found: Provenance) -> list[str]:
    if manifest.kind == REWARD_MODEL:
        use = "Scoring answers of the kind that it was trained on, as a part of training or judging other models."
    else:
        use = "Answering prompts of the kind that it was trained on."
    lines = [f"- {use} Other uses were not looked at."]
    if manifest.kind == "policy" and found.evaluation is None and found.forgetting is None:
        lines.append(
            "- Nothing was measured of it but what training logs: whether it is better than its base is not known."
        )
    lines.append("- What it says was not checked for truth, safety, bias or memorised text, beyond the figures above.")
    lines.append("- It has the limits of its base, which its own card tells.")
    return lines


def _chain(manifest: Manifest, found: Provenance) -> list[str]:
    kinds = " → ".join(f"{step.manifest.stage} ({step.manifest.identity['kind']})" for step in found.steps)
    lines = [f"base → {kinds}", ""]
    for step in found.steps:
        lines += _step(step)
    if found.lost:
        lines.append(f"- not found beside it, so not told here: {'; '.join(found.lost)}")
    lines += [
        f"- adapters, bottom first: {' → '.join(manifest.adapters) or 'none'}",
        f"- tokenizer `{manifest.tokenizer_sha256[:12]}`, chat template `{manifest.chat_template_sha256[:12]}`",
        "- all settings: `lineage.json`",
    ]
    return lines


def _step(step: Step) -> list[str]:
    one = step.manifest
    config, base = one.identity.get("config", {}), one.identity.get("base", {})
    data = ", ".join(f"`{name}`" for name in step.data) or "a source whose name is not recorded"
    inputs = ", ".join(f"{name} `{value[:12] if ':' not in value else value}`" for name, value in one.inputs.items())
    adapter, optim = config.get("adapter", {}), config.get("optim", {})
    others = _flat({name: value for name, value in config.items() if name not in _ELSEWHERE})
    shown = _OF_ADAPTER.get(adapter.get("kind", ""), _OF_ADAPTER["low-rank"])
    return [
        f"- **{one.stage}** ({one.identity['kind']}), fingerprint `{one.fingerprint}`",
        f"  - takes {inputs or 'the base'}; base content `{base.get('content')}`, computed in {base.get('dtype')}",
        f"  - data: {data}; content `{_contents(one.identity)}`",
        *([f"  - adapter: {_settings(adapter, shown)}"] if adapter else []),
        *([f"  - optimiser: {_settings(optim, _OF_OPTIM)}"] if optim else []),
        f"  - settings: {_settings(others, list(others))}; seed {one.identity.get('seed')}",
    ]


def _contents(identity: Mapping[str, Any]) -> str:
    others = identity.get("extra_data", {}).values()
    return ", ".join(str(one) for one in (identity.get("data"), *others))


def _flat(tree: Mapping[str, Any], ahead: str = "") -> dict[str, Any]:
    """Settings by dotted name."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{ahead}{name}.") if isinstance(value, dict) else {ahead + name: value}
    return found


def _settings(config: Mapping[str, Any], names: Sequence[str]) -> str:
    """Those that are set."""
    told = [(name, config[name]) for name in names if config.get(name) not in (None, [], "")]
    shown = [f"{name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in told]
    return without_places(", ".join(shown))


def _again(manifest: Manifest, found: Provenance) -> list[str]:
    made = f"made {manifest.created or 'at an unknown time'}"
    commit = f" at commit {manifest.git_commit}" if manifest.git_commit else ""
    lines = ["```console", f"$ {shlex.join(found.command)}", "```", ""] if found.command else []
    if not found.command:
        lines = ["The command that made it is not recorded beside it.", ""]
    versions = ", ".join(f"{package} {version}" for package, version in manifest.versions.items())
    return [*lines, f"- {made}{commit}", f"- {versions or 'versions were not recorded'}"]
