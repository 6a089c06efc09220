"""Options of a chat template: values for names that it reads beside the conversation, such as ``enable_thinking``.

An option becomes a line in front of the template, which sets the name where the caller does not. So everything that
renders the template renders it with the option: every stage, a saved tokenizer, an exported model, a server. A caller
that gives the name a value of its own still decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alignment.config.did_you_mean import suggestion
from alignment.config.faults import Fault
from alignment.core.errors import DataError
from alignment.core.files import parse_json
from alignment.core.small_files import small_text
from alignment.data.template_syntax import Templates, options_of

WHERE = "model.template_options"
TEMPLATE_FILE = "chat_template.jinja"
"""The file in which transformers saves the template of a tokenizer."""
_ESCAPES = {ord("\\"): "\\\\", ord('"'): '\\"', ord("\n"): "\\n", ord("\r"): "\\r"}
_LINE = "{{%- if {name} is not defined %}}{{%- set {name} = {value} %}}{{%- endif %}}\n"
"""Templates are rendered with ``trim_blocks``, so the line break leaves no trace in the text."""


def with_options(templates: Templates, options: Mapping[str, Any]) -> Templates:
    """The templates with ``options`` as the values of what a caller leaves out.

    Raises:
        DataError: a template is not valid Jinja, an option is read by none, or its value cannot be written.
    """
    for fault in (*value_faults(options), *name_faults(templates, options)):
        raise DataError(fault.message, where=fault.where)
    lines = "".join(_LINE.format(name=name, value=_literal(value)) for name, value in options.items())
    if isinstance(templates, str):
        return lines + templates
    return {name: lines + text for name, text in templates.items()}


def value_faults(options: Mapping[str, Any]) -> Iterator[Fault]:
    """Values that are neither true or false, a number, a text, nor a list of these."""
    for name, value in options.items():
        if not all(_is_plain(item) for item in (value if isinstance(value, list) else [value])):
            message = f"{value!r:.60} is not allowed; give true or false, a number, a text, or a list of these"
            if value is None:
                message += f"; to leave the option out, remove it (~{WHERE}.{name})"
            yield Fault(where=f"{WHERE}.{name}", message=message)


def name_faults(templates: Templates, options: Mapping[str, Any]) -> Iterator[Fault]:
    """Options that the templates never read, each with the nearest one.

    Raises:
        DataError: a template is not valid Jinja.
    """
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


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))


def _literal(value: Any) -> str:
    """The value in Jinja's language."""
    if isinstance(value, list):
        return f"[{', '.join(_literal(item) for item in value)}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value.translate(_ESCAPES)}"'
    return repr(value)
