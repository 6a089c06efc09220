"""What is wrong with a piece of code inside prose or a table: it names a verb, an option, a setting or a choice that is
not there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import yaml

from alignment.cli import VERBS
from alignment.config.run import BACKEND, GROUPS, conf_folder
from alignment.config.typed import convert
from alignment.pipeline.plan.compose import compose
from alignment.pipeline.plan.short_form import USE
from alignment.stages.registry import config_classes, kinds
from tests.documented.blocks import ROOT, Span
from tests.documented.checks import check_make
from tests.documented.setting_paths import all_options, choices, defaults, ending_in, options_of

MATRIX_AXES = ("stage", "adapter", "launcher")

OF_OTHERS = {
    *("--speculative-config", "--chat-template-kwargs", "--enforce-eager", "--no-enable-chunked-prefill"),
    "--jinja",
}
"""Options of vLLM and llama-server."""
NOT_SETTINGS = {"model.generate", "stage.sbatch"}
KEYS_OF_OTHERS = {"do_sample", "task", "dataset_path", "dataset_kwargs.revision", "metadata"} | {
    *("cost", "trade", "device", "stage", "wait", "at_once", "quiet")
}
"""Settings of transformers, of lm-evaluation-harness and of dataclasses, and arguments of the functions in Python."""
EXAMPLES = {"launch/backend=ours", "stages.dpo.bta=0.3"}
"""A file that the reader writes, and a misspelling that a plan refuses."""
_FILES = ["md", "yaml", "json", "jsonl", "py", "html", "txt", "log", "svg", "png", "csv", "parquet"]
_FREE = ("template_options", "columns", "placeholders")
"""Settings below which a key is the reader's own."""
_OVERRIDE = re.compile(r"~?([a-z][\w.]*|[a-z]+/[a-z]+)(@[\w.]+)?=(?!=)\S.*")
_PLACEHOLDER = re.compile(r"[A-Z]{2,}")


def faults(span: Span) -> Iterator[str]:
    """What is wrong with it; nothing if it is no code of ours."""
    words = span.text.split()
    if words[0] == "align" and len(words) > 1:
        yield from _command_faults(words[1:])
    elif words[0] == "make" and len(words) > 1:
        yield from _make_faults(span.text)
    elif _OVERRIDE.fullmatch(span.text) and span.text not in EXAMPLES:
        for override in _overrides(words):
            yield from _override_faults(override)
    elif re.fullmatch(r"[a-z_][a-z_0-9]*(\.[a-z_0-9]+)+", span.text) and span.text not in NOT_SETTINGS:
        yield from _path_faults(span.text)
    elif re.match(r"[a-z_]+: \S", span.text):
        yield from _setting_faults(span.text)
    is_of_module = words[0] in ("make", "python") or span.page.startswith("benchmarks/")
    yield from _option_faults(span.text, is_of_module=is_of_module)
    yield from _choice_faults(span.text)


def _command_faults(words: list[str]) -> Iterator[str]:
    verb, *rest = words
    if verb not in VERBS:
        if not _PLACEHOLDER.search(verb):
            yield f"no verb {verb}"
        return
    known = options_of(verb) | {"--help"}
    yield from (f"align {verb} has no {word}" for word in rest if word.startswith("--") and word not in known)
    for word in rest:
        if _OVERRIDE.fullmatch(word) and word not in EXAMPLES:
            yield from _override_faults(word)


def _make_faults(text: str) -> Iterator[str]:
    command = re.sub(r"\"[^\"]*\"|'[^']*'", "x", text).split()
    try:
        check_make(command)
    except AssertionError as error:
        yield str(error).partition("\n")[0]


def _option_faults(text: str, *, is_of_module: bool) -> Iterator[str]:
    known = all_options() | OF_OTHERS
    known |= _module_options() if is_of_module or "ARGS=" in text else set()
    for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text):
        if option not in known:
            yield f"no program has {option}"


@cache
def _module_options() -> frozenset[str]:
    """Options of the programs behind ``make bench``, ``prove`` and the like."""
    programs = [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "tests").glob("*/__main__.py")]
    declared = (re.findall(r"add_argument\(\s*\"(--[\w-]+)\"", file.read_text("utf-8")) for file in programs)
    axes = {f"--{axis}" for axis in MATRIX_AXES}  # which tests.matrix declares in a loop
    return frozenset(axes.union(*declared))


def _key(text: str) -> str:
    """The setting of an override, without names that are the reader's own."""
    key = re.split(r"[=@]", text.lstrip("~"), maxsplit=1)[0]
    return re.sub(rf"\b({'|'.join(_FREE)})\..*", r"\1", key)


def _overrides(words: list[str]) -> list[str]:
    return words if all("=" in word for word in words) else [" ".join(words)]


def _override_faults(override: str) -> Iterator[str]:
    """``KEY=VALUE`` composed on a recipe that has a stage of every kind; ``optim.lr=1`` may be of any kind."""
    key, _, value = override.partition("=")
    if key.partition("@")[0] in (*GROUPS, "profile"):
        yield from _file_faults(key.partition("@")[0], value)
        return
    paths = [path for path in ending_in(_key(override)) if not path.startswith("sweep.")]
    if not paths and key not in KEYS_OF_OTHERS:
        yield f"no setting {key}"
    elif paths and not _PLACEHOLDER.search(value) and "…" not in value:
        path = next(path for path in (key, *paths) if path in defaults())
        yield from _value_faults(override if key.startswith(path) else f"{path}={value}", path)


def _file_faults(group: str, value: str) -> Iterator[str]:
    names = re.findall(r"[\w]+", value)
    for name in names:
        if not _PLACEHOLDER.fullmatch(name) and not (conf_folder() / group / f"{name}.yaml").is_file():
            yield f"no {group} {name}"


@cache
def _value_faults(override: str, path: str) -> list[str]:
    kind = path.split(".")[1] if path.startswith("stages.") else "sft"
    other = [f"{BACKEND}=slurm"] if path.startswith("launch.backend.") else []
    added = [] if kind in ("sft", "reward", "dpo", "ppo", "evaluate", "report") else [f"+stage@stages.{kind}={kind}"]
    composition = compose("quickstart", [*other, *added, override])
    _, wrong = convert(composition.tree, config_classes())
    return [f"{fault.where}: {fault.message}" for fault in (*composition.faults, *wrong)]


def _path_faults(text: str) -> Iterator[str]:
    names = text.split(".")
    known = {name for path in defaults() for name in path.split(".")}
    own = names[0] in kinds() and names[1] in known
    if names[0] in known and names[-1] not in _FILES and not ending_in(text) and not own:
        yield f"no setting {text}"


def _setting_faults(text: str) -> Iterator[str]:
    try:
        tree = yaml.safe_load(re.sub(r",? *…(?= *[}\]])", "", text))
    except yaml.YAMLError:
        return
    for path, value in _leaves(tree, ""):
        known = ending_in(path)
        if not known and path not in KEYS_OF_OTHERS:
            yield f"no setting {path}"
        allowed = [choices().get(setting, [value]) for setting in known]
        if known and not any(value in some for some in allowed) and not _PLACEHOLDER.search(str(value)):
            yield f"{path} cannot be {value}"


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and not path.endswith((*_FREE, "stages")):
        for key, value in tree.items():
            if key == USE:
                continue  # the name of a file, not a setting
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def _choice_faults(text: str) -> Iterator[str]:
    for choice in re.findall(r"stage@stages\.\w+: (\w+)", text):
        if not (conf_folder() / "stage" / f"{choice}.yaml").is_file() and not _PLACEHOLDER.fullmatch(choice):
            yield f"no choice {choice} of stage"
