"""Chat templates: what they read, found in their syntax tree, their options, and those of TRL. Neither torch nor
transformers is imported, so a plan can look too."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from alignment.config.faults import Fault, nearest, suggestion
from alignment.core.errors import DataError
from alignment.core.files import parse_json, small_text

Templates = str | Mapping[str, str]
"""A chat template, or several by name, as tokenizers have them."""
INPUTS = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "raise_exception"}
    | {"strftime_now"}
    | {f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask", "image", "audio", "video")}
)
"""What a template is given whenever a conversation is rendered."""


class _Generation(Extension):
    """The block that marks an assistant's turn in templates of transformers; its body counts like any other."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=64)
def tree_of(template: str) -> nodes.Template:
    """The syntax tree of a template, in which the body of a ``generation`` block is part of the text around it. Raises
    DataError: the template is not valid Jinja."""
    environment = ImmutableSandboxedEnvironment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
    try:
        return environment.parse(template)
    except TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is not valid Jinja: line {error.lineno}: {error.message}",
            remedy="correct it, or set model.chat_template to another",
        ) from error


def each(templates: Templates) -> tuple[str, ...]:
    return (templates,) if isinstance(templates, str) else tuple(templates.values())


def options_of(templates: Templates) -> frozenset[str]:
    """The names that templates read and that no conversation gives them, such as ``enable_thinking``. A name that a
    template sets before it reads it is none, also where it is set in one branch only. Raises DataError: a template is
    not valid Jinja."""
    return frozenset(name for text in each(templates) for name in _options_of(text)) - INPUTS


def reads_tools(templates: Templates) -> bool:
    """Whether a template renders the tools that a conversation is given; the others leave them out. Raises DataError: a
    template is not valid Jinja."""
    return any("tools" in meta.find_undeclared_variables(tree_of(text)) for text in each(templates))


@functools.lru_cache(maxsize=64)
def _options_of(template: str) -> frozenset[str]:
    tree = tree_of(template)
    first_read: dict[str, bool] = {}
    for name, is_read in _names(tree):
        first_read.setdefault(name, is_read)
    return frozenset(name for name in meta.find_undeclared_variables(tree) if first_read[name])


def _names(node: nodes.Node) -> Iterator[tuple[str, bool]]:
    if isinstance(node, nodes.Name):
        yield node.name, node.ctx == "load"
    children = (node.node, node.target) if isinstance(node, nodes.Assign) else node.iter_child_nodes()
    for child in children:
        yield from _names(child)


def fields_of(templates: Templates) -> frozenset[str]:
    """The names that templates use as fields, and the texts that they look for in others. Examples:
    ``message.thinking``, ``message['thinking']``, ``'thinking' in message``, ``'</think>' in content``. Raises
    DataError: a template is not valid Jinja."""
    return frozenset(name for text in each(templates) for name in _fields_of(text))


@functools.lru_cache(maxsize=64)
def _fields_of(template: str) -> frozenset[str]:
    tree = tree_of(template)
    texts = [item.arg for item in tree.find_all(nodes.Getitem)] + [each.expr for each in tree.find_all(nodes.Compare)]
    values = {text.value for text in texts if isinstance(text, nodes.Const) and isinstance(text.value, str)}
    return frozenset(values | {attribute.attr for attribute in tree.find_all(nodes.Getattr)})


WHERE = "model.template_options"
TEMPLATE_FILE = "chat_template.jinja"
"""The file in which transformers saves the template of a tokenizer."""
_ESCAPES = {ord("\\"): "\\\\", ord('"'): '\\"', ord("\n"): "\\n", ord("\r"): "\\r"}
_LINE = "{{%- if {name} is not defined %}}{{%- set {name} = {value} %}}{{%- endif %}}\n"
"""Templates are rendered with ``trim_blocks``, so the line break leaves no trace in the text."""


def with_options(templates: Templates, options: Mapping[str, Any]) -> Templates:
    """The templates with ``options`` as the values of what a caller leaves out. A template that begins with these
    options already, as a saved result's does, stays as it is. Raises DataError: a template is not valid Jinja, an
    option is read by none, or its value cannot be written."""
    for fault in (*value_faults(options), *name_faults(templates, options)):
        raise DataError(fault.message, where=fault.where)
    lines = "".join(_LINE.format(name=name, value=_literal(value)) for name, value in options.items())
    if isinstance(templates, str):
        return lines + templates.removeprefix(lines)
    return {name: lines + text.removeprefix(lines) for name, text in templates.items()}


def value_faults(options: Mapping[str, Any]) -> Iterator[Fault]:
    """Values that are neither true or false, a number, a text, nor a list of these."""
    for name, value in options.items():
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, (int, str)) or (isinstance(item, float) and math.isfinite(item)) for item in items):
            message = f"{value!r:.60} is not allowed; give true or false, a number, a text, or a list of these"
            if value is None:
                message += f"; to leave the option out, remove it (~{WHERE}.{name})"
            yield Fault(where=f"{WHERE}.{name}", message=message)


def name_faults(templates: Templates, options: Mapping[str, Any]) -> Iterator[Fault]:
    """Options that the templates never read, each with the nearest one. Raises DataError: a template is not valid
    Jinja."""
    if not options:
        return
    read = sorted(options_of(templates))
    for name in options:
        if name not in read:
            hint = suggestion(name, read) if read else "the template has no options"
            yield Fault(where=f"{WHERE}.{name}", message=f"the chat template has no option of this name; {hint}")


def own_template(folder: Path) -> Templates | None:
    """The chat template in a model's folder, read without transformers; None if there is none or it cannot be read."""
    try:
        file = folder / TEMPLATE_FILE
        if file.is_file():
            return small_text(file)
        config = parse_json((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        stored = config.get("chat_template")
        return {entry["name"]: entry["template"] for entry in stored} if isinstance(stored, list) else stored
    except (OSError, ValueError, LookupError, AttributeError, TypeError, DataError):
        return None


def _literal(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_literal(item) for item in value)}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value.translate(_ESCAPES)}"'
    return repr(value)


TRL = "trl:"


def trl_file(name: str) -> Path:
    """The file of the template ``name``. Raises DataError: TRL ships none of this name, or is not installed."""
    files = trl_templates()
    if name not in files:
        hint = nearest(name, files)
        did_you_mean = f"; did you mean {TRL}{hint}?" if hint else ""
        raise DataError(
            f"TRL ships no chat template {name!r}{did_you_mean}",
            where="model.chat_template",
            remedy=f"one of: {', '.join(sorted(files))}" if files else "install trl",
        )
    return files[name]


def trl_templates() -> dict[str, Path]:
    """The templates by name; empty if TRL is not installed."""
    package = find_spec("trl")
    folders = [] if package is None else package.submodule_search_locations or []
    return {file.stem: file for folder in folders for file in Path(folder, "chat_templates").glob("*.jinja")}


def trained_as(template: str) -> tuple[str, str] | None:
    """The source of TRL's training template for a model, if TRL ships one, and its text. The model's own ``template``
    is known by its text. Lines in front of it, such as those of options, stay."""
    files = trl_templates()
    for name, file in sorted(files.items()):
        trained = f"{name}_training"
        own = file.read_text(encoding="utf-8")
        if trained in files and template.endswith(own):
            return f"{TRL}{trained}", template.removesuffix(own) + files[trained].read_text(encoding="utf-8")
    return None
