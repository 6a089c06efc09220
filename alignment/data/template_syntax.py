"""What a chat template reads, found in its syntax tree: names of variables, fields of messages, texts.

Nothing is rendered, and neither torch nor transformers is imported, so a plan can look too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

from jinja2 import TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from alignment.core.errors import DataError

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
        """The body of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=64)
def tree_of(template: str) -> nodes.Template:
    """The syntax tree of a template, in which the body of a ``generation`` block is part of the text around it.

    Raises:
        DataError: the template is not valid Jinja.
    """
    environment = ImmutableSandboxedEnvironment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
    try:
        return environment.parse(template)
    except TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is not valid Jinja: line {error.lineno}: {error.message}",
            remedy="correct it, or set model.chat_template to another",
        ) from error


def each(templates: Templates) -> tuple[str, ...]:
    """The texts of a tokenizer's templates."""
    return (templates,) if isinstance(templates, str) else tuple(templates.values())


def options_of(templates: Templates) -> frozenset[str]:
    """The names that templates read and that no conversation gives them, such as ``enable_thinking``.

    A name that a template sets before it reads it is none, also where it is set in one branch only.

    Raises:
        DataError: a template is not valid Jinja.
    """
    return frozenset(name for text in each(templates) for name in _options_of(text)) - INPUTS


def reads_tools(templates: Templates) -> bool:
    """Whether a template renders the tools that a conversation is given; the others leave them out.

    Raises:
        DataError: a template is not valid Jinja.
    """
    return any("tools" in meta.find_undeclared_variables(tree_of(text)) for text in each(templates))


@functools.lru_cache(maxsize=64)
def _options_of(template: str) -> frozenset[str]:
    tree = tree_of(template)
    first_read: dict[str, bool] = {}
    for name, is_read in _names(tree):
        first_read.setdefault(name, is_read)
    return frozenset(name for name in meta.find_undeclared_variables(tree) if first_read[name])


def _names(node: nodes.Node) -> Iterator[tuple[str, bool]]:
    """Each name in the order of evaluation, and whether it is read there or set."""
    if isinstance(node, nodes.Name):
        yield node.name, node.ctx == "load"
    children = (node.node, node.target) if isinstance(node, nodes.Assign) else node.iter_child_nodes()
    for child in children:
        yield from _names(child)


def fields_of(templates: Templates) -> frozenset[str]:
    """The names that templates use as fields, and the texts that they look for in others.

    Examples: ``message.thinking``, ``message['thinking']``, ``'thinking' in message``, ``'</think>' in content``.

    Raises:
        DataError: a template is not valid Jinja.
    """
    return frozenset(name for text in each(templates) for name in _fields_of(text))


@functools.lru_cache(maxsize=64)
def _fields_of(template: str) -> frozenset[str]:
    return frozenset(_fields(tree_of(template)))


def _fields(tree: nodes.Template) -> Iterator[str]:
    for attribute in tree.find_all(nodes.Getattr):
        yield attribute.attr
    for item in tree.find_all(nodes.Getitem):
        if isinstance(item.arg, nodes.Const) and isinstance(item.arg.value, str):
            yield item.arg.value
    for comparison in tree.find_all(nodes.Compare):
        if isinstance(comparison.expr, nodes.Const) and isinstance(comparison.expr.value, str):
            yield comparison.expr.value
