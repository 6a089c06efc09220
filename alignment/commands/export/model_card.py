"""A model card: what a result is, its origin, its measurements, and what is unknown about it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alignment.commands.export.export_options import GGUF, VLLM
from alignment.commands.export.provenance import Measured, Provenance, Step, value_without_folders, without_folders
from alignment.core.artifacts import FROM_OUTSIDE, POLICY, REWARD_MODEL, Manifest
from alignment.pipeline.sources import bundled_model
from alignment.records.interval import Interval
from alignment.stages.base import ResultTable

_CLASS = {POLICY: "AutoModelForCausalLM", REWARD_MODEL: "AutoModelForSequenceClassification"}


def usage_lines(manifest: Manifest, form: str, files: Sequence[str], turn_end: str | None) -> list[str]:
    """Markdown with commands or Python; ``turn_end`` is the token that ends a turn, None without a chat template."""
    if form == GGUF:
        (file,) = (name for name in files if name.endswith(".gguf"))
        ollama = [f"$ ollama create {manifest.stage} -f Modelfile", f"$ ollama run {manifest.stage}"]
        ollama = ollama if "Modelfile" in files else []
        return ["```console", *ollama, f"$ llama-server --model {file} --jinja", "```"]
    served = ["```bash", "vllm serve .  # in this folder", "```", ""] if form == VLLM else []
    return [*served, "```python", *_python(manifest, form, turn_end), "```"]


def _python(manifest: Manifest, form: str, turn_end: str | None) -> list[str]:
    kind = _CLASS[manifest.kind]
    if form == "adapter":
        return [
            "from peft import PeftModel",
            f"from transformers import {kind}, AutoTokenizer, GenerationConfig",
            "",
            f'base = {kind}.from_pretrained("FOLDER_OF_THE_BASE", dtype="float32")  # as they were compared',
            'base.generation_config = GenerationConfig.from_pretrained("FOLDER")  # its own may end answers elsewhere',
            'model = PeftModel.from_pretrained(base, "FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        ]
    whole = ', dtype="float32")  # which does not round its head' if manifest.kind == REWARD_MODEL else ")"
    loaded = [
        f"from transformers import {kind}, AutoTokenizer",
        "",
        f'model = {kind}.from_pretrained("FOLDER"{whole}',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
    ]
    return [*loaded, *(_score(turn_end) if manifest.kind == REWARD_MODEL else _answer(turn_end))]


def _answer(turn_end: str | None) -> list[str]:
    """Generates as evaluations do unless their settings say otherwise: the most likely tokens."""
    if turn_end is None:
        ids = ['ids = tokenizer("…", return_tensors="pt")']
    else:
        ids = [
            'turns = [{"role": "user", "content": "…"}]',
            "prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)",
            'ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")',
        ]
    return [
        *ids,
        "answer = model.generate(**ids, max_new_tokens=256, do_sample=False)  # without it: sampled at temperature 1",
        "print(tokenizer.decode(answer[0]))",
    ]


def _score(turn_end: str | None) -> list[str]:
    """Scores a conversation at the end of its last turn; the template may add a line break, which was not trained."""
    if turn_end is None:
        return []
    end = json.dumps(turn_end, ensure_ascii=False)
    return [
        'turns = [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]',
        "text = tokenizer.apply_chat_template(turns, tokenize=False)",
        f"text = text[: text.rindex({end}) + {len(turn_end)}]  # the score is that of {end}, which ends the answer",
        'ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")',
        "print(model(**ids).logits[0, 0])",
    ]


_LIBRARY = {"model": "transformers", "adapter": "peft", GGUF: "gguf", VLLM: "vllm"}
_TASK = {POLICY: "text-generation", REWARD_MODEL: "text-classification"}
_OF_OPTIM = ("lr", "batch_size", "epochs", "max_steps", "schedule", "warmup_ratio", "weight_decay", "max_grad_norm")
_OF_ADAPTER = {
    "full": ("kind", "master_weights"),
    "prefix": ("kind", "virtual_tokens", "chain"),
    "low-rank": ("kind", "rank", "alpha", "rslora", "dropout", "target_modules", "modules_to_save", "chain"),
}
_ELSEWHERE = ("kind", "adapter", "optim", "data")
"""Settings of a stage that have their own lines."""


def model_card(
    manifest: Manifest,
    origin: Provenance,
    *,
    form: str,
    turn_end: str | None,
    notes: Sequence[str],
    files: Sequence[str] = (),
) -> str:
    """Markdown with a header for model hubs; ``notes`` are sentences about this export, ``files`` its files.
    ``turn_end`` is the token that ends a turn; None without a chat template. Folders of this machine are left out,
    because the card may be published."""
    sections = [
        _header(manifest, origin, form),
        _opening(manifest, origin),
        usage_lines(manifest, form, files, turn_end),
        [f"- {_published(note)}" for note in notes],
        ["## What was measured", "", *_measured(manifest, origin)],
        ["## Intended use and limits", "", *_limits(manifest, origin)],
        ["## Where it comes from", "", *_chain(manifest, origin)],
        ["## How to reproduce it", "", *_again(manifest, origin)],
    ]
    return "\n\n".join("\n".join(section) for section in sections if section) + "\n"


def _header(manifest: Manifest, origin: Provenance, form: str) -> list[str]:
    scheme, _, rest = str(manifest.base["source"]).partition(":")
    hubs = [
        name.removeprefix("hub:").partition("@")[0] for step in origin.steps for name in step.data if name[:4] == "hub:"
    ]
    kinds = dict.fromkeys(step.manifest.identity["kind"] for step in origin.steps)
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


def _opening(manifest: Manifest, origin: Provenance) -> list[str]:
    kind = "reward model" if manifest.kind == REWARD_MODEL else "policy"
    own = manifest.base["source"] == "self"
    source = value_without_folders(str(manifest.base["source"]))
    base = "All weights were trained." if own else f"Its base is `{source}`."
    stage = f"A {kind} trained by the stage `{manifest.stage}` ({manifest.identity['kind']}) of alignment-pipeline."
    is_outside = manifest.identity["kind"] == FROM_OUTSIDE
    made = "An adapter that PEFT saved, which alignment-pipeline did not train." if is_outside else stage
    scaled = f"The recipe was run under the profile `{origin.profile}`, which changes its settings."
    if origin.profile == "smoke":
        scaled = "It comes from a smoke run (`profile=smoke`), which shows only that the recipe runs; do not use it."
    return [
        f"# {manifest.stage}",
        "",
        *([scaled, ""] if origin.profile else []),
        f"{made} {base}",
        "",
        f"Licence: {_licence(manifest)}",
    ]


def _published(note: str) -> str:
    """A note without folders of the machine; behind its last colon may be a path with spaces."""
    words, colon, value = note.rpartition(": ")
    return f"{without_folders(words)}{colon}{value_without_folders(value)}"


def _licence(manifest: Manifest) -> str:
    scheme, _, name = str(manifest.base["source"]).partition(":")
    if scheme == "bundled" and name in bundled_model.MODELS:
        base = bundled_model.MODELS[name].licence
        return f"{base} (the base). The licences of the training data apply too; they are not recorded here."
    return "the licences of the base and of the training data apply; they are not recorded here."


def _measured(manifest: Manifest, origin: Provenance) -> list[str]:
    lines = ["At the end of training:", "", "| metric | value |", "|---|---|"] if manifest.metrics else []
    lines += [f"| {name} | {value:.4g} |" for name, value in manifest.metrics.items()]
    for table in origin.own:
        lines += ["", *_table(table, list(table.columns), list(table.columns.values()), f"{table.title}: {table.note}")]
    if manifest.kind == REWARD_MODEL:
        return lines
    lines += ["", *_evaluated(origin.evaluation)]
    if origin.forgetting is not None:
        lines += ["", *_forgot(origin.forgetting)]
    return [*lines, *(line for result in origin.others for line in _tabled(result))]


def _tabled(result: Measured) -> Iterator[str]:
    for table in result.record:
        columns = [key for key in table.columns if key == result.arm or key not in table.of_arms]
        if result.arm not in columns:
            continue
        headings = ["value" if key == result.arm else table.columns[key] for key in columns]
        introduction = f"In `{result.manifest.stage}` (`{result.manifest.fingerprint[:8]}`): {table.note}"
        yield ""
        yield from _table(table, columns, headings, introduction)


def _table(table: ResultTable, columns: list[str], headings: list[str], introduction: str) -> Iterator[str]:
    at = [list(table.columns).index(key) for key in columns]
    yield from (introduction, "", f"| {' | '.join(('', *headings))} |", f"|{'---|' * (len(columns) + 1)}")
    for label, cells in table.rows:
        texts = [f"{cells[index].text} {cells[index].bounds}".rstrip() for index in at]
        yield f"| {' | '.join((label, *texts))} |"


def _evaluated(judged: Measured | None) -> list[str]:
    if judged is None:
        return ["No evaluation of it is recorded."]
    evaluation = judged.record
    compared = [pair for pair in evaluation.comparisons if judged.arm.name in (pair.arm, pair.against)]
    prompts = "" if evaluation.num_prompts is None else f" on {evaluation.num_prompts} held-out prompts"
    if prompts and evaluation.num_compared != evaluation.num_prompts:  # fewer have a grade by the primary metric
        prompts += f", {evaluation.num_compared} of them graded in every arm"
    lines = [f"As an arm of an evaluation{prompts} (`{judged.manifest.fingerprint[:8]}`):", ""]
    lines += ["| metric | mean | 95 % interval |", "|---|---|---|"]
    for name, value in _values(judged):
        bounds = "" if value.bounds is None else f"{value.bounds[0]:.4g} to {value.bounds[1]:.4g}"
        lines.append(f"| {name} | {value.mean:.4g} | {bounds} |")
    lines.append("")
    for pair in compared:
        interval = f"{pair.difference:+.3f} ({pair.low:+.3f} to {pair.high:+.3f}) in {evaluation.primary}"
        verdict = f"{interval}{pair.p_in_words}, {evaluation.verdict(pair)}"
        lines.append(f"- {_arm(pair.arm)} against {_arm(pair.against)}: {verdict}")
    return lines


def _values(judged: Measured) -> Iterator[tuple[str, Interval]]:
    """All measured values, with the direction of each metric, and win rates with judge and opponent."""
    metrics = {metric.name: metric for metric in judged.record.metrics}
    for name, value in judged.arm.all_metrics.items():
        if name in metrics:
            yield f"{name} ({'more' if metrics[name].higher_is_better else 'less'} is better)", value
        elif name != "win_rate":
            yield name, value
    if (judge := judged.record.judge) is not None:
        for pair in judge.pairs:
            if pair.arm == judged.arm.name and pair.win_rate is not None:
                yield f"win rate against {_arm(pair.against)}, by {value_without_folders(judge.name)}", pair.win_rate


def _forgot(measured: Measured) -> list[str]:
    """How much the policy forgot of the base's abilities, and whether that is within the limits."""
    arm, limits = measured.arm, measured.record.limits
    lines = [
        f"Compared with its base, in a measurement of forgetting (`{measured.manifest.fingerprint[:8]}`):",
        "",
        "| change | mean | 95 % interval | limit |",
        "|---|---|---|---|",
    ]
    for name, change, limit in (
        ("rise of the perplexity of general text", arm.rise, limits.perplexity_rise),
        ("drop of the share of right answers", arm.drop, limits.ability_drop),
    ):
        most = "none" if limit is None else f"{limit:+.1%}"
        mean = "–" if change is None else f"{change.mean:+.1%}"
        bounds = change.bounds if change is not None else None
        low_to_high = "–" if bounds is None else f"{bounds[0]:+.1%} to {bounds[1]:+.1%}"
        lines.append(f"| {name} | {mean} | {low_to_high} | {most} |")
    verdict = "It passed." if arm.passed else f"It forgot too much: {'; '.join(arm.reasons)}."
    return [*lines, "", verdict if limits.judge else "It was not judged: no limits were set."]


def _arm(name: Any) -> str:
    return str(name).removeprefix("stage:")


def _limits(manifest: Manifest, origin: Provenance) -> list[str]:
    if manifest.kind == REWARD_MODEL:
        use = "Scoring answers of the kind that it was trained on, as a part of training or judging other models."
    else:
        use = "Answering prompts of the kind that it was trained on."
    lines = [f"- {use} Other uses were not tested."]
    measured = origin.evaluation is not None or origin.forgetting is not None or bool(origin.others)
    if manifest.kind == POLICY and not measured:
        lines.append("- Nothing was measured except what training logs: whether it is better than its base is unknown.")
    lines.append("- Its answers were not checked for truth, safety, bias or memorised text, beyond the values above.")
    lines.append("- It has the limits of its base; see the base's own card.")
    return lines


def _chain(manifest: Manifest, origin: Provenance) -> list[str]:
    kinds = " → ".join(f"{step.manifest.stage} ({step.manifest.identity['kind']})" for step in origin.steps)
    lines = [f"base → {kinds}", ""]
    for step in origin.steps:
        lines += _step(step)
    if origin.lost:
        lines.append(f"- artifacts not found, so not described here: {'; '.join(origin.lost)}")
    options = []
    if chosen := manifest.identity.get("base", {}).get("template_options"):
        given = json.dumps(chosen, ensure_ascii=False)
        options = [
            f"- options of the chat template, as defaults in it: `{given}`. A server that sends values of its own, as "
            f"llama-server does for `enable_thinking`, must be given them: `--chat-template-kwargs '{given}'`"
        ]
    lines += [
        f"- adapters, bottom first: {' → '.join(manifest.adapters) or 'none'}",
        f"- tokenizer `{manifest.tokenizer_sha256[:12]}`, chat template `{manifest.chat_template_sha256[:12]}`",
        *options,
        "- all settings: `lineage.json`",
    ]
    return lines


def _step(step: Step) -> list[str]:
    manifest = step.manifest
    config, base = manifest.identity.get("config", {}), manifest.identity.get("base", {})
    data = ", ".join(f"`{name}`" for name in step.data) or "a source whose name is not recorded"
    inputs = ", ".join(
        f"{name} `{value[:12] if ':' not in value else value}`" for name, value in manifest.inputs.items()
    )
    if manifest.identity["kind"] == FROM_OUTSIDE:
        return [f"- **{manifest.stage}**, fingerprint `{manifest.fingerprint}`; base content `{base.get('content')}`"]
    identity = manifest.identity  # rows of another stage have no hash of their own: the inputs name that stage
    contents = [content for content in (identity.get("data"), *identity.get("extra_data", {}).values()) if content]
    hashes = f"; content `{', '.join(map(str, contents))}`" if contents else ""
    adapter, optim = config.get("adapter", {}), config.get("optim", {})
    others = _flat({name: value for name, value in config.items() if name not in _ELSEWHERE})
    names = _OF_ADAPTER.get(adapter.get("kind", ""), _OF_ADAPTER["low-rank"])
    return [
        f"- **{manifest.stage}** ({manifest.identity['kind']}), fingerprint `{manifest.fingerprint}`",
        f"  - takes {inputs or 'the base'}; base content `{base.get('content')}`, computed in {base.get('dtype')}",
        f"  - data: {data}{hashes}",
        *([f"  - adapter: {_settings(adapter, names)}"] if adapter else []),
        *([f"  - optimiser: {_settings(optim, _OF_OPTIM)}"] if optim else []),
        f"  - settings: {_settings(others, list(others))}; seed {manifest.identity.get('seed')}",
    ]


def _flat(tree: Mapping[str, Any], ahead: str = "") -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name, value in tree.items():
        settings |= _flat(value, f"{ahead}{name}.") if isinstance(value, dict) else {ahead + name: value}
    return settings


def _settings(config: Mapping[str, Any], names: Sequence[str]) -> str:
    pairs = [(name, config[name]) for name in names if config.get(name) not in (None, [], "")]
    texts = [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in pairs]
    return ", ".join(f"{name} {value_without_folders(text)}" for name, text in texts)


def _again(manifest: Manifest, origin: Provenance) -> list[str]:
    made = f"made {manifest.created or 'at an unknown time'}"
    commit = f" at commit {manifest.git_commit}" if manifest.git_commit else ""
    lines = ["```console", f"$ {shlex.join(origin.command)}", "```", ""] if origin.command else []
    if not origin.command:
        lines = ["The command that made it is not recorded.", ""]
    versions = ", ".join(f"{package} {version}" for package, version in manifest.versions.items())
    return [*lines, f"- {made}{commit}", f"- {versions or 'versions were not recorded'}"]
